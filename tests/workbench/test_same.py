"""Two folders are the same only bit for bit, but for times and embedded workflows."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from comfyui_concepts.workbench import same
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

BOARD = {"family": "model", "seeds": [1], "rows": [{"method": "a", "metrics": {"right": 0.5}, "seconds": 3.0}]}


def _picture(value: int = 0) -> Image.Image:
    pixels = np.zeros((4, 5, 3), np.uint8)
    pixels[2, 3, 1] = value
    return Image.fromarray(pixels)


@pytest.fixture
def folders(tmp_path):
    """Two equal folders with a file of every kind."""
    before, after = tmp_path / "before", tmp_path / "after"
    (before / "graph" / "latents").mkdir(parents=True)
    _picture().save(before / "graph" / "one.png")
    _picture().save(before / "graph" / "film.webp", save_all=True, append_images=[_picture(200)], lossless=True)
    latent = {"latent_tensor": torch.arange(6.0).view(1, 2, 3)}
    save_file(latent, before / "graph" / "latents" / "1.latent", {"prompt": "one graph", "format": "1"})
    save_file({"up": torch.ones(2, 2, dtype=torch.bfloat16)}, before / "graph" / "edit.safetensors")
    (before / "board.json").write_text(json.dumps(BOARD))
    (before / "notes.txt").write_bytes(b"a few words")
    shutil.copytree(before, after)
    return before, after


def test_equal_folders_are_the_same(folders, capsys):
    assert same.main([str(f) for f in folders]) == 0
    assert capsys.readouterr().out == "6 files are the same\n"


def test_the_first_difference_is_printed(folders, capsys):
    (folders[1] / "notes.txt").write_bytes(b"a few wordy")
    assert same.main([str(f) for f in folders]) == 1
    assert capsys.readouterr().out == "notes.txt: byte 10: 115 and 121\n"


def test_a_workflow_in_a_picture_or_a_latent_may_differ(folders):
    note = PngImagePlugin.PngInfo()
    note.add_text("workflow", "another")
    _picture().save(folders[1] / "graph" / "one.png", pnginfo=note)
    latent = {"latent_tensor": torch.arange(6.0).view(1, 2, 3)}
    save_file(latent, folders[1] / "graph" / "latents" / "1.latent", {"prompt": "another graph", "format": "1"})
    assert same.first_difference(*folders) is None


def test_times_of_a_board_may_differ(folders):
    metrics = {"right": 0.5, "picture_seconds": 9.0, "seconds_a_picture": 9.0, "minutes": 2.0}
    for folder, seconds in zip(folders, (1.0, 2.0), strict=True):
        timed = {k: v * seconds if k != "right" else v for k, v in metrics.items()}
        row = {"method": "a", "metrics": timed, "seconds": seconds}
        (folder / "board.json").write_text(json.dumps(BOARD | {"rows": [row]}))
    assert same.first_difference(*folders) is None


def _longer_film(path):
    _picture().save(path, save_all=True, append_images=[_picture(200), _picture(100)], lossless=True)


def _other_film(path):
    _picture().save(path, save_all=True, append_images=[_picture(90)], lossless=True)


def _latent(values, metadata=None):
    return lambda path: save_file({"latent_tensor": values}, path, metadata or {"format": "1"})


LATENT, EDIT = "graph/latents/1.latent", "graph/edit.safetensors"
VALUES = torch.arange(6.0).view(1, 2, 3)
DIFFERENCES = {
    "a pixel": ("graph/one.png", lambda p: _picture(7).save(p), "frame 0, pixel (2, 3, 1): 0 and 7"),
    "a picture's size": ("graph/one.png", lambda p: _picture().resize((4, 4)).save(p), "frame 0: RGB (4, 5, 3)"),
    "a frame": ("graph/film.webp", _other_film, "frame 1, pixel (2, 3, 1): 200 and 90"),
    "a frame more": ("graph/film.webp", _longer_film, "frame 2 is missing in one of them"),
    "a latent's last bit": (LATENT, _latent(torch.nextafter(VALUES, VALUES + 1)), "tensor latent_tensor at (0, 0, 0)"),
    "a zero's sign": (LATENT, _latent(VALUES * torch.tensor([-1.0, 1, 1])), "at (0, 0, 0): 0.0 and -0.0"),
    "a latent's dtype": (LATENT, _latent(VALUES.half()), "torch.float32 (1, 2, 3) and torch.float16 (1, 2, 3)"),
    "metadata": (LATENT, _latent(VALUES, {"format": "2"}), "metadata.format: '1' and '2'"),
    "a tensor less": (EDIT, lambda p: save_file({}, p), "tensor up is missing in one of them"),
    "a figure": (
        "board.json",
        lambda p: p.write_text(p.read_text().replace("0.5", "0.25")),
        "rows[0].metrics.right: 0.5 and 0.25",
    ),
    "a row less": ("board.json", lambda p: p.write_text(json.dumps(BOARD | {"rows": []})), "rows[0] is missing"),
    "more bytes": ("notes.txt", lambda p: p.write_bytes(b"a few words more"), "11 bytes and 16 bytes"),
    "a missing file": ("notes.txt", lambda p: p.unlink(), "missing in"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
@pytest.mark.parametrize("turned", [False, True], ids=["changed after", "changed before"])
def test_every_kind_of_difference_is_found(folders, what, turned):
    name, change, sentence = DIFFERENCES[what]
    change(folders[1] / name)
    one, other = reversed(folders) if turned else folders
    found = same.first_difference(one, other)
    assert found is not None
    assert found.startswith(f"{name}: ")
    assert turned or sentence in found


def test_an_empty_folder_is_not_taken_for_equal(folders, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert same.main([str(folders[0]), str(tmp_path / "nothing")]) == 2
    assert "There are no files in" in capsys.readouterr().err
