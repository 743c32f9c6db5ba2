"""What boards and benches compare with: a LoRA by the host's own hooks, inside a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.hooks
import torch


def hooked_in(lora: Mapping[str, torch.Tensor], mask: torch.Tensor) -> dict[str, Any]:
    """The values of a conditioning whose model calls have this LoRA, and count inside a mask (height, width)."""
    hook = comfy.hooks.create_hook_lora(dict(lora), 1.0, 0.0)
    return {"mask": mask[None], "hooks": hook, "mask_strength": 1.0, "set_area_to_bounds": False}
