"""The base and every concept as rows of one model call.

Path 0 is the base model with the base prompt. Path i is the base model with concept i's low-rank branches and prompt.
The paths meet inside the network (``merging``, ``networks``). Rows are recognised by the uuid of their conditioning
entry, never by their position.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import InitVar, dataclass, field, replace
from uuid import UUID

import comfy.model_management
import comfy.samplers
import torch

from ...methods.conduct.settings import WHO, Meeting
from ...methods.lora import LayerLoras
from ...methods.masks import MaskPyramid
from .. import keys
from ..engine.attention import CROSS, find_sites
from ..engine.attention_patches import OutputSite
from ..engine.cond_or_uncond import with_cond_or_uncond
from ..engine.model_call import ModelCall, RunCall, around_model_call, conditioning_rows, evaluate
from ..engine.reach import check_answered, unanswered
from ..lora.branches import Branch, low_rank
from ..registry import has_decoder, unet_of
from ..text.equal_lengths import with_equal_lengths
from ..types import BaseModel, Conds, ModelOptions, TransformerOptions
from .merging import Evaluation, Merging, Owner, PathRows
from .networks.interface import PathNetwork, Recorded
from .networks.transformer import TransformerPaths
from .networks.unet import UNetPaths

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
        meeting: at which outputs of the network they meet.
        records: whether the attention between image tokens is recorded. After a call ``maps[path]`` holds it, mean over
            heads, (batch, tokens, tokens), and ``map_grid`` its grid.
    """

    model: BaseModel
    paths: Sequence[ConceptPath]
    masks: InitVar[MaskPyramid]
    meeting: Meeting = field(default_factory=Meeting)
    records: bool = False
    maps: dict[int, torch.Tensor] = field(default_factory=dict)
    map_grid: tuple[int, int] = (0, 0)
    calls: int = 0

    def __post_init__(self, masks: MaskPyramid) -> None:
        make = UNetPaths if has_decoder(self.model) else TransformerPaths
        self.network: PathNetwork = make(self.model)
        self.merging = Merging(masks.with_side(self.network.patch), len(self.paths) - 1)
        self._heard: set[int] = set()
        self._owners: dict[UUID, Owner] = {}
        self._layer_contexts: dict[UUID, torch.Tensor] = {}
        for number, path in enumerate(self.paths):
            for cond_or_uncond, conds in enumerate((path.positive, path.negative)):
                for entry in conds:
                    self._owners[entry["uuid"]] = Owner(number, cond_or_uncond, entry.get(keys.ENTRY_NUMBER, 0))
                    if keys.LAYER_CONTEXTS in entry:
                        self._layer_contexts[entry["uuid"]] = entry[keys.LAYER_CONTEXTS]
        sites = find_sites(unet_of(self.model), CROSS) if self._layer_contexts else []
        self.layers = {(s.block, s.depth): s.layer for s in sites}

    def with_conds(self, conds: Sequence[tuple[Conds, Conds]]) -> Paths:
        """New paths with the same factors and masks, and the (positive, negative) of another sampling."""
        paths = [replace(path, positive=p, negative=n) for path, (p, n) in zip(self.paths, conds, strict=True)]
        return Paths(self.model, paths, self.merging.masks, self.meeting)

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
            whole, together = self._equally_long([c for pair in conds for c in pair], x, sigma, routed)
            if self._fits_one_call(whole, x, sigma):
                return _with_negative(self._evaluate(whole, x, sigma, together))
            self.merging.cached_outputs = {}
            for pair in (*conds[1:], conds[0]):
                own, apart = self._equally_long(pair, x, sigma, routed)
                predictions = self._evaluate(own, x, sigma, apart)
            return _with_negative(predictions)

    def _equally_long(
        self, conds: list[Conds | None], x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions
    ) -> tuple[list[Conds | None], ModelOptions]:
        return with_equal_lengths(self.model, conds, x, sigma, options)

    @contextlib.contextmanager
    def single_path(self, path: ConceptPath) -> Iterator[None]:
        """Inside it, every row of every call has this path's branches, and nothing is merged.

        The branches are hung up first: captures inside see the changed outputs.
        """
        branches = [] if path.factors is None else [Branch(path.factors, path.strength)]
        with self.merging.evaluating(Evaluation.SINGLE_PATH), low_rank(self.network.network, branches):
            yield

    def routed(self, options: ModelOptions) -> ModelOptions:
        """A copy of the options under which every row of ours takes its path."""
        options = around_model_call(options, keys.PATHS, self._around_call)
        options = self.network.routed(options, self.merging.merge, self.meeting)
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

    def _fits_one_call(self, conds: list[Conds | None], x: torch.Tensor, sigma: torch.Tensor) -> bool:
        """Whether the host will run all of it in one batch: the same kinds of conditioning, and enough memory."""
        entries = [entry for cond in conds for entry in cond or ()]
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
        self.network.enter(call)
        entries = conditioning_rows(call.transformer_options, len(call.x))
        # rows of other nodes are left out of the table, and pass untouched
        table = [PathRows(e.rows, self._owners[e.uuid], e.uuid) for e in entries if e.uuid in self._owners]
        if not table:
            return run(call)
        call = call._replace(transformer_options={**call.transformer_options, keys.PATH_ROWS: table})
        if self.merging.evaluation is Evaluation.SINGLE_PATH:
            return run(call)
        self.merging.reached = False
        with contextlib.ExitStack() as stack:
            silent = stack.enter_context(low_rank(self.network.network, self._branches(table, len(call.x))))
            missed = stack.enter_context(self._meeting(call))
            seen: Recorded | None = None
            if self.records:
                call, seen = stack.enter_context(self.network.recording(call))
            out = run(call)
        self._check_heard({row.owner.path for row in table}, silent | missed)
        self._record_maps(table, seen)
        return out

    def _meeting(self, call: ModelCall) -> AbstractContextManager[set[str]]:
        """Inside it, the paths of this call meet. Yields the places at which they have not met."""

        def change(output: torch.Tensor, place: OutputSite) -> torch.Tensor:
            return self.merging.merge(output, place, call.transformer_options)

        return self.network.merging(change, self.meeting)

    def recorded(
        self, predict: Callable[[ModelOptions], object], options: ModelOptions
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """The attention between image tokens in another prediction, (rows, tokens, tokens), and its grid.

        Args:
            predict: makes one model call under the options that it gets.

        Raises:
            ValueError: another node answered for the network.
        """
        found: list[Recorded] = []

        def around(call: ModelCall, run: RunCall) -> torch.Tensor:
            self.network.enter(call)
            with self.network.recording(call) as (changed, seen):
                found.append(seen)
                return run(changed)

        predict(around_model_call(options, keys.PATHS, around))
        attention = found[0].attention(slice(None)) if found else None
        if attention is None:
            raise unanswered(options)
        return attention, found[0].grid

    def _check_heard(self, paths: set[int], silent: set[str]) -> None:
        """Refuses to go on if layers did not run in a path's first call. Later a node may answer for them."""
        if self.merging.evaluation is not Evaluation.OWN:
            return
        if not paths <= self._heard:
            check_answered(silent, WHO)
        self._heard |= paths
        self.merging.answered_by_others |= not self.merging.reached

    def _branches(self, table: Sequence[PathRows], count: int) -> list[Branch]:
        """A branch for each run of neighbouring rows of a concept, in a call of ``count`` rows."""
        branches: list[Branch] = []
        tokens = self.network.whole_rows(count)
        for row in table:
            path = self.paths[row.owner.path]
            if path.factors is None:
                continue
            last = branches[-1] if branches else None
            if last is not None and last.factors is path.factors and last.rows.stop == row.rows.start:
                branches[-1] = replace(last, rows=slice(last.rows.start, row.rows.stop))
            else:
                branches.append(Branch(path.factors, path.strength, row.rows, tokens))
        return branches

    def _record_maps(self, table: Sequence[PathRows], seen: Recorded | None) -> None:
        """The recorded attention of each path; none where another node answered for the network."""
        for row in table:
            attention = None if seen is None or row.owner.cond_or_uncond else seen.attention(row.rows)
            if seen is not None and attention is not None:
                self.maps[row.owner.path], self.map_grid = attention, seen.grid

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
