"""The base and every concept as rows of one model call.

Path 0 is the base model with the base prompt. Path i is the base model with concept i's low-rank branches and prompt.
The paths meet in the decoder (``merging``). Rows are recognised by the uuid of their conditioning entry, never by their
position.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field, replace
from uuid import UUID

import comfy.model_management
import comfy.samplers
import torch

from ...methods.lora import LayerLoras
from ...methods.masks import MaskPyramid
from .. import keys
from ..engine.attention import CROSS, Captured, Site, capture, find_sites
from ..engine.attention_patches import after_attention, after_transformers
from ..engine.cond_or_uncond import with_cond_or_uncond
from ..engine.model_call import ModelCall, RunCall, around_model_call, conditioning_rows, evaluate
from ..engine.reach import check_answered
from ..lora.branches import Branch, low_rank
from ..registry import unet_of
from ..types import BaseModel, Conds, ModelOptions, TransformerOptions
from .merging import Evaluation, Merging, Owner, PathRows

WHO = "Concept Conductor"
_MEMORY_MARGIN = 1.6  # the host splits a batch at 1.5 times the memory it estimates


@dataclass(frozen=True, eq=False)
class ConceptPath:
    """One path: its processed conditionings, and its factors as ``prepared`` returns them (None for the base)."""

    positive: Conds
    negative: Conds
    factors: LayerLoras | None = None
    strength: float = 1.0


@dataclass(eq=False)
class Paths:
    """All paths during one sampling; a new sampling needs new ones.

    Args:
        masks: of all concepts. ``merging`` holds them; they may be exchanged between calls.
        whole_blocks: merges the outputs of the decoder's whole transformers, residual and all, instead of their
            attentions.
        recorded_site: a self-attention to record. After a call ``maps[path]`` holds it, mean over heads, (batch,
            tokens, tokens).
    """

    model: BaseModel
    paths: Sequence[ConceptPath]
    masks: InitVar[MaskPyramid]
    whole_blocks: bool = False
    recorded_site: Site | None = None
    maps: dict[int, torch.Tensor] = field(default_factory=dict)
    calls: int = 0

    def __post_init__(self, masks: MaskPyramid) -> None:
        self.unet = unet_of(self.model)
        self.layers = {(s.block, s.depth): s.layer for s in find_sites(self.unet, CROSS)}
        self.merging = Merging(masks, len(self.paths) - 1)
        self._heard: set[int] = set()
        self._owners: dict[UUID, Owner] = {}
        self._layer_contexts: dict[UUID, torch.Tensor] = {}
        for number, path in enumerate(self.paths):
            for cond_or_uncond, conds in enumerate((path.positive, path.negative)):
                for entry in conds:
                    self._owners[entry["uuid"]] = Owner(number, cond_or_uncond, entry.get(keys.ENTRY_NUMBER, 0))
                    if keys.LAYER_CONTEXTS in entry:
                        self._layer_contexts[entry["uuid"]] = entry[keys.LAYER_CONTEXTS]

    def with_conds(self, conds: Sequence[tuple[Conds, Conds]]) -> Paths:
        """New paths with the same factors and masks, and the (positive, negative) of another sampling."""
        paths = [replace(path, positive=p, negative=n) for path, (p, n) in zip(self.paths, conds, strict=True)]
        return Paths(self.model, paths, self.merging.masks, self.whole_blocks)

    def predict(
        self, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions, negative: bool = True
    ) -> list[torch.Tensor]:
        """The base's positive and negative prediction (zeros without one) with every concept in its region.

        One model call. Where memory does not allow it, the concepts go first, and only their outputs in their regions
        are cached.
        """
        routed = self.routed(options)
        conds: list[list[Conds | None]] = [[p.positive, *([p.negative] if negative else [])] for p in self.paths]
        with self.merging.evaluating(Evaluation.OWN):
            if self._fits_one_call(conds, x, sigma):
                return _with_negative(self._evaluate([c for pair in conds for c in pair], x, sigma, routed))
            self.merging.cached_outputs = {}
            for pair in conds[1:]:
                self._evaluate(pair, x, sigma, routed)
            return _with_negative(self._evaluate(conds[0], x, sigma, routed))

    @contextlib.contextmanager
    def single_path(self, path: ConceptPath) -> Iterator[None]:
        """Inside it, every row of every call has this path's branches, and nothing is merged.

        The branches are hung up first: captures inside see the changed outputs.
        """
        branches = [] if path.factors is None else [Branch(path.factors, path.strength)]
        with self.merging.evaluating(Evaluation.SINGLE_PATH), low_rank(self.unet, branches):
            yield

    def routed(self, options: ModelOptions) -> ModelOptions:
        """A copy of the options under which every row of ours takes its path."""
        options = around_model_call(options, keys.PATHS, self._around_call)
        if not self.whole_blocks:
            options = after_attention(options, self.merging.merge)
        if self._layer_contexts:
            patches = options.setdefault("transformer_options", {}).setdefault("patches", {})
            # before others' patches of the text (an erasure by text), which would not reach these words behind them
            patches["attn2_patch"] = [self._with_layer_contexts, *patches.get("attn2_patch", ())]
        return options

    def _evaluate(
        self, conds: list[Conds | None], x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions
    ) -> list[torch.Tensor]:
        self.calls += 1
        numbers = {uuid: owner.cond_or_uncond for uuid, owner in self._owners.items()}
        own, options = with_cond_or_uncond(conds, options, numbers)
        return evaluate(self.model, own, x, sigma, options)

    def _fits_one_call(self, conds: list[list[Conds | None]], x: torch.Tensor, sigma: torch.Tensor) -> bool:
        """Whether the host will run all of it in one batch: the same kinds of conditioning, and enough memory."""
        entries = [entry for pair in conds for cond in pair for entry in cond or ()]
        parts = [p for e in entries if (p := comfy.samplers.get_area_and_mult(e, x, sigma)) is not None]
        if not all(comfy.samplers.can_concat_cond(part, parts[0]) for part in parts[1:]):
            return False
        shapes: dict[str, list[object]] = collections.defaultdict(list)
        for part in parts:
            for name, value in part.conditioning.items():
                shapes[name].append(value.size())
        needed = self.model.memory_required([len(parts) * len(x), *x.shape[1:]], cond_shapes=shapes)
        return needed * _MEMORY_MARGIN < comfy.model_management.get_free_memory(x.device)

    def _around_call(self, call: ModelCall, run: RunCall) -> torch.Tensor:
        """Around every model call: the row table, the branches of each row, and the recorded attention."""
        entries = conditioning_rows(call.transformer_options, len(call.x))
        # rows of other nodes are left out of the table, and pass untouched
        table = [PathRows(e.rows, self._owners[e.uuid], e.uuid) for e in entries if e.uuid in self._owners]
        if not table:
            return run(call)
        options = {**call.transformer_options, keys.PATH_ROWS: table}
        sites = [] if self.recorded_site is None else [self.recorded_site]
        self.merging.reached = False
        with contextlib.ExitStack() as stack:
            silent = stack.enter_context(low_rank(self.unet, self._branches(table)))
            if self.whole_blocks:
                stack.enter_context(
                    after_transformers(self.unet, lambda out, place: self.merging.merge(out, place, options))
                )
            captured = stack.enter_context(capture(self.unet, sites))
            out = run(call._replace(transformer_options=options))
        self._check_heard({row.owner.path for row in table}, silent)
        self._record_maps(table, captured)
        return out

    def _check_heard(self, paths: set[int], silent: set[str]) -> None:
        """Refuses to go on if layers of a path did not run in its first call. Later a node may answer for them."""
        if self.merging.evaluation is not Evaluation.OWN:
            return
        if not paths <= self._heard:
            check_answered(silent, WHO)
        self._heard |= paths
        self.merging.answered_by_others |= not self.merging.reached

    def _branches(self, table: Sequence[PathRows]) -> list[Branch]:
        """A branch for each run of neighbouring rows of a concept."""
        branches: list[Branch] = []
        for row in table:
            path = self.paths[row.owner.path]
            if path.factors is None or self.merging.evaluation is Evaluation.SINGLE_PATH:
                continue
            last = branches[-1] if branches else None
            if last is not None and last.factors is path.factors and last.rows.stop == row.rows.start:
                branches[-1] = Branch(path.factors, path.strength, slice(last.rows.start, row.rows.stop))
            else:
                branches.append(Branch(path.factors, path.strength, row.rows))
        return branches

    def _record_maps(self, table: Sequence[PathRows], captured: Captured) -> None:
        """The recorded attention of each path; none where another node answered for the network."""
        site = self.recorded_site
        if site is None or site not in captured.keys:
            return
        for row in table:
            if row.owner.cond_or_uncond == 0:
                self.maps[row.owner.path] = captured.probabilities(site, row.rows).mean(1)

    def _with_layer_contexts(
        self, n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options: TransformerOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompts that differ per layer (ED-LoRA), in the rows of their paths."""
        layer = self.layers[tuple(extra_options["block"]), extra_options["block_index"]]
        for row in extra_options.get(keys.PATH_ROWS, ()):
            own = self._layer_contexts.get(row.uuid)
            if own is None:
                continue
            context = context.clone()
            context[row.rows] = own[layer].to(context).repeat(context.shape[1] // own.shape[1], 1)
            value = context
        return n, context, value


def _with_negative(predictions: list[torch.Tensor]) -> list[torch.Tensor]:
    """The base's two predictions, which come first; zeros for a negative that was not evaluated."""
    return predictions[:2] if len(predictions) > 1 else [predictions[0], torch.zeros_like(predictions[0])]
