"""Anagrams in company: the host's own guidance nodes, samplers that draw noise, and the global random state."""

from __future__ import annotations

import comfy.hooks
import comfy.k_diffusion.sampling
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.model_patch import with_views
from comfyui_concepts.host.anagram.pixel_sync import PixelSyncGuider
from comfyui_concepts.host.anagram.views import ViewPrompt
from comfyui_concepts.methods.anagram.balance import BALANCES, ViewScorer
from comfyui_concepts.methods.anagram.blend import blend
from comfyui_concepts.methods.anagram.combine import AVERAGING, Combination, combiner
from comfyui_concepts.methods.anagram.prediction import Predictions
from comfyui_concepts.methods.anagram.views import view_named


def _cond(seed):
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), {}]]


def _anagram(model, *names):
    combine = combiner(AVERAGING, [1.0] * len(names))
    prompts = [ViewPrompt(view_named(n), _cond(i), _cond(99)) for i, n in enumerate(names)]
    return ViewsGuider(model, prompts, combine, 7.0)


def _plain(model, positive=None, negative=None):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive or _cond(0), negative or _cond(99))
    guider.set_cfg(7.0)
    return guider


def _guided(by, model, prompts, combine):
    """Our guider, or the host's around the model that KSampler gets."""
    return ViewsGuider(model, prompts, combine, 7.0) if by == "guider" else _plain(*with_views(model, prompts, combine))


def _sample(guider, sampler="euler"):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", 4)
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=11
    )


def _with(node: str, model):
    if node == "RescaleCFG":
        from comfy_extras.nodes_model_advanced import RescaleCFG

        return RescaleCFG().patch(model, 0.7)[0]
    from comfy_extras import nodes_pag

    made = nodes_pag.PerturbedAttentionGuidance
    if hasattr(made, "execute"):
        return made.execute(model, 3.0).args[0]
    return made().patch(model, 3.0)[0]


@pytest.mark.parametrize("node", ["RescaleCFG", "PerturbedAttentionGuidance"])
def test_one_view_under_the_hosts_guidance_nodes_is_the_host_bit_for_bit(tiny_models, node):
    model = _with(node, tiny_models["EPS"])
    theirs = _sample(_plain(model))
    assert torch.equal(_sample(_anagram(model, "identity")), theirs)
    assert not torch.equal(theirs, _sample(_plain(tiny_models["EPS"])))
    assert torch.isfinite(_sample(_anagram(model, "identity", "rotate_180"))).all()


HOOKED = "middle_block.1.transformer_blocks.0.attn2.to_v"


def _with_lora(cond, strength=1.0, seed=7):
    """The conditioning with a LoRA of its own, as the host's Create Hook LoRA and Cond Set Props make it."""
    draw = torch.Generator().manual_seed(seed)
    lora = {
        f"diffusion_model.{HOOKED}.lora_up.weight": torch.randn(64, 4, generator=draw),
        f"diffusion_model.{HOOKED}.lora_down.weight": torch.randn(4, 32, generator=draw),
    }
    return comfy.hooks.set_hooks_for_conditioning(cond, comfy.hooks.create_hook_lora(lora, strength, strength))


def _hooked(model, *views):
    """An anagram of (view, positive, negative)."""
    prompts = [ViewPrompt(view_named(name), positive, negative) for name, positive, negative in views]
    combine = combiner(AVERAGING, [1.0] * len(views))
    return prompts, combine


def _ksampled(model, positive, negative):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return comfy.sample.sample(
        model, noise, 4, 7.0, "euler", "normal", positive, negative, torch.zeros_like(noise), disable_pbar=True, seed=11
    )


@pytest.mark.parametrize("also_negative", [False, True])
def test_one_view_with_a_lora_hook_is_the_host_bit_for_bit(new_model, also_negative):
    model, positive = new_model("EPS"), _with_lora(_cond(0))
    negative = _with_lora(_cond(99)) if also_negative else _cond(99)
    theirs = _sample(_plain(model, positive, negative))
    prompts, combine = _hooked(model, ("identity", positive, negative))
    assert torch.equal(_sample(ViewsGuider(model, prompts, combine, 7.0)), theirs)
    assert torch.equal(_ksampled(*with_views(model, prompts, combine)), _ksampled(model, positive, negative))
    assert not torch.allclose(theirs, _sample(_plain(model)))


