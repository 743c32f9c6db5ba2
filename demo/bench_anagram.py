"""``dev.py bench anagram``: what each view costs, against plain sampling in the same run."""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable

import comfy.samplers
import torch

from ..host.guider import ViewPrompt, ViewsGuider
from ..methods.anagram.combine import AVERAGING, combiner
from ..methods.anagram.prediction import Predictions
from ..methods.anagram.views import VIEWS, view_named
from .sampling import CFG, STEPS, Painter, encode, noise_for


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def ratios(plain: Callable[[], object], other: Callable[[], object], runs: int) -> list[float]:
    """Seconds of ``other`` over seconds of ``plain``, run in turn so that both meet the same machine."""
    plain(), other()  # warm up
    return [_timed(other) / _timed(plain) for _ in range(runs)]


@torch.inference_mode()
def main(arguments: list[str]) -> int:
    """Prints the median and the range of the ratio for 1 to 4 views in one batched call."""
    parser = argparse.ArgumentParser(prog="dev.py bench anagram")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    painter = Painter()
    noise = noise_for([1])
    sigmas = comfy.samplers.calculate_sigmas(painter.model.get_model_object("model_sampling"), "normal", STEPS)
    prompt, negative = encode(painter.clip, "a cat"), encode(painter.clip, "")

    def sample(guider: comfy.samplers.CFGGuider) -> None:
        sampler = comfy.samplers.sampler_object("euler")
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)

    def plain() -> None:
        guider = comfy.samplers.CFGGuider(painter.model)
        guider.set_conds(prompt, negative)
        guider.set_cfg(CFG)
        sample(guider)

    for views in (1, 2, 3, 4):
        prompts = [ViewPrompt(view, prompt, negative) for view in map(view_named, list(VIEWS)[:views])]
        measured = ratios(plain, lambda p=prompts: sample(_anagram(painter, p)), options.runs)
        print(
            f"{views} views: {statistics.median(measured):.2f} × plain sampling "
            f"({min(measured):.2f} to {max(measured):.2f}, {options.runs} pairs, {STEPS} steps, euler)",
            flush=True,
        )
    return 0


def _anagram(painter: Painter, prompts: list[ViewPrompt]) -> ViewsGuider:
    combine = combiner(AVERAGING, [1.0] * len(prompts))
    return ViewsGuider(painter.model, prompts, lambda **known: combine(Predictions(**known)), CFG)
