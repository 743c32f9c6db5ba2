"""Films of anagrams: pieces are found, nothing is lost, and what stands still is the view itself. Also blend, score,
sheet."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from comfyui_concepts.methods.anagram.blend import blend
from comfyui_concepts.methods.anagram.captions import captioned
from comfyui_concepts.methods.anagram.film_size import film_size
from comfyui_concepts.methods.anagram.motion import eased, film, frames, on_canvas, picture_in_view, pieces
from comfyui_concepts.methods.anagram.score import Readings
from comfyui_concepts.methods.anagram.sheet import contact_sheet
from comfyui_concepts.methods.anagram.views import COMPONENTS, RESAMPLED, VIEWS, Settings, view_named

PICTURE = np.random.default_rng(1).integers(0, 256, (48, 48, 3), np.uint8)
MOVING = [n for n in VIEWS if not view_named(n).signed]


def _view(name):
    return view_named(name, Settings(parts=8 if name == "pixel_permute" else 0, seed=1))


@pytest.mark.parametrize("name", MOVING)
def test_pieces_are_every_pixel_once_and_land_where_the_view_puts_them(name):
    found = pieces(_view(name), 48, 48)
    index = np.arange(48 * 48).reshape(48, 48)
    assert sorted(i for p in found for i in index[p.rows, p.columns].tolist()) == list(range(48 * 48))
    landed = np.full((48, 48), -1)
    for piece in found:
        (a, b), (c, d) = piece.symmetry
        row, column = piece.rows - piece.centre[0], piece.columns - piece.centre[1]
        to_row = np.rint(a * row + b * column + piece.target[0]).astype(int)
        to_column = np.rint(c * row + d * column + piece.target[1]).astype(int)
        landed[to_row, to_column] = index[piece.rows, piece.columns]
    assert np.array_equal(landed, _view(name).forward(torch.from_numpy(index)).numpy())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("identity", 1),
        ("rotate_180", 1),
        ("flip", 1),
        ("transpose", 1),
        ("inner_circle", 2),
        ("roll", 2),
        ("half_swap", 2),
    ],
)
def test_a_view_is_cut_into_as_few_pieces_as_can_be(name, count):
    assert len(pieces(_view(name), 48, 48)) == count


@pytest.mark.parametrize("name", [*VIEWS, *COMPONENTS, *RESAMPLED])
def test_a_movement_ends_in_the_view_itself(name):
    shots = frames(PICTURE, _view(name), 4)
    assert len(shots) == 4
    assert all(s.shape == (72, 72, 3) and s.dtype == np.uint8 for s in shots)
    assert np.array_equal(shots[-1][12:60, 12:60], picture_in_view(PICTURE, _view(name)))
    outside = shots[-1].copy()
    outside[12:60, 12:60] = 255
    assert (outside == 255).all()


def test_a_film_stands_moves_and_comes_back():
    views = [_view("identity"), _view("rotate_180"), _view("flip")]
    shots = film(PICTURE, views, hold=3, motion=4, back=False)
    assert len(shots) == 3 + 4 + 3 + (4 + 4) + 3
    assert np.array_equal(shots[0], on_canvas(PICTURE))
    assert np.array_equal(shots[7], on_canvas(PICTURE[::-1, ::-1]))
    assert np.array_equal(shots[-1], on_canvas(PICTURE[::-1]))
    loop = film(PICTURE, views, hold=3, motion=4, back=True)
    assert len(loop) == 2 * len(shots) - 2
    assert np.array_equal(loop[len(shots) :], shots[-2:0:-1])


def _written(shots, plain):
    """How far the ink changes each shot, 0 to 255."""
    return [int(np.abs(a.astype(int) - b).max()) for a, b in zip(shots, plain, strict=True)]


@pytest.mark.parametrize("words", ["heart", "an oil painting of an old man"])
@pytest.mark.parametrize("size", [(48, 48), (48, 96), (480, 320)])
def test_a_caption_stands_below_the_picture_and_inside_the_canvas(size, words):
    shot = on_canvas(np.zeros((*size, 3), np.uint8))
    ink = (captioned(shot, words) != shot).any(-1)
    rows, columns = (ink.any(axis).nonzero()[0] for axis in (1, 0))
    assert rows[0] >= (shot.shape[0] + size[0]) // 2  # below the picture
    assert rows[-1] < shot.shape[0] - 1
    assert abs(columns[0] + columns[-1] - shot.shape[1]) <= 4  # in the middle
    assert 0 < columns[0] < columns[-1] < shot.shape[1] - 1
    assert captioned(shot, words, 0.0) is shot
    assert captioned(shot, "") is shot


def test_captions_stand_with_the_stills_and_are_gone_while_the_picture_moves():
    views, told = [_view("identity"), _view("rotate_180"), _view("flip")], {"hold": 3, "motion": 8}
    plain = film(PICTURE, views, **told, back=False)
    shots = film(PICTURE, views, **told, back=False, captions=["M", "W", ""])
    assert len(shots) == len(plain)
    ink = _written(shots, plain)
    assert ink[0] == ink[1] == ink[2] > ink[3] > 50
    assert ink[4:9] == [0] * 5  # the middle of the first movement
    assert 50 < ink[9] < ink[10] == ink[13]
    assert ink[13] > ink[14] > 50
    assert not any(ink[15:])  # and no words for the third
    assert not np.array_equal(shots[0][60:], shots[13][60:])
    loop = film(PICTURE, views, **told, back=True, captions=["M", "W", ""])
    assert np.array_equal(loop[len(shots) :], shots[-2:0:-1])


@pytest.mark.parametrize(
    ("size", "cell", "largest", "parts", "wanted"),
    [
        ((64, 64), 8, 64, [1], (64, 64, 8)),  # small enough
        ((1024, 1024), 8, 512, [1, 1], (512, 512, 4)),
        ((768, 768), 8, 512, [1, 6], (480, 480, 5)),
        ((768, 512), 8, 512, [4], (480, 320, 5)),
        ((768, 768), 1, 512, [1, 6], (510, 510, 1)),  # without cells, what the views can cut
        ((1024, 512), 8, 64, [4], (64, 32, 1)),  # more cells than pixels
        ((832, 832), 8, 512, [32], (416, 416, 4)),  # 104 cells, of which 32 parts are no whole number
        ((1024, 64), 1, 64, [1], (64, 4, 1)),
        ((100, 50), 1, 64, [1], (64, 32, 1)),
        ((77, 77), 1, 64, [7, 11], (77, 77, 1)),
    ],
)
def test_a_film_is_made_at_a_size_its_views_can_cut_as_the_picture(size, cell, largest, parts, wanted):
    made = film_size(*size, cell, largest, parts)
    assert made == wanted
    assert not any(side % part for side in made[:2] for part in parts)


def test_ease_starts_and_ends_at_rest():
    assert [eased(0.0), eased(0.5), eased(1.0)] == [0.0, 0.5, 1.0]
    assert eased(0.01) < 0.001


def test_blending_equal_pictures_changes_nothing():
    picture = torch.rand(2, 3, 37, 50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(blend(torch.stack([picture] * 3)), picture)
    assert torch.equal(blend(picture[None]), picture)


def test_blending_without_a_lean_is_the_mean_and_with_it_is_crisper():
    pictures = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(blend(pictures, detail=0.0), pictures.mean(0))
    assert blend(pictures).var() > pictures.mean(0).var()


def test_alignment_and_concealment_of_a_matrix_worked_by_hand():
    readings = Readings(torch.tensor([[[0.30, 0.20], [0.25, 0.27]], [[1.0, 0.0], [0.0, 1.0]]]), temperature=0.1)
    assert readings.alignment.tolist() == pytest.approx([0.27, 1.0])
    rows = [1 / (1 + np.exp(-1.0)), 1 / (1 + np.exp(-0.2))]  # 0.30 against 0.20; 0.27 against 0.25
    columns = [1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(-0.7))]
    assert readings.concealment[0].item() == pytest.approx((sum(rows) + sum(columns)) / 4)
    assert readings.ranking() == [1, 0]
    assert readings.report().startswith("picture 2: alignment 1.000")


def test_a_sheet_holds_every_picture_where_it_belongs():
    tiles = torch.rand(2, 3, 40, 50, 3, generator=torch.Generator().manual_seed(3))
    sheet = contact_sheet(tiles, ["first", "second"], ["a", "b", "c"])
    assert sheet.shape[0] == 1
    exact = (tiles * 255).round() / 255
    found = [
        any(
            torch.allclose(sheet[0, y : y + 40, x : x + 50], exact[row, column], atol=1e-4)
            for y in range(sheet.shape[1] - 39)
            for x in (2 + column * 52,)
        )
        for row in range(2)
        for column in range(3)
    ]
    assert all(found)


def _ink(shot):
    """Height and width of the canvas at which the middle of what is not white stands."""
    rows, columns = (shot != 255).any(-1).nonzero()
    return rows.mean(), columns.mean()


def test_a_piece_is_on_its_way_and_turns_the_way_it_goes():
    """Rolled down by a quarter, the lowest quarter flies up, over the rest. A quarter clockwise, what was left goes
    up."""
    view = view_named("roll", Settings(parts=4))
    far = max(pieces(view, 48, 48), key=lambda p: math.dist(p.centre, p.target))
    strip = np.full((48, 48, 3), 255, np.uint8)
    strip[far.rows, far.columns] = 0
    ways = np.array([_ink(shot) for shot in [on_canvas(strip), *frames(strip, view, 4)]])
    start, end = ways[0], ways[-1]
    assert np.abs(end - start - np.subtract(far.target, far.centre)).max() < 1
    wanted = [start + eased(i / 4) * (end - start) for i in range(5)]
    assert np.abs(ways - wanted).max() < 1
    left = np.full((48, 48, 3), 255, np.uint8)
    left[:, :12] = 0
    rows = [_ink(shot)[0] for shot in [on_canvas(left), *frames(left, _view("rotate_cw"), 5)]]
    assert all(later <= earlier + 0.5 for earlier, later in pairwise(rows))
    assert rows[2] < rows[0] - 1


def test_nothing_of_a_wide_picture_is_cut_off_while_it_turns():
    dark = np.zeros((40, 96, 3), np.uint8)
    for shot in frames(dark, _view("rotate_180"), 6):
        seen_of_it = (shot < 128).all(-1).sum() / (40 * 96)
        assert 0.97 < seen_of_it < 1.03
