"""The views guider against the host's own: the same bits where it must change nothing, the right call counts, the same
host after."""

from __future__ import annotations

import dataclasses

import comfy.conds
import comfy.controlnet
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from comfyui_concepts.boards.demo_models import counting_clone
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.views import ViewPrompt
from comfyui_concepts.methods.anagram.combine import AVERAGING, Combination, combiner
from comfyui_concepts.methods.anagram.views import VIEWS as REGISTRY
from comfyui_concepts.methods.anagram.views import Settings, view_named

STEPS = 5
ON_LATENTS = [n for n in REGISTRY if view_named(n).latent != "pixels only"]
VIEWS = {name: view_named(name, Settings(parts=4 if name == "stripes" else 0, seed=1)) for name in REGISTRY}


def _cond(seed: int, tokens: int = 7) -> list:
    return [[torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(seed)), {}]]


def _combine(*weights, settings=AVERAGING):
    return combiner(settings, weights)


def _views(*names: str, weights=None, negatives=None) -> tuple[list[ViewPrompt], object]:
    prompts = [ViewPrompt(VIEWS[n], _cond(i), (negatives or [_cond(99)] * len(names))[i]) for i, n in enumerate(names)]
    return prompts, _combine(*(weights or [1.0] * len(names)))


def _plain(model, cfg: float) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(_cond(0), _cond(99))
    guider.set_cfg(cfg)
    return guider


def _sample(
    guider, sampler="euler", *, size=(8, 8), batch=1, latent=None, mask=None, steps=STEPS, denoise_from=0, noise=None
):
    noise = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(1)) if noise is None else noise
    latent = torch.zeros_like(noise) if latent is None else latent
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)[denoise_from:]
    torch.manual_seed(0)
    return guider.sample(
        noise, latent, comfy.samplers.sampler_object(sampler), sigmas, denoise_mask=mask, disable_pbar=True, seed=11
    )


KINDS = ("EPS", "V_PREDICTION", "FLOW")
OF_TWO_KINDS = [(name, kind) for name in comfy.samplers.SAMPLER_NAMES for kind in ("EPS", "FLOW")]
"""Every sampler, with and without noise that is mixed in; what a network predicts, no sampler sees."""
IN_TURN = [(name, KINDS[number % 3]) for number, name in enumerate(comfy.samplers.SAMPLER_NAMES)]


@pytest.mark.parametrize(
    ("sampler", "kind"), [*OF_TWO_KINDS, *((name, "V_PREDICTION") for name in ("euler", "dpmpp_sde", "uni_pc"))]
)
def test_one_identity_view_is_plain_sampling_bit_for_bit(tiny_models, sampler, kind):
    model = tiny_models[kind]
    plain = _sample(_plain(model, 7.0), sampler)
    ours = _sample(ViewsGuider(model, *_views("identity"), 7.0), sampler)
    assert torch.equal(ours, plain)


def _asked(model, guider_of, **settings) -> tuple[torch.Tensor, list[tuple[int, bool]]]:
    """The picture, and of each call of the network its rows and whether one of them was the negative's."""
    calls: list[tuple[int, bool]] = []
    negative = _cond(99)[0][0][0]

    def note(executor, x, timesteps, context, *args, **kwargs):
        calls.append((len(x), any(torch.equal(row, negative) for row in context)))
        return executor(x, timesteps, context, *args, **kwargs)

    noted = model.clone()
    noted.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", note)
    return _sample(guider_of(noted), **settings), calls


