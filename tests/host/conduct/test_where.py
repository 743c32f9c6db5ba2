"""Where Concept Conductor acts: its window of the sampling and its range of blocks, on a UNet and on transformers."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.conduct.guider import ConductGuider
from comfyui_concepts.host.conduct.merging import Merging
from comfyui_concepts.host.engine.base_prompts import BasePrompts
from comfyui_concepts.host.engine.sampling import percent_of
from comfyui_concepts.host.lora.concept import Concept
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.methods.conduct.settings import Conduct
from comfyui_concepts.methods.regions import Box, Region

from ..compose import joint_cases
from ..tiny_transformers import counted, noise, shared_transformer

NETWORKS = ["unet", "flux", "zimage"]
BARE = Conduct(refine_end=0.0)
LEFT = Region("left", (Box(0, 0, 0.5, 1),))
STEPS = 4


class Case:
    """One concept in the left half of a random model's picture, and the model without it."""

    def __init__(self, name, unet):
        self.name = name
        self.model, self.rows = counted(unet if name == "unet" else shared_transformer(name))
        if name != "unet":
            self.prompts, self.concept = joint_cases.base(name, cfg=2.0), joint_cases.concept(name)
            return
        words = [[[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(n)), {}]] for n in range(4)]
        self.prompts = BasePrompts(words[0], words[1], 2.0)
        self.concept = Concept("c", "", LoraFile("c", self._lora()), 1.0, words[2], words[3])

    def _lora(self):
        generator, tensors = torch.Generator().manual_seed(3), {}
        for path, module in self.model.model.diffusion_model.named_modules():
            if path.endswith((".to_q", ".to_v")):
                name, (out, wide) = f"lora_unet_{path.replace('.', '_')}", module.weight.shape
                tensors[f"{name}.lora_down.weight"] = torch.randn(4, wide, generator=generator) * 0.3
                tensors[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.3
        return tensors

    def seen(self, settings=None):
        """The predictions at one latent at every noise level of a schedule, and the rows of all model calls."""
        made = joint_cases.plain(self.model, self.prompts)
        if settings is not None:
            made = ConductGuider(self.model, self.prompts, [self.concept], [LEFT], settings)
        found, latent = [], noise(self.model, 8, 8)

        def look(model, x, sigmas, extra_args=None, callback=None, disable=None):
            found.extend(model(latent, sigma.expand(len(x)), **extra_args) for sigma in sigmas[:-1])
            return x

        sampler = comfy.samplers.KSAMPLER(look)
        made.sample(latent, torch.zeros_like(latent), sampler, self.sigmas, disable_pbar=True, seed=1)
        rows = list(self.rows)
        self.rows.clear()
        return found, rows

    @property
    def sigmas(self):
        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "simple", STEPS)

    @property
    def percents(self):
        sampling = self.model.get_model_object("model_sampling")
        return [percent_of(sampling, float(sigma)) for sigma in self.sigmas[:-1]]


@pytest.fixture(params=NETWORKS)
def case(request, tiny_models):
    return Case(request.param, tiny_models["EPS"])


@pytest.mark.parametrize("inject", [False, True])
def test_in_an_empty_window_or_no_block_the_base_draws_alone_bit_for_bit(case, inject):
    settings = replace(BARE, whole_transformers=inject)
    plain, whole = case.seen(), case.seen(settings)
    assert plain[1] == [2] * STEPS
    assert whole[1] == [4] * STEPS
    assert not any(torch.equal(*pair) for pair in zip(plain[0], whole[0], strict=True))
    empty = {"injection_start": 0.6, "injection_end": 0.5}, {"block_start": 0.5, "block_end": 0.5}, {"block_end": 0.0}
    for values in empty:
        found, rows = case.seen(replace(settings, **values))
        assert rows == plain[1]
        assert all(torch.equal(*pair) for pair in zip(found, plain[0], strict=True)), values


def test_outside_of_the_window_the_same_latent_gets_the_base_s_prediction_at_its_cost(case):
    (plain, _), (whole, _) = case.seen(), case.seen(BARE)
    first, _, third, _ = case.percents
    for start, end, inside in ((0.0, first, {0}), (third, 1.0, {2, 3})):
        found, rows = case.seen(replace(BARE, injection_start=start, injection_end=end + 1e-6))
        assert rows == [4 if n in inside else 2 for n in range(STEPS)]
        for n in range(STEPS):
            assert torch.equal(found[n], (whole if n in inside else plain)[n])


@pytest.mark.parametrize("inject", [False, True])
def test_ranges_of_blocks_are_parts_of_the_whole(case, inject, monkeypatch):
    places, merge = [], Merging.merge
    monkeypatch.setattr(
        Merging, "merge", lambda self, out, place, options: places.append(place) or merge(self, out, place, options)
    )

    def met(start, end):
        settings = replace(BARE, whole_transformers=inject, block_start=start, block_end=end)
        found, _ = case.seen(settings)
        seen = list(dict.fromkeys(places))
        places.clear()
        return found[0], seen

    (whole, every), (early, front), (late, back) = met(0.0, 1.0), met(0.0, 0.5), met(0.5, 1.0)
    assert torch.equal(whole, case.seen(replace(BARE, whole_transformers=inject))[0][0])
    assert front + back == every
    assert front
    assert back
    assert not {place.block for place in front} & {place.block for place in back}
    base = case.seen()[0][0]
    pictures = [whole, early, late, base]
    assert not any(torch.equal(a, b) for n, a in enumerate(pictures) for b in pictures[:n])


def test_masks_are_refined_for_a_window_to_come_and_not_after_it(case):
    first, second, _, last = case.percents
    early = Conduct(refine_start=0.0, refine_end=second, injection_start=last - 1e-3, refine_every=0.001)
    assert case.seen(early)[1] == [4, 4, 2, 4]
    late = Conduct(refine_start=second, refine_end=1.0, injection_end=first + 1e-3, refine_every=0.001)
    assert case.seen(late)[1] == [4, 2, 2, 2]
