"""The attentions of a UNet: where they are, what they look at, and a place to change what they answer.

Queries and keys are read by forward hooks on the projections, after anything that changes them (low-rank branches, other
packs' contexts), so that the model's own attention is computed as ever and no single slot of the host is taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import comfy.model_patcher
import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import SpatialTransformer, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample

SELF, CROSS = "self", "cross"
_MODULES = {SELF: "attn1", CROSS: "attn2"}


class Site(NamedTuple):
    """One attention of a UNet.

    ``block`` is the host's name and number (``("output", 3)``), ``depth`` the transformer block inside it, ``kind`` is
    ``self`` or ``cross``, ``factor`` how many latent cells of a side one token stands for, and ``layer`` counts the
    transformer blocks in the order they run (the layer of a layer-wise prompt).
    """

    block: tuple[str, int]
    depth: int
    kind: str
    factor: int
    layer: int

    def module(self, unet: UNetModel) -> Any:
        """The attention module itself."""
        block = _transformer(unet, self.block).transformer_blocks[self.depth]
        return getattr(block, _MODULES[self.kind])


def unet_of(model: Any) -> UNetModel:
    """The UNet inside the host's model.

    Raises:
        ValueError: the model is built in another way (Flux, SD3, …).
    """
    unet = getattr(model, "diffusion_model", model)
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"This needs a UNet model (SD 1.x, SD 2.x, SDXL), and this one is a {type(unet).__name__}; load such a checkpoint."
        )
    return unet


def sites_of(unet: UNetModel) -> list[Site]:
    """Every attention in the order it runs: first the self-, then the cross-attention of a transformer block."""
    sites: list[Site] = []
    factor, layer = 1, 0
    for block, modules in _blocks(unet):
        for module in modules:
            if isinstance(module, SpatialTransformer):
                for depth in range(len(module.transformer_blocks)):
                    sites += [Site(block, depth, kind, factor, layer) for kind in (SELF, CROSS)]
                    layer += 1
            elif isinstance(module, Downsample):
                factor *= 2
            elif isinstance(module, Upsample):
                factor //= 2
    return sites


def find_sites(
    unet: UNetModel, kind: str | None = None, block: str | None = None, factor: int | None = None
) -> list[Site]:
    """The sites of that kind, in that part of the UNet (``input``, ``middle``, ``output``), at that factor."""
    return [
        s for s in sites_of(unet)
        if kind in (None, s.kind) and block in (None, s.block[0]) and factor in (None, s.factor)
    ]  # fmt: skip


class Captured:
    """What was seen at the captured sites, one entry a model call, in the order of the calls."""

    def __init__(self) -> None:
        self.queries: dict[Site, list[torch.Tensor]] = {}
        self.keys: dict[Site, list[torch.Tensor]] = {}
        self.grids: dict[Site, tuple[int, int]] = {}
        self.heads: dict[Site, int] = {}

    def key(self, site: Site) -> torch.Tensor:
        """The projected keys, all heads side by side, (rows, keys, channels)."""
        return _joined(self.keys[site])

    def probabilities(self, site: Site, rows: slice | Sequence[int] = slice(None)) -> torch.Tensor:
        """The attention of the site's queries to its keys, (rows, heads, queries, keys), in float32 at least.

        What a mask adds inside the attention is not in it.
        """
        q, k = (_joined(stored[site])[rows] for stored in (self.queries, self.keys))
        q, k = (t.unflatten(-1, (self.heads[site], -1)).transpose(1, 2) for t in (q, k))  # (rows, heads, tokens, d)
        precise = torch.promote_types(q.dtype, torch.float32)
        logits = q.to(precise) @ k.to(precise).transpose(-1, -2) * q.shape[-1] ** -0.5
        return logits.softmax(-1)

    def first(self) -> Captured:
        """The first row of the first call, off the graph: views, so that it costs nothing until somebody asks."""
        out = Captured()
        out.grids, out.heads = self.grids, self.heads
        for theirs, ours in ((self.queries, out.queries), (self.keys, out.keys)):
            ours.update({site: [calls[0][:1].detach()] for site, calls in theirs.items()})
        return out

    def grid(self, site: Site) -> tuple[int, int]:
        """Height and width of the site's grid of image tokens."""
        return self.grids[site]


def _joined(calls: list[torch.Tensor]) -> torch.Tensor:
    return calls[0] if len(calls) == 1 else torch.cat(calls)


class _Exit(BaseException):
    """Ends a model call whose rest nobody needs. Not an ``Exception``: nobody else shall catch it."""


@contextlib.contextmanager
def capture(unet: UNetModel, sites: Collection[Site], *, stop: bool = False) -> Iterator[Captured]:
    """Records queries and keys at these sites during the model calls in the body.

    They stay on the graph inside a differentiable region. With ``stop`` the body is left as soon as the last of the sites
    has been seen: the code after the model call in it does not run. Everything is removed at the end.
    """
    seen, stopping = Captured(), _Exit()
    missing = set(sites)

    def watch(site: Site, table: dict[Site, list[torch.Tensor]], last: bool) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            table.setdefault(site, []).append(output)
            if last:
                missing.discard(site)
                if stop and not missing:
                    raise stopping

        return hook

    with contextlib.ExitStack() as stack:
        for site in sites:
            attention, transformer = site.module(unet), _transformer(unet, site.block)
            seen.heads[site] = attention.heads
            grid = transformer.register_forward_pre_hook(_grid_hook(seen, site))
            query = attention.to_q.register_forward_hook(watch(site, seen.queries, last=False))
            key = attention.to_k.register_forward_hook(watch(site, seen.keys, last=True))
            for handle in (grid, query, key):
                stack.callback(handle.remove)
        try:
            yield seen
        except _Exit as reason:
            if reason is not stopping:
                raise


