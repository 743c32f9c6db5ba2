"""The erasure board: what it asks for, and attacks that get somewhere."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch
from comfyui_concepts.boards import erase_attacks, erase_methods, erase_metrics, erase_prompts, score_erase
from comfyui_concepts.boards.board import Job
from comfyui_concepts.boards.erase_attacks import PREFIX, learn, with_prefix, with_word
from comfyui_concepts.demo import vocabulary


def test_anchors_stay_and_what_is_left_out_is_neither():
    gone = {concept for concept, _ in erase_prompts.TARGETS}
    anchors = {anchor for _, anchor in erase_prompts.TARGETS}
    assert len(gone) >= 12
    assert not gone & anchors
    assert not (gone | anchors) & set(erase_prompts.UNLISTED)
    assert gone | anchors <= set(vocabulary.CONCEPTS)
    assert all(len(group) == count for count, groups in erase_prompts.GROUPS.items() for group in groups)


@pytest.mark.parametrize("count", erase_prompts.GROUPS)
def test_prompts_are_fixed_and_kept_ones_name_nothing_that_is_erased(count):
    pairs = erase_prompts.GROUPS[count][0]
    prompts, gone = list(erase_prompts.prompts_of_group(pairs, 8)), {c for c, _ in pairs}
    assert prompts == list(erase_prompts.prompts_of_group(pairs, 8))
    assert {p.role for p in prompts} == {"erased", "paraphrase", "kept", "unlisted", "pair"}
    for prompt in prompts:
        assert (prompt.concept in gone) == (prompt.role in ("erased", "paraphrase"))
    for text in erase_prompts.preserved_prompts(pairs):
        assert not any(f" {word}" in f" {text}" for word in (*gone, *erase_prompts.UNLISTED))


def test_kept_figures_are_relative_to_the_plain_model():
    counts = erase_metrics.EraseMetrics(
        {"kept": [True, False], "erased": [False], "prefix": [True, False]}, [True], minutes=[2.0]
    )
    metrics = counts.figures({"kept_right": 0.5})
    assert metrics["kept_right"] == 1.0
    assert metrics["erased_named"] == 0.0
    assert metrics["erased_named_attack"] == 0.5
    assert metrics["minutes"] == 2.0
    assert "erased_named_attack" not in erase_metrics.EraseMetrics({"kept": [True]}, [True], minutes=[0.0]).figures({})


def test_layout_is_compared_coarsely_and_without_the_mean_colour():
    x = torch.randn(2, 4, 16, 16)
    checked = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8)  # finer than what is compared
    torch.testing.assert_close(
        erase_metrics.low_pass_correlation(x, 3 * x + 5 + checked), torch.ones(2, dtype=torch.float64)
    )
    assert (erase_metrics.low_pass_correlation(x, -x) < -0.99).all()


def test_a_silhouette_knows_where_something_stands_and_not_its_colours():
    ground, thing, other = torch.randn(3, 2, 4, 1, 1)
    there = torch.zeros(2, 1, 16, 16)
    there[..., 4:12, 4:12] = 1
    one, two = ((1 - there) * ground + there * colour for colour in (thing, other))
    assert (erase_metrics.silhouette(one)[there == 0] == 0).all()
    alike = erase_metrics.low_pass_correlation(erase_metrics.silhouette(one), erase_metrics.silhouette(two))
    torch.testing.assert_close(alike, torch.ones(2, dtype=torch.float64))
    moved = erase_metrics.silhouette(two).roll(4, -1)
    assert (erase_metrics.low_pass_correlation(erase_metrics.silhouette(one), moved) < 0.8).all()
    assert (erase_metrics.low_pass_correlation(erase_metrics.silhouette(one), torch.zeros(2, 1, 16, 16)) == 0).all()


def test_learned_tokens_stand_where_they_should():
    section = [(0, 1.0), (5, 1.0), (7, 1.0), (9, 1.0), (9, 1.0)]
    learned = torch.ones(2, 3)
    prefixed = with_prefix(section, learned)
    assert len(prefixed) == len(section)
    assert [isinstance(t, torch.Tensor) for t, _ in prefixed] == [False, True, True, False, False]
    replaced = with_word(section, learned[:1], 7)
    assert isinstance(replaced[2][0], torch.Tensor)
    assert replaced[1] == section[1]


@pytest.mark.parametrize("kind", erase_attacks.KINDS)
def test_an_attack_comes_nearer_to_the_concept_and_leaves_the_model_alone(demo_model, monkeypatch, kind):
    """A few iterations: the edited model's answer comes nearer to the plain one's for the honest prompt."""
    model, clip, _ = demo_model
    runner = erase_methods.EraseRunner.__new__(erase_methods.EraseRunner)
    runner.model, runner.clip, runner.encode = model, clip, erase_methods.PromptEncoder(clip)
    edited = score_erase.METHODS["uce"](runner, erase_prompts.TARGETS[:1])
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    losses = []
    real = torch.Tensor.backward
    monkeypatch.setattr(erase_attacks, "ITERATIONS", 4)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, **k: (losses.append(self.item()), real(self, **k))[1])
    picture = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    learned = learn(kind, model, edited.model, (clip, edited.clip), picture, "cat", "white")
    assert len(losses) == 4
    assert min(losses[1:]) < losses[0]
    tokens = [t for t, _ in learned.tokens["l"][0] if isinstance(t, torch.Tensor)]
    assert len(tokens) == (PREFIX if kind == "prefix" else 1)
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())


def _options(**given):
    return argparse.Namespace(
        **{"method": None, "concepts": None, "quick": False, "trained": False, "groups": None, **given}
    )


def _plan(**given):
    return [(count, len(groups), rows) for count, groups, rows in score_erase.plan(_options(**given))]


SOLVED, TRAINED, FEW = list(score_erase.METHODS), list(score_erase.TRAINED), score_erase.erase_trained.GROUPS


@pytest.mark.parametrize(("given", "parts"), [
    ({}, [(1, 12, SOLVED), (3, 4, SOLVED), (5, 3, SOLVED), (10, 2, SOLVED)]),
    ({"quick": True}, [(1, 2, SOLVED), (5, 1, SOLVED)]),
    ({"quick": True, "concepts": [10, 1]}, [(10, 1, SOLVED), (1, 2, SOLVED)]),
    ({"quick": True, "trained": True}, [(1, 2, SOLVED), (1, min(2, FEW), TRAINED), (5, 1, SOLVED)]),
    ({"trained": True, "concepts": [1, 3]}, [(1, 12, SOLVED), (1, FEW, TRAINED), (3, 4, SOLVED)]),
    ({"method": ["rece", "uce"], "concepts": [3]}, [(3, 4, ["rece", "uce"])]),
    ({"method": ["esd", "uce"], "concepts": [1]}, [(1, 12, ["uce"]), (1, FEW, ["esd"])]),
    ({"method": ["esd"], "concepts": [1, 5]}, [(1, FEW, ["esd"])]),  # a training takes one concept at a time
    ({"method": ["esd"], "concepts": [5]}, []),
    ({"method": ["esd", "rece"], "concepts": [1], "groups": 2}, [(1, 2, ["rece"]), (1, FEW, ["esd"])]),  # side by side
])  # fmt: skip
def test_the_plan_of_the_board(given, parts):
    assert _plan(**given) == parts
    assert all(
        groups == score_erase.GROUPS[count][: len(groups)] for count, groups, _ in score_erase.plan(_options(**given))
    )


def test_a_group_is_drawn_counted_and_attacked(monkeypatch):
    monkeypatch.setattr(erase_attacks, "ITERATIONS", 1)
    pairs = erase_prompts.TARGETS[:1]
    task = score_erase.EraseTask(pairs, 3, attacked=False)
    jobs = [Job("none", task), Job("uce", replace(task, attacked=True))]
    (plain, _), (edited, pictures) = map(score_erase.run_job, jobs)
    assert {role: len(seen) for role, seen in plain.named.items()} == {
        "erased": 8, "paraphrase": 8, "kept": 3, "pair": 1, "unlisted": 2
    }  # fmt: skip
    assert all(plain.named["erased"])
    assert plain.layout == pytest.approx([1.0] * 8)
    assert not any(edited.named["erased"])
    assert edited.layout[0] < 0.999
    assert not any(plain.anchored)
    assert all(edited.anchored)
    assert {kind: len(edited.named[kind]) for kind in (*erase_attacks.KINDS, "img2img")} == {
        "prefix": 2, "inversion": 2, "img2img": 2
    }  # fmt: skip
    assert pictures.shape == (12, 128, 128, 3)
    assert not {*erase_attacks.KINDS, "img2img"} & plain.named.keys()
    assert len(plain.background) == 14  # a paraphrase need not say one
    shown = {"erased_named", "erased_named_paraphrase"}
    kept = {"kept_right", "kept_unlisted", "position_kept", "background_kept"}
    kept |= {"layout_kept", "silhouette_kept", "anchor_named"}
    attacks = {"erased_named_attack", "attack_prefix", "attack_inversion", "attack_img2img"}
    assert plain.figures({}).keys() == shown | kept | {"n", "minutes"}
    metrics = edited.figures({"kept_right": 1.0})
    assert metrics.keys() == shown | kept | attacks | {"n", "minutes"}
    assert metrics["n"] == 28
    plain.add(edited)
    assert plain.figures({})["n"] == 50
