"""What the nodes of erasure share: their menu, how they read lists of text, and how they show a report."""

from __future__ import annotations

import re
from typing import Any

import torch

from ...host.schema import io, ui

CATEGORY = "concepts/erase"
_REMARK = r"(?s)/\*.*?\*/|//[^\n]*"


def listed_texts(text: str) -> tuple[str, ...]:
    """Words or prompts, one per line or separated by semicolons.

    Empty ones are left out, and so are remarks, as the page does in prompts.
    """
    return tuple(
        part.strip() for line in re.sub(_REMARK, "", text).splitlines() for part in line.split(";") if part.strip()
    )


def report_preview(report: str, pictures: torch.Tensor, cls: type[io.ComfyNode]) -> dict[str, Any]:
    """A report and its pictures, as the node itself shows them."""
    return ui.PreviewText(report).as_dict() | ui.PreviewImage(pictures, cls=cls).as_dict()
