"""Prompts as the token rows an erasure is solved on: encoded by the host's CLIP, with the subject's place in them."""

from __future__ import annotations

from typing import Any

import torch

from ...methods.erase.rows import PromptTokens

SECTION = 77  # token rows of one CLIP call


def encode_prompt(clip: Any, text: str, subject: str = "") -> PromptTokens:
    """One sentence as token rows, with the place of its subject (the last occurrence) and of its first end token.

    Weights in brackets are not read: brackets are part of the words here. Without a subject, ``start`` and ``end`` are the
    place of the end token, where a missing subject is looked for.

    Raises:
        ValueError: the sentence does not hold the subject, or is longer than one call of the text encoder.
    """
    sections = _sections(clip, text)
    if len(sections) > 1:
        raise ValueError(
            f"'{text}' has more tokens than one call of the text encoder takes ({SECTION - 2}), so that its tokens have no "
            "counterparts in its anchor's; shorten the concept or its template, or the anchor."
        )
    (part,) = encode_parts(clip, text)
    start, end = _place(clip, sections[0], subject, text, part.stop)
    return part._replace(start=start, end=end)


def encode_parts(clip: Any, text: str) -> list[PromptTokens]:
    """A prompt of any length as the text encoder sees it: one PromptTokens a call, each with its own start and end token.

    ``start`` and ``end`` are the place of the end token, and ``pooled`` is of the first part, as the host hands it on.

    Raises:
        ValueError: the text encoder is none of the CLIP kind.
    """
    _check_kind(clip)
    sections = _sections(clip, text)
    rows, pooled = clip.encode_from_tokens(clip.tokenize(text, disable_weights=True), return_pooled=True)
    pooled = None if pooled is None else pooled[0].float().cpu()
    parts, first = [], 0
    for section in sections:
        stop, tokens = _stop(clip, section), rows[0, first : first + len(section)]
        parts.append(PromptTokens(tokens.float().cpu(), stop, stop, stop, pooled))
        first += len(section)
    return parts


def _check_kind(clip: Any) -> None:
    """Refuses encoders whose prompts begin with a word: row 0 would be left out, and an empty prompt has no end token at 1."""
    if _sections(clip, "")[0][0] != _sections(clip, "a")[0][0]:
        raise ValueError(
            "This text encoder has no start token (T5 and language models have none), and closed-form erasure knows where words "
            "stand in a CLIP only; use a model of the SD 1, SD 2 or SDXL families with its own CLIP."
        )


def _sections(clip: Any, text: str) -> list[list[Any]]:
    """Token ids (or embeddings) of a text as they are encoded: the first encoder's, for all of them share positions."""
    tokens = clip.tokenize(text, disable_weights=True)
    return [[token for token, *_ in section] for section in tokens[next(iter(tokens))]]


def _stop(clip: Any, section: list[Any]) -> int:
    """The position of the first end token: what an empty prompt goes on with after its start token."""
    end = _sections(clip, "")[0][1]
    return next(i for i, token in enumerate(section) if i > 0 and isinstance(token, int) and token == end)


def _place(clip: Any, section: list[Any], subject: str, text: str, stop: int) -> tuple[int, int]:
    """Where the subject's tokens stand, end exclusive."""
    if not subject.strip():
        return stop, stop
    alone = _sections(clip, subject)[0]
    wanted = alone[1 : _stop(clip, alone)]
    for at in range(stop - len(wanted), 0, -1):
        if wanted and all(_same(a, b) for a, b in zip(section[at : at + len(wanted)], wanted, strict=True)):
            return at, at + len(wanted)
    raise ValueError(
        f"'{subject}' has no tokens of its own in '{text}'; write the concept as it stands in prompts, with a blank around it."
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two tokens are one: ids, or vectors of a textual inversion."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and not isinstance(a, torch.Tensor) and a == b
