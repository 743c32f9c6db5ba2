"""LoRA Composer on transformers with joint attention: a region over everything, over nothing, and all between."""

from __future__ import annotations

import uuid

import comfy.controlnet
import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host import keys
from comfyui_concepts.host.compose.guider import ComposeGuider
from comfyui_concepts.host.engine.base_prompts import BasePrompts
from comfyui_concepts.host.engine.model_call import ModelCall
from comfyui_concepts.host.registry import architecture_of, attends_jointly
from comfyui_concepts.host.text.sequence import SequenceText
from comfyui_concepts.methods.compose.settings import Compose

from ..faults import FAULTS, assert_as_remembered, remembered
from ..tiny_transformers import compiled, counted, names, noise, shared_transformer
from .joint_cases import (
    DEFAULTS,
    FAST,
    JOINT,
    SIZE,
    apart,
    base,
    concept,
    everywhere,
    guider,
    halves,
    masked_by_another,
    patched,
    plain,
    prompt,
    sample,
)

TWO = [name for name in ("flux", "zimage") if name in JOINT]
BLOCKS = {"flux": "double_blocks.1", "zimage": "layers.1"}


def _alone(own, prompts):
    return BasePrompts(own.positive, own.negative, prompts.cfg)


# ---- over everything, over nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOINT)
def test_a_region_over_everything_is_the_concept_s_prompt_with_its_lora_in_the_weights(name):
    own, prompts = concept(name), base(name)
    theirs = sample(plain(patched(name), _alone(own, prompts)))
    ours = sample(guider(name, [own], everywhere(), prompts=prompts))
    assert apart(ours, theirs) < 1e-6


@pytest.mark.parametrize("name", FAST)
def test_over_nothing_without_strength_and_after_it_the_picture_is_the_base_s_bit_for_bit(name):
    model, prompts = shared_transformer(name), base(name)
    theirs = sample(plain(model, prompts))
    moved = sample(guider(name, [concept(name)], everywhere(), Compose(), prompts=prompts))
    assert apart(moved, theirs) > 1e-2
    for concepts, covered in (
        ([concept(name)], torch.zeros(1, *SIZE)),
        ([concept(name, strength=0.0)], everywhere()),
        ([], torch.zeros(0, *SIZE)),
    ):
        assert torch.equal(sample(guider(name, concepts, covered, Compose(), prompts=prompts)), theirs)
    assert torch.equal(sample(plain(model, prompts)), theirs)


@pytest.mark.parametrize("name", [name for name in ("lumina2", "zimage", "krea2", "qwen") if name in JOINT])
def test_prompts_of_unequal_length_are_where_they_are_alone(name):
    """Z-Image's picture is not filled up here: where it is, a prompt of more rows than the base's lies nearer to it."""
    size = (16, 8)
    own, prompts = concept(name, lengths=(40, 8)), base(name, (10, 10))
    theirs = sample(plain(patched(name), _alone(own, prompts)), size=size)
    assert apart(sample(guider(name, [own], everywhere(size=size), prompts=prompts), size=size), theirs) < 1e-6


@pytest.mark.parametrize(("name", "cfg", "steps"), [("flux", 2.0, 2), ("zimage", 1.0, 1)])
def test_batches_cfg_1_and_further_steps_are_those_of_the_concept(name, cfg, steps):
    own, prompts = concept(name), base(name, cfg=cfg)
    theirs = sample(plain(patched(name), _alone(own, prompts)), batch=2, steps=steps)
    made = guider(name, [own], everywhere(), prompts=prompts)
    ours = sample(made, batch=2, steps=steps)
    assert apart(ours, theirs) < 1e-6 * steps
    assert torch.equal(sample(made, batch=2, steps=steps), ours)  # nothing is left of the first run


# ---- between --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWO)
def test_base_and_concepts_are_one_call_and_one_row_per_prompt(name):
    model, calls = counted(shared_transformer(name))
    both, prompts = [concept(name, 0), concept(name, 1)], base(name, cfg=2.0)
    sample(guider(name, both, halves(), Compose(), model=model, prompts=prompts))
    assert calls == [2]


def test_a_negative_of_another_length_is_in_a_call_of_its_own():
    model, calls = counted(shared_transformer("qwen"))
    own, prompts = concept("qwen"), base("qwen", (10, 17), cfg=2.0)
    ours = sample(guider("qwen", [own], everywhere(), model=model, prompts=prompts))
    assert calls == [1, 1]
    assert apart(ours, sample(plain(patched("qwen"), _alone(own, prompts)))) < 1e-6


@pytest.mark.parametrize("name", TWO)
def test_a_call_that_the_host_splits_is_the_same(name, monkeypatch):
    model, calls = counted(shared_transformer(name))
    both, prompts = [concept(name, 0), concept(name, 1)], base(name, cfg=2.0)
    made = guider(name, both, halves(), Compose(), model=model, prompts=prompts)
    whole = sample(made, batch=2)
    monkeypatch.setattr(model.model, "memory_required", lambda shape, *_, **__: 1e15 if shape[0] > 2 else 0.0)
    assert apart(sample(made, batch=2), whole) < 1e-6
    assert calls == [4, 2, 2]


