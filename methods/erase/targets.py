"""Which weights read the text embedding, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CROSS = r"^diffusion_model\..*\.attn2\.to_([kv])\.weight$"
_PROJECTION = r"(?:^|\.)(?:to_)?([kv])(?:_proj)?\.weight$"


def reaches(key: str, targets: Iterable[str], blocks: str = "") -> bool:
    """Whether an edit of a UNet's text embedding changes this weight: a cross-attention's ``k`` or ``v``, in those
    blocks.

    Args:
        blocks: a regular expression searched in the key; empty means every block.
    """
    found = re.match(_CROSS, key)
    return bool(found and found[1] in targets and re.search(blocks, key))


def targeted_keys(keys: Iterable[str], targets: Iterable[str], blocks: str = "") -> list[str]:
    """The keys of all such weights, in their order."""
    targets = tuple(targets)
    return [key for key in keys if reaches(key, targets, blocks)]


def projection(key: str) -> str | None:
    """``k`` or ``v``, where a weight is a projection of that name; None for any other layer."""
    found = re.search(_PROJECTION, key)
    return found[1] if found else None
