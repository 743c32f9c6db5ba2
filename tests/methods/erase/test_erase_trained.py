"""What the training methods ask for, in plain tensors."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.methods.erase.curve import curve_of, training_text
from comfyui_concepts.methods.erase.lowrank import LowRank
from comfyui_concepts.methods.erase.train import Schedule, train
from comfyui_concepts.methods.erase.trained import BUDGETS, FEW_SHOT, METHODS, scheduled
from comfyui_concepts.methods.erase.trained.all_but_one import (
    all_but_one,
    coarse,
    concept_share,
    led_from_the_concept,
    suppressed,
)
from comfyui_concepts.methods.erase.trained.co_erasing import refined
from comfyui_concepts.methods.erase.trained.context import (
    ConceptPrompts,
    MethodSettings,
    NoiseProcess,
    Pictures,
    PreservedPrompts,
    TextEncoderContext,
    TrainingTexts,
    Trajectories,
    UNetContext,
)
from comfyui_concepts.methods.erase.trained.doco import Discriminator, quiet
from comfyui_concepts.methods.erase.trained.esd import esd
from comfyui_concepts.methods.erase.trained.few_shot import bounded, embedding_drift, few_shot
from comfyui_concepts.methods.erase.trained.prompts import EncodedPrompts, stacked
from comfyui_concepts.methods.erase.trained.realera import directions, neighbours, realera
from comfyui_concepts.methods.erase.trained.trajectories import TrajectoryBank
from torch.nn.functional import binary_cross_entropy_with_logits as bce

NO_NOISE = NoiseProcess(torch.ones(1), None, None, None)


@pytest.fixture(autouse=True)
def ordinary_tensors(inference_mode):
    with torch.inference_mode(False):
        yield


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_all_but_one_wants_the_alternatives_detail_where_the_concept_was():
    concept, anchor, empty = (_random(2, 4, 16, 12, seed=s) for s in (1, 2, 3))
    assert torch.allclose(led_from_the_concept(concept, anchor, empty, 1.0), concept - empty)
    gone = led_from_the_concept(concept, anchor, empty, 0.0)
    torch.testing.assert_close(coarse(gone - (concept - empty)), coarse(anchor - concept - coarse(anchor - concept)))
    torch.testing.assert_close(gone - (anchor - empty), coarse(concept - anchor))
    beyond = led_from_the_concept(concept, anchor, empty, -0.5)
    torch.testing.assert_close(beyond - gone, -0.5 * (concept - anchor - coarse(concept - anchor)))


def test_all_but_one_without_an_alternative_keeps_the_rest_of_the_prompt():
    """Nothing of the concept's guidance stays then, coarse or not: a blurred concept is the concept."""
    concept, rest, empty = (_random(2, 4, 3, 3, seed=s) for s in (1, 2, 3))
    assert torch.equal(suppressed(concept, rest, empty, 0.0), rest - empty)
    assert not suppressed(concept, empty, empty, 0.0).any()
    assert torch.allclose(suppressed(concept, empty, empty, 1.0), -(concept - empty))


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (3, 2, 4, 1, 3), (1, 1, 64, 48), (2, 2)])
def test_what_is_coarse_has_no_detail_and_the_same_mean(shape):
    x = _random(*shape)
    assert coarse(x).shape == x.shape
    torch.testing.assert_close(coarse(torch.ones_like(x)), torch.ones_like(x))
    if min(shape[-2:]) >= 16:
        stripes = torch.ones(shape[-1], dtype=x.dtype)
        stripes[::2] = -1
        inside = coarse(stripes.expand(shape))[..., 4:-4]  # the border is reflected
        assert inside.abs().max() < 0.01


def test_all_but_one_leads_from_the_concept_past_the_alternative():
    assert concept_share(4, 0.5, 0.25).tolist() == [1.0, 0.5, 0.0, -0.25]
    # with the whole sampling to give way in, a tenth of the concept is left at the last step, which lets it through
    assert concept_share(10, 1.0, 0.0)[-1] == pytest.approx(0.1)


