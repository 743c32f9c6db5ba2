"""Phrases are found by their letters: across sections, beside any punctuation, in every kind of tokenizer."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.text_encoders.qwen_image
import comfy.text_encoders.sd3_clip
import pytest
from comfyui_concepts.host.text.tokens import encode_prompt, phrase_occurrences, phrase_positions
from comfyui_concepts.host.text.weights import without_weights
from comfyui_concepts.methods.token_rows import every_copy


@pytest.fixture(scope="module")
def clip(demo_model):
    return demo_model[1]


def _spelled(clip, text, positions):
    """What the tokens at these positions say, without the marks of the vocabulary."""
    sections = next(iter(clip.tokenize(text).values()))
    tokens = [pair for section in sections for pair in section]
    pieces = [piece for _, piece in clip.tokenizer.untokenize([tokens[p] for p in positions])]
    return "".join(pieces).replace("</w>", " ").replace("Ġ", " ").replace("▁", " ").strip()


@pytest.mark.parametrize("before", range(71, 79))
def test_a_phrase_is_found_wherever_a_section_ends(clip, before):
    """After 74 words the 75th token is its first word, and the second stands in the next section."""
    text = "grass " * before + "red lion in the sun"
    positions = phrase_positions(clip, text, "red lion")
    assert _spelled(clip, text, positions) == "red lion"
    assert len(phrase_positions(clip, text, "")) == before + 5


def test_a_word_that_a_section_ends_in_is_one_word(clip):
    name = "Zzyzxqwv"
    (positions,) = phrase_occurrences(clip, "grass " * 73 + name, name)
    assert positions[-1] - positions[0] >= len(positions) + 1  # between its tokens stand an end and a start
    assert _spelled(clip, "grass " * 73 + name, positions).replace(" ", "") == name.lower()


@pytest.mark.parametrize(
    ("text", "phrase", "spelled"),
    [
        ("a lion, asleep", "lion", "lion"),
        ("a lion... asleep", "lion", "lion"),
        ('the "lion"', "lion", "lion"),
        ("the lion's cub", "lion", "lion"),
        ("(a (red lion:1.2):1.1) asleep", "red lion", "red lion"),
        ("red-lion", "red lion", "red - lion"),
        (r"saber \(fate\), smiling", r"saber \(fate\)", "saber ( fate ),"),
        (r"saber \(fate\), smiling", "saber (fate)", "saber ( fate"),
        ("saber (fate), smiling", r"saber \(fate\)", "saber fate"),
        ("Mr., a man", "Mr.", "mr .,"),
        ("C.C., a girl", "C.C.", "c . c .,"),
        ("Wow!, a sign", "wow!", "wow !,"),
        ("a book of c# and c++.", "c++", "c ++."),
        ("a cat 🐱 and a dog 🐶, asleep", "dog 🐶", "dog ðŁĲ¶"),
        ("Dalí, painted", "Dalí", "dalÃŃ"),
        ("sd15, sd16", "sd16", "sd 1 6"),
    ],
)
def test_a_phrase_is_found_beside_any_punctuation(clip, text, phrase, spelled):
    assert _spelled(clip, text, phrase_positions(clip, text, phrase)).split() == spelled.split()


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("a catfish", "cat"),
        ("a dandelion", "lion"),
        ("a red lion", "redlion"),
        ("nightmare", "night mare"),
        ("a", "🐶"),
    ],
)
def test_a_part_of_a_word_is_not_the_word(clip, text, phrase):
    with pytest.raises(ValueError, match="is not in the prompt"):
        phrase_positions(clip, text, phrase)


def test_an_erasure_finds_its_concept_by_letters_too(clip):
    for text, phrase in (("a photo of C.C., smiling", "C.C."), ("a cat's tail", "cat")):
        found = encode_prompt(clip, text, phrase)
        assert _spelled(clip, text, range(found.start, found.end)).replace(" ", "").startswith(phrase.lower())


def _alone(name, tokenizer):
    def tokenize(text, **options):
        return {name: tokenizer.tokenize_with_weights(text, **options)}

    return SimpleNamespace(tokenize=tokenize, tokenizer=tokenizer)


def test_pieces_of_sentencepiece_and_of_byte_pairs_are_read_as_letters():
    """T5, and Qwen without its template; Chinese is written without spaces."""
    t5 = _alone("t5xxl", comfy.text_encoders.sd3_clip.T5XXLTokenizer())
    qwen = _alone("qwen", comfy.text_encoders.qwen_image.Qwen25_7BVLITokenizer())
    for encoder in (t5, qwen):
        for text, phrase in (("The Red lion, asleep", "red lion"), ("an éclair.", "Éclair"), ("C.C., a girl", "c.c.")):
            spelled = _spelled(encoder, text, phrase_positions(encoder, text, phrase))
            assert len(spelled) <= len(phrase) + 2, (text, spelled)
    text = "红色的狮子在睡觉"
    assert 0 < len(phrase_positions(qwen, text, "狮子")) < len(phrase_positions(qwen, text, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a pig", "a pig"),
        ("(a pig:1.3)", "a pig"),
        ("((a pig))", "a pig"),
        ("a (pig:1.2), (pink)", "a pig, pink"),
        (r"saber \(fate\)", "saber (fate)"),
        ("", ""),
    ],
)
def test_weights_and_escapes_are_no_words(text, words):
    assert without_weights(text) == words


def test_alternatives_are_refused_where_nothing_chooses_from_them():
    for text in ("a {cat|dog}", "{|old} cat"):
        with pytest.raises(ValueError, match=r"has alternatives, '\{.*write each in an entry of its own"):
            without_weights(text)
    assert without_weights("a {} and {a}") == "a {} and {a}"  # braces of templates


def test_positions_stand_in_every_copy_of_a_prompt():
    assert every_copy((1, 2), 77, 77) == (1, 2)
    assert every_copy((1, 2), 77, 231) == (1, 2, 78, 79, 155, 156)
    assert every_copy((1, 2), 77, 77 + 16) == (1, 2)  # another pack's tokens follow
    assert every_copy((1, 2), 0, 154) == (1, 2)  # not known