@pytest.mark.parametrize(("sampler", "kind"), IN_TURN)
def test_one_identity_view_at_cfg_1_is_plain_sampling_bit_for_bit(tiny_models, sampler, kind):
    model, settings = tiny_models[kind], {"sampler": sampler, "steps": 3}
    plain, theirs = _asked(model, lambda m: _plain(m, 1.0), **settings)
    one, ours = _asked(model, lambda m: ViewsGuider(m, *_views("identity"), 1.0), **settings)
    assert torch.equal(one, plain)
    assert ours == theirs


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_at_cfg_1_the_model_is_asked_for_no_negative(tiny_models, sampler):
    """But by the cfg++ samplers, which tell the host to ask for it all the same."""
    views = _views("identity", "flip")
    _, calls = _asked(tiny_models["FLOW"], lambda m: ViewsGuider(m, *views, 1.0), sampler=sampler, steps=2)
    assert set(calls) == {(4, True) if "cfg_pp" in sampler else (2, False)}


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc"])
@pytest.mark.parametrize(
    "settings",
    [
        {"cfg": 1.0},
        {"cfg": 7.0, "batch": 3},
        {"cfg": 7.0, "size": (8, 12)},
        {"cfg": 7.0, "denoise_from": 2, "latent": 1},
        {"cfg": 7.0, "latent": 1, "mask": 1},
    ],
    ids=["cfg 1", "batch", "not square", "img2img", "inpaint"],
)
def test_one_identity_view_is_plain_sampling_in_every_use(tiny_models, sampler, settings):
    settings = dict(settings)
    cfg = settings.pop("cfg")
    if settings.pop("latent", None):
        settings["latent"] = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    if settings.pop("mask", None):
        settings["mask"] = (torch.arange(64).view(1, 1, 8, 8) % 2).float()
    model = tiny_models["EPS"]
    plain = _sample(_plain(model, cfg), sampler, **settings)
    ours = _sample(ViewsGuider(model, *_views("identity"), cfg), sampler, **settings)
    assert torch.equal(ours, plain)


def _count_calls(model, guider_of, **settings) -> list[int]:
    """The batch size of each call of the network during one sampling."""
    counted, calls = counting_clone(model)
    _sample(guider_of(counted), **settings)
    return calls


def test_all_views_go_in_one_call_a_step(tiny_models):
    views = _views("identity", "flip", "rotate_180")
    calls = _count_calls(tiny_models["EPS"], lambda m: ViewsGuider(m, *views, 7.0))
    assert calls == [6] * STEPS
    calls = _count_calls(tiny_models["EPS"], lambda m: ViewsGuider(m, *views, 7.0), batch=2)
    assert calls == [12] * STEPS


def test_cfg_1_asks_only_for_the_positives(tiny_models):
    views = _views("identity", "flip", "rotate_180")
    assert _count_calls(tiny_models["EPS"], lambda m: ViewsGuider(m, *views, 1.0)) == [3] * STEPS


def test_a_host_short_of_memory_may_split_the_batch(tiny_models, monkeypatch):
    views = _views("identity", "flip", "rotate_180")
    model = tiny_models["EPS"]
    whole = _sample(ViewsGuider(model, *views, 7.0))
    monkeypatch.setattr(model.model, "memory_required", lambda *a, **k: 1e30)
    assert _count_calls(model, lambda m: ViewsGuider(m, *views, 7.0)) == [1] * (6 * STEPS)
    torch.testing.assert_close(_sample(ViewsGuider(model, *views, 7.0)), whole, rtol=1e-4, atol=1e-4)


def test_two_identity_views_of_one_prompt_are_plain_sampling(new_model):
    """In float64: 2N rows may take another kernel than N, and the network's two answers then differ by rounding alone.

    The host rounds each answer to float32, where that shows only next to a tie, as eps times the answer. Guidance
    multiplies it by at most 2 cfg - 1, and all of the steps together by the first sigma.
    """
    model, cfg, largest = new_model("EPS", torch.float64), 7.0, []
    hook = model.model.diffusion_model.register_forward_hook(lambda m, x, out: largest.append(float(out.abs().max())))
    plain = _sample(_plain(model, cfg))
    hook.remove()
    prompts, combine = _views("identity", "identity")
    ours = _sample(ViewsGuider(model, [prompts[0], prompts[0]], combine, cfg))
    sigma = float(comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)[0])
    bound = torch.finfo(torch.float32).eps * max(largest) * (2 * cfg - 1) * sigma
    assert bound < 1e-5
    torch.testing.assert_close(ours, plain, rtol=0, atol=bound)


def test_a_view_with_all_the_weight_is_sampled_alone(tiny_models):
    model = tiny_models["EPS"]
    prompts, combine = _views("identity", "flip", weights=[1.0, 0.0])
    alone = _sample(_plain(model, 7.0))
    torch.testing.assert_close(_sample(ViewsGuider(model, prompts, combine, 7.0)), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in ON_LATENTS if n != "identity"])