def test_all_but_one_leads_only_concepts_that_become_something():
    """In one list there may be both. A concept without an anchor is not led: what is left of it would be seen."""
    x = _random(3, 3, 4, 8, 8).float()
    says = torch.tensor([1.0, 2.0, 10.0, 20.0, 0.0])  # two concepts, what becomes of them, ''
    level = torch.arange(8.0)

    def predict(x, sigma, prompts, *, adapted):
        said = [says[p.context[:, 0, 0].long()].view(-1, 1, 1, 1) * (2 + level) for p in prompts]
        return torch.stack([row.expand_as(x) for row in said])

    words = torch.arange(5).float().view(5, 1, 1)
    concept, anchor, empty = EncodedPrompts(words[:2]), EncodedPrompts(words[2:4]), EncodedPrompts(words[4:])
    # trajectories of the second, the first, the second
    bank = TrajectoryBank(x, torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1, 0, 1]))
    settings = MethodSettings(batch=64, eta=0.5, eta_alone=0.25, layout=0.35)

    def wanted(row, step, replaced):
        now, then = (says[i].expand(1, 8, 8) * (2 + level) for i in (row, row + 2))
        if not replaced:
            return then - 0.25 * (now - then)
        share = (1.0, 1 - 1 / 3 / 0.35, -0.5)[step]
        return then + coarse(now - then) + share * (now - then - coarse(now - then))

    for replaced in ((True, True), (True, False), (False, True), (False, False), ()):
        prompts = ConceptPrompts(concept, anchor, empty, concepts=2, replaced=replaced)
        context = UNetContext(predict=predict, prompts=prompts, noise=NO_NOISE, trajectories=Trajectories(bank))
        loss = float(all_but_one(context, settings)(torch.Generator().manual_seed(0)).erase)
        drawn = bank.draw(64, torch.Generator().manual_seed(0), torch.device("cpu"))
        expected = [
            (says[row] * (2 + level) - wanted(row, step, not replaced or replaced[row])).square().mean()
            for row, step in zip(drawn.prompt.tolist(), drawn.position[1].tolist(), strict=True)
        ]
        assert loss == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_the_ascent_is_bounded():
    loss = torch.tensor([0.2, 0.9, 1.5], requires_grad=True)
    left = bounded(loss, torch.tensor([1.0, 1.0, 1.0]))
    assert torch.allclose(left, torch.tensor([0.8, 0.1, 0.0]))
    (gradient,) = torch.autograd.grad(left.sum(), loss)
    assert gradient.tolist() == [-1.0, -1.0, 0.0]  # descent raises l, until κ


def test_the_drift_of_embeddings_is_relative():
    before = _random(3, 7, 5)
    assert float(embedding_drift(before, before)) == 0.0
    assert float(embedding_drift(before * 1.1, before)) == pytest.approx(0.01)
    assert float(embedding_drift(before * 11, before * 10)) == pytest.approx(0.01)


def test_refined_image_tokens_lie_in_the_convex_hull_of_the_text():
    tokens, text = _random(2, 4, 8, seed=1), _random(2, 6, 8, seed=2)
    made = refined(tokens, text)
    assert made.shape == tokens.shape
    for row in range(2):
        for token in range(4):  # weights that reproduce it, of a simplex: 6 rows of dimension 8 are independent
            weights = torch.linalg.lstsq(text[row].T, made[row, token][:, None]).solution[:, 0]
            assert torch.allclose(weights @ text[row], made[row, token])
            assert weights.min() >= -1e-9
            assert float(weights.sum()) == pytest.approx(1.0)
    close = refined(text[:, :4] * 200, text)
    assert torch.allclose(close, text[:, :4], atol=1e-3)


def test_neighbours_stay_within_the_farthest_sentence():
    sentences = _random(5, 7, 6)
    apart = directions(sentences)
    assert not apart[:, 0].any()  # the first token of a prompt is never moved
    farthest = apart.flatten(1).norm(dim=1).max()
    context = sentences[[0] * 200]
    near = neighbours(context, apart, torch.Generator().manual_seed(1)) - context
    assert near.flatten(1).norm(dim=1).max() <= farthest * (1 + 1e-9)
    assert near.flatten(1).norm(dim=1).std() > 0
    basis = torch.linalg.svd(apart.flatten(1), full_matrices=False).Vh[:4]
    assert torch.allclose(near.flatten(1) @ basis.T @ basis, near.flatten(1), atol=1e-9)
    with pytest.raises(ValueError, match="template set"):
        directions(sentences[:1])


