"""The one place where gradients of the host's models are taken.

The host runs everything under inference mode, and tensors made there cannot be saved for a backward pass. Inside
``differentiable(model)`` an alias on the same storage replaces each weight, nothing is copied, and the host's switches
that are in the way are set. At the end everything is restored, also after an error.

    with differentiable(model):
        z = without_inference_tensors(x).requires_grad_(True)
        conds, options = differentiable_conds(conds), differentiable_options(options)
        out = comfy.samplers.calc_cond_batch(model, conds, z, without_inference_tensors(sigma), options)
        (gradient,) = torch.autograd.grad(loss(out), z)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import attention_pytorch

from .. import keys
from ..registry import known_architecture
from ..saved_tensors import mutation_allowed
from ..types import BaseModel, CondEntry, Conds, HasModules, ModelOptions, ModelPatcher
from .reach import compiles, is_compiled, is_spread, step_cache_of

log = logging.getLogger(__name__)

_NO_BACKWARD = ("fp8_ops", "scaled_fp8_op", "MixedPrecisionOps", "Nunchaku", "SVDQW4A4Linear")
_COMPILED = "Gradients cannot be taken through a compiled model; bypass the TorchCompileModel node."
_OVERWRITTEN = "modified by an inplace operation"  # torch's words
_HALF_SCALE = 1024.0  # a float16 gradient of a small loss underflows


@contextlib.contextmanager
def differentiable(*models: HasModules, in_place: bool = True) -> Iterator[None]:
    """Inside it, loaded models can be differentiated with respect to their inputs. Do not nest it: name all models at
    once.

    Args:
        models: the host's models (``patcher.model``, a guider's ``inner_model``, a CLIP's ``cond_stage_model``),
            loaded.
        in_place: keeps tensors that the models overwrite. Text encoders, Flux-like models and ControlNets need it.
            UNets do not: a small one takes half as long without. Autograd itself refuses where it is missing.

    Raises:
        ValueError: the model is compiled or computes in a quantised form that has no backward pass.
    """
    for model in models:
        check_differentiable(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if in_place:
            stack.enter_context(mutation_allowed())
        for model in models:
            stack.enter_context(_aliased(model))
        stack.enter_context(temporarily_set(comfy.model_management, "in_training", True))
        stack.enter_context(temporarily_set(comfy.model_management, "NUM_STREAMS", 0))
        stack.enter_context(_with_backward_pass())
        yield


def _with_backward_pass() -> contextlib.AbstractContextManager[None]:
    """Inside it, newer hosts' Cosmos models turn their queries and keys by plain torch: their kernel has no gradient,
    and they alone use it whatever ``in_training`` says."""
    name = "rms_rope_split_half"
    kernels = getattr(getattr(comfy, "quant_ops", None), "ck", None)
    plain = getattr(getattr(getattr(kernels, "backends", None), "eager", None), "rope", None)
    return temporarily_set(kernels if hasattr(plain, name) else None, name, getattr(plain, name, None))


def check_differentiable(model: HasModules) -> None:
    """Refuses models without a backward pass, before any work is done.

    Raises:
        ValueError: which part prevents it, and what to do.
    """
    patcher = getattr(model, "current_patcher", None)
    if patcher is not None:
        check_patcher(patcher)
    if is_compiled(model):
        raise ValueError(_COMPILED)
    for module in model.modules():
        name = type(module).__qualname__
        if any(word in name for word in _NO_BACKWARD):
            raise ValueError(
                f"This model computes in a quantised form ({name}) that has no gradient; load it in fp16 or bf16, or "
                "in fp8 without --fast fp8_matrix_mult."
            )


def check_patcher(patcher: ModelPatcher) -> None:
    """Refuses a MODEL that is compiled, split over GPUs or answered for; its weights do not show it.

    The host compiles by a wrapper that the patcher keeps. The model's own options hold it only while it samples.

    Raises:
        ValueError: which part prevents it, and what to do.
    """
    if is_spread(patcher):
        raise ValueError("Gradients cannot be taken through a model spread over several GPUs; bypass that node.")
    if compiles(patcher):
        raise ValueError(_COMPILED)
    if cache := step_cache_of(patcher):
        raise ValueError(
            f"Gradients cannot be taken through {cache}, which answers for the network in some steps; bypass that node."
        )


def plain_patcher(patcher: ModelPatcher) -> ModelPatcher:
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
            "Gradients cannot be taken through this model under dynamic VRAM; start ComfyUI with "
            "--disable-dynamic-vram."
        ) from error


def without_inference_tensors(value: Any) -> Any:
    """The value with an ordinary clone of every inference tensor in it: through dicts, lists, tuples and the host's
    conditioning objects. Call it inside the region, for everything that goes into the model call."""
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
    """A ControlNet whose output counts as a constant: it runs without a graph, at the latent as it is.

    Its weights cannot take part in a backward pass either, and a gradient of the model's own attention maps does not
    need the ControlNet's share.
    """

    def __init__(self, control: Any) -> None:
        self._control = control

    def get_control(self, x: torch.Tensor, *args: object, **kwargs: object) -> object:
        with torch.no_grad():
            return without_inference_tensors(self._control.get_control(x.detach(), *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)


def differentiable_conds(conds: list[Conds]) -> list[Conds]:
    """Processed conditionings for a call with a gradient: ordinary tensors, and ControlNets whose output is a constant.

    A ControlNet stays one object in all of them; otherwise the host would split the call.
    """
    frozen: dict[int, _FrozenControl] = {}

    def of(entry: CondEntry) -> CondEntry:
        control = entry.get("control")
        own = without_inference_tensors(entry)
        return own if control is None else own | {"control": frozen.setdefault(id(control), _FrozenControl(control))}

    return [[of(entry) for entry in cond] for cond in conds]


def differentiable_options(model_options: ModelOptions) -> ModelOptions:
    """A copy of the options under which every attention has a backward pass.

    An override of ours (marked ``differentiable``) is chained. Another pack's, such as one that selects a fast kernel,
    is left out for this call, because hardly any of them has a gradient.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)
    transformer_options = options.setdefault("transformer_options", {})
    previous = transformer_options.get(keys.ATTENTION_OVERRIDE)
    chained = previous if getattr(previous, "differentiable", False) else None

    def override(func: object, *args: object, **kwargs: object) -> torch.Tensor:
        return chained(attention_pytorch, *args, **kwargs) if chained else attention_pytorch(*args, **kwargs)

    override.differentiable = True  # type: ignore[attr-defined]
    options["transformer_options"] = without_inference_tensors(transformer_options) | {
        keys.ATTENTION_OVERRIDE: override
    }
    return options


