"""What a model answers while several concepts stand in regions: LoRA-Composer's one path (2403.11627, sec. 4.1 and 4.2).

Cross-attention: in a region the base's queries read the concept's keys and values, computed once a run, and the concept's part
of ``to_out`` is added. Self-attention: a region's queries read their own tokens and the background's, as a subset of the keys.
Rows are told apart by the uuid the host gives every conditioning entry; rows that are not ours are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import comfy.model_patcher
import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import optimized_attention

from ...methods.lora import LoraFactors, low_rank_change
from ...methods.masks import MaskPyramid
from .. import keys
from ..engine.attention import CROSS, SELF, Site, sites_of, unet_of
from ..engine.attention_patches import Attend, OutputSite, after_attention, override_attention
from ..lora.branches import Branch, low_rank, unknown_grid

_KEYS, _VALUES, _OUT = "attn2.to_k", "attn2.to_v", "attn2.to_out.0"
_COARSEST = 32  # times a token of the coarsest grid may stand for a cell of the latent


class Words(NamedTuple):
    """A concept's prompts: (layers or 1, tokens, channels) for the positive and the negative, and the phrase's positions."""

    positive: torch.Tensor
    negative: torch.Tensor
    phrase: tuple[int, ...]


class Cached(NamedTuple):
    """Keys and values of one concept at one site, (1, tokens, heads · channels)."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class Voice:
    """A concept as it is heard in its regions. ``factors`` are of ``lowrank.prepared``."""

    words: Words
    factors: Mapping[str, LoraFactors]
    strength: float = 1.0


