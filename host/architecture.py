"""What depends on a model's network, behind one interface: which tokens a layer sees, how fused matrices are cut, …

``architecture_of`` in ``host/registry.py`` finds the architecture of a model. ``host/families/`` has a file per family.
Layers are named by their path inside ``diffusion_model``, without ``.weight``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch

Kind: TypeAlias = Literal["image", "text", "joint", "rows", "global"]
"""What the rows of a layer's input are.

- ``image``: image tokens, with references behind them;
- ``text``: text tokens;
- ``joint``: both in one sequence;
- ``rows``: text tokens that are not the axis before the last: the first axis is the batch times any number;
- ``global``: neither, such as one vector for the whole picture. A token axis there means nothing."""

Size: TypeAlias = tuple[int, int]
"""Height and width in cells of the latent."""

NOWHERE = slice(0, 0)

Between: TypeAlias = Literal["nothing", "norm", "network"]
"""What is between the conditioning and the first layers that the text goes through."""

AttentionKind: TypeAlias = Literal["joint", "self", "cross", "text"]
"""Between all tokens, between image tokens, from image to text, or between text tokens."""


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


class Attention(NamedTuple):
    """An attention of all blocks whose path matches ``blocks``.

    ``keys`` is the layer that makes its keys, inside the block, and ``after`` the one that its output goes through;
    empty if that is a layer ``shared`` with the MLP, whose inputs come behind. ``output`` is what the block returns.
    """

    blocks: str
    stage: str
    kind: AttentionKind
    keys: Part
    after: str
    output: tuple[Kind, ...]
    shared: str = ""


class Site(NamedTuple):
    """One attention of a network. ``start`` is the share of all blocks before its block."""

    block: str
    attention: Attention
    start: float

    @property
    def keys(self) -> Part:
        """The outputs of a layer that are its keys."""
        return Part(f"{self.block}.{self.attention.keys.layer}", self.attention.keys.spans)

    @property
    def after(self) -> str | None:
        """The layer that its output goes through, and nothing else does."""
        return f"{self.block}.{self.attention.after}" if self.attention.after else None


class TextEntry(NamedTuple):
    """The first layers that the text goes through, and what is between the conditioning and them.

    Only after ``nothing`` is a linear map of the conditioning the same as one of their input. A ``norm`` rescales each
    row; a ``network`` mixes rows. ``pooled`` is the layer that reads the pooled embedding, if there is one.
    """

    layers: tuple[str, ...]
    through: Between
    pooled: str | None = None


class EqualLengths(NamedTuple):
    """How unequal prompts become rows of one call: by the ``host``, a ``mask`` of what is filled in, or a ``token``.

    ``shifts``: the image lies behind the text. ``counts``: the condition that holds its length. ``attentions``: modules
    with all text tokens first among the keys (a pattern; empty: no mask gets there), up to the layer ``until``.
    ``not_with``: conditions with more tokens. ``token`` is a parameter, set after a module, up to a ``multiple``. A
    prompt of less than ``least`` rows gets them from the host, in front of it.
    """

    by: Literal["host", "mask", "token"]
    token: str = ""
    after: str = ""
    multiple: int = 1
    shifts: bool = False
    counts: str = ""
    attentions: str = ""
    until: str = ""
    not_with: tuple[str, ...] = ()
    least: int = 0


class Architecture(ABC):
    """The facts of one network. A family is a subclass; a new one is a file in ``host/families/``."""

    title: ClassVar[str]  # what its models are called, in refusals
    classes: ClassVar[tuple[str, ...]]
    """The host's names of its networks' classes."""
    kinds: ClassVar[tuple[tuple[Kind, str], ...]]
    """Patterns of layer paths, the first that is found decides."""
    names: ClassVar[tuple[tuple[str, str, tuple[str, ...]], ...]] = ()
    """What other tools call its layers: their name, our layer, and which spans. ``{}`` is a block's number."""
    attentions: ClassVar[tuple[Attention, ...]]
    """Every attention over text or image, in the order they run; those of one block share a pattern."""
    first_text_layers: ClassVar[str]
    """A pattern of the first layers that the text goes through."""
    between: Between = "nothing"
    text_encoder: str | None = None
    """The host's name of the encoder whose tokens those layers read, where the conditioning's are another one's."""
    pooled_layer: ClassVar[str | None] = None
    """What reads the pooled embedding, where a model of the family has it."""
    targets: ClassVar[Mapping[str, str]]
    """Which layers are trained, by the name of the choice: a pattern."""
    position_embedder: ClassVar[str | None] = None
    """The module that gets the positions of all tokens, where text has some."""
    equal_lengths: EqualLengths = EqualLengths("mask")
    takes_references: bool = False
    """Whether pictures may lie behind the image."""
    text_embedder: ClassVar[str | None] = None
    """The module that the text goes through before the attentions to it, where it does not depend on the picture."""
    overwrites_saved: ClassVar[bool] = True
    """Whether the network overwrites what autograd has saved."""

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
        if references and not self.takes_references:
            raise self.lacks("A picture beside the latent", "remove the reference latents")
        words, image = self.streams(layer, text, size, references)
        return {"joint": image.after(words), "image": image}.get(kind, words)

    def streams(self, layer: str, text: int, size: Size, references: Sequence[Size]) -> tuple[Layout, Layout]:
        """The text and the image as a layer sees them, each as a sequence of its own; of a joint one, text first."""
        return text_layout(text), image_layout(*self.image_tokens(size, references))

    def sites(self) -> list[Site]:
        """Every attention of the network, in the order they run."""
        modules = dict(self.network.named_modules())
        patterns = dict.fromkeys(attention.blocks for attention in self.attentions)
        blocks = [(path, pattern) for pattern in patterns for path in modules if re.fullmatch(pattern, path)]
        return [
            Site(path, attention, number / len(blocks))
            for number, (path, pattern) in enumerate(blocks)
            for attention in self.attentions
            if attention.blocks == pattern and f"{path}.{attention.keys.layer}" in modules
        ]

    def text_entry(self) -> TextEntry:
        """Where the text enters the network."""
        modules = dict(self.network.named_modules())
        layers = tuple(path for path in modules if re.search(self.first_text_layers, path))
        return TextEntry(layers, self.between, self.pooled_layer if self.pooled_layer in modules else None)

    def text_positions(self, text: int, size: Size) -> torch.Tensor | None:
        """Where each text token is, as ``position_embedder`` gets it alone, (tokens, axes); None if nowhere."""
        return None

    def trained(self, choice: str) -> str:
        """The pattern of the layers that are trained.

        Raises:
            ValueError: the family has no such choice.
        """
        if choice not in self.targets:
            raise self.lacks(f"Training '{choice}'", f"choose one of {', '.join(self.targets)}")
        return self.targets[choice]

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
        numbers = range(1 + max((int(part) for n in layers for part in n.split(".") if part.isdigit()), default=0))
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


def tiled(lengths: Iterable[tuple[str, int]]) -> dict[str, Size]:
    """Named spans one after the other."""
    found: dict[str, Size] = {}
    start = 0
    for name, length in lengths:
        found[name] = (start, length)
        start += length
    return found
