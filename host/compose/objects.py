"""The objects of a prompt (T2I-Zero): which of its rows they are, and their correction."""

from __future__ import annotations

import node_helpers

from ...methods.compose.similarity import ObjectPositions, check_objects, correct
from .. import keys
from ..text.tokens import content_ranges, encoders_of, first_occurrence
from ..types import CLIP, Conditioning


def encode_with_objects(clip: CLIP, text: str, phrases: list[str]) -> Conditioning:
    """The prompt as CONDITIONING with the positions of its objects (``keys.OBJECT_POSITIONS``).

    An object has rows of every text encoder that the prompt has rows of, as of CLIP and of T5 in SD3.

    Raises:
        ValueError: the prompt lacks one of the phrases, none is given, two share a word, or its rows are of no words.
    """
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    encoders = encoders_of(clip, text, conditioning[0][0].shape[1])
    if not encoders:
        raise ValueError(
            "The rows that this text encoder makes are not those of its tokens, so no object can be found in them; use "
            "CLIP Text Encode, without T2I-Zero."
        )
    objects = tuple(
        tuple(position + moved for encoder, moved in encoders for position in first_occurrence(encoder, text, phrase))
        for phrase in phrases
    )
    check_objects(objects)
    sections = tuple(
        (first + moved, end + moved) for encoder, moved in encoders for first, end in content_ranges(encoder, text)
    )
    return node_helpers.conditioning_set_values(
        conditioning, {keys.OBJECT_POSITIONS: ObjectPositions(objects, sections)}
    )


def correct_objects(conditioning: Conditioning, strength: float, window: int, threshold: float) -> Conditioning:
    """The prompt with its objects corrected by similarities.

    Raises:
        ValueError: the prompt does not say which of its words are objects.
    """
    if not all(keys.OBJECT_POSITIONS in values for _, values in conditioning):
        raise ValueError(
            "This prompt does not say which of its words are objects; encode it with Encode Objects instead of CLIP "
            "Text Encode."
        )
    return [
        [correct(context, values[keys.OBJECT_POSITIONS], strength, window, threshold), values.copy()]
        for context, values in conditioning
    ]
