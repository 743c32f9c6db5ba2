"""The rows of an encoded prompt that are of a phrase, with the host's own tokenizers and its own cut of their rows.

What the text encoders make is replaced by the numbers of their tokens, so a row says which token it is of.
"""

from __future__ import annotations

import functools
import importlib.util
from types import SimpleNamespace

import comfy.sd1_clip
import comfy.text_encoders.flux
import comfy.text_encoders.qwen_image
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.z_image
import pytest
import torch
from comfyui_concepts.host.compose.objects import encode_with_objects
from comfyui_concepts.host.text.tokens import encode_parts, encode_with_phrase, phrase_rows
from comfyui_concepts.methods.token_rows import blocks_of_rows, words_range

TEXT = "a photo of a tall giraffe beside the image of a house"


def _numbers(pairs, width=1):
    """Each token's number as its row, (1, tokens, width)."""
    rows = torch.tensor([[float(token) for section in pairs for token, *_ in section]])[..., None]
    return torch.nn.functional.pad(rows, (0, width - 1))


class _Numbers:
    """A text encoder that makes the numbers of its tokens."""

    def __init__(self, width=1):
        self.width = width

    def encode_token_weights(self, pairs):
        return _numbers(pairs, self.width), None


def _of_one(module, name, key, model):
    """A CLIP of one encoder; its model's own code cuts the rows."""

    def rows(tokens, monkeypatch):
        def encoded(self, pairs):
            made = _numbers(pairs[key])
            # Krea 2's encoder has an axis of layers
            made = made[:, None] if module.__name__.endswith("krea2") else made
            return made, None, {"attention_mask": torch.ones(made.shape[0], made.shape[-2])}

        monkeypatch.setattr(comfy.sd1_clip.SD1ClipModel, "encode_token_weights", encoded)
        kind = getattr(module, model)
        return kind.encode_token_weights(kind.__new__(kind), tokens)[0]

    return getattr(module, name)(), rows


def _flux():
    whole = SimpleNamespace(t5xxl=_Numbers(), clip_l=_Numbers())
    module = comfy.text_encoders.flux
    return module.FluxTokenizer(), lambda tokens, _: module.FluxClipModel.encode_token_weights(whole, tokens)[0]


def _sd3():
    whole = SimpleNamespace(t5xxl=_Numbers(4096), clip_l=_Numbers(), clip_g=_Numbers(), t5_attention_mask=False)
    module = comfy.text_encoders.sd3_clip
    # two pooled embeddings are joined there, which nothing here reads
    for part in (whole.clip_l, whole.clip_g):
        part.encode_token_weights = lambda pairs: (_numbers(pairs), torch.zeros(1, 1))
    whole.t5xxl.encode_token_weights = lambda pairs: (_numbers(pairs, 4096), None, {})
    return module.SD3Tokenizer(), lambda tokens, _: module.SD3ClipModel.encode_token_weights(whole, tokens)[0]


def _krea2():
    import comfy.text_encoders.krea2 as module

    return _of_one(module, "Krea2Tokenizer", "qwen3vl_4b", "Krea2TEModel")


CLIPS = {
    "flux": _flux,
    "sd3": _sd3,
    "qwen": lambda: _of_one(comfy.text_encoders.qwen_image, "QwenImageTokenizer", "qwen25_7b", "QwenImageTEModel"),
    "zimage": lambda: _of_one(comfy.text_encoders.z_image, "ZImageTokenizer", "qwen3_4b", "ZImageTEModel"),
}
if importlib.util.find_spec("comfy.text_encoders.krea2"):
    CLIPS["krea2"] = _krea2
SPACES = str.maketrans({"Ġ": None, "▁": None})
WORDS = {"flux": "t5xxl", "sd3": "clip_l", "qwen": "qwen25_7b", "zimage": "qwen3_4b", "krea2": "qwen3vl_4b"}


@functools.cache
def _made(name):
    return CLIPS[name]()


@pytest.fixture(params=CLIPS)
def clip(request, monkeypatch):
    """A CLIP whose rows are the numbers of its tokens, and what spells the rows of the phrase."""
    tokenizer, rows = _made(request.param)
    own = WORDS[request.param]
    spells = getattr(tokenizer, own, getattr(tokenizer, f"clip_{own}", tokenizer))

    def encode(tokens):
        return [[rows(tokens, monkeypatch), {}]]

    def tokenize(text, **options):
        return tokenizer.tokenize_with_weights(text, **options)

    def spelled(made, positions, spells=spells):
        pieces = [piece for _, piece in spells.untokenize([(int(made[0, p, 0]), 1.0) for p in positions])]
        return "".join(pieces).replace("</w>", "").translate(SPACES)

    other = functools.partial(spelled, spells=tokenizer.t5xxl) if request.param == "sd3" else None

    return SimpleNamespace(
        tokenize=tokenize, tokenizer=tokenizer, encode_from_tokens_scheduled=encode, spelled=spelled, other=other,
        encode_from_tokens=lambda tokens, **_: (rows(tokens, monkeypatch), None),
    )  # fmt: skip


@pytest.mark.parametrize("phrase", ["tall giraffe", "image", "house"])
def test_the_rows_of_a_phrase_are_of_its_tokens(clip, phrase):
    """``image`` is a word of Qwen-Image's template too."""
    (entry,) = encode_with_phrase(clip, TEXT, phrase)
    positions = entry[1]["concepts_phrase"]
    assert clip.spelled(entry[0], positions) == phrase.replace(" ", "")


