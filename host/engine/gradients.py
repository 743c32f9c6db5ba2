"""The one place where gradients of the host's models are taken.

The host runs everything under inference mode, and what it loads there cannot be saved for a backward pass. Inside
``differentiable(model)`` every weight is exchanged for an alias on the same storage, nothing is copied, and the few
switches of the host that stand in the way are set; at the end all of it is put back, whatever happened.

    with differentiable(model):
        z = without_inference_tensors(x).requires_grad_(True)
        out = comfy.samplers.calc_cond_batch(model, differentiable_conds(conds), z, without_inference_tensors(sigma), differentiable_options(options))
        (gradient,) = torch.autograd.grad(loss(out), z)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import attention_pytorch

log = logging.getLogger(__name__)

_OVERRIDE = "optimized_attention_override"
_NO_BACKWARD = ("fp8_ops", "scaled_fp8_op", "MixedPrecisionOps", "Nunchaku", "SVDQW4A4Linear")
_COMPILED = "Gradients cannot be taken through a compiled model; bypass the TorchCompileModel node."
_HALF_SCALE = 1024.0  # a float16 gradient of a small loss underflows


@contextlib.contextmanager
def differentiable(*models: torch.nn.Module, in_place: bool = True) -> Iterator[None]:
    """Inside it, loaded models can be differentiated with respect to what goes in. Not to be nested: name all at once.

    Args:
        models: the host's models (``patcher.model``, a guider's ``inner_model``, a CLIP's ``cond_stage_model``), loaded.
        in_place: keeps what the models write over. Text encoders and Flux-like models need it; UNets do not, and without it
            a small one is a third faster (autograd itself refuses where it would have been needed).

    Raises:
        ValueError: the model is compiled or computes in a quantised form that has no backward pass.
    """
    for model in models:
        check_differentiable(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if in_place:
            stack.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
        for model in models:
            stack.enter_context(_aliased(model))
        stack.enter_context(temporarily_set(comfy.model_management, "in_training", True))
        stack.enter_context(temporarily_set(comfy.model_management, "NUM_STREAMS", 0))
        yield


def check_differentiable(model: torch.nn.Module) -> None:
    """Refuses models without a backward pass, before any work is done.

    Raises:
        ValueError: which part stands in the way, and what to do.
    """
    patcher = getattr(model, "current_patcher", None)
    if patcher is not None:
        check_patcher(patcher)
    for module in model.modules():
        name = type(module).__qualname__
        if name == "OptimizedModule":
            raise ValueError(_COMPILED)
        if any(word in name for word in _NO_BACKWARD):
            raise ValueError(
                f"This model computes in a quantised form ({name}) that has no gradient; load it in fp16 or bf16, or in "
                "fp8 without --fast fp8_matrix_mult."
            )


def check_patcher(patcher: Any) -> None:
    """The same for what a MODEL carries beside its weights: the host compiles by a wrapper that the patcher keeps, and that
    is among the model's own options only while it samples.

    Raises:
        ValueError: which part stands in the way, and what to do.
    """
    options = getattr(patcher, "model_options", None) or {}
    if options.get("multigpu_clones"):
        raise ValueError("Gradients cannot be taken through a model spread over several GPUs; bypass that node.")
    tables = (getattr(patcher, "wrappers", {}), options.get("transformer_options", {}).get("wrappers", {}))
    if any("torch.compile" in keyed for table in tables for keyed in table.values()):
        raise ValueError(_COMPILED)


def plain_patcher(patcher: Any) -> Any:
    """The same model in a form whose weights autograd can see: newer hosts keep them in evictable memory by default.

    Raises:
        ValueError: the model came from a loader that cannot make one.
    """
    if not getattr(patcher, "is_dynamic", bool)():
        return patcher
    try:
        return patcher.get_non_dynamic_delegate()
    except RuntimeError as error:
        raise ValueError(
            "Gradients cannot be taken through this model under dynamic VRAM; start ComfyUI with --disable-dynamic-vram."
        ) from error


def without_inference_tensors(value: Any) -> Any:
    """The value with every inference tensor in it cloned into an ordinary one, through dicts, lists, tuples and the host's
    conditioning objects. To be called inside the region, for everything that goes into the model call."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: without_inference_tensors(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_inference_tensors(item) for item in value)
    if hasattr(value, "_copy_with"):  # a CONDRegular and its like
        return value._copy_with(without_inference_tensors(value.cond))
    return value


