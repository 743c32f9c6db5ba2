"""The base of the guiders: a run per sampling, the host's own sampling otherwise, and nothing left behind."""

from __future__ import annotations

from dataclasses import dataclass, field

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfyui_concepts.host.engine.guider import RunGuider
from comfyui_concepts.methods.panels import Panel

STEPS = 4


def _cond(seed: int) -> list:
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), {}]]


def _sample(guider, sampler="euler", callback=None):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    torch.manual_seed(0)
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object(sampler), sigmas, callback=callback,
        disable_pbar=True, seed=11,
    )  # fmt: skip


@dataclass
class _Run:
    calls: list[float] = field(default_factory=list)


class _Guider(RunGuider[_Run]):
    plain, shift, finished = False, 0.0, False

    def __init__(self, model, row_factor=1):
        super().__init__(model, 7.0, "test", row_factor)
        self.set_conds(_cond(0), _cond(99))
        self.runs: list[_Run] = []

    def is_plain(self):
        return self.plain

    def begin(self, sampling):
        self.runs.append(_Run())
        return self.runs[-1]

    def first_noise(self, run, sampling):
        return sampling.noise + self.shift

    def predict(self, run, x, sigma, options, seed):
        run.calls.append(float(sigma.max()))
        return self.guided(x, sigma, options, seed)

    def finish(self, run):
        self.finished = True


class _OwnProcessing(_Guider):
    host_processes = False

    def begin(self, sampling):
        assert self.conds == {}
        for name, conds in sampling.unprocessed.items():
            self.conds |= sampling.process({name: conds})
        return super().begin(sampling)


def _host(model):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(_cond(0), _cond(99))
    guider.set_cfg(7.0)
    return guider


@pytest.fixture
def model(tiny_models):
    return tiny_models["EPS"]


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpm_2", "dpmpp_2m", "uni_pc"])
@pytest.mark.parametrize("kind", [_Guider, _OwnProcessing])
def test_a_guider_that_passes_everything_on_is_the_host_bit_for_bit(model, kind, sampler):
    guider = kind(model)
    assert torch.equal(_sample(guider, sampler), _sample(_host(model), sampler))
    assert guider.finished
    assert guider.runs[0].calls


def test_a_plain_guider_begins_no_run(model):
    guider = _Guider(model)
    guider.plain = True
    assert torch.equal(_sample(guider), _sample(_host(model)))
    assert guider.runs == []


def test_each_sampling_has_a_run_of_its_own_and_drops_it(model):
    guider = _Guider(model)
    assert torch.equal(_sample(guider), _sample(guider))
    assert [len(run.calls) for run in guider.runs] == [STEPS, STEPS]
    assert guider.run is None


def test_a_guider_may_start_from_another_noise(model):
    guider = _Guider(model)
    plain = _sample(guider)
    guider.shift = 0.5
    assert not torch.equal(_sample(guider), plain)


@pytest.mark.parametrize("kind", [_Guider, _OwnProcessing])
@pytest.mark.parametrize("error", [InterruptProcessingException, ValueError])
@pytest.mark.parametrize("where", ["begin", "predict"])
def test_after_an_error_or_a_cancel_nothing_is_left(model, kind, error, where, monkeypatch):
    guider = kind(model)
    options = guider.model_options

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(guider, where, fail)
    with pytest.raises(error):
        _sample(guider)
    assert guider.run is None
    assert not guider.finished
    assert guider.model_options is options
    assert "test" not in str(options.get("transformer_options", {}).get("wrappers", {}))
    assert set(guider.conds) == {"positive", "negative"}
    monkeypatch.undo()
    assert torch.equal(_sample(guider), _sample(_host(model)))


def test_the_host_cleans_up_what_a_guider_has_processed_itself(model, monkeypatch):
    import comfy.sampler_helpers

    cleaned: list = []
    cleanup = comfy.sampler_helpers.cleanup_models
    monkeypatch.setattr(
        comfy.sampler_helpers, "cleanup_models", lambda conds, models: (cleaned.append(conds), cleanup(conds, models))
    )
    _sample(_OwnProcessing(model))
    assert set(cleaned[0]) == {"positive", "negative"}
    assert all("model_conds" in entry for entries in cleaned[0].values() for entry in entries)


@pytest.mark.parametrize(("factor", "rows"), [(1, 2), (3, 6)])
def test_the_host_is_asked_for_room_for_all_rows(model, factor, rows):
    asked: list[int] = []

    def note(executor, model, noise_shape, *args, **kwargs):
        asked.append(noise_shape[0])
        return executor(model, noise_shape, *args, **kwargs)

    guider = _Guider(model, factor)
    kind = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
    guider.model_options = comfy.model_patcher.create_model_options_clone(guider.model_options)
    comfy.patcher_extension.add_wrapper_with_key(kind, "note", note, guider.model_options, is_model_options=True)
    _sample(guider)
    assert asked == [rows]


@pytest.mark.parametrize("shows", [True, False])
def test_the_panels_of_the_run_are_shown_after_each_step(model, shows, monkeypatch):
    shown: list = []
    guider = _Guider(model)
    guider.shows_panels = shows

    def panels(run, x0, paint):
        shown.append(run)
        return [Panel(paint(x0))]

    guider.panels = panels
    _sample(guider, callback=lambda *args: None)
    assert shown == (guider.runs * STEPS if shows else [])
