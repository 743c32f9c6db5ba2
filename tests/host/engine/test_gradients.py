"""Gradients through the host's models: right by finite differences, and the host as it was afterwards, whatever
happens."""

from __future__ import annotations

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host import keys
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.model_patch import with_views
from comfyui_concepts.host.anagram.views import ViewPrompt
from comfyui_concepts.host.compose.guider import ComposeGuider
from comfyui_concepts.host.engine import gradients
from comfyui_concepts.host.engine.attention import SELF, capture, find_sites
from comfyui_concepts.host.engine.base_prompts import BasePrompts
from comfyui_concepts.host.lora.concept import Concept
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.host.registry import unet_of
from comfyui_concepts.methods.anagram.overlap import GradientStep
from comfyui_concepts.methods.anagram.views import view_named
from comfyui_concepts.methods.compose.settings import Compose

SIGMA = 3.0


def _as_loaded_by_the_host(patcher):
    """Turns the weights into inference tensors, as a loader node under inference mode makes them."""
    for module in patcher.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone())
                assert module._parameters[name].is_inference()
    return patcher


def _loss(model, x, target, *, stop, patches=None):
    """A loss of the self-attention keys in the middle of the decoder, from one model call."""
    unet = unet_of(model)
    site = find_sites(unet, SELF, "output")[1]
    context = gradients.without_inference_tensors(
        torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)).double()
    )
    sigma = gradients.without_inference_tensors(torch.tensor([SIGMA]))
    options = gradients.differentiable_options({})["transformer_options"] | {"patches": patches or {}}
    with capture(unet, [site], stop=stop) as seen:
        model.apply_model(x, sigma, c_crossattn=context.to(x.dtype), transformer_options=options)
        assert not stop  # the call has not come back
    return (seen.key(site) - target).square().mean()


@pytest.fixture
def double_model(new_model):
    return _as_loaded_by_the_host(new_model("EPS", torch.float64)).model


def _x(dtype=torch.float64):
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype) * SIGMA


def test_the_gradient_is_that_of_finite_differences(double_model):
    x, target = _x(), torch.tensor(0.3)
    gradient = gradients.gradient_of(
        double_model, x, lambda z: _loss(double_model, z, gradients.without_inference_tensors(target), stop=True)
    )
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    step = 1e-5
    ahead, behind = (
        gradients.gradient_of(double_model, x + s * direction, lambda z: _loss(double_model, z, 0.3, stop=True)).loss
        for s in (step, -step)
    )
    found, wanted = float((gradient.value * direction).sum()), (ahead - behind) / (2 * step)
    assert abs(wanted) > 1e-5
    assert abs(found - wanted) < 1e-6 * abs(wanted)


def _called_gradient(model, patches=None, conds=()):
    """The gradient, and how often the loss was asked for."""
    calls = []

    def loss_of(z):
        calls.append(z)
        return _loss(model, z, 0.3, stop=True, patches=patches)

    return gradients.gradient_of(model, _x(), loss_of, conds).value, len(calls)


def test_a_unet_overwrites_nothing_that_autograd_saves(double_model):
    fast, calls = _called_gradient(double_model)
    kept, _ = _called_gradient(double_model, conds=[[{"control": object()}]])
    assert calls == 1
    assert torch.equal(fast, kept)


@pytest.mark.parametrize(("block", "times"), [("input_block_patch", 1), ("output_block_patch", 2)])
def test_where_another_node_overwrites_what_autograd_saves_the_gradient_is_taken_again(double_model, block, times):
    def overwriting(h, *others):
        return (h, others[0].mul_(1.25)) if len(others) > 1 else h.mul_(1.25)

    def copying(h, *others):
        return (h, others[0] * 1.25) if len(others) > 1 else h * 1.25

    found, calls = _called_gradient(double_model, {block: [overwriting]})
    wanted, _ = _called_gradient(double_model, {block: [copying]})
    assert calls == times  # of the two, only the skipped tensor has been saved
    assert torch.allclose(found, wanted, rtol=1e-12, atol=0)


def test_an_error_of_another_kind_is_not_tried_again(double_model):
    calls = []

    def loss_of(z):
        calls.append(z)
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        gradients.gradient_of(double_model, _x(), loss_of)
    assert len(calls) == 1