class _FrozenControl:
    """A ControlNet whose answer is taken as given: asked without a graph, at the latent as it stands.

    Its weights are as unfit for a backward pass as the model's were, and how it follows the latent is nothing a gradient of
    the model's own maps wants to know.
    """

    def __init__(self, control: Any) -> None:
        self._control = control

    def get_control(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return without_inference_tensors(self._control.get_control(x.detach(), *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)


def differentiable_conds(conds: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Processed conditionings as a call with a gradient takes them: ordinary tensors, and ControlNets that are held.

    One ControlNet stays one object in all of them, or the host would tear the call apart.
    """
    held: dict[int, _FrozenControl] = {}

    def of(entry: dict[str, Any]) -> dict[str, Any]:
        control = entry.get("control")
        own = without_inference_tensors(entry)
        return own if control is None else own | {"control": held.setdefault(id(control), _FrozenControl(control))}

    return [[of(entry) for entry in cond] for cond in conds]


def differentiable_options(model_options: dict[str, Any]) -> dict[str, Any]:
    """A copy of the options under which every attention has a backward pass.

    An override of ours (marked ``differentiable``) is chained; a foreign one, such as one that selects a fast kernel, is
    left out for this call: hardly any of them has a gradient.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)
    transformer_options = options.setdefault("transformer_options", {})
    previous = transformer_options.get(_OVERRIDE)
    chained = previous if getattr(previous, "differentiable", False) else None

    def override(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return chained(attention_pytorch, *args, **kwargs) if chained else attention_pytorch(*args, **kwargs)

    override.differentiable = True  # type: ignore[attr-defined]
    options["transformer_options"] = without_inference_tensors(transformer_options) | {_OVERRIDE: override}
    return options


class Gradient(NamedTuple):
    """``value`` is d loss / d x, shaped like x, or None where it was not finite; ``loss`` is a number."""

    value: torch.Tensor | None
    loss: float


def gradient_of(model: torch.nn.Module, x: torch.Tensor, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> Gradient:
    """The gradient of a scalar of the model's insides with respect to its input.

    Args:
        x: the noisy latent, (batch, channels, …, height, width); not changed.
        loss_of: called once inside the region with an ordinary copy of ``x``; returns a scalar, best in float32. Only what
            it computes from that copy is differentiated; inference tensors must go through ``normal``.

    Returns:
        The gradient with respect to ``x`` (sigma space: an update of a variance-preserving latent has to carry its
        1 + sigma²) and the loss. A gradient that is not finite is None: skip the update.
    """
    with differentiable(model):
        z = x.detach().clone().requires_grad_(True)
        scale = loss_scale(model)
        loss = loss_of(z)
        value = torch.autograd.grad(loss * scale, z)[0].detach() / scale
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not torch.isfinite(value).all():
            log.warning("A gradient was not finite and is skipped; bf16 or fp32 weights avoid it.")
            return Gradient(None, float(loss.detach()))
        return Gradient(value, float(loss.detach()))


def loss_scale(model: Any) -> float:
    """What a loss is to be multiplied by before a gradient is taken through the host's model, and the gradient divided by."""
    dtype = getattr(model, "manual_cast_dtype", None) or getattr(model.diffusion_model, "dtype", None)
    return _HALF_SCALE if dtype is torch.float16 else 1.0


@contextlib.contextmanager
def temporarily_set(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A global of the host at another value for a while; hosts that do not have it are left alone."""
    if not hasattr(owner, name):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _aliased(model: torch.nn.Module) -> Iterator[None]:
    """Every parameter and buffer of the model exchanged for an ordinary tensor on the same storage, and put back."""
    kept: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is None or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
                        continue  # a subclass that dequantises makes ordinary tensors by itself
                    kept.append((table, name, tensor))
                    table[name] = _alias(tensor)
        yield
    finally:
        for owner, name, tensor in kept:
            owner[name] = tensor


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch.nn.Parameter(alias, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else alias
