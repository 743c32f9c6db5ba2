"""LoRA Composer on transformers whose picture attends to a text of its own: Wan, Cosmos and Anima."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host import keys
from comfyui_concepts.host.compose.cross import CrossCall, CrossGuider, CrossInjection, Words
from comfyui_concepts.host.compose.guider import ComposeGuider
from comfyui_concepts.host.compose.joint import JointGuider
from comfyui_concepts.host.engine.base_prompts import BasePrompts
from comfyui_concepts.host.lora.branches import Branch, low_rank, prepared
from comfyui_concepts.host.lora.factors import network_factors
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.host.registry import architecture_of, attends_across
from comfyui_concepts.methods.compose.settings import Compose
from comfyui_concepts.methods.lora import layer_shape
from comfyui_concepts.nodes.compose.composer import ConceptsComposer
from comfyui_concepts.nodes.concept import ConceptList

from ..faults import FAULTS, assert_as_remembered, faults_at, remembered
from ..tiny_transformers import compiled, counted, names, noise, shared_transformer, tiny_transformer
from .joint_cases import apart, base, masked_by_another, plain, prompt
from .joint_cases import concept as of_some_layers

CROSS = [name for name in names(every=True) if name in ("wan", "cosmos", "anima")]
SIZE = (10, 8)
"""Even: Cosmos takes no other on older hosts."""
IDLE = Compose(enhancement=0.0, reinit="off")
SOON, LATE = replace(IDLE, automatic=0.3), replace(IDLE, automatic=0.8)
WORDS = r"cross_attn\.[kv]|text_embedding"
"""Layers that the text alone goes through."""
INSIDE = r"^blocks\.|text_embedding"
OUT = {"wan": "o", "cosmos": "output_proj", "anima": "output_proj"}


@functools.cache
def changes(name, seed=0):
    """Factors of rank 2 on every linear layer with tokens, but not on those that run before the call: down and up."""
    architecture = architecture_of(shared_transformer(name).model)
    generator, made = torch.Generator().manual_seed(seed), {}
    for layer, module in architecture.network.named_modules():
        linear = isinstance(module, torch.nn.Linear) and not architecture.before_call(layer)
        if linear and architecture.kind(layer) != "global":
            out, wide = layer_shape(module)
            made[layer] = tuple(0.1 * torch.randn(s, generator=generator) for s in ((2, wide), (out, 2)))
    return made


def concept(name, seed=0, wanted="", **more):
    """A concept whose LoRA is on the layers that match."""
    tensors = {}
    for layer, (down, up) in changes(name, seed).items():
        if re.search(wanted, layer):
            tensors |= {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}
    return replace(of_some_layers(name, seed, **more), lora=LoraFile(f"c{seed}", tensors))


def patched(name, wanted=""):
    """The model with the first concept's LoRA in its weights."""
    model = shared_transformer(name).clone()
    made = {n: up @ down for n, (down, up) in changes(name).items() if re.search(wanted, n)}
    model.add_patches({f"diffusion_model.{layer}.weight": ("diff", (change,)) for layer, change in made.items()})
    return model


def guider(name, concepts, covered, settings=IDLE, *, model=None, prompts=None, soft=False):
    """``covered`` is (concepts, h, w) of the latent's size; None looks for the regions."""
    coverage_at = None if covered is None else lambda h, w: covered
    return CrossGuider(model or shared_transformer(name), prompts or base(name), concepts, coverage_at, settings, soft)


def sample(made, *, batch=1, steps=1, frames=1, size=SIZE):
    start = noise(made.model_patcher, *size, batch=batch * frames)
    start = start.unflatten(0, (batch, frames)).transpose(1, 3)[:, 0] if frames > 1 else start
    sigmas = comfy.samplers.calculate_sigmas(made.model_patcher.get_model_object("model_sampling"), "simple", steps)
    sigmas = sigmas.clamp(max=1.0)  # Cosmos's noise is 80 high, and what is left of it is rounded at that height
    sampler = comfy.samplers.sampler_object("euler")
    return made.sample(start, torch.zeros_like(start), sampler, sigmas, disable_pbar=True, seed=1)


def everywhere(concepts=1):
    return torch.ones(concepts, *SIZE)


def sides():
    """Left and right, with two columns of the background between."""
    covered = torch.zeros(2, *SIZE)
    covered[0, :, :4], covered[1, :, 6:] = 1, 1
    return covered


