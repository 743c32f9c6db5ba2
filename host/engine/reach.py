"""Whether what we hang into a network is seen there: compiled networks, copies on other devices, nodes that answer.

A compiled network is traced once. Hooks and patches that come later are not seen, and those that it was traced with
stay: so neither our picture nor the next one would be right. Nothing fails then, which is why it is refused beforehand,
and why whoever hangs up hooks checks that they answered.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..types import HasModules, ModelOptions, ModelPatcher

_BYPASS_COMPILING = "bypass the TorchCompileModel node"
_STEP_CACHES = {"easycache": "EasyCache"}
"""Wrappers around the network that answer for it in some steps, by their key: the name of the node."""
_OURS = "concepts."


def check_reaches_network(patcher: ModelPatcher, who: str, instead: str = "") -> None:
    """Refuses a model in which hooks and patches would not be seen. Call it when the model is sampled.

    Args:
        patcher: the MODEL that is sampled; later nodes may have changed it.
        who: what would be missing, the subject of the refusal.
        instead: another way out, such as ``, or choose …``.

    Raises:
        ValueError: the model is compiled, or spread over several GPUs.
    """
    if is_compiled(patcher.model) or compiles(patcher):
        raise ValueError(
            f"{who} works inside the network, where a compiled model does not see it; {_BYPASS_COMPILING}{instead}."
        )
    if is_spread(patcher):
        raise ValueError(
            f"{who} works inside the network, and this model is spread over several GPUs; bypass that node."
        )


def is_compiled(model: HasModules) -> bool:
    """Whether a module of the model is compiled, by whichever node."""
    return any(_is_compiled(module) for module in model.modules())


def compiles(patcher: ModelPatcher) -> bool:
    """Whether a MODEL is compiled while it is sampled; its modules do not show it before."""
    replaced = getattr(patcher, "object_patches", {}).values()
    wrapped = (keyed for table in _tables(patcher) for keyed in table.values())
    return any(map(_is_compiled, replaced)) or any("torch.compile" in keyed for keyed in wrapped)


def is_spread(patcher: ModelPatcher) -> bool:
    """Whether a MODEL has copies on other GPUs, which get some rows of each call."""
    return bool(patcher.model_options.get("multigpu_clones"))


def step_cache_of(patcher: ModelPatcher) -> str | None:
    """The node that answers for the network in some steps, if it is one that we know."""
    around = [table.get("diffusion_model", {}) for table in _tables(patcher)]
    return next((name for key, name in _STEP_CACHES.items() if any(key in keyed for keyed in around)), None)


def unanswered(model_options: ModelOptions) -> ValueError:
    """The refusal of a gradient where the network was not run, with the name of whoever answered for it."""
    around = _wrappers(model_options).get("diffusion_model", {})
    names = ", ".join(str(key) for key in around if not str(key).startswith(_OURS)) or "unknown"
    return ValueError(f"A gradient needs the network itself, and another node answered for it ({names}); bypass it.")


def check_answered(missing: Collection[str], who: str) -> None:
    """Refuses to go on after a first call in which hooked layers did not run.

    Args:
        missing: the names of the layers.

    Raises:
        ValueError: one of these layers.
    """
    if missing:
        raise ValueError(
            f"{who} hangs on the layer '{min(missing)}', which did not run, so the picture would lack a part; "
            f"{_BYPASS_COMPILING}, or whichever replaces the network's layers."
        )


def _is_compiled(module: object) -> bool:
    compiled_in_place = isinstance(module, torch.nn.Module) and module._compiled_call_impl is not None
    return compiled_in_place or type(module).__qualname__ == "OptimizedModule"


def _tables(patcher: ModelPatcher) -> list[dict[str, dict[str, list[object]]]]:
    """The wrappers that a MODEL keeps, and those in its options, as ``_wrappers``."""
    return [getattr(patcher, "wrappers", {}), _wrappers(patcher.model_options)]


def _wrappers(model_options: ModelOptions) -> dict[str, dict[str, list[object]]]:
    """The wrappers in model options, by kind and key."""
    return (model_options or {}).get("transformer_options", {}).get("wrappers", {})
