"""A training that is stopped goes on where it was. The art is not needed to run the pack, so discs stand in for it."""

from __future__ import annotations

import argparse
import colorsys
import logging
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from comfyui_concepts.demo.files import LORAS
from comfyui_concepts.demo.training import (
    checkpoint,
    export,
    scenes,
    train_decoder,
    train_judge,
    train_lora,
    train_unet,
)
from comfyui_concepts.demo.training.adapters import ADAPTED, adapted_unet
from safetensors.torch import load_file


class Killed(BaseException):
    """What a kill does to a training: it ends in the middle, and nothing tidies up."""


@pytest.fixture(autouse=True)
def discs(monkeypatch):
    def disc(concept, _style, size, _angle):
        y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1
        inside = (x * x + y * y < 1).astype(np.float32)[..., None]
        colour = colorsys.hsv_to_rgb(zlib.crc32(concept.encode()) % 360 / 360, 1, 0.8)
        return np.concatenate([inside * np.asarray(colour, np.float32), inside], -1)

    monkeypatch.setattr(scenes, "sprite", disc)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # for the whole process, both would be
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture
def killed_after(monkeypatch):
    """Keeps a checkpoint at every step, and kills the training after so many: call it with their number."""
    step = checkpoint.Training.step
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0.0)

    def set_to(steps):
        def counted(self):
            if self.steps == steps:
                raise Killed
            return step(self)

        monkeypatch.setattr(checkpoint.Training, "step", counted)

    return set_to


def test_a_checkpoint_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    assert checkpoint.read(path) == ({}, {})
    checkpoint.write(path, {"w": torch.arange(3.0)}, minutes=2.5, steps=7)
    monkeypatch.setattr(checkpoint, "save_file", lambda _t, part, _m: (part.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        checkpoint.write(path, {"w": torch.zeros(3)}, minutes=3)
    tensors, at = checkpoint.read(path)
    assert tensors["w"].tolist() == [0, 1, 2]
    assert at == {"minutes": 2.5, "steps": 7}


def test_pauses_are_not_counted_and_the_schedule_goes_on(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    first = checkpoint.Training(tmp_path / "a.safetensors", 10)
    assert [first.warm_up(2), first.step(), first.warm_up(2)] == [0.5, False, 1.0]
    now[0] += 240
    assert first.step()
    first.keep({"w": torch.ones(1)})
    assert not first.step()
    now[0] += 86400
    second = checkpoint.Training(tmp_path / "a.safetensors", 10)
    assert (second.steps, second.spent, second.done) == (2, 4.0, 0.4)
    assert second.warm_up(2) == 0.5  # the moments are new, so the rate rises again
    now[0] += 600
    assert second.done == 1


@pytest.mark.parametrize(
    ("trainer", "kept"),
    [(train_judge, "judge-training.safetensors"), (train_decoder, "decoder.safetensors")],
    ids=["judge", "decoder"],
)
def test_a_killed_training_goes_on(trainer, kept, tmp_path, monkeypatch, killed_after):
    monkeypatch.setattr(train_judge, "HELD_OUT", 12)
    monkeypatch.setattr(train_judge, "calibrate", lambda _network: 1.0)
    monkeypatch.setattr(trainer, "BATCH", 2)
    monkeypatch.setattr(train_decoder, "psnr", partial(train_decoder.psnr, count=2))
    killed_after(2)
    with pytest.raises(Killed):
        trainer.main(["--out", str(tmp_path), "--minutes", "5"])
    left, at = checkpoint.read(tmp_path / kept)
    assert at["steps"] == 2
    monkeypatch.setattr(trainer, "PEAK_RATE", 0.0)  # what goes on is what was left
    killed_after(3)
    with pytest.raises(Killed):
        trainer.main(["--out", str(tmp_path), "--minutes", "5"])
    again, at = checkpoint.read(tmp_path / kept)
    assert at["steps"] == 3
    learned = [name for name, value in left.items() if value.is_floating_point() and "running" not in name]
    assert learned
    assert all(torch.equal(left[name], again[name]) for name in learned)


def test_a_judge_whose_time_is_up_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(train_judge, "HELD_OUT", 12)
    monkeypatch.setattr(train_judge, "calibrate", lambda _network: 1.0)
    assert train_judge.main(["--out", str(tmp_path), "--minutes", "0"]) == 0
    assert train_judge.main(["--out", str(tmp_path), "--minutes", "0"]) == 0
    written = load_file(tmp_path / "judge.safetensors")
    assert all(v.dtype == torch.float16 for v in written.values() if v.is_floating_point())


def test_a_reader_stands_beside_the_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(train_judge, "calibrate", lambda _network: 1.0)
    assert train_judge.main(["--out", str(tmp_path), "--minutes", "0", "--reader"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"reader.safetensors", "reader-training.safetensors"}


def test_a_killed_lora_goes_on_and_is_written_when_done(tmp_path, killed_after, monkeypatch):
    path = tmp_path / "concepts-demo-koala.training"
    monkeypatch.setitem(ADAPTED, "unet", lambda: adapted_unet()._replace(batch=2))
    killed_after(2)
    with pytest.raises(Killed):
        train_lora.main(["koala", "--out", str(tmp_path), "--minutes", "5"])
    left, at = checkpoint.read(path)
    assert at["steps"] == 2
    assert any(name.startswith("average.unet.") and value.any() for name, value in left.items() if "lora_B" in name)
    train_lora.main(["koala", "--out", str(tmp_path), "--minutes", "0"])  # the time is up: what was left is the LoRA
    assert not path.exists()
    written, shipped = (load_file(f / "concepts-demo-koala.safetensors") for f in (tmp_path, LORAS))
    assert {name: value.shape for name, value in written.items()} == {name: v.shape for name, v in shipped.items()}
    layer, file = "text.text_model.encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"
    up, down = (left[f"average.{layer}.lora_{side}.default.weight"] for side in "BA")
    torch.testing.assert_close(
        (written[f"{file}.lora_up.weight"] @ written[f"{file}.lora_down.weight"]).float(),
        up @ down,
        rtol=0.02,
        atol=1e-5,
    )


def test_the_model_goes_on_with_its_weights_average_and_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(train_unet, "LOG_EVERY", 0)
    monkeypatch.setattr(train_unet, "SAVE_EVERY", 0)
    monkeypatch.setattr(train_unet, "BATCH", 3)
    options = argparse.Namespace(out=tmp_path, minutes=1e-4, nice=0)
    unet, text, clock = train_unet._begin(tmp_path, warm=True)
    assert clock.tolist() == [0, 0]
    train_unet._worker(0, unet, text, options, clock)
    assert clock[1] >= 2
    unet2, text2, clock2 = train_unet._begin(tmp_path, warm=False)
    torch.testing.assert_close(clock2, clock)
    for one, other in ((unet, unet2), (text, text2)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    before = checkpoint.read(tmp_path / train_unet.EMA)[0]
    train_unet._worker(0, unet2, text2, options, clock2)  # its time is up
    after = checkpoint.read(tmp_path / train_unet.EMA)[0]
    assert all(torch.equal(before[name], after[name]) for name in before)
    export.main(["--out", str(tmp_path), "--to", str(tmp_path / "weights")])
    assert {p.name for p in (tmp_path / "weights").iterdir()} == {"unet.safetensors", "text.safetensors"}