def test_turning_the_frame_turns_the_picture(tiny_models, name):
    """Views [id, V] on noise n, seen through V, are views [V⁻¹, id] on V(n)."""
    model, view = tiny_models["EPS"], VIEWS[name]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    combine = _combine(1, 1)

    class Undo:
        forward, inverse, latent = view.inverse, view.forward, view.latent
        check, check_patches = view.check, view.check_patches

    first = [ViewPrompt(VIEWS["identity"], _cond(0), _cond(99)), ViewPrompt(view, _cond(1), _cond(99))]
    second = [ViewPrompt(Undo, _cond(0), _cond(99)), ViewPrompt(VIEWS["identity"], _cond(1), _cond(99))]
    one = _sample(ViewsGuider(model, first, combine, 5.0), noise=noise)
    two = _sample(ViewsGuider(model, second, combine, 5.0), noise=view.forward(noise))
    torch.testing.assert_close(view.forward(one), two, rtol=1e-5, atol=1e-5)


def test_a_view_sees_its_own_prompt_in_its_own_frame(tiny_models):
    """What one step makes of two views is the mean of what each makes alone, in its frame."""
    model = tiny_models["EPS"]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    prompts, combine = _views("identity", "rotate_180")
    both = _sample(ViewsGuider(model, prompts, combine, 7.0), noise=noise, steps=1)
    upright = _sample(ViewsGuider(model, prompts[:1], _combine(1), 7.0), noise=noise, steps=1)
    turned_plain = comfy.samplers.CFGGuider(model)
    turned_plain.set_conds(_cond(1), _cond(99))
    turned_plain.set_cfg(7.0)
    turned = _sample(turned_plain, noise=noise.rot90(2, (-2, -1)), steps=1).rot90(2, (-2, -1))
    torch.testing.assert_close(both, (upright + turned) / 2, rtol=1e-4, atol=1e-4)


def test_a_mask_is_drawn_in_the_views_upright_frame(tiny_models):
    """A conditioning with a mask takes the per-view path; the mask's top is the top of what the viewer sees."""
    model = tiny_models["EPS"]
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    masked = [[_cond(1)[0][0], {"mask": mask, "mask_strength": 1.0}], *_cond(2)]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    view = VIEWS["rotate_180"]
    ours = _sample(ViewsGuider(model, [ViewPrompt(view, masked, _cond(99))], _combine(1), 7.0), noise=noise)
    plain = comfy.samplers.CFGGuider(model)
    plain.set_conds(masked, _cond(99))
    plain.set_cfg(7.0)
    torch.testing.assert_close(ours, view.inverse(_sample(plain, noise=view.forward(noise))), rtol=1e-4, atol=1e-4)


def test_prompts_of_different_length_work(tiny_models):
    prompts = [
        ViewPrompt(VIEWS["identity"], _cond(0, 7), _cond(99)),
        ViewPrompt(VIEWS["flip"], _cond(1, 11), _cond(99)),
    ]
    out = _sample(ViewsGuider(tiny_models["EPS"], prompts, _combine(1, 1), 7.0))
    assert torch.isfinite(out).all()


def test_other_packs_patches_run_once_on_the_combined_prediction(tiny_models):
    seen = []
    model = tiny_models["EPS"].clone()
    model.set_model_sampler_post_cfg_function(lambda args: seen.append(args["cond_denoised"].shape) or args["denoised"])
    model.set_model_sampler_cfg_function(
        lambda args: args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]
    )
    _sample(ViewsGuider(model, *_views("identity", "flip"), 7.0))
    assert seen == [(1, 4, 8, 8)] * STEPS


def test_a_batch_function_already_there_is_chained(tiny_models):
    calls = []

    def other(args):
        calls.append(len(args["conds"]))
        return comfy.samplers.calc_cond_batch(
            args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
        )

    model = tiny_models["EPS"].clone()
    model.set_model_sampler_calc_cond_batch_function(other)
    ours = _sample(ViewsGuider(model, *_views("identity", "flip"), 7.0))
    assert calls == [4] * STEPS
    assert torch.equal(ours, _sample(ViewsGuider(tiny_models["EPS"], *_views("identity", "flip"), 7.0)))


