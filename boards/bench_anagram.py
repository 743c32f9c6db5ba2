"""``dev.py bench anagram``: what views cost over the model calls they need, and what the gradient step costs.

Both sides of a ratio are timed in turn in the same run: they meet the same machine.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from functools import partial

import comfy.model_management
import comfy.samplers
import torch

from ..demo.sampling import CFG, STEPS, DemoSampler, encode, noise_for
from ..host.anagram.anti_segregation import AntiSegregator
from ..host.anagram.guider import ViewsGuider
from ..host.anagram.request import anagram_request
from ..host.anagram.views import ViewConds, ViewPrompt
from ..host.engine.latent_edits import EditSchedule
from ..host.text.tokens import encode_with_phrase
from ..methods.anagram.combine import AVERAGING, MULTI_TASK_FAST, MULTI_TASK_FULL, PRESETS, combiner
from ..methods.anagram.overlap import gradient_step_of
from ..methods.anagram.views import VIEWS, view_named
from .timing import ratios

SIGMA = 2.0  # where the gradient step is timed


class AnagramBench:
    """The demo model with the prompts of up to four views."""

    def __init__(self, runs: int) -> None:
        self.demo, self.runs = DemoSampler(), runs
        sampling = self.demo.model.get_model_object("model_sampling")
        self.sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
        self.prompt = encode_with_phrase(self.demo.clip, "a cat", "cat")
        self.negative = encode(self.demo.clip, "")

    def say(self, what: str, measured: list[float]) -> None:
        span = f"{min(measured):.2f} to {max(measured):.2f}, {self.runs} pairs"
        print(f"{what}: {statistics.median(measured):.2f} × ({span})", flush=True)

    def prompts(self, views: int) -> list[ViewPrompt]:
        return [ViewPrompt(view, self.prompt, self.negative) for view in map(view_named, list(VIEWS)[:views])]

    def sample(self, guider: comfy.samplers.CFGGuider, pictures: int) -> None:
        noise = noise_for(list(range(pictures)))
        sampler = comfy.samplers.sampler_object("euler")
        guider.sample(noise, torch.zeros_like(noise), sampler, self.sigmas, disable_pbar=True, seed=1)

    def plain(self, pictures: int) -> None:
        """So many pictures without views: calls of as many rows as one picture in so many views."""
        guider = comfy.samplers.CFGGuider(self.demo.model)
        guider.set_conds(self.prompt, self.negative)
        guider.set_cfg(CFG)
        self.sample(guider, pictures)

    def anagram(self, views: int) -> None:
        """Views that are averaged and rectified, so many rows a view and no more."""
        combine = combiner(MULTI_TASK_FAST, [1.0] * views)
        self.sample(ViewsGuider(self.demo.model, self.prompts(views), combine, CFG), 1)

    def preset(self, views: int, name: str) -> None:
        """So many views as Anagram Guider samples them with that preset of Anagram Options."""
        request = anagram_request(self.prompts(views), PRESETS[name] or AVERAGING)
        guider = ViewsGuider(self.demo.model, request.prompts, request.combine, CFG, request.gradient_step)
        self.sample(guider, 1)

    def gradient(self, views: int) -> list[float]:
        """One gradient step over one forward pass of the views' positives, a row each."""
        model = self.demo.model.model
        comfy.model_management.load_models_gpu([self.demo.model])
        self.demo.model.pre_run()  # else the host's model does not know its patcher
        noise = noise_for([1]) * SIGMA
        conds = []
        for prompt in self.prompts(views):
            raw = {"positive": comfy.sampler_helpers.convert_cond(prompt.positive)}
            conds.append(comfy.samplers.process_conds(model, noise, raw, noise.device)["positive"])
        listed = [ViewConds(p.view, c, None) for p, c in zip(self.prompts(views), conds, strict=True)]
        step = gradient_step_of(MULTI_TASK_FULL.anti_segregation)
        assert step is not None
        level = torch.full((1,), SIGMA)
        forward = lambda: comfy.samplers.calc_cond_batch(model, conds, noise, level, {})  # noqa: E731
        try:
            return ratios(
                forward, lambda: AntiSegregator(model, listed, step, EditSchedule())(noise, level, {}), self.runs * 4
            )
        finally:
            self.demo.model.cleanup()


@torch.inference_mode()
def main(arguments: list[str]) -> int:
    """Prints the median and the range of each ratio for 1 to 4 views."""
    parser = argparse.ArgumentParser(prog="dev.py bench anagram")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--views", type=int, action="append", choices=(1, 2, 3, 4), help="again for more; all without")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    bench = AnagramBench(options.runs)
    counts = options.views or (1, 2, 3, 4)
    for views in counts:
        bare = ratios(partial(bench.plain, views), partial(bench.anagram, views), options.runs)
        bench.say(f"{views} views over bare calls of {2 * views} rows", bare)
    for views in (n for n in counts if n > 1):
        alone = ratios(partial(bench.plain, 1), partial(bench.anagram, views), options.runs)
        bench.say(f"{views} views over one plain picture", alone)
        for name in (n for n, preset in PRESETS.items() if preset is not None):
            made = ratios(partial(bench.plain, 1), partial(bench.preset, views, name), options.runs)
            bench.say(f"{views} views by '{name}' over one plain picture", made)
        bench.say(f"gradient step over a forward pass of {views} rows", bench.gradient(views))
    return 0
