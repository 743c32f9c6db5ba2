"""What the solvers promise, over random embeddings: RECE, RealEra-style, null space, and the rows themselves."""

import importlib.util
import itertools
import statistics
from pathlib import Path

import pytest
import torch
from comfyui_concepts.methods.erase import realera, rows, spec
from comfyui_concepts.methods.erase.null_space import fixed_rows
from comfyui_concepts.methods.erase.problem import SolverSettings
from comfyui_concepts.methods.erase.regenerate import map_of, margin, regenerated_rows, row_energy, shortfall
from comfyui_concepts.methods.erase.rows import PromptTokens, RowPairs, joined_rows
from comfyui_concepts.methods.erase.solve import gram, uce
from comfyui_concepts.methods.erase.solvers import SOLVERS, solve

_spec = importlib.util.spec_from_file_location("erase_cases", Path(__file__).with_name("erase_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

SEEDS = range(20)
F64 = torch.float64


def residual(T, Q, pairs: RowPairs) -> float:
    """What is left of the concept, relative to its distance from the anchor, over all layers."""
    return float((row_energy(pairs.C @ T.T - pairs.G, Q).sqrt() / row_energy(pairs.C - pairs.G, Q).sqrt()).mean())


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_erases_and_takes_an_empty_list(name):
    problem = cases.problem(1)
    pairs = joined_rows(problem.erased)
    T = map_of(solve(name, problem).M, problem.width)
    assert residual(T, problem.Q(), pairs) < (1.0 if name not in ("rece-sequential", "rece-published") else 5.0)
    same = tuple(RowPairs(r.C, r.C, r.weights) for r in problem.erased)
    assert not solve(name, problem._replace(erased=same)).M.matrix().any()


def test_what_brings_a_concept_back_is_the_minimum_it_should_be():
    problem = cases.problem(2)
    Q, c = problem.Q(), joined_rows(problem.erased).C
    T = map_of(solve("uce", problem).M, problem.width)
    found = regenerated_rows(T, Q, c, 0.1)
    with torch.inference_mode(False), torch.enable_grad():
        x, T, Q, c = found.clone().requires_grad_(True), T.clone(), Q.clone(), c.clone()
        away = x @ T.T - c
        loss = ((away @ Q) * away).sum() + 0.1 * x.square().sum()
        (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.norm() <= 1e-9 * (c @ Q).norm()


def test_q_replaces_the_sum_over_layers():
    g = torch.Generator().manual_seed(4)
    layers = [torch.randn(9, 12, generator=g, dtype=F64) for _ in range(5)]
    T, c = torch.randn(12, 12, generator=g, dtype=F64), torch.randn(3, 12, generator=g, dtype=F64)
    edited = [W @ T for W in layers]
    A = sum(W.T @ W for W in edited) + 0.1 * torch.eye(12, dtype=F64)
    expected = torch.linalg.solve(A, sum(W.T @ V for W, V in zip(edited, layers, strict=True)) @ c.T).T
    assert (regenerated_rows(T, sum(W.T @ W for W in layers), c, 0.1) - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 1.0])
def test_each_cumulative_epoch_makes_the_concept_harder_to_bring_back(ridge):
    first, second, originals = [], [], []
    for seed in SEEDS:
        problem = cases.problem(seed, 128)
        solution = solve("rece", problem, SolverSettings(regeneration=ridge))
        found = solution.regeneration
        assert all(after >= 0.99 * before for before, after in itertools.pairwise(found)), seed
        pairs, Q = joined_rows(problem.erased), problem.Q()
        originals.append(residual(map_of(solution.M, problem.width), Q, pairs))
        for epochs, into in ((0, first), (1, second)):
            before = map_of(solve("rece", problem, SolverSettings(epochs=epochs, regeneration=ridge)).M, problem.width)
            after = map_of(
                solve("rece", problem, SolverSettings(epochs=epochs + 1, regeneration=ridge)).M, problem.width
            )
            back = regenerated_rows(before, Q, pairs.C, ridge)
            into.append(residual(after, Q, RowPairs(back, pairs.G, pairs.weights)))
    assert statistics.mean(first) <= 0.02
    assert statistics.mean(second) <= 0.08
    assert statistics.mean(originals) <= 0.06


def test_epochs_on_epochs_undo_the_first_edit():
    """Why the cumulative form is the default: the published order forgets what it erased first."""
    left = []
    for seed in SEEDS:
        problem = cases.problem(seed)
        T = map_of(solve("rece-sequential", problem).M, problem.width)
        left.append(residual(T, problem.Q(), joined_rows(problem.erased)))
    assert statistics.mean(left) > 0.3


def test_rece_raises_the_margin_and_an_unedited_model_has_one_of_its_own():
    margins = {name: [] for name in ("none", "uce", "rece-sequential", "rece")}
    for seed in SEEDS:
        problem = cases.problem(seed)
        for name, values in margins.items():
            M = None if name == "none" else solve(name, problem).M
            values.append(float(margin(map_of(M, problem.width), problem.Q(), joined_rows(problem.erased).C).mean()))
    medians = [statistics.median(values) for values in margins.values()]
    assert medians == sorted(medians)
    assert medians[0] == pytest.approx(0.78, abs=0.05)
    assert medians[-1] > 10 * medians[1]


def test_the_margin_is_where_five_percent_of_the_concept_is_missing():
    problem = cases.problem(3)
    Q, c = problem.Q(), joined_rows(problem.erased).C[:1]
    T = map_of(solve("uce", problem).M, problem.width)
    wanted, ridges = float(margin(T, Q, c)), torch.logspace(-8, 3, 2000, dtype=F64)
    enough = [r for r in ridges if float(shortfall(T, Q, c, regenerated_rows(T, Q, c, float(r)))) ** 2 <= 0.05]
    assert wanted == pytest.approx(float(regenerated_rows(T, Q, c, float(max(enough))).norm() / c.norm()), rel=0.02)


def _expected_samples(rows: RowPairs, factor: torch.Tensor, count: float) -> RowPairs:
    """What ``count`` samples e + Lz of every row are on average: the row, and L's columns with zero as their anchor.

    E[(e+η)(e+η)ᵀ] = eeᵀ + LLᵀ and E[a(e+η)ᵀ] = aeᵀ.
    """
    total, directions = count * float(rows.weights.sum()), factor.T
    weights = torch.full((len(directions),), total, dtype=factor.dtype)
    samples = RowPairs(rows.C, rows.G, rows.weights * count)
    return joined_rows([samples, RowPairs(directions, torch.zeros_like(directions), weights)])


def test_the_expected_neighbours_are_the_mean_of_many_samples():
    g = torch.Generator().manual_seed(6)
    factor = 0.5 * torch.randn(10, 3, generator=g, dtype=F64)
    pair = RowPairs(*(2 * torch.randn(1, 10, generator=g, dtype=F64) for _ in range(2)), torch.ones(1, dtype=F64))
    kept, w = torch.randn(12, 10, generator=g, dtype=F64), torch.full((12,), 1.0, dtype=F64)
    A, B = 0.5 * torch.eye(10, dtype=F64) + gram(kept, w) + gram(pair.C, pair.weights), (pair.G - pair.C).T @ pair.C
    for _ in range(10):
        half = realera.structured_offsets(factor, 100_000, g)
        samples = pair.C + torch.cat(
            [half, -half]
        )  # each with its mirror image: what is odd in η cancels, as on average
        A += samples.T @ samples / len(samples) / 10
        B += (pair.G - samples).T @ samples / len(samples) / 10
    sampled = B @ torch.linalg.inv(A)
    expected = uce(joined_rows([pair, _expected_samples(pair, factor, 1.0)]), kept, w, 0.5).matrix()
    assert (sampled - expected).norm() <= 1e-3 * expected.norm()


def test_neighbours_go_with_the_concept_and_uce_leaves_them():
    left = {"uce": [], "realera": []}
    for seed in SEEDS:
        problem = cases.problem(seed)
        for name, values in left.items():
            T = map_of(solve(name, problem).M, problem.width)
            for pairs, (alike, _) in zip(problem.erased, problem.variants, strict=True):
                near = RowPairs(alike, pairs.G.expand_as(alike), pairs.weights)
                values.append(residual(T, problem.Q(), near))
    assert statistics.mean(left["realera"]) < 0.8 * statistics.mean(left["uce"])


def test_what_is_kept_within_the_erased_neighbourhood_is_named():
    problem = cases.problem(1)
    near = tuple((r.C + 0.1 * (a - r.C), n) for r, (a, n) in zip(problem.erased, problem.variants, strict=True))
    labels = tuple(f"prompt {n}" for n in range(len(problem.preserved)))
    inside = problem.erased[0].C + 0.5 * (near[0][0][:1] - problem.erased[0].C)
    problem = problem._replace(variants=near, labels=labels)
    assert not solve("realera", problem).notes
    problem = problem._replace(preserved=torch.cat([problem.preserved[:3], inside, problem.preserved[4:]]))
    (note,) = solve("realera", problem).notes
    assert "within the neighbourhood that is erased: 'prompt 3';" in note
    assert "lower the reach" in note
    assert not solve("realera", problem, SolverSettings(reach=0.2)).notes


def test_the_same_seed_gives_the_same_neighbours_and_another_seed_others():
    problem = cases.problem(1)
    first, again, other = (solve("realera", problem, SolverSettings(seed=s)).M.matrix() for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("d", [64, 128])
def test_the_null_space_holds_the_empty_prompt_exactly(d):
    problem = cases.problem(5, d)
    M = solve("null-space", problem).M
    K = fixed_rows(problem.empty.double())
    assert M(K).norm() <= 1e-10 * K.norm()
    pairs = joined_rows(problem.erased)
    assert residual(map_of(M, d), problem.Q(), pairs) < 0.5
    drift = row_energy(M(problem.preserved), problem.Q()).sqrt() / row_energy(problem.preserved, problem.Q()).sqrt()
    assert drift.mean() < 0.01


def test_the_null_space_is_the_same_with_any_weight_of_what_is_kept():
    problem = cases.problem(5)
    plain, heavy = (solve("null-space", problem, SolverSettings(preserve_weight=weight)) for weight in (None, 50.0))
    assert torch.equal(plain.M.matrix(), heavy.M.matrix())
    assert torch.equal(plain.A, heavy.A)


def test_a_null_space_without_room_says_so():
    problem = cases.problem(5, 64, kept=400)
    assert "of 64 directions are free" in solve("null-space", problem, SolverSettings(threshold=1e-6)).notes[0]


def _prompt(start: int, end: int, stop: int, count: int = 12, seed: int = 0) -> PromptTokens:
    g = torch.Generator().manual_seed(seed)
    return PromptTokens(torch.randn(count, 4, generator=g), start, end, stop)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (spec.LAST, [4]),
        (spec.SPAN, [3, 4]),
        (spec.SPAN_TO_END, list(range(3, 12))),
        (spec.FIRST_END, [6]),
        (spec.ENDS, list(range(6, 12))),
        (spec.ALL, list(range(1, 12))),
    ],
)
def test_scopes_never_hold_the_start_token(scope, expected):
    assert rows.scope_positions(_prompt(3, 5, 6), scope) == expected


def test_tokens_pair_by_their_role_and_never_with_the_start_token():
    concept, anchor, empty = _prompt(3, 5, 7), _prompt(3, 4, 6), _prompt(1, 1, 1)
    assert [rows.counterpart_position(p, concept, anchor) for p in range(1, 12)] == [1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [rows.counterpart_position(p, concept, empty) for p in range(1, 12)] == [1, 1, 1, 2, 1, 1, 1, 2, 3, 4, 5]


def test_a_prompt_counts_once_however_many_tokens_it_has_and_equal_pairs_are_left_out():
    concept, anchor = _prompt(3, 5, 6, seed=1), _prompt(3, 5, 6, seed=2)
    pairs = rows.paired_rows(concept, anchor, spec.SPAN_TO_END, 2.0)
    assert float(pairs.weights.sum()) == pytest.approx(2.0)
    concept.tokens[7:] = anchor.tokens[7:]
    assert len(rows.paired_rows(concept, anchor, spec.SPAN_TO_END, 2.0)) == 4
    held, weights, names = rows.preserved_rows(concept, 1.0, whole=True)
    assert len(held) == len(names) == 11
    assert float(weights.sum()) == pytest.approx(1.0)
    assert torch.equal(rows.preserved_rows(concept, 1.0, whole=False)[0], concept.tokens[[4, 6]].double())


_DOG = (rows.NamedSpan("a", 1, 2), rows.NamedSpan("big", 2, 3), rows.NamedSpan("bulldog", 3, 5))


@pytest.mark.parametrize(
    ("whole", "ends", "names"),
    [
        (False, True, ("bulldog", "bulldog", "end")),
        (False, False, ("bulldog", "bulldog")),
        (True, True, ("a", "big", "bulldog", "bulldog", "punctuation", "end", *["padding"] * 5)),
        (True, False, ("a", "big", "bulldog", "bulldog", "punctuation")),
    ],
)
def test_the_last_word_is_held_whole_and_the_full_stop_after_it_is_not(whole, ends, names):
    prompt = _prompt(6, 6, 6)._replace(words=_DOG)
    held = rows.preserved_rows(prompt, 2.0, whole=whole, ends=ends)
    assert held.names == names
    assert float(held.weights.sum()) == pytest.approx(2.0)
    if not whole:
        assert torch.equal(held.rows, prompt.tokens[[3, 4, 6] if ends else [3, 4]].double())


def test_the_last_subject_token_is_of_the_phrases_last_word():
    prompt = _prompt(3, 6, 6)._replace(words=_DOG)  # the phrase ends with a full stop
    assert rows.scope_positions(prompt, spec.LAST) == [4]


@pytest.mark.parametrize(
    ("name", "prompt", "refused"),
    [
        ("cat.", "a cat", True),
        ("cat", "a cat, sleeping", True),
        ("Mr. Bean", "a photo of mr. bean.", True),
        ("C++", "a book about c++", True),
        ("cat", "a catfish", False),
        ("???", "a cat", False),
        ("???", "what ???", True),
    ],
)
def test_a_preserved_prompt_names_a_concept_by_its_words_whatever_stands_beside_them(name, prompt, refused):
    concepts = [spec.Erased(name, "", ("{}",), spec.LAST, 1.0)]
    kept = [spec.Preserved((prompt,), 1.0)]
    if not refused:
        spec.check_preserved(concepts, kept)
        return
    with pytest.raises(ValueError, match="is to be preserved and"):
        spec.check_preserved(concepts, kept)


def test_sentences_pair_the_concept_with_its_anchor_in_the_same_words():
    erased = spec.Erased("cat", "dog", ("{}", "a photo of a {}"), spec.LAST, 1.0)
    assert spec.sentences(erased) == [("cat", "dog", "cat"), ("a photo of a cat", "a photo of a dog", "cat")]
    assert spec.sentences(erased._replace(anchor="")) == [
        ("cat", "", "cat"),
        ("a photo of a cat", "a photo of a", "cat"),
    ]


def test_other_brackets_in_a_sentence_are_words():
    erased = spec.Erased("cat", "dog", ("{} {a}", "{{}} {", "{0} {}"), spec.LAST, 1.0)
    spec.check_erased(erased)
    assert [s.text for s in spec.sentences(erased)] == ["cat {a}", "{cat} {", "{0} cat"]
    assert [s.anchored for s in spec.sentences(erased)] == ["dog {a}", "{dog} {", "{0} dog"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concept": " "}, "no concept to erase"),
        ({"anchor": "Cat"}, "anchor is the concept itself.*leave the anchor empty"),
        ({"scope": "most"}, "no scope 'most'.*subject to end"),
        ({"templates": ("a photo",)}, "needs one {}"),
    ],
)
def test_what_cannot_be_erased_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        spec.check_erased(spec.Erased("cat", "dog", ("{}",), spec.LAST, 1.0)._replace(**change))


def test_lists_on_wires_come_in_the_order_they_were_made():
    first = spec.Erased("cat", "", ("{}",), spec.LAST, 1.0)
    second = spec.Erased("dog", "", ("{}",), spec.LAST, 1.0, (), first)
    assert [e.concept for e in second.in_order()] == ["cat", "dog"]
    kept = spec.Preserved(("b",), 1.0, False, spec.Preserved(("a",), 1.0))
    assert [p.prompts for p in kept.in_order()] == [("a",), ("b",)]
