"""Trains the transformer on scenes made on the fly. The text encoder is the bundled one, and stays as it is.

Processes of one thread each, which may run beside other work. The matrices of attention and feed-forward move by Muon,
everything else by AdamW.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from ..autoencoder import Autoencoder
from .batches import Batches
from .checkpoint import CountedTraining
from .dit_loss import velocity_loss
from .muon import Muon
from .networks import Tokenizer, build_dit, bundled_networks
from .steps import follow, rate, take_step

log = logging.getLogger(__name__)

CHECKPOINT = "dit-training.safetensors"
MEETING = "dit-training.meeting"  # a file by which several processes find each other
BATCH, SAMPLES = 64, 280_000
MATRIX_RATE, OTHER_RATE, WARM_UP, FLAT = 2e-3, 1e-3, 50, 0.5
EMA_DECAY = 0.995
LOG_EVERY = 25  # steps
NET, AVERAGE, MOMENT = "dit.", "average.", "moment."

Tensors = dict[str, torch.Tensor]


def optimisers_of(dit: torch.nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of attention and feed-forward, AdamW for the rest."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in dit.named_parameters():
        inner = parameter.ndim == 2 and (".attention." in name or ".feed_forward." in name)
        (matrices if inner else rest).append(parameter)
    return Muon(matrices, MATRIX_RATE), torch.optim.AdamW(rest, OTHER_RATE, betas=(0.9, 0.99), weight_decay=0.01)


class FitOptions(NamedTuple):
    """How the steps are made: with torch.compile, and as which of how many processes."""

    compiled: bool = False
    processes: int = 1
    process: int = 0


class State:
    """All that a step changes: the network, its moving average and the optimisers' moments."""

    def __init__(self, dit: torch.nn.Module) -> None:
        self.dit, self.optimisers = dit, optimisers_of(dit)
        self.average = {name: value.clone() for name, value in dit.state_dict().items()}
        self.peaks = [optimiser.param_groups[0]["lr"] for optimiser in self.optimisers]

    def tensors(self) -> Tensors:
        """For a checkpoint."""
        tensors = {f"{NET}{name}": value for name, value in self.dit.state_dict().items()}
        tensors |= {f"{AVERAGE}{name}": value for name, value in self.average.items()}
        for name, moments in self._moments().items():
            tensors |= {f"{MOMENT}{moment}.{name}": value for moment, value in moments.items()}
        return tensors

    def load(self, tensors: Tensors) -> None:
        """Goes on from a checkpoint."""
        self.dit.load_state_dict(_under(NET, tensors))
        self.average = _under(AVERAGE, tensors)
        moments = self._moments()
        for path, value in _under(MOMENT, tensors).items():
            moment, _, name = path.partition(".")
            moments[name][moment] = value

    def _moments(self) -> dict[str, Tensors]:
        """What an optimiser remembers of each parameter, by the parameter's name."""
        of = {p: optimiser.state for optimiser in self.optimisers for p in optimiser.param_groups[0]["params"]}
        return {name: of[parameter][parameter] for name, parameter in self.dit.named_parameters()}

    def step(self, loss: torch.Tensor, share: float, steps: int) -> None:
        """One step down the loss, at a share of the peak rates."""
        for optimiser, peak in zip(self.optimisers, self.peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * share
        take_step(self.optimisers, list(self.dit.parameters()), loss)
        follow(self.average, self.dit.state_dict(), min(EMA_DECAY, (1 + steps) / (10 + steps)))


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def fit(state: State, text: torch.nn.Module, training: CountedTraining, options: FitOptions) -> None:
    """Trains until all steps are made. What a step draws follows from its number and the process alone."""
    encoder, batches, generator = Autoencoder("dit"), Batches(0, Tokenizer()), torch.Generator()
    network = torch.compile(state.dit, dynamic=False) if options.compiled else state.dit
    if options.processes > 1:
        # one of ComfyUI 0.3.75's parameters is never used
        network = torch.nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
    losses: list[float] = []
    while training.done < 1:
        seed = training.steps * options.processes + options.process
        batches.rng = Random(seed)
        generator.manual_seed(seed)
        batch = batches.next(BATCH // options.processes)
        loss = velocity_loss(network, text, encoder.encode, batch, generator)
        state.step(loss, rate(training.done, training.steps, WARM_UP, FLAT), training.steps)
        losses.append(loss.item())
        if training.step() and options.process == 0:
            training.keep(state.tensors())
        if training.steps % LOG_EVERY == 0 and options.process == 0:
            _report(training, losses[-LOG_EVERY:])
    if options.process == 0:
        training.keep(state.tensors())


def _report(training: CountedTraining, losses: Sequence[float]) -> None:
    mean = sum(losses) / len(losses)
    log.info("%.1f min, %d samples, loss %.4f", training.spent, training.steps * BATCH, mean)


def main(arguments: list[str]) -> int:
    """``dev.py train model --model dit``: trains on so many samples in all; resumes from what is in the folder."""
    parser = argparse.ArgumentParser(prog="dev.py train model --model dit")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--processes", type=int, choices=(1, 2, 4, 8), default=1, help="each takes a part of a batch")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, which needs a C++ compiler")
    options = parser.parse_args(arguments)
    logging.basicConfig(force=True, level=logging.INFO, format="%(asctime)s %(message)s")
    os.nice(options.nice)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / MEETING).unlink(missing_ok=True)
    if options.processes == 1:
        _train(0, options)
    else:  # forked, not spawned: the children find the host and the pack already imported
        torch.multiprocessing.start_processes(_train, (options,), nprocs=options.processes, start_method="fork")
    return 0


def _train(process: int, options: argparse.Namespace) -> None:
    """One process, with one thread. Several take a part of each batch, and average their gradients."""
    torch.set_num_threads(1)
    if options.processes > 1:
        meeting = f"file://{options.out.resolve() / MEETING}"
        torch.distributed.init_process_group("gloo", meeting, rank=process, world_size=options.processes)
    training = CountedTraining(options.out / CHECKPOINT, options.samples // BATCH)
    torch.manual_seed(0)
    state = State(build_dit())
    if training.tensors:
        state.load(training.tensors)
    _unet, text = bundled_networks()
    fitting = FitOptions(options.compile, options.processes, process)
    fit(state, text.requires_grad_(False).train(False), training, fitting)
