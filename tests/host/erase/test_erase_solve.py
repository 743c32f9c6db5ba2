"""Solving next to the host's models and text encoders: what is read of them, what is refused, and in which words."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import comfy.hooks
import comfy.model_management
import pytest
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from comfyui_concepts.boards.bench_erase import RandomEncoder
from comfyui_concepts.host.erase import apply as erase_apply
from comfyui_concepts.host.erase import probe as erase_probe
from comfyui_concepts.host.erase import solve as erase_solve
from comfyui_concepts.host.erase import weights as erase_weights
from comfyui_concepts.host.erase.solve import SolveRequest, solve_erasure
from comfyui_concepts.host.erase.train import check_trainable
from comfyui_concepts.host.text.tokens import PromptEncoder
from comfyui_concepts.methods.erase.problem import SolverSettings, problem_of
from comfyui_concepts.methods.erase.report import report_text
from comfyui_concepts.methods.erase.spec import LAST, TEMPLATES, Erased, Preserved
from comfyui_concepts.nodes.erase.apply import ConceptsApplyErasure

NO_CLIP = SimpleNamespace(layer_idx=None, use_clip_schedule=False)


def erase(concept, anchor="", previous=None, **more):
    return Erased(concept, anchor, more.pop("templates", ("{}", "a {}")), more.pop("scope", LAST), 1.0, (), previous)


@pytest.mark.parametrize("count", [14, 24, 32, 140])
def test_the_weights_a_report_is_made_of_are_keys_and_values_alike(count):
    keys = [f"{n}.attn2.to_{to}.weight" for n in range(count // 2) for to in "kv"]
    taken = erase_weights.sampled_keys(keys)
    of_keys = sum("to_k" in key for key in taken)
    assert 8 <= len(taken) <= 14
    assert abs(2 * of_keys - len(taken)) <= 1


def test_solving_and_probing_read_keys_and_values_of_a_model_with_32(new_model, monkeypatch):
    model, encode, read = new_model(sd15=True), RandomEncoder(24), []

    def weight_energy(model, keys, progress=None):
        read.append("".join(key[-8] for key in keys))
        return erase_weights.weight_energy(model, keys, progress)

    assert len(erase_weights.text_keys(model, ("k", "v"))) == 32
    monkeypatch.setattr(erase_solve, "weight_energy", weight_energy)
    monkeypatch.setattr(erase_probe, "weight_energy", weight_energy)
    monkeypatch.setattr(erase_probe, "encoders_of", lambda model, clip: [encode])
    edit = solve_erasure(model, NO_CLIP, erase("cat", "dog"), Preserved(("a fox",), 1.0), SolveRequest(), encode)
    erase_probe.probe(model, NO_CLIP, edit)
    assert len(read) == 2
    assert all(set(kinds) == {"k", "v"} for kinds in read)


@pytest.mark.parametrize(
    ("solver", "count"),
    [
        ("uce", 11),
        ("rece", 32),
        ("rece-sequential", 32),
        ("realera", 11),
        ("null-space", 11),
        ("double-projections", 11),
        ("speed", 32),
    ],
)
def test_solvers_whose_result_depends_on_the_weights_read_every_one(new_model, monkeypatch, solver, count):
    read = []

    def weight_energy(model, keys, progress=None):
        read.append(len(keys))
        return erase_weights.weight_energy(model, keys, progress)

    monkeypatch.setattr(erase_solve, "weight_energy", weight_energy)
    model, request = new_model(sd15=True), SolveRequest(solver)
    solve_erasure(model, NO_CLIP, erase("cat", "dog"), Preserved(("a fox",), 1.0), request, RandomEncoder(24))
    assert read == [count]


def test_an_edit_for_another_clip_skip_is_refused_where_it_is_applied_and_where_it_is_probed(demo_model):
    model, clip, _ = demo_model
    edit = solve_erasure(model, clip, erase("cat"), None)
    skipped = clip.clone()
    skipped.clip_layer(-2)
    refusal = r"another text encoder or another CLIP skip.*set the same CLIP skip \(none\)"
    for run in (
        lambda: ConceptsApplyErasure.execute(model, edit, 1.0, "automatic", skipped),
        lambda: erase_probe.probe(model, skipped, edit),
    ):
        with pytest.raises(ValueError, match=refusal):
            run()
    assert (
        ConceptsApplyErasure.execute(model, edit, 0.0, "automatic", skipped).args[1] is skipped
    )  # plain, whatever it is
    assert ConceptsApplyErasure.execute(model, edit, 1.0, "automatic", clip).args[1] is clip
    other = replace(edit, spec={"solver": "ESD"})  # an edit that does not say its CLIP skip
    with pytest.raises(ValueError, match="set the same CLIP skip, or make"):
        erase_apply.apply_to_clip(skipped, other)


@pytest.mark.parametrize("solver", ["uce", "null-space"])
def test_the_pooled_embedding_goes_to_its_anchor_too_and_the_report_says_so(demo_model, solver):
    model, clip, _ = demo_model
    encode = PromptEncoder(clip)
    listed, kept = erase("cat", "dog", templates=("a {}",)), Preserved(("a fox", "a house"), 1.0)
    edit = solve_erasure(model, clip, listed, kept, SolveRequest(solver, pooled=True), encode)
    assert edit.pooled.width == encode("").pooled.shape[-1]

    def left(edit):
        c, g = (encode(text, name).pooled for text, name in (("a cat", "cat"), ("a dog", "dog")))
        return float((c + edit.pooled(c) - g).norm() / (c - g).norm())

    assert left(edit) < 0.05
    assert (edit.pooled(encode("").pooled)).norm() < 0.05 * encode("").pooled.norm()
    assert "pooled embedding" in report_text(edit.report, edit.spec)
    plain = solve_erasure(model, clip, listed, kept, SolveRequest(solver), encode)
    assert plain.pooled is None
    assert "pooled embedding" not in report_text(plain.report, plain.spec)


def test_the_threshold_of_the_null_space_holds_for_the_pooled_embedding(demo_model):
    """With the smallest almost nothing counts as unused, so preserved prompts stay exactly; a large one moves them."""
    model, clip, _ = demo_model
    encode, moved = PromptEncoder(clip), []
    kept = Preserved(("a fox", "a house", "a tree", "a car", "a bus", "the moon"), 1.0)
    for threshold in (1e-6, 10.0):
        request = SolveRequest("null-space", SolverSettings(threshold=threshold), pooled=True)
        made = solve_erasure(model, clip, erase("cat", "dog"), kept, request, encode).pooled
        moved.append(float(made(encode("a fox").pooled).norm() / encode("a fox").pooled.norm()))
    assert moved[0] < 1e-6
    assert moved[1] > 0.01


def test_a_concept_that_is_its_anchor_to_the_encoder_is_refused(demo_model):
    """Words that differ as text and have the same tokens: blanks and capitals are nothing to a tokenizer."""
    model, clip, _ = demo_model
    with pytest.raises(
        ValueError, match=r"'Van  Gogh' and its anchor 'van gogh' are the same to this text encoder.*another anchor"
    ):
        solve_erasure(model, clip, erase("Van  Gogh", "van gogh"), None)


@pytest.mark.parametrize(
    ("kept", "held"),
    [
        ("a fox.", "a fox."),
        ("a fox!", "a fox!"),
        ("a fox, ", "a fox,"),
        ('a "fox"...', 'a "fox"...'),
        ("(a fox:1.3)", "a fox"),
        ("((a fox))", "a fox"),
        ("a (fox:1.2)", "a fox"),
        (r"a \(fox\)", "a (fox)"),
    ],
)
def test_of_a_kept_prompt_its_last_word_is_held_without_punctuation_and_weights(demo_model, kept, held):
    encode = PromptEncoder(demo_model[1])
    lists = erase_solve.lists_without_weights(erase("cat", "dog"), Preserved((kept,), 1.0))
    problem = problem_of(encode, *(listed.in_order() for listed in lists))
    named = [(n, name) for n, name in enumerate(problem.held) if name]
    assert [name for _, name in named] == ["fox", "end"]
    fox = encode(held, "fox")
    assert torch.equal(problem.preserved[named[0][0]], fox.tokens[fox.start].double())
    assert torch.equal(problem.preserved[named[1][0]], fox.tokens[fox.stop].double())


@pytest.mark.parametrize("concept", ["cat.", "cat!", "(cat:1.2)", "((cat))"])
def test_the_last_subject_token_is_a_words_whatever_is_written_beside_it(demo_model, concept):
    encode = PromptEncoder(demo_model[1])
    listed, _ = erase_solve.lists_without_weights(erase(concept, "dog", templates=("a {}",)), None)
    (pairs,) = problem_of(encode, listed.in_order(), []).erased
    assert torch.equal(pairs.C, encode("a cat").tokens[2:3].double())


def test_a_report_says_what_is_held_row_by_row(demo_model):
    model, clip, _ = demo_model
    kept = Preserved(("(a fox:1.2)!", "a photo of a Zzyzxqwv."), 1.0)
    edit = solve_erasure(model, clip, erase("(cat:1.2)", "dog"), kept)
    assert edit.spec["erase"][0]["concept"] == "cat"
    by_prompt = {entry["prompt"]: [row["row"] for row in entry["rows"]] for entry in edit.report["kept"]}
    assert list(by_prompt) == ["the empty prompt", "a fox!", "a photo of a Zzyzxqwv."]
    assert list(by_prompt.values()) == [[], ["fox", "end"], ["zzyzxqwv", "end"]]
    text = report_text(edit.report, edit.spec)
    assert re.search(r"preserved 'a fox!': moved [\d.]+% \(fox [\d.]+%, end [\d.]+%\)", text)
    with pytest.raises(ValueError, match="'a cat' is to be preserved and 'cat' is to be erased"):
        solve_erasure(model, clip, erase("(cat:1.2)"), Preserved(("a (cat:0.8)",), 1.0))


@pytest.mark.parametrize("epochs", [0, 3, 5])
def test_rece_holds_what_is_kept_through_every_epoch_in_the_sentence_that_is_kept(demo_model, epochs):
    """In other sentences the word has another embedding, and every epoch changes more of what lies around the kept one.

    With the word in both sentences neither moves much.
    """
    model, clip, _ = demo_model
    request, sentences = SolveRequest("rece", SolverSettings(epochs=epochs)), ("a photo of a dog.", "a dog")
    encoded = [clip.encode_from_tokens(clip.tokenize(text))[0].double() for text in sentences]
    rows = [encoded[0][5], encoded[1][2]]

    def moved(*kept):
        edit = solve_erasure(model, clip, erase("cat", templates=TEMPLATES["scene"]), Preserved(kept, 1.0), request)
        return [float((edit.text.matrix().double() @ row).norm() / row.norm()) for row in rows]

    one, both = moved(sentences[0]), moved(*sentences)
    assert one[0] < 0.01
    assert max(both) < 0.02
    assert one[1] > 10 * both[1]


def test_as_published_rece_holds_neither_the_empty_prompt_nor_end_tokens(demo_model):
    model, clip, _ = demo_model
    kept, request = Preserved(("a fox.",), 1.0), SolveRequest("rece-published", SolverSettings(epochs=1))
    edit = solve_erasure(model, clip, erase("cat", "dog"), kept, request)
    ((prompt, row),) = ((entry["prompt"], row["row"]) for entry in edit.report["kept"] for row in entry["rows"])
    assert (prompt, row) == ("a fox.", "fox")
    alone = solve_erasure(model, clip, erase("cat", "dog"), None, request)  # and with nothing to hold it erases still
    assert alone.report["kept"] == []
    assert alone.report["concepts"][0]["left"] < 1


@pytest.mark.parametrize("listed", [erase("cat"), None])
def test_a_model_without_cross_attention_is_refused_before_its_encoder_is_asked(listed):
    """Encoders of other families make one token of an empty prompt, or none."""
    root = torch.nn.Module()
    root.diffusion_model = torch.nn.Linear(4, 4)
    root.model_config = SimpleNamespace(unet_config={})
    model = SimpleNamespace(model=root, model_state_dict=root.state_dict)
    clip = SimpleNamespace(layer_idx=None, tokenize=lambda text, **_: {"t5": [[(1, 1.0)]]})
    with pytest.raises(ValueError, match=r"This model \(Linear\) has no layer that is known to read the prompt first"):
        solve_erasure(model, clip, listed, None)


def test_a_preserved_prompt_that_is_the_concept_to_the_encoder_is_refused(demo_model):
    """The lists do not see it, for as text the two differ; the embeddings do."""
    model, clip, _ = demo_model
    kept = Preserved(("a house", "cafe\u0301"), 1.0)  # the accent as a character of its own
    with pytest.raises(
        ValueError, match=r"'cafe\u0301' is, to this text encoder, the same as a concept.*out of Preserve Concepts"
    ):
        solve_erasure(model, clip, erase("Café", "art"), kept)


class _WithoutFloat64(torch.Tensor):
    """A tensor on a device that has no float64."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("this device has no float64")