@pytest.mark.parametrize(("reads", "least", "most"), [(False, 0.0, 1e-6), (True, 1e-3, 10.0)])
def test_a_region_reads_the_base_only_where_it_is_told_to(reads, least, most):
    own, negative = concept("zimage"), prompt("zimage", 10, seed=1)
    first, second = (
        sample(
            guider("zimage", [own], everywhere(), Compose(base_in_regions=reads), prompts=BasePrompts(p, negative, 1.0))
        )
        for p in (prompt("zimage", 10, seed=0), prompt("zimage", 10, seed=7))
    )
    assert least <= apart(first, second) < most


@pytest.mark.parametrize("name", TWO)
def test_what_is_in_one_region_does_not_reach_another(name):
    size = (16, 8)
    covered = torch.zeros(2, *size)
    covered[0, :, :4], covered[1, :, 4:] = 1, 1
    left = [
        sample(guider(name, [concept(name, 0), other], covered, DEFAULTS), size=size)
        for other in (concept(name, 1), concept(name, 2))
    ]
    assert apart(left[0][..., :4], left[1][..., :4]) < 1e-6
    assert apart(left[0][..., 4:], left[1][..., 4:]) > 1e-2
    seeing = Compose(isolation=False)
    mixed = sample(guider(name, [concept(name, 0), concept(name, 1)], covered, seeing), size=size)
    assert apart(mixed[..., :4], left[0][..., :4]) > 1e-3


@pytest.mark.parametrize(
    ("name", "how"),
    [pair for pair in (("flux", {}), ("krea2", {"reference_latents_method": "index"})) if pair[0] in JOINT],
)
def test_references_lie_behind_the_picture_and_get_no_lora(name, how):
    picture = noise(shared_transformer(name), 6, 6, seed=9)
    own = concept(name, kinds=("text",))
    values = {"reference_latents": [picture], **how}
    seen = BasePrompts(prompt(name, 13, 20, **values), prompt(name, 8, 21, **values), 1.0)
    theirs = sample(plain(patched(name, kinds=("text",)), seen))
    assert apart(sample(guider(name, [own], everywhere(), prompts=base(name, **values))), theirs) < 1e-6
    whole = concept(name)
    assert apart(sample(guider(name, [whole], everywhere(), prompts=base(name, **values))), theirs) > 1e-2


@pytest.mark.skipif("krea2" not in JOINT, reason="this host has no Krea 2")
def test_references_that_a_network_passes_over_are_none():
    """Krea 2 takes them only if a way to place them is named."""
    name, values = "krea2", {"reference_latents": [noise(shared_transformer("krea2"), 6, 6, seed=9)]}
    with_them = sample(guider(name, [concept(name)], everywhere(), prompts=base(name, **values)))
    assert torch.equal(with_them, sample(guider(name, [concept(name)], everywhere())))


def test_a_control_net_s_part_lands_on_the_picture():
    name, own = "flux", concept("flux")

    class Fixed(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, *more):
            assert cond["c_crossattn"].shape[1] in (10, 13)  # one prompt
            part = torch.linspace(-1, 1, 20 * 64).reshape(1, 20, 64)
            return {"input": [part, part], "output": [part, part]}

    values = {"control": Fixed(), "control_apply_to_uncond": True}
    seen = BasePrompts(prompt(name, 13, 20, **values), prompt(name, 8, 21), 1.0)
    theirs = sample(plain(patched(name), seen))
    prompts = base(name)._replace(positive=prompt(name, 10, 0, **values))
    assert apart(sample(guider(name, [own], everywhere(), prompts=prompts)), theirs) < 1e-6
    assert apart(sample(plain(patched(name), seen._replace(positive=own.positive))), theirs) > 1e-3


@pytest.mark.parametrize("name", ["flux", "zimage"])
def test_a_soft_region_fades_in_what_its_lora_does_and_in_what_it_reads(name):
    covered = torch.linspace(0.6, 1, SIZE[1]).expand(1, *SIZE)
    hard, soft = (sample(guider(name, [concept(name)], covered, soft=soft)) for soft in (False, True))
    assert torch.equal(hard, sample(guider(name, [concept(name)], everywhere())))
    assert apart(soft, hard) > 1e-3


# ---- with others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_failure_in_the_middle_everything_is_as_it_was(name, fault):
    model = shared_transformer(name).clone()
    before = remembered(model)
    made = guider(name, [concept(name)], everywhere(), model=model)
    handle = model.model.diffusion_model.get_submodule(BLOCKS[name]).register_forward_hook(_failing(fault))
    with pytest.raises((RuntimeError, comfy.model_management.InterruptProcessingException)):
        sample(made)
    handle.remove()
    assert_as_remembered(model, before)
    assert made.run is None


