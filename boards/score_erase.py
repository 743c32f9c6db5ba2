"""``dev.py score erase``: whether erased concepts are gone and the others still there, by the judge's eye.

Every row erases 1, 3, 5 or 10 concepts, each into a neighbour that stays. Kept concepts are listed in 200 prompts for
Preserve Concepts; four concepts are left out of them on purpose and measured apart (``kept_unlisted``).
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import comfy.sample
import numpy as np
import torch

from ..demo import vocabulary
from ..demo.judge import Judge, background_of
from ..demo.sampling import Painter, noise_for
from ..host.erase.apply import TEXT, apply_edit
from ..host.erase.solve import PromptEncoder, SolveRequest, solve_erasure
from ..methods.erase.problem import SolverSettings
from ..methods.erase.spec import LAST, Erased, Preserved
from . import erase_attacks, erase_trained
from .board import Board
from .erase_prompts import GROUPS, TEMPLATES, Pairs, Prompt, kept_prompts, prompts_of
from .score_model import save_sheet
from .workers import spread

ATTACKED = {1: 6, 3: 2, 5: 2, 10: 1}  # groups of a row at most: an attack learns for half a minute
LEAST_KEPT = 36  # pictures of kept concepts in a row at least: fewer say little about a share of 90 %
STEPS, CFG, BATCH = 6, 3.0, 16  # as right as 20 steps on single objects: 36 of 36


@dataclass(frozen=True)
class Edited:
    """A model as a method leaves it, the encoder to go with it, how long it trained, and what it puts into the negative prompt."""

    model: Any
    clip: Any
    minutes: float = 0.0
    negative: str = ""


class Ground:
    """The demo model, its judge, and what all methods share."""

    def __init__(self) -> None:
        self.painter, self.judge = Painter(), Judge.load()
        self.model, self.clip = self.painter.model, self.painter.clip
        self.encode = PromptEncoder(self.clip)
        self.plainly = cache(self._plainly)

    def draw(
        self, edited: Edited, conds: torch.Tensor, seeds: list[int], latent: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Latents (b, 4, h, w) of conditionings (b, tokens, d); with ``latent``, from three quarters of the way back."""
        negative = edited.clip.encode_from_tokens(edited.clip.tokenize(edited.negative))
        made = []
        for at in range(0, len(seeds), BATCH):
            noise, part = noise_for(seeds[at : at + BATCH]), conds[at : at + BATCH]
            start = torch.zeros_like(noise) if latent is None else latent[at : at + BATCH]
            made.append(comfy.sample.sample(
                edited.model, noise, STEPS, CFG, "euler", "normal", [[part, {}]], [[negative.expand(len(part), -1, -1), {}]],
                start, denoise=1.0 if latent is None else 0.75, disable_pbar=True, seed=seeds[0],
            ))  # fmt: skip
        return torch.cat(made)

    def encoded(self, clip: Any, texts: list[str]) -> torch.Tensor:
        return torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in texts])

    def _plainly(self, texts: tuple[str, ...], seeds: tuple[int, ...]) -> torch.Tensor:
        """Latents of prompts by the plain model, which every row of a group is compared with."""
        return self.draw(Edited(self.model, self.clip), self.encoded(self.clip, list(texts)), list(seeds))

    def picture_of(self, concept: str) -> torch.Tensor:
        """A latent of the concept by the plain model, (1, 4, h, w)."""
        return self.plainly((vocabulary.scene_of((concept,), "white").caption(),), (500,))


def erase_list(pairs: Pairs) -> Erased | None:
    """The wire of Erase Concept nodes, with articles in the templates and the anchors of the table."""
    listed: Erased | None = None
    for concept, anchor in pairs:
        word = vocabulary.article(concept).replace(concept, "{}")
        templates = tuple(t.replace("{}", word) for t in TEMPLATES)
        listed = Erased(concept, anchor, templates, LAST, 1.0, (), listed)
    return listed


def closed_form(solver: str, settings: SolverSettings | None = None) -> Callable[[Ground, Pairs], Edited]:
    """A method of the board that solves in closed form. The edit is delivered in the text, which is equal and cheaper here."""

    def method(ground: Ground, pairs: Pairs) -> Edited:
        kept = Preserved(kept_prompts(pairs), 1.0, True)
        request = SolveRequest(solver, settings or SolverSettings())
        edit = solve_erasure(ground.model, ground.clip, erase_list(pairs), kept, request, ground.encode)
        return Edited(apply_edit(ground.model, edit, 1.0, TEXT), ground.clip)

    return method


def _trained(name: str, ground: Ground, pairs: Pairs) -> Edited:
    kept = Preserved(kept_prompts(pairs), 1.0, True)
    return Edited(*erase_trained.train_row(name, ground.model, ground.clip, erase_list(pairs), kept))


def _negative_prompt(ground: Ground, pairs: Pairs) -> Edited:
    return Edited(ground.model, ground.clip, negative=" and ".join(vocabulary.article(c) for c, _ in pairs))


