"""Tensors that are overwritten after autograd has saved them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch


@contextlib.contextmanager
def mutation_allowed() -> Iterator[None]:
    """torch's ``allow_mutation_on_saved_tensors``, without its mix-ups.

    torch 2.14.1 knows a saved tensor by its place: object, memory and version. It clones the tensor when it is
    overwritten and lets go of it, and still knows the place. A new tensor that comes to lie there is then taken for the
    old one, and the gradient is another one, without a word. Here the place is forgotten with the tensor.
    """
    with torch.autograd.graph.allow_mutation_on_saved_tensors() as kept:
        places = _Places()
        kept.tid_to_weakhandle, kept.cloned = places, _Clones(places)
        yield


class _Places(WeakValueDictionary[Any, Any]):
    """Place to handle, as torch keeps it. Each handle also remembers its place."""

    def __setitem__(self, place: Any, handle: Any) -> None:
        handle.place = place
        super().__setitem__(place, handle)


class _Clones(WeakKeyDictionary[Any, torch.Tensor]):
    """Handle to clone, as torch keeps it; what is put in here has left its place."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def __setitem__(self, handle: Any, clone: torch.Tensor) -> None:
        self.places.pop(handle.place, None)
        super().__setitem__(handle, clone)
