"""Edits that act in front of a network's layers for the time of a model call, whatever form the weights have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from ....methods.erase.lowrank import LowRank
from ...engine.gradients import without_inference_tensors
from ...registry import architecture_of
from ...types import Executor, HookInputs


def mapped_rows(x: torch.Tensor, matrix: LowRank, strength: float) -> torch.Tensor:
    """x + s·Mx, computed in float32."""
    if strength == 0 or not matrix.rank:
        return x
    wide, factors = x.float(), (matrix.up, matrix.down)
    if not torch.is_inference_mode_enabled():  # inside a gradient region nothing made under inference mode may be saved
        factors = (without_inference_tensors(matrix.up), without_inference_tensors(matrix.down))
    return (wide + strength * LowRank(*(f.to(wide) for f in factors))(wide)).to(x.dtype)


def around_entry(maps: Sequence[tuple[LowRank, Sequence[str]]], strength: float) -> Callable[..., torch.Tensor]:
    """A wrapper of model calls in which layers, by their path in the network, read x + s·Mx.

    M acts on the first columns where it is narrower than the layer.
    """

    def wrapper(executor: Executor, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        network = architecture_of(executor.class_obj).network
        with contextlib.ExitStack() as stack:
            for matrix, layers in maps:
                hook = _hook(LowRank(matrix.up.to(x.device), matrix.down.to(x.device)), strength)
                for layer in layers:  # a later edit acts first, as on weights: W·T₁·T₂
                    handle = network.get_submodule(layer).register_forward_pre_hook(hook, prepend=True)
                    stack.callback(handle.remove)
            return executor(x, *args, **kwargs)

    return wrapper


def _hook(matrix: LowRank, strength: float) -> Callable[[torch.nn.Module, HookInputs], HookInputs]:
    def hook(layer: torch.nn.Module, inputs: HookInputs) -> HookInputs:
        rows, *others = inputs
        edited = mapped_rows(rows[..., : matrix.width], matrix, strength)
        return torch.cat([edited, rows[..., matrix.width :]], -1), *others

    return hook