@pytest.mark.parametrize("by", ["guider", "ksampler"])
def test_a_lora_hook_acts_in_its_own_view_alone(new_model, by):
    """What one step makes of both is the mean of what it makes of each alone."""
    model = new_model("EPS")
    views = [("identity", _cond(0), _cond(99)), ("rotate_180", _with_lora(_cond(1)), _cond(99))]
    before = {k: v.clone() for k, v in model.model.state_dict().items()}

    def sampled(*views):
        prompts, combine = _hooked(model, *views)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 1)
        guider = _guided(by, model, prompts, combine)
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=11)

    both, alone = sampled(*views), [sampled(view) for view in views]
    torch.testing.assert_close(both, sum(alone) / 2, rtol=1e-4, atol=1e-4)
    bare = sampled(views[0], ("rotate_180", _cond(1), _cond(99)))
    assert (both - bare).abs().max() > 0.01 * bare.std()
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    assert not model.hook_patches


def _by_scorer(model, smoothing, by):
    """An anagram weighed by a scorer that reads the picture."""
    scorer = ViewScorer(lambda z: torch.stack([z[:, 0].std((-2, -1)), z[:, 1].std((-2, -1))], 1), 0.0, smoothing)
    combine = combiner(Combination(scorer), [1.0, 1.0])
    prompts = [ViewPrompt(view_named(n), _cond(i), _cond(99)) for i, n in enumerate(("identity", "flip"))]
    return _guided(by, model, prompts, combine)


@pytest.mark.parametrize("by", ["guider", "ksampler"])
def test_what_a_reader_has_read_is_remembered_within_a_sampling_and_not_beyond(tiny_models, by):
    model = tiny_models["EPS"]
    guider = _by_scorer(model, 0.9, by)
    first = _sample(guider)
    assert torch.equal(_sample(guider), first)
    assert torch.equal(first, _sample(_by_scorer(model, 0.9, "guider")))
    assert not torch.equal(first, _sample(_by_scorer(model, 0.0, by)))
    assert getattr(guider, "run", None) is None  # KSampler has a guider of the host


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2s_ancestral", "lcm"])
def test_a_sampler_draws_the_noise_it_draws_without_views(tiny_models, sampler, drawn):
    _sample(_plain(tiny_models["EPS"]), sampler)
    plain = list(drawn)
    drawn.clear()
    _sample(_anagram(tiny_models["EPS"], "identity", "rotate_180"), sampler)
    assert plain
    assert len(drawn) == len(plain)
    assert all(map(torch.equal, drawn, plain))


def test_the_global_random_state_is_left_alone(tiny_models):
    class Exact:
        spacial_compression_encode = staticmethod(lambda: 1)
        decode = staticmethod(lambda z: (z.movedim(1, -1) + 1) / 2)
        encode = staticmethod(lambda picture: (picture * 2 - 1).movedim(-1, 1))

    prompts = [ViewPrompt(view_named(n), _cond(i), _cond(99)) for i, n in enumerate(("identity", "negate"))]
    for guider in (
        _anagram(tiny_models["EPS"], "identity", "jigsaw"),
        PixelSyncGuider(tiny_models["EPS"], prompts, 5.0, Exact(), blend),
    ):
        before = torch.get_rng_state()
        _sample(guider)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [n for n in BALANCES if n not in ("prioritise first", "alternate")])
def test_a_balance_does_not_know_the_order_of_the_views(name):
    parts = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]

    def weigh(order):
        positive, negative = tuple(parts[i] for i in order), tuple(parts[3 + i] for i in order)
        given = Predictions(parts[0], 1.0, 1.0, 0.5, 3, positive, negative, 5.0)
        return BALANCES[name]([[1.0, 2.0, 0.5][i] for i in order])(given)

    torch.testing.assert_close(weigh([2, 0, 1]), weigh([0, 1, 2])[:, [2, 0, 1]])
