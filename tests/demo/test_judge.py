"""The judge: right on what it can see, honest about what it cannot."""

from __future__ import annotations

import statistics

import pytest
import torch
from comfyui_concepts.boards import score_model
from comfyui_concepts.demo import vocabulary
from comfyui_concepts.demo.judge import LEFT, READER, RIGHT, SEVERAL, UNSURE, WHOLE, Judge, Verdict, background_of

NO_OBJECT = ("nothing", SEVERAL, UNSURE)


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


def test_it_is_right_on_real_compositions_it_never_saw(judge):
    verdicts, truths = score_model.looked_at(judge, *score_model.held_out())
    assert set(truths) == set(vocabulary.CONCEPTS) | set(vocabulary.LORA_CONCEPTS)
    assert statistics.mean(v.name == t for v, t in zip(verdicts, truths, strict=True)) >= 0.98


def test_it_names_nothing_on_blanks_and_noise(judge):
    named = [v.name for v in judge.look(score_model.garbage()) if v.name not in NO_OBJECT]
    assert len(named) <= 2, named  # of 120


def test_it_sees_two_objects_as_several_and_each_in_its_half(judge):
    pictures, scenes = score_model.held_out()
    pairs = [i for i, s in enumerate(scenes) if len(s["concepts"]) == 2]
    assert statistics.mean(v.name == SEVERAL for v in judge.look(pictures[pairs])) > 0.9
    left, right = judge.look(pictures[pairs], LEFT), judge.look(pictures[pairs], RIGHT)
    seen = [(a.name, b.name) == tuple(scenes[i]["concepts"]) for a, b, i in zip(left, right, pairs, strict=True)]
    assert statistics.mean(seen) > 0.95


def test_its_confidence_means_something(judge):
    pictures, scenes = score_model.held_out()
    noisy = (pictures + torch.randn(pictures.shape, generator=torch.Generator().manual_seed(3)) * 0.15).clamp(0, 1)
    assert score_model.expected_calibration_error(*score_model.looked_at(judge, noisy, scenes)) < 0.08


def test_it_does_not_go_by_colour_alone(judge):
    pictures, scenes = score_model.held_out()
    singles = [i for i, s in enumerate(scenes) if len(s["concepts"]) == 1]
    grey = pictures[singles].mean(-1, keepdim=True).expand(-1, -1, -1, 3)
    seen = judge.look(grey)
    assert statistics.mean(v.name == scenes[i]["concepts"][0] for v, i in zip(seen, singles, strict=True)) > 0.8


def test_below_the_threshold_it_is_unsure():
    assert Verdict("cat", 0.9).name == "cat"
    assert Verdict("cat", 0.3).name == UNSURE
    assert str(Verdict("cat", 0.3)) == "unsure (perhaps cat)"


def test_calibration_error_against_the_plain_sum():
    verdicts = [Verdict("a", 0.95), Verdict("a", 0.95), Verdict("a", 0.55), Verdict("a", 0.55)]
    # confident bin: 1.0 right at 0.95; other bin: 0.5 right at 0.55; half of the cases each
    assert score_model.expected_calibration_error(verdicts, ["a", "a", "a", "b"]) == pytest.approx(
        0.5 * 0.05 + 0.5 * 0.05
    )


@pytest.mark.parametrize("name", vocabulary.BACKGROUNDS)
def test_backgrounds_by_their_border(name):
    picture = torch.tensor(vocabulary.BACKGROUNDS[name]).float().expand(64, 96, 3) / 255
    picture = picture.clone()
    picture[20:40, 20:60] = torch.rand(20, 40, 3)
    assert background_of(picture) == name


def test_a_colour_without_a_name_is_unsure():
    assert background_of(torch.zeros(64, 64, 3)) == UNSURE


def test_a_picture_in_words(judge):
    pictures, scenes = score_model.held_out()
    two = next(i for i, s in enumerate(scenes) if len(s["concepts"]) == 2 and s["style"] == "emoji")
    words = judge.describe(pictures[two])
    assert all(c in words for c in scenes[two]["concepts"]), words
    assert f"{scenes[two]['background']} background" in words


def test_missing_weights_get_a_sentence(tmp_path):
    with pytest.raises(RuntimeError, match="judge.safetensors is missing; get it back with"):
        Judge.load(tmp_path / "judge.safetensors")


def test_weights_of_another_network_get_a_sentence(tmp_path):
    from safetensors.torch import save_file

    save_file({"head.weight": torch.zeros(3, 320)}, tmp_path / "judge.safetensors")
    with pytest.raises(RuntimeError, match="judge.safetensors does not fit this version"):
        Judge.load(tmp_path / "judge.safetensors")


def test_boxes_are_in_canvas_fractions(judge):
    pictures, _ = score_model.held_out()
    assert judge.look(pictures[:1], WHOLE) == judge.look(pictures[:1])


def test_the_reader_sees_as_the_judge_does_and_is_another(judge):
    """What is steered by the one is examined by the other."""
    reader = Judge.load(READER)
    verdicts, truths = score_model.looked_at(reader, *score_model.held_out())
    assert statistics.mean(v.name == t for v, t in zip(verdicts, truths, strict=True)) >= 0.95
    named = [v.name for v in reader.look(score_model.garbage()) if v.name not in NO_OBJECT]
    assert len(named) <= 6, named  # of 120
    ours, theirs = judge.network.state_dict(), reader.network.state_dict()
    alike = torch.corrcoef(torch.stack([n["blocks.1.conv.0.weight"].flatten() for n in (ours, theirs)]))[0, 1]
    assert abs(alike) < 0.2  # not one training continued