def _failing(fault):
    def hook(*_):
        raise FAULTS[fault]()

    return hook


def test_another_pack_s_function_around_attentions_is_called_for_every_group():
    model, seen = shared_transformer("qwen").clone(), []

    def theirs(attention, q, *args, **kwargs):
        seen.append(q.shape[-2])
        return attention(q, *args, **kwargs)

    plain_one = sample(guider("qwen", [concept("qwen")], everywhere()))
    model.model_options["transformer_options"]["optimized_attention_override"] = theirs
    ours = sample(guider("qwen", [concept("qwen")], everywhere(), model=model))
    assert torch.equal(ours, plain_one)
    assert seen == [10, 13 + 20] * 2  # the base's words; the concept's and the picture, in each of two blocks


def _replaced(model):
    model.set_model_patch_replace(
        lambda args, extra: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", 1
    )


@pytest.mark.parametrize(("change", "words"), [(_replaced, "double_blocks.1"), (masked_by_another, "by a mask")])
def test_what_takes_the_network_s_place_is_refused(change, words):
    model = shared_transformer("flux").clone()
    change(model)
    with pytest.raises(ValueError, match=words):
        sample(guider("flux", [concept("flux")], everywhere(), model=model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="bypass the TorchCompileModel node"):
        sample(guider("flux", [concept("flux")], everywhere(), model=compiled("flux")))


def test_a_network_whose_attention_another_pack_has_replaced_is_refused(monkeypatch):
    model = shared_transformer("flux").clone()
    block = model.model.diffusion_model.double_blocks[0]
    monkeypatch.setattr(block, "__class__", type("Fused", (type(block),), {"__module__": "theirs"}))
    with pytest.raises(ValueError, match="host's own"):
        guider("flux", [concept("flux")], everywhere(), model=model)


def test_what_a_sequence_has_no_place_for_is_refused():
    layered = concept("flux")
    layered.positive[0][1][keys.LAYER_CONTEXTS] = torch.zeros(16, 5, 48)
    with pytest.raises(ValueError, match="ED-LoRA 'c0'"):
        guider("flux", [layered], everywhere())
    masked = base("lumina2", attention_mask=torch.tensor([[1] * 9 + [0]]))
    with pytest.raises(ValueError, match="masked"):
        sample(guider("lumina2", [concept("lumina2")], everywhere(), prompts=masked))
    other = concept("flux")
    other.positive[0][0] = torch.zeros(1, 5, 24)
    with pytest.raises(ValueError, match="another text encoder"):
        sample(guider("flux", [other], everywhere()))


def test_a_prompt_of_another_node_in_the_same_call_is_refused():
    def with_their_own(args):
        theirs = [{**args["conds"][0][0], "uuid": uuid.uuid4()}]
        others = (args["input"], args["sigma"], args["model_options"])
        return comfy.samplers.calc_cond_batch(args["model"], [*args["conds"], theirs], *others)[:2]

    model = shared_transformer("flux").clone()
    model.set_model_sampler_calc_cond_batch_function(with_their_own)
    with pytest.raises(ValueError, match="a prompt of its own.*bypass that node"):
        sample(guider("flux", [concept("flux")], everywhere(), model=model))


@pytest.mark.parametrize(
    ("name", "frames", "others", "words"),
    [("qwen", 2, {}, "with several frames"), ("lumina2", 1, {"ref_latents": []}, "with pictures beside the prompt")],
)
def test_what_no_sequence_of_prompts_has_a_place_for_is_refused_by_family(name, frames, others, words):
    architecture = architecture_of(shared_transformer(name).model)
    x = torch.zeros(1, 16, frames, 4, 4) if frames > 1 else torch.zeros(1, 16, 4, 4)
    call = ModelCall(x, torch.ones(1), None, torch.zeros(1, 5, 8), None, {}, others)
    with pytest.raises(ValueError, match=words):
        SequenceText(architecture, call, [[torch.zeros(1, 5, 8)]], "LoRA Composer")


def test_what_does_nothing_there_is_said_once(caplog):
    caplog.set_level("INFO")
    sample(guider("flux", [concept("flux")], everywhere(), Compose()), steps=2)
    said = [message for message in caplog.messages if "does nothing" in message]
    assert len(said) == 1
    assert "enhancement and first_noise" in said[0]


def test_which_guider_serves_a_model_is_what_its_attention_says():
    assert {name for name in names() if attends_jointly(shared_transformer(name))} == {*JOINT, "flux_schnell"}
    wan = ComposeGuider(
        shared_transformer("wan"), base("wan"), [concept("wan")], lambda h, w: everywhere(), Compose(enhancement=0.0)
    )
    with pytest.raises(ValueError, match="WanModel"):
        sample(wan)
