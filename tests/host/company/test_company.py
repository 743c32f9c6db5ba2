"""What other packs are told of our rows, what a concept's entries carry, and which models do not see us."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_concepts.host import keys
from comfyui_concepts.host.compose.guider import ComposeGuider
from comfyui_concepts.host.conduct.guider import ConductGuider
from comfyui_concepts.host.conduct.paths import Paths
from comfyui_concepts.host.engine.base_prompts import BasePrompts, numbered, with_words_of
from comfyui_concepts.host.engine.reach import check_reaches_network
from comfyui_concepts.host.erase import predictions
from comfyui_concepts.methods.compose.settings import Compose
from comfyui_concepts.methods.conduct.settings import Conduct
from comfyui_concepts.methods.erase.trained.prompts import EncodedPrompts

from ..conftest import TINY_UNET, tiny_model
from .ours import EVERYWHERE, GRADIENTS, OURS, _concept
from .parties import CFG, COMPANY, SMALL, Setting, control_net, sample, text


@pytest.fixture(scope="module")
def small():
    return tiny_model("EPS", unet=TINY_UNET | SMALL)


def _noting(told: list, options: dict, context=None, argument=None) -> None:
    """Checks and notes what one of them is told of a call. Rows of the negative are known by their text."""
    sides = options["cond_or_uncond"]
    assert argument in (None, sides)
    assert set(sides) <= {0, 1}
    if context is not None and len(sides) > 1:
        negative = [torch.equal(part, text(99).expand_as(part)) for part in context.chunk(len(sides))]
        assert sides == [int(is_negative) for is_negative in negative]
    told.append(tuple(sides))


def listening(model):
    """A clone that notes what is told of every call: to a function around it, to attentions, to a ControlNet.

    Returns:
        The clone, the ControlNet, and the list. (Functions, not methods: the host copies a method's object.)
    """
    told, clone, control = [], model.clone(), control_net()

    def around(apply_model, args):
        _noting(told, args["c"]["transformer_options"], args["c"]["c_crossattn"], args["cond_or_uncond"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    def patch(n, context, value, extra):
        _noting(told, extra)
        return n, context, value

    theirs = control.get_control
    control.get_control = lambda *args: (_noting(told, args[4], args[2]["c_crossattn"]), theirs(*args))[1]
    clone.set_model_unet_function_wrapper(around)
    clone.set_model_attn1_patch(patch)
    return clone, control, told


@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize("ours", OURS)
def test_others_are_told_zero_and_one(small, ours, controlled):
    model, control, told = listening(small)
    carried = {"control": control, "control_apply_to_uncond": True} if controlled else {}
    sample(OURS[ours].make(Setting(model, (carried,)), False), 2)
    assert any(len(sides) >= 2 for sides in told)


def test_a_training_tells_that_all_its_prompts_are_positives(small):
    patcher, _, told = listening(small)
    small.model.current_patcher = small
    x, prompts = torch.randn(2, 4, 8, 8), [EncodedPrompts(text(seed).expand(2, -1, -1), None) for seed in (1, 2, 3)]
    predictions.outputs(small.model, prompts, x, torch.full((2,), 2.0), patcher.model_options)
    assert set(told) == {(0, 0, 0)}


def test_a_concepts_entry_is_the_bases_with_other_words():
    """Whatever a node has put beside the words, whether we know its name or not."""
    beside = {
        "control": object(), "concat_latent_image": torch.zeros(1), "concat_mask": torch.zeros(1),
        "reference_latents": [torch.zeros(1)], "width": 512, "guidance": 3.5, "of a later host": object(),
    }  # fmt: skip
    said = {"pooled_output": torch.zeros(1), keys.OBJECT_POSITIONS: "the base's", keys.PHRASE_POSITIONS: (1,)}
    own = {"pooled_output": torch.ones(1), keys.PHRASE_POSITIONS: (2,)}
    base = numbered([[text(0), {**beside, **said, "end_percent": 0.5}], [text(5), {**beside, "start_percent": 0.5}]])
    entries = with_words_of(base, [[text(1), own]], "positive")
    assert [values.get("end_percent") for _, values in entries] == [0.5, None]
    for (_, theirs), (context, values) in zip(base, entries, strict=True):
        assert torch.equal(context, text(1))
        assert all(values[key] is value for key, value in {**beside, **own}.items())
        assert keys.OBJECT_POSITIONS not in values
        assert values[keys.ENTRY_NUMBER] == theirs[keys.ENTRY_NUMBER]


def test_entries_that_differ_in_words_alone_need_one_row_of_a_concept():
    base = numbered([[text(0), {"pooled_output": torch.zeros(1)}], [text(5), {"strength": 0.5}]])
    assert len(with_words_of(base, [[text(1), {}]], "positive")) == 1


@pytest.mark.parametrize("kind", ["combined prompts", "scheduled prompts"])
def test_each_entry_of_the_base_meets_the_concepts_entry_beside_it(small, kind, monkeypatch):
    """With one control they are rows of one call; with several the host makes a call of each, in any order."""
    setting = COMPANY[kind](small)
    monkeypatch.setattr(Paths, "_fits_one_call", lambda *_: False)
    guider = OURS["Concept Conductor"].make(setting, True)
    in_two = sample(guider, setting.steps)
    monkeypatch.undo()
    assert torch.allclose(sample(guider, setting.steps), in_two, atol=1e-4)


def _answered_for(model):
    """A node that we do not know, which runs the network twice and answers for it from then on."""
    import comfy.patcher_extension

    clone, calls = model.clone(), []

    def answer(executor, x, *args, **kwargs):
        calls.append(1)
        return executor(x, *args, **kwargs) if len(calls) <= 2 else torch.zeros_like(x)

    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    clone.add_wrapper_with_key(kind, "someone's cache", answer)
    return Setting(clone, steps=3)


@pytest.mark.parametrize("ours", OURS)
def test_a_node_may_answer_for_the_network_and_a_gradient_says_which(small, ours, monkeypatch):
    setting = _answered_for(small)
    if OURS[ours].two_calls:
        monkeypatch.setattr(Paths, "_fits_one_call", lambda *_: False)
    if ours in GRADIENTS:
        with pytest.raises(ValueError, match="needs the network itself.*someone's cache.*bypass it"):
            sample(OURS[ours].make(setting, True), setting.steps)
    else:
        assert torch.isfinite(sample(OURS[ours].make(setting, True), setting.steps)).all()


def _learned(concept, layers):
    """The same words, once per layer."""
    return replace(
        concept, positive=[[concept.positive[0][0], {**concept.positive[0][1], keys.LAYER_CONTEXTS: layers}]]
    )


@pytest.mark.parametrize("kind", ["erasure by text", "attn2_patch"])
@pytest.mark.parametrize("ours", ["Concept Conductor", "LoRA Composer"])
def test_learned_words_are_patched_as_others_are(small, ours, kind):
    setting = COMPANY[kind](small)
    base, concept = BasePrompts(*setting.prompts(), CFG), _concept(setting, True)
    pictures = []
    for one in (concept, _learned(concept, text(1).repeat(4, 1, 1))):
        if ours == "Concept Conductor":
            guider = ConductGuider(setting.model, base, [one], EVERYWHERE, Conduct())
        else:
            settings = Compose(enhancement=0.0, reinit="off")
            guider = ComposeGuider(setting.model, base, [one], lambda h, w: torch.ones(1, h, w), settings)
        pictures.append(sample(guider, 2))
    assert torch.allclose(*pictures, atol=1e-4)


def _by_the_host(model):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    set_torch_compile_wrapper(model=model, backend="eager")


def _by_object_patch(model):
    middle = model.get_model_object("diffusion_model.middle_block")
    model.add_object_patch("diffusion_model.middle_block", torch.compile(middle, backend="eager"))


def _in_place(model):
    model.model.diffusion_model.out.compile(backend="eager")


@pytest.mark.parametrize("compiling", [_by_the_host, _by_object_patch, _in_place])
def test_a_compiled_model_is_known_however_it_was_compiled(compiling):
    model = tiny_model("EPS", unet=TINY_UNET | SMALL)
    check_reaches_network(model, "It")
    compiled = model.clone()
    compiling(compiled)
    with pytest.raises(ValueError, match="It works inside the network.*TorchCompileModel node, or else"):
        check_reaches_network(compiled, "It", ", or else")