def test_weights_on_a_device_without_float64_are_summed_on_the_cpu(monkeypatch):
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    read = [("a", weight.as_subclass(_WithoutFloat64))] * 2
    monkeypatch.setattr(erase_weights, "effective_weights", lambda model, keys: iter(read))
    made = erase_weights.weight_energy(None, ["a", "a"])
    assert made.dtype == torch.float64
    torch.testing.assert_close(made, 2 * (weight.T @ weight).double())


def test_an_edit_is_solved_for_the_clip_skip_that_is_set(demo_model):
    model, clip, _ = demo_model
    skipped = clip.clone()
    skipped.clip_layer(-2)
    edit = solve_erasure(model, skipped, erase("cat", "dog"), Preserved(("a fox",), 1.0))
    assert edit.spec["clip_skip"] == -2
    assert edit.report["concepts"][0]["left"] < 0.05
    assert "CLIP skip: -2" in report_text(edit.report, edit.spec)
    with pytest.raises(ValueError, match=r"set the same CLIP skip \(-2\)"):
        erase_apply.apply_to_clip(clip, edit)
    assert erase_apply.apply_to_clip(skipped, edit) is skipped


def test_an_edit_is_solved_on_weights_in_fp8(new_model):
    """They are read in float32, so that only their own rounding is in the edit."""
    model, encode = new_model("EPS", torch.float8_e4m3fn), RandomEncoder(32)
    before = {key: value.clone() for key, value in model.model_state_dict().items()}
    edit = solve_erasure(model, NO_CLIP, erase("cat", "dog"), Preserved(("a fox",), 1.0), SolveRequest(), encode)
    assert edit.report["concepts"][0]["left"] < 0.05
    assert edit.text.up.dtype == torch.float32
    assert edit.text.matrix().isfinite().all()
    after = model.model_state_dict()
    assert all(torch.equal(after[key].view(torch.uint8), value.view(torch.uint8)) for key, value in before.items())
    assert not erase_apply.apply_edit(model, edit).patches  # fp8 takes it with the text


