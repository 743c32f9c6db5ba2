"""Views of brightness."""

from __future__ import annotations

import torch

from .base import Settings, View


def negate(_: Settings) -> View:
    """The photographic negative, for data symmetric about zero."""
    return View("negate", torch.neg, torch.neg, latent="pixels only", signed=True)
