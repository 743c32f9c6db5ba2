"""Previews next to the real host: what a sampling shows, and that showing changes nothing."""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfyui_concepts.demo.files import LORAS
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.views import ViewPrompt
from comfyui_concepts.host.compose.guider import ComposeGuider
from comfyui_concepts.host.conduct.guider import ConductGuider
from comfyui_concepts.host.conduct.layout import LayoutReference
from comfyui_concepts.host.engine.base_prompts import BasePrompts
from comfyui_concepts.host.engine.preview import painter, show_panels, small_picture, with_previews
from comfyui_concepts.host.lora.concept import make_concept
from comfyui_concepts.host.lora.files import read_lora
from comfyui_concepts.methods.anagram.combine import AVERAGING, combiner
from comfyui_concepts.methods.anagram.views import view_named
from comfyui_concepts.methods.compose.settings import Compose
from comfyui_concepts.methods.conduct.settings import Conduct
from comfyui_concepts.methods.panels import SIDE, Panel
from comfyui_concepts.methods.regions import Box, Region, coverage

NAMES = ("identity", "rotate_180", "negate")


@pytest.fixture
def seen(monkeypatch):
    """What the host's progress bars were given, as the page would get it."""
    messages: list = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: messages.append((value, total, preview))
    )
    return messages


def _sample(demo_model, guider_type=ViewsGuider, callback=None, shows=True, steps=3, names=NAMES[:2]):
    model, clip, _ = demo_model
    cond = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
    views = [view_named(name) for name in names]
    combine = combiner(AVERAGING, [1.0] * len(views), views)
    guider = guider_type(model, [ViewPrompt(v, cond, cond) for v in views], combine, 4.0)
    guider.shows_panels = shows
    latent = torch.zeros(2, model.get_model_object("latent_format").latent_channels, 16, 16)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=3)


def test_a_sampling_shows_every_view_upright_after_each_step(demo_model, seen):
    called: list[int] = []
    _sample(demo_model, callback=lambda step, x0, x, steps: called.append(step))
    assert called == [0, 1, 2]
    assert [message[:2] for message in seen] == [(1, 3), (2, 3), (3, 3)]
    for _, _, (kind, picture, largest) in seen:
        assert (kind, picture.size) == ("JPEG", (2 * SIDE + 4, SIDE + 16))
        assert largest >= 256
    last = torch.frombuffer(bytearray(seen[-1][2][1].tobytes()), dtype=torch.uint8).reshape(SIDE + 16, -1, 3)[16:]
    upright, turned = last[:, :SIDE].float(), last[:, -SIDE:].float()
    assert (upright - turned.flip(0, 1)).abs().mean() < 3  # the same picture, turned round
    assert (upright - turned).abs().mean() > 6


def test_showing_changes_nothing_in_the_picture(demo_model, seen):
    pictures = [_sample(demo_model, callback=lambda *_: None, shows=shows) for shows in (True, False)]
    assert torch.equal(*pictures)
    assert len(seen) == 3  # without it, the host's own callback alone


def test_nobody_watches_a_run_without_a_callback(demo_model, seen):
    _sample(demo_model)
    assert seen == []


def test_a_cancel_gets_through_and_the_next_run_works(demo_model, monkeypatch):
    def cancelled(*_, **__):
        raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", cancelled)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            _sample(demo_model, callback=lambda *_: None)
    assert _sample(demo_model, callback=lambda *_: None).isfinite().all()


def test_latents_without_colours_leave_the_callback_alone(demo_model, monkeypatch):
    model = demo_model[0]
    latent_format = model.get_model_object("latent_format")
    monkeypatch.setattr(latent_format, "latent_rgb_factors", None)

    def callback(*_):
        return None

    assert with_previews(callback, model, lambda x0, paint: []) is callback
    assert with_previews(None, model, lambda x0, paint: []) is None


