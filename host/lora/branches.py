"""Low-rank branches beside the layers of a model, each for its own rows of the batch or its own image tokens.

``y[rows] += strength · scale · up(down(x[rows]))``, added by forward hooks after the layer has answered: weights are never
touched, so off-loaded, cast and quantised layers work as they are, several concepts share one batched call, and gradients flow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .files import Factors

_WITHOUT_IMAGE_TOKENS = (".attn2.to_k", ".attn2.to_v", "emb_layers", "time_embed", "label_emb")


@dataclass(frozen=True, eq=False)
class Branch:
    """The low-rank part of one concept, and where it acts.

    Args:
        factors: by layer path, of ``prepared``.
        strength: what the concept's change is multiplied by.
        rows: of the model call.
        tokens: number of image tokens of a layer to how much each of them takes part, (tokens,) or (rows, tokens) in 0..1.
            Layers that see no image tokens (keys and values of the text, the time embedding) are then left alone.
    """

    factors: Mapping[str, Factors]
    strength: float = 1.0
    rows: slice = field(default_factory=lambda: slice(None))
    tokens: Mapping[int, torch.Tensor] | None = None

    def layers(self) -> Iterator[str]:
        """The layers it changes."""
        for path in self.factors:
            if self.strength != 0 and (self.tokens is None or has_image_tokens(path)):
                yield path


def has_image_tokens(path: str) -> bool:
    """Whether what goes into the layer is one vector for each place of the picture."""
    return not any(part in f".{path}" for part in _WITHOUT_IMAGE_TOKENS)


def prepared(factors: Mapping[str, Factors], device: torch.device, dtype: torch.dtype) -> dict[str, Factors]:
    """The factors where and as the model computes, as ordinary tensors that a gradient may pass."""
    with torch.inference_mode(False):
        return {
            path: Factors(
                _ordinary(f.down, device, dtype), None if f.up is None else _ordinary(f.up, device, dtype), f.scale
            )
            for path, f in factors.items()
        }


def _ordinary(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    moved = tensor.detach().to(device, dtype)
    return moved.clone() if moved.is_inference() else moved


@contextlib.contextmanager
def low_rank(unet: torch.nn.Module, branches: Sequence[Branch]) -> Iterator[None]:
    """Inside it, the layers answer with the branches added. The hooks go at the end, whatever happened."""
    by_layer: dict[str, list[Branch]] = {}
    for branch in branches:
        for path in branch.layers():
            by_layer.setdefault(path, []).append(branch)
    with contextlib.ExitStack() as stack:
        for path, parts in by_layer.items():
            handle = unet.get_submodule(path).register_forward_hook(_adding(path, parts))
            stack.callback(handle.remove)
        yield


def _adding(path: str, branches: Sequence[Branch]) -> Callable[..., torch.Tensor]:
    def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        for branch in branches:
            add = _add_to_linear if module.weight.ndim == 2 else _add_to_convolution
            add(module, branch, branch.factors[path], inputs[0], output)
        return output

    return hook


def _add_to_linear(module: Any, branch: Branch, factors: Factors, x: torch.Tensor, y: torch.Tensor) -> None:
    """x (rows, …, in), y (rows, …, out): changed in place, as the layer has just made it."""
    part, scale = x[branch.rows].to(y.dtype), branch.strength * factors.scale
    hidden = torch.nn.functional.linear(part, factors.down)  # (rows, …, rank), or the whole change
    hidden = _weighted(hidden, branch, hidden.shape[1], lambda mask: mask[..., None])
    if factors.up is None:
        y[branch.rows].add_(hidden, alpha=scale)
        return
    # a view, never a copy: what is added to a copy is lost
    y[branch.rows].view(-1, y.shape[-1]).addmm_(hidden.flatten(0, -2), factors.up.T, alpha=scale)


def _add_to_convolution(module: Any, branch: Branch, factors: Factors, x: torch.Tensor, y: torch.Tensor) -> None:
    """x (rows, in, h, w), y (rows, out, h', w'): changed in place."""
    part, scale = x[branch.rows].to(y.dtype), branch.strength * factors.scale
    hidden = torch.nn.functional.conv2d(part, factors.down, None, module.stride, module.padding, module.dilation)
    grid = hidden.shape[-2:]
    hidden = _weighted(hidden, branch, grid[0] * grid[1], lambda mask: mask.unflatten(-1, grid)[..., None, :, :])
    if factors.up is not None:
        hidden = torch.nn.functional.conv2d(hidden, factors.up[:, :, None, None])
    y[branch.rows].add_(hidden, alpha=scale)


def _weighted(
    hidden: torch.Tensor, branch: Branch, count: int, shaped: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The branch's activations on its own tokens, and zero on others.

    Raises:
        ValueError: the layer has a number of tokens nobody has told of.
    """
    if branch.tokens is None:
        return hidden
    mask = branch.tokens.get(count)
    if mask is None:
        raise other_tokens(count, branch.tokens)
    return hidden * shaped(mask.to(hidden))


def other_tokens(count: int, known: Iterable[int]) -> ValueError:
    """What is said where a layer works on a number of image tokens that the regions are not known for."""
    return ValueError(
        f"A layer works on {count} image tokens, and the regions are known for {sorted(known)}; another node changes the number "
        "of tokens (token merging, tiling): bypass it."
    )
