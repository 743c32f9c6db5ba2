"""Adapters' gradients through the host's networks, to the last digits: those of a network that writes nothing over
(A19)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import comfy.ldm.flux.model
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from comfyui_concepts.host.engine import gradients
from comfyui_concepts.host.erase import predictions
from comfyui_concepts.host.erase.text_encoder import encode_texts, text_layers
from comfyui_concepts.host.lora.adapters import attached, shapes_of, unet_layers
from comfyui_concepts.methods.erase.lowrank import LowRank
from comfyui_concepts.methods.erase.train import new_factors
from comfyui_concepts.methods.erase.trained.prompts import EncodedPrompts
from torch.overrides import TorchFunctionMode

FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 32,
    "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
}  # fmt: skip
NEWER = {"txt_ids_dims": []}
"""What newer hosts' configurations of it say besides."""


class OutOfPlace(TorchFunctionMode):
    """``x += f(x)`` makes a new tensor: the host's blocks as they would be if they wrote nothing over."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # only what is on the graph: a mask is added in place as well, and nothing is done with what comes back
        beside = func is torch.Tensor.add_ and getattr(args[1], "requires_grad", False)
        return (torch.add if beside else func)(*args, **(kwargs or {}))


def _flux(dtype):
    """A flow DiT of the host's own with random weights, as a loader node under inference mode makes it."""
    known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
    config = comfy.supported_models.FluxSchnell(FLUX | {name: NEWER[name] for name in NEWER.keys() & known})
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(5)
    for parameter in model.diffusion_model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    # rotations in the model's precision: the host's own are of float32, and so would the gradients be
    model.diffusion_model.pe_embedder.register_forward_hook(lambda module, inputs, output: output.to(dtype))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


class Case:
    """A network in a region where gradients can be taken, its layers, and the host's own way to call it."""

    def __init__(self, network, prefix, layers, call, region, answer=lambda out: out):
        self.network, self.prefix, self.layers, self.call, self.region, self.answer = (
            network, prefix, layers, call, region, answer,
        )  # fmt: skip

    def factors(self, dtype):
        generator = torch.Generator().manual_seed(3)
        with torch.inference_mode(False):
            return {
                k: LowRank((torch.randn(f.up.shape, generator=generator) * 0.1).to(dtype), f.down.to(dtype))
                for k, f in new_factors(shapes_of(self.layers), 2, 0).items()
            }

    def asked(self, factors):
        """What the network is asked and answers, where the host calls it with adapters."""
        seen = []
        before = self.network.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(_kept((args, kwargs))), with_kwargs=True
        )
        after = self.network.register_forward_hook(lambda module, inputs, out: seen.append(self.answer(out)))
        with attached(self.layers, factors):
            self.call()
        before.remove()
        after.remove()
        return seen

    def merged(self, factors, asked):
        """The answer of a copy with W + BA for weights."""
        network = copy.deepcopy(self.network).double()
        own = dict(network.named_parameters())
        keys = {key: key.removeprefix(self.prefix) for key in factors}
        weights = {name: own[name].detach() + factors[key].matrix().view_as(own[name]) for key, name in keys.items()}
        with OutOfPlace():
            return self.answer(torch.func.functional_call(network, weights, *asked))


def _kept(inputs):
    """Before the network writes over them."""
    args, kwargs = inputs
    kept = [t.clone() if isinstance(t, torch.Tensor) else t for t in args]
    return tuple(kept), {k: t.clone() if isinstance(t, torch.Tensor) else t for k, t in kwargs.items()}


def _products(answer):
    return answer * torch.randn(answer.shape, generator=torch.Generator().manual_seed(1), dtype=answer.dtype)


def _loss(answer):
    return _products(answer).sum()


def _gradient(answer, factors):
    found = torch.autograd.grad(_loss(answer), [t for f in factors.values() for t in f])
    return dict(zip([(key, part) for key in factors for part in ("up", "down")], found, strict=True))


def _required(factors):
    return {key: LowRank(*(t.detach().requires_grad_(True) for t in f)) for key, f in factors.items()}


@contextlib.contextmanager
def _in_double(encoder):
    """The layers of a text encoder in float64, which the host has fixed to float32."""

    def widened(module, args, kwargs):
        return tuple(a.double() for a in args), {k: v.double() if k == "mask" else v for k, v in kwargs.items()}

    handle = encoder.register_forward_pre_hook(widened, with_kwargs=True)
    yield
    handle.remove()


def _text_encoder(clip, skip):
    clip = clip.clone()
    clip.clip_layer(skip)
    return Case(
        clip.cond_stage_model.clip_l.transformer.text_model.encoder, "clip_l.transformer.text_model.encoder.",
        text_layers(clip), lambda: encode_texts(clip, ["a cat"]),
        lambda in_place=True: gradients.differentiable(clip.cond_stage_model, in_place=in_place),
        lambda out: out[0] if skip is None else out[1],
    )  # fmt: skip


