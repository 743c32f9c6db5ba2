"""The base and every concept as rows of one model call, and their meeting in the decoder's attentions.

Path 0 is the base model with the base prompt; path i is the base model with concept i's low-rank branches and prompt. After
each attention of the decoder the base takes over what a path answers inside its region (Concept Conductor, 2408.03632).
Rows are told apart by the uuid the host gives every conditioning entry, never by their position.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch

from ...methods.lora import LoraFactors
from .. import keys
from ..engine.attention import CROSS, Captured, Site, capture, find_sites, unet_of
from ..engine.attention_patches import OutputSite, after_attention, after_transformers
from ..lora.branches import Branch, low_rank

log = logging.getLogger(__name__)


Conds = list[dict[str, Any]]
_MARGIN = 1.6  # the host splits a batch at 1.5 times the memory it estimates


class Masks(Protocol):
    """Masks at any grid, background first: (…, 1 + concepts, height, width), summing to one."""

    soft: bool

    def at(self, height: int, width: int) -> torch.Tensor: ...


class Rows(NamedTuple):
    """Which rows of a model call belong to what: ``side`` is 0 for the positive, 1 for the negative."""

    rows: slice
    path: int
    side: int
    uuid: Any


@dataclass(frozen=True, eq=False)
class Path:
    """One path: its processed conditionings, and its low-rank factors as ``lowrank.prepared`` gives them (None for the base)."""

    positive: Conds
    negative: Conds
    factors: Mapping[str, LoraFactors] | None = None
    strength: float = 1.0


@dataclass(eq=False)
class Paths:
    """All paths during one sampling; made anew for each.

    ``deep`` takes over what whole transformers of the decoder answer, residual and all, instead of their attentions alone.
    ``masks`` may be exchanged between calls. ``merging`` is whether the base takes anything over at the moment. ``look_at``
    asks for the self-attention there: after a call ``maps[path]`` holds it, mean over heads, (batch, tokens, tokens).
    """

    model: Any
    paths: Sequence[Path]
    masks: Masks
    deep: bool = False
    merging: bool = True
    look_at: Site | None = None
    maps: dict[int, torch.Tensor] = field(default_factory=dict)
    calls: int = 0

    def __post_init__(self) -> None:
        self.unet = unet_of(self.model)
        self.layers = {(s.block, s.depth): s.layer for s in find_sites(self.unet, CROSS)}
        self._store: dict[tuple[int, int, OutputSite], tuple[torch.Tensor, torch.Tensor]] | None = None
        self._asking = self._told = self._whole = False
        self._owner: dict[Any, tuple[int, int]] = {}
        for number, path in enumerate(self.paths):
            for side, conds in enumerate((path.positive, path.negative)):
                self._owner |= {entry["uuid"]: (number, side) for entry in conds}
        self._contexts = {
            e["uuid"]: e[keys.LAYER_CONTEXTS]
            for p in self.paths
            for e in (*p.positive, *p.negative)
            if keys.LAYER_CONTEXTS in e
        }

    def predict(
        self, x: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any], negative: bool = True
    ) -> list[torch.Tensor]:
        """The base's positive and negative prediction (zeros without one) with every concept in its region.

        One model call; where memory does not allow it, the concepts first, of which only what lies in their regions is kept.
        """
        routed = self.routed(options)
        asked = [[p.positive, *([p.negative] if negative else [])] for p in self.paths]
        self._asking = True
        try:
            if self._fits_one_call(asked, x, sigma):
                return self._padded(self._ask([c for conds in asked for c in conds], x, sigma, routed))
            self._store = {}
            for conds in asked[1:]:
                self._ask(conds, x, sigma, routed)
            return self._padded(self._ask(asked[0], x, sigma, routed))
        finally:
            self._store, self._asking = None, False

    @contextlib.contextmanager
    def alone(self, path: Path) -> Iterator[None]:
        """Inside it, every row of every call has this path's branches, and nothing is taken over: for looking at one path.

        They hang there before anything that is hung up inside, so that who captures sees what they have changed.
        """
        before = self.merging
        self.merging, self._whole = False, True
        try:
            with low_rank(self.unet, [] if path.factors is None else [Branch(path.factors, path.strength)]):
                yield
        finally:
            self.merging, self._whole = before, False

    def routed(self, options: dict[str, Any]) -> dict[str, Any]:
        """A copy of the options under which every row of ours goes its path."""
        options = (
            comfy.model_patcher.create_model_options_clone(options)
            if self.deep
            else after_attention(options, self._merge)
        )
        if self._contexts:
            patches = options.setdefault("transformer_options", {}).setdefault("patches", {})
            patches["attn2_patch"] = [*patches.get("attn2_patch", ()), self._layer_contexts]
        comfy.patcher_extension.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.APPLY_MODEL, keys.PATHS, self._call, options, is_model_options=True
        )
        return options

    def _ask(
        self, conds: list[Conds], x: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any]
    ) -> list[torch.Tensor]:
        self.calls += 1
        other = options.get("sampler_calc_cond_batch_function")
        if other is None:
            return comfy.samplers.calc_cond_batch(self.model, conds, x, sigma, options)
        return other({"conds": conds, "input": x, "sigma": sigma, "model": self.model, "model_options": options})

    @staticmethod
    def _padded(out: list[torch.Tensor]) -> list[torch.Tensor]:
        return out[:2] if len(out) > 1 else [out[0], torch.zeros_like(out[0])]

    def _fits_one_call(self, asked: list[list[Conds]], x: torch.Tensor, sigma: torch.Tensor) -> bool:
        """Whether the host will run all of it in one batch: the same kinds of conditioning, and enough memory."""
        entries = [entry for conds in asked for cond in conds for entry in cond]
        parts = [p for e in entries if (p := comfy.samplers.get_area_and_mult(e, x, sigma)) is not None]
        if not all(comfy.samplers.can_concat_cond(part, parts[0]) for part in parts[1:]):
            return False
        shapes: dict[str, list[Any]] = collections.defaultdict(list)
        for part in parts:
            for name, value in part.conditioning.items():
                shapes[name].append(value.size())
        needed = self.model.memory_required([len(parts) * len(x), *x.shape[1:]], cond_shapes=shapes)
        return needed * _MARGIN < comfy.model_management.get_free_memory(x.device)

    def _call(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        """Around every model call: the row table, the branches of each row, and what is to be looked at."""
        table = self._table(transformer_options or {}, len(x))
        if not table:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        numbers = list(transformer_options.get("cond_or_uncond") or [0] * len(transformer_options["uuids"]))
        for row in table:
            numbers[row.rows.start // (row.rows.stop - row.rows.start)] = row.side  # other packs know 0 and 1 only
        told = {**transformer_options, keys.PATH_ROWS: table, "cond_or_uncond": numbers}
        with contextlib.ExitStack() as stack:
            stack.enter_context(low_rank(self.unet, self._branches(table)))
            if self.deep:
                stack.enter_context(after_transformers(self.unet, lambda out, place: self._merge(out, place, told)))
            seen = stack.enter_context(capture(self.unet, self._sites()))
            out = executor(x, t, c_concat, c_crossattn, control, told, **kwargs)
        self._keep_maps(table, seen)
        return out

    def _table(self, options: dict[str, Any], rows: int) -> list[Rows]:
        """Our rows of the running call; those that another node has put beside them are left out, and pass untouched."""
        uuids = options.get("uuids", ())
        size = rows // max(len(uuids), 1)
        table = [(slice(n * size, (n + 1) * size), u) for n, u in enumerate(uuids) if u in self._owner]
        return [Rows(part, *self._owner[u], u) for part, u in table]

    def _branches(self, table: list[Rows]) -> list[Branch]:
        """A branch for each run of neighbouring rows of a concept."""
        branches: list[Branch] = []
        for row in table:
            path = self.paths[row.path]
            if path.factors is None or self._whole:
                continue
            last = branches[-1] if branches else None
            if last is not None and last.factors is path.factors and last.rows.stop == row.rows.start:
                branches[-1] = Branch(path.factors, path.strength, slice(last.rows.start, row.rows.stop))
            else:
                branches.append(Branch(path.factors, path.strength, row.rows))
        return branches

    def _sites(self) -> list[Site]:
        return [] if self.look_at is None else [self.look_at]

    def _keep_maps(self, table: list[Rows], seen: Captured) -> None:
        for site in self._sites():
            for row in table:
                if row.side == 0:
                    self.maps[row.path] = seen.probabilities(site, row.rows).mean(1)

    def _layer_contexts(self, n, context, value, extra_options):
        """Prompts that differ from layer to layer (ED-LoRA) in the rows of their paths."""
        layer = self.layers[tuple(extra_options["block"]), extra_options["block_index"]]
        for row in extra_options.get(keys.PATH_ROWS, ()):
            own = self._contexts.get(row.uuid)
            if own is None:
                continue
            context = context.clone()
            context[row.rows] = own[layer].to(context).repeat(context.shape[1] // own.shape[1], 1)
            value = context
        return n, context, value

    def _merge(self, output: torch.Tensor, place: OutputSite, extra_options: dict[str, Any]) -> torch.Tensor:
        """After an attention of the decoder: h ← Σ M_i h_i in the rows of the base (2408.03632)."""
        table = extra_options.get(keys.PATH_ROWS)
        if not table or not self.merging or place.block[0] != "output" or len(self.paths) < 2:
            return output
        masks = self.masks.at(*place.grid).to(output.device).flatten(-2)  # (…, 1 + N, tokens)
        found = {(row.path, row.side): output[row.rows] for row in table if row.path}
        if self._store is not None:
            for (path, side), h in found.items():
                kept = (masks[..., path, :] > 0).reshape(-1, masks.shape[-1]).any(0).nonzero().flatten()
                self._store[path, side, place] = (kept, h[:, kept])
        for row in table:
            if row.path == 0:
                self._take_over(output[row.rows], row.side, place, masks, found)
        return output

    def _take_over(self, base, side, place, masks, found) -> None:
        """Writes into the base's rows (batch, tokens, channels) what the concepts answer in their regions."""
        answers: list[torch.Tensor] = []
        for path in range(1, len(self.paths)):
            h = found.get((path, side))
            if h is None:
                h = self._stored(base, (path, side, place))
            if h is None:
                return  # before anything is written: a base that is asked alone stays whole
            answers.append(h)
        soft = self.masks.soft
        if soft:
            base.mul_(masks[..., 0, :, None].to(base.dtype))
        for path, h in enumerate(answers, 1):
            mask = masks[..., path, :, None]
            base.copy_(torch.addcmul(base, mask.to(base.dtype), h) if soft else torch.where(mask > 0, h, base))

    def _stored(self, base: torch.Tensor, key: tuple[int, int, OutputSite]) -> torch.Tensor | None:
        if self._store is not None and key in self._store:
            kept, h = self._store[key]
            return base.index_copy(1, kept, h)
        if self._asking:
            raise RuntimeError("The concepts and the base were torn apart in the model call; please report this graph.")
        if not self._told:
            self._told = True
            log.warning("Another node asks the model for the base alone; the concepts are not in that answer.")
        return None