def _options_shape(options) -> str:
    return repr(sorted((k, sorted(v) if isinstance(v, dict) else v) for k, v in options.items()))


@pytest.mark.parametrize("fails", [False, True])
def test_the_host_is_as_it_was_found_also_after_an_exception(tiny_models, fails):
    model = tiny_models["EPS"].clone()
    before = _options_shape(model.model_options), {k: v.clone() for k, v in model.model.state_dict().items()}
    calls = []

    def combine(given):
        calls.append(1)
        if fails and len(calls) > 3:
            raise RuntimeError("out of memory, say")
        return _combine(1, 1)(given)

    guider = ViewsGuider(model, _views("identity", "flip")[0], combine, 7.0)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            _sample(guider)
    else:
        _sample(guider)
    assert _options_shape(model.model_options) == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in model.model.state_dict().items())
    assert torch.equal(_sample(_plain(model, 7.0)), _sample(_plain(tiny_models["EPS"], 7.0)))


def test_a_second_run_is_the_first_again_also_at_another_size_between(tiny_models):
    guider = ViewsGuider(tiny_models["EPS"], *_views("identity", "rotate_180"), 7.0)
    first = _sample(guider)
    _sample(guider, size=(12, 8))
    assert torch.equal(_sample(guider), first)


def test_bad_input_gets_a_sentence(tiny_models):
    model = tiny_models["EPS"]
    with pytest.raises(ValueError, match="needs at least one view"):
        ViewsGuider(model, [], _combine(1), 7.0)
    with pytest.raises(ValueError, match="'negate' moves single pixels.*4 channels.*'rotate_180'"):
        _sample(ViewsGuider(model, *_views("identity", "negate"), 7.0))
    with pytest.raises(ValueError, match="square canvas"):
        _sample(ViewsGuider(model, *_views("identity", "rotate_cw"), 7.0), size=(8, 12))


@pytest.mark.parametrize(
    ("view", "size", "says"),
    [
        ("pixel_permute", (8, 8), "moves single pixels.*Anagram Pixel Guider"),
        ("skew", (8, 8), "moves single pixels.*Anagram Pixel Guider"),
        ("gray", (8, 8), "no meaning on the 4 channels"),
        ("jigsaw", (8, 12), "square canvas"),
        ("patch_permute", (12, 12), r"into 8 equal parts.*try parts = 2 or 3 or 4 or 6 or 12"),
        ("half_swap", (8, 9), "choose another size"),
    ],
)
def test_a_view_that_this_latent_cannot_take_is_refused_before_the_first_step(tiny_models, view, size, says):
    prompts = [ViewPrompt(view_named(name), _cond(0), _cond(99)) for name in ("identity", view)]
    guider, calls = ViewsGuider(tiny_models["EPS"], prompts, lambda p: calls.append(1), 7.0), []
    with pytest.raises(ValueError, match=says):
        _sample(guider, size=size)
    assert not calls


@pytest.mark.parametrize("cfg", [0.0, 1.0])
def test_a_views_own_cfg_that_the_guiders_would_silence_is_refused(tiny_models, cfg):
    prompts, _ = _views("identity", "flip")
    prompts[1] = dataclasses.replace(prompts[1], cfg=7.0)
    combine = combiner(AVERAGING, [1.0, 1.0], (), [None, 7.0])
    guider = ViewsGuider(tiny_models["EPS"], prompts, combine, cfg)
    with pytest.raises(ValueError, match=f"'flip' has its own cfg, 7, and the sampler's is {cfg:g}.*set"):
        _sample(guider)
    guider.set_cfg(2.0)
    assert torch.isfinite(_sample(guider)).all()