def alone(own, prompts):
    return BasePrompts(own.positive, own.negative, prompts.cfg)


# ---- over everything, over nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CROSS)
def test_a_region_over_everything_is_the_concept_s_prompt_with_its_lora_in_the_weights(name):
    own, prompts = concept(name, wanted=INSIDE), base(name)
    theirs = sample(plain(patched(name, INSIDE), alone(own, prompts)))
    assert apart(sample(guider(name, [own], everywhere(), prompts=prompts)), theirs) < 1e-6


@pytest.mark.parametrize("name", CROSS)
def test_a_lora_on_every_layer_is_as_by_hooks_on_the_concept_s_prompt(name):
    """In the weights of Cosmos's first layer it is rounded at the height of the noise, by 1e-6."""
    own, prompts, model = concept(name), base(name), shared_transformer(name)
    ours = sample(guider(name, [own], everywhere(), prompts=prompts))
    factors = prepared(network_factors(own.lora, model.model), torch.device("cpu"), torch.float32)
    with low_rank(model.model.diffusion_model, [Branch(factors)]):
        theirs = sample(plain(model, alone(own, prompts)))
    assert apart(ours, theirs) < 1e-7


@pytest.mark.parametrize("name", CROSS)
def test_over_nothing_without_strength_and_after_it_the_picture_is_the_base_s_bit_for_bit(name):
    model, prompts = shared_transformer(name), base(name)
    theirs = sample(plain(model, prompts))
    moved = sample(guider(name, [concept(name)], everywhere(), prompts=prompts))
    assert apart(moved, theirs) > 1e-2
    for concepts, covered in (
        ([concept(name)], torch.zeros(1, *SIZE)),
        ([concept(name, strength=0.0)], everywhere()),
        ([], torch.zeros(0, *SIZE)),
    ):
        assert torch.equal(sample(guider(name, concepts, covered, prompts=prompts)), theirs)
    assert torch.equal(sample(plain(model, prompts)), theirs)


@pytest.mark.parametrize(("name", "cfg", "steps"), [("wan", 2.0, 2), ("cosmos", 1.0, 1)])
def test_batches_cfg_1_and_further_steps_are_those_of_the_concept(name, cfg, steps):
    own, prompts = concept(name, wanted=INSIDE), base(name, cfg=cfg)
    theirs = sample(plain(patched(name, INSIDE), alone(own, prompts)), batch=2, steps=steps)
    made = guider(name, [own], everywhere(), prompts=prompts)
    ours = sample(made, batch=2, steps=steps)
    assert apart(ours, theirs) < 1e-6 * steps
    assert torch.equal(sample(made, batch=2, steps=steps), ours)  # nothing is left of the first run


@pytest.mark.parametrize("name", CROSS)
def test_every_frame_has_the_same_regions(name):
    own, prompts = concept(name, wanted=INSIDE), base(name)
    theirs = sample(plain(patched(name, INSIDE), alone(own, prompts)), frames=3)
    assert theirs.shape[2] == 3
    assert apart(sample(guider(name, [own], everywhere(), prompts=prompts), frames=3), theirs) < 1e-6


def test_without_token_lora_only_cross_attention_has_the_lora():
    theirs = sample(plain(patched("wan", r"cross_attn\.[kvo]$|text_embedding"), alone(concept("wan"), base("wan"))))
    ours = sample(guider("wan", [concept("wan")], everywhere(), replace(IDLE, token_lora=False)))
    assert apart(ours, theirs) < 1e-6


@pytest.mark.skipif("anima" not in CROSS, reason="this host has no Anima")
@pytest.mark.parametrize("inference", [True, False])
def test_the_part_of_a_lora_on_anima_s_adapter_acts_on_the_concept_s_words(inference):
    """The host runs the adapter before the model call, and only under inference mode."""
    own, model, prompts = concept("anima"), patched("anima"), base("anima")
    tensors, weights = dict(own.lora.tensors), {}
    for number, layer in enumerate(("llm_adapter.out_proj", "llm_adapter.blocks.0.cross_attn.k_proj")):
        out, wide = layer_shape(model.model.diffusion_model.get_submodule(layer))
        generator = torch.Generator().manual_seed(number)
        down, up = (0.15 * torch.randn(shape, generator=generator) for shape in ((2, wide), (out, 2)))
        tensors |= {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}
        weights[f"diffusion_model.{layer}.weight"] = ("diff", (up @ down,))
    with_adapter = replace(own, lora=LoraFile("adapted", tensors))
    with torch.inference_mode(inference):
        without = sample(guider("anima", [own], everywhere(), prompts=prompts))
        ours = sample(guider("anima", [with_adapter], everywhere(), prompts=prompts))
        model.add_patches(weights)
        theirs = sample(plain(model, alone(own, prompts)))
    assert apart(ours, theirs) < 1e-6
    assert apart(without, theirs) > 1e-3


