import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_concepts.methods.anagram.views import VIEWS, Settings, view_named
from comfyui_concepts.methods.anagram.views.jigsaw import piece_map

SIZES = [(16, 16), (32, 32), (32, 48), (17, 5), (64, 64), (96, 96), (104, 104), (128, 128), (128, 256)]
PARTS = {"pixel_permute": 16}  # of these small canvases; the others take their own
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _view(name, seed=0):
    return view_named(name, Settings(parts=PARTS.get(name, 0), seed=seed))


def _takes(name, size) -> bool:
    try:
        _view(name).check(*size)
    except ValueError:
        return False
    return True


TAKEN = [(name, size) for name in VIEWS for size in SIZES if _takes(name, size)]


def _random(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def test_every_view_is_tried_on_several_canvases():
    assert all(sum(n == name for n, _ in TAKEN) >= 5 for name in VIEWS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "size"), TAKEN)
def test_the_inverse_undoes_the_view_exactly(name, size, dtype):
    view = _view(name)
    for lead in ((2, 4), (1, 3, 5)):  # pictures and video latents
        x = _random((*lead, *size), dtype)
        assert view.forward(x).shape == x.shape
        assert torch.equal(view.inverse(view.forward(x)), x)
        assert torch.equal(view.forward(view.inverse(x)), x)


@pytest.mark.parametrize("name", [n for n in VIEWS if n != "negate"])
def test_a_view_only_moves_values(name):
    pixels = torch.arange(96 * 96.0).view(1, 1, 96, 96)
    moved = _view(name).forward(pixels)
    assert torch.equal(moved.flatten().sort().values, pixels.flatten())
    assert torch.equal(moved, pixels) == (name == "identity")


@pytest.mark.parametrize("name", VIEWS)
def test_white_noise_stays_white_noise(name):
    noise = _view(name).forward(_random((1, 1, 256, 256)))
    assert noise.mean().abs() < 0.02
    assert abs(noise.var() - 1) < 0.02
    for dim in (-1, -2):
        neighbours = (noise.narrow(dim, 0, 255) * noise.narrow(dim, 1, 255)).mean()
        assert neighbours.abs() < 0.02


def bilinear_turn(x: torch.Tensor) -> torch.Tensor:
    """A turn by 45° through resampling: the view that must not be (it is not orthogonal)."""
    c = 2**-0.5
    grid = torch.nn.functional.affine_grid(torch.tensor([[[c, -c, 0], [c, c, 0]]]), x.shape, align_corners=False)
    return torch.nn.functional.grid_sample(x, grid, align_corners=False)


def test_the_noise_check_would_catch_a_resampled_turn():
    centre = bilinear_turn(_random((1, 1, 256, 256)))[..., 64:192, 64:192]
    assert abs(centre.var() - 1) > 0.3


def blurred(x: torch.Tensor) -> torch.Tensor:
    """Made small and large again: loses what it cannot give back."""
    small = torch.nn.functional.interpolate(x, scale_factor=1 / 8, mode="area")
    return torch.nn.functional.interpolate(small, scale_factor=8)


def white_balanced(x: torch.Tensor) -> torch.Tensor:
    """Every value times 1.5: invertible, and yet noise in it is too loud."""
    return 1.5 * x


@pytest.mark.parametrize("failing", [blurred, white_balanced])
def test_the_noise_check_would_catch_what_is_not_orthogonal(failing):
    assert abs(failing(_random((1, 1, 256, 256))).var() - 1) > 0.3


@pytest.mark.parametrize("angle", [45.0, 135.0, -30.0])
def test_a_disc_of_any_angle_comes_back_and_leaves_the_rest(angle):
    view = view_named("disc", Settings(angle=angle))
    rows = (2 * torch.arange(64) - 63) / 64
    smooth = torch.sin(3 * rows)[:, None] * torch.cos(2 * rows)[None] + torch.zeros(2, 3, 1, 1)
    turned = view.forward(smooth)
    inside = torch.hypot(rows[:, None], rows[None]) < 0.75
    assert torch.equal(turned[..., ~inside], smooth[..., ~inside])
    back, middle = (
        view.inverse(turned),
        torch.hypot(rows[:, None], rows[None]) < 0.68,
    )  # the rim mixes with what lies beyond
    torch.testing.assert_close(back[..., middle], smooth[..., middle], atol=0.01, rtol=0)
    assert (turned - smooth).abs().max() > 0.2


