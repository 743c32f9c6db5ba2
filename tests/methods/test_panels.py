"""What nodes show while they work: panels side by side, masks and maps over a picture."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.methods.panels import (
    SIDE,
    AttentionSnapshot,
    Panel,
    attention_panels,
    concept_panels,
    heat,
    side_by_side,
    tinted,
)

GREY = torch.full((8, 12, 3), 0.5)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (4, 4, 1), (5, 4, 2)])
def test_panels_stand_in_rows_of_up_to_four(count, columns, rows):
    sheet = side_by_side([Panel(torch.full((8, 8, 3), 0.1 * n)) for n in range(count)])
    assert sheet.shape == (rows * (SIDE + 4) - 4, columns * (SIDE + 4) - 4, 3)
    for at in range(count):
        centre = sheet[at // columns * (SIDE + 4) + SIDE // 2, at % columns * (SIDE + 4) + SIDE // 2]
        assert torch.allclose(centre, torch.tensor(0.1 * at), atol=0.01)


def test_a_panel_can_begin_a_row():
    shades = torch.linspace(0.1, 0.9, 6)
    panels = [Panel(torch.full((8, 8, 3), float(shade)), begins=at in (0, 2)) for at, shade in enumerate(shades)]
    sheet = side_by_side([*panels, Panel(torch.ones(8, 8, 3))])
    assert sheet.shape == (3 * (SIDE + 4) - 4, 4 * (SIDE + 4) - 4, 3)
    centres = sheet[SIDE // 2 :: SIDE + 4, SIDE // 2 :: SIDE + 4, 0]  # (rows, columns)
    assert torch.allclose(centres[0, :2], shades[:2], atol=0.01)
    assert torch.allclose(centres[1], shades[2:], atol=0.01)
    assert centres[0, 2:].amax() < 0.12
    assert centres[2, 0] > 0.99


def test_a_title_takes_room_above_and_ends_at_its_panel():
    plain, titled = (
        side_by_side([Panel(GREY), Panel(GREY)]),
        side_by_side([Panel(GREY, "long words " * 40), Panel(GREY)]),
    )
    assert titled.shape[0] == plain.shape[0] + 16
    assert titled[:16, :SIDE].amax() > 0.7  # letters
    assert titled[:16, SIDE:].amax() < 0.12
    assert torch.equal(titled[16:], plain)


def test_any_title_is_text():
    assert side_by_side([Panel(GREY, "\ud800 \n <b>猫</b>")]).isfinite().all()


def test_no_panels_get_a_sentence():
    with pytest.raises(ValueError, match="at least one panel"):
        side_by_side([])


def test_a_mask_tints_where_it_is_and_nowhere_else():
    masks = torch.zeros(2, 8, 12)
    masks[0, :, :4] = 1
    masks[1, :, 8:] = 1
    out = tinted(GREY, masks)
    assert torch.equal(out[:, 4:8], GREY[:, 4:8])
    assert not torch.allclose(out[4, 1], out[4, 10], atol=0.1)  # each in its own colour


@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
def test_heat_is_bright_where_attention_is_high_whatever_its_scale(scale):
    attention = torch.zeros(4, 6)
    attention[:, 3:] = scale
    lit = heat(GREY, attention)
    assert torch.allclose(lit[:, -1], GREY[:, -1])
    assert lit[:, 0].amax() < 0.1
    assert heat(GREY, torch.ones(4, 6)).isfinite().all()


def test_concepts_show_together_and_each_alone():
    maps = torch.rand(2, 4, 6) * 30
    panels = concept_panels(GREY, maps, ["cat", "dog"])
    assert [panel.title for panel in panels] == ["all", "cat", "dog"]
    assert all(
        panel.picture.shape == GREY.shape and 0 <= panel.picture.min() <= panel.picture.max() <= 1 for panel in panels
    )


def test_attention_has_a_row_of_its_own_and_says_of_when_it_is():
    panels = attention_panels(GREY, AttentionSnapshot(torch.rand(2, 4, 6), 0.254), ["cat", "dog"])
    assert [panel.title for panel in panels] == [f"attention at 25 %: {name}" for name in ("all", "cat", "dog")]
    assert [panel.begins for panel in panels] == [True, False, False]