def test_the_discriminator_tells_toy_latents_apart():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Discriminator(4, width=8)
        optimiser = torch.optim.Adam(judge.parameters(), 2e-3)
        for _ in range(60):
            sigma = torch.rand(16) * 3
            real, fake = torch.randn(16, 4, 8, 8), torch.randn(16, 4, 8, 8) + 0.7
            out = judge(real, sigma), judge(fake, sigma)
            loss = bce(out[0], torch.zeros_like(out[0])) + bce(out[1], torch.ones_like(out[1]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            sigma = torch.rand(64) * 3
            answers = judge(torch.randn(64, 4, 8, 8), sigma), judge(torch.randn(64, 4, 8, 8) + 0.7, sigma)
    right = (answers[0].mean((1, 2, 3)) < 0).float().mean() + (answers[1].mean((1, 2, 3)) > 0).float().mean()
    assert right > 1.8


def test_the_discriminator_sees_only_states_with_something_to_see():
    bank = TrajectoryBank(torch.zeros(2, 6, 4, 8, 8), torch.tensor([14.0, 7.0, 4.0, 2.0, 1.0, 0.3]), torch.zeros(2))
    assert quiet(bank).sigma.tolist() == [2.0, 1.0, pytest.approx(0.3)]
    assert quiet(bank).x.shape == (2, 3, 4, 8, 8)
    noisy = bank._replace(sigma=torch.tensor([80.0, 60.0, 50.0, 40.0, 30.0, 20.0]))
    assert len(quiet(noisy).sigma) == 3


class Toy:
    """A model that answers the sum of its latents and the prompt, with one trained number a channel; float64."""

    def __init__(self):
        self.factors = {"w": LowRank(torch.zeros(4, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))}
        self.asked: list[tuple[tuple[int, ...], bool]] = []

    def predict(self, x, sigma, prompts, *, adapted):
        self.asked += [(tuple(p.context.shape), adapted) for p in prompts]
        shift = (self.factors["w"].up @ self.factors["w"].down).view(1, 4, 1, 1) * adapted
        said = [p.context.mean((1, 2)).view(-1, 1, 1, 1) * (1 + shift) for p in prompts]
        return torch.stack([x + s for s in said])

    def context(self, concepts=1, sentences=3, **more):
        rows = EncodedPrompts(_random(concepts * sentences, 7, 8, seed=1))
        bank = TrajectoryBank(
            _random(4, 3, 4, 8, 8, seed=2), torch.tensor([3.0, 2.0, 1.0]), torch.arange(4) % len(rows.context)
        )
        kept = TrajectoryBank(_random(2, 3, 4, 8, 8, seed=3), torch.tensor([3.0, 2.0, 1.0]), torch.arange(2))
        anchor, empty = EncodedPrompts(rows.context * 0.5), EncodedPrompts(_random(1, 7, 8, seed=4))
        preserved = PreservedPrompts(EncodedPrompts(_random(2, 7, 8, seed=5)), kept)
        return UNetContext(
            predict=self.predict, prompts=ConceptPrompts(rows, anchor, empty, concepts), noise=NO_NOISE,
            trajectories=Trajectories(bank, preserved=preserved), **more,
        )  # fmt: skip


@pytest.mark.parametrize("method", [esd, realera])
def test_a_batch_of_one_sees_the_preserved_prompts_too(method):
    """'' and a preserved prompt by turns: with '' alone, what is listed was not held at all."""
    toy = Toy()
    context = toy.context()
    terms = method(context, MethodSettings(batch=1, preserve_batch=1))
    toy.factors["w"] = LowRank(torch.full((4, 1), 0.3, dtype=torch.float64), toy.factors["w"].down)
    drifts = {round(float(terms(torch.Generator().manual_seed(s)).preserve), 9) for s in range(40)}
    assert len(drifts) >= 3  # '' and two preserved prompts drift by different amounts


def test_a_batch_of_one_sees_the_sentences_and_their_neighbours():
    toy = Toy()
    context = toy.context()
    terms, seen = realera(context, MethodSettings(batch=1, preserve_batch=1)), set()
    asked = context.predict

    def watch(x, sigma, prompts, *, adapted):
        if adapted:
            first = prompts[0].context[0]
            seen.add(bool((first - context.prompts.concept.context).abs().flatten(1).amax(1).min() < 1e-9))
        return asked(x, sigma, prompts, adapted=adapted)

    object.__setattr__(context, "predict", watch)
    for seed in range(30):
        terms(torch.Generator().manual_seed(seed))
    assert seen == {True, False}


def test_neighbours_of_several_concepts_are_of_each_of_them():
    sentences = _random(6, 7, 6)
    apart = directions(sentences, 2)
    for number in range(2):
        own = sentences[number::2]
        assert torch.allclose(apart[number::2, 1:], (own - own.mean(0))[:, 1:])
    with pytest.raises(ValueError, match="template set"):
        directions(sentences[:3], 2)


def test_few_shot_ends_at_kappa_and_keeps_its_prompts():
    """The ascent makes the words explain the pictures as badly as '' does, and stops there."""
    table = {text: _random(1, 7, 8, seed=i) for i, text in enumerate(("a cat", "", "a dog", "a thing"))}
    up = torch.zeros(8, 2, dtype=torch.float64)
    factors = {"fc1": LowRank(up, _random(2, 8, seed=9) * 0.3)}
    picture = _random(1, 4, 8, 8, seed=7)

    def encode(texts, *, adapted):
        change = factors["fc1"].up @ factors["fc1"].down if adapted else torch.zeros(8, 8, dtype=torch.float64)
        return EncodedPrompts(torch.cat([table[t] + table[t] @ change.T for t in texts]))

    def predict(x, sigma, prompts, *, adapted):
        return torch.stack([
            target + (p.context - table["a cat"] + 0.3).square().mean((1, 2)).view(-1, 1, 1, 1) for p in prompts
        ])  # fmt: skip

    target = torch.zeros(4, 4, 8, 8, dtype=torch.float64)
    sigmas = torch.tensor([1.0, 2.0], dtype=torch.float64)
    noise = NoiseProcess(sigmas, lambda clean, noise, sigma: clean + noise, lambda clean, noise, sigma: target, None)
    context = TextEncoderContext(
        predict=predict, prompts=ConceptPrompts(*(encode([t], adapted=False) for t in ("a cat", "a thing", ""))),
        encode=encode, texts=TrainingTexts(("a cat",), ("a thing",), ("a dog",)), pictures=Pictures(picture),
        noise=noise,
    )  # fmt: skip
    schedule = Schedule(400, 2e-2, erased_below=FEW_SHOT.schedule.erased_below, smoothing=FEW_SHOT.schedule.smoothing)
    outcome = train(factors, few_shot(context, MethodSettings(batch=4)), schedule, 0)
    assert "fell below 2%" in outcome.reason
    assert len(outcome.erase) < 300
    assert outcome.erase[0] > 1.0  # there was something to ascend
    assert outcome.preserve[-1] < 0.5
    assert (
        FEW_SHOT.schedule.smoothing**FEW_SHOT.schedule.iterations < FEW_SHOT.schedule.erased_below
    )  # it can be reached


def test_image_tokens_come_after_the_text_and_change_none_of_it():
    words = EncodedPrompts(_random(2, 7, 8), _random(2, 5))
    longer = words.followed_by(_random(2, 4, 8, seed=1))
    assert torch.equal(longer.context[:, :7], words.context)
    assert longer.context.shape == (2, 11, 8)
    assert torch.equal(longer.pooled, words.pooled)
    assert stacked([words, EncodedPrompts(words.context)]).pooled is None


def test_budgets_scale_the_iterations_and_only_those():
    for recipe in METHODS.values():
        counts = [scheduled(recipe, name).iterations for name in BUDGETS]
        assert counts[0] < counts[1] == recipe.schedule.iterations < counts[2]
        assert scheduled(recipe, "draft").rate == recipe.schedule.rate
    with pytest.raises(ValueError, match=r"'quick'.*draft, standard, thorough"):
        scheduled(METHODS["ESD"], "quick")


def test_the_loss_curve_shows_both_losses_whatever_they_are():
    for erase, preserve in (([], []), ([0.0], [0.0]), ([1.0, 0.1, 0.01], [0.0, 0.2, 0.1])):
        picture = curve_of(erase, preserve)
        assert picture.shape[0] == 1
        assert picture.shape[3] == 3
        assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    red = (picture[0] - torch.tensor([214, 84, 74]) / 255).abs().sum(-1) < 0.02
    rows = [torch.nonzero(red[:, x])[:, 0].float().mean() for x in (60, 440)]
    assert rows[1] > rows[0] + 15  # it falls


def test_the_report_says_why_it_ended_and_what_was_missing():
    spec = {"solver": "ESD", "budget": "draft", "concepts": [{"concept": "cat"}], "seed": 3, "kept": []}
    report = {"training": {"reason": "all 9 iterations done", "rank": 4, "erase": [1.0, 0.1], "preserve": [0.0, 0.01]}}
    text = training_text(report, spec)
    assert "all 9 iterations done" in text
    assert "no prompts are preserved" in text
    assert "0.1 at the end" in text