def test_stopping_early_gives_the_whole_gradient(double_model):
    part, whole = (
        gradients.gradient_of(double_model, _x(), lambda z, stop=stop: _loss(double_model, z, 0.3, stop=stop))
        for stop in (True, False)
    )
    assert torch.equal(part.value, whole.value)
    assert part.loss == whole.loss


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
def test_through_the_hosts_own_batched_evaluation(new_model, kind):
    patcher = _as_loaded_by_the_host(new_model(kind))
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds([[torch.randn(1, 7, 32), {}]], [[torch.randn(1, 7, 32), {}]])
    guider.set_cfg(2.0)
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "normal", 3)
    found = []

    def watch(executor, x, timestep, model_options, seed):
        def loss(z):
            conds = [gradients.without_inference_tensors(guider.conds[name]) for name in ("positive", "negative")]
            options = gradients.differentiable_options(model_options)
            out = comfy.samplers.calc_cond_batch(
                guider.inner_model, conds, z, gradients.without_inference_tensors(timestep), options
            )
            return (out[0] + out[1]).square().mean()

        found.append(gradients.gradient_of(guider.inner_model, x, loss))
        return executor(x, timestep, model_options, seed)

    patcher.add_wrapper_with_key("predict_noise", "test", watch)
    noise = torch.randn(1, 4, 8, 8)
    guider.model_options = patcher.model_options
    guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1
    )
    assert len(found) == 3
    assert all(g.value is not None and g.value.abs().max() > 0 for g in found)
    assert not any(g.value.is_inference() or g.value.requires_grad for g in found)


def _state(model) -> list:
    """Every parameter object, hook and switch of the host that the region touches."""
    parts = [(id(t), t is not None and t.is_inference()) for m in model.modules() for t in m._parameters.values()]
    parts += [id(t) for m in model.modules() for t in m._buffers.values()]
    parts += [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    switches = [getattr(comfy.model_management, name, None) for name in ("in_training", "NUM_STREAMS")]
    return [parts, switches, torch.is_inference_mode_enabled(), torch.is_grad_enabled()]


def _layers_that_run(model) -> list:
    layers, handles = [], []
    for module in model.diffusion_model.modules():
        if not list(module.children()):
            handles.append(module.register_forward_hook(lambda m, *_: layers.append(m)))
    model.apply_model(_x(torch.float32), torch.tensor([SIGMA]), c_crossattn=torch.randn(1, 7, 32))
    for handle in handles:
        handle.remove()
    return layers


class _Cancelled(BaseException):
    """As the host's own interruption, or worse."""


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, _Cancelled])
def test_an_error_at_any_layer_leaves_the_host_as_it_was(new_model, error, monkeypatch):
    model = _as_loaded_by_the_host(new_model("EPS")).model
    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 2)
    monkeypatch.setattr(comfy.model_management, "in_training", False, raising=False)
    before, layers = _state(model), _layers_that_run(model)
    assert len(layers) > 60

    def fail(*_):
        raise error("here")

    for layer in layers[::5]:
        handle = layer.register_forward_pre_hook(fail)
        try:
            with pytest.raises(error):
                gradients.gradient_of(model, _x(torch.float32), lambda z: _loss(model, z, 0.3, stop=False))
        finally:
            handle.remove()
        assert _state(model) == before
    with pytest.raises(error):
        gradients.gradient_of(model, _x(torch.float32), lambda z: (_ for _ in ()).throw(error("there")))
    assert _state(model) == before


def test_an_error_while_the_aliases_are_made_or_in_the_backward_pass_leaves_the_host_as_it_was(new_model, monkeypatch):
    model = _as_loaded_by_the_host(new_model("EPS")).model
    before, calls, alias = _state(model), [], gradients._alias

    def fails_later(tensor):
        calls.append(tensor)
        if len(calls) == 20:
            raise torch.OutOfMemoryError("here")
        return alias(tensor)

    monkeypatch.setattr(gradients, "_alias", fails_later)
    with pytest.raises(torch.OutOfMemoryError):
        gradients.gradient_of(model, _x(torch.float32), lambda z: z.sum())
    assert _state(model) == before
    monkeypatch.undo()
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("there")))
    with pytest.raises(torch.OutOfMemoryError):
        gradients.gradient_of(model, _x(torch.float32), lambda z: _loss(model, z, 0.3, stop=True))
    assert _state(model) == before


def test_inside_the_region_the_switches_are_set_and_the_storage_is_shared(new_model, monkeypatch):
    model = _as_loaded_by_the_host(new_model("EPS")).model
    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 2)
    monkeypatch.setattr(comfy.model_management, "in_training", False, raising=False)
    places = [p.data_ptr() for p in model.parameters()]
    with gradients.differentiable(model):
        assert comfy.model_management.NUM_STREAMS == 0
        assert comfy.model_management.in_training
        assert [p.data_ptr() for p in model.parameters()] == places
        assert not any(p.is_inference() or p.requires_grad for p in model.parameters())
        with pytest.raises(RuntimeError, match="nested"), gradients.differentiable(model):
            pass
        assert comfy.model_management.NUM_STREAMS == 0
    assert comfy.model_management.NUM_STREAMS == 2


