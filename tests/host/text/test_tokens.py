"""Where the tokens of a prompt stand, in every text encoder that an erasure is solved with (A18)."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.sd
import comfy.sdxl_clip
import comfy.text_encoders.sd2_clip
import comfy.text_encoders.sd3_clip
import pytest
import torch
from comfyui_concepts.host.erase.solve import SolveRequest, solve_erasure
from comfyui_concepts.host.text.tokens import SECTION, PromptEncoder, encode_parts, encode_prompt
from comfyui_concepts.methods.erase.problem import problem_of
from comfyui_concepts.methods.erase.spec import LAST, Erased, Preserved
from safetensors.torch import save_file

PLACES = [
    ("cat", "cat", 1, 2, 2),
    ("Van Gogh", "Van Gogh", 1, 3, 3),
    ("a photo of a cat", "cat", 5, 6, 6),
    ("painting by Van Gogh", "Van Gogh", 3, 5, 5),
    ("cat and cat", "cat", 3, 4, 4),
    ("a (cat:1.3)", "cat", 3, 4, 9),
    ("", "", 1, 1, 1),
]
"""Where the subject stands: (sentence, subject, start, end, first end token). Never at 0, the start token."""

LONG = " ".join(["many"] * 80) + " a cat"
"""75 words in the first call, 7 in the second."""


@pytest.fixture(scope="module")
def sdxl_clip():
    """Both encoders of SDXL as the host builds them, of width 16 each, with random weights."""
    small = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    options = {"dtype": torch.float32, "clip_l_model_config": small, "clip_g_model_config": small}
    target = SimpleNamespace(clip=comfy.sdxl_clip.SDXLClipModel, tokenizer=comfy.sdxl_clip.SDXLTokenizer, params={})
    with torch.inference_mode(False), torch.no_grad():
        clip = comfy.sd.CLIP(target, model_options=options)
        g = torch.Generator().manual_seed(1)
        for parameter in clip.cond_stage_model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
    return clip


def erase(concept, anchor=""):
    return Erased(concept, anchor, ("{}", "a {}"), LAST, 1.0)


@pytest.mark.parametrize(("text", "subject", "start", "end", "stop"), PLACES)
def test_subjects_are_found_at_these_tokens_in_sd1_and_in_sdxl(
    demo_model, sdxl_clip, text, subject, start, end, stop
):  # fmt: skip
    for clip, width in ((demo_model[1], 128), (sdxl_clip, 32)):
        prompt = encode_prompt(clip, text, subject)
        assert (prompt.start, prompt.end, prompt.stop) == (start, end, stop)
        assert prompt.tokens.shape == (SECTION, width)


@pytest.mark.parametrize(("text", "subject", "start", "end", "stop"), PLACES)
def test_they_are_the_same_in_sd2_which_pads_with_another_token(text, subject, start, end, stop):
    tokenizer = comfy.text_encoders.sd2_clip.SD2Tokenizer()
    rows = torch.zeros(1, SECTION, 4), None
    encode, tokenize = lambda *_, **__: rows, tokenizer.tokenize_with_weights
    clip = SimpleNamespace(tokenize=tokenize, tokenizer=tokenizer, encode_from_tokens=encode)
    prompt = encode_prompt(clip, text, subject)
    assert (prompt.start, prompt.end, prompt.stop) == (start, end, stop)


def test_a_row_of_sdxl_is_both_encoders_at_the_same_place(sdxl_clip):
    """Where they pad with other tokens too: after the end token every row is L's padding beside G's."""
    tokens = sdxl_clip.tokenize("a cat", disable_weights=True)
    parts = sdxl_clip.cond_stage_model
    l_rows, g_rows = (getattr(parts, f"clip_{k}").encode_token_weights(tokens[k])[0][0] for k in "lg")
    made = encode_prompt(sdxl_clip, "a cat", "cat").tokens
    torch.testing.assert_close(made, torch.cat([l_rows, g_rows], 1), rtol=1e-5, atol=1e-5)
    assert [tokens[k][0][made_at][0] for k, made_at in (("l", 4), ("g", 4))] == [49407, 0]


def test_an_erasure_is_solved_with_both_encoders_of_sdxl(new_model, sdxl_clip):
    kept = Preserved(("a fox", LONG.replace("cat", "tree")), 1.0)
    edit = solve_erasure(new_model(), sdxl_clip, erase("cat", "dog"), kept, SolveRequest(pooled=True))
    assert edit.width == 32
    assert edit.pooled.width == 16
    assert edit.report["concepts"][0]["left"] < 0.05


def test_a_learned_embedding_is_as_many_tokens_as_it_has_vectors(demo_model, tmp_path):
    clip = demo_model[1].clone()
    save_file(
        {"clip_l": torch.randn(2, 128, generator=torch.Generator().manual_seed(3))}, tmp_path / "thing.safetensors"
    )
    before = clip.tokenizer.clip_l.embedding_directory
    clip.tokenizer.clip_l.embedding_directory = [str(tmp_path)]
    try:
        for text, start in (("embedding:thing", 1), ("a photo of a embedding:thing", 5)):
            prompt = encode_prompt(clip, text, "embedding:thing")
            assert (prompt.start, prompt.end, prompt.stop) == (start, start + 2, start + 2)
    finally:
        clip.tokenizer.clip_l.embedding_directory = before


@pytest.mark.parametrize("which", ["sd1", "sdxl"])
def test_a_long_prompt_is_a_part_a_call_each_with_its_own_start_and_end(demo_model, sdxl_clip, which):
    clip = demo_model[1] if which == "sd1" else sdxl_clip
    first, second = encode_parts(clip, LONG)
    assert (first.start, first.end, first.stop) == (76, 76, 76)
    assert (second.start, second.end, second.stop) == (8, 8, 8)
    whole, pooled = clip.encode_from_tokens(clip.tokenize(LONG), return_pooled=True)
    assert torch.equal(torch.cat([first.tokens, second.tokens]), whole[0])
    assert torch.equal(second.pooled, pooled[0])
    alone = encode_prompt(clip, " ".join(["many"] * 5) + " a cat", "cat")
    torch.testing.assert_close(second.tokens, alone.tokens, rtol=1e-4, atol=1e-4)
    (short,) = encode_parts(clip, "a cat")
    assert (short.start, short.end, short.stop) == (3, 3, 3)


@pytest.mark.parametrize("whole", [True, False])
def test_a_long_prompt_is_preserved_and_weighs_as_much_as_a_short_one(demo_model, whole):
    model, clip, _ = demo_model
    long = LONG.replace("cat", "tree")
    problem = problem_of(PromptEncoder(clip), [erase("cat", "dog")], [Preserved(("a fox", long), 2.0, whole)])
    of = {name: torch.tensor([label == name for label in problem.labels]) for name in ("a fox", long)}
    assert [float(problem.preserved_weights[rows].sum()) for rows in of.values()] == pytest.approx([2.0, 2.0])
    starts = torch.stack([part.tokens[0] for part in encode_parts(clip, long)]).double()
    assert not any(
        bool((problem.preserved[of[long]] == row).all(1).any()) for row in starts
    )  # a start token is in neither part
    assert int(of[long].sum()) == (152 if whole else 4)
    edit = solve_erasure(model, clip, erase("cat", "dog"), Preserved((long,), 1.0, whole))
    assert {entry["prompt"]: entry["moved"] < 0.1 for entry in edit.report["kept"]}[long]


def test_a_long_prompt_whose_part_ends_with_the_concept_is_refused(demo_model):
    """As text the two differ in how the accent is written; to the tokenizer that is nothing."""
    model, clip, _ = demo_model
    concept = Erased("Café", "art", ("many many many many many a {}",), LAST, 1.0)
    with pytest.raises(ValueError, match="the same as a concept that is erased"):
        solve_erasure(model, clip, concept, Preserved((LONG.replace("cat", "cafe\u0301"),), 1.0))


def test_text_encoders_without_a_start_token_are_refused():
    """T5: its first word is at 0, and an empty prompt is an end token there."""
    tokenizer = comfy.text_encoders.sd3_clip.T5XXLTokenizer()
    assert [t for t, *_ in tokenizer.tokenize_with_weights("")[0]][:2] == [1, 0]
    clip = SimpleNamespace(tokenize=lambda text, **more: {"t5xxl": tokenizer.tokenize_with_weights(text, **more)})
    for encode in (encode_prompt, encode_parts):
        with pytest.raises(ValueError, match=r"no start token \(T5.*SD 1, SD 2 or SDXL"):
            encode(clip, "a cat")