@dataclass(eq=False)
class Injection:
    """Everything one sampling needs; made anew for each.

    Args:
        voices: one a region; the same object in two regions is computed once.
        sides: uuid of a conditioning entry to 0 (positive) or 1 (negative).
    """

    model: Any
    voices: Sequence[Voice]
    masks: MaskPyramid
    sides: Mapping[Any, int]
    isolation: bool = True
    token_lora: bool = False
    cached: dict[tuple[int, Site, int], Cached] = field(default_factory=dict)
    _added: dict[tuple[tuple[str, int], int], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unet = unet_of(self.model)
        self.sites = sites_of(self.unet)
        names = {id(module): name for name, module in self.unet.named_modules()}
        self.paths = {site: names[id(site.module(self.unet))] for site in self.sites}

    def options(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """A copy of the options under which the concepts stand in their regions."""
        sites = [s for s in self.sites if s.kind == CROSS or (self.isolation and len(self.voices) > 1)]
        options = override_attention(model_options, self.unet, sites, self._answer)
        options = after_attention(options, self._after)
        kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        comfy.patcher_extension.add_wrapper_with_key(kind, keys.COMPOSER, self._call, options, is_model_options=True)
        return options

    def _call(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        """Around every model call: the sides of its rows, and the rest of the LoRAs on the tokens of their regions."""
        told = transformer_options or {}
        uuids = told.get("uuids", ())
        if not uuids or any(uuid not in self.sides for uuid in uuids):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        told = {
            **told,
            keys.CONCEPT_COND_OR_UNCOND: [self.sides[uuid] for uuid in uuids],
            keys.BASE_WEIGHT: self._share,
        }
        self._added.clear()
        with low_rank(self.unet, self._branches(*x.shape[-2:]) if self.token_lora else ()):
            return executor(x, t, c_concat, c_crossattn, control, told, **kwargs)

    def _share(self, grid: tuple[int, int]) -> torch.Tensor:
        return self.masks.weights(grid)[0]

    def _branches(self, height: int, width: int) -> list[Branch]:
        """Each LoRA without what cross-attention has already had, on the tokens of its region."""
        grids, grid = [(height, width)], (height, width)
        while max(grid) > 1 and len(grids) < _COARSEST.bit_length():
            grid = (-(-grid[0] // 2), -(-grid[1] // 2))
            grids.append(grid)
        done = (_KEYS, _VALUES, _OUT)
        return [
            Branch(
                {path: f for path, f in voice.factors.items() if not path.endswith(done)}, voice.strength,
                tokens={h * w: self.masks.weights((h, w))[n] for h, w in reversed(grids)},
            )
            for n, voice in enumerate(self.voices, 1)
        ]  # fmt: skip

    def _answer(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site, extra: dict[str, Any], attend: Attend
    ) -> torch.Tensor:
        """In the place of one attention; q, k, v are (rows, tokens, heads · channels).

        Raises:
            ValueError: the queries are not those of the picture's own grid.
        """
        # a self-attention laid over ours for one call (perturbed attention guidance) is meant for regions too
        if (
            keys.CONCEPT_COND_OR_UNCOND not in extra
            or not self.voices
            or (site.kind == SELF and getattr(attend, "later", False))
        ):
            return attend(q, k, v)
        grid = grid_of(q, extra)
        tokens = self.masks.tokens(grid)
        weights = self.masks.weights(grid).to(q)
        out = _background(q, k, v, tokens[0], attend)
        out = out * weights[0, :, None]
        if site.kind == SELF:
            parts = self._isolated(q, k, v, grid, tokens, site, extra)
        else:
            parts = self._injected(q, tokens, site, extra)
        added = torch.zeros(())
        for n, (own, h) in enumerate(zip(tokens[1:], parts, strict=True), 1):
            h = h * weights[n, own, None]
            out = out.index_add(1, own, h)
            if site.kind == CROSS:
                added = added + self._out_part(self.voices[n - 1], site, h, own, q.shape[1])
        if site.kind == CROSS and added.ndim:
            self._added[site.block, site.depth] = added
        return out

    def _isolated(self, q, k, v, grid, tokens, site, extra) -> list[torch.Tensor]:
        pairs = zip(tokens[1:], self.masks.readable(grid), strict=True)
        return [self._attention(q[:, own], k[:, read], v[:, read], site, extra) for own, read in pairs]

    def _injected(self, q, tokens, site, extra) -> list[torch.Tensor]:
        size = q.shape[0] // len(extra[keys.CONCEPT_COND_OR_UNCOND])
        out = []
        for voice, own in zip(self.voices, tokens[1:], strict=True):
            both = [self.of(voice, site, side) for side in extra[keys.CONCEPT_COND_OR_UNCOND]]
            if len({c.keys.shape[1] for c in both}) == 1:
                k, v = (torch.cat([t.expand(size, -1, -1) for t in ts]) for ts in zip(*both, strict=True))
                out.append(self._attention(q[:, own], k, v, site, extra))
                continue
            chunks = [
                self._attention(rows[:, own], c.keys.expand(size, -1, -1), c.values.expand(size, -1, -1), site, extra)
                for rows, c in zip(q.split(size), both, strict=True)
            ]
            out.append(torch.cat(chunks))
        return out

    def _attention(self, q, k, v, site, extra) -> torch.Tensor:
        module = site.module(self.unet)
        return optimized_attention(
            q, k, v, module.heads, attn_precision=module.attn_precision, transformer_options=extra
        )

    def _out_part(self, voice: Voice, site: Site, h: torch.Tensor, own: torch.Tensor, count: int) -> torch.Tensor:
        """What the concept adds to the answer of ``to_out``, (rows, tokens, channels); nothing is a scalar."""
        factors = voice.factors.get(f"{self.paths[site]}.to_out.0")
        if factors is None or voice.strength == 0:
            return torch.zeros(())
        part = _branch(h, factors, voice.strength)
        return part.new_zeros(part.shape[0], count, part.shape[-1]).index_add(1, own, part)

    def _after(self, output: torch.Tensor, place: OutputSite, extra: dict[str, Any]) -> torch.Tensor:
        added = self._added.pop((place.block, place.depth), None) if place.kind == CROSS else None
        return output if added is None else output + added.to(output)

    def of(self, voice: Voice, site: Site, side: int) -> Cached:
        """Keys and values of a concept at a site; they do not depend on the picture, so they are computed once."""
        key = (id(voice), site, side)
        if key not in self.cached:
            context = (voice.words.positive, voice.words.negative)[side]
            context = context[site.layer if len(context) > 1 else 0][None]
            module = site.module(self.unet)
            keys, values = (
                _linear(getattr(module, name), context, voice.factors.get(f"{self.paths[site]}.{name}"), voice.strength)
                for name in ("to_k", "to_v")
            )
            self.cached[key] = Cached(keys, values)
        return self.cached[key]

    def fill(self) -> None:
        """Computes all keys and values, as ordinary tensors that a gradient may pass."""
        with torch.inference_mode():
            for voice in self.voices:
                for site in self.sites:
                    for side in (0, 1) if site.kind == CROSS else ():
                        self.of(voice, site, side)
        with torch.inference_mode(False):
            self.cached = {key: Cached(c.keys.clone(), c.values.clone()) for key, c in self.cached.items()}

    def look(self, q: torch.Tensor, site: Site, voice: Voice) -> torch.Tensor:
        """Where the concept's phrase is seen by queries of positive rows, (rows, words, tokens), mean over heads."""
        heads = site.module(self.unet).heads
        k = self.of(voice, site, 0).keys.to(q)
        q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2).float() for t in (q, k))
        seen = (
            (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)
        )  # (rows, tokens, words of the prompt)
        return seen[..., list(voice.words.phrase)].transpose(1, 2)

    def mask(self, grid: tuple[int, int]) -> torch.Tensor:
        """Which keys each query may read, (tokens, tokens) of bool: only for the small maps of the losses."""
        inside = self.masks.inside(grid)
        allowed = inside.new_ones(inside.shape[1], inside.shape[1])
        for own, readable in zip(inside, self.masks.readable(grid), strict=True) if self.isolation else ():
            allowed[own] &= torch.zeros_like(own).index_fill(0, readable, True)
        return allowed


def grid_of(q: torch.Tensor, extra: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the picture at an attention with these queries (rows, tokens, channels).

    Raises:
        ValueError: there are more or fewer queries than places.
    """
    height, width = (int(side) for side in extra["activations_shape"][-2:])
    if q.shape[1] != height * width:
        raise unknown_grid(q.shape[1], [height * width])
    return height, width


def _background(q, k, v, own, attend) -> torch.Tensor:
    """The attention as it was; where the slot is ours, only of the queries that need it."""
    if getattr(attend, "foreign", False) or len(own) == q.shape[1]:
        return attend(q, k, v)
    out = torch.zeros_like(q[..., : v.shape[-1]])
    return out.index_add(1, own, attend(q[:, own], k, v)) if len(own) else out


def _branch(x: torch.Tensor, factors: LoraFactors, strength: float) -> torch.Tensor:
    down, up, scale = factors.to(x)
    return low_rank_change(x, down, up) * (strength * scale)


def _linear(layer: Any, x: torch.Tensor, factors: LoraFactors | None, strength: float) -> torch.Tensor:
    """The layer's own answer, however its weights are kept, with the concept's branch."""
    y = layer(x)
    return y if factors is None or strength == 0 else y + _branch(x, factors, strength).to(y)
