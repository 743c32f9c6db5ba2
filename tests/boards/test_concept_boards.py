"""The boards of several concepts: fixed tasks, every row has its way, and counts that add up."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfyui_concepts.boards import bench_conduct, concept_tasks, object_prompts, score_compose, score_conduct
from comfyui_concepts.boards.board import Job
from comfyui_concepts.boards.concept_guiders import ConceptRunner
from comfyui_concepts.boards.concept_tasks import ConceptMetrics, ConceptTask, tasks, tasks_of_one, tasks_of_three
from comfyui_concepts.demo.judge import Judge


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("board", [score_conduct, score_compose])
def test_every_row_has_its_way(board, kind):
    runner = ConceptRunner.__new__(ConceptRunner)  # nothing is loaded
    runner.demo = SimpleNamespace(kind=kind)
    rows = [name for name in board.ROWS[kind] if name not in object_prompts.ROWS]
    assert {name.removesuffix(score_compose.BARE) for name in rows} <= set(board.methods(runner))
    assert len(set(rows)) == len(rows) > 1


def test_a_row_that_a_demo_model_does_not_have_is_refused_with_those_it_has(capsys):
    with pytest.raises(SystemExit):
        score_compose.main(["--model", "dit", "--method", "composer, no gradient"])
    said = capsys.readouterr().err
    assert "--model dit has no row 'composer, no gradient'; it has: stacked LoRAs, host hooks, composer, " in said


def test_tasks_are_fixed_and_similar_concepts_are_among_them():
    asked = list(tasks())
    assert asked == list(tasks())
    assert len({frozenset(task.concepts) for task in asked}) == 20
    assert len(asked) == 60
    assert {frozenset(p) for p in concept_tasks.SIMILAR} <= {frozenset(task.concepts) for task in asked}
    assert all(len(task.concepts) == len(task.layout.boxes) == 3 for task in tasks_of_three())


def test_a_single_concept_is_asked_for_by_itself_and_its_rate_squared_is_what_a_pair_can_reach(judge, monkeypatch):
    """Each concept as often as any other, under its own noun alone; right is what the judge names so."""
    asked = list(tasks_of_one())
    assert sorted(Counter(task.concepts for task in asked).values()) == [5] * 8
    task = asked[0]
    assert task.true_prompt() == task.lone_prompt("lion")
    metrics, picture = score_conduct.run_job(Job(score_conduct.ALONE, replace(task, seeds=(21,))))
    assert picture.shape == (1, 128, 128, 3)
    assert metrics.right == [[judge.look(torch.from_numpy(picture) / 255)[0].name == "lion"]]
    half = {"all_right": 0.5, "layout_iou": 0.1, "leak": 0.0}
    monkeypatch.setattr(ConceptMetrics, "figures", lambda _: dict(half))
    names = [score_conduct.ALONE, "conductor"]
    rows = {row.title: row for row in score_conduct.rows(Namespace(quick=True, method=names, pairs=1, model="unet"))}
    assert rows[score_conduct.ALONE].figures(metrics) == {"all_right": 0.5, "squared": 0.25}
    assert rows["conductor"].figures(metrics) == half


def test_counts_of_two_tasks_add_up(judge):
    """As if one tally had counted both."""
    first, second = (ConceptTask(pair, concept_tasks.LAYOUTS[0], "white", (1,)) for pair in concept_tasks.PAIRS[:2])
    pictures = torch.rand(2, 1, 128, 128, 3, generator=torch.Generator().manual_seed(1))
    whole, added = ConceptMetrics(), ConceptMetrics()
    for task, picture in zip((first, second), pictures, strict=True):
        whole.count(judge, task, picture)
        part = ConceptMetrics(calls=1, rows=2)
        part.count(judge, task, picture)
        added.add(part)
    assert added.figures() == whole.figures() | {"model_calls": 2, "model_rows": 4}
    assert added.wrong == whole.wrong


def test_prompts_of_several_objects_are_fixed_and_those_that_only_list_say_no_place():
    asked = list(object_prompts.prompts(5))
    assert asked == list(object_prompts.prompts(5))
    listed = [a.text for a in asked if a.kind == "listed"]
    assert len(listed) == 10
    assert not any(word in text for text in listed for word in ("left", "right", "middle"))
    assert all("on the left" in a.text for a in asked if a.kind == "placed")
    for kind in ("place last", "one place"):
        texts = [a.text for a in asked if a.kind == kind]
        assert len(texts) == 5
        assert all("on the right" in text and not text.startswith("on the left") for text in texts)
    assert all(a.text.count(concept) == 1 for a in asked for concept in a.concepts if concept != "car")


def test_the_bench_of_the_conductor_runs(monkeypatch, capsys):
    monkeypatch.setattr(logging, "disable", lambda level: None)  # for the whole process, it would be
    assert bench_conduct.main(["--model", "demo", "--concepts", "1", "--runs", "1"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("demo, N = 1: ours ")
    assert all(f"{other} " in line for other in ("bare rows", "one by one", "host hooks"))
