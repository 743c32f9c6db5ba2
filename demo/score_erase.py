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
from random import Random
from typing import Any

import comfy.sample
import torch

from ..host.erase_apply import TEXT, apply_edit
from ..host.erase_solve import Encoder, Request, solve_erasure
from ..methods.erase.problem import Settings
from ..methods.erase.spec import LAST, Erased, Preserved
from . import erase_attacks, erase_trained, vocabulary
from .board import Board
from .judge import LEFT, RIGHT, WHOLE, Judge, background_of
from .sampling import Painter, noise_for
from .score_model import save_sheet

TARGETS = (
    ("cat", "dog"), ("car", "bus"), ("apple", "strawberry"), ("star", "heart"), ("owl", "penguin"), ("pizza", "burger"),
    ("tree", "cactus"), ("frog", "turtle"), ("moon", "banana"), ("fish", "octopus"), ("donut", "cake"),
    ("ladybug", "butterfly"),
)  # fmt: skip
"""What is erased, and what it becomes: a neighbour of like shape or kind that is never erased."""
UNLISTED = ("rabbit", "house", "clock", "watermelon")
GROUPS = {1: tuple((t,) for t in TARGETS), 3: tuple(TARGETS[i : i + 3] for i in (0, 3, 6, 9)),
          5: (TARGETS[:5], TARGETS[5:10], TARGETS[7:12]), 10: (TARGETS[:10], TARGETS[2:12])}  # fmt: skip
KEPT_PROMPTS = 200
STEPS, CFG, BATCH = 6, 3.0, 16  # as right as 20 steps on single objects: 36 of 36
TEMPLATES = (
    "{}", "{}, blue background", "{}, red background", "a sketch of {}, white background", "flat art of {}",
    "a mosaic of {}, orange background", "on the left {}", "on the left {} and on the right a heart, pink background",
    "on the left a bus and on the right {}, green background", "a sketch of on the left a dog and on the right {}",
)  # fmt: skip
PARAPHRASES = (
    "{bare}",
    "the {bare}, {bg} background",
    "{bg} background, {a}",
    "nice picture with {a}, {bg} background",
)
"""Ways to ask that no template has; {a} is the concept with its article."""


@dataclass(frozen=True)
class Edited:
    """A model as a method leaves it, the encoder to go with it, how long it trained, and what it puts into the negative prompt."""

    model: Any
    clip: Any
    minutes: float = 0.0
    negative: str = ""


@dataclass(frozen=True)
class Prompt:
    """One picture to draw and what to look for. ``role``: erased, paraphrase, kept, unlisted or pair."""

    text: str
    role: str
    concept: str
    background: str
    box: tuple[float, float, float, float] = WHOLE


class Ground:
    """The demo model, its judge, and what all methods share."""

    def __init__(self) -> None:
        self.painter, self.judge = Painter(), Judge.load()
        self.model, self.clip = self.painter.model, self.painter.clip
        self.encode = Encoder(self.clip)
        self.latents: dict[str, torch.Tensor] = {}

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

    def picture_of(self, concept: str) -> torch.Tensor:
        """A latent of the concept by the plain model, (1, 4, h, w)."""
        if concept not in self.latents:
            plain = Edited(self.model, self.clip)
            conds = self.encoded(self.clip, [vocabulary.scene_of((concept,), "white").caption()])
            self.latents[concept] = self.draw(plain, conds, [500])
        return self.latents[concept]


def erase_list(pairs: tuple[tuple[str, str], ...]) -> Erased | None:
    """The wire of Erase Concept nodes, with articles in the templates and the anchors of the table."""
    listed: Erased | None = None
    for concept, anchor in pairs:
        word = vocabulary.article(concept).replace(concept, "{}")
        templates = tuple(t.replace("{}", word) for t in TEMPLATES)
        listed = Erased(concept, anchor, templates, LAST, 1.0, (), listed)
    return listed