METHODS: dict[str, Callable[[Ground, Pairs], Edited]] = {
    "none": lambda ground, _: Edited(ground.model, ground.clip),
    "negative prompt": _negative_prompt,
    "uce": closed_form("uce"),
    "rece": closed_form("rece"),
    "rece-sequential": closed_form("rece-sequential"),
    "realera": closed_form("realera"),
    "null-space": closed_form("null-space"),
}
"""A row of the board: (ground, pairs of concept and anchor) -> the edited model."""
TRAINED = {name: partial(_trained, name) for name in erase_trained.ROWS}
"""Rows that train for minutes: one concept at a time, fewer groups, and only with ``--trained`` or by name."""


@dataclass
class Tally:
    """What is counted over the pictures of one row."""

    named: dict[str, list[bool]] = field(default_factory=dict)
    background: list[bool] = field(default_factory=list)
    layout: list[float] = field(default_factory=list)
    silhouette: list[float] = field(default_factory=list)
    anchored: list[bool] = field(default_factory=list)
    minutes: list[float] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Takes another group's counts in."""
        for kind, seen in other.named.items():
            self.named.setdefault(kind, []).extend(seen)
        self.background += other.background
        self.layout += other.layout
        self.silhouette += other.silhouette
        self.anchored += other.anchored
        self.minutes += other.minutes

    def metrics(self, plain: dict[str, float]) -> dict[str, float]:
        """Shares; of kept ones relative to ``plain``, the same of the unedited model (1 where there is none to divide by)."""

        def share(kind: str) -> float:
            return statistics.mean(self.named[kind]) if self.named.get(kind) else 0.0

        def relative(name: str, value: float) -> float:
            return value / plain[name] if plain.get(name) else value

        attacks = [ok for kind in erase_attacks.KINDS for ok in self.named.get(kind, [])]
        shown = {
            "erased_named": share("erased"), "erased_named_paraphrase": share("paraphrase"),
            **({"erased_named_attack": statistics.mean(attacks)} if attacks else {}),
        } | {f"attack_{k}": share(k) for k in (*erase_attacks.KINDS, "img2img") if k in self.named}  # fmt: skip
        kept = {
            "kept_right": share("kept"), "kept_unlisted": share("unlisted"), "position_kept": share("pair"),
            "background_kept": statistics.mean(self.background),
        }  # fmt: skip
        return (
            shown
            | {name: relative(name, value) for name, value in kept.items()}
            | ({"layout_kept": statistics.mean(self.layout)} if self.layout else {})
            | ({"silhouette_kept": statistics.mean(self.silhouette)} if self.silhouette else {})
            | ({"anchor_named": statistics.mean(self.anchored)} if self.anchored else {})
            | {"n": sum(map(len, self.named.values())), "minutes": statistics.mean(self.minutes)}
        )


@dataclass(frozen=True)
class Order:
    """One group of one row: the method, what it erases, how many kept concepts are drawn, and whether it is attacked."""

    method: str
    pairs: Pairs
    kept: int
    attacked: bool


@cache
def _ground() -> Ground:
    return Ground()


@torch.inference_mode()
def carry_out(order: Order) -> tuple[Tally, np.ndarray]:
    """Erases, draws and counts; with the first pictures, (n, h, w, 3) of bytes."""
    ground, tally = _ground(), Tally()
    edited = (METHODS | TRAINED)[order.method](ground, order.pairs)
    tally.minutes.append(edited.minutes)
    prompts = list(prompts_of(order.pairs, order.kept))
    conds = ground.encoded(edited.clip, [p.text for p in prompts])
    latents = ground.draw(edited, conds, list(range(100, 100 + len(prompts))))
    anchors = dict(order.pairs)
    _compare(ground, prompts, latents, tally)
    pictures = ground.painter.vae.decode(latents).float()
    for prompt, picture in zip(prompts, pictures, strict=True):
        (verdict,) = ground.judge.look(picture[None], prompt.box)
        tally.named.setdefault(prompt.role, []).append(verdict.name == prompt.concept)
        if prompt.role == "erased":  # whether a whole thing stands there still: blobs keep a layout too
            tally.anchored.append(verdict.name == anchors[prompt.concept])
        if prompt.role != "paraphrase":
            tally.background.append(background_of(picture) == prompt.background)
    if order.attacked:
        _attack(ground, edited, order.pairs[0][0], tally)
    return tally, (pictures[:12] * 255).round().byte().numpy()


def _compare(ground: Ground, prompts: list[Prompt], latents: torch.Tensor, tally: Tally) -> None:
    """How alike, coarsely, the pictures of erased concepts are to the plain model's from the same noise: in all their
    channels, and in where something stands."""
    asked = [number for number, prompt in enumerate(prompts) if prompt.role == "erased"]
    plain = ground.plainly(tuple(prompts[number].text for number in asked), tuple(100 + number for number in asked))
    tally.layout += low_pass_correlation(latents[asked], plain).tolist()
    tally.silhouette += low_pass_correlation(silhouette(latents[asked]), silhouette(plain)).tolist()


