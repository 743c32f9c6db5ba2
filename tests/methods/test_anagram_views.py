import pytest
import torch
from comfyui_concepts.methods.anagram.views import VIEWS, view_named

SIZES = [(32, 32), (32, 48), (17, 5), (128, 128)]


def _random(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "size"), [(n, s) for n, v in VIEWS.items() for s in SIZES if s[0] == s[1] or not v.square]
)
def test_the_inverse_undoes_the_view_exactly(name, size, dtype):
    view = VIEWS[name]
    for lead in ((2, 4), (1, 3, 5)):  # pictures and video latents
        x = _random((*lead, *size), dtype)
        assert torch.equal(view.inverse(view.forward(x)), x)
        assert torch.equal(view.forward(view.inverse(x)), x)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_only_moves_values(name):
    pixels = torch.arange(24 * 24.0).view(1, 1, 24, 24)
    moved = VIEWS[name].forward(pixels)
    assert torch.equal(moved.flatten().sort().values, pixels.flatten())
    assert moved.shape == pixels.shape


def test_what_the_views_show():
    picture = torch.tensor([[1, 2], [3, 4]])
    shown = {name: view.forward(picture).tolist() for name, view in VIEWS.items()}
    assert shown["identity"] == [[1, 2], [3, 4]]
    assert shown["flip"] == [[3, 4], [1, 2]]
    assert shown["rotate_180"] == [[4, 3], [2, 1]]
    assert shown["rotate_cw"] == [[3, 1], [4, 2]]
    assert shown["rotate_ccw"] == [[2, 4], [1, 3]]


def test_strides_do_not_matter():
    x = _random((1, 4, 16, 16))
    for view in VIEWS.values():
        assert torch.equal(view.forward(x.to(memory_format=torch.channels_last)), view.forward(x))


def test_a_square_view_refuses_another_canvas_in_a_sentence():
    with pytest.raises(ValueError, match="'rotate_cw' needs a square canvas.*3:2.*same width and height"):
        VIEWS["rotate_cw"].check(128, 192)
    VIEWS["rotate_cw"].check(128, 128)
    VIEWS["flip"].check(128, 192)


def test_an_unknown_view_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="no view 'spin'.*identity, flip"):
        view_named("spin")
