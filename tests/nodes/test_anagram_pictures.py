"""Pictures of anagrams at a size a film can take."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.nodes.anagram_pictures import smaller


@pytest.mark.parametrize(
    ("size", "largest", "made"),
    [((64, 64), 64, (64, 64)), ((128, 96), 64, (64, 48)), ((1024, 64), 64, (64, 8)), ((100, 50), 64, (64, 32))],
)
def test_a_picture_shrinks_to_even_sides_and_never_to_nothing(size, largest, made):
    assert tuple(smaller(torch.rand(1, *size, 3), largest).shape[1:3]) == made
