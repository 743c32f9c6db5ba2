"""Low-rank branches on the layers of a model, each for some rows of the batch or some tokens.

``y[rows] += strength · scale · up(down(x[rows]))``, added by forward hooks to the layer's output, or to a span of it.
Weights are never touched, so off-loaded, cast and quantised layers work as they are, several concepts share one batched
call, and gradients flow.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from ...methods.lora import LayerLoras, LoraFactors, layer_shape
from ...methods.lora_tokens import Place, TokenWeights, unknown_grid
from ..architecture import NOWHERE, Architecture, Layout, Size
from ..types import Convolution, HookInputs, Norm, WeightedLayer


@dataclass(frozen=True, eq=False)
class TokensByKind:
    """Weights of a transformer's tokens: those of a region in the picture, and those of the concept's own words.

    Tokens that fill up a sequence get the mean of what they fill up: a concept everywhere is its whole LoRA.
    References get none.

    Args:
        size: of the latent in cells.
        image: (tokens,) or (rows, tokens) in 0..1, row by row of the picture.
        text: (tokens,) of the conditioning: 1 for the concept's own words, 0 for those of others.
        references: the sizes of further pictures behind the image.
        frames: how many frames the picture has, all with these weights.
        everywhere: whether layers without tokens (time, pooled text) get the LoRA too. They act on the whole picture.
    """

    architecture: Architecture
    size: Size
    image: torch.Tensor
    text: torch.Tensor
    references: Sequence[Size] = ()
    frames: int = 1
    everywhere: bool = False

    def acts_on(self, layer: str) -> bool:
        """Whether any token of this layer may get any of it."""
        return self.everywhere or self.architecture.kind(layer) != "global"

    def at(self, layer: str, shape: Sequence[int], rows: slice) -> Place:
        """Where it acts in this layer, as ``TokenWeights`` says.

        Raises:
            ValueError: the layer has another number of tokens than the architecture says.
        """
        kind = self.architecture.kind(layer)
        if kind == "global":
            return Place(rows)
        if kind == "rows":
            return self._text_in_rows(shape, rows)
        layout = self.architecture.layout(layer, len(self.text), self.size, self.references)
        weights = self._weights(layout)
        if kind == "image":
            weights = torch.cat([weights] * self.frames, -1)
        if math.prod(shape[1:]) != weights.shape[-1]:
            raise unknown_grid(math.prod(shape[1:]), [weights.shape[-1]])
        return Place(rows, weights.unflatten(-1, tuple(shape[1:])))

    def _weights(self, layout: Layout) -> torch.Tensor:
        """The weights of a sequence's tokens, (tokens,) or (rows, tokens)."""
        rows = self.image.shape[:-1] if layout.image != NOWHERE else ()
        weights = self.image.new_zeros(*rows, layout.length)
        words = layout.length if layout.image == NOWHERE else layout.image.start
        if words:
            weights[..., :words] = self.text.mean()
            weights[..., layout.text] = self.text
        if layout.image != NOWHERE:
            weights[..., words:] = self.image.mean(-1, keepdim=True)
            weights[..., layout.image] = self.image
        weights[..., layout.references] = 0
        return weights

    def _text_in_rows(self, shape: Sequence[int], rows: slice) -> Place:
        """In a layer with (rows · text, layers), or (rows, text, channels), of a text from several layers."""
        count = len(self.text)
        if len(shape) > 2:
            return Place(rows, self.text[:, None])
        first, last, _ = rows.indices(shape[0] // count)
        return Place(slice(first * count, last * count), self.text.repeat(last - first)[:, None])


@dataclass(frozen=True, eq=False)
class WholeRows:
    """All tokens of some rows of a call, also in layers whose first axis is longer than the call's.

    Args:
        kind: of a layer, as its architecture says.
        count: rows of the call.
    """

    kind: Callable[[str], str]
    count: int

    def acts_on(self, layer: str) -> bool:
        return True

    def at(self, layer: str, shape: Sequence[int], rows: slice) -> Place:
        times, (first, last, _) = shape[0] // self.count, rows.indices(self.count)
        if times == 1 or self.kind(layer) == "rows":  # each row's tokens follow each other
            return Place(slice(first * times, last * times))
        weights = torch.zeros(times, self.count)  # the rows come several times, as at the time of references
        weights[:, first:last] = 1
        return Place(slice(None), weights.reshape(-1, *[1] * (len(shape) - 1)))


@dataclass(frozen=True, eq=False)
class Branch:
    """The low-rank part of one concept, and where it acts.

    Args:
        factors: by layer name, as ``prepared`` returns them.
        strength: the multiplier of the change.
        rows: of the model call.
        tokens: the weight of each token; None acts on all tokens of all layers.
    """

    factors: LayerLoras
    strength: float = 1.0
    rows: slice = field(default_factory=lambda: slice(None))
    tokens: TokenWeights | None = None

    def layers(self) -> Iterator[str]:
        """The layers it changes."""
        for layer in self.factors:
            if self.strength != 0 and (self.tokens is None or self.tokens.acts_on(layer)):
                yield layer

    def place(self, layer: str, shape: Sequence[int]) -> Place:
        """Where it acts in a layer whose output is (rows, tokens, …) without the channels."""
        return Place(self.rows) if self.tokens is None else self.tokens.at(layer, shape, self.rows)


def prepared(factors: LayerLoras, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[LoraFactors, ...]]:
    """The factors on the model's device and in its dtype, as ordinary tensors that a gradient may pass."""
    with torch.inference_mode(False):
        return {layer: tuple(_ordinary(f.to(device, dtype)) for f in own) for layer, own in factors.items()}


def _ordinary(factors: LoraFactors) -> LoraFactors:
    def plain(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone() if tensor.is_inference() else tensor.detach()

    up, bias = (None if t is None else plain(t) for t in (factors.up, factors.bias))
    return factors._replace(down=plain(factors.down), up=up, bias=bias)


@contextlib.contextmanager
def low_rank(network: torch.nn.Module, branches: Sequence[Branch]) -> Iterator[set[str]]:
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
            handle = network.get_submodule(layer).register_forward_hook(_adding_hook(layer, parts, silent))
            stack.callback(handle.remove)
        yield silent


def _adding_hook(layer: str, branches: Sequence[Branch], silent: set[str]) -> Callable[..., torch.Tensor]:
    def hook(module: WeightedLayer, inputs: HookInputs, output: torch.Tensor) -> torch.Tensor:
        silent.discard(layer)
        first = _channels_first(module, output)
        shape = (len(output), *output.shape[2:]) if first else output.shape[:-1]
        for branch in branches:
            place = branch.place(layer, shape)
            x, y = inputs[0][place.rows].to(output.dtype), output[place.rows]
            for factors in branch.factors[layer]:
                _add(module, factors, branch.strength, x, y, _over_channels(place.weights, y, first))
        return output

    return hook


def _channels_first(module: object, output: torch.Tensor) -> bool:
    """Whether a layer's output is (rows, channels, height, width), or with a further axis for time."""
    return output.ndim > 3 and (hasattr(module, "out_channels") or isinstance(module, torch.nn.GroupNorm))


def _over_channels(weights: torch.Tensor | None, y: torch.Tensor, channels_first: bool) -> torch.Tensor | None:
    """The weights of tokens with an axis for the channels of ``y``, and in its dtype."""
    return None if weights is None else weights.to(y).unsqueeze(1 - y.ndim if channels_first else -1)


def _add(
    module: WeightedLayer,
    factors: LoraFactors,
    strength: float,
    x: torch.Tensor,
    y: torch.Tensor,
    weights: torch.Tensor | None,
) -> None:
    """Adds one change to the rows ``y`` of a layer's output, in place: the layer has just made it."""
    if factors.down.numel():
        added = _ADDED[len(layer_shape(module))]
        added(module, factors, strength * factors.scale, x, y, weights)
    if factors.bias is not None:
        bias = factors.bias.to(y.dtype)
        shaped = bias.reshape(-1, *[1] * (y.ndim - 2)) if _channels_first(module, y) else bias
        part = _span(y, factors)
        part.add_(_weighted(shaped.expand_as(part), weights), alpha=strength)


def _add_to_linear(
    module: WeightedLayer,
    factors: LoraFactors,
    scale: float,
    x: torch.Tensor,
    y: torch.Tensor,
    weights: torch.Tensor | None,
) -> None:
    """x (rows, …, in), y (rows, …, out)."""
    hidden = _weighted(functional.linear(x, factors.down), weights)  # (rows, …, rank), or the whole change
    if factors.up is None:
        _span(y, factors).add_(hidden, alpha=scale)
        return
    # a view, never a copy: an addition to a copy would be lost
    _span(y.view(-1, y.shape[-1]), factors).addmm_(hidden.flatten(0, -2), factors.up.T, alpha=scale)


def _span(y: torch.Tensor, factors: LoraFactors) -> torch.Tensor:
    """The part of a layer's output (…, out) that the factors change."""
    return y if factors.span is None else y.narrow(-1, *factors.span)


def _add_to_convolution(
    module: Convolution,
    factors: LoraFactors,
    scale: float,
    x: torch.Tensor,
    y: torch.Tensor,
    weights: torch.Tensor | None,
) -> None:
    """x (rows, in, h, w), y (rows, out, h', w'); or both with an axis for time before height."""
    convolve = functional.conv2d if y.ndim == 4 else functional.conv3d
    hidden = convolve(x, factors.down, None, module.stride, module.padding, module.dilation)
    hidden = _weighted(hidden, weights)
    if factors.up is not None:
        hidden = convolve(hidden, factors.up.reshape(*factors.up.shape, *[1] * (y.ndim - 2)))
    y.add_(hidden, alpha=scale)


def _add_to_norm(
    module: Norm,
    factors: LoraFactors,
    scale: float,
    x: torch.Tensor,
    y: torch.Tensor,
    weights: torch.Tensor | None,
) -> None:
    """x and y (rows, tokens, channels) or (rows, channels, h, w). A norm is linear in its weight, so this is exact."""
    if isinstance(module, torch.nn.GroupNorm):
        change = functional.group_norm(x, module.num_groups, factors.down, None, module.eps)
    elif isinstance(module, torch.nn.LayerNorm):
        change = functional.layer_norm(x, module.normalized_shape, factors.down, None, module.eps)
    else:
        change = functional.rms_norm(x, module.normalized_shape, factors.down, module.eps)
    y.add_(_weighted(change, weights), alpha=scale)


_ADDED: Mapping[int, Callable[..., None]] = {
    1: _add_to_norm,
    2: _add_to_linear,
    4: _add_to_convolution,
    5: _add_to_convolution,
}
"""What adds a branch to a layer's output, by the number of dimensions of the layer's weight."""


def _weighted(hidden: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The branch's activations times the weights of its tokens, which broadcast over them."""
    return hidden if weights is None else hidden * weights