FORMATS = [kind for kind in vars(comfy.latent_formats).values() if hasattr(kind, "latent_channels")]
PACKED = {"Flux2": 8}
"""Formats whose latents pack positions of the picture, and the side of a picture for a latent of 4 × 4."""


def test_latents_of_every_format_are_painted_without_the_hosts_previews(new_model):
    model, painted = new_model(), []
    for kind in FORMATS:
        model.add_object_patch("latent_format", form := kind())
        if form.latent_rgb_factors is not None and form.latent_dimensions > 1:
            length = (1,) * (form.latent_dimensions - 2)
            side = PACKED.get(kind.__name__, 4)
            if side == 4 and len(form.latent_rgb_factors) != form.latent_channels:
                assert painter(model) is None, kind.__name__
                continue
            shape = painter(model)(torch.randn(2, form.latent_channels, *length, 4, 4)).shape
            assert shape == (side, side, 3), kind.__name__
            painted.append(kind.__name__)
    assert {"SD15", "Flux", "Flux2", "Wan21", "ChromaRadiance"} <= set(painted)


def test_colours_for_another_number_of_channels_paint_nothing(new_model):
    model = new_model()
    model.add_object_patch("latent_format", form := comfy.latent_formats.SD15())
    form.latent_rgb_factors = form.latent_rgb_factors[:3]
    assert painter(model) is None
    assert small_picture(model, torch.randn(1, 4, 4, 4)) is None


class Packed(comfy.latent_formats.SD15):
    """Four positions of a grey picture in the four channels of a latent."""

    def __init__(self):
        super().__init__()
        self.latent_rgb_factors, self.latent_rgb_factors_bias = [[0.3, 0.3, 0.3]], None
        self.latent_rgb_factors_reshape = lambda latent: torch.nn.functional.pixel_shuffle(latent, 2)


@pytest.mark.parametrize("guider_type", [ViewsGuider, ConductGuider, ComposeGuider])
def test_every_guider_shows_latents_that_pack_positions(demo_model, seen, guider_type):
    model = demo_model[0].clone()
    model.add_object_patch("latent_format", Packed())
    packed, callback = (model, *demo_model[1:]), lambda *_: None
    if guider_type is ViewsGuider:
        _sample(packed, callback=callback, steps=1)
    else:
        settings = Conduct(refine_end=0) if guider_type is ConductGuider else Compose(enhancement=0)
        _several(packed, guider_type, settings, steps=1)[1](callback)
    assert len(seen) == 1


def test_panels_of_any_sizes_are_shown(seen):
    show_panels([Panel(torch.rand(8, 16, 3), "wide"), Panel(torch.rand(20, 10, 3), "high")], 1, 2)
    assert seen[0][2][1].size == (2 * SIDE + 4, SIDE + 16)


def _several(demo_model, guider_type, settings, *layout, regions=True, steps=4):
    """A guider of a lion on the left and a robot on the right, and ``run(callback)``, which samples with it."""
    model, clip, _ = demo_model
    prompt = "on the left a cat and on the right a dog, yellow background"
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")]
    concepts = [
        make_concept(read_lora(LORAS / f"concepts-demo-{name}.safetensors"), 1.0, clip, f"a {name}", f"a {name}", "")
        for name in ("lion", "robot")
    ]
    halves = [Region(boxes=(Box(x, 0.0, 0.5, 1.0),)) for x in (0.0, 0.5)]
    layout = [LayoutReference(encoded[0], reference) for reference in layout]
    base = BasePrompts(*encoded, 3.0)
    if guider_type is ConductGuider:
        drawn = halves if regions else None
        guider = ConductGuider(model, base, concepts, drawn, settings, *layout)
    else:
        covered = (lambda h, w: coverage(halves, h, w)) if regions else None
        guider = guider_type(model, base, concepts, covered, settings, *layout)
    latent = torch.zeros(1, 4, 16, 16)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    sampler = comfy.samplers.sampler_object("euler")

    def run(callback=None):
        return guider.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=3)

    return guider, run