def test_values_in_the_region_are_the_hosts_own_bit_for_bit(new_model):
    model = _as_loaded_by_the_host(new_model("EPS")).model
    arguments = _x(torch.float32), torch.tensor([SIGMA])
    context = torch.randn(1, 7, 32)
    override = {"optimized_attention_override": gradients.attention_pytorch}
    override["optimized_attention_override"] = lambda f, *a, **k: gradients.attention_pytorch(*a, **k)
    plain = model.apply_model(*arguments, c_crossattn=context, transformer_options=dict(override))
    with gradients.differentiable(model):
        options = gradients.differentiable_options({})["transformer_options"]
        ours = model.apply_model(
            *map(gradients.without_inference_tensors, arguments),
            c_crossattn=context.clone(),
            transformer_options=options,
        )
    assert torch.equal(ours, plain)


def test_a_gradient_that_is_not_finite_is_none(new_model):
    model = new_model("EPS").model
    answer = gradients.gradient_of(model, _x(torch.float32), lambda z: (z * float("inf")).sum())
    assert answer.value is None


def test_what_has_no_gradient_is_refused(new_model):
    model = new_model("EPS").model
    model.diffusion_model.out = torch.compile(model.diffusion_model.out)
    with pytest.raises(ValueError, match=r"compiled.*TorchCompileModel"), gradients.differentiable(model):
        pass
    model = new_model("EPS").model
    model.diffusion_model.out.fast = type("Linear", (torch.nn.Module,), {"__qualname__": "fp8_ops.Linear"})()
    with pytest.raises(ValueError, match=r"quantised.*fp16 or bf16"), gradients.differentiable(model):
        pass


def test_the_plain_patcher_asks_newer_hosts_for_ordinary_weights(new_model):
    patcher = new_model("EPS")
    assert gradients.plain_patcher(patcher) is patcher

    class Dynamic:
        def is_dynamic(self):
            return True

        def get_non_dynamic_delegate(self):
            raise RuntimeError("no cached_patcher_init")

    with pytest.raises(ValueError, match="--disable-dynamic-vram"):
        gradients.plain_patcher(Dynamic())


def _cond(seed):
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), {keys.PHRASE_POSITIONS: (1, 2)}]]


def _of_views(model, gradients_taken):
    prompts = [ViewPrompt(view_named(name), _cond(n), _cond(9)) for n, name in enumerate(("identity", "flip"))]
    step = GradientStep(None, None, 0.0, 1.0, 1) if gradients_taken else None
    return ViewsGuider(model, prompts, None, 3.0, step).model_patcher


def _of_view_patch(model, gradients_taken):
    prompts = [ViewPrompt(view_named(name), _cond(n), _cond(9)) for n, name in enumerate(("identity", "flip"))]
    return with_views(model, prompts, None, GradientStep(None, None, 0.0, 1.0, 1) if gradients_taken else None)[0]


def _concept():
    return Concept("c", "", LoraFile("c", {}), 1.0, _cond(3), _cond(4))


def _of_composer(model, gradients_taken):
    settings = Compose(enhancement=1.0 if gradients_taken else 0.0)
    return ComposeGuider(model, BasePrompts(_cond(1), _cond(2), 3.0), [_concept()], None, settings).model_patcher


def _of_composer_without_concepts(model, _):
    return ComposeGuider(model, BasePrompts(_cond(1), _cond(2), 3.0), [], None, Compose(enhancement=1.0)).model_patcher


@pytest.mark.parametrize("made", [_of_views, _of_view_patch, _of_composer])
def test_whoever_takes_gradients_samples_with_ordinary_weights_and_nobody_else(new_model, made):
    """On newer hosts, where the weights of a MODEL are in memory that autograd does not see."""
    plain = new_model("EPS")
    dynamic = plain.clone()
    dynamic.is_dynamic, dynamic.get_non_dynamic_delegate = (lambda: True), (lambda: plain)
    dynamic.clone, plain.clone = (lambda: dynamic), (lambda: plain)
    assert made(dynamic, True) is plain
    assert made(dynamic, False) is dynamic
    assert _of_composer_without_concepts(dynamic, True) is dynamic


@pytest.mark.parametrize("made", [_of_views, _of_view_patch, _of_composer])
def test_a_model_without_ordinary_weights_is_refused_where_it_is_set_up(new_model, made):
    def none():
        raise RuntimeError("no cached_patcher_init")

    dynamic = new_model("EPS")
    dynamic.is_dynamic, dynamic.get_non_dynamic_delegate = (lambda: True), none
    with pytest.raises(ValueError, match="--disable-dynamic-vram"):
        made(dynamic, True)
