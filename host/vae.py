"""Facts about a VAE the host has loaded."""

from __future__ import annotations

from typing import Any


def cell_side(vae: Any) -> int:
    """How many pixels a side of one latent cell covers; 1 for models that work on pixels."""
    return int(vae.spacial_compression_encode())
