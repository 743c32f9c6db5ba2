"""Concept Conductor on transformers: paths are the concepts' own models, and they meet in the picture's tokens."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace

import comfy.controlnet
import comfy.model_management
import pytest
import torch
from comfyui_concepts.host import keys
from comfyui_concepts.host.conduct.guider import ConductGuider
from comfyui_concepts.host.conduct.layout import Aligner, LayoutReference
from comfyui_concepts.host.conduct.paths import Paths
from comfyui_concepts.host.engine.base_prompts import BasePrompts, numbered, with_words_of
from comfyui_concepts.host.engine.sampling import signal_and_noise
from comfyui_concepts.host.families.cosmos import Cosmos
from comfyui_concepts.host.lora.branches import WholeRows
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.host.registry import architecture_of
from comfyui_concepts.methods.conduct.settings import Conduct
from comfyui_concepts.methods.masks import MaskPyramid
from comfyui_concepts.methods.regions import Box, Region

from ..compose.joint_cases import apart, base, changes, concept, plain, prompt, sample
from ..faults import FAULTS, assert_as_before, assert_as_remembered, remembered, tensors_of
from ..tiny_transformers import compiled, conditioning, counted, names, noise, shared_transformer

LEFT, RIGHT = Region("left", (Box(0, 0, 4 / 7, 1),)), Region("right", (Box(4 / 7, 0, 3 / 7, 1),))
EVERYWHERE = Region("all", (Box(0, 0, 1, 1),))
BARE = Conduct(refine_end=0.0)
LAID_OUT = replace(BARE, iterations=2, guidance_end=0.0, guidance_weight=0.004)
WHOLE = replace(BARE, whole_transformers=True)
FOLLOWED = replace(BARE, refine_start=0.0, refine_end=1.0)
AFTER_BLOCKS = r"^(final_layer|last|proj_out|norm_out|head|norm_final)\b"
FAMILIES = [name for name in names() if name != "flux_schnell"]
TWO = ["flux", "zimage"]
FAST = [name for name in FAMILIES if name != "flux2"]
"""Flux.2's prompts have 512 rows each."""
UNEQUAL = ["chroma", "krea2", "lumina2", "qwen", "zimage"]
"""The families whose prompts are as long as their text."""


def size_of(name):
    """An odd one; Cosmos takes only even ones on older hosts."""
    return (10, 8) if name == "cosmos" else (9, 7)


def only(name, seed, wanted):
    """A concept whose LoRA is on these layers alone, and the model with it in its weights."""
    whole, model = concept(name, seed), shared_transformer(name).clone()
    tensors = {
        k: t for k, t in whole.lora.tensors.items() if wanted(k.split(".lora_")[0].removeprefix("diffusion_model."))
    }
    factors = {layer: pair for layer, pair in changes(name, seed).items() if wanted(layer)}
    model.add_patches({f"diffusion_model.{n}.weight": ("diff", (up @ down,)) for n, (down, up) in factors.items()})
    return replace(whole, lora=LoraFile(whole.name, tensors)), model


def in_blocks(name, seed=0):
    return only(name, seed, lambda layer: not re.search(AFTER_BLOCKS, layer))


def unpatched(name):
    """A clone in whose weights nothing is: the host takes patches of another clone out when it loads the next one."""
    clone = shared_transformer(name).clone()
    sample(plain(clone, base(name)), size=size_of(name))
    return clone


def guider(name, concepts, regions, settings=BARE, *, model=None, prompts=None, layout=None):
    return ConductGuider(model or shared_transformer(name), prompts or base(name), concepts, regions, settings, layout)


@contextlib.contextmanager
def outputs_of(name):
    """What the network itself makes in each call; the host's wrapper rounds further."""
    found = []
    network = shared_transformer(name).model.diffusion_model
    handle = network.register_forward_hook(lambda m, i, out: found.append(out.clone()))
    try:
        yield found
    finally:
        handle.remove()


