"""T2I-Zero in a real model: marks on the conditioning, any sampler, other packs' patches (A18, A25, A26)."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from comfyui_concepts.host import keys
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.views import ViewPrompt
from comfyui_concepts.host.compose.guider import ComposeGuider
from comfyui_concepts.host.compose.objects import correct_objects, encode_with_objects
from comfyui_concepts.host.compose.suppression import Suppressor, objects_by_entry, with_suppression
from comfyui_concepts.host.conduct.path_guider import PathGuider
from comfyui_concepts.host.engine.attention import CROSS, find_sites
from comfyui_concepts.host.engine.attention_patches import override_attention
from comfyui_concepts.host.engine.base_prompts import BasePrompts
from comfyui_concepts.host.lora.concept import Concept
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.host.registry import unet_of
from comfyui_concepts.methods.anagram.combine import AVERAGING, combiner
from comfyui_concepts.methods.anagram.views import view_named
from comfyui_concepts.methods.compose.settings import Compose
from comfyui_concepts.methods.compose.similarity import ObjectPositions
from comfyui_concepts.methods.masks import MaskPyramid
from comfyui_concepts.methods.regions import Box, Region
from torch.nn.functional import conv2d, pad

WORDS = ObjectPositions(((1,), (3, 4)), ((1, 6),))


def _sample(model, positive, *, steps=2, sampler="euler", batch=1, cfg=3.0, width=24):
    """A short run on a canvas that is not square."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(batch, 4, 16, width, generator=generator)
    guider = comfy.samplers.CFGGuider(model)
    negative = [[torch.randn(1, 7, 32, generator=generator), {keys.OBJECT_POSITIONS: WORDS}]]
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=1
    )


@pytest.fixture
def positive():
    context = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(9))
    return [[context, {keys.OBJECT_POSITIONS: WORDS}]]


@pytest.fixture
def model(new_model):
    return new_model("EPS")


def test_a_prompt_knows_its_objects_and_its_words(demo_model):
    _, clip, _ = demo_model
    (entry,) = encode_with_objects(clip, "a red cat and a dog", ["red cat", "dog"])
    assert entry[1][keys.OBJECT_POSITIONS] == ObjectPositions(((2, 3), (6,)), ((1, 7),))
    long = " ".join(["many"] * 80) + " a cat and a dog"
    (entry,) = encode_with_objects(clip, long, ["cat", "dog"])
    assert entry[1][keys.OBJECT_POSITIONS].sections[0] == (1, 76)
    assert all(p > 77 for tokens in entry[1][keys.OBJECT_POSITIONS].objects for p in tokens)


@pytest.mark.parametrize(
    ("phrases", "sentence"),
    [([], "No object is named"), (["cat", "red cat"], "share a word"), (["fox"], "is not in the prompt")],
)
def test_objects_that_cannot_be_told_apart_are_refused(demo_model, phrases, sentence):
    with pytest.raises(ValueError, match=sentence):
        encode_with_objects(demo_model[1], "a red cat and a dog", phrases)


def test_a_real_prompts_objects_are_corrected_and_neither_its_frame_nor_its_padding(demo_model):
    prompt = encode_with_objects(demo_model[1], "a red cat and a dog", ["red cat", "dog"])
    ((context, _),) = prompt
    ((same, _),) = correct_objects(prompt, 0.0, 3, 0.0)
    assert torch.equal(same, context)
    ((corrected, about),) = correct_objects(prompt, 1.0, 3, 0.0)
    objects = [2, 3, 6]
    assert about[keys.OBJECT_POSITIONS] == prompt[0][1][keys.OBJECT_POSITIONS]
    assert torch.equal(
        corrected[:, [n for n in range(77) if n not in objects]], context[:, [n for n in range(77) if n not in objects]]
    )
    assert (corrected - context)[:, objects].norm(dim=-1).min() > 0.01 * context.norm(dim=-1).mean()
    assert torch.allclose(corrected.norm(dim=-1), context.norm(dim=-1), rtol=1e-5)
    other = context.clone()
    other[:, [0, *range(7, 77)]] = context[:, [0, *range(7, 77)]].flip(-1) * 5  # the start, the end and the padding
    ((again, _),) = correct_objects([[other, about]], 1.0, 3, 0.0)
    assert torch.equal(again[:, objects], corrected[:, objects])
    with pytest.raises(ValueError, match="which of its words are objects"):
        correct_objects([[context, {}]], 1.0, 3, 0.0)


