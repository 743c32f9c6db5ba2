"""Weights in the course of the sampling, against values worked by hand."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.methods.anagram.combine import AVERAGING, Combination, combiner
from comfyui_concepts.methods.anagram.prediction import Predictions
from comfyui_concepts.methods.anagram.schedule import EXAMPLE, by_schedule, schedule_from


def _at(progress, views=2):
    parts = tuple(torch.full((3, 1, 2, 2), float(i), dtype=torch.float64) for i in range(views))
    return Predictions(parts[0], 1.0, 1.0, progress, 0, parts, None, 1.0)


@pytest.mark.parametrize(
    ("progress", "weights"),
    [(0.0, (0.5, 0.5)), (0.1, (0.5, 0.5)), (0.4, (0.7, 0.3)), (0.5, (0.75, 0.25)), (0.9, (1.0, 0.0))],
)
def test_weights_go_straight_from_stop_to_stop_and_are_level_outside(progress, weights):
    weigh = by_schedule([1.0, 1.0], schedule_from("0.1: 1, 1\n0.5: 3, 1\n\n0.9: 2, 0"))
    if progress == 0.4:
        weights = (2.5 / 3.5, 1 / 3.5)  # three quarters of the way from (1, 1) to (3, 1)
    torch.testing.assert_close(weigh(_at(progress)), torch.tensor([weights] * 3))


def test_two_stops_at_one_moment_jump():
    weigh = by_schedule([1.0, 1.0], schedule_from(EXAMPLE))
    assert weigh(_at(0.79))[0].tolist() == [0.5, 0.5]
    assert weigh(_at(0.8))[0].tolist() == [1.0, 0.0]


def test_the_users_own_weight_still_counts():
    weigh = by_schedule([2.0, 1.0], schedule_from("0: 1, 2"))
    torch.testing.assert_close(weigh(_at(0.5))[0], torch.tensor([0.5, 0.5]))


def test_a_schedule_takes_the_place_of_the_balance_and_no_schedule_is_the_balance():
    mixed = combiner(Combination(schedule_from("0: 0, 1")), [1.0, 1.0])(_at(0.5))[0]
    assert (mixed == 1).all()
    assert torch.equal(combiner(Combination(), [1.0, 1.0])(_at(0.5))[0], combiner(AVERAGING, [1.0, 1.0])(_at(0.5))[0])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("half: 1, 1", "not a moment with weights"),
        ("0.5", "not a moment with weights"),
        ("0: 1; 1", "not a moment with weights"),
        ("1.5: 1, 1", "not between 0 and 1"),
        ("0.5: 1, 1\n0.2: 1, 1", "sort the lines"),
        ("0: 0, 0", "at least one above 0"),
        ("0: -1, 2", "0 or more"),
        ("0: nan, 1", "0 or more"),
        ("nan: 1, 1", "not between 0 and 1"),
        ("0: 1, 1\n1: 1", "another number of weights"),
    ],
)
def test_what_is_no_schedule_is_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        schedule_from(text)


def test_a_schedule_for_another_number_of_views_is_refused():
    with pytest.raises(ValueError, match="3 views"):
        by_schedule([1.0, 1.0, 1.0], schedule_from("0: 1, 1"))
    with pytest.raises(ValueError, match="only views of weight 0"):
        by_schedule([1.0, 0.0], schedule_from("0: 0, 1"))