def rows_of(name, made, monkeypatch, **how):
    """What the network makes for each path's positive, in one step."""
    tables, keep = [], Paths._record_maps
    with outputs_of(name) as found, monkeypatch.context() as patch:
        patch.setattr(Paths, "_record_maps", lambda self, table, seen: (tables.append(table), keep(self, table, seen)))
        sample(made, size=size_of(name), **how)
    pairs = [(row, out) for table, out in zip(tables, found, strict=True) for row in table]
    return {row.owner.path: out[row.rows] for row, out in pairs if row.owner.cond_or_uncond == 0}


def alone(name, model, own):
    """What the network makes for a concept alone, its LoRA in the weights."""
    with outputs_of(name) as found:
        sample(plain(model, BasePrompts(own.positive, own.negative, 1.0)), size=size_of(name))
    return found[0]


# ---- paths and where they meet --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_path_is_its_concept_s_own_model_and_in_its_region_the_picture_is_the_path(name, monkeypatch):
    """Whole blocks: whatever the LoRAs act on, the layers after the last block left out."""
    (one, its_model), (two, _) = in_blocks(name, 0), in_blocks(name, 1)
    two = replace(two, positive=prompt(name, 10, 31))
    model, calls = counted(shared_transformer(name))
    rows = rows_of(name, guider(name, [one, two], [LEFT, RIGHT], WHOLE, model=model), monkeypatch)
    assert calls == [3]
    theirs = alone(name, its_model, one)
    assert apart(rows[1], theirs) < 1e-6
    assert torch.equal(rows[0][..., :4], rows[1][..., :4])  # two tokens of two cells
    assert torch.equal(rows[0][..., 4:], rows[2][..., 4:])
    assert apart(rows[0], theirs) > 1e-2


@pytest.mark.parametrize("name", FAST)
def test_where_attentions_meet_a_concept_of_attention_alone_is_whole(name, monkeypatch):
    """With a LoRA that also acts on the base's own layers in between, the picture is another one than the path's."""
    architecture = architecture_of(shared_transformer(name).model)
    attention = architecture.trained("attention")
    own, _ = only(name, 0, lambda layer: re.search(attention, layer) and "linear" not in layer)
    rows = rows_of(name, guider(name, [own], [EVERYWHERE]), monkeypatch)
    assert torch.equal(rows[0], rows[1])
    whole, _ = in_blocks(name)
    rows = rows_of(name, guider(name, [whole], [EVERYWHERE]), monkeypatch)
    assert apart(rows[0], rows[1]) > 1e-3


@pytest.mark.parametrize("name", FAST)
def test_over_nothing_without_strength_and_after_it_the_picture_is_the_base_s_bit_for_bit(name, monkeypatch):
    model, prompts, size = shared_transformer(name), base(name), size_of(name)
    theirs = sample(plain(model, prompts), size=size)
    assert apart(sample(guider(name, [concept(name)], [EVERYWHERE]), size=size), theirs) > 1e-2
    for concepts in ([concept(name, strength=0.0)], []):
        assert torch.equal(sample(guider(name, concepts, [EVERYWHERE] * len(concepts)), size=size), theirs)
    for settings in (BARE, WHOLE):
        made = guider(name, [concept(name)], [EVERYWHERE], settings)
        made.masks_for = lambda height, width: MaskPyramid(torch.zeros(1, height, width))
        nowhere = sample(made, size=size)
        assert apart(nowhere, theirs) < 1e-6  # a call of more rows is rounded otherwise
        made.settings = replace(settings, injection_end=-1.0)
        assert torch.equal(sample(made, size=size), theirs)
    assert torch.equal(sample(plain(model, prompts), size=size), theirs)


def test_the_ids_that_anima_reads_are_the_concept_s_words():
    """Its adapter reads them beside the encoded text."""
    (own, *_), (theirs, *_) = (conditioning("anima", length, seed) for length, seed in ((5, 1), (7, 2)))
    said = with_words_of(numbered([theirs]), [own], "positive")
    assert torch.equal(said[0][1]["t5xxl_ids"], own[1]["t5xxl_ids"])
    assert torch.equal(said[0][1]["t5xxl_weights"], own[1]["t5xxl_weights"])


# ---- layout ---------------------------------------------------------------------------------------------------------


def reference_for(name, *, passes=0, noised=True, points=()):
    """A random picture; where latents have an axis for frames, it has none, as most nodes give it."""
    clean = noise(shared_transformer(name), *size_of(name), seed=4)
    clean = clean.squeeze(2) if clean.ndim == 5 else clean
    return LayoutReference(prompt(name, 12, 40), clean, noised, points, passes=passes)


