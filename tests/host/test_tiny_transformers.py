"""The tiny models of every family: they run, at odd sizes too, and each of their weights has a say."""

import pytest
import torch

from .tiny_transformers import FAMILIES, names, noise, predict, shared_transformer, tiny_transformer


def test_most_families_are_on_every_host():
    assert set(FAMILIES) - set(names(every=True)) <= {"krea2", "anima"}


@pytest.mark.parametrize("name", names())
def test_a_prediction_has_the_latent_s_form_and_is_finite(name):
    patcher = shared_transformer(name)
    latent = noise(patcher, 8, 6, batch=2)
    out = predict(patcher, name, latent)
    assert out.shape == latent.shape
    assert torch.isfinite(out).all()
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("name", names())
def test_the_prompt_moves_the_picture(name):
    patcher = shared_transformer(name)
    latent = noise(patcher)
    ten, nine = predict(patcher, name, latent), predict(patcher, name, latent, length=9)
    assert (ten - nine).norm() > 1e-3 * ten.norm()


def test_two_models_of_one_seed_are_equal():
    first, second = (tiny_transformer("wan", seed=3).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
