"""Whatever of ours has sampled goes as soon as nobody holds it.

The host takes a model for leaked that Python's collector of circles removes together with the model it was cloned from:
from then on it collects and warns at every load. A circle also holds the tensors of a sampling for as long.
"""

from __future__ import annotations

import gc

import comfy.model_patcher
import pytest

from ..conftest import TINY_UNET, tiny_model
from .ours import OURS
from .parties import SMALL, Setting, sample


@pytest.fixture(scope="module")
def small():
    return tiny_model("EPS", unet=TINY_UNET | SMALL)


def _patchers() -> set[int]:
    return {id(one) for one in gc.get_objects() if issubclass(type(one), comfy.model_patcher.ModelPatcher)}


@pytest.fixture
def no_collector():
    """Objects go by their last reference alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("ours", OURS)
def test_no_clone_is_left_to_the_collector_of_circles(small, no_collector, ours):
    before = _patchers()
    sample(OURS[ours].make(Setting(small.clone()), True), 2)
    assert _patchers() <= before