def aligners(monkeypatch, check):
    """``check`` gets every aligner at its steps, with the latent, the noise level and the options."""
    step = Aligner.step

    def checked(self, x, sigma, options):
        check(self, x, sigma, options)
        return step(self, x, sigma, options)

    monkeypatch.setattr(Aligner, "step", checked)


@pytest.mark.parametrize("name", FAST)
def test_steps_bring_the_keys_nearer_to_those_of_the_reference_and_leave_the_model_as_it_was(name, monkeypatch):
    model, seen = unpatched(name), []
    before = tensors_of(model)
    aligners(monkeypatch, lambda self, *_: seen.append(self))
    made = guider(name, [in_blocks(name)[0]], [EVERYWHERE], LAID_OUT, layout=reference_for(name))
    with outputs_of(name) as ends:
        out = sample(made, size=size_of(name))
    assert len(ends) == 1  # the passes for keys end before
    assert torch.isfinite(out).all()
    first, second = seen[-1].losses
    assert second < first
    assert_as_before(model, before)
    assert apart(out, sample(guider(name, [in_blocks(name)[0]], [EVERYWHERE]), size=size_of(name))) > 1e-4


@pytest.mark.parametrize("name", ["flux", "zimage"])
def test_the_gradient_is_that_of_differences(name, monkeypatch):
    found = []

    def check(self, x, sigma, options):
        direction = noise(shared_transformer(name), *size_of(name), seed=9)
        path, target = self.paths.paths[1], self._target

        def loss_at(z):
            with torch.no_grad():
                return float((self._keys(path, z, sigma, options) - target).double().square().mean(-1).sum())

        whole, self.paths.paths = self.paths.paths, [path]
        gradient = (x - self._moved(x, sigma, target, options)) / self.settings.guidance_weight
        self.paths.paths = whole
        signal, share = signal_and_noise(self.model.model_sampling, float(sigma.max()))
        slope = float((gradient * direction).sum()) / (signal**2 + share**2)
        numeric = (loss_at(x + 0.05 * direction) - loss_at(x - 0.05 * direction)) / 0.1
        found.append((slope, numeric))

    aligners(monkeypatch, check)
    settings = replace(LAID_OUT, iterations=1)
    sample(guider(name, [in_blocks(name)[0]], [EVERYWHERE], settings, layout=reference_for(name)), size=size_of(name))
    ((slope, numeric),) = found
    assert slope == pytest.approx(numeric, rel=0.03)


@pytest.mark.parametrize("name", TWO)
def test_a_latent_that_is_the_reference_under_its_prompt_has_its_keys(name, monkeypatch):
    """And so it does not move."""
    settings, found = replace(LAID_OUT, iterations=1), []

    def check(self, x, sigma, options):
        whole, self.paths.paths = self.paths.paths, [self.layout]
        known = next(iter(self.latents))
        moved = self._moved(self.latents[known], sigma, self._target, options)
        self.paths.paths = whole
        found.append(torch.equal(moved, self.latents[known]))

    aligners(monkeypatch, check)
    sample(guider(name, [concept(name)], [EVERYWHERE], settings, layout=reference_for(name)), size=size_of(name))
    assert found == [True]


# ---- masks that follow the shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
def test_masks_follow_what_image_tokens_look_at(name):
    made = guider(name, [concept(name, 0), concept(name, 1)], [LEFT, RIGHT], FOLLOWED)
    grids, whole = [], made.new_paths
    made.new_paths = lambda x: grids.append(whole(x)) or grids[-1]
    sample(made, size=size_of(name), steps=2)
    height, width = size_of(name)
    assert grids[0].map_grid == architecture_of(shared_transformer(name).model).grid(height, width)
    assert torch.equal(made.masks.sum(1), torch.ones(1, height, width))