@cache
def kept_prompts(pairs: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The prompts of Preserve Concepts: scenes of everything that is neither erased nor left out on purpose."""
    rng, gone = Random(9), {c for c, _ in pairs}
    pool = [c for c in vocabulary.CONCEPTS if c not in gone and c not in UNLISTED]
    scenes = []
    for _ in range(KEPT_PROMPTS):
        style = rng.choice(list(vocabulary.STYLES)) if rng.random() < 0.4 else "emoji"
        concepts = tuple(rng.sample(pool, rng.choice((1, 2))))
        scenes.append(vocabulary.scene_of(concepts, rng.choice(list(vocabulary.BACKGROUNDS)), style).caption())
    return tuple(dict.fromkeys(scenes))


def closed_form(solver: str, settings: Settings | None = None) -> Callable[[Ground, tuple], Edited]:
    """A method of the board that solves in closed form. The edit is delivered in the text, which is equal and cheaper here."""

    def method(ground: Ground, pairs: tuple) -> Edited:
        kept = Preserved(kept_prompts(pairs), 1.0, True)
        request = Request(solver, settings or Settings())
        edit = solve_erasure(ground.model, ground.clip, erase_list(pairs), kept, request, ground.encode)
        return Edited(apply_edit(ground.model, edit, 1.0, TEXT), ground.clip)

    return method


def _trained(name: str, ground: Ground, pairs: tuple) -> Edited:
    kept = Preserved(kept_prompts(pairs), 1.0, True)
    return Edited(*erase_trained.train_row(name, ground.model, ground.clip, erase_list(pairs), kept))


def _negative_prompt(ground: Ground, pairs: tuple) -> Edited:
    return Edited(ground.model, ground.clip, negative=" and ".join(vocabulary.article(c) for c, _ in pairs))


METHODS: dict[str, Callable[[Ground, tuple], Edited]] = {
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


def prompts_of(pairs: tuple[tuple[str, str], ...], kept: int) -> Iterator[Prompt]:
    """What is drawn for one group."""
    backgrounds, gone = list(vocabulary.BACKGROUNDS), [c for c, _ in pairs]
    stays = [c for c in vocabulary.CONCEPTS if c not in gone and c not in UNLISTED]
    rng = Random(len(gone) * 100 + len(gone[0]))
    for number, concept in enumerate(gone):
        for turn in range(2 if len(gone) < 5 else 1):
            ground = backgrounds[(3 * number + 5 * turn) % 8]
            yield Prompt(vocabulary.scene_of((concept,), ground).caption(), "erased", concept, ground)
            words = PARAPHRASES[(2 * number + turn) % len(PARAPHRASES)]
            text = words.format(bare=concept, a=vocabulary.article(concept), bg=ground)
            yield Prompt(text, "paraphrase", concept, ground)
    for number, concept in enumerate(rng.sample(stays, min(kept, len(stays)))):
        ground = backgrounds[(3 * number + 1) % 8]
        yield Prompt(vocabulary.scene_of((concept,), ground).caption(), "kept", concept, ground)
        if number % 3 == 0:
            other = gone[number // 3 % len(gone)]
            scene = (concept, other) if number % 2 else (other, concept)
            text = vocabulary.scene_of(scene, ground).caption()
            yield Prompt(text, "pair", concept, ground, LEFT if number % 2 else RIGHT)
    for number, concept in enumerate(UNLISTED[: max(2, kept // 4)]):
        ground = backgrounds[(2 * number + 1) % 8]
        yield Prompt(vocabulary.scene_of((concept,), ground).caption(), "unlisted", concept, ground)


@dataclass
class Tally:
    """What is counted over the pictures of one row."""

    named: dict[str, list[bool]] = field(default_factory=dict)
    background: list[bool] = field(default_factory=list)
    minutes: list[float] = field(default_factory=list)

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
            | {"n": sum(map(len, self.named.values())), "minutes": statistics.mean(self.minutes)}
        )


@torch.inference_mode()
def measure(ground: Ground, method: str, groups: tuple, kept: int, attacked: int, tally: Tally) -> list[torch.Tensor]:
    """Draws and counts one row; the pictures of each group."""
    sheets = []
    for number, pairs in enumerate(groups):
        edited = (METHODS | TRAINED)[method](ground, pairs)
        tally.minutes.append(edited.minutes)
        prompts = list(prompts_of(pairs, kept))
        conds = ground.encoded(edited.clip, [p.text for p in prompts])
        pictures = ground.painter.vae.decode(ground.draw(edited, conds, list(range(100, 100 + len(prompts))))).float()
        for prompt, picture in zip(prompts, pictures, strict=True):
            (verdict,) = ground.judge.look(picture[None], prompt.box)
            tally.named.setdefault(prompt.role, []).append(verdict.name == prompt.concept)
            if prompt.role != "paraphrase":
                tally.background.append(background_of(picture) == prompt.background)
        if number < attacked:
            _attack(ground, edited, pairs[0][0], tally)
        sheets.append(pictures[:12])
    return sheets


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


def plan(options: argparse.Namespace) -> Iterator[tuple[int, tuple, list[str]]]:
    """The parts of the board: how many concepts, their groups, and the rows (``none`` comes first by itself)."""
    chosen = options.method or [*METHODS, *(TRAINED if options.trained else ())]
    for count in options.concepts or ([1, 5] if options.quick else list(GROUPS)):
        groups = GROUPS[count][: 2 if count == 1 else 1] if options.quick else GROUPS[count]
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
    parser.add_argument("--no-attacks", action="store_true", help="only prompts")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    board, ground = Board("erase", [100, 500, 700]), Ground()
    for count, groups, methods in plan(options):
        plain: dict[str, float] = {}
        for method in dict.fromkeys(["none", *methods]):
            with board.row(method) as metrics:
                metrics |= {"concepts": count} | _row(ground, method, groups, options, plain)
            if method == "none":
                plain = {k: v for k, v in metrics.items() if k.startswith(("kept", "position", "background"))}
        board.write(options.json)
    return 0


def _row(ground: Ground, method: str, groups: tuple, options: argparse.Namespace, plain: dict[str, float]) -> dict:
    """The metrics of one row; its pictures go to a sheet, if a folder is given."""
    count, tally = len(groups[0]), Tally()
    kept = (4 if count == 1 else 8) if options.quick else (6 if count == 1 else 12)
    attacked = 0 if method == "none" or options.no_attacks else 1 if options.quick else 3
    sheets = measure(ground, method, groups, kept, attacked, tally)
    if options.sheets:
        save_sheet(sheets, options.sheets / f"{method}-{count}.png")
    return tally.metrics(plain)
