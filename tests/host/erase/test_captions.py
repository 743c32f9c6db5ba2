"""Captions that are preserved on average: their rows count, and nothing else about them does."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.demo.vocabulary import CONCEPTS, ordinary_captions
from comfyui_concepts.host.erase.solve import SolveRequest, solve_erasure
from comfyui_concepts.host.text.tokens import PromptEncoder
from comfyui_concepts.methods.erase.captions import everyday_captions
from comfyui_concepts.methods.erase.diagnose import average_drift, drift
from comfyui_concepts.methods.erase.problem import problem_of
from comfyui_concepts.methods.erase.report import report_text
from comfyui_concepts.methods.erase.rows import preserved_rows
from comfyui_concepts.methods.erase.solvers import SOLVERS
from comfyui_concepts.methods.erase.spec import LAST, Erased, Preserved
from comfyui_concepts.methods.erase.trained.plan import _preserved_texts
from comfyui_concepts.nodes.erase.concepts import ConceptsPreserveCaptions

CAT = Erased("cat", "dog", ("{}", "a {}"), LAST, 1.0)
TEXTS = ("a fox, blue background", "on the left a bus and on the right a tree, red background", "a moon")


def captions(texts=TEXTS, weight=6.0, previous=None):
    return Preserved(texts, weight, True, previous, averaged=True)


def test_their_statistics_are_those_of_their_rows(demo_model):
    encode = PromptEncoder(demo_model[1])
    found = problem_of(encode, [CAT], [captions()])
    by_hand = torch.zeros(found.width, found.width, dtype=torch.float64)
    for text in TEXTS:
        rows, weights, _ = preserved_rows(encode(text), 6.0 / len(TEXTS), whole=True)
        for row, weight in zip(rows, weights, strict=True):
            by_hand += weight * torch.outer(row, row)
    assert torch.allclose(found.statistics, by_hand, rtol=1e-12, atol=1e-9)
    assert found.labels == ("the empty prompt",) * len(found.empty)


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if solver.averages and name != "realera"])
def test_they_hold_the_map_as_much_as_if_each_was_listed(demo_model, solver):
    model, clip, _ = demo_model
    listed = Preserved(TEXTS, 6.0 / len(TEXTS), True, Preserved(("a pig",), 1.0))
    averaged = captions(previous=Preserved(("a pig",), 1.0))
    request = SolveRequest(solver, rank=0)
    maps = [solve_erasure(model, clip, CAT, kept, request).text.matrix() for kept in (listed, averaged)]
    without = solve_erasure(model, clip, CAT, averaged.previous, request).text.matrix()
    assert (maps[0] - maps[1]).norm() <= 1e-4 * maps[0].norm()
    assert (maps[1] - without).norm() > 1e-2 * without.norm()


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if not solver.averages])
def test_a_solver_that_does_not_read_them_says_so(demo_model, solver):
    model, clip, _ = demo_model
    kept = Preserved(("a pig", "a fox"), 1.0)
    edits = [solve_erasure(model, clip, CAT, some, SolveRequest(solver)) for some in (kept, captions(previous=kept))]
    assert torch.equal(edits[0].text.matrix(), edits[1].text.matrix())
    assert "does not read Preserve Captions" in report_text(edits[1].report, edits[1].spec)
    assert "does not read Preserve Captions" not in report_text(edits[0].report, edits[0].spec)


def test_they_may_name_what_is_erased(demo_model):
    model, clip, _ = demo_model
    kept = captions(("a cat", *TEXTS))
    edit = solve_erasure(model, clip, CAT, kept)
    assert edit.report["concepts"][0]["left"] < 0.5
    assert edit.spec["preserve"] == [kept.record()]
    assert "preserved captions: moved" in report_text(edit.report, edit.spec)


def test_their_drift_is_that_of_their_rows():
    generator = torch.Generator().manual_seed(0)
    rows, T = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (20, 8))
    W = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    Q = W.T @ W
    energy = (rows @ W.T).square().sum(1)
    by_hand = float(((drift(rows, T, Q).square() * energy).sum() / energy.sum()).sqrt())
    assert abs(average_drift(rows.T @ rows, T, Q) - by_hand) <= 1e-12 * by_hand


def test_training_leaves_them_out():
    assert _preserved_texts(captions(previous=Preserved(("a pig",), 1.0)), None, 0) == ("a pig",)


def test_the_sets_are_ordinary_and_each_caption_is_there_once():
    everyday = everyday_captions()
    assert len(everyday) == len(set(everyday)) == 440
    words = {word for caption in ordinary_captions() for word in caption.replace(",", " ").split()}
    assert set(CONCEPTS) <= words


def test_the_node_lists_a_set_and_ones_own():
    before = Preserved(("a pig",), 1.0)
    (kept,) = ConceptsPreserveCaptions.execute("everyday", "my dog\nmy car; my house // not this", 50.0, before).args
    assert kept.prompts == (*everyday_captions(), "my dog", "my car", "my house")
    assert (kept.averaged, kept.weight) == (True, 50.0)
    assert kept.in_order()[0] == before
    with pytest.raises(ValueError, match="no captions"):
        ConceptsPreserveCaptions.execute("own", " // nothing", 100.0)
    with pytest.raises(ValueError, match="set of captions"):
        ConceptsPreserveCaptions.execute("other", "", 100.0)