def test_the_map_is_the_softmax_over_image_tokens_in_the_middle_of_the_network():
    name, calls = "flux", []
    model = shared_transformer(name).clone()

    def theirs(attention, q, k, *args, **kwargs):
        calls.append((q, k))
        return attention(q, k, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = theirs
    made = guider(name, [concept(name)], [EVERYWHERE], FOLLOWED, model=model)

    class Kept(dict):
        def clear(self):
            """What was recorded stays."""

    whole, kept = made.new_paths, Kept()

    def new_paths(x):
        paths = whole(x)
        paths.maps = kept
        return paths

    made.new_paths = new_paths
    sample(made, size=size_of(name))
    q, k = (t[:, :, 13:] for t in calls[2])  # two blocks of two streams, then the first of one
    probabilities = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)
    assert {0, 1} == set(kept)
    for map_ in kept.values():
        assert min(float((map_[0] - own).abs().max()) for own in probabilities) < 1e-6


@pytest.mark.parametrize("name", ["krea2", "qwen", "zimage"])
def test_first_masks_come_from_points_in_the_reference(name):
    if name not in FAMILIES:
        pytest.skip(f"this host has no {name}")
    layout = reference_for(name, noised=False, passes=1, points=((0.2, 0.5), (0.8, 0.5)))
    made = guider(name, [concept(name, 0), concept(name, 1)], None, LAID_OUT, layout=layout)
    sample(made, size=size_of(name))
    assert torch.equal(made.masks.sum(1), torch.ones(1, *size_of(name)))
    assert (made.masks[:, 1:].sum((-2, -1)) > 0).any()


# ---- with others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWO)
def test_concepts_before_the_base_give_the_same(name, monkeypatch):
    """As memory or a ControlNet with unequal prompts ask for it: only what is in the regions is kept."""
    both, regions = [concept(name, 0), concept(name, 1)], [LEFT, RIGHT]
    prompts = base(name, cfg=2.0)
    model, calls = counted(shared_transformer(name))
    whole = sample(guider(name, both, regions, WHOLE, model=model, prompts=prompts), batch=2)
    monkeypatch.setattr(Paths, "_fits_one_call", lambda *_: False)
    assert apart(sample(guider(name, both, regions, WHOLE, model=model, prompts=prompts), batch=2), whole) < 1e-6
    assert calls == [12, 4, 4, 4]


def test_a_control_net_s_part_lands_on_every_path(monkeypatch):
    """The prompts are unequal, and another pack reads them, so they are not filled up."""
    name, own = "flux", in_blocks("flux")[0]

    class Fixed(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, *more):
            part = torch.linspace(-1, 1, 20 * 64).reshape(1, 20, 64)
            return {"input": [part, part], "output": [part, part]}

    control = {"control": Fixed(), "control_apply_to_uncond": True}
    prompts = BasePrompts(prompt(name, 10, 0, **control), prompt(name, 8, 21), 1.0)
    model, calls = counted(shared_transformer(name))
    ours = sample(guider(name, [own], [EVERYWHERE], WHOLE, model=model, prompts=prompts))
    assert calls == [1, 1]
    seen = BasePrompts(prompt(name, 13, 20, **control), own.negative, 1.0)
    theirs = sample(plain(in_blocks(name)[1], seen))
    assert apart(ours, theirs) < 1e-6
    assert apart(theirs, sample(plain(in_blocks(name)[1], base(name)._replace(positive=own.positive)))) > 1e-3


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pair
        for pair in (("flux", {}), ("krea2", {"reference_latents_method": "index_timestep_zero"}))
        if pair[0] in FAST
    ],
)
def test_references_are_behind_the_picture_on_every_path(name, how, monkeypatch):
    """Krea 2 then has a second time step for them, in further rows of its layers without tokens."""
    values = {"reference_latents": [noise(shared_transformer(name), 6, 6, seed=9)], **how}
    (one, its_model), two = in_blocks(name, 0), concept(name, 1)
    rows = rows_of(name, guider(name, [one, two], [LEFT, RIGHT], WHOLE, prompts=base(name, **values)), monkeypatch)
    with_picture = replace(one, positive=prompt(name, 13, 20, **values))
    assert apart(rows[1], alone(name, its_model, with_picture)) < 1e-6
    assert torch.equal(rows[0][..., :4], rows[1][..., :4])


