"""Trains the UNet and the text encoder together on scenes made on the fly.

Two one-thread processes share the weights without locks (Hogwild, Recht et al. 2011): on two cores that is about
twice as fast as one process with two threads.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

import torch

from ..autoencoder import Autoencoder
from . import checkpoint
from .batches import Batches, used_tokens
from .networks import Tokenizer, build_text, build_unet, bundled_networks
from .steps import follow, rate, take_step
from .unet_loss import alphas_and_sigmas, training_loss

log = logging.getLogger(__name__)

RAW, EMA = "model-raw.safetensors", "model-ema.safetensors"
LOG_EVERY, SAVE_EVERY = 30, 180  # seconds
BATCH = 24
PEAK_RATE, WARM_UP, FLAT = 1e-3, 100, 0.3
EMA_EVERY, EMA_DECAY = 4, 0.98


class _Recorder:
    """What the first process does between its steps: the moving average, the clock, the log and the checkpoints."""

    def __init__(self, unet: torch.nn.Module, text: torch.nn.Module, folder: Path, clock: torch.Tensor) -> None:
        self.unet, self.text, self.folder, self.clock = unet, text, folder, clock
        self.ema = checkpoint.read(folder / EMA)[0] or _state(unet, text)
        self.saved = self.logged = time.time()

    def step(self, steps: int, losses: list[float]) -> None:
        """After every step of the first process."""
        if steps % EMA_EVERY == 0:
            follow(self.ema, _state(self.unet, self.text), EMA_DECAY)
        if time.time() - self.logged > LOG_EVERY:
            self.clock[0] += (time.time() - self.logged) / 60
            self.logged = time.time()
            loss = sum(losses[-100:]) / len(losses[-100:])
            log.info("%.1f min, %d samples, loss %.4f", self.clock[0], self.clock[1], loss)
        if time.time() - self.saved > SAVE_EVERY:
            self.saved = time.time()
            self.save()

    def save(self) -> None:
        _save(self.folder, self.unet, self.text, self.ema, self.clock)


def _worker(
    rank: int, unet: torch.nn.Module, text: torch.nn.Module, arguments: argparse.Namespace, clock: torch.Tensor
) -> None:
    torch.set_num_threads(1)
    os.nice(arguments.nice)
    logging.basicConfig(force=True, level=logging.INFO, format="%(asctime)s %(message)s")
    recorder = _Recorder(unet, text, arguments.out, clock) if rank == 0 else None
    _fit(rank, unet, text, arguments.minutes, clock, recorder)
    if recorder is not None:
        recorder.save()


def _fit(
    rank: int,
    unet: torch.nn.Module,
    text: torch.nn.Module,
    minutes: float,
    clock: torch.Tensor,
    recorder: _Recorder | None,
) -> None:
    """Trains the shared weights until the clock says that the time is up."""
    generator = torch.Generator().manual_seed(int(time.time()) * 2 + rank)
    encoder, levels = Autoencoder(), alphas_and_sigmas()
    batches = Batches(int(time.time()) * 2 + rank, Tokenizer())
    parameters = [p for p in [*unet.parameters(), *text.parameters()] if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    losses: list[float] = []
    steps = 0
    while clock[0] < minutes:
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * rate(clock[0].item() / minutes, steps, WARM_UP, FLAT)
        batch = batches.next(BATCH)
        loss = training_loss(unet, text, encoder.encode, batch, levels, generator)
        if take_step([optimiser], parameters, loss):
            losses.append(loss.item())
        steps += 1
        clock[1] += len(batch[0])
        if recorder is not None:
            recorder.step(steps, losses)


def _state(unet: torch.nn.Module, text: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Both networks' tensors, under ``unet.`` and ``text.``."""
    both = {f"unet.{k}": v for k, v in unet.state_dict().items()} | {
        f"text.{k}": v for k, v in text.state_dict().items()
    }
    return {k: v.detach().clone() for k, v in both.items()}


def _save(
    folder: Path, unet: torch.nn.Module, text: torch.nn.Module, ema: dict[str, torch.Tensor], clock: torch.Tensor
) -> None:
    for name, state in ((RAW, _state(unet, text)), (EMA, ema)):
        checkpoint.write(folder / name, state, minutes=clock[0].item(), samples=clock[1].item())


def _begin(folder: Path, warm: bool) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """Both networks and the clock (minutes, samples): as the folder holds them, else at their start."""
    unet, text = bundled_networks() if warm else (build_unet(), build_text(used_tokens(Tokenizer())))
    state, at = checkpoint.read(folder / RAW)
    if state:
        unet.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("unet.")})
        text.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("text.")})
    return unet, text, torch.tensor([at.get("minutes", 0.0), at.get("samples", 0.0)])


def main(arguments: list[str]) -> int:
    """``dev.py train model``: trains for so many minutes in all; resumes from what is in the folder."""
    parser = argparse.ArgumentParser(prog="dev.py train model --model unet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--warm", action="store_true", help="start from the bundled weights instead of from nothing")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    unet, text, clock = _begin(options.out, options.warm)
    for module in (unet, text, clock):
        module.share_memory() if isinstance(module, torch.nn.Module) else module.share_memory_()
    # forked, not spawned: the children find the host and the pack already imported
    torch.multiprocessing.start_processes(_worker, (unet, text, options, clock), nprocs=2, start_method="fork")
    return 0
