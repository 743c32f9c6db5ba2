"""Low-rank branches on the layers of a model, each for some rows of the batch or some image tokens.

``y[rows] += strength · scale · up(down(x[rows]))``, added by forward hooks to the layer's output. Weights are never
touched, so off-loaded, cast and quantised layers work as they are, several concepts share one batched call, and
gradients flow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import conv2d, linear

from ...methods.lora import LoraFactors
from ..types import Convolution, HookInputs, WeightedLayer

_WITHOUT_IMAGE_TOKENS = (".attn2.to_k", ".attn2.to_v", "emb_layers", "time_embed", "label_emb")


@dataclass(frozen=True, eq=False)
class Branch:
    """The low-rank part of one concept, and where it acts.

    Args:
        factors: by layer name, as ``prepared`` returns them.
        strength: the multiplier of the change.
        rows: of the model call.
        tokens: number of image tokens of a layer to the weight of each, (tokens,) or (rows, tokens) in 0..1.
            Layers that see no image tokens (keys and values of the text, the time embedding) are then left alone.
    """

    factors: Mapping[str, LoraFactors]
    strength: float = 1.0
    rows: slice = field(default_factory=lambda: slice(None))
    tokens: Mapping[int, torch.Tensor] | None = None

    def layers(self) -> Iterator[str]:
        """The layers it changes."""
        for layer in self.factors:
            if self.strength != 0 and (self.tokens is None or has_image_tokens(layer)):
                yield layer


def has_image_tokens(layer: str) -> bool:
    """Whether the layer's input is one vector for each image token."""
    return not any(part in f".{layer}" for part in _WITHOUT_IMAGE_TOKENS)


def prepared(factors: Mapping[str, LoraFactors], device: torch.device, dtype: torch.dtype) -> dict[str, LoraFactors]:
    """The factors on the model's device and in its dtype, as ordinary tensors that a gradient may pass."""
    with torch.inference_mode(False):
        return {
            layer: LoraFactors(
                _ordinary(f.down, device, dtype), None if f.up is None else _ordinary(f.up, device, dtype), f.scale
            )
            for layer, f in factors.items()
        }


def _ordinary(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    moved = tensor.detach().to(device, dtype)
    return moved.clone() if moved.is_inference() else moved


@contextlib.contextmanager
def low_rank(unet: torch.nn.Module, branches: Sequence[Branch]) -> Iterator[None]:
    """Inside it, the branches are added to the layers' outputs. The hooks are always removed at the end."""
    by_layer: dict[str, list[Branch]] = {}
    for branch in branches:
        for layer in branch.layers():
            by_layer.setdefault(layer, []).append(branch)
    with contextlib.ExitStack() as stack:
        for layer, parts in by_layer.items():
            handle = unet.get_submodule(layer).register_forward_hook(_adding_hook(layer, parts))
            stack.callback(handle.remove)
        yield


def _adding_hook(layer: str, branches: Sequence[Branch]) -> Callable[..., torch.Tensor]:
    def hook(module: WeightedLayer, inputs: HookInputs, output: torch.Tensor) -> torch.Tensor:
        for branch in branches:
            add: Callable[..., None] = _add_to_linear if module.weight.ndim == 2 else _add_to_convolution
            add(module, branch, branch.factors[layer], inputs[0], output)
        return output

    return hook


def _add_to_linear(
    module: WeightedLayer, branch: Branch, factors: LoraFactors, x: torch.Tensor, y: torch.Tensor
) -> None:
    """x (rows, …, in), y (rows, …, out): changed in place, since the layer has just made it."""
    part, scale = x[branch.rows].to(y.dtype), branch.strength * factors.scale
    hidden = linear(part, factors.down)  # (rows, …, rank), or the whole change
    hidden = _weighted(hidden, branch, hidden.shape[1], lambda mask: mask[..., None])
    if factors.up is None:
        y[branch.rows].add_(hidden, alpha=scale)
        return
    # a view, never a copy: an addition to a copy would be lost
    y[branch.rows].view(-1, y.shape[-1]).addmm_(hidden.flatten(0, -2), factors.up.T, alpha=scale)


def _add_to_convolution(
    module: Convolution, branch: Branch, factors: LoraFactors, x: torch.Tensor, y: torch.Tensor
) -> None:
    """x (rows, in, h, w), y (rows, out, h', w'): changed in place."""
    part, scale = x[branch.rows].to(y.dtype), branch.strength * factors.scale
    hidden = conv2d(part, factors.down, None, module.stride, module.padding, module.dilation)
    grid = hidden.shape[-2:]
    hidden = _weighted(hidden, branch, grid[0] * grid[1], lambda mask: mask.unflatten(-1, grid)[..., None, :, :])
    if factors.up is not None:
        hidden = conv2d(hidden, factors.up[:, :, None, None])
    y[branch.rows].add_(hidden, alpha=scale)


def _weighted(
    hidden: torch.Tensor, branch: Branch, count: int, shaped: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The branch's activations times the weights of its tokens.

    Raises:
        ValueError: the branch has no weights for the layer's number of tokens.
    """
    if branch.tokens is None:
        return hidden
    mask = branch.tokens.get(count)
    if mask is None:
        raise unknown_grid(count, branch.tokens)
    return hidden * shaped(mask.to(hidden))


def unknown_grid(count: int, known: Iterable[int]) -> ValueError:
    """The refusal of a layer with a number of image tokens for which the regions have no masks."""
    return ValueError(
        f"A layer works on {count} image tokens, and the regions are known for {sorted(known)}; another node changes "
        "the number of tokens (token merging, tiling): bypass it."
    )
