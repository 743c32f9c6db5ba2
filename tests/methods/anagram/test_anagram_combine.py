"""Combination, balancing and rectification against the plainest possible versions, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_concepts.methods.anagram import rectify
from comfyui_concepts.methods.anagram.balance import BALANCES, ViewScorer, by_score, manual
from comfyui_concepts.methods.anagram.combine import AVERAGING, MULTI_TASK_FAST, Combination, combiner, mix
from comfyui_concepts.methods.anagram.prediction import Predictions, ScoreMemory

SHAPE = (2, 4, 24, 24)


def _normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _noises(rho, count, std=1.0, seed=0, shape=(1, 4, 128, 128)):
    """Noises of pairwise correlation rho."""
    common = _normal(seed, shape)
    return [std * (rho**0.5 * common + (1 - rho) ** 0.5 * _normal(seed + 1 + i, shape)) for i in range(count)]


def _known(noises, *, signal=1.0, noise=2.0, negative=None, cfg=1.0, progress=0.5, step=0):
    """Predictions of views that see these noises in one noisy picture."""
    x = _normal(50, noises[0].shape)
    to_x0 = lambda e: (x - noise * e) / signal  # noqa: E731
    return Predictions(
        x,
        signal,
        noise,
        progress,
        step,
        tuple(map(to_x0, noises)),
        None if negative is None else tuple(map(to_x0, negative)),
        cfg,
    )


def _weights(*weights, batch=2):
    return torch.tensor([weights] * batch, dtype=torch.float64)


def test_mixing_is_the_weighted_mean():
    a, b, c = (_normal(i) for i in range(3))
    torch.testing.assert_close(mix([a, b, c], _weights(1 / 3, 1 / 3, 1 / 3)), (a + b + c) / 3)
    torch.testing.assert_close(mix([a, b], _weights(0.75, 0.25)), 0.75 * a + 0.25 * b)


def test_each_picture_of_a_batch_may_have_its_own_weights():
    a, b = _normal(0), _normal(1)
    mixed = mix([a, b], torch.tensor([[1.0, 0.0], [0.25, 0.75]], dtype=torch.float64))
    torch.testing.assert_close(mixed[0], a[0])
    torch.testing.assert_close(mixed[1], 0.25 * a[1] + 0.75 * b[1])


def test_a_lone_view_passes_bit_for_bit():
    a, b = _normal(0), _normal(1)
    assert mix([a], _weights(1.0)) is a
    assert mix([a, b], _weights(0.0, 1.0)) is b


@pytest.mark.parametrize("noise", [0.1, 1.0, 14.6])
def test_averaging_denoised_noise_or_velocity_is_the_same(noise):
    x, *denoised = (_normal(i) for i in range(4))
    alphas = _weights(0.5, 0.3, 0.2)
    noises = [(x - d) / noise for d in denoised]
    torch.testing.assert_close(x - noise * mix(noises, alphas), mix(denoised, alphas))


@pytest.mark.parametrize("name", BALANCES)
def test_balances_sum_to_one_and_have_no_scale(name):
    known = _known(_noises(0.3, 3, shape=SHAPE), negative=_noises(0.3, 3, seed=9, shape=SHAPE), cfg=5.0)
    for progress in (0.1, 0.9):
        p = Predictions(**{**known.__dict__, "percent": progress})
        alphas = BALANCES[name]([1.0, 2.0, 1.0])(p)
        assert alphas.shape == (2, 3)
        torch.testing.assert_close(alphas.sum(1), torch.ones(2))
        assert (alphas >= 0).all()
        torch.testing.assert_close(BALANCES[name]([3.0, 6.0, 3.0])(p), alphas)


def _at(progress=0.5, step=0):
    return _known(_noises(0.3, 2, shape=SHAPE), progress=progress, step=step)


def test_prioritise_first_gives_the_last_fifth_to_the_first_view():
    weigh = BALANCES["prioritise first"]([1.0, 1.0])
    assert weigh(_at(0.79))[0].tolist() == [0.5, 0.5]
    assert weigh(_at(0.8))[0].tolist() == [1.0, 0.0]


def test_alternate_takes_turns_and_leaves_out_weight_0():
    weigh = BALANCES["alternate"]([1.0, 0.0, 1.0])
    p = lambda step: _known(_noises(0.3, 3, shape=SHAPE), step=step)  # noqa: E731
    assert [weigh(p(step))[0].tolist().index(1.0) for step in range(4)] == [0, 2, 0, 2]


def test_guidance_norm_raises_the_view_that_wants_more():
    same, far = _noises(0.0, 2, shape=SHAPE)
    known = _known([0.9 * same, 3 * far], negative=[same, far], cfg=5.0)
    alphas = BALANCES["guidance norm"]([1.0, 1.0])(known)
    assert (alphas[:, 1] > 0.9).all()
    assert torch.equal(
        BALANCES["guidance norm"]([1.0, 1.0])(_at()), manual([1.0, 1.0])(_at())
    )  # no negative to compare with


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -0.5]])
@pytest.mark.parametrize("name", BALANCES)
def test_bad_weights_get_a_sentence(name, weights):
    with pytest.raises(ValueError, match="Weights must be 0 or more, and at least one above 0"):
        BALANCES[name](weights)


def test_unknown_names_get_a_sentence():
    with pytest.raises(ValueError, match="no balance 'fair'; choose one of: manual"):
        combiner(Combination("fair"), [1.0])
    with pytest.raises(ValueError, match="no rectification 'loud'; choose one of: off, match, unit"):
        combiner(Combination(rectification="loud"), [1.0])


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("std", [1.0, 1.3])
def test_what_the_gains_restore(rho, std):
    """unit: variance 1; match: the variance each view has. Both against the sample itself, without the Gram matrix."""
    noises = _noises(rho, 3, std)
    alphas = _weights(0.5, 0.3, 0.2, batch=1)
    mixed = mix(noises, alphas)
    products = rectify.gram(torch.stack(noises, 1)).double()
    power = lambda e: e.square().mean()  # noqa: E731
    assert power(rectify.gain_unit(products, alphas) * mixed).item() == pytest.approx(1.0, abs=1e-3)
    single = sum(w * power(e) for w, e in zip((0.5, 0.3, 0.2), noises, strict=True)).item()
    assert power(rectify.gain_match(products, alphas) * mixed).item() == pytest.approx(single, abs=1e-3)


def test_views_that_agree_need_no_gain():
    (one,) = _noises(1.0, 1)
    products = rectify.gram(torch.stack([one, one], 1)).double()
    assert rectify.gain_match(products, _weights(0.5, 0.5, batch=1)).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("signal", "noise"), [(1.0, 2.0), (1.0, 14.6), (0.4, 0.6)], ids=["EPS", "EPS, noisy", "flow"])
def test_the_rectified_picture_implies_the_mixed_noise_times_the_gain(signal, noise):
    known = _known(_noises(0.2, 2, shape=SHAPE), signal=signal, noise=noise)
    mixed = mix(known.positive, _weights(0.5, 0.5))
    factor = torch.tensor([1.2, 1.05], dtype=torch.float64)
    rectified = rectify.with_gain(known, mixed, factor)
    torch.testing.assert_close(known.as_noise(rectified), factor.view(-1, 1, 1, 1) * known.as_noise(mixed))


def test_guidance_gets_exactly_the_gain():
    """The factor is applied to positive and negative; the guided prediction's noise then has it too."""
    known = _known(_noises(0.2, 2, shape=SHAPE), negative=_noises(0.6, 2, seed=20, shape=SHAPE), cfg=5.0)
    positive, negative = combiner(MULTI_TASK_FAST, [1.0, 1.0])(known)
    guided = known.as_noise(negative + 5.0 * (positive - negative))
    plain = [known.as_noise(x) for x in known.guided()]
    alphas = _weights(0.5, 0.5)
    expected = rectify.gain_match(rectify.gram(torch.stack(plain, 1)).double(), alphas).clamp(1, 2**0.5)
    torch.testing.assert_close(guided, expected.view(-1, 1, 1, 1) * mix(plain, alphas), rtol=1e-5, atol=1e-5)


