"""The boards of anagrams: fixed tasks, a reader that is not the judge, and pairs ranked by their worst view."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_concepts.boards import score_anagram, score_pairs
from comfyui_concepts.boards.anagram_metrics import AnagramMetrics
from comfyui_concepts.boards.anagram_tasks import PAIRS, TRIPLES, AnagramTask, tasks
from comfyui_concepts.boards.board import Job
from comfyui_concepts.boards.score_anagram import AS_COSINES, METHODS, SEEDS
from comfyui_concepts.demo import vocabulary
from comfyui_concepts.demo.judge import CLASSES

TURNED = AnagramTask(("heart", "strawberry"), ("identity", "rotate_180"), "white")


@pytest.fixture(scope="module")
def runner():
    return score_anagram.AnagramRunner([3])


def test_tasks_are_fixed_and_as_many_as_the_issue_of_anagrams_asks():
    asked = list(tasks(PAIRS["unet"], TRIPLES))
    assert asked == list(tasks(PAIRS["unet"], TRIPLES))
    assert {len(set(map(frozenset, pairs))) for chosen in PAIRS.values() for pairs in chosen.values()} == {24}
    assert {c for task in asked for c in task.concepts} <= set(vocabulary.CONCEPTS)
    assert len(asked) == 24 * 5 + 8
    again = {seed for by in score_pairs.AGAIN.values() for seed in by.seeds}
    assert not {*score_pairs.FIRST.seeds, *again} & set(SEEDS)  # the pairs were not chosen on them
    by_concepts = {task.concepts: task.background for task in score_pairs.every_pair("flip")}
    assert all(task.background == by_concepts[task.concepts] for task in asked if len(task.concepts) == 2)


def test_the_reader_steers_and_the_judge_names(runner, monkeypatch):
    """Scores are as CLIP's cosines are, of the view as it is seen; and the judge is not asked."""
    seen = []

    def sure_of_a_heart(pictures):
        seen.append(pictures)
        return torch.eye(len(CLASSES))[CLASSES.index("heart")].expand(len(pictures), -1)

    monkeypatch.setattr(runner, "scorer", SimpleNamespace(probabilities=sure_of_a_heart))
    monkeypatch.setattr(runner, "judge", None)
    scores = runner.score(TURNED, torch.randn(2, 4, 16, 16))
    worst, best = AS_COSINES
    torch.testing.assert_close(scores, torch.tensor([[best, worst]] * 2))
    assert torch.equal(seen[1], seen[0].rot90(2, (1, 2)))


@pytest.mark.parametrize("method", ["averaging", "balance and contrast", "multi-task"])
def test_a_task_is_counted_and_weighs_what_it_says(runner, method):
    result = runner.run(TURNED, METHODS[method], steps=3)
    assert result.pictures.shape == (1, 128, 128, 3)
    assert [len(right) for right in result.right] == [2]
    assert result.calls >= 3
    # two views with cfg are four rows a call, and contrast adds two
    assert result.rows >= 3 * (4 if method == "averaging" else 6)
    figures = AnagramMetrics([result, result._replace(right=[(True, False)])]).figures()
    assert figures["n"] == 2
    assert 0 <= figures["both_right"] <= 0.5


def test_the_best_of_several_is_picked_by_the_reader(monkeypatch):
    """For each seed of its own pictures the one whose worse view reads best, and all of them are counted as work."""
    runner = score_anagram.AnagramRunner([3, 4])
    shown = []

    def probabilities(network, task, pictures):
        assert network is runner.scorer
        shown.append(pictures)
        return torch.tensor([[0.9, 0.1], [0.4, 0.5]] * 2 + [[0.3, 0.9], [0.2, 0.9], [0.1, 0.9], [0.0, 0.0]])

    monkeypatch.setattr(runner, "probabilities", probabilities)
    result = runner.run(TURNED, METHODS["averaging, best of four"], steps=2)
    assert len(shown[0]) == 8
    assert result.rows == 2 * 8 * 4  # steps, pictures, two views with a negative each
    picked = torch.from_numpy(result.pictures).float() / 255
    torch.testing.assert_close(picked, shown[0][[1, 4]], atol=1 / 255, rtol=0)
    # the first of four is the seed's own
    alone = score_anagram.AnagramRunner([3, 4]).run(TURNED, METHODS["averaging"], steps=2)
    torch.testing.assert_close(torch.from_numpy(alone.pictures).float() / 255, shown[0][[0, 4]], atol=1 / 255, rtol=0)