def test_without_a_phrase_all_words_of_the_prompt_are_taken_and_none_of_the_template(clip):
    (entry,) = encode_with_phrase(clip, TEXT, "")
    assert clip.spelled(entry[0], entry[1]["concepts_phrase"]) == TEXT.replace(" ", "")


def test_a_phrase_that_is_in_the_template_alone_is_not_in_the_prompt(clip):
    with pytest.raises(ValueError, match="'user' is not in the prompt"):
        encode_with_phrase(clip, TEXT, "user")


def test_only_a_clip_s_rows_are_those_of_an_erasure(clip):
    """The first encoder of Flux and SD3 is a CLIP, and their rows are not its own."""
    with pytest.raises(ValueError, match=r"no start token .*SD 1, SD 2 or SDXL"):
        encode_parts(clip, TEXT)


def test_an_object_is_the_rows_of_its_words_in_every_encoder(clip):
    """SD3's prompts have rows of a CLIP, then of T5."""
    (entry,) = encode_with_objects(clip, TEXT, ["tall giraffe", "image"])
    found = entry[1]["concepts_objects"]
    own = [phrase_rows(clip, TEXT, words, entry) for words in ("tall giraffe", "image")]
    first = [objects[: len(rows)] for objects, rows in zip(found.objects, own, strict=True)]
    assert first == own
    behind = [objects[len(rows) :] for objects, rows in zip(found.objects, own, strict=True)]
    if clip.other is None:
        assert behind == [(), ()]
    else:
        assert [clip.other(entry[0], rows) for rows in behind] == ["tallgiraffe", "image"]
    assert len(found.sections) == (1 if clip.other is None else 2)
    for rows in found.objects:
        assert all(any(start <= row < end for start, end in found.sections) for row in rows)


def test_where_nobody_knows_whose_rows_they_are_there_are_none_and_a_missing_phrase_is_still_refused(demo_model):
    short, long = ([torch.zeros(1, rows, 1), {}] for rows in (77, 100))
    assert phrase_rows(demo_model[1], "a cat", "cat", short) == (2,)
    assert phrase_rows(demo_model[1], "a cat", "cat", long) == ()
    with pytest.raises(ValueError, match="is not in the prompt"):
        phrase_rows(demo_model[1], "a cat", "dog", long)


@pytest.mark.skipif(not importlib.util.find_spec("comfy.text_encoders.anima"), reason="this host has no Anima")
def test_the_rows_that_anima_s_network_reads_are_those_of_t5_s_tokens():
    """Its adapter makes a row of each, whatever the tokens of the text encoder are."""
    import comfy.text_encoders.anima as module

    tokenizer = module.AnimaTokenizer()

    def encode(tokens):
        ids = torch.tensor([token for token, *_ in tokens["t5xxl"][0]])
        return [[torch.zeros(1, len(tokens["qwen3_06b"][0]), 1), {"t5xxl_ids": ids}]]

    clip = SimpleNamespace(
        tokenize=tokenizer.tokenize_with_weights, tokenizer=tokenizer, encode_from_tokens_scheduled=encode
    )
    (entry,) = encode_with_phrase(clip, TEXT, "tall giraffe")
    ids = [(int(entry[1]["t5xxl_ids"][p]), 1.0) for p in entry[1]["concepts_phrase"]]
    assert "".join(piece for _, piece in tokenizer.t5xxl.untokenize(ids)).translate(SPACES) == "tallgiraffe"


@pytest.mark.parametrize("clip", ["qwen"], indirect=True)
def test_objects_are_refused_where_nobody_knows_whose_rows_they_are(clip):
    whole = clip.encode_from_tokens_scheduled
    clip.encode_from_tokens_scheduled = lambda tokens: [[whole(tokens)[0][0].repeat(1, 3, 1), {}]]
    with pytest.raises(ValueError, match="no object can be found in them"):
        encode_with_objects(clip, TEXT, ["giraffe", "house"])


@pytest.mark.parametrize(
    ("lengths", "rows", "found"),
    [
        ({"l": 77}, 77, [("l", 0)]),
        ({"g": 154, "l": 154}, 154, [("g", 0)]),
        ({"l": 77, "t5xxl": 256}, 256, [("t5xxl", 0)]),
        ({"l": 77, "g": 77, "t5xxl": 256}, 333, [("l", 0), ("t5xxl", 77)]),
        ({"l": 77, "g": 77, "t5xxl": 77}, 154, [("l", 0), ("t5xxl", 77)]),
        ({"qwen": 60}, 26, [("qwen", -34)]),
        ({"qwen": 60}, 61, []),
        ({"l": 77, "t5xxl": 256}, 100, []),
    ],
)
def test_whose_tokens_the_rows_are_follows_from_their_numbers(lengths, rows, found):
    assert blocks_of_rows(lengths, rows) == found


def test_the_words_of_a_section_are_what_the_empty_prompt_does_not_have():
    assert words_range([9, 1, 2, 3, 5, 8], [9, 1, 5, 8]) == (2, 4)
    assert words_range([9, 1, 5, 8], [9, 1, 5, 8]) == (1, 1)
    assert words_range([9, 4, 5, 7, 7], [9, 7, 7, 7, 7]) == (1, 3)
    assert words_range([4, 5, 1, 0], [1, 0, 0, 0]) == (0, 2)
    assert words_range([2, 6], [2]) == (1, 2)