def test_rectification_is_off_where_it_has_nothing_to_say():
    known = _known(_noises(0.2, 2, shape=SHAPE))
    plain = combiner(AVERAGING, [1.0, 1.0])(known)[0]
    assert not torch.equal(combiner(MULTI_TASK_FAST, [1.0, 1.0])(known)[0], plain)
    assert torch.equal(combiner(Combination(rectification="match", strength=0.0), [1.0, 1.0])(known)[0], plain)
    outside = Predictions(**{**known.__dict__, "percent": 0.95})
    assert torch.equal(combiner(MULTI_TASK_FAST, [1.0, 1.0])(outside)[0], plain)
    one = Predictions(**{**known.__dict__, "positive": known.positive[:1]})
    assert combiner(MULTI_TASK_FAST, [1.0])(one)[0] is known.positive[0]


@pytest.mark.parametrize("kind", rectify.GAINS)
def test_a_lone_view_among_several_is_not_rectified(kind):
    """The weights of ``alternate``, of ``prioritise first`` and of a view beside one of weight 0: nothing was averaged
    away."""
    known = _known(_noises(0.2, 2, std=0.5, shape=SHAPE))
    settings = Combination(rectification=kind)
    assert combiner(settings, [1.0, 0.0])(known)[0] is known.positive[0]
    assert combiner(replace(settings, weighing="alternate"), [1.0, 1.0])(known)[0] is known.positive[known.step % 2]
    assert not torch.equal(combiner(replace(settings, strength=0.5), [1.0, 1.0])(known)[0], known.positive[0])


