"""What every method stands on: encoded prompts, the model's predictions with and without the adapter, states to train at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from ..train import Terms


class Encoded(NamedTuple):
    """Encoded prompts, one a row: ``context`` (rows, tokens, width), ``pooled`` (rows, p) where the model reads it."""

    context: torch.Tensor
    pooled: torch.Tensor | None = None

    def at(self, rows: torch.Tensor | slice) -> Encoded:
        """The prompts of these rows."""
        return Encoded(self.context[rows], None if self.pooled is None else self.pooled[rows])

    def repeated(self, count: int) -> Encoded:
        """A single prompt on ``count`` rows."""
        return self.at(torch.zeros(count, dtype=torch.long))

    def followed_by(self, tokens: torch.Tensor) -> Encoded:
        """With further context tokens (rows, k, width) at the end."""
        return Encoded(torch.cat([self.context, tokens.to(self.context)], 1), self.pooled)


def stacked(prompts: Sequence[Encoded]) -> Encoded:
    """All rows of these prompts, one after the other; of equal token length."""
    pooled = [p.pooled for p in prompts if p.pooled is not None]
    return Encoded(torch.cat([p.context for p in prompts]), torch.cat(pooled) if len(pooled) == len(prompts) else None)


class States(NamedTuple):
    """Noisy latents ``x`` (rows, channels, h, w) at noise levels ``sigma`` (rows,), the prompt each was drawn for, and where
    they stand in their bank (trajectory and step)."""

    x: torch.Tensor
    sigma: torch.Tensor
    prompt: torch.Tensor
    place: tuple[torch.Tensor, torch.Tensor]

    def part(self, rows: slice) -> States:
        return States(self.x[rows], self.sigma[rows], self.prompt[rows], (self.place[0][rows], self.place[1][rows]))


class Bank(NamedTuple):
    """Trajectories of the host's own sampler, drawn once: the state before every step.

    ``x`` (trajectories, steps, channels, h, w), ``sigma`` (steps,), ``prompt`` (trajectories,): which one each was drawn for.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    prompt: torch.Tensor

    def at(self, which: torch.Tensor, step: torch.Tensor, device: torch.device) -> States:
        """The states at these places."""
        picked = self.x[which, step].to(device, torch.float32), self.sigma[step].to(device, torch.float32)
        return States(*picked, self.prompt[which].to(device), (which, step))

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> States:
        """So many states at random, any trajectory, any step."""
        which = torch.randint(len(self.x), (count,), generator=generator)
        step = torch.randint(len(self.sigma), (count,), generator=generator)
        return self.at(which, step, device)


class Predict(Protocol):
    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[Encoded], *, adapted: bool
    ) -> torch.Tensor:
        """The model's own output (noise, velocity, …) for each prompt at each row: (prompts, rows, channels, h, w).

        With ``adapted`` by the model with its adapter and on the graph, without by the model as it was loaded.
        """


class Encode(Protocol):
    def __call__(self, texts: Sequence[str], *, adapted: bool) -> Encoded:
        """The texts as prompts, one a row; with ``adapted`` by the encoder with its adapter and on the graph."""


@dataclass(frozen=True)
class Ground:
    """One training as a method sees it.

    ``concept`` and ``anchor`` correspond row by row: the same template with the concept and with what it becomes. With
    several ``concepts`` the rows go round them: row i is of number i mod ``concepts``. ``replaced`` says of each row whether it
    becomes something, or only loses the concept (empty: all become something). ``empty`` is the prompt ''.
    ``preserved`` are prompts that must go on as before; ``bank``, ``anchor_bank`` and ``kept`` hold states of the trajectories
    of the concept, the anchor and the preserved prompts. ``images`` are clean latents of the concept, ``pictured`` the number
    of the concept each shows (empty: it is not known). ``noised`` brings clean latents to a noise level, in the model's own
    way, and ``target`` is the output an ideal model gives there. ``loss_scale`` is for gradients a method takes itself.
    """

    predict: Predict
    concept: Encoded
    anchor: Encoded
    empty: Encoded
    bank: Bank | None = None
    anchor_bank: Bank | None = None
    preserved: Encoded | None = None
    kept: Bank | None = None
    encode: Encode | None = None
    texts: tuple[str, ...] = ()
    anchor_texts: tuple[str, ...] = ()
    kept_texts: tuple[str, ...] = ()
    concepts: int = 1
    replaced: tuple[bool, ...] = ()
    images: torch.Tensor | None = None
    pictured: tuple[int, ...] = ()
    loss_scale: float = 1.0
    sigmas: torch.Tensor | None = None
    noised: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    target: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    clean_of: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def teacher(self, states: States, prompts: Sequence[Encoded]) -> torch.Tensor:
        """What the model as loaded says, off the graph."""
        with torch.no_grad():
            return self.predict(states.x, states.sigma, prompts, adapted=False)

    def student(self, states: States, prompts: Sequence[Encoded]) -> torch.Tensor:
        """What the model with the adapter says, on the graph."""
        return self.predict(states.x, states.sigma, prompts, adapted=True)


