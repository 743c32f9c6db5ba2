"""What the training nodes refuse, and what their options say."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.nodes.erase.concepts import ConceptsEraseConcept
from comfyui_concepts.nodes.erase.train import ConceptsTrainErasure, ConceptsUnlearnInTextEncoder
from comfyui_concepts.nodes.erase.train_options import ConceptsTrainOptions, ConceptsTrainStates


@pytest.fixture
def cat():
    return ConceptsEraseConcept.execute("cat", "", "object", "subject to end", 1.0).args[0]


def test_pictures_without_a_vae_are_refused(demo_model, cat):
    model, clip, vae = demo_model
    pictures = torch.rand(1, 128, 128, 3)
    with pytest.raises(ValueError, match=r"no VAE.*connect the checkpoint's VAE"):
        ConceptsTrainErasure.execute(model, clip, cat, "Co-Erasing", "draft", 0, 128, 128, images=pictures)
    with pytest.raises(ValueError, match=r"no VAE"):
        ConceptsUnlearnInTextEncoder.execute(model, clip, cat, "draft", 0, 128, 128, images=pictures)
    with pytest.raises(ValueError, match="batch of pictures is empty"):
        ConceptsTrainErasure.execute(model, clip, cat, "Co-Erasing", "draft", 0, 128, 128, images=pictures[:0], vae=vae)


def test_unknown_choices_are_refused(demo_model, cat):
    model, clip, _ = demo_model
    with pytest.raises(ValueError, match="budget 'endless'"):
        ConceptsTrainErasure.execute(model, clip, cat, "ESD", "endless", 0, 128, 128)
    with pytest.raises(ValueError, match="choice of layers 'everything'"):
        ConceptsTrainOptions.execute(0, 0.0, 16, "everything", -1.0, -1.0)
    with pytest.raises(ValueError, match="answer to a cancel 'panic'"):
        ConceptsTrainStates.execute(0, 0, 3.0, 4, 25, "panic")


def test_both_options_nodes_add_up_in_either_order():
    numbers = dict(iterations=7, rate=0.1, rank=3, layers="all", eta=0.5, keep=2.0)
    states = dict(trajectories=5, steps=6, cfg=2.0, batch=1, preview_every=0, on_cancel="stop the run")
    first = ConceptsTrainOptions.execute(**numbers).args[0]
    one = ConceptsTrainStates.execute(**states, train_options=first).args[0]
    other = ConceptsTrainOptions.execute(**numbers, train_options=ConceptsTrainStates.execute(**states).args[0]).args[0]
    assert one == other
    assert (one.rank, one.batch, one.keep_on_cancel) == (3, 1, False)


def test_a_training_gives_an_edit_a_report_and_pictures(demo_model, cat):
    model, clip, _ = demo_model
    states = ConceptsTrainStates.execute(1, 3, 3.0, 1, 1, "keep what is learned").args[0]
    options = ConceptsTrainOptions.execute(2, 0.0, 2, "cross k/v", -1.0, -1.0, states).args[0]
    edit, report, curve, previews = ConceptsTrainErasure.execute(
        model, clip, cat, "ESD", "draft", 0, 128, 128, options=options
    ).args
    assert edit.spec["solver"] == "ESD"
    assert "all 2 iterations done" in report
    assert "no prompts are preserved" in report
    assert curve.shape[0] == 1
    assert previews.shape == (2, 128, 128, 3)
    assert float(previews.std()) > 0.02
