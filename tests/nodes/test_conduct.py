"""Which concept stands where: Concept Conductor and LoRA Composer pair concepts and regions alike."""

from __future__ import annotations

import pytest
from comfyui_concepts.host.concept import Concept
from comfyui_concepts.host.lora import LoraFile
from comfyui_concepts.methods.regions import Box, Region
from comfyui_concepts.nodes.concept import ConceptList, assigned
from comfyui_concepts.nodes.conduct import ConceptsConductorGuider
from comfyui_concepts.nodes.region import RegionList


def _concept(name):
    return Concept(name, f"a {name}", LoraFile(name, {}), 1.0, [], [])


LION, ROBOT = _concept("lion"), _concept("robot")


def _regions(*labels):
    listed = None
    for number, label in enumerate(labels):
        region = Region(label, (Box(number / len(labels), 0, 1 / len(labels), 1),))
        listed = RegionList(region, listed)
    return listed


def _conducted(demo_model, *labels):
    model, clip, _ = demo_model
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
    both = ConceptList(ROBOT, ConceptList(LION, None))
    guider = ConceptsConductorGuider.execute(model, prompt, prompt, both, 3.0, regions=_regions(*labels)).args[0]
    return [concept.name for concept in guider.concepts]


def test_regions_take_concepts_by_their_labels_in_whatever_order_they_lie(demo_model):
    assert _conducted(demo_model, "a robot", "A Lion ") == ["robot", "lion"]
    assert _conducted(demo_model, "left", "right") == ["lion", "robot"]
    assert _conducted(demo_model, "robot", "lion", "robot") == ["robot", "lion", "robot"]


def test_labels_that_do_not_say_and_numbers_that_differ_are_refused():
    with pytest.raises(ValueError, match="2 concepts and 3 regions; draw one region a concept, or label"):
        assigned([LION, ROBOT], _regions("robot", "lion", "elsewhere").in_order())


def test_points_are_counted(demo_model):
    with pytest.raises(ValueError, match="Nobody says where the concepts are"):
        ConceptsConductorGuider.execute(demo_model[0], [], [], ConceptList(LION, None), 3.0)
