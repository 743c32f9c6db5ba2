import pytest
import torch
from comfyui_concepts.methods.anagram.combine import average


def _predictions(n):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64) for _ in range(n)]


def test_it_is_the_weighted_mean():
    a, b, c = _predictions(3)
    torch.testing.assert_close(average([a, b, c], [1, 1, 1]), (a + b + c) / 3)
    torch.testing.assert_close(average([a, b], [3, 1]), 0.75 * a + 0.25 * b)


def test_weights_have_no_scale():
    predictions = _predictions(2)
    torch.testing.assert_close(average(predictions, [0.2, 0.3]), average(predictions, [2, 3]))


def test_a_lone_view_passes_bit_for_bit():
    (a,) = _predictions(1)
    assert average([a], [0.3]) is a
    b = _predictions(2)[1]
    assert average([a, b], [0.7, 0.0]) is a


@pytest.mark.parametrize("sigma", [0.1, 1.0, 14.6])
def test_averaging_denoised_noise_or_velocity_is_the_same(sigma):
    x, *denoised = _predictions(4)
    weights = [0.5, 0.3, 0.2]
    noise = [(x - d) / sigma for d in denoised]
    torch.testing.assert_close(x - sigma * average(noise, weights), average(denoised, weights))


@pytest.mark.parametrize(("count", "weights"), [(0, []), (2, [1.0]), (2, [0.0, 0.0]), (2, [1.0, -0.5])])
def test_bad_weights_get_a_sentence(count, weights):
    with pytest.raises(ValueError, match=r"weights|Weights"):
        average(_predictions(count), weights)