def test_without_strength_or_marks_the_model_is_the_plain_one(model, positive):
    plain = _sample(model, positive)
    assert torch.equal(_sample(with_suppression(model, 0.0, 0, 1), positive), plain)
    unmarked = [[positive[0][0], {}]]
    assert torch.equal(_sample(with_suppression(model, 1.0, 0, 1), unmarked), plain)


def test_only_the_positive_moves_and_only_in_the_window(model, positive, monkeypatch):
    from comfyui_concepts.host.compose import suppression as module

    seen = []
    original = module.Suppressor._change

    def spy(self, q, k, v, words, extra):
        seen.append((q.shape[0], float(extra["sigmas"].max()), list(extra["cond_or_uncond"])))
        return original(self, q, k, v, words, extra)

    monkeypatch.setattr(module.Suppressor, "_change", spy)
    plain = _sample(model, positive, steps=4, batch=2)
    seen.clear()
    moved = _sample(with_suppression(model, 1.0, 0.0, 0.5), positive, steps=4, batch=2)
    assert not torch.equal(moved, plain)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
    middle = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    assert {round(s, 3) for _, s, _ in seen} == {round(float(s), 3) for s in sigmas[:-1] if s >= middle}
    assert {rows for rows, _, _ in seen} == {2}  # the two pictures' positive rows, never the negative's
    assert all(len(both) == 2 for _, _, both in seen)


@pytest.mark.parametrize("sampler", ["dpmpp_2s_ancestral", "uni_pc"])
def test_a_batch_is_its_pictures_and_any_sampler_does(model, positive, sampler):
    patched = with_suppression(model, 1.0, 0.0, 1.0)
    assert torch.isfinite(_sample(patched, positive, sampler=sampler, steps=3)).all()
    assert torch.isfinite(_sample(patched, positive, sampler=sampler, cfg=1.0)).all()


