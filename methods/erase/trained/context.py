"""What a training method gets: prompts, predictions with and without the adapter, states and pictures to train at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import torch

from ..train import LossFunction
from .prompts import EncodedPrompts
from .trajectories import States, TrajectoryBank

CPU = torch.device("cpu")
TEACHER_ROWS = 16  # states per call of the teacher

OfNoise = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Predict(Protocol):
    """A call of the model."""

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[EncodedPrompts], *, adapted: bool
    ) -> torch.Tensor:
        """The model's own output (noise, velocity, …) for each prompt at each row: (prompts, rows, channels, h, w).

        With ``adapted`` the model runs with its adapter and on the graph, without it as it was loaded.
        """


class Encode(Protocol):
    """A call of the text encoder."""

    def __call__(self, texts: Sequence[str], *, adapted: bool) -> EncodedPrompts:
        """The texts as prompts, one per row. With ``adapted`` the encoder runs with its adapter and on the graph."""


@dataclass(frozen=True)
class ConceptPrompts:
    """The prompts of the concepts and of what replaces them.

    Attributes:
        concept, anchor: corresponding rows: one template with the concept, and with what replaces it.
        empty: the prompt ''.
        concepts: how many there are. Row i belongs to concept i mod ``concepts``.
        replaced: for each row, whether something replaces the concept, or it is only left out. Empty: all are replaced.
    """

    concept: EncodedPrompts
    anchor: EncodedPrompts
    empty: EncodedPrompts
    concepts: int = 1
    replaced: tuple[bool, ...] = ()


class PreservedPrompts(NamedTuple):
    """Prompts whose pictures must not change, and states of their trajectories."""

    prompts: EncodedPrompts
    bank: TrajectoryBank


def no_trajectories() -> TrajectoryBank:
    """A bank without states."""
    return TrajectoryBank(torch.empty(0, 0, 0, 0, 0), torch.empty(0), torch.empty(0, dtype=torch.long))


@dataclass(frozen=True)
class Trajectories:
    """The states a UNet is trained at: of the concepts, of their anchors (empty unless the recipe asks for them), and
    of the preserved prompts, if there are any."""

    concept: TrajectoryBank
    anchor: TrajectoryBank = field(default_factory=no_trajectories)
    preserved: PreservedPrompts | None = None


@dataclass(frozen=True)
class Pictures:
    """Clean latents of the concepts (n, channels, h, w), and the number of the concept each shows (empty: not
    known)."""

    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, 0, 0))
    concept_of: tuple[int, ...] = ()


@dataclass(frozen=True)
class NoiseProcess:
    """How the model is noised.

    Attributes:
        sigmas: noise levels to draw from, (n,).
        noised: of (clean, noise, sigma): the clean latents at those noise levels.
        target: of (clean, noise, sigma): the output of an ideal model there.
        clean: of (x, sigma, output): the clean latents that an output means.
    """

    sigmas: torch.Tensor
    noised: OfNoise
    target: OfNoise
    clean: OfNoise


@dataclass(frozen=True, kw_only=True)
class TrainingContext:
    """One training as a method sees it.

    ``loss_scale`` is for gradients that a method takes itself.
    """

    predict: Predict
    prompts: ConceptPrompts
    noise: NoiseProcess
    pictures: Pictures = field(default_factory=Pictures)
    loss_scale: float = 1.0
    device: torch.device = CPU

    def teacher(self, states: States, prompts: Sequence[EncodedPrompts]) -> torch.Tensor:
        """The predictions of the model as loaded, off the graph."""
        with torch.no_grad():
            return self.predict(states.x, states.sigma, prompts, adapted=False)

    def student(self, states: States, prompts: Sequence[EncodedPrompts]) -> torch.Tensor:
        """The predictions of the model with the adapter, on the graph."""
        return self.predict(states.x, states.sigma, prompts, adapted=True)


@dataclass(frozen=True, kw_only=True)
class UNetContext(TrainingContext):
    """A training of the UNet's layers, at states of trajectories."""

    trajectories: Trajectories


@dataclass(frozen=True)
class TrainingTexts:
    """The texts of a training: the concept's and the anchor's in corresponding pairs, and those that must not change.

    ``concepts`` and ``replaced`` are as in ``ConceptPrompts``.
    """

    concept: tuple[str, ...]
    anchor: tuple[str, ...]
    preserved: tuple[str, ...] = ()
    concepts: int = 1
    replaced: tuple[bool, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextEncoderContext(TrainingContext):
    """A training of the text encoder's layers, on texts."""

    encode: Encode
    texts: TrainingTexts


@dataclass(frozen=True)
class MethodSettings:
    """The numbers a method reads.

    Attributes:
        batch: rows of the concept per iteration.
        preserve_batch: rows per iteration that must not move.
        eta: how far to push beyond the anchor, as the papers count: 0 ends at the anchor, 1 as far on its other side.
        eta_alone: All-but-One's eta for concepts without an anchor.
        layout: All-but-One's share of the sampling, above 0. In it the concept's detail gives way to its anchor's.
        unconditional_weight: All-but-One's weight of the drift of the unconditional prediction.
        refine: whether Co-Erasing refines image tokens by the text.
        seed: of what a method draws before the first iteration.
    """

    batch: int = 4
    preserve_batch: int = 4
    eta: float = 1.0
    eta_alone: float = 0.0
    layout: float = 0.35
    unconditional_weight: float = 1.0
    refine: bool = True
    seed: int = 0


ContextT = TypeVar("ContextT", bound=TrainingContext)
Method = Callable[[ContextT, MethodSettings], LossFunction]
"""A method gets the context once, and returns the function that computes both losses of an iteration."""


def teacher_predictions(
    context: TrainingContext, bank: TrajectoryBank, prompts_at: Callable[[States], Sequence[EncodedPrompts]]
) -> torch.Tensor:
    """The teacher's predictions at every state of the bank, (prompts, trajectories, steps, channels, h, w), on the CPU.

    A training visits each state several times, so this is cheaper than a call per iteration.
    """
    steps = len(bank.sigma)
    parts = []
    for numbers in torch.arange(len(bank.x) * steps).split(TEACHER_ROWS):
        states = bank.at(numbers // steps, numbers % steps, context.device)
        parts.append(context.teacher(states, prompts_at(states)).cpu())
    return torch.cat(parts, 1).unflatten(1, (len(bank.x), steps))
