"""Components add up, own guidance is what it says, and painted maps are followed."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.methods.anagram.combine import AVERAGING, Combination, combiner, with_own_guidance
from comfyui_concepts.methods.anagram.prediction import Predictions
from comfyui_concepts.methods.anagram.views import COMPONENTS, VIEWS, Settings, view_named
from comfyui_concepts.methods.anagram.views.from_image import from_image

FAMILIES = sorted({view_named(name).family for name in COMPONENTS} - {("scale",)})


def _normal(seed, shape=(2, 4, 24, 24)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _known(positive, negative=None, cfg=1.0):
    return Predictions(
        _normal(50), 1.0, 2.0, 0.5, 0, tuple(positive), None if negative is None else tuple(negative), cfg
    )


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 4, 64, 96), (1, 3, 2, 33, 17)])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f[0])
def test_the_parts_of_a_family_sum_to_the_whole(family, shape):
    x = _normal(1, shape)
    parts = [view_named(name).component(x) for name in family]
    torch.testing.assert_close(sum(parts), x, rtol=1e-12, atol=1e-12)
    assert all(not torch.allclose(part, x) for part in parts)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f[0])
def test_equal_prompts_give_the_plain_prediction(family):
    views = [view_named(name) for name in family]
    combine = combiner(AVERAGING, [1.0] * len(views), views)
    c, u = _normal(1), _normal(2)
    positive, negative = combine(_known([c] * len(views), [u] * len(views), cfg=5.0))
    torch.testing.assert_close(positive, c)
    torch.testing.assert_close(negative, u)


@pytest.mark.parametrize(
    "names",
    [
        ("low_pass",),
        ("low_pass", "low_pass"),
        ("low_pass", "identity"),
        ("low_pass", "triple_high"),
        ("low_pass", "high_pass", "identity"),
    ],
)
def test_parts_that_do_not_make_a_picture_are_refused(names):
    with pytest.raises(ValueError, match=r"low_pass and high_pass, each once"):
        combiner(AVERAGING, [1.0] * len(names), [view_named(n) for n in names])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 2.0, 5.0), (1.0, 0.0), (2.0,)], ids=str)
def test_scales_are_shares_by_weight_that_sum_to_the_whole(weights):
    combine = combiner(AVERAGING, weights, [view_named("scale")] * len(weights))
    c, u = [_normal(i) for i in range(len(weights))], [_normal(9 + i) for i in range(len(weights))]
    positive, negative = combine(_known(c, u, cfg=5.0))
    for mixed, parts in ((positive, c), (negative, u)):
        torch.testing.assert_close(mixed, sum(w / sum(weights) * part for w, part in zip(weights, parts, strict=True)))
    torch.testing.assert_close(combine(_known(c[:1] * len(weights)))[0], c[0])


def test_scales_have_no_balance_and_no_rectification():
    c, views = [_normal(1), _normal(2)], [view_named("scale")] * 2
    loud = combiner(Combination("alternate", rectification="match"), [1.0, 1.0], views)
    assert torch.equal(loud(_known(c))[0], combiner(AVERAGING, [1.0, 1.0], views)(_known(c))[0])


@pytest.mark.parametrize("names", [("scale", "identity"), ("scale", "low_pass"), ("low_pass", "high_pass", "scale")])
def test_scales_among_others_are_refused(names):
    with pytest.raises(ValueError, match=r"must hold just (scale,|low_pass and high_pass)"):
        combiner(AVERAGING, [1.0] * len(names), [view_named(n) for n in names])
    with pytest.raises(ValueError, match="at least one above 0"):
        combiner(AVERAGING, [0.0, 0.0], [view_named("scale")] * 2)


def test_far_is_smoother_than_near():
    x = _normal(3, (1, 4, 64, 64))
    low, high = (view_named(name).component(x) for name in ("low_pass", "high_pass"))
    steps = lambda y: y.diff(dim=-1).square().mean() / y.square().mean()  # noqa: E731
    assert steps(low) < 0.2 < 1.5 < steps(high)


def test_a_view_with_its_own_cfg_is_guided_by_it():
    c, u = [_normal(1), _normal(2)], [_normal(3), _normal(4)]
    changed = with_own_guidance(_known(c, u, cfg=4.0), [None, 10.0]).guided()
    torch.testing.assert_close(changed[0], u[0] + 4.0 * (c[0] - u[0]))
    torch.testing.assert_close(changed[1], u[1] + 10.0 * (c[1] - u[1]))
    plain = _known(c, u, cfg=4.0)
    assert with_own_guidance(plain, [None, None]) is plain
    assert with_own_guidance(_known(c), [3.0, 3.0]).positive[0] is c[0]


def _map(height, width):
    """The map that changes nothing."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([columns, rows, torch.zeros_like(rows)], -1)