@pytest.mark.parametrize(("signal", "noise"), [(1.0, 1000.0), (0.001, 0.999), (1.0, 0.002)])
def test_the_gain_is_bounded_at_the_ends_of_the_schedule(signal, noise):
    known = _known(_noises(-0.0, 2, std=3.0, shape=SHAPE), signal=signal, noise=noise)
    factor = rectify.gain(known, _weights(0.5, 0.5), "unit", 1.0)
    assert ((factor >= 1.0) & (factor <= 2**0.5 + 1e-9)).all()


def test_the_gain_has_the_bound_that_was_asked():
    """0 is √views, which views that share nothing need; below 1 there is nothing to give back."""
    known, alphas = _known(_noises(0.0, 2, shape=SHAPE)), _weights(0.5, 0.5)
    for max_gain, wanted in ((0.0, 2**0.5), (1.1, 1.1), (0.5, 1.0)):
        assert rectify.gain(known, alphas, "match", 1.0, max_gain).tolist() == pytest.approx([wanted] * 2, abs=0.02)
    bound = combiner(Combination(rectification="match", max_gain=1.1), [1.0, 1.0])(known)[0]
    mixed = mix(known.positive, alphas)
    torch.testing.assert_close(known.as_noise(bound), 1.1 * known.as_noise(mixed), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("signal", "noise"), [(0.001, 0.999), (1.0, 14.6), (1.0, 0.002)])
def test_views_that_nearly_agree_are_hardly_moved_however_much_a_model_amplifies(signal, noise):
    """At the first levels of a flow model a gain off by half a percent would move the picture by five times its
    size."""
    common, *own = (_normal(i) for i in range(3))
    known = _known([common + 0.01 * e for e in own], signal=signal, noise=noise)
    settings = Combination(rectification="match", start=0.0, end=1.0)
    moved = combiner(settings, [1.0, 1.0])(known)[0] - mix(known.positive, _weights(0.5, 0.5))
    assert moved.square().mean().sqrt() < 0.05


def test_flow_models_at_pure_noise_are_left_alone():
    known = _known(_noises(0.2, 2, shape=SHAPE), signal=1.0, noise=1.0)
    pure = Predictions(**{**known.__dict__, "signal": 0.0, "percent": 0.1})
    assert torch.isfinite(combiner(MULTI_TASK_FAST, [1.0, 1.0])(pure)[0]).all()


def _by_score(score, weights=(1.0, 1.0), progress=0.5, **listened):
    known = _known(_noises(0.3, len(weights), shape=SHAPE), progress=progress)
    scorer = ViewScorer(lambda latents: torch.tensor(score).expand(len(latents), -1), **listened)
    return by_score(list(weights), scorer)(known)


