"""Ways to change the attentions of a UNet while a model call runs: their output, or the attention itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from .. import keys
from ..families.unet import transformer_at
from ..types import HookInputs, ModelOptions, TransformerOptions
from .attention import MODULES, AttentionModule, Site, find_sites
from .model_call import ModelCall, RunCall, around_model_call


class OutputSite(NamedTuple):
    """Where an output comes from: block and depth as in ``Site``, its kind, and the grid (height, width) of its
    tokens."""

    block: tuple[str, int]
    depth: int
    kind: str
    grid: tuple[int, int]


def after_attention(
    model_options: ModelOptions, change: Callable[[torch.Tensor, OutputSite, TransformerOptions], torch.Tensor]
) -> ModelOptions:
    """A copy of the options under which ``change`` gets the output of every attention, after ``to_out``, before the
    residual.

    Args:
        change: takes the output (rows, tokens, channels), where it comes from, and the transformer options. It returns
            the new output, and runs after the patches of other packs.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)
    patches = dict(options.get("transformer_options", {}).get("patches", {}))
    for kind, module in MODULES.items():
        name = f"{module}_output_patch"
        patches[name] = [*patches.get(name, ()), _output_patch(kind, change)]
    options["transformer_options"] = {**options.get("transformer_options", {}), "patches": patches}
    return options


def _output_patch(
    kind: str, change: Callable[[torch.Tensor, OutputSite, TransformerOptions], torch.Tensor]
) -> Callable[[torch.Tensor, TransformerOptions], torch.Tensor]:
    def patch(output: torch.Tensor, extra_options: TransformerOptions) -> torch.Tensor:
        height, width = extra_options["activations_shape"][-2:]
        site = OutputSite(tuple(extra_options["block"]), extra_options["block_index"], kind, (height, width))
        return change(output, site, extra_options)

    return patch


_Replacement: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, TransformerOptions], torch.Tensor]
"""What the host calls in place of an attention, in its single slot per site."""


@dataclass(frozen=True, eq=False)
class Attend:
    """The original attention: the host's, or another pack's if it occupies the slot. Called as ``attend(q, k, v)``.

    It takes queries, keys and values (rows, tokens, heads · channels) and returns the output before ``to_out``.

    Attributes:
        occupant: another pack's function in the slot.
        later: whether it was installed after our copy of the options was made, as perturbed-attention guidance does for
            one call.
    """

    module: AttentionModule
    extra_options: TransformerOptions
    occupant: _Replacement | None = None
    later: bool = False

    @property
    def foreign(self) -> bool:
        """Whether it is another pack's. Always pass it the full token grid."""
        return self.occupant is not None

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.occupant is not None:
            return self.occupant(q, k, v, self.extra_options)
        module, options = self.module, self.extra_options
        return optimized_attention(
            q, k, v, module.heads, attn_precision=module.attn_precision, transformer_options=options
        )


AttentionOverride: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Site, TransformerOptions, Attend], torch.Tensor
]
"""Called as ``override(q, k, v, site, extra_options, attend)``; returns the output before ``to_out``."""


def override_attention(
    model_options: ModelOptions, unet: UNetModel, sites: Collection[Site], override: AttentionOverride
) -> ModelOptions:
    """A copy of the options under which ``override`` computes the attention at these sites.

    It goes into the slots at each model call, because only then it is known what else has been put there.
    """
    earlier = model_options.get("transformer_options", {}).get("patches_replace", {})

    def with_overrides(call: ModelCall, run: RunCall) -> torch.Tensor:
        now = call.transformer_options.get("patches_replace", {})
        replace = dict(now)
        for site in sites:
            name = MODULES[site.kind]
            occupant = _occupant(now.get(name, {}), site)
            later = occupant is not None and occupant is not _occupant(earlier.get(name, {}), site)
            replacement = _replacement(site, site.module(unet), occupant, later, override)
            replace[name] = replace.get(name, {}) | {(*site.block, site.depth): replacement}
        return run(call._replace(transformer_options={**call.transformer_options, "patches_replace": replace}))

    return around_model_call(model_options, keys.ATTENTION, with_overrides)


def _occupant(table: dict[tuple[str | int, ...], _Replacement], site: Site) -> _Replacement | None:
    """What is in the slot of a site. As in the host, one transformer block comes before the whole of them."""
    return table.get((*site.block, site.depth)) or table.get(site.block)


def _replacement(
    site: Site, module: AttentionModule, occupant: _Replacement | None, later: bool, override: AttentionOverride
) -> _Replacement:
    def replacement(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: TransformerOptions
    ) -> torch.Tensor:
        return override(q, k, v, site, extra_options, Attend(module, extra_options, occupant, later))

    return replacement


@contextlib.contextmanager
def after_transformers(unet: UNetModel, change: Callable[[torch.Tensor, OutputSite], object]) -> Iterator[None]:
    """Inside it, ``change`` gets the output of every transformer of the decoder, after its residual.

    Args:
        change: takes the output as (rows, tokens, channels), a view that it may write into, and where it comes from.
    """

    def hook_of(block: tuple[str, int]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: HookInputs, output: torch.Tensor) -> None:
            grid = (int(output.shape[-2]), int(output.shape[-1]))
            change(output.flatten(2).transpose(1, 2), OutputSite(block, 0, "transformer", grid))

        return hook

    with contextlib.ExitStack() as stack:
        for block in {s.block for s in find_sites(unet, block="output")}:
            handle = transformer_at(unet, block).register_forward_hook(hook_of(block))
            stack.callback(handle.remove)
        yield