def test_a_views_own_cfg_works_where_the_negative_is_asked_at_cfg_1(tiny_models):
    """As the cfg++ samplers do; and it may be the guider's own."""
    prompts, _ = _views("identity", "flip")
    own = [dataclasses.replace(p, cfg=1.0) for p in prompts]
    assert torch.equal(
        _sample(ViewsGuider(tiny_models["EPS"], own, _combine(1, 1), 1.0)),
        _sample(ViewsGuider(tiny_models["EPS"], prompts, _combine(1, 1), 1.0)),
    )
    own = [dataclasses.replace(p, cfg=1.5) for p in prompts]
    assert torch.isfinite(_sample(ViewsGuider(tiny_models["EPS"], own, _combine(1, 1), 1.0), "euler_cfg_pp")).all()


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
def test_the_combiner_is_told_where_in_the_sampling_it_is(tiny_models, kind):
    told = []

    def combine(p):
        told.append((p.percent, p.step, p.signal, p.sigma))
        return _combine(1)(p)

    _sample(ViewsGuider(tiny_models[kind], _views("identity")[0], combine, 7.0))
    progress, step, signal, noise = zip(*told, strict=True)
    assert list(step) == list(range(STEPS))
    assert all(0 <= p <= 1 for p in progress)
    assert list(progress) == sorted(progress)
    assert progress[0] < 0.01 < 0.7 < progress[-1]
    sampling = tiny_models[kind].get_model_object("model_sampling")
    assert sampling.percent_to_sigma(progress[2]) == pytest.approx(noise[2], rel=1e-2)
    assert all(s == (pytest.approx(1 - n) if kind == "FLOW" else 1.0) for s, n in zip(signal, noise, strict=True))


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
@pytest.mark.parametrize("cfg", [1.0, 7.0])
def test_rectification_with_one_view_is_plain_sampling_bit_for_bit(tiny_models, kind, cfg):
    combine = _combine(1.0, settings=Combination("prioritise first", rectification="match"))
    ours = _sample(ViewsGuider(tiny_models[kind], _views("identity")[0], combine, cfg))
    assert torch.equal(ours, _sample(_plain(tiny_models[kind], cfg)))


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
@pytest.mark.parametrize("balance", ["manual", "prioritise first", "alternate", "guidance norm"])
def test_every_balance_samples_every_kind_of_model(tiny_models, kind, balance):
    prompts, averaging = _views("identity", "rotate_180")
    combine = _combine(1, 1, settings=Combination(balance, rectification="match"))
    ours = _sample(ViewsGuider(tiny_models[kind], prompts, combine, 7.0), batch=2)
    assert torch.isfinite(ours).all()
    assert not torch.equal(ours, _sample(ViewsGuider(tiny_models[kind], prompts, averaging, 7.0), batch=2))


