"""What depends on a model's network, behind one interface: which tokens a layer sees, how fused matrices are cut, …

``architecture_of`` in ``host/registry.py`` finds the architecture of a model. ``host/families/`` has a file per family.
Layers are named by their path inside ``diffusion_model``, without ``.weight``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal["image", "text", "joint", "rows", "global"]
"""What the rows of a layer's input are.

- ``image``: image tokens, with references behind them;
- ``text``: text tokens;
- ``joint``: both in one sequence;
- ``rows``: text tokens that are not the axis before the last: the first axis is the batch times any number;
- ``global``: neither, such as one vector for the whole picture. A token axis there means nothing.
"""

Size: TypeAlias = tuple[int, int]
"""Height and width in cells of the latent."""

NOWHERE = slice(0, 0)


class Part(NamedTuple):
    """A layer, or some of its outputs: the spans of that name, which lie next to each other."""

    layer: str
    spans: tuple[str, ...] = ()


class Layout(NamedTuple):
    """Where the tokens are in the input of a layer, of ``length`` tokens. What is in no slice is padding."""

    length: int
    text: slice = NOWHERE
    image: slice = NOWHERE
    references: slice = NOWHERE
    """Tokens of further pictures, which the model looks at while it draws (Kontext, Qwen Edit)."""

    def after(self, other: Layout) -> Layout:
        """Both in one sequence, ``other`` first."""

        def moved(own: slice, theirs: slice) -> slice:
            return slice(own.start + other.length, own.stop + other.length) if own != NOWHERE else theirs

        slices = (moved(own, theirs) for own, theirs in zip(self[1:], other[1:], strict=True))
        return Layout(self.length + other.length, *slices)


def text_layout(text: int, length: int | None = None) -> Layout:
    """That many text tokens, with padding behind them up to ``length``."""
    return Layout(text if length is None else length, text=slice(0, text))


def image_layout(image: int, references: int = 0, length: int | None = None) -> Layout:
    """That many image tokens, then those of references, with padding behind them up to ``length``."""
    end = image + references
    return Layout(length or end, NOWHERE, slice(0, image), slice(image, end) if references else NOWHERE)


class Architecture(ABC):
    """The facts of one network. A family is a subclass; a new one is a file in ``host/families/``."""

    title: ClassVar[str]
    """What the family's models are called, in refusals."""
    classes: ClassVar[tuple[str, ...]]
    """The host's names of its networks' classes."""
    kinds: ClassVar[tuple[tuple[Kind, str], ...]]
    """Patterns of layer paths, the first that is found decides."""
    names: ClassVar[tuple[tuple[str, str, tuple[str, ...]], ...]] = ()
    """What other tools call its layers: their name, our layer, and which spans. ``{}`` is a block's number."""

    def __init__(self, network: Any) -> None:
        self.network = network

    @property
    @abstractmethod
    def patch(self) -> int:
        """The side of an image token in cells."""

    def kind(self, layer: str) -> Kind:
        """What the rows of a layer's input are.

        Raises:
            ValueError: the network has no such layer, as far as is known.
        """
        for kind, pattern in self.kinds:
            if re.search(pattern, layer):
                return kind
        raise ValueError(
            f"The layer '{layer}' is not one of a {self.title} model; use what was made for this kind of model."
        )

    def spans(self, layer: str) -> Mapping[str, Size]:
        """The outputs of a fused layer by name, ``(start, length)``, in order and without gaps; empty if not fused."""
        return {}

    def span(self, part: Part) -> Size | None:
        """Where a part lies in its layer's outputs, ``(start, length)``; None if it is the whole layer."""
        if not part.spans:
            return None
        found = [self.spans(part.layer)[name] for name in part.spans]
        return found[0][0], sum(length for _, length in found)

    def grid(self, height: int, width: int, layer: str = "") -> Size:
        """Rows and columns of image tokens for a latent of that many cells. A UNet's depend on the layer."""
        return -(-height // self.patch), -(-width // self.patch)

    def layout(self, layer: str, text: int, size: Size, references: Sequence[Size] = ()) -> Layout:
        """Where the tokens are in what a layer makes; where a convolution changes the grid, its output counts.

        Args:
            text: rows of the conditioning.
            size: of the latent in cells.
            references: the sizes of further pictures behind the image.

        Raises:
            ValueError: the layer has no tokens, or the family takes no references.
        """
        kind = self.kind(layer)
        if kind == "global":
            raise ValueError(f"The layer '{layer}' of a {self.title} model has no tokens; leave it out of regions.")
        words, image = self.streams(layer, text, size, references)
        if kind == "joint":
            return image.after(words)
        return image if kind == "image" else words

    def streams(self, layer: str, text: int, size: Size, references: Sequence[Size]) -> tuple[Layout, Layout]:
        """The text and the image as a layer sees them, each as a sequence of its own; of a joint one, text first."""
        return text_layout(text), image_layout(*self.image_tokens(size, references))

    def before_call(self, layer: str) -> bool:
        """Whether a layer runs when prompts are prepared, before any model call, where no hook of a call sees it."""
        return False

    def image_tokens(self, size: Size, references: Sequence[Size] = ()) -> tuple[int, int]:
        """How many tokens the image has, and how many all references."""
        count, *others = (rows * columns for rows, columns in (self.grid(*s) for s in (size, *references)))
        return count, sum(others)

    def other_names(self) -> dict[str, Part]:
        """Names that other tools give to the layers of this network, dotted, without prefix and ``.weight``."""
        layers = {name for name, module in self.network.named_modules() if hasattr(module, "weight")}
        numbers = range(1 + max(map(_number, layers), default=0))
        return {
            theirs.format(number): Part(ours.format(number), spans)
            for theirs, ours, spans in self.names
            for number in (numbers if "{}" in theirs else (0,))
            if ours.format(number) in layers
        }

    def lacks(self, what: str, instead: str) -> ValueError:
        """The refusal of something that this family lacks.

        Args:
            what: the subject of the sentence.
            instead: what to do, an imperative.
        """
        return ValueError(f"{what} does not work on {self.title} models ({type(self.network).__name__}); {instead}.")


def _number(layer: str) -> int:
    return max((int(part) for part in layer.split(".") if part.isdigit()), default=0)


def tiled(lengths: Iterable[tuple[str, int]]) -> dict[str, Size]:
    """Named spans one after the other."""
    found: dict[str, Size] = {}
    start = 0
    for name, length in lengths:
        found[name] = (start, length)
        start += length
    return found


def weight_rows(layer: Any) -> int:
    """How many outputs a linear layer has, in any storage: packed weights have another shape."""
    return int(layer.out_features if hasattr(layer, "out_features") else layer.weight.shape[0])
