"""LoRA-Composer on a random UNet with the blocks of SD 1.5, in float64 against the plainest version (spec B8)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_tomesd import TomePatchModel
from comfyui_concepts.host import keys
from comfyui_concepts.host.compose import enhancement
from comfyui_concepts.host.compose.enhancement import AttentionMaps, Enhancer
from comfyui_concepts.host.compose.guider import ComposeGuider
from comfyui_concepts.host.compose.injection import Injection
from comfyui_concepts.host.compose.projections import ConceptPrompts, PreparedConcept, ProjectedConcepts
from comfyui_concepts.host.engine.attention import CROSS, SELF, capture, find_sites, loss_sites
from comfyui_concepts.host.engine.base_prompts import BasePrompts
from comfyui_concepts.host.engine.gradients import differentiable_options, gradient_of, without_inference_tensors
from comfyui_concepts.host.engine.latent_edits import EditSchedule
from comfyui_concepts.host.lora.branches import Branch, low_rank, prepared
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.host.registry import unet_of
from comfyui_concepts.methods.compose.settings import Compose
from comfyui_concepts.methods.masks import MaskPyramid
from comfyui_concepts.methods.regions import Box, Region, coverage, shares

from .composer_cases import (
    FULL,
    SIZE,
    call,
    concept,
    halves,
    injection,
    lora,
    original,
    prepared_concept,
    prompt,
    randn,
    sample,
)


@pytest.fixture(scope="module")
def patcher(new_model):
    return new_model("EPS", torch.float64, sd15=True)


def same(a, b, tolerance=1e-11):
    return all(torch.allclose(p, q, atol=tolerance, rtol=0) for p, q in zip(a, b, strict=True))


def test_one_concept_everywhere_is_the_model_with_its_cross_attention_alone(patcher):
    """Keys, values and to_out of the LoRA with the region's prompts; and not the whole LoRA."""
    v = prepared_concept(patcher, 5)
    out = call(patcher, injection(patcher, [v], FULL).options({}))
    some = {p: f for p, f in v.factors.items() if p.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out.0"))}
    contexts = {"p": v.prompts.positive, "n": v.prompts.negative}
    with low_rank(unet_of(patcher.model), [Branch(some)]):
        assert same(out, call(patcher, contexts=contexts))
    with low_rank(unet_of(patcher.model), [Branch(v.factors)]):
        whole = call(patcher, contexts=contexts)
    assert not same(out, whole, 1e-3)
    assert same(call(patcher, injection(patcher, [v], FULL, token_lora=True).options({})), whole)


def test_without_concepts_and_in_rows_of_others_nothing_changes(patcher):
    plain = call(patcher)
    assert same(call(patcher, injection(patcher, [], torch.zeros(0, *SIZE)).options({})), plain, 0)
    v = prepared_concept(patcher, 5)
    foreign = injection(patcher, [v], FULL).options({})
    assert same(
        call(patcher, foreign, sides=("x", "y"), contexts={"x": randn(1, 7, 24, seed=1), "y": randn(1, 7, 24, seed=2)}),
        plain,
        0,
    )


def test_a_subset_of_the_keys_is_the_dense_mask(patcher):
    """The isolated self-attention of a site against softmax over all keys with the others' at minus infinity."""
    made = injection(patcher, [prepared_concept(patcher, 5), prepared_concept(patcher, 6)], halves(10, 14))
    site = find_sites(made.unet, SELF, factor=1)[0]
    heads, channels, tokens = site.module(made.unet).heads, site.module(made.unet).to_q.out_features, 16 * 24
    q, k, v = (randn(2, tokens, channels, seed=n) for n in range(3))
    extra = {"activations_shape": [2, channels, *SIZE], "concepts_sides": [0, 1]}

    def attend(q, k, v):
        return made.regions.attention(q, k, v, site, {})

    out = made._override(q, k, v, site, extra, original(attend))
    split = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(*split, attn_mask=made.masks.read_mask(SIZE))
    assert torch.allclose(out, dense.transpose(1, 2).flatten(-2), atol=1e-12)
    assert not made.masks.read_mask(SIZE).all()


def _site_jacobian(made, site, of, wrt, kind):
    """The largest entry of d output[of] / d input[wrt] of the answer at one site."""
    channels = site.module(made.unet).to_q.out_features
    extra = {"activations_shape": [1, channels, *SIZE], "concepts_sides": [0]}
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = (randn(1, 16 * 24, channels, seed=n) for n in range(3))
        z = (k.clone() if kind is SELF else q.clone()).requires_grad_(True)

        def attend(q, k, v):
            heads = (t.unflatten(-1, (site.module(made.unet).heads, -1)).transpose(1, 2) for t in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)

        made.regions.attention = lambda q, k, v, *_: attend(q, k, v)
        out = made._override(*((q, z, v) if kind is SELF else (z, k, v)), site, extra, original(attend))
        (gradient,) = torch.autograd.grad(out[:, of].square().sum(), z)
    return float(gradient[:, wrt].abs().max())


def test_isolation_is_exact_in_every_layer_and_leaks_only_through_the_rest_of_the_network(patcher, capsys):
    made = injection(patcher, [prepared_concept(patcher, 5), prepared_concept(patcher, 6)], halves(10, 14))
    inside = made.masks.inside(SIZE)
    site = find_sites(made.unet, SELF, factor=1)[0]
    assert _site_jacobian(made, site, inside[0], inside[1], SELF) == 0
    assert _site_jacobian(made, site, inside[0], ~inside.any(0), SELF) > 0
    made = injection(patcher, [prepared_concept(patcher, 5), prepared_concept(patcher, 6)], halves(10, 14))
    first = call(patcher, made.options({}))[0]
    other = call(
        patcher,
        injection(patcher, [prepared_concept(patcher, 5), prepared_concept(patcher, 9)], halves(10, 14)).options({}),
    )[0]
    moved = (first - other).abs()
    leak = float(moved[..., :10].mean() / moved[..., 14:].mean())
    with capsys.disabled():
        print(f"\nwhole network: exchanging concept 2 moves region 1 by {leak:.0%} of region 2")  # noqa: T201
    assert moved[..., 14:].mean() > 0


def test_cross_attention_knows_the_concept_inside_and_the_prompt_outside(patcher):
    """Exchanging the concept moves no token outside; exchanging the global prompt none inside: bitwise, at one site."""
    covered = halves(10, 24)[:1]
    site = find_sites(unet_of(patcher.model), CROSS, factor=1)[0]
    channels = site.module(unet_of(patcher.model)).to_q.out_features
    q, k, v = randn(1, 384, channels, seed=0), randn(1, 7, channels, seed=1), randn(1, 7, channels, seed=2)
    extra = {"activations_shape": [1, channels, *SIZE], "concepts_sides": [0]}

    def answer(seed, k):
        made = injection(patcher, [prepared_concept(patcher, seed)], covered)
        out = made._override(q, k, v, site, extra, original(lambda q, k, v: made.regions.attention(q, k, v, site, {})))
        return out + made.added_after.waiting[site.block, site.depth], made.masks.inside(SIZE)[0]

    (first, inside), (second, _), (third, _) = answer(5, k), answer(6, k), answer(5, k.flip(-1))
    assert torch.equal(first[:, ~inside], second[:, ~inside])
    assert not torch.equal(first[:, inside], second[:, inside])
    assert torch.equal(first[:, inside], third[:, inside])
    assert not torch.equal(first[:, ~inside], third[:, ~inside])


def test_a_self_attention_laid_over_ours_answers_in_regions_too(patcher):
    """As perturbed attention guidance does in a call of its own; what stood there before us keeps to the background."""
    made = injection(patcher, [prepared_concept(patcher, 5), prepared_concept(patcher, 6)], halves())
    plain, calls = call(patcher, made.options({})), []

    def perturbed(q, k, v, extra):
        calls.append(tuple(q.shape))
        return v

    def with_theirs(options):
        options = {"transformer_options": {}, **options}
        return comfy.model_patcher.set_model_options_patch_replace(options, perturbed, "attn1", "middle", 0)

    assert same(call(patcher, made.options(with_theirs({}))), plain)
    assert not same(call(patcher, with_theirs(made.options({}))), plain, 1e-3)
    assert calls == [(2, 2 * 3, 128)] * 2


def test_overlaps_are_the_average_also_where_regions_cover_everything(patcher):
    v, w = prepared_concept(patcher, 5), prepared_concept(patcher, 6)
    both = torch.cat([FULL, FULL])
    out = injection(patcher, [v, w], both, isolation=False)
    site = find_sites(out.unet, CROSS, factor=1)[0]
    channels = site.module(out.unet).to_q.out_features
    q, k = randn(1, 384, channels, seed=0), randn(1, 7, channels, seed=1)
    extra = {"activations_shape": [1, channels, *SIZE], "concepts_sides": [0]}

    def answer(made):
        return made._override(
            q, k, k, site, extra, original(lambda q, k, v: torch.full_like(q, torch.nan)[..., :channels] * 0 + 1)
        )

    alone = [answer(injection(patcher, [each], FULL)) for each in (v, w)]
    assert torch.allclose(answer(out), sum(alone) / 2, atol=1e-12)
    whole = call(patcher, injection(patcher, [v, w], both).options({}))
    assert all(torch.isfinite(side).all() for side in whole)


def _dense(q, k, v, heads):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def _merged(made, site, name, v):
    path = f"{made.projected.module_names[site]}.{name}"
    (f,) = v.factors[path]
    return made.unet.get_submodule(path).weight + f.up @ f.down


@pytest.mark.parametrize("kind", [SELF, CROSS])
def test_where_soft_regions_fade_the_answer_is_the_weighted_mean(patcher, kind):
    """Every region's answer at every token, by its weight there; ``to_out`` with each concept's own weights."""
    boxes, concepts = (
        (Box(0, 0, 0.45, 1), Box(0.4, 0.2, 0.4, 0.8)),
        [prepared_concept(patcher, 5), prepared_concept(patcher, 6)],
    )
    covered = coverage([Region("", (box,), feather=0.2) for box in boxes], *SIZE)
    weights, inside = shares(covered).flatten(1), covered.flatten(1) >= 0.5
    assert all(((share > 0) & (share < 1)).any() for share in weights)
    made = injection(patcher, concepts, covered, soft=True)
    site = find_sites(made.unet, kind, factor=1)[0]
    module = site.module(made.unet)
    heads, channels = module.heads, module.to_q.out_features
    q = randn(1, 384, channels)
    k, v = (randn(1, 384 if kind is SELF else 7, channels, seed=n) for n in (1, 2))
    extra = {"activations_shape": [1, channels, *SIZE], "concepts_sides": [0]}
    answers, outs = [_dense(q, k, v, heads)], [module.to_out[0].weight]
    for n, each in enumerate(concepts):
        if kind is SELF:
            read = inside[n] | ~inside[1 - n]
            answers.append(_dense(q, k[:, read], v[:, read], heads))
        else:
            to_k, to_v, to_out = (_merged(made, site, name, each) for name in ("to_k", "to_v", "to_out.0"))
            answers.append(_dense(q, each.prompts.positive @ to_k.T, each.prompts.positive @ to_v.T, heads))
            outs.append(to_out)
    weighted = [share[:, None] * answer for share, answer in zip(weights, answers, strict=True)]
    out = made._override(q, k, v, site, extra, original(lambda *qkv: made.regions.attention(*qkv, site, extra)))
    assert torch.allclose(out, sum(weighted), atol=1e-6)  # shares are float32
    if kind is CROSS:
        projected = out @ outs[0].T + made.added_after.waiting[site.block, site.depth]
        assert torch.allclose(projected, sum(w @ o.T for w, o in zip(weighted, outs, strict=True)), atol=1e-6)


def test_soft_regions_are_finite_and_hard_ones_are_those_that_do_not_fade(patcher):
    """The edges of the boxes lie between tokens of every grid; elsewhere a coarse token would be shared."""
    boxes, concepts = (
        (Box(0, 0, 1 / 3, 1), Box(1 / 3, 0, 1 / 3, 1)),
        [prepared_concept(patcher, 5), prepared_concept(patcher, 6)],
    )
    made = []
    for feather, soft in ((0, False), (0, True), (0.2, True), (0.5, True)):
        covered = coverage([Region("", (box,), feather=feather) for box in boxes], *SIZE)
        made.append(call(patcher, injection(patcher, concepts, covered, soft=soft, token_lora=True).options({})))
    hard, sharp, *faded = made
    assert same(hard, sharp, 1e-5)
    for each in faded:
        assert all(torch.isfinite(side).all() for side in each)
        assert not same(hard, each, 1e-2)


class Forgetful(ProjectedConcepts):
    """Computes keys and values at every call."""

    def at(self, *key):
        self.cached.clear()
        return super().at(*key)


@pytest.mark.parametrize("token_lora", [False, True])
def test_keys_and_values_kept_for_a_run_are_those_of_every_step(patcher, token_lora):
    """Spec B8.6: of an injection filled anew for the step, and of one that computes them inside the model call."""
    concepts, settings = [prepared_concept(patcher, 5), prepared_concept(patcher, 6)], {"token_lora": token_lora}
    kept = injection(patcher, concepts, halves(), **settings)
    before, answers = {key: tuple(t.clone() for t in c) for key, c in kept.projected.cached.items()}, []
    for seed, sigma in enumerate((9.0, 2.0, 0.5)):
        asked = {"x": randn(1, 4, *SIZE, seed=seed), "sigma": sigma}
        anew = injection(patcher, concepts, halves(), **settings)
        forgetful = Injection(kept.model, concepts, kept.masks, kept.cond_or_uncond, **settings)
        forgetful.projected = forgetful.regions.projected = Forgetful(kept.unet, concepts)
        answers.append(call(patcher, kept.options({}), **asked))
        for other in (anew, forgetful):
            assert same(call(patcher, other.options({}), **asked), answers[-1], 0)
        assert all(
            torch.equal(a, b)
            for key, c in anew.projected.cached.items()
            for a, b in zip(c, kept.projected.cached[key], strict=True)
        )
    assert all(
        torch.equal(a, b) for key, c in kept.projected.cached.items() for a, b in zip(c, before[key], strict=True)
    )
    assert not same(answers[0], answers[1], 1e-3)


def test_the_same_concept_in_two_regions_is_computed_once(patcher):
    v = prepared_concept(patcher, 5)
    made = injection(patcher, [v, v], halves())
    assert len(made.projected.cached) == 2 * len(find_sites(made.unet, CROSS))
    united = injection(patcher, [v, v], halves(), isolation=False)
    assert same(call(patcher, united.options({})), call(patcher, injection(patcher, [v], FULL).options({})))


def test_sides_follow_their_ids_and_a_batch_is_its_pictures(patcher):
    made = injection(patcher, [prepared_concept(patcher, 5), prepared_concept(patcher, 6)], halves(), token_lora=True)
    options = made.options({})
    there, back = call(patcher, options), call(patcher, options, sides=("n", "p"))
    assert same(there, back[::-1])
    two = torch.cat([randn(1, 4, *SIZE, seed=n) for n in (3, 8)])
    both = call(patcher, options, x=two)
    for n in (0, 1):
        assert same([side[n : n + 1] for side in both], call(patcher, options, x=two[n : n + 1]))


def test_prompts_of_other_lengths_and_learned_layers_go_in(patcher):
    """A negative of another length than the positive; and a prompt of its own for every layer (ED-LoRA)."""
    long = ConceptPrompts(randn(16, 9, 24, seed=1), randn(1, 4, 24, seed=2), (1,))
    v = PreparedConcept(long, lora(patcher, 5))
    out = call(patcher, injection(patcher, [v], FULL).options({}))
    assert all(torch.isfinite(side).all() for side in out)
    same_layers = PreparedConcept(long._replace(positive=long.positive[:1]), v.factors)
    assert not same(out, call(patcher, injection(patcher, [same_layers], FULL).options({})), 1e-6)


def test_the_losses_look_at_the_layers_of_the_reference(patcher):
    blocks = {s.block for s in loss_sites(unet_of(patcher.model), CROSS, 64, 64)}
    assert blocks == {("input", 7), ("input", 8), ("output", 3), ("output", 4), ("output", 5)}


# ---- whole samplings ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(new_model):
    return new_model("EPS", sd15=True)


def test_a_layer_wise_prompt_of_another_model_is_refused(model):
    wrong = concept(5, model=model)
    wrong.positive[0][1][keys.LAYER_CONTEXTS] = randn(7, 5, 24)
    with pytest.raises(ValueError, match="for 7 layers, and this model has 16 cross-attentions"):
        sample(model, [wrong], FULL, Compose())


def test_no_concept_or_no_strength_is_the_hosts_own_guider_bit_for_bit(model):
    plain, _ = sample(model, [], None, Compose())
    nothing, _ = sample(model, [concept(5, 0.0, model)], FULL, Compose())
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*([[randn(1, 7, 24, seed=n).float(), {}]] for n in (1, 2)))
    guider.set_cfg(3.0)
    noise = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(0))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
    host = guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True
    )
    assert torch.equal(plain, host)
    assert torch.equal(nothing, host)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_steps_are_taken_in_the_window_once_a_level_and_the_host_is_left_as_it_was(model, sampler):
    names = {n: id(p) for n, p in model.model.named_parameters()}
    two = [concept(5, 1.0, model), concept(6, 1.0, model)]
    out, guider = sample(model, two, halves(), Compose(stop="never", end=1.0), sampler=sampler)
    assert guider.updates == len(guider.losses) == 4
    assert torch.isfinite(out).all()
    assert guider.run is None
    assert {n: id(p) for n, p in model.model.named_parameters()} == names
    unet = unet_of(model.model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    again, _ = sample(model, two, halves(), Compose(stop="never", end=1.0), sampler=sampler)
    assert torch.equal(out, again)


def test_without_gradient_there_are_no_steps_and_pictures_of_a_batch_do_not_meet(model):
    two = [concept(5, 1.0, model), concept(6, 1.0, model)]
    both, guider = sample(model, two, halves(), Compose(stop="never"), batch=2, steps=3)
    for n in (0, 1):
        alone, _ = sample(model, two, halves(), Compose(stop="never"), seeds=[n], steps=3)
        assert torch.allclose(both[n : n + 1], alone, atol=2e-4)
    _, guider = sample(model, two, halves(), Compose(enhancement=0), steps=2)
    assert guider.updates == 0
    assert guider.losses == []


def test_several_entries_of_the_positive_are_looked_at_alike(model):
    """As Conditioning (Combine) makes: twice the same is once, and pictures of a batch stay apart."""
    two = [concept(5, 1.0, model), concept(6, 1.0, model)]
    settings = Compose(stop="never", end=1.0)
    _, once = sample(model, two, halves(), settings, steps=2)
    _, twice = sample(model, two, halves(), settings, steps=2, positive=prompt(1) + prompt(1))
    torch.testing.assert_close(twice.losses, once.losses, rtol=1e-4, atol=1e-4)
    other = prompt(1) + prompt(3, words=5)
    both, guider = sample(model, two, halves(), settings, steps=2, batch=2, positive=other)
    assert [loss.shape for loss in guider.losses] == [(2,), (2,)]
    alone, _ = sample(model, two, halves(), settings, steps=2, seeds=[1], positive=other)
    assert torch.allclose(both[1:], alone, atol=2e-4)


def test_before_the_positive_begins_nothing_pulls(model):
    late = prompt(1, start_percent=0.5, end_percent=1.0)
    two = [concept(5, 1.0, model), concept(6, 1.0, model)]
    out, guider = sample(model, two, halves(), Compose(stop="never", end=1.0), positive=late)
    assert torch.isfinite(out).all()
    assert 0 < guider.updates == len(guider.losses) < 4
    _, found = sample(model, two, None, Compose(enhancement=0), positive=late)
    assert found.regions is not None


@pytest.mark.parametrize("how", ["copy", "swap"])
def test_a_stage_that_adds_no_noise_has_none_to_rearrange(model, how):
    two, nothing = [concept(5, 1.0, model), concept(6, 1.0, model)], torch.zeros(1, 4, *SIZE)
    out, _ = sample(model, two, halves(10, 20), Compose(reinit=how, enhancement=0), steps=2, noise=nothing)
    plain, _ = sample(model, two, halves(10, 20), Compose(reinit="off", enhancement=0), steps=2, noise=nothing)
    assert torch.equal(out, plain)


def test_a_small_step_lowers_the_loss_and_the_early_exit_has_the_whole_gradient(model, monkeypatch):
    made, positive = _running(model)
    x, sigma = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(4)), torch.tensor([2.0])
    found, ends = [], []
    counting = unet_of(model.model).out.register_forward_pre_hook(lambda *_: ends.append(1))

    def loss_of(z):
        maps = AttentionMaps(made, without_inference_tensors(positive), 32, 32, regions=True)  # layers before the last
        cross, attention = maps.of(z, without_inference_tensors(sigma), differentiable_options({}))
        return sum(c.square().sum() for c in cross) + attention.square().sum()

    for stop in (True, False):
        monkeypatch.setattr(enhancement, "capture", partial(_captured, stop))
        found.append(gradient_of(made.model, x, loss_of))
        assert len(ends) == 1 - stop
    counting.remove()
    assert torch.equal(found[0].value, found[1].value)
    assert found[0].loss == found[1].loss
    settings = Compose(enhancement=1e-3, stop="never")
    enhancer = Enhancer(made, positive, settings, EditSchedule())
    moved = enhancer(x, sigma, {})
    before = enhancer.losses[0]
    enhancer.schedule = EditSchedule()
    enhancer(moved, sigma, {})
    assert not torch.equal(moved, x)
    assert float(enhancer.losses[1]) < float(before)