def test_pairs_are_ranked_by_how_often_both_read_and_then_by_how_well():
    tries = [
        (("cat", "dog"), [0.9, 0.4]), (("sun", "moon"), [0.6, 0.7]), (("cat", "dog"), [0.8, 0.1]),
        (("a", "b"), [0.55, 0.55]), (("c", "d"), [0.49, 0.49]),
    ]  # fmt: skip
    assert [c for c, _, _ in score_pairs.ranked(tries)] == [("sun", "moon"), ("a", "b"), ("cat", "dog"), ("c", "d")]
    assert score_pairs.ranked(tries)[2][1:] == pytest.approx((0.5, 0.55))


def test_a_pair_is_as_good_as_its_worse_view_to_the_harder_eye(monkeypatch):
    """Both networks look, and the worse answer counts."""
    (task,) = tasks({"flip": [("heart", "strawberry")]})
    job = Job("averaging", task, (7,), steps=3)
    concepts, (worst,) = score_pairs.worst_scores(job)
    runner = score_anagram.runner((7,))
    result = score_anagram.result_of(job)
    assert concepts == ("heart", "strawberry")
    assert worst <= result.alignment[0] + 1e-2  # of the picture in bytes
    monkeypatch.setattr(runner, "scorer", runner.judge)
    assert score_pairs.worst_scores(job)[1][0] == pytest.approx(result.alignment[0], abs=1e-2)


@pytest.mark.parametrize("again", score_pairs.AGAIN.values(), ids=list(score_pairs.AGAIN))
@pytest.mark.parametrize("kinds", score_pairs.VIEWS.values(), ids=list(score_pairs.VIEWS))
def test_every_pair_is_tried_once_and_the_best_in_all_views_they_are_for(kinds, again):
    every = score_pairs.every_pair(kinds[0])
    assert len(every) == len({frozenset(task.concepts) for task in every}) == 630
    asked = score_pairs.jobs(tasks({kind: [("cat", "dog")] for kind in kinds}), again)
    assert [(o.task.kind, o.method) for o in asked] == [(kind, method) for kind in kinds for method in again.methods]


def test_averaging_chooses_the_pairs_no_more_than_the_remedies_do():
    """In each round as many pictures are made without the remedies as with them."""
    for several in (score_pairs.FIRST, *score_pairs.AGAIN.values()):
        plain, remedied = several.methods
        assert plain == "averaging"
        assert METHODS[remedied].use_scorer
        assert METHODS[remedied].combination.contrast > 0


@pytest.mark.parametrize("kind", score_anagram.ROWS)
def test_a_demo_model_has_the_rows_that_its_pairs_are_chosen_by(kind):
    """A transformer has all but those that ask for the gradient of a UNet's cross-attention."""
    rows = score_anagram.ROWS[kind]
    assert {*score_pairs.FIRST.methods, *score_pairs.AGAIN[kind].methods} <= set(rows)
    lacking = {"unet": set(), "dit": {"anti-segregation", "multi-task", "multi-task, unread"}}
    assert set(METHODS) - set(rows) == lacking[kind]


def test_a_kind_of_view_without_pairs_is_refused_with_those_that_have_some(capsys):
    with pytest.raises(SystemExit):
        score_anagram.main(["--model", "dit", "--pairs-of", "dit", "--kind", "jigsaw"])
    assert "no pairs of dit are known for jigsaw; flip, rotate_180" in capsys.readouterr().err


def test_no_tile_stays_in_its_place():
    """A tile that stays reads the same both ways, and the pair would have less to share."""
    (_, tiled) = AnagramTask(("heart", "strawberry"), ("identity", "patch_permute"), "white").views()
    cells = torch.arange(256.0).view(1, 1, 16, 16)
    moved = tiled.show(cells) != cells
    assert moved.all()