def test_the_view_that_reads_worse_gets_more_weight_by_the_papers_formula():
    s = torch.tensor([0.28, 0.20])
    for progress in (0.2, 0.9):
        wanted = s ** -(1 + progress)
        torch.testing.assert_close(_by_score([0.28, 0.20], progress=progress)[0], wanted / wanted.sum())
    assert _by_score([0.28, 0.20], progress=29 / 30)[0].tolist() == pytest.approx([0.340, 0.660], abs=2e-3)


def test_scores_of_any_size_give_weights_that_are_weights():
    for score in ([0.0, 0.3], [-0.5, 0.2], [1.0, 1e-9], [0.3, 0.3]):
        weights = _by_score(score)
        torch.testing.assert_close(weights.sum(1), torch.ones(2))
        assert (weights >= 0.1499).all()
    torch.testing.assert_close(_by_score([0.3, 0.1])[0], _by_score([0.1, 0.3])[0].flip(0))


def test_early_steps_are_not_scored_and_a_silent_view_stays_silent():
    torch.testing.assert_close(_by_score([0.1, 0.9], progress=0.1)[0], torch.tensor([0.5, 0.5]))
    assert _by_score([0.1, 0.9], progress=0.1, start=0.05)[0, 0] > 0.5
    assert _by_score([0.1, 0.9], progress=0.4, start=0.5)[0].tolist() == [0.5, 0.5]
    assert _by_score([0.1, 0.9, 0.5], weights=(1.0, 1.0, 0.0))[0, 2] == 0


def test_no_view_gets_less_than_the_least_nor_more_than_the_rest():
    torch.testing.assert_close(_by_score([1.0, 1e-9], min_weight=0.3)[0], torch.tensor([0.3, 0.7]))
    torch.testing.assert_close(_by_score([1.0, 1e-9], min_weight=0.5)[0], torch.tensor([0.5, 0.5]))


class Readings:
    """A reader's scores, one after the other; it notes how often it was asked."""

    def __init__(self, *scores):
        self.scores, self.asked = list(scores), 0

    def __call__(self, latents):
        self.asked += 1
        return torch.tensor(self.scores[self.asked - 1]).expand(len(latents), -1)


def test_readings_are_a_running_mean_within_a_sampling_and_none_is_left_to_the_next():
    readings = Readings([0.2, 0.4], [0.4, 0.2], [0.4, 0.2], [0.4, 0.2])
    weigh = by_score([1.0, 1.0], ViewScorer(readings, smoothing=0.7, min_weight=0.0))
    memory, known = ScoreMemory(), _known(_noises(0.3, 2, shape=SHAPE))

    def at(level, memory):
        return weigh(Predictions(**{**known.__dict__, "sigma": level, "memory": memory}))[0]

    def wanted(a, b):
        return torch.tensor([a**-1.5, b**-1.5]) / (a**-1.5 + b**-1.5)

    torch.testing.assert_close(at(3.0, memory), wanted(0.2, 0.4))
    second = at(2.0, memory)
    torch.testing.assert_close(second, wanted(0.26, 0.34))
    assert torch.equal(at(2.0, memory), second)  # a sampler of second order, or a patch, asks at the level again
    assert readings.asked == 2
    torch.testing.assert_close(at(1.0, memory), wanted(0.302, 0.298))
    torch.testing.assert_close(at(1.0, ScoreMemory()), wanted(0.4, 0.2))


def test_read_is_the_weighted_picture_with_its_guidance():
    known = _known(_noises(0.3, 2, shape=SHAPE), negative=_noises(0.1, 2, seed=9, shape=SHAPE), cfg=4.0)
    read: list[torch.Tensor] = []

    def score(latents):
        read.append(latents)
        return torch.full((len(latents), 2), 0.3)

    by_score([3.0, 1.0], ViewScorer(score))(known)
    guided = [u + 4 * (c - u) for c, u in zip(known.positive, known.negative, strict=True)]
    torch.testing.assert_close(read[0], 0.75 * guided[0] + 0.25 * guided[1])