def test_the_papers_rate_holds_for_a_variance_preserving_latent(model):
    """x' = x − lr (1 + σ²) dL/dx is the update of z = x / √(1 + σ²) by lr dL/dz."""
    made, positive = _running(model)
    enhancer = Enhancer(made, positive, Compose(enhancement=20.0, relative=False), EditSchedule())
    gradient, x, sigma = torch.randn(1, 4, *SIZE), torch.randn(1, 4, *SIZE), 3.0
    scale = (1 + sigma**2) ** 0.5
    z = x / scale - 20.0 * gradient * scale
    assert torch.allclose(x - enhancer._scaled(gradient, x, sigma, 0.0), z * scale, atol=1e-3)


def _captured(stopping, unet, sites, *, stop):
    return capture(unet, sites, stop=stopping and stop)


def _running(model):
    """An injection on the loaded model, and a processed positive."""
    from comfyui_concepts.host.compose.projections import concept_prompts

    comfy.model_management.load_models_gpu([model])
    model.model.current_patcher = model
    prepared_ones = []
    for seed in (5, 6):
        c = concept(seed, 1.0, model)
        factors = prepared(lora(model, seed), torch.device("cpu"), torch.float32)
        prepared_ones.append(PreparedConcept(concept_prompts(c, torch.device("cpu"), torch.float32), factors))
    made = Injection(model.model, prepared_ones, MaskPyramid(halves(), overlapping=True), {"p": 0})
    made.projected.fill()
    entry = {"model_conds": {"c_crossattn": comfy.conds.CONDCrossAttn(randn(1, 7, 24, seed=1).float())}, "uuid": "p"}
    return made, [entry]