@pytest.mark.parametrize(("angle", "exact"), [(180.0, "inner_circle"), (90.0, None), (0.0, None)])
def test_a_disc_turned_by_quarters_is_the_exact_one(angle, exact):
    x = _random((1, 3, 64, 64))
    turned = view_named("disc", Settings(angle=angle)).forward(x)
    offset = 2 * torch.arange(64) - 63
    inside = offset[:, None] ** 2 + offset[None] ** 2 < 48**2
    wanted = torch.where(inside, torch.rot90(x, -round(angle / 90), (-2, -1)), x)
    torch.testing.assert_close(turned, wanted, atol=1e-4, rtol=0)
    if exact:
        torch.testing.assert_close(turned, view_named(exact).forward(x), atol=1e-4, rtol=0)


def test_noise_in_a_resampled_disc_is_no_noise():
    """Why it is for finished pixels alone."""
    centre = view_named("disc").forward(_random((1, 1, 256, 256)))[..., 96:160, 96:160]
    assert centre.var() < 0.8


def test_what_the_symmetries_show():
    picture = torch.tensor([[1, 2], [3, 4]])
    shown = {
        n: _view(n).forward(picture).tolist()
        for n in ("identity", "flip", "mirror", "rotate_180", "rotate_cw", "rotate_ccw", "transpose")
    }
    assert shown == {
        "identity": [[1, 2], [3, 4]],
        "flip": [[3, 4], [1, 2]],
        "mirror": [[2, 1], [4, 3]],
        "rotate_180": [[4, 3], [2, 1]],
        "rotate_cw": [[3, 1], [4, 2]],
        "rotate_ccw": [[2, 4], [1, 3]],
        "transpose": [[1, 3], [2, 4]],
    }