def test_another_packs_patch_in_the_same_slot_goes_on(model, positive):
    """A foreign attn2 replacement answers as before; the suppression is added to its answer."""
    other, calls = model.clone(), []

    def foreign(q, k, v, extra):
        calls.append(extra["block"])
        heads = (t.unflatten(-1, (extra["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
        return 0.5 * torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)

    block = find_sites(unet_of(other.model), CROSS)[0].block
    other.set_model_attn2_replace(foreign, *block)
    alone = _sample(other, positive)
    assert not torch.equal(alone, _sample(model, positive))
    count = len(calls)
    both = _sample(with_suppression(other, 1.0, 0.0, 1.0), positive)
    assert len(calls) == 2 * count > 0
    assert not torch.equal(both, alone)


def test_answering_with_the_attention_itself_is_the_plain_model(model):
    unet = unet_of(model.model)
    options = override_attention({}, unet, find_sites(unet), lambda q, k, v, site, extra, attend: attend(q, k, v))
    x = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(2))
    context = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
    call = [
        model.model.apply_model(x, torch.full((2,), 2.0), c_crossattn=context, transformer_options=o)
        for o in ({}, options["transformer_options"])
    ]
    assert torch.equal(*call)


def _by_hand(q, k, v, heads, grid, strength):
    """P' v of one picture, and how many objects are left at each of its tokens: the formula, in float64."""
    q, k, v = (t.double().unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)  # (heads, tokens, words)
    maps = torch.stack([p[..., list(words)].mean((0, 2)) for words in WORDS.objects]).unflatten(-1, grid)
    line = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).square().mul(-0.5).exp()
    blur = torch.outer(line, line) / line.sum() ** 2
    winner = conv2d(pad(maps[:, None], (1, 1, 1, 1), mode="replicate"), blur[None, None])[:, 0].flatten(1).argmax(0)
    for number, words in enumerate(WORDS.objects):
        p[..., list(words)] *= torch.where(winner == number, 1.0, 1 - strength)[None, :, None]
    left = sum((p[..., list(words)] > 0).any(-1).any(0).int() for words in WORDS.objects)
    return (p @ v).transpose(0, 1).flatten(-2), left, winner


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_at_every_site_the_hosts_attention_becomes_the_formulas_and_the_uncond_stays(model, strength):
    """At no strength the host's own attention, at full strength one object a token; on a canvas that is not square."""
    unet, told, met = unet_of(model.model), {"uuids": ["positive", "negative"]}, []

    def watch(q, k, v, site, extra, attend):
        plain = attend(q, k, v)
        out = Suppressor({"positive": WORDS}, strength, False)(q, k, v, site, extra | told, attend)
        height = round((q.shape[1] * 16 / 24) ** 0.5)
        for row in range(2):
            wanted, left, winner = _by_hand(
                q[row], k[row], v[row], extra["n_heads"], (height, q.shape[1] // height), strength
            )
            assert (out[row] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
            assert left.tolist() == [1 if strength == 1 else 2] * q.shape[1]
            met.append(len(winner.unique()))
        assert torch.equal(out[2:], plain[2:])
        return out

    sites = find_sites(unet, CROSS)
    options = override_attention({}, unet, sites, watch)["transformer_options"]
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(4, 4, 16, 24, generator=generator), 3 * torch.randn(4, 7, 32, generator=generator)
    model.model.apply_model(x, torch.full((4,), 2.0), c_crossattn=context, transformer_options=options)
    assert len(met) == 2 * len(sites)
    assert max(met) == 2  # some sites have both as winners


HALVES = [Region("left", (Box(0, 0, 0.5, 1),)), Region("right", (Box(0.5, 0, 0.5, 1),))]


def _prompt(seed, *, marked):
    context = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed))
    return [[context, {keys.OBJECT_POSITIONS: WORDS} if marked else {}]]


def _of_views(model, positive, negative):
    views = [
        ViewPrompt(view_named(name), _prompt(n, marked=positive), _prompt(9, marked=negative))
        for n, name in enumerate(("identity", "flip"))
    ]
    combine = combiner(AVERAGING, [1.0, 1.0])
    return ViewsGuider(model, views, combine, 3.0)


def _of_one_view_at_a_time(model, positive, negative):
    """A mask in one prompt makes a call of each view."""
    guider = _of_views(model, positive, negative)
    for entries in guider.original_conds.values():
        for entry in entries:
            entry["mask"] = torch.ones(1, 16, 24)
    return guider


def _lora():
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    return LoraFile(
        "one layer",
        {f"{name}.lora_{part}.weight": torch.ones(shape) * 0.1 for part, shape in (("up", (32, 1)), ("down", (1, 32)))},
    )


def _of_paths(model, positive, negative):
    concepts = [
        Concept(f"c{n}", "", _lora(), 1.0, _prompt(n, marked=positive), _prompt(9, marked=negative)) for n in (1, 2)
    ]
    base = BasePrompts(_prompt(3, marked=positive), _prompt(9, marked=negative), 3.0)
    return PathGuider(model, base, concepts, lambda h, w: MaskPyramid.of(HALVES, h, w))


def _of_two_positives(model, positive, negative):
    """The host's own with three prompts, of which it says itself that the middle one is of the negatives."""
    guider = Guider_DualCFG(model)
    guider.set_conds(_prompt(1, marked=positive), _prompt(2, marked=negative), _prompt(9, marked=negative))
    guider.set_cfg(3.0, 2.0)
    return guider


def _of_perp_neg(model, positive, negative):
    guider = Guider_PerpNeg(model)
    guider.set_conds(_prompt(1, marked=positive), _prompt(2, marked=negative), _prompt(9, marked=negative))
    guider.set_cfg(3.0, 1.0)
    return guider


def _of_one_positive(model, positive, negative):
    guider = Guider_Basic(model)
    guider.set_conds(_prompt(1, marked=positive))
    return guider


GUIDERS = {
    "views": _of_views,
    "views one by one": _of_one_view_at_a_time,
    "paths": _of_paths,
    "dual cfg": _of_two_positives,
    "perp neg": _of_perp_neg,
    "basic": _of_one_positive,
}


def _drawn(guider):
    noise = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(4))
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", 2)
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)


@pytest.mark.parametrize("kind", GUIDERS)
def test_every_guiders_negatives_are_left_alone_and_its_positives_are_not(model, kind):
    """However many it asks about in one call, and in which order."""
    patched = with_suppression(model, 1.0, 0.0, 1.0)
    plain = _drawn(GUIDERS[kind](model, False, False))
    assert torch.equal(_drawn(GUIDERS[kind](patched, False, True)), plain)
    moved = _drawn(GUIDERS[kind](patched, True, False))
    assert not torch.equal(moved, plain)
    assert torch.equal(_drawn(GUIDERS[kind](patched, True, True)), moved)