@pytest.mark.parametrize("size", [(16, 16), (32, 48)])
@pytest.mark.parametrize("name", ["identity", "flip", "rotate_180", "stripes", "half_swap"])
def test_a_painted_view_does_what_the_named_one_does(name, size):
    view = view_named(name, Settings(parts=4 if name == "stripes" else 0))
    painted = from_image(view.forward(_map(*size).movedim(-1, 0)).movedim(0, -1))
    x = torch.arange(size[0] * size[1]).view(size)
    assert torch.equal(painted.forward(x), view.forward(x))
    assert torch.equal(painted.inverse(painted.forward(x)), x)


def test_any_picture_is_a_permutation():
    noise = torch.rand(20, 30, 3, generator=torch.Generator().manual_seed(1))
    for size in ((20, 30), (8, 8), (16, 24)):
        view, x = from_image(noise), torch.arange(size[0] * size[1]).view(size)
        assert torch.equal(view.forward(x).flatten().sort().values, x.flatten())
        assert torch.equal(view.inverse(view.forward(x)), x)


def test_only_the_order_of_a_maps_values_counts():
    smooth = _map(16, 16).flip(0)
    bent = 0.1 + 0.8 * smooth**2
    x = torch.arange(256).view(16, 16)
    assert torch.equal(from_image(bent).forward(x), x.flip(0))


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_a_picture_with_cells_shows_what_a_map_did_to_the_latent(size):
    """Whatever the map: a swirl read finely would move single pixels that no cell has moved."""
    painted = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(1))
    cells = torch.rand(size, generator=torch.Generator().manual_seed(2))
    latent, picture = from_image(painted), from_image(painted, cell=8)
    assert torch.equal(picture.forward(_enlarged(cells)), _enlarged(latent.forward(cells)))
    pixels = torch.arange(64 * size[0] * size[1]).view(8 * size[0], 8 * size[1])
    assert torch.equal(picture.inverse(picture.forward(pixels)), pixels)


@pytest.mark.parametrize(
    "name", ["identity", "flip", "mirror", "rotate_180", "rotate_cw", "transpose", "stripes", "half_swap"]
)
def test_the_cells_of_a_painted_view_lie_as_those_of_the_named_one(name):
    view = view_named(name, Settings(parts=4 if name == "stripes" else 0))
    painted = from_image(view.forward(_map(16, 16).movedim(-1, 0)).movedim(0, -1), cell=8)
    x = torch.arange(128 * 128).view(128, 128)
    assert torch.equal(painted.forward(x), view.forward(x))


def _enlarged(cells):
    return cells.repeat_interleave(8, 0).repeat_interleave(8, 1)


@pytest.mark.parametrize("bad", [torch.zeros(4, 4, 1), torch.full((4, 4, 3), float("nan")), torch.zeros(4, 4)])
def test_a_map_without_colours_is_refused(bad):
    with pytest.raises(ValueError, match="needs a colour picture"):
        from_image(bad)


@pytest.mark.parametrize("name", VIEWS)
def test_the_picture_of_a_latent_view_moves_what_the_latent_moved(name):
    """On a picture with cells, every piece ends at a cell, so that the cells go where they went on the latent."""
    latent, picture = view_named(name, Settings(parts=4)), view_named(name, Settings(parts=4, cell=8))
    if latent.latent == "pixels only":
        return
    cells = torch.arange(256).view(16, 16)
    large = cells.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(picture.forward(large)[4::8, 4::8], latent.forward(cells))


def test_grey_is_the_mean_of_the_channels_of_pictures_and_films():
    grey = view_named("gray").component
    for shape in ((3, 8, 8), (2, 3, 8, 8), (2, 3, 5, 8, 8)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        channels = 0 if x.ndim == 3 else 1
        torch.testing.assert_close(grey(x), x.mean(channels, keepdim=True).expand_as(x))