def test_regions_are_found_when_none_are_given(model):
    two = [concept(5, 1.0, model), concept(6, 1.0, model)]
    out, guider = sample(model, two, None, Compose(enhancement=0, automatic=0.3))
    assert torch.isfinite(out).all()
    assert guider.regions.shape == (2, *guider.regions.shape[1:])
    assert guider.regions.flatten(1).sum(-1).min() > 0


def test_a_concept_for_which_no_place_is_left_is_refused(model):
    """The same twice, or two LoRAs that leave the words alone: the maps are alike, and one takes every cell."""
    once = concept(5, 1.0, model)
    elsewhere = {key: t for key, t in concept(6, 1.0, model).lora.tensors.items() if ".attn1." in key}
    twin = replace(once, name="twin", lora=LoraFile("twin", elsewhere))
    for two in ([once, once], [replace(twin, name="first"), twin]):
        with pytest.raises(ValueError, match="No region was found for the concept '(c5|twin)'.*; give each concept"):
            sample(model, two, None, Compose(enhancement=0, automatic=0.3))


def test_a_sampling_that_ends_before_regions_are_found_says_so(model, caplog):
    two = [concept(5, 1.0, model), concept(6, 1.0, model)]
    _, guider = sample(model, two, None, Compose(enhancement=0, automatic=0.8), steps=1)
    assert guider.regions is None
    assert [r.levelname for r in caplog.records if "after 80 % of it" in r.message] == ["WARNING"]
    caplog.clear()
    sample(model, two, None, Compose(enhancement=0, automatic=0.3), steps=3)
    assert not any("regions were found" in r.message for r in caplog.records)


