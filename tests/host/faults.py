"""What may go wrong in the middle of a sampling, how the model must be after it, and weights off the device."""

from __future__ import annotations

from functools import partial

import comfy.model_management
import comfy.model_patcher
import torch

FAULTS = {
    "exception": partial(RuntimeError, "in the middle"),
    "out of memory": partial(torch.OutOfMemoryError, "in the middle"),
    "cancel": comfy.model_management.InterruptProcessingException,
}
"""Name to what makes the exception."""


def faults_at(places):
    """Pairs of place and fault: an exception at every place, the others at one place after the other in turn."""
    others = ("cancel", "out of memory")
    return [*((place, "exception") for place in places), *((p, others[n % 2]) for n, p in enumerate(places))]


def tensors_of(model):
    """Every parameter and buffer: which object it is, and a copy of it."""
    tensors = {**dict(model.model.named_parameters()), **dict(model.model.named_buffers())}
    return {name: (id(tensor), tensor.clone()) for name, tensor in tensors.items()}


def assert_as_before(model, before):
    """The same objects with the same values as in ``before``, and no hook on any module."""
    after = tensors_of(model)
    assert after.keys() == before.keys()
    assert all(after[n][0] == before[n][0] and torch.equal(after[n][1], before[n][1]) for n in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def remembered(model):
    """The model's tensors and options, for ``assert_as_remembered``.

    Another clone's patches may still be in its weights: the host takes them out when the next clone is loaded.
    """
    comfy.model_management.unload_all_models()
    return tensors_of(model), str(model.model_options)


def assert_as_remembered(model, before):
    """Tensors, hooks and options are as they were, and nothing is in training."""
    tensors, options = before
    assert_as_before(model, tensors)
    assert str(model.model_options) == options
    assert not getattr(comfy.model_management, "in_training", False)


def load_off_the_device(monkeypatch):
    """From now on the host loads models in part, so that every layer brings its weights when it runs."""
    load = comfy.model_patcher.ModelPatcher.load
    monkeypatch.setattr(
        comfy.model_patcher.ModelPatcher, "load", lambda self, device, **_: load(self, device, lowvram_model_memory=1)
    )
