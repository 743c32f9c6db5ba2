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
from torch.nn.functional import conv2d, group_norm, layer_norm, linear

from ...methods.lora import LoraFactors
from ..types import Convolution, HookInputs, Norm, WeightedLayer

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
        return {layer: _ordinary(f.to(device, dtype)) for layer, f in factors.items()}


def _ordinary(factors: LoraFactors) -> LoraFactors:
    def plain(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone() if tensor.is_inference() else tensor.detach()

    up, bias = (None if t is None else plain(t) for t in (factors.up, factors.bias))
    return LoraFactors(plain(factors.down), up, factors.scale, bias)


@contextlib.contextmanager
def low_rank(unet: torch.nn.Module, branches: Sequence[Branch]) -> Iterator[set[str]]:
    """Inside it, the branches are added to the layers' outputs. The hooks are always removed at the end.

    Yields the layers with branches that have not run yet.
    """
    by_layer: dict[str, list[Branch]] = {}
    for branch in branches:
        for layer in branch.layers():
            by_layer.setdefault(layer, []).append(branch)
    silent = set(by_layer)
    with contextlib.ExitStack() as stack:
        for layer, parts in by_layer.items():
            handle = unet.get_submodule(layer).register_forward_hook(_adding_hook(layer, parts, silent))
            stack.callback(handle.remove)
        yield silent


def _adding_hook(layer: str, branches: Sequence[Branch], silent: set[str]) -> Callable[..., torch.Tensor]:
    def hook(module: WeightedLayer, inputs: HookInputs, output: torch.Tensor) -> torch.Tensor:
        silent.discard(layer)
        for branch in branches:
            factors = branch.factors[layer]
            if factors.down.numel():
                _ADDED[module.weight.ndim](module, branch, factors, inputs[0], output)
            if factors.bias is not None:
                _add_bias(branch, factors.bias, output)
        return output

    return hook


def _add_to_linear(
    module: WeightedLayer, branch: Branch, factors: LoraFactors, x: torch.Tensor, y: torch.Tensor
) -> None:
    """x (rows, …, in), y (rows, …, out): changed in place, since the layer has just made it."""
    part, scale = x[branch.rows].to(y.dtype), branch.strength * factors.scale
    hidden = _weighted(linear(part, factors.down), branch)  # (rows, …, rank), or the whole change
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
    hidden = _weighted(conv2d(part, factors.down, None, module.stride, module.padding, module.dilation), branch)
    if factors.up is not None:
        hidden = conv2d(hidden, factors.up[:, :, None, None])
    y[branch.rows].add_(hidden, alpha=scale)


def _add_to_norm(module: Norm, branch: Branch, factors: LoraFactors, x: torch.Tensor, y: torch.Tensor) -> None:
    """x and y (rows, tokens, channels) or (rows, channels, h, w). A norm is linear in its weight, so this is exact."""
    part = x[branch.rows].to(y.dtype)
    if isinstance(module, torch.nn.GroupNorm):
        change = group_norm(part, module.num_groups, factors.down, None, module.eps)
    else:
        change = layer_norm(part, module.normalized_shape, factors.down, None, module.eps)
    y[branch.rows].add_(_weighted(change, branch), alpha=branch.strength * factors.scale)


def _add_bias(branch: Branch, bias: torch.Tensor, y: torch.Tensor) -> None:
    """y (rows, …, out) or (rows, out, h, w): changed in place."""
    part = y[branch.rows]
    shaped = bias[:, None, None] if y.ndim == 4 else bias
    part.add_(_weighted(shaped.to(y.dtype).expand_as(part), branch), alpha=branch.strength)


_ADDED: Mapping[int, Callable[..., None]] = {1: _add_to_norm, 2: _add_to_linear, 4: _add_to_convolution}
"""What adds a branch to a layer's output, by the number of dimensions of the layer's weight."""


def _weighted(hidden: torch.Tensor, branch: Branch) -> torch.Tensor:
    """The branch's activations, (rows, tokens, …) or (rows, …, h, w), times the weights of its tokens.

    Raises:
        ValueError: the branch has no weights for the layer's number of tokens.
    """
    if branch.tokens is None:
        return hidden
    grid = hidden.shape[-2:] if hidden.ndim == 4 else None
    count = hidden.shape[1] if grid is None else grid.numel()
    if count not in branch.tokens:
        raise unknown_grid(count, branch.tokens)
    mask = branch.tokens[count].to(hidden)
    return hidden * (mask[..., None] if grid is None else mask.unflatten(-1, grid)[..., None, :, :])


def unknown_grid(count: int, known: Iterable[int]) -> ValueError:
    """The refusal of a layer with a number of image tokens for which the regions have no masks."""
    return ValueError(
        f"A layer works on {count} image tokens, and the regions are known for {sorted(known)}; another node changes "
        "the number of tokens (token merging, tiling): bypass it."
    )