def _tomesd(model):
    return TomePatchModel.execute(model, 0.5).args[0]


def _hypertile(model):
    return HyperTile.execute(model, 64, 2, 0, False)[0]


@pytest.mark.parametrize("token_lora", [False, True])
@pytest.mark.parametrize("other", [_tomesd, _hypertile])
def test_other_numbers_of_tokens_are_refused_where_regions_need_them(model, other, token_lora):
    two = [concept(5, 1.0, model), concept(6, 1.0, model)]
    settings = Compose(enhancement=0, reinit="off", token_lora=token_lora)
    with pytest.raises(ValueError, match=r"A layer works on \d+ image tokens, .* \(token merging, tiling\): bypass it"):
        sample(other(model), two, halves(), settings, steps=1)
    if not token_lora:  # nothing but isolation looks at the tokens of self-attention
        sample(other(model), two, halves(), replace(settings, isolation=False), steps=1)


def test_what_cannot_work_is_refused_in_words(model):
    entry = [[torch.zeros(1, 7, 24), {}]]
    area = [[torch.zeros(1, 7, 24), {"area": (4, 4, 0, 0)}]]
    with pytest.raises(ValueError, match="an area"):
        ComposeGuider(model, BasePrompts(area, entry, 3.0), [], None, Compose())
    lost = concept(5, 1.0, model)
    lost.positive[0][1].clear()
    with pytest.raises(ValueError, match="no phrase"):
        sample(model, [lost], FULL, Compose())
    with pytest.raises(ValueError, match="dpm_adaptive"):
        sample(model, [concept(5, 1.0, model)], FULL, Compose(), sampler="dpm_adaptive")
