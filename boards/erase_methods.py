"""The methods of the erasure board: the demo model before and after each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import comfy.sample
import torch

from ..demo import vocabulary
from ..demo.judge import Judge
from ..demo.sampling import DemoSampler, noise_for
from ..host.erase.apply import TEXT, apply_edit
from ..host.erase.solve import SolveRequest, solve_erasure
from ..host.text.tokens import PromptEncoder
from ..methods.erase.problem import SolverSettings
from ..methods.erase.spec import LAST, Erased, Preserved
from . import erase_trained
from .erase_prompts import TEMPLATES, Pairs, preserved_prompts

STEPS, CFG, BATCH = 6, 3.0, 16  # as right as 20 steps on single objects: 36 of 36


@dataclass(frozen=True)
class EditedModel:
    """A model as a method leaves it, with its encoder, the minutes of training and the negative prompt it needs."""

    model: Any
    clip: Any
    minutes: float = 0.0
    negative: str = ""


class EraseRunner:
    """The demo model, its judge, and what all methods share."""

    def __init__(self) -> None:
        self.demo, self.judge = DemoSampler(), Judge.load()
        self.model, self.clip = self.demo.model, self.demo.clip
        self.encode = PromptEncoder(self.clip)
        self.plain_latents = cache(self._plain_latents)

    def sample(
        self, edited: EditedModel, conds: torch.Tensor, seeds: list[int], latent: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Latents (b, 4, h, w) of conditionings (b, tokens, d); ``latent``: started from at 0.75 of the noise."""
        negative = edited.clip.encode_from_tokens(edited.clip.tokenize(edited.negative))
        made = []
        for at in range(0, len(seeds), BATCH):
            noise, part = noise_for(seeds[at : at + BATCH]), conds[at : at + BATCH]
            start = torch.zeros_like(noise) if latent is None else latent[at : at + BATCH]
            conditionings = [[part, {}]], [[negative.expand(len(part), -1, -1), {}]]
            options = {"denoise": 1.0 if latent is None else 0.75, "disable_pbar": True, "seed": seeds[0]}
            sampling = edited.model, noise, STEPS, CFG, "euler", "normal"
            made.append(comfy.sample.sample(*sampling, *conditionings, start, **options))
        return torch.cat(made)

    def encoded_texts(self, clip: Any, texts: list[str]) -> torch.Tensor:
        return torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in texts])

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (b, h, w, 3) in 0..1."""
        return self.demo.vae.decode(latents).float()

    def _plain_latents(self, texts: tuple[str, ...], seeds: tuple[int, ...]) -> torch.Tensor:
        """Latents of prompts by the plain model, which every row of a group is compared with."""
        return self.sample(EditedModel(self.model, self.clip), self.encoded_texts(self.clip, list(texts)), list(seeds))

    def latent_of(self, concept: str) -> torch.Tensor:
        """A latent of the concept by the plain model, (1, 4, h, w)."""
        return self.plain_latents((vocabulary.scene_of((concept,), "white").caption(),), (500,))


EraseMethod = Callable[[EraseRunner, Pairs], EditedModel]
"""(runner, pairs of concept and anchor) → the edited model."""


def erase_list(pairs: Pairs) -> Erased | None:
    """The wire of Erase Concept nodes, with articles in the templates and the anchors of the table."""
    listed: Erased | None = None
    for concept, anchor in pairs:
        word = vocabulary.article(concept).replace(concept, "{}")
        templates = tuple(t.replace("{}", word) for t in TEMPLATES)
        listed = Erased(concept, anchor, templates, LAST, 1.0, (), listed)
    return listed


CAPTIONS = Preserved(vocabulary.ordinary_captions(), 100.0, True, averaged=True)


def closed_form(solver: str, settings: SolverSettings | None = None, captions: Preserved | None = None) -> EraseMethod:
    """A method that solves in closed form. The edit is delivered in the text, which is equal and cheaper here."""

    def method(runner: EraseRunner, pairs: Pairs) -> EditedModel:
        preserved = Preserved(preserved_prompts(pairs), 1.0, True, captions)
        request = SolveRequest(solver, settings or SolverSettings())
        edit = solve_erasure(runner.model, runner.clip, erase_list(pairs), preserved, request, runner.encode)
        return EditedModel(apply_edit(runner.model, edit, 1.0, TEXT), runner.clip)

    return method


def _trained(name: str, runner: EraseRunner, pairs: Pairs) -> EditedModel:
    preserved = Preserved(preserved_prompts(pairs), 1.0, True)
    return EditedModel(*erase_trained.train_row(name, runner.model, runner.clip, erase_list(pairs), preserved))


def _negative_prompt(runner: EraseRunner, pairs: Pairs) -> EditedModel:
    return EditedModel(runner.model, runner.clip, negative=" and ".join(vocabulary.article(c) for c, _ in pairs))


METHODS: dict[str, EraseMethod] = {
    "none": lambda runner, _: EditedModel(runner.model, runner.clip),
    "negative prompt": _negative_prompt,
    "uce": closed_form("uce"),
    "rece": closed_form("rece"),
    "uce with captions": closed_form("uce", captions=CAPTIONS),
    "rece with captions": closed_form("rece", captions=CAPTIONS),
    "rece-sequential": closed_form("rece-sequential"),
    "realera": closed_form("realera"),
    "null-space": closed_form("null-space"),
    "double-projections": closed_form("double-projections"),
    "speed": closed_form("speed"),
}
"""The rows of the board."""
TRAINED: dict[str, EraseMethod] = {name: partial(_trained, name) for name in erase_trained.ROWS}
"""Rows that train for minutes: one concept at a time, fewer groups, and only with ``--trained`` or by name."""