class Gradient(NamedTuple):
    """``value`` is d loss / d x, shaped like x, or None where it was not finite; ``loss`` is a number."""

    value: torch.Tensor | None
    loss: float


def gradient_of(
    model: BaseModel, x: torch.Tensor, loss_of: Callable[[torch.Tensor], torch.Tensor], conds: Iterable[Conds] = ()
) -> Gradient:
    """The gradient of a scalar computed inside the model with respect to the model's input.

    Args:
        x: the noisy latent, (batch, channels, …, height, width); not changed.
        loss_of: called inside the region with an ordinary copy of ``x``; returns a scalar, best in float32. Only its
            computations from that copy are differentiated. Inference tensors must go through
            ``without_inference_tensors``. It is called again where another node overwrites what autograd has saved.
        conds: the processed conditionings it uses.

    Returns:
        The gradient with respect to ``x`` (sigma space: an update of a variance-preserving latent has to carry its
        1 + sigma²) and the loss. A gradient that is not finite is None: skip the update.
    """
    in_place = _overwrites(model) or any(entry.get("control") is not None for cond in conds for entry in cond)
    try:
        return _gradient(model, x, loss_of, in_place)
    except RuntimeError as error:
        if in_place or _OVERWRITTEN not in str(error):
            raise
    return _gradient(model, x, loss_of, in_place=True)


def _overwrites(model: BaseModel) -> bool:
    architecture = known_architecture(model)
    return architecture is None or architecture.overwrites_saved


def _gradient(
    model: BaseModel, x: torch.Tensor, loss_of: Callable[[torch.Tensor], torch.Tensor], in_place: bool
) -> Gradient:
    with differentiable(model, in_place=in_place):
        z = x.detach().clone().requires_grad_(True)
        scale = loss_scale(model)
        loss = loss_of(z)
        value = torch.autograd.grad(loss * scale, z)[0].detach() / scale
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not torch.isfinite(value).all():
            log.warning("A gradient was not finite and is skipped; bf16 or fp32 weights avoid it.")
            return Gradient(None, float(loss.detach()))
        return Gradient(value, float(loss.detach()))


def loss_scale(model: BaseModel) -> float:
    """The factor for a loss before its gradient is taken through the host's model. Divide the gradient by it."""
    dtype = getattr(model, "manual_cast_dtype", None) or getattr(model.diffusion_model, "dtype", None)
    return _HALF_SCALE if dtype is torch.float16 else 1.0


@contextlib.contextmanager
def temporarily_set(owner: object, name: str, value: object) -> Iterator[None]:
    """Inside it, an attribute of the host has another value. A host without that attribute is left alone."""
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
def _aliased(model: HasModules) -> Iterator[None]:
    """Inside it, ordinary tensors on the same storage replace every parameter and buffer of the model."""
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