def _sheet(rows):
    return 3 * (SIDE + 4) - 4, rows * (SIDE + 16 + 4) - 4


@pytest.mark.parametrize(
    ("guider_type", "settings"), [(ConductGuider, Conduct(refine_end=0)), (ComposeGuider, Compose(enhancement=0))]
)
def test_several_concepts_are_shown_under_their_regions(demo_model, seen, guider_type, settings):
    """One panel with all of them, and one for each; where nobody looks at attention, none is shown."""
    _, run = _several(demo_model, guider_type, settings)
    watched_by = run(lambda *_: None)
    assert [message[:2] for message in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {message[2][1].size for message in seen} == {(_sheet(1)[0], SIDE + 16)}
    assert torch.equal(watched_by, run())


LAYOUT = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
ALIGNED = Conduct(iterations=1, guidance_end=0.7, refine_end=0)
LOOKING = {
    "refinement": (
        ConductGuider,
        Conduct(refine_start=0.1, refine_end=0.9),
        (),
        [1, 2, 2, 2],
        [None, 0.33, 0.67, 0.67],
    ),
    "alignment": (ConductGuider, ALIGNED, (LAYOUT,), [2, 2, 2, 2], [0, 0.33, 0.67, 0.67]),
    "gradient steps": (ComposeGuider, Compose(end=0.4), (), [2, 2, 2, 2], [0, 0.33, 0.33, 0.33]),
}


@pytest.mark.parametrize("name", LOOKING)
def test_attention_that_somebody_looks_at_is_shown_below_the_regions(demo_model, seen, name):
    """With the percent it is of, at no call of the model more, and with no trace in the picture or on the guider."""
    guider_type, settings, layout, rows, percents = LOOKING[name]
    guider, run = _several(demo_model, guider_type, settings, *layout)
    calls = [0]

    def counted(executor, *args, **kwargs):
        calls[-1] += 1
        return executor(*args, **kwargs)

    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    comfy.patcher_extension.add_wrapper_with_key(kind, "counting", counted, guider.model_options, is_model_options=True)
    run()  # an inverted layout is kept from here on
    looks = []
    calls.append(0)
    seen.clear()
    watched_by = run(lambda *_: looks.append(guider.attention()))
    assert [message[2][1].size[1] for message in seen] == [_sheet(count)[1] for count in rows]
    assert [look and look.percent for look in looks] == pytest.approx(percents, abs=0.03)
    assert all(look.maps.shape[0] == 2 and look.maps.isfinite().all() for look in looks if look)
    calls.append(0)
    assert torch.equal(watched_by, run())
    assert calls[1] == calls[2]
    assert guider.attention() is None


def test_attention_lies_where_the_concepts_are(demo_model, seen):
    """The lion's more on the left than the robot's: for the phrases, and for the cells of the masks."""
    for guider_type, settings in (
        (ComposeGuider, Compose(end=1.0, stop="never")),
        (ConductGuider, Conduct(refine_start=0.5, refine_end=0.9)),
    ):
        guider, run = _several(demo_model, guider_type, settings)
        looks = []
        run(lambda *_, guider=guider, looks=looks: looks.append(guider.attention()))
        left, right = (half.mean((-2, -1)) for half in looks[-1].maps.chunk(2, -1))
        lion, robot = left / (left + right)
        assert lion > robot


def test_regions_that_are_looked_for_are_seen_coming(demo_model, seen):
    """First the picture and below it the attention so far, then the regions that were found in it as well."""
    guider, run = _several(demo_model, ComposeGuider, Compose(enhancement=0, automatic=0.4), regions=False)
    looks = []
    run(lambda *_: looks.append((guider.attention(), guider.regions)))
    assert [regions is None for _, regions in looks] == [True, True, False, False]
    assert [attention.percent for attention, _ in looks] == pytest.approx([0, 0.33, 0.33, 0.33], abs=0.03)
    assert [message[2][1].size for message in seen] == [_sheet(2)] * 4
