"""From words to an edit: encodes the prompts with the host's CLIP, reads the host's weights, and solves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import comfy.utils
import torch

from ...methods.choices import chosen
from ...methods.erase.blocks import WIDE, joined_problems, within_span
from ...methods.erase.diagnose import measure
from ...methods.erase.edit import KEYS_AND_VALUES, Edit
from ...methods.erase.fingerprint import clip_fingerprint
from ...methods.erase.lowrank import LowRank
from ...methods.erase.problem import Encode, Problem, SolverSettings, pooled_problem, problem_of
from ...methods.erase.records import EditReport, EditSpec
from ...methods.erase.solvers import SOLVERS, solve
from ...methods.erase.spec import Erased, Preserved, checked_lists
from ...methods.erase.truncate import AUTOMATIC, shortened_solution
from ..registry import text_entry_of
from ..text.weights import without_weights
from ..types import CLIP, ModelPatcher
from .entry.rows import conditioning_rows, encoders_of
from .weights import (
    base_fingerprint,
    check_clip_width,
    energy_within,
    no_pooled,
    pooled_key,
    sampled_keys,
    text_keys,
    weight_energy,
)

_NARROW = 1280  # up to this width the margin takes about a second; beyond it, Probe Erasure measures it


@dataclass(frozen=True)
class SolveRequest:
    """How to solve.

    Attributes:
        solver: a name of ``SOLVERS``, with its ``settings``.
        targets, blocks: the projections to edit, as in ``Edit``.
        pooled: whether the pooled embedding is edited too.
        rank: the largest rank; ``AUTOMATIC`` cuts what hardly matters, 0 keeps all.
    """

    solver: str = "uce"
    settings: SolverSettings = field(default_factory=SolverSettings)
    targets: tuple[str, ...] = KEYS_AND_VALUES
    blocks: str = ""
    pooled: bool = False
    rank: int = AUTOMATIC


def lists_without_weights(erased: Erased | None, preserved: Preserved | None) -> tuple[Erased | None, Preserved | None]:
    """Both lists with the words that the host reads in them: pasted prompts may hold weights and escaped brackets."""
    return (
        None if erased is None else erased.mapped(without_weights),
        None if preserved is None else preserved.mapped(without_weights),
    )


def solve_erasure(
    model: ModelPatcher,
    clip: CLIP,
    erased: Erased | None,
    preserved: Preserved | None,
    request: SolveRequest = SolveRequest(),
    encode: Encode | None = None,
) -> Edit:
    """The edit that takes every concept of the list to its anchor. Preserves the other list and the empty prompt.

    Args:
        encode: an encoder that already knows some of the prompts.

    Raises:
        ValueError: a prompt cannot be used, the MODEL has no layer that is known to read it, or the CLIP is not the
            model's own or has a schedule.
    """
    concepts, entries = checked_lists(*lists_without_weights(erased, preserved))
    # before any prompt, since the encoders of models without cross-attention cut prompts in other ways
    keys = text_keys(model, request.targets, request.blocks)
    if request.pooled and text_entry_of(model) is not None and pooled_key(model) is None:
        raise no_pooled("The pooled text embedding would be edited", "or use such a model")
    encoders = encoders_of(model, clip) if encode is None else [encode]
    check_clip_width(model, encoders[0]("").tokens.shape[-1])
    spec = _spec_of(concepts, entries, request, clip.layer_idx)
    if not concepts:
        return Edit(spec=spec)
    whole = encoders[0] if encode or text_entry_of(model) is None else partial(conditioning_rows, clip)
    edit = _solved_edit(model, keys, encoders, concepts, entries, request)
    return replace(edit, clip=clip_fingerprint(whole), spec=spec)


def _solved_edit(
    model: ModelPatcher,
    keys: Sequence[str],
    encoders: Sequence[Encode],
    concepts: Sequence[Erased],
    preserved: Sequence[Preserved],
    request: SolveRequest,
) -> Edit:
    rows = chosen(SOLVERS, request.solver, "solver").published_rows
    problem = joined_problems([problem_of(e, concepts, preserved, published_rows=rows) for e in encoders])
    text, report = _solved_text(model, keys, problem, request, [c.concept for c in concepts])
    pooled = None
    if request.pooled:
        pooled = _solved_pooled(pooled_problem(encoders[0], concepts, preserved), request)
        note = f"the pooled embedding is edited too, which sets the style of the picture (rank {pooled.rank})"
        report["notes"].append(note)
    edit = Edit(text, pooled, targets=request.targets, blocks=request.blocks, base=base_fingerprint(model))
    if entry := text_entry_of(model):
        edit = replace(edit, entry=tuple(keys), through=entry.through)
    return replace(edit, report=report)


def _solved_text(
    model: ModelPatcher, keys: Sequence[str], problem: Problem, request: SolveRequest, names: Sequence[str]
) -> tuple[LowRank, EditReport]:
    """M of the text embedding in float32, and what was measured."""
    every_weight = chosen(SOLVERS, request.solver, "solver").every_weight
    if problem.width > WIDE:
        return _solved_wide(model, keys, problem, request, names)
    needed = keys if every_weight else sampled_keys(keys)
    progress = comfy.utils.ProgressBar(len(needed) + 1)
    problem = problem._replace(energy=weight_energy(model, needed, progress))
    solution = solve(request.solver, problem, request.settings)
    short = shortened_solution(solution, problem.Q(), request.rank)
    report = measure(problem, names, solution, short, margins=every_weight or problem.width <= _NARROW)
    progress.update(1)
    return short.M.to(torch.float32), report


def _solved_wide(
    model: ModelPatcher, keys: Sequence[str], problem: Problem, request: SolveRequest, names: Sequence[str]
) -> tuple[LowRank, EditReport]:
    """The same in the coordinates of the problem's own rows: nothing is as large as the square of the width."""
    within = within_span(problem)
    Q, size = energy_within(model, keys, within.basis)
    problem = within.problem._replace(energy=Q)
    solution = solve(request.solver, problem, request.settings)
    short = shortened_solution(solution, Q, request.rank)
    report = measure(problem, names, solution, short, margins=False, size=size)
    return within.lifted(short.M).to(torch.float32), report


def _solved_pooled(problem: Problem, request: SolveRequest) -> LowRank:
    """M of the pooled embedding in float32. The other solvers do not apply to single rows."""
    solver = "null-space" if request.solver == "null-space" else "uce"
    return solve(solver, problem, request.settings).M.to(torch.float32)


def _spec_of(
    concepts: Sequence[Erased], preserved: Sequence[Preserved], request: SolveRequest, clip_skip: int | None
) -> EditSpec:
    return {
        "erase": [concept.record() for concept in concepts],
        "preserve": [entry.record() for entry in preserved],
        "solver": request.solver,
        "settings": request.settings.given(),
        "targets": list(request.targets),
        "blocks": request.blocks,
        "pooled": request.pooled,
        "rank": request.rank,
        "clip_skip": clip_skip,
    }