class FakeControl(comfy.controlnet.ControlBase):
    """Stands in for a ControlNet (there are no weights of one here): adds one half to the middle of the network."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def pre_run(self, model, percent_to_timestep_function):
        super().pre_run(model, percent_to_timestep_function)
        self.log.append("pre_run")

    def cleanup(self):
        super().cleanup()
        self.log.append("cleanup")

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.log.append((batched_number, x_noisy.clone()))
        return {"middle": [torch.full((1, 64, 4, 4), 0.5)], "input": [], "output": []}


@pytest.mark.parametrize("also_negative", [False, True])
def test_a_control_acts_as_in_plain_sampling(tiny_models, also_negative):
    """With the older Apply ControlNet the host itself copies the control to the negative."""
    logs = [], []
    results = []
    for log, make in zip(logs, (_plain_of, _anagram_of), strict=True):
        positive = [[_cond(0)[0][0], {"control": FakeControl(log), "control_apply_to_uncond": also_negative}]]
        results.append(_sample(make(tiny_models["EPS"], positive)))
    assert torch.equal(results[0], results[1])
    assert [c[0] for c in logs[0] if isinstance(c, tuple)] == [c[0] for c in logs[1] if isinstance(c, tuple)]
    assert logs[0].count("cleanup") == logs[1].count("cleanup") > 0
    assert not torch.equal(results[0], _sample(_plain(tiny_models["EPS"], 7.0)))


def _plain_of(model, positive, negative=None):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative or _cond(99))
    guider.set_cfg(7.0)
    return guider


def _anagram_of(model, positive, negative=None, view="identity"):
    return ViewsGuider(model, [ViewPrompt(VIEWS[view], positive, negative or _cond(99))], _combine(1), 7.0)


def test_a_control_sees_the_picture_upright(tiny_models):
    log = []
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    positive = [[_cond(1)[0][0], {"control": FakeControl(log)}]]
    _sample(_anagram_of(tiny_models["EPS"], positive, view="rotate_180"), noise=noise, steps=1)
    seen = next(c[1] for c in log if isinstance(c, tuple))
    torch.testing.assert_close(seen / seen.std(), (noise / noise.std()).rot90(2, (-2, -1)), rtol=1e-3, atol=1e-3)


def test_an_area_stays_in_its_view(tiny_models):
    """View 1 with and without an area on view 0: its own entries are the same."""
    entries = []
    areas = [[_cond(0)[0][0], {"area": (4, 8, 0, 0), "strength": 1.0}], *_cond(2)]
    for first in (areas, _cond(2)):
        prompts = [ViewPrompt(VIEWS["identity"], first, _cond(99)), ViewPrompt(VIEWS["flip"], _cond(1), _cond(98))]
        guider = ViewsGuider(tiny_models["EPS"], prompts, _combine(1, 1), 7.0)
        inner = guider.predict_noise

        def spy(*args, guider=guider, inner=inner, **kwargs):
            entries.append([len(getattr(guider.run.views[1], side)) for side in ("positive", "negative")])
            return inner(*args, **kwargs)

        guider.predict_noise = spy
        _sample(guider, steps=1)
    assert entries[0] == entries[-1] == [1, 1]


def _asking_again(model, gaps: list[float]):
    """The model with a patch that asks with the positive it is handed, and notes how far the answer is from the first
    one."""

    def again(args):
        (asked,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"]
        )
        gaps.append((asked - args["cond_denoised"]).abs().max().item())
        return args["denoised"]

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(again)
    return patched


def test_a_patch_that_asks_the_model_again_is_answered_in_the_views_frame(tiny_models):
    """Perturbed-attention guidance and its kin call the model with our conditioning after guidance."""
    gaps: list[float] = []
    _sample(_anagram_of(_asking_again(tiny_models["EPS"], gaps), _cond(1), view="rotate_180"))
    assert len(gaps) == STEPS
    assert max(gaps) < 1e-3


def _masked(seed):
    mask = (torch.arange(64).view(1, 8, 8) < 24).float()
    return [[_cond(seed)[0][0], {"mask": mask, "mask_strength": 1.0}], *_cond(seed + 1)]


@pytest.mark.parametrize(
    "positive",
    [_cond(1), [*_cond(1), *_cond(2)], _masked(1), [[_cond(1)[0][0], {"control": FakeControl([])}]]],
    ids=["one entry", "two entries", "a mask", "a control"],
)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0)], ids=str)
def test_a_patch_that_asks_the_model_again_is_answered_by_all_views(tiny_models, positive, weights):
    gaps: list[float] = []
    prompts = [ViewPrompt(VIEWS["identity"], _cond(0), _cond(99)), ViewPrompt(VIEWS["rotate_180"], positive, _cond(99))]
    model = _asking_again(tiny_models["EPS"], gaps)
    _sample(ViewsGuider(model, prompts, _combine(*weights), 7.0))
    assert len(gaps) == STEPS
    assert max(gaps) < 1e-3


def test_a_conditioning_of_one_view_or_of_nobody_is_answered_as_it_is(tiny_models):
    gaps, turn = [], VIEWS["rotate_180"].forward
    foreign = [{"uuid": "foreign", "model_conds": {"c_crossattn": comfy.conds.CONDCrossAttn(_cond(5)[0][0])}}]

    def again(args):
        def ask(conds, x, options):
            return comfy.samplers.calc_cond_batch(args["model"], conds, x, args["sigma"], options)

        x, own, plain = args["input"], args["cond"][:1], {"transformer_options": {}}
        mine, nothing, theirs = ask([own, None, foreign], x, args["model_options"])
        gaps.extend([mine - turn(ask([own], turn(x), plain)[0]), nothing, theirs - ask([foreign], x, plain)[0]])
        return args["denoised"]

    model = tiny_models["EPS"].clone()
    model.set_model_sampler_post_cfg_function(again)
    _sample(ViewsGuider(model, *_views("rotate_180", "flip"), 7.0), steps=1)
    assert len(gaps) == 3
    assert max(gap.abs().max().item() for gap in gaps) < 1e-3


@pytest.mark.parametrize("masked", [False, True], ids=["batched", "one by one"])
def test_the_picture_beside_the_latent_turns_with_it(tiny_models, masked):
    """Inpainting models take a picture beside the latent (``c_concat``); the network must see both in one frame."""
    seen = []
    model = tiny_models["EPS"].clone()
    beside = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6))

    def put_beside(executor, x, t, c_concat=None, *args, **kwargs):
        return executor(x, t, beside.repeat(len(x), 1, 1, 1), *args, **kwargs)

    def watch(executor, x, t, c_concat=None, *args, **kwargs):
        seen.append(c_concat[:1].clone())
        return executor(x, t, None, *args, **kwargs)

    wrappers = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    model.add_wrapper_with_key(wrappers, "test outside", put_beside)
    positive = [[_cond(1)[0][0], {"mask": torch.ones(1, 8, 8), "mask_strength": 1.0}]] if masked else _cond(1)
    guider = _anagram_of(model, positive, view="rotate_180")
    guider.predict_noise = _with_last_wrapper(guider, wrappers, watch)
    _sample(guider, steps=2)
    assert seen
    assert all(torch.equal(c, beside.rot90(2, (-2, -1))) for c in seen)


def _with_last_wrapper(guider, kind, wrapper):
    """predict_noise with a wrapper nearest to the network, inside the guider's own."""
    import comfyui_concepts.host.anagram.guider as module
    import comfyui_concepts.host.anagram.views as views

    inner, in_frames = guider.predict_noise, views.in_frames

    def framed(*args, **kwargs):
        options = in_frames(*args, **kwargs)
        comfy.patcher_extension.add_wrapper_with_key(kind, "test inside", wrapper, options, is_model_options=True)
        return options

    def predict(*args, **kwargs):
        views.in_frames = module.in_frames = framed
        try:
            return inner(*args, **kwargs)
        finally:
            views.in_frames = module.in_frames = in_frames

    return predict


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_other_types(dtype):
    """The host casts them; one identity view is plain sampling, and two views are finite."""
    from ..conftest import tiny_model

    model = tiny_model("EPS", dtype)
    ours = _sample(ViewsGuider(model, *_views("identity"), 7.0))
    assert torch.equal(ours, _sample(_plain(model, 7.0)))
    assert torch.isfinite(_sample(ViewsGuider(model, *_views("identity", "rotate_180"), 7.0))).all()


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral"])
def test_second_order_samplers_ask_all_views_in_one_call_an_evaluation(tiny_models, sampler):
    plain = _count_calls(tiny_models["EPS"], lambda m: _plain(m, 7.0), sampler=sampler)
    ours = _count_calls(tiny_models["EPS"], lambda m: ViewsGuider(m, *_views("identity", "flip"), 7.0), sampler=sampler)
    assert len(plain) > STEPS
    assert ours == [2 * rows for rows in plain]


def test_a_cancel_in_the_middle_of_the_network_leaves_the_host_as_found(tiny_models):
    from comfy.model_management import InterruptProcessingException

    model, calls = tiny_models["EPS"].clone(), []

    def cancel(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise InterruptProcessingException
        return executor(*args, **kwargs)

    cancelled = model.clone()
    cancelled.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", cancel)
    before = _options_shape(model.model_options)
    guider = ViewsGuider(cancelled, *_views("identity", "flip"), 7.0)
    with pytest.raises(InterruptProcessingException):
        _sample(guider)
    assert guider.run is None
    assert _options_shape(model.model_options) == before
    assert torch.equal(_sample(_plain(model, 7.0)), _sample(_plain(tiny_models["EPS"], 7.0)))


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_an_empty_conditioning_is_refused_by_its_view(tiny_models, side):
    conds = {"positive": _cond(0), "negative": _cond(99)} | {side: []}
    with pytest.raises(ValueError, match=r"The view 'flip' has an empty conditioning"):
        ViewsGuider(tiny_models["EPS"], [ViewPrompt(VIEWS["flip"], **conds)], _combine(1), 7.0)