# ---- between --------------------------------------------------------------------------------------------------------


def first_answers(name, made, **how):
    """What the picture gets of its text in the first block, (tokens of frame, rows, columns, channels), positive."""
    found = []
    layer = shared_transformer(name).model.diffusion_model.get_submodule(f"blocks.0.cross_attn.{OUT[name]}")
    handle = layer.register_forward_hook(lambda m, i, out: found.append(out[0].clone()))
    try:
        sample(made, **how)
    finally:
        handle.remove()
    return found[-1].reshape(-1, SIZE[0] // 2, SIZE[1] // 2, found[-1].shape[-1])


@pytest.mark.parametrize("name", CROSS)
def test_outside_of_every_region_the_picture_reads_the_base_s_words_in_every_frame(name):
    """LoRAs on words alone, so that nothing before the first answers differs."""
    both = [concept(name, seed, WORDS) for seed in (0, 1)]
    read = first_answers(name, guider(name, both, sides()), frames=2)
    theirs = first_answers(name, plain(shared_transformer(name), base(name)), frames=2)
    torch.testing.assert_close(read[:, :, 2], theirs[:, :, 2])
    for columns in (slice(0, 2), slice(3, 4)):
        assert apart(read[:, :, columns], theirs[:, :, columns]) > 1e-2


@pytest.mark.parametrize("name", CROSS)
def test_in_its_region_the_picture_reads_what_it_reads_where_the_concept_is_everywhere(name):
    both, free = [concept(name, seed, WORDS) for seed in (0, 1)], replace(IDLE, isolation=False)
    read = first_answers(name, guider(name, both, sides(), free), frames=2)
    for own, columns in zip(both, (slice(0, 2), slice(3, 4)), strict=True):
        whole = first_answers(name, guider(name, [own], everywhere()), frames=2)
        torch.testing.assert_close(read[:, :, columns], whole[:, :, columns])


@pytest.mark.parametrize("name", ["wan", "cosmos"])
def test_what_is_in_one_region_does_not_reach_another(name):
    covered = torch.zeros(2, *SIZE)
    covered[0, :, :4], covered[1, :, 4:] = 1, 1
    left = [sample(guider(name, [concept(name, 0), other], covered)) for other in (concept(name, 1), concept(name, 2))]
    assert apart(left[0][..., :4], left[1][..., :4]) < 1e-6
    assert apart(left[0][..., 4:], left[1][..., 4:]) > 1e-2
    mixed = sample(guider(name, [concept(name, 0), concept(name, 1)], covered, replace(IDLE, isolation=False)))
    assert apart(mixed[..., :4], left[0][..., :4]) > 1e-3


def test_base_and_concepts_are_one_row_per_prompt_and_words_are_computed_once():
    model, calls = counted(shared_transformer("wan"))
    keys_of = model.model.diffusion_model.get_submodule("blocks.1.cross_attn.k")
    rows = []
    handle = keys_of.register_forward_hook(lambda m, inputs, out: rows.append(tuple(inputs[0].shape[:2])))
    one, two, prompts = concept("wan", 0), concept("wan", 1), base("wan", cfg=2.0)
    sample(guider("wan", [one, two, one], torch.ones(3, *SIZE), model=model, prompts=prompts), steps=3)
    handle.remove()
    assert calls == [2, 2, 2]
    assert sorted(rows) == [(1, 8), (1, 8), (1, 13), (1, 13), (2, 10), (2, 10), (2, 10)]


def test_a_negative_of_another_length_is_in_a_call_of_its_own():
    model, calls = counted(shared_transformer("wan"))
    own, prompts = concept("wan"), base("wan", (10, 17), cfg=2.0)
    ours = sample(guider("wan", [own], everywhere(), model=model, prompts=prompts))
    assert calls == [1, 1]
    assert apart(ours, sample(plain(patched("wan"), alone(own, prompts)))) < 1e-6


def test_a_call_that_the_host_splits_is_the_same(monkeypatch):
    model, calls = counted(shared_transformer("wan"))
    prompts = base("wan", cfg=2.0)
    made = guider("wan", [concept("wan", 0), concept("wan", 1)], sides(), model=model, prompts=prompts)
    whole = sample(made, batch=2)
    monkeypatch.setattr(model.model, "memory_required", lambda shape, *_, **__: 1e15 if shape[0] > 2 else 0.0)
    assert apart(sample(made, batch=2), whole) < 1e-6
    assert calls == [4, 2, 2]


def test_a_token_of_several_regions_reads_the_mean_of_their_words():
    both = [concept("wan", seed, WORDS) for seed in (0, 1)]
    free = replace(IDLE, isolation=False)
    each = [first_answers("wan", guider("wan", [own], everywhere(), free)) for own in both]
    read = first_answers("wan", guider("wan", both, everywhere(2), free))
    torch.testing.assert_close(read, (each[0] + each[1]) / 2)


def test_a_soft_region_fades_into_the_base():
    own = concept("wan", 0, WORDS)
    share = torch.full((1, *SIZE), 0.75)
    base_s = first_answers("wan", plain(shared_transformer("wan"), base("wan")))
    whole, faded = (first_answers("wan", guider("wan", [own], c, soft=True)) for c in (everywhere(), share))
    torch.testing.assert_close(faded, 0.75 * whole + 0.25 * base_s)


# ---- without regions ------------------------------------------------------------------------------------------------


def marked(name, words=(2, 3)):
    """Two concepts, whose phrases are these tokens."""
    made = [concept(name, 0), concept(name, 1)]
    for own in made:
        own.positive[0][1][keys.PHRASE_POSITIONS] = words
    return made


@pytest.mark.parametrize("name", CROSS)
def test_until_the_regions_are_found_the_base_draws_alone_and_an_early_end_is_said(name, caplog):
    prompts = base(name, cfg=2.0)
    made = guider(name, marked(name), None, LATE, prompts=prompts)
    assert torch.equal(sample(made), sample(plain(shared_transformer(name), prompts)))
    assert made.regions is None
    assert any("ended before the regions were found, which is after 80 %" in message for message in caplog.messages)


@pytest.mark.parametrize("name", CROSS)
def test_each_concept_gets_a_place_and_acts_from_then_on(name):
    prompts = base(name, cfg=2.0)
    made = guider(name, marked(name), None, SOON, prompts=prompts)
    ours = sample(made, steps=3, frames=2)
    assert made.regions.shape == (2, SIZE[0] // 2, SIZE[1] // 2)
    assert made.regions.flatten(1).any(1).all()
    assert apart(ours, sample(plain(shared_transformer(name), prompts), steps=3, frames=2)) > 1e-3


@pytest.mark.parametrize(("name", "words"), [("wan", 13), ("cosmos", 13)])
def test_a_map_is_the_attention_to_the_phrase_among_the_concept_s_own_words(name, words, monkeypatch):
    """All words together have all attention, in each of two blocks and two steps; the map of some is a part of that."""
    kept, begin = [], CrossGuider.begin
    monkeypatch.setattr(CrossGuider, "begin", lambda self, sampling: kept.append(begin(self, sampling)) or kept[-1])
    parts = [range(words), range(5), range(5, words)]
    for part in parts:
        sample(guider(name, marked(name, tuple(part)), None, LATE), steps=2, frames=2)
    whole, first, rest = (run.maps for run in kept)
    torch.testing.assert_close(whole, torch.full((2, 20), 4.0))
    torch.testing.assert_close(first + rest, whole)
    assert not torch.allclose(first[0], first[1])


def test_a_concept_without_a_phrase_is_refused():
    with pytest.raises(ValueError, match="has no phrase in its prompt, so its place"):
        sample(guider("wan", [concept("wan")], None, SOON))


# ---- with others ----------------------------------------------------------------------------------------------------


PLACES = {
    "preparing words": (Words, "_made"),
    "in an attention": (CrossCall, "_of_entry"),
    "in a call": (CrossInjection, "ran"),
    "in a block": (None, "blocks.1"),
}


@pytest.mark.parametrize(("where", "fault"), faults_at(PLACES))
def test_after_a_failure_in_the_middle_everything_is_as_it_was(where, fault, monkeypatch):
    model = shared_transformer("wan").clone()
    before, error, (owner, name) = remembered(model), FAULTS[fault](), PLACES[where]
    made = guider("wan", [concept("wan", 0), concept("wan", 1)], sides(), model=model)

    def failing(*args):
        if owner is not None:
            original(*args)
        raise error

    with monkeypatch.context() as broken:
        if owner is None:
            handle = model.model.diffusion_model.get_submodule(name).register_forward_hook(failing)
        else:
            original, handle = getattr(owner, name), None
            broken.setattr(owner, name, failing)
        with pytest.raises(type(error)) as raised:
            sample(made)
    if handle is not None:
        handle.remove()
    assert raised.value is error
    assert_as_remembered(model, before)
    assert made.run is None
    assert made.model_options is model.model_options


def test_another_pack_s_function_around_attentions_is_called_for_background_and_region():
    model, seen = shared_transformer("wan").clone(), []

    def theirs(attention, q, k, *args, **kwargs):
        seen.append((q.shape[-2], k.shape[-2]))
        return attention(q, k, *args, **kwargs)

    one, covered = [concept("wan")], sides()[:1]
    plain_one = sample(guider("wan", one, covered))
    model.model_options["transformer_options"]["optimized_attention_override"] = theirs
    assert torch.equal(sample(guider("wan", one, covered, model=model)), plain_one)
    assert seen == [(20, 20), (10, 10), (10, 13)] * 2


def _replaced(model):
    model.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "double_block", 1)


@pytest.mark.parametrize(("change", "words"), [(_replaced, "blocks.1"), (masked_by_another, "by a mask")])
def test_what_takes_the_network_s_place_is_refused(change, words):
    model = shared_transformer("wan").clone()
    change(model)
    with pytest.raises(ValueError, match=words):
        sample(guider("wan", [concept("wan")], everywhere(), model=model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="bypass the TorchCompileModel node"):
        sample(guider("wan", [concept("wan")], everywhere(), model=compiled("wan")))


def test_a_model_whose_prompt_holds_a_picture_is_refused():
    model = tiny_transformer("wan", more={"model_type": "i2v", "in_dim": 16})
    with pytest.raises(ValueError, match="where a picture is part of the prompt does not work on Wan models"):
        guider("wan", [concept("wan")], everywhere(), model=model)


def test_pictures_beside_the_latent_and_other_text_encoders_are_refused():
    beside = base("wan", time_dim_concat=noise(shared_transformer("wan"), *SIZE))
    with pytest.raises(ValueError, match="with pictures beside the prompt does not work on Wan models"):
        sample(guider("wan", [concept("wan")], everywhere(), prompts=beside))
    other = concept("cosmos")
    other.positive[0][0] = torch.zeros(1, 5, 24)
    with pytest.raises(ValueError, match="another text encoder"):
        sample(guider("cosmos", [other], everywhere()))
    layered = concept("wan")
    layered.positive[0][1][keys.LAYER_CONTEXTS] = torch.zeros(16, 5, 48)
    with pytest.raises(ValueError, match="ED-LoRA 'c0'"):
        guider("wan", [layered], everywhere())


def test_what_does_nothing_there_is_said_once(caplog):
    caplog.set_level("INFO")
    sample(guider("wan", [concept("wan")], everywhere(), Compose()), steps=2)
    said = [message for message in caplog.messages if "does nothing" in message]
    assert len(said) == 1
    assert "enhancement and first_noise" in said[0]


def test_the_node_takes_the_guider_that_the_network_s_attention_asks_for():
    across = {name for name in names(every=True) if attends_across(shared_transformer(name))}
    assert across == set(CROSS)

    def made(name):
        prompts = prompt(name, 10, 0)
        return ConceptsComposer.execute(
            shared_transformer(name), ConceptList(concept(name), None), prompts, prompts, 1.0
        ).args[0]

    assert isinstance(made("wan"), CrossGuider)
    assert isinstance(made("flux"), JointGuider)
    assert not isinstance(made("wan"), ComposeGuider)
