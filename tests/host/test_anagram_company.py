"""Anagrams in company: the host's own guidance nodes, samplers that draw noise, and the global random state."""

from __future__ import annotations

import comfy.k_diffusion.sampling
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.guider import ViewPrompt, ViewsGuider
from comfyui_concepts.host.pixel_sync import PixelSyncGuider
from comfyui_concepts.methods.anagram.balance import BALANCES
from comfyui_concepts.methods.anagram.blend import blend
from comfyui_concepts.methods.anagram.combine import AVERAGING, combiner
from comfyui_concepts.methods.anagram.prediction import Predictions
from comfyui_concepts.methods.anagram.views import view_named


def _cond(seed):
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), {}]]


def _anagram(model, *names):
    combine = combiner(AVERAGING, [1.0] * len(names))
    prompts = [ViewPrompt(view_named(n), _cond(i), _cond(99)) for i, n in enumerate(names)]
    return ViewsGuider(model, prompts, lambda **known: combine(Predictions(**known)), 7.0)


def _plain(model):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(_cond(0), _cond(99))
    guider.set_cfg(7.0)
    return guider


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
