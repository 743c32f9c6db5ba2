"""Which concept stands where: Concept Conductor and LoRA Composer pair concepts and regions alike."""

from __future__ import annotations

from dataclasses import fields, replace

import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.lora.concept import Concept
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.methods.assignment import assigned_concepts
from comfyui_concepts.methods.conduct.points import parse_points
from comfyui_concepts.methods.conduct.settings import Conduct
from comfyui_concepts.methods.regions import Box, Region
from comfyui_concepts.nodes.concept import ConceptList
from comfyui_concepts.nodes.conduct.conductor import (
    ConceptsConceptMasks,
    ConceptsConductorBlocks,
    ConceptsConductorGuider,
    ConceptsConductorMoreOptions,
    ConceptsConductorOptions,
    ConceptsLayoutReference,
)
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
    with pytest.raises(ValueError, match="2 concepts and 3 regions; draw one region per concept, connect"):
        assigned_concepts([LION, ROBOT], _regions("robot", "lion", "elsewhere").in_order())


def _assigned(concepts, *labels):
    return [concept.name for concept in assigned_concepts(concepts, _regions(*labels).in_order())]


def test_labels_that_several_concepts_answer_to_go_round():
    anna, berta = replace(LION, name="anna", phrase="a woman"), replace(ROBOT, name="berta", phrase="a woman")
    assert _assigned([anna, berta], "a woman", "a woman") == ["anna", "berta"]
    assert _assigned([anna, berta], "a woman", "A Woman", "a woman") == ["anna", "berta", "anna"]
    assert _assigned([anna, berta], "a woman", "anna") == ["berta", "anna"]  # nobody else can be called anna


def test_what_no_label_names_fills_the_other_regions_in_order():
    assert _assigned([LION, ROBOT], "robot", "box 2") == ["robot", "lion"]
    cat = _concept("cat")
    assert _assigned([LION, ROBOT, cat], "left", "a lion", "right") == ["robot", "lion", "cat"]


def test_an_article_is_no_part_of_a_label_and_one_that_names_nobody_is_said(caplog):
    plain = [replace(LION, phrase="lion"), replace(ROBOT, phrase="robot")]
    assert _assigned(plain, "a robot", "The lion") == ["robot", "lion"]
    assert _assigned([LION, ROBOT], "robot", "lion") == ["robot", "lion"]
    assert not caplog.messages
    assert _assigned(plain, "robto", "") == ["lion", "robot"]
    (said,) = caplog.messages
    assert said == (
        "The region label 'robto' names no concept (lion, robot); its region gets the next one in order, 'lion'."
    )


def test_a_concept_without_a_region_is_refused_unless_it_has_no_strength():
    with pytest.raises(ValueError, match="'lion' has no region; draw one for it.*'a lion'"):
        _assigned([LION, ROBOT], "robot")
    with pytest.raises(ValueError, match="'robot' has no region"):
        _assigned([LION, ROBOT], "lion", "lion")
    assert _assigned([replace(LION, strength=0.0), ROBOT], "robot") == ["robot"]


def test_points_are_counted(demo_model):
    with pytest.raises(ValueError, match="No positions for the concepts"):
        ConceptsConductorGuider.execute(demo_model[0], [], [], ConceptList(LION, None), 3.0)


def test_points_are_read_and_what_is_none_is_refused(demo_model):
    assert parse_points(" 0.25,0.5; 1, 0 ;") == ((0.25, 0.5), (1.0, 0.0))
    assert parse_points("") == ()
    for wrong in ("0.5", "0.5,0.5,0.5", "a,b", "0.5,1.5", "nan,0.5"):
        with pytest.raises(ValueError, match="is not a point; write each one as x,y in fractions"):
            parse_points(wrong)
    layout = ConceptsLayoutReference.execute([], points="0.5,0.5; 0.1,0.2", latent={"samples": torch.zeros(1, 4, 8, 8)})
    with pytest.raises(ValueError, match="1 concepts and 2 points; give one to each"):
        ConceptsConductorGuider.execute(demo_model[0], [], [], ConceptList(LION, None), 3.0, layout=layout.args[0])


def test_a_layout_without_a_picture_and_words_nobody_knows_are_refused(demo_model):
    for given in ({}, {"image": torch.zeros(1, 8, 8, 3)}, {"vae": demo_model[2]}):
        with pytest.raises(ValueError, match="has no picture; connect a latent, or an image together with its VAE"):
            ConceptsLayoutReference.execute([], **given)
    with pytest.raises(ValueError, match="no trajectory 'sideways'; choose"):
        ConceptsLayoutReference.execute([], "sideways")
    with pytest.raises(ValueError, match="no injection 'everything'; choose"):
        ConceptsConductorGuider.execute(demo_model[0], [], [], ConceptList(LION, None), 3.0, "everything")


def test_masks_before_a_sampling_are_refused(demo_model):
    model, clip, _ = demo_model
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
    guider = ConceptsConductorGuider.execute(
        model, prompt, prompt, ConceptList(LION, None), 3.0, regions=_regions("lion")
    ).args[0]
    with pytest.raises(ValueError, match="connect a Concept Conductor that has sampled"):
        ConceptsConceptMasks.execute(guider, torch.zeros(1, 64, 64, 3))


def test_without_any_strength_the_masks_are_empty_and_the_picture_is_shown(demo_model):
    """One empty mask a concept, so that what is behind goes on."""
    model, clip, _ = demo_model
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
    both = ConceptList(replace(ROBOT, strength=0.0), ConceptList(replace(LION, strength=0.0), None))
    guider = ConceptsConductorGuider.execute(model, prompt, prompt, both, 3.0, regions=_regions("a", "b")).args[0]
    noise, sigmas = torch.zeros(2, 4, 16, 16), torch.tensor([1.0, 0.0])
    guider.sample(noise, noise, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1)
    image = torch.full((2, 64, 64, 3), 0.5)
    masks, shown = ConceptsConceptMasks.execute(guider, image).args
    assert masks.shape == (4, 64, 64)
    assert not masks.any()
    assert torch.allclose(shown, image, atol=0.01)


def test_the_options_nodes_hold_everything_and_chain():
    nodes = (ConceptsConductorOptions, ConceptsConductorMoreOptions, ConceptsConductorBlocks)
    schemas = [node.GET_SCHEMA() for node in nodes]
    names = {i.id for s in schemas for i in s.inputs} - {"options"}
    assert names == {f.name for f in fields(Conduct)} - {"whole_transformers"}  # that one is the guider's own widget
    some = {i.id: i.default for i in schemas[0].inputs} | {"guidance_end": 0.5}
    first = ConceptsConductorOptions.execute(**some).args[0]
    more = {i.id: i.default for i in schemas[1].inputs if i.id != "options"} | {
        "injection_end": 0.9,
        "rectangles": True,
    }
    made = ConceptsConductorMoreOptions.execute(**more, options=first).args[0]
    assert made == replace(Conduct(), guidance_end=0.5, injection_end=0.9, rectangles=True)
    assert ConceptsConductorMoreOptions.execute(**more).args[0].guidance_end == Conduct().guidance_end
    last = ConceptsConductorBlocks.execute(0.25, 0.5, options=made).args[0]
    assert last == replace(made, block_start=0.25, block_end=0.5)
    assert ConceptsConductorMoreOptions.execute(**more, options=last).args[0] == last
    whole = {i.id: i.default for i in schemas[2].inputs if i.id != "options"}
    assert ConceptsConductorBlocks.execute(**whole).args[0] == Conduct()