def _of_model(patcher, layers, channels):
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode(False):
        x = torch.randn(2, channels, 8, 12, generator=generator, dtype=torch.float64)
        prompt = EncodedPrompts(torch.randn(2, 7, 32, generator=generator), torch.randn(2, 8, generator=generator))
        sigma = torch.tensor([0.9, 0.4], dtype=torch.float64)
    (patcher,) = predictions.loaded(patcher)
    options = gradients.differentiable_options(patcher.model_options)

    @contextlib.contextmanager
    def region(in_place=True):
        with gradients.temporarily_set(patcher.model, "current_patcher", patcher):  # noqa: SIM117
            with gradients.differentiable(patcher.model, in_place=in_place):
                yield

    return Case(
        patcher.model.diffusion_model, "diffusion_model.", layers,
        lambda: predictions.outputs(patcher.model, [prompt], x, sigma, options), region,
    )  # fmt: skip


def _flow_transformer(dtype=torch.float64):
    patcher = _flux(dtype)
    layers = {
        f"diffusion_model.{name}.weight": module for name, module in patcher.model.diffusion_model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(("double_blocks", "single_blocks"))
    }  # fmt: skip
    return _of_model(patcher, layers, 16)


@pytest.fixture(params=["text encoder", "text encoder, one layer skipped", "flow transformer", "UNet"])
def case(request, demo_model, new_model):
    if request.param.startswith("text"):
        made = _text_encoder(demo_model[1], -2 if "skipped" in request.param else None)
        with _in_double(made.network):
            yield made
    elif request.param == "UNet":
        patcher = new_model("EPS", torch.float64)
        yield _of_model(patcher, unet_layers(patcher.model, "all"), 4)
    else:
        yield _flow_transformer()


def test_every_factors_gradient_is_that_of_merged_weights_in_a_network_that_writes_nothing_over(case):
    factors = case.factors(torch.float64)
    with case.region():
        ours = _required(factors)
        *asked, answer = case.asked(ours)
        found = _gradient(answer, ours)
    eager = gradients.temporarily_set(comfy.model_management, "in_training", True)
    with torch.inference_mode(False), torch.enable_grad(), eager:
        plain = _required(factors)
        other = case.merged(plain, *asked)
        wanted = _gradient(other, plain)
    assert answer.dtype == torch.float64
    assert (answer - other).abs().max() <= 1e-12 * other.abs().max()
    assert len(found) == 2 * len(case.layers)
    for name, gradient in wanted.items():
        assert gradient.norm() > 1e-9
        assert (found[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


EPS = torch.finfo(torch.float64).eps
STEP = EPS ** (1 / 5)
"""The step at which a fourth-order difference loses as much by truncation (step⁴) as by rounding (eps / step)."""


def _difference(case, factors, key, aside):
    """The loss's derivative along ``aside`` by central differences, and a bound of its error.

    A plain difference D(h) is off by c h² + O(h⁴). Richardson's (4 D(h) - D(2h)) / 3 has no h² term. A loss is a sum
    of n products, rounded to √n eps times the sum of their sizes. D(h) divides two of them by 2h, which makes (4/3 +
    1/6) / h times that of rounding. Truncation doubles it, by the choice of the step.
    """
    sizes = []

    def loss(step):
        moved = LowRank(*(t + step * aside[p] for p, t in factors[key]._asdict().items()))
        with case.region(), torch.no_grad():
            products = _products(case.asked(factors | {key: moved})[-1])
        sizes.append(float(products.abs().sum()) * products.numel() ** 0.5)
        return float(products.sum())

    near, far = ((loss(h) - loss(-h)) / (2 * h) for h in (STEP, 2 * STEP))
    return (4 * near - far) / 3, 2 * (4 / 3 + 1 / 6) * EPS * max(sizes) / STEP


def test_every_factors_gradient_is_that_of_finite_differences(case):
    factors = case.factors(torch.float64)
    generator = torch.Generator().manual_seed(4)
    with case.region():
        ours = _required(factors)
        found = _gradient(case.asked(ours)[-1], ours)
    for key in sorted(factors)[::3]:
        aside = {p: torch.randn(t.shape, generator=generator, dtype=t.dtype) for p, t in factors[key]._asdict().items()}
        along = float(sum((found[key, part] * aside[part]).sum() for part in aside))
        difference, bound = _difference(case, factors, key, aside)
        assert abs(difference - along) <= bound, key


@pytest.mark.parametrize("kind", ["text encoder", "flow transformer"])
def test_what_the_host_writes_over_changes_no_bit_of_a_gradient(demo_model, kind):
    """In the host's own precision; without the region's care autograd refuses these networks."""
    case = _text_encoder(demo_model[1], None) if kind == "text encoder" else _flow_transformer(torch.float32)
    factors = case.factors(torch.float32)
    with case.region():
        ours = _required(factors)
        found = _gradient(case.asked(ours)[-1], ours)
    with case.region(in_place=False):
        again = _required(factors)
        with OutOfPlace():
            wanted = _gradient(case.asked(again)[-1], again)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            _gradient(case.asked(again)[-1], again)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        assert torch.equal(found[name], gradient), name