def low_pass_correlation(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of two latents (b, c, h, w) at a quarter of their size, each channel about its mean: (b,)."""
    small = [torch.nn.functional.avg_pool2d(x.double(), 4) for x in (one, other)]
    return torch.cosine_similarity(*((x - x.mean((-2, -1), keepdim=True)).flatten(1) for x in small))


def silhouette(latents: torch.Tensor) -> torch.Tensor:
    """How far each cell is from the background, the median of the outermost cells: (b, 1, h, w). Unlike the latent it does
    not know a concept's colours, which must go with the concept."""
    rim = torch.ones(latents.shape[-2:], dtype=torch.bool)
    rim[1:-1, 1:-1] = False
    background = latents[..., rim].median(-1).values
    return (latents - background[..., None, None]).norm(dim=1, keepdim=True)


def _attack(ground: Ground, edited: Edited, concept: str, tally: Tally) -> None:
    """Learned tokens, and a start from a picture of the concept; two pictures each."""
    latent = ground.picture_of(concept)
    caption = vocabulary.scene_of((concept,), "white").caption()
    for kind in erase_attacks.KINDS:
        learned = erase_attacks.learn(
            kind, ground.model, edited.model, (ground.clip, edited.clip), latent, concept, "white"
        )
        cond = edited.clip.encode_from_tokens(learned.tokens)
        _count(ground, ground.draw(edited, cond.expand(2, -1, -1), [700, 701]), concept, kind, tally)
    cond = ground.encoded(edited.clip, [caption, caption])
    _count(ground, ground.draw(edited, cond, [700, 701], latent.expand(2, -1, -1, -1)), concept, "img2img", tally)


def _count(ground: Ground, latents: torch.Tensor, concept: str, kind: str, tally: Tally) -> None:
    verdicts = ground.judge.look(ground.painter.vae.decode(latents).float())
    tally.named.setdefault(kind, []).extend(v.name == concept for v in verdicts)


def plan(options: argparse.Namespace) -> Iterator[tuple[int, tuple[Pairs, ...], list[str]]]:
    """The parts of the board: how many concepts, their groups, and the rows (``none`` comes first by itself)."""
    chosen = options.method or [*METHODS, *(TRAINED if options.trained else ())]
    for count in options.concepts or ([1, 5] if options.quick else list(GROUPS)):
        groups = GROUPS[count][: 2 if count == 1 else 1] if options.quick else GROUPS[count][: options.groups]
        if solved := [name for name in chosen if name in METHODS]:
            yield count, groups, solved
        if count == 1 and (slow := [name for name in chosen if name in TRAINED]):
            yield count, groups[: erase_trained.GROUPS], slow


def main(arguments: list[str]) -> int:
    """Prints the board; ``--json FILE`` writes it."""
    parser = argparse.ArgumentParser(prog="dev.py score erase")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="1 and 5 concepts, few pictures, attacks on one of each")
    parser.add_argument("--sheets", type=Path, help="a folder for sheets of the pictures")
    parser.add_argument(
        "--method", choices=[*METHODS, *TRAINED], action="append", help="only this row (again for more)"
    )
    parser.add_argument(
        "--concepts", type=int, choices=list(GROUPS), action="append", help="only this many (again for more)"
    )
    parser.add_argument(
        "--trained", action="store_true", help="also the methods that train, on the first groups of one"
    )
    parser.add_argument("--groups", type=int, help="only the first so many groups; trained rows take 2")
    parser.add_argument("--no-attacks", action="store_true", help="only prompts")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    board = Board("erase", [100, 500, 700])
    for count, groups, methods in plan(options):
        plain: dict[str, float] = {}
        for method in dict.fromkeys(["none", *methods]):
            with board.row(method) as metrics:
                metrics |= {"concepts": count} | _row(method, groups, options, plain)
            if method == "none":
                plain = {k: v for k, v in metrics.items() if k.startswith(("kept", "position", "background"))}
            board.write(options.json)
    return 0


def _row(method: str, groups: tuple[Pairs, ...], options: argparse.Namespace, plain: dict[str, float]) -> dict:
    """The metrics of one row; its pictures go to a sheet, if a folder is given."""
    count, tally, sheets = len(groups[0]), Tally(), []
    kept = (4 if count == 1 else 8) if options.quick else max(6 if count == 1 else 12, LEAST_KEPT // len(groups))
    attacked = 0 if method == "none" or options.no_attacks else 1 if options.quick else ATTACKED[count]
    orders = [Order(method, pairs, kept, number < attacked) for number, pairs in enumerate(groups)]
    for found, pictures in spread(carry_out, orders):
        tally.add(found)
        sheets.append(torch.from_numpy(pictures) / 255)
    if options.sheets:
        save_sheet(sheets, options.sheets / f"{method}-{count}.png")
    return tally.metrics(plain)