def test_branches_of_whole_rows_find_them_in_layers_with_more():
    rows = WholeRows({"text": "rows", "time": "global"}.get, 3)
    assert rows.at("any", (3, 7), slice(1, 2)) == (slice(1, 2), None)
    assert rows.at("text", (12, 5), slice(1, 3)) == (slice(4, 12), None)
    place = rows.at("time", (6, 1), slice(1, 2))
    assert place.rows == slice(None)
    assert place.weights.tolist() == [[0], [1], [0], [0], [1], [0]]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("flux", BARE),
        ("zimage", WHOLE),
        ("zimage", LAID_OUT),
        ("flux", FOLLOWED),
    ],
)
def test_after_a_failure_in_the_middle_everything_is_as_it_was(name, settings, fault):
    model = unpatched(name)
    before = remembered(model)
    layout = reference_for(name) if settings is LAID_OUT else None
    made = guider(name, [concept(name)], [EVERYWHERE], settings, model=model, layout=layout)
    path = {"flux": "single_blocks.0.linear2", "zimage": "layers.0.attention.qkv"}[name]

    def failing(*_):
        raise FAULTS[fault]()

    handle = model.model.diffusion_model.get_submodule(path).register_forward_hook(failing)
    with pytest.raises((RuntimeError, comfy.model_management.InterruptProcessingException)):
        sample(made)
    handle.remove()
    assert_as_remembered(model, before)
    assert made.run is None


@pytest.mark.parametrize("settings", [BARE, WHOLE])
def test_a_block_in_whose_place_another_node_answers_is_named(settings):
    """The LoRA is on the first block, so its own layers have run."""
    model = shared_transformer("flux").clone()
    own, _ = only("flux", 0, lambda layer: layer.startswith("double_blocks.0"))
    model.set_model_patch_replace(
        lambda args, extra: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", 1
    )
    with pytest.raises(ValueError, match=r"hangs on the layer 'double_blocks\.1.*bypass"):
        sample(guider("flux", [own], [EVERYWHERE], settings, model=model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="bypass the TorchCompileModel node"):
        sample(guider("flux", [concept("flux")], [EVERYWHERE], model=compiled("flux")))


def test_a_network_with_another_pack_s_attentions_is_refused(monkeypatch):
    """Fused ones never run the layers at which paths meet."""
    monkeypatch.delitem(shared_transformer("qwen").model.diffusion_model.transformer_blocks[1].attn._modules, "to_k")
    with pytest.raises(ValueError, match="host's loader"):
        sample(guider("qwen", [only("qwen", 0, lambda layer: layer.endswith("to_q"))[0]], [EVERYWHERE]))


def test_another_number_of_tokens_is_refused():
    model = shared_transformer("flux").clone()
    network = model.model.diffusion_model
    handle = network.double_blocks[0].img_attn.proj.register_forward_hook(lambda m, i, out: out[:, :-1])
    with pytest.raises(ValueError, match="works on 19 image tokens"):
        sample(guider("flux", [in_blocks("flux")[0]], [EVERYWHERE], model=model))
    handle.remove()


def test_what_no_path_can_do_is_refused():
    layered = concept("flux")
    layered.positive[0][1][keys.LAYER_CONTEXTS] = torch.zeros(16, 5, 48)
    with pytest.raises(ValueError, match="ED-LoRA 'c0' does not work on Flux"):
        guider("flux", [layered], [EVERYWHERE])
    torn = prompt("flux", 10, 0, hooks=object())
    with pytest.raises(ValueError, match="LoRA hooks, which would split the one model call"):
        guider("flux", [], [], prompts=base("flux")._replace(positive=torn))
    with pytest.raises(ValueError, match="scale the reference picture"):
        sample(guider("flux", [concept("flux")], [EVERYWHERE], LAID_OUT, layout=reference_for("flux")), size=(8, 8))


def test_a_lora_on_what_prepares_prompts_is_refused(monkeypatch):
    """Anima's adapter, which no hook of a call sees."""
    monkeypatch.setattr(Cosmos, "before_call", lambda self, layer: layer.startswith("blocks.0."))
    with pytest.raises(ValueError, match=r"LoRA 'c0' on 'blocks\.0.*does not work"):
        sample(guider("cosmos", [concept("cosmos")], [EVERYWHERE]), size=(8, 8))
