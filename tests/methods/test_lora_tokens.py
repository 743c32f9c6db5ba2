"""The weight of each token of a LoRA in a region, by the kind of a transformer's layer."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.methods.lora_tokens import Piece, TokensByKind

KINDS = {"img": "image", "txt": "text", "block": "joint", "fusion": "rows", "time": "global"}
SEQUENCES = {
    "image": [Piece("image", 6), Piece("padding", 2), Piece("reference", 3)],
    "text": [Piece("text", 4), Piece("padding", 1)],
    "joint": [
        Piece("text", 4), Piece("padding", 1), Piece("image", 6), Piece("padding", 2), Piece("reference", 3)
    ],
}  # fmt: skip
IMAGE = torch.tensor([1.0, 0, 0, 1, 0, 1])
TEXT = torch.tensor([0.0, 1, 1, 0])
ALL = slice(None)


def tokens(image=IMAGE, text=TEXT, everywhere=False):
    return TokensByKind(KINDS.__getitem__, SEQUENCES, image, text, everywhere)


def test_a_joint_layer_has_words_and_region_and_the_mean_in_what_fills_them_up():
    weights = tokens().at("block", (2, 16), ALL).weights
    assert weights.tolist() == [0, 1, 1, 0, 0.5, 1, 0, 0, 1, 0, 1, 0.5, 0.5, 0, 0, 0]
    assert tokens().at("txt", (2, 5), ALL).weights.tolist() == [0, 1, 1, 0, 0.5]
    assert tokens().at("txt", (2, 4), ALL).weights.tolist() == TEXT.tolist()  # before it is filled up


def test_a_concept_everywhere_is_its_whole_lora_but_for_references_and_nowhere_it_is_none():
    whole = tokens(torch.ones(6), torch.ones(4))
    assert whole.at("block", (1, 16), ALL).weights.tolist() == [1] * 13 + [0] * 3
    none = tokens(torch.zeros(6), torch.zeros(4))
    assert not none.at("block", (1, 16), ALL).weights.any()


def test_rows_may_differ_and_a_layer_may_keep_the_picture_s_form():
    by_row = torch.stack([IMAGE, 1 - IMAGE])
    assert tokens(by_row).at("block", (2, 16), slice(1, 3)).weights[:, 5:11].tolist() == by_row.tolist()
    sequences = {"image": [Piece("image", 6)]}
    place = TokensByKind(KINDS.__getitem__, sequences, IMAGE, TEXT).at("img", (2, 1, 2, 3), ALL)
    assert place.weights.tolist() == [[[1, 0, 0], [1, 0, 1]]]


@pytest.mark.parametrize(("rows", "found"), [(slice(1, 3), slice(4, 12)), (ALL, slice(0, 12))])
def test_text_in_rows_of_its_own_has_the_words_weights(rows, found):
    """Krea 2 folds the text into the batch, to attend over an encoder's layers; its projector does not."""
    folded = tokens().at("fusion", (12, 3), rows)
    assert folded.rows == found
    assert folded.weights.flatten().tolist() == TEXT.tolist() * ((found.stop - found.start) // 4)
    beside = tokens().at("fusion", (3, 4, 16), rows)
    assert beside.rows == rows
    assert beside.weights.flatten().tolist() == TEXT.tolist()


def test_layers_without_tokens_are_left_alone_unless_they_are_wanted():
    assert [layer for layer in KINDS if tokens().acts_on(layer)] == ["img", "txt", "block", "fusion"]
    assert tokens(everywhere=True).acts_on("time")
    assert tokens(everywhere=True).at("time", (3,), slice(1, 2)) == (slice(1, 2), None)


def test_another_number_of_tokens_is_refused_with_the_layer():
    with pytest.raises(ValueError, match="'img' works on 7 tokens instead of 9"):
        tokens().at("img", (2, 7), ALL)