def test_skew_slides_columns_by_the_truncated_slope():
    size = 12
    picture = _random((size, size))
    shown = _view("skew").forward(picture)
    for j in range(size):
        assert torch.equal(shown[:, j], picture[:, j].roll(int(1.5 * (j - size // 2))))


def test_hinge_turns_nine_blocks_by_their_parity_and_leaves_the_rest():
    picture = _random((10, 10))
    shown = _view("square_hinge").forward(picture)
    for r in range(3):
        for c in range(3):
            block = (slice(3 * r, 3 * r + 3), slice(3 * c, 3 * c + 3))
            assert torch.equal(shown[block], picture[block].rot90(-1 if (r + c) % 2 == 0 else 1))
    assert torch.equal(shown[9], picture[9])


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_inner_circle_moves_a_disc_of_three_eighths(size):
    shown = _view("inner_circle").forward(torch.arange(size * size).view(size, size))
    moved = (shown != torch.arange(size * size).view(size, size)).float()
    assert moved.mean().item() == pytest.approx(0.440, abs=0.012)  # π · (3/8)²
    assert moved[0].sum() == 0


def test_rings_leave_the_corners_and_turn_every_second_ring():
    picture = torch.arange(96 * 96).view(96, 96)
    shown = view_named("rings", Settings(parts=3)).forward(picture)
    same = shown == picture
    assert same[0, 0]
    assert same[48, 47]
    assert not same[48, 48 + 24]  # half way out, in the middle ring


def test_stripes_and_halves():
    picture = torch.arange(16).view(4, 4)
    assert view_named("stripes", Settings(parts=2)).forward(picture)[:, 2:].tolist() == picture[:, 2:].flip(0).tolist()
    assert view_named("stripes", Settings(parts=2)).forward(picture)[:, :2].tolist() == picture[:, :2].tolist()
    assert view_named("half_swap").forward(picture).tolist() == torch.cat([picture[:, 2:], picture[:, :2]], 1).tolist()
    assert view_named("tile_transpose", Settings(parts=2)).forward(picture)[:2, 2:].tolist() == picture[2:, :2].tolist()


@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_the_jigsaw_is_a_bijection_for_every_arrangement(size):
    pixels = torch.arange(size * size).view(size, size)
    for seed in range(100):
        assert torch.equal(_view("jigsaw", seed).forward(pixels).flatten().sort().values, pixels.flatten())


@pytest.mark.parametrize("size", [32, 64, 96, 104, 128])
def test_jigsaw_pieces_of_one_kind_have_one_area(size):
    area = torch.bincount(piece_map(size).flatten()).tolist()
    for kind in ((0, 3, 12, 15), (5, 6, 9, 10), (1, 2, 4, 7, 8, 11, 13, 14)):
        assert len({area[piece] for piece in kind}) == 1
    assert len({area[0], area[1], area[5]}) == 3  # and they do interlock


def test_jigsaw_pieces_move_whole():
    """Neighbours inside a piece stay neighbours: only pixels at a cut lose one."""
    size = 64
    labels, seen = piece_map(size), _view("jigsaw", 4).forward(piece_map(size))
    cuts = lambda x: (x.diff(dim=0) != 0).sum() + (x.diff(dim=1) != 0).sum()  # noqa: E731
    assert cuts(seen) == cuts(labels)


def test_the_jigsaw_is_the_same_puzzle_at_twice_the_size():
    small = torch.arange(64 * 64).view(64, 64)
    moved = (_view("jigsaw", 1).forward(small) != small).float().mean().item()
    large = torch.arange(128 * 128).view(128, 128)
    assert (_view("jigsaw", 1).forward(large) != large).float().mean().item() == pytest.approx(moved, abs=0.02)


RANDOM = ("jigsaw", "patch_permute", "pixel_permute")


@pytest.mark.parametrize("name", RANDOM)
def test_arrangements_differ_and_come_back(name):
    pixels = torch.arange(64 * 64).view(64, 64)
    assert torch.equal(_view(name, 1).forward(pixels), _view(name, 1).forward(pixels))
    assert not torch.equal(_view(name, 1).forward(pixels), _view(name, 2).forward(pixels))


def test_an_arrangement_is_the_same_in_another_process_and_leaves_the_global_seed_alone():
    import comfyui_concepts

    state = torch.get_rng_state()
    here = [_view(n, 7).forward(torch.arange(256).view(16, 16)).flatten().tolist() for n in RANDOM]
    assert torch.equal(torch.get_rng_state(), state)
    root = Path(comfyui_concepts.__file__).parent
    code = (
        "import sys, types, importlib, torch\n"
        f"p = types.ModuleType('pack'); p.__path__ = [{str(root)!r}]; sys.modules['pack'] = p\n"
        "v = importlib.import_module('pack.methods.anagram.views')\n"
        f"s = {PARTS!r}\n"
        "print([v.view_named(n, v.Settings(s.get(n, 0), 7)).forward(torch.arange(256).view(16, "
        f"16)).flatten().tolist() for n in {RANDOM!r}])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.strip() == str(here)


@pytest.mark.parametrize("name", VIEWS)
def test_strides_do_not_matter(name):
    x = _random((1, 4, 32, 32))
    assert torch.equal(_view(name).forward(x.to(memory_format=torch.channels_last)), _view(name).forward(x))


def test_a_view_first_used_under_inference_mode_works_under_autograd():
    view = _view("patch_permute")
    view.forward(_random((1, 1, 16, 16)))
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, 1, 16, 16, requires_grad=True)
        view.forward(x).sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))


def test_a_square_view_refuses_another_canvas_in_a_sentence():
    with pytest.raises(ValueError, match="'rotate_cw' needs a square canvas.*3:2.*same width and height"):
        _view("rotate_cw").check(128, 192)


def test_parts_that_do_not_divide_are_answered_with_those_that_do():
    with pytest.raises(ValueError, match=r"'patch_permute' cuts each side into 8.*parts = 2 or 3 or 6 or 9 or 18"):
        _view("patch_permute").check(18, 18)


def test_an_unknown_view_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="no view 'spin'.*identity, flip"):
        view_named("spin")


def test_where_no_parts_fit_another_size_is_advised():
    with pytest.raises(ValueError, match="choose another size"):
        _view("patch_permute").check(16, 9)


def test_a_jigsaw_of_cells_is_refused_where_they_are_no_four_rows():
    """A picture that was scaled after it was decoded; pixels would get lost."""
    view = view_named("jigsaw", Settings(seed=3, cell=8))
    with pytest.raises(ValueError, match="cells of 8 px, and a side of 528 px.*size it was decoded in"):
        view.forward(_random((1, 3, 528, 528)))
    x = _random((1, 3, 512, 512))
    assert torch.equal(view.inverse(view.forward(x)), x)
