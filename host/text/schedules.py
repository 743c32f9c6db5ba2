"""Text encoders whose weights change in the course of a sampling."""

from __future__ import annotations

from ..types import CLIP


def check_one_encoding(clip: CLIP) -> None:
    """Refuses a text encoder whose hooks follow a schedule: a prompt then has an encoding for each part of a sampling.

    Raises:
        ValueError: it does.
    """
    if clip.use_clip_schedule and clip.patcher.forced_hooks is not None:
        raise ValueError(
            "The CLIP has a schedule (Set CLIP Hooks), so it encodes a prompt anew for each part of a sampling, and an "
            "erasure is made for one encoding; connect the checkpoint's CLIP, or switch schedule_clip off."
        )