def test_every_view_and_every_path_is_reached(model, monkeypatch):
    asked = []
    original = Suppressor._change
    monkeypatch.setattr(
        Suppressor, "_change", lambda self, q, *rest: (asked.append(len(q)), original(self, q, *rest))[1]
    )
    sites = len(find_sites(unet_of(model.model), CROSS))
    for make, prompts in ((_of_views, 2), (_of_paths, 3), (_of_two_positives, 1)):
        asked.clear()
        _drawn(make(with_suppression(model, 1.0, 0.0, 1.0), True, True))
        assert len(asked) == 2 * sites * prompts  # 2 steps


def test_two_positives_asked_about_alone_are_two_positives():
    """As in a gradient step of an anagram. Unmarked, the second of two is the negative, as in the host's samplers."""
    told, untold = (
        [{"uuid": n, keys.OBJECT_POSITIONS: WORDS, **more} for n in range(2)]
        for more in ({"prompt_type": "positive"}, {})
    )
    assert set(objects_by_entry([[entry] for entry in told])) == {0, 1}
    assert set(objects_by_entry([[entry] for entry in untold])) == {0}
    assert set(objects_by_entry([untold, None])) == {0, 1}
    named = [
        {"uuid": 0, keys.OBJECT_POSITIONS: WORDS, keys.PROMPT_TYPE: "negative 1"},
        {"uuid": 1, keys.OBJECT_POSITIONS: WORDS, keys.PROMPT_TYPE: "positive"},
    ]
    assert set(objects_by_entry([[entry] for entry in named])) == {1}


@pytest.mark.parametrize("times", [2, 3, 4])
def test_beside_a_longer_negative_every_copy_of_an_object_is_held_back(model, positive, times):
    """The host repeats the shorter prompt. A negative that says the same several times over changes nothing."""

    def drawn(patched, negative):
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(positive, [[negative, {}]])
        guider.set_cfg(3.0)
        return _drawn(guider)

    negative = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(4))
    patched, long = with_suppression(model, 1.0, 0.0, 1.0), negative.repeat(1, times, 1)
    wanted, plain = drawn(patched, negative), drawn(model, negative)
    assert (drawn(model, long) - plain).abs().max() < 1e-3 * (wanted - plain).abs().max()
    assert (drawn(patched, long) - wanted).abs().max() < 1e-3 * (wanted - plain).abs().max()


def _composed(model, covered, *, seed=3):
    """LoRA-Composer with one region and a positive that names its objects."""
    concept = Concept(
        "c",
        "it",
        _lora(),
        1.0,
        [[_prompt(5, marked=False)[0][0], {keys.PHRASE_POSITIONS: (1,)}]],
        _prompt(6, marked=False),
    )
    settings = Compose(enhancement=0, reinit="off")
    base = BasePrompts(_prompt(seed, marked=True), _prompt(9, marked=True), 3.0)
    return _drawn(ComposeGuider(model, base, [concept], lambda h, w: covered, settings))


def test_where_a_region_has_taken_the_prompts_place_its_objects_change_nothing(model):
    patched, full = with_suppression(model, 1.0, 0.0, 1.0), torch.ones(1, 16, 24)
    assert torch.equal(_composed(model, full, seed=3), _composed(model, full, seed=4))  # the prompt has no say at all
    assert torch.equal(_composed(patched, full), _composed(model, full))
    half = full.clone()
    half[..., 12:] = 0
    assert not torch.equal(_composed(patched, half), _composed(model, half))


def test_the_change_has_the_share_that_the_prompt_has_of_each_token():
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(2, n, 8, generator=generator) for n in (6, 7, 7))
    share = torch.tensor([0, 0.25, 1, 1, 0.5, 0])
    told = {"uuids": ["mine", "other"], "activations_shape": (2, 8, 2, 3), "n_heads": 2}

    def change(**more):
        return Suppressor({"mine": WORDS}, 1.0, False)(q, k, v, None, told | more, lambda q, k, v: torch.zeros_like(q))

    asked = []
    shared = change(**{keys.BASE_WEIGHT: lambda grid: (asked.append(grid), share)[1]})
    assert asked == [(2, 3)]
    assert change()[0].abs().amin(-1).gt(0).all()
    assert torch.equal(shared, change() * share[:, None])