def answers(
    ground: Ground, bank: Bank, prompts_at: Callable[[States], Sequence[Encoded]], rows: int = 16
) -> torch.Tensor:
    """What the teacher says at every state of the bank, once and for all, (prompts, trajectories, steps, channels, h, w).

    A state is visited several times by a training, so this is cheaper than asking in every iteration.
    """
    steps = len(bank.sigma)
    places = torch.arange(len(bank.x) * steps)
    parts = []
    for some in places.split(rows):
        states = bank.at(some // steps, some % steps, ground.device)
        parts.append(ground.teacher(states, prompts_at(states)).cpu())
    return torch.cat(parts, 1).unflatten(1, (len(bank.x), steps))


class Keeper:
    """What must not move: '' along the concept's trajectories, and preserved prompts along their own.

    Args:
        count: rows an iteration, one of them ''; a single row is '' and a preserved prompt by turns.
    """

    def __init__(self, ground: Ground, count: int) -> None:
        assert ground.bank is not None
        self.ground, self.count = ground, count
        self.empty = answers(ground, ground.bank, lambda states: [ground.empty])[0]
        self.own = None
        if ground.kept is not None and ground.preserved is not None:
            preserved = ground.preserved
            self.own = answers(ground, ground.kept, lambda states: [preserved.at(states.prompt)])[0]

    def rows(self, near: States, generator: torch.Generator) -> tuple[States, Encoded, torch.Tensor]:
        """States that must not move, their prompts, and what the teacher says there: '' at the first of ``near``, the others
        preserved prompts."""
        ground, empty = self.ground, near.part(slice(0, 1))
        wanted = self.empty[empty.place]
        if self.own is None or ground.kept is None or ground.preserved is None:
            return empty, ground.empty, wanted
        alone = self.count < 2
        if alone and heads(generator):
            return empty, ground.empty, wanted
        own = ground.kept.draw(max(self.count - 1, 1), generator, ground.device)
        words = ground.preserved.at(own.prompt)
        if alone:
            return own, words, self.own[own.place]
        return beside(empty, own), stacked([ground.empty, words]), torch.cat([wanted, self.own[own.place]])

    def student(
        self, states: States, prompt: Encoded, generator: torch.Generator, near: States | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's answers to ``prompt`` (a row each) at ``states``, and its mean square drift on rows that must not
        move, from one model call. ``near`` are states of the concept's bank, where ``states`` are of another."""
        kept, words, wanted = self.rows(near or states, generator)
        (said,) = self.ground.student(beside(states, kept), [stacked([prompt, words])])
        rows = len(states.x)
        return said[:rows], mean_square(said[rows:], wanted.to(said))


def heads(generator: torch.Generator) -> bool:
    """A coin: what one row can be of two, it is by turns."""
    return bool(torch.rand((), generator=generator) < 0.5)


def beside(*several: States) -> States:
    """The rows of several sets of states, one after the other."""
    x, sigma, prompt = (torch.cat(column) for column in list(zip(*several, strict=True))[:3])
    return States(
        x, sigma, prompt, (torch.cat([s.place[0] for s in several]), torch.cat([s.place[1] for s in several]))
    )


def mean_square(said: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """In float32, whatever the model computes in."""
    return (said.float() - wanted.float()).square().mean()


@dataclass(frozen=True)
class Settings:
    """What a method may be told.

    Attributes:
        batch: rows of the concept an iteration.
        kept_batch: rows that must not move an iteration.
        eta: how far beyond the anchor to push, in the papers' own sense: 0 ends at the anchor, 1 is as far on the other side.
        eta_alone: All-but-One's eta for concepts without an anchor.
        layout: All-but-One's share of the sampling, from its start, in which the concept's detail gives way to its anchor's; above 0.
        unconditional_weight: All-but-One's hold on the unconditional prediction.
        refine: whether Co-Erasing refines image tokens by the text.
        seed: of what a method draws before the first iteration.
    """

    batch: int = 4
    kept_batch: int = 4
    eta: float = 1.0
    eta_alone: float = 0.0
    layout: float = 0.35
    unconditional_weight: float = 1.0
    refine: bool = True
    seed: int = 0


Method = Callable[[Ground, Settings], Callable[[torch.Generator], Terms]]
"""A method: gets the ground once, and gives what computes both losses of an iteration."""