def _grid_hook(seen: Captured, site: Site) -> Callable[..., None]:
    def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.grids[site] = (int(inputs[0].shape[-2]), int(inputs[0].shape[-1]))

    return hook


class OutputSite(NamedTuple):
    """Where an attention has just answered: its block and depth as in ``Site``, its kind, and the grid of its tokens."""

    block: tuple[str, int]
    depth: int
    kind: str
    grid: tuple[int, int]


def after_attention(
    model_options: dict[str, Any], change: Callable[[torch.Tensor, OutputSite, dict[str, Any]], torch.Tensor]
) -> dict[str, Any]:
    """A copy of the options under which ``change`` sees the output of every attention, after ``to_out``, before the residual.

    Args:
        change: gets the output (rows, tokens, channels), where it is, and the transformer options; returns what goes on.
            It runs after what other packs hang on the same place.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)
    patches = dict(options.get("transformer_options", {}).get("patches", {}))

    def patch_of(kind: str) -> Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]:
        def patch(output: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
            height, width = extra_options["activations_shape"][-2:]
            where = OutputSite(tuple(extra_options["block"]), extra_options["block_index"], kind, (height, width))
            return change(output, where, extra_options)

        return patch

    for kind, module in _MODULES.items():
        name = f"{module}_output_patch"
        patches[name] = [*patches.get(name, ()), patch_of(kind)]
    options["transformer_options"] = {**options.get("transformer_options", {}), "patches": patches}
    return options


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Queries, keys and values (rows, tokens, heads · channels) to the attention's answer, before ``to_out``."""
Around = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Site, dict[str, Any], Attend], torch.Tensor]
"""Called as ``around(q, k, v, site, extra_options, attend)``."""


def override_attention(
    model_options: dict[str, Any], unet: UNetModel, sites: Collection[Site], around: Around
) -> dict[str, Any]:
    """A copy of the options under which ``around`` answers at these sites, in the place of the attention.

    What it is handed as ``attend`` is the attention as it would have been: the host's own, or another pack's in the host's
    single slot, which goes on working that way; ``attend.foreign`` says that it is another's, which wants whole grids, and
    ``attend.later`` that it was laid over this copy, as guidance by a perturbed attention does for a call of its own.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)
    earlier = model_options.get("transformer_options", {}).get("patches_replace", {})

    def placed(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        """Only at the call is it known what stands in the slots: what is put there now would hide what comes later."""
        told = transformer_options or {}
        replace = _replaced(told.get("patches_replace", {}), earlier, unet, sites, around)
        return executor(x, t, c_concat, c_crossattn, control, {**told, "patches_replace": replace}, **kwargs)

    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    comfy.patcher_extension.add_wrapper_with_key(kind, "concepts.attention", placed, options, is_model_options=True)
    return options


def _replaced(
    now: dict[str, Any], earlier: dict[str, Any], unet: UNetModel, sites: Collection[Site], around: Around
) -> dict[str, Any]:
    """The host's table of replaced attentions with ``around`` about what stands there now."""
    replace = dict(now)
    for site in sites:
        name = _MODULES[site.kind]
        before = _standing(now.get(name, {}), site)
        later = before is not None and before is not _standing(earlier.get(name, {}), site)
        replace[name] = replace.get(name, {}) | {(*site.block, site.depth): _around(unet, site, before, later, around)}
    return replace


def _standing(table: dict[tuple[Any, ...], Any], site: Site) -> Any:
    """What answers at a site: one block of a transformer comes before the whole of it, as in the host."""
    return table.get((*site.block, site.depth)) or table.get(site.block)


def _around(unet: UNetModel, site: Site, before: Any, later: bool, around: Around) -> Callable[..., torch.Tensor]:
    module = site.module(unet)

    def replacement(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if before is not None:
                return before(q, k, v, extra_options)
            return optimized_attention(
                q, k, v, module.heads, attn_precision=module.attn_precision, transformer_options=extra_options
            )

        attend.foreign, attend.later = before is not None, later  # type: ignore[attr-defined]
        return around(q, k, v, site, extra_options, attend)

    return replacement


@contextlib.contextmanager
def after_transformers(unet: UNetModel, change: Callable[[torch.Tensor, OutputSite], torch.Tensor]) -> Iterator[None]:
    """Inside it, ``change`` sees the output of every transformer of the decoder, after its residual, in place.

    Args:
        change: gets the output as (rows, tokens, channels), a view, and where it is; may write into it.
    """

    def hook_of(block: tuple[str, int]) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            grid = (int(output.shape[-2]), int(output.shape[-1]))
            change(output.flatten(2).transpose(1, 2), OutputSite(block, 0, "transformer", grid))

        return hook

    with contextlib.ExitStack() as stack:
        for block in {s.block for s in find_sites(unet, block="output")}:
            handle = _transformer(unet, block).register_forward_hook(hook_of(block))
            stack.callback(handle.remove)
        yield


def _blocks(unet: UNetModel) -> Iterator[tuple[tuple[str, int], Any]]:
    yield from ((("input", number), block) for number, block in enumerate(unet.input_blocks))
    if unet.middle_block is not None:
        yield ("middle", 0), unet.middle_block
    yield from ((("output", number), block) for number, block in enumerate(unet.output_blocks))


def _transformer(unet: Any, block: tuple[str, int]) -> Any:
    name, number = block
    modules = unet.middle_block if name == "middle" else getattr(unet, f"{name}_blocks")[number]
    return next(module for module in modules if isinstance(module, SpatialTransformer))