def test_a_cancel_while_solving_ends_it_and_the_next_solve_works(new_model, monkeypatch):
    model, encode, read = new_model(), RandomEncoder(32), []

    def cancelled_after_three(model, keys):
        for key, weight in as_ever(model, keys):
            read.append(key)
            if len(read) == 3:
                comfy.model_management.interrupt_current_processing()
            yield key, weight

    as_ever = erase_weights.effective_weights
    monkeypatch.setattr(erase_weights, "effective_weights", cancelled_after_three)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        solve_erasure(model, NO_CLIP, erase("cat", "dog"), None, SolveRequest(), encode)
    assert len(read) == 3
    edit = solve_erasure(model, NO_CLIP, erase("cat", "dog"), None, SolveRequest(), encode)
    assert edit.report["concepts"][0]["left"] < 0.05
    assert not model.patches


def _hooked(clip, schedule):
    """The CLIP after Set CLIP Hooks, with hooks that set in half-way."""
    hooks, frames = comfy.hooks.create_hook_lora({}, 1.0, 1.0), comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength, start))
    hooks.set_keyframes_on_hooks(frames)
    return SetClipHooks().apply_hooks(clip, schedule, True, hooks)[0]


def test_a_clip_with_a_schedule_is_refused_and_one_whose_hooks_stay_is_not(demo_model):
    """With a schedule a prompt has several encodings, and an edit was made for whichever was left from the last run."""
    model, clip, _ = demo_model
    edit = solve_erasure(model, _hooked(clip, schedule=False), erase("cat", "dog"), None)
    scheduled = _hooked(clip, schedule=True)
    refused = [
        lambda: solve_erasure(model, scheduled, erase("cat", "dog"), None),
        lambda: erase_probe.probe(model, scheduled, edit),
        lambda: check_trainable(model, scheduled),
    ]
    for ask in refused:
        with pytest.raises(
            ValueError, match=r"The CLIP has a schedule \(Set CLIP Hooks\).*connect the checkpoint's CLIP"
        ):
            ask()
