"""Components: each prompt answers for a part of the picture that is seen by itself, near or far, in grey or in motion
("Factorized Diffusion", 2404.11615, section 3.2).

Nothing is turned; the predictions are projected and summed. A family's projections sum to the identity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from .base import Latent, Settings, Transform, View

_REFERENCE_SIDE = 64  # px; the paper's blurs are given for its first stage
FAR, MIDDLE = 2.0, 1.0  # standard deviations of the blurs at that side
KERNEL = 33  # px at that side
MOTION = 7  # px of the smear at that side

HYBRID = ("low_pass", "high_pass")
TRIPLE = ("triple_low", "triple_medium", "triple_high")
COLOUR = ("gray", "color")
SMEAR = ("motion", "motion_residual")
SCALE = ("scale",)


def _odd(size: float) -> int:
    return max(3, int(size) // 2 * 2 + 1)


def _blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of the last two dimensions, ``sigma`` in px at a height of 64, scaled to the height at hand."""
    scale = x.shape[-2] / _REFERENCE_SIDE
    kernel = min(_odd(KERNEL * scale), _odd(min(x.shape[-2:]) - 2))  # reflection needs less than a side
    flat = x.reshape(-1, 1, *x.shape[-2:])  # pictures and video latents alike
    return gaussian_blur(flat, [kernel, kernel], [sigma * scale, sigma * scale]).reshape(x.shape)


def _far(x: torch.Tensor) -> torch.Tensor:
    return _blur(x, FAR)


def _middle(x: torch.Tensor) -> torch.Tensor:
    return _blur(x, MIDDLE)


def _grey(x: torch.Tensor) -> torch.Tensor:
    """The mean of the channels, (channels, height, width) or (batch, channels, …, height, width)."""
    return x.mean(0 if x.ndim == 3 else 1, keepdim=True).expand_as(x)


def _smear(x: torch.Tensor) -> torch.Tensor:
    """Motion blur along the diagonal, zero outside."""
    length = _odd(MOTION * x.shape[-2] / _REFERENCE_SIDE)
    kernel = torch.eye(length, dtype=x.dtype, device=x.device)[None, None] / length
    flat = x.reshape(-1, 1, *x.shape[-2:])
    return F.conv2d(flat, kernel, padding=length // 2).reshape(x.shape)


def _component(
    name: str, family: tuple[str, ...], part: Transform, shown: Transform | None, latent: Latent = "good"
) -> Callable[[Settings], View]:
    def view(_: Settings) -> View:
        return View(name, _same, _same, latent=latent, component=part, family=family, shown=shown or _same)

    return view


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


COMPONENTS: dict[str, Callable[[Settings], View]] = {
    "low_pass": _component("low_pass", HYBRID, _far, _far),
    "high_pass": _component("high_pass", HYBRID, lambda x: x - _far(x), None),
    "triple_low": _component("triple_low", TRIPLE, lambda x: _far(_middle(x)), lambda x: _far(_middle(x))),
    "triple_medium": _component("triple_medium", TRIPLE, lambda x: _middle(x) - _far(_middle(x)), _middle),
    "triple_high": _component("triple_high", TRIPLE, lambda x: x - _middle(x), None),
    "gray": _component("gray", COLOUR, _grey, _grey, "pixels only"),
    "color": _component("color", COLOUR, lambda x: x - _grey(x), None, "pixels only"),
    "motion": _component("motion", SMEAR, _smear, _smear),
    "motion_residual": _component("motion_residual", SMEAR, lambda x: x - _smear(x), None),
    "scale": _component("scale", SCALE, _same, None),
}
"""Name to component. A list may hold several ``scale``; their weights are their shares of the whole."""
