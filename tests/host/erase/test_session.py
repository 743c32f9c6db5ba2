"""Training on the host's models: right gradients, nothing changed in what is loaded, the same file for the same
seed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.engine import gradients
from comfyui_concepts.host.erase import predictions
from comfyui_concepts.host.erase import session as training
from comfyui_concepts.host.erase.train import train_unet
from comfyui_concepts.host.erase.trajectories import TrajectorySampler
from comfyui_concepts.host.lora.adapters import TARGET_MODULES, attached, shapes_of, unet_layers
from comfyui_concepts.methods.erase.edit import Edit
from comfyui_concepts.methods.erase.lowrank import LowRank
from comfyui_concepts.methods.erase.train import Losses, Schedule, new_factors
from comfyui_concepts.methods.erase.trained import Recipe
from comfyui_concepts.methods.erase.trained.all_but_one import all_but_one
from comfyui_concepts.methods.erase.trained.context import MethodSettings, TrainingTexts
from comfyui_concepts.methods.erase.trained.doco import ALONE, Discriminator, doco
from comfyui_concepts.methods.erase.trained.esd import esd
from comfyui_concepts.methods.erase.trained.plan import Plan, TrainOptions, TrajectoryPlan
from comfyui_concepts.methods.erase.trained.prompts import EncodedPrompts
from torch.optim.optimizer import register_optimizer_step_pre_hook

KINDS = ["EPS", "V_PREDICTION", "FLOW"]


class TinyClip:
    """Stands in for a text encoder of the tiny models' width, which there is none of: a text to fixed random rows."""

    use_clip_schedule = False

    def tokenize(self, text, **options):
        return text

    def encode_from_tokens_scheduled(self, text):
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), {"pooled_output": None}]]


def _plan(**changes):
    made = {
        "concept": ("a cat", "the cat"), "anchor": ("", "the"), "method": esd, "schedule": Schedule(4, 5e-3),
        "settings": MethodSettings(batch=2, preserve_batch=2), "preserved": ("a dog",), "rank": 4, "size": (8, 8),
        "trajectories": 2, "steps": 4, "preview_every": 2,
    } | changes  # fmt: skip

    def part(kind, **more):
        return kind(**more, **{k: made[k] for k in kind.__dataclass_fields__ if k in made and k not in more})

    trajectories = TrajectoryPlan(made["trajectories"], made["steps"], 3.0, made.get("anchor_states", False))
    recipe = Recipe("a test", made["method"], made["schedule"], made["settings"])
    start = Edit(layers=made.get("start", {}))
    options = part(TrainOptions, start=start, trajectories=None, steps=None)
    return Plan(recipe, "draft", (), part(TrainingTexts), made["schedule"], made["settings"], trajectories, options)


def _as_loaded_by_the_host(patcher):
    """Turns the weights into inference tensors, as a loader node under inference mode makes them."""
    for module in patcher.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone())
    return patcher


def _state(patcher):
    """All bytes of the model, every hook and place of a parameter, the patches of the patcher, and the host's
    switches."""
    model = patcher.model
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    places = [(type(m), id(p)) for m in model.modules() for p in m._parameters.values()]
    switches = [getattr(comfy.model_management, name, None) for name in ("in_training", "NUM_STREAMS")]
    modes = [torch.is_inference_mode_enabled(), torch.is_grad_enabled()]
    return digest.hexdigest(), hooks, places, sorted(patcher.patches), switches, modes, model.current_patcher


@contextlib.contextmanager
def _region(patcher):
    (patcher,) = predictions.loaded(patcher)
    with gradients.temporarily_set(patcher.model, "current_patcher", patcher), gradients.differentiable(patcher.model):
        yield patcher.model, gradients.differentiable_options(patcher.model_options)


def _inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 4, 8, 8, generator=generator, dtype=dtype)
    context = torch.randn(3, 7, 32, generator=generator, dtype=dtype)
    return x, torch.tensor([0.9, 0.5, 0.2], dtype=dtype), [EncodedPrompts(context), EncodedPrompts(context[:1])]


@pytest.mark.parametrize("kind", KINDS)
def test_step_zero_is_the_teacher_bit_for_bit(new_model, kind):
    patcher = _as_loaded_by_the_host(new_model(kind))
    with _region(patcher) as (model, options):
        x, sigma, prompts = _inputs()
        for name in TARGET_MODULES:
            layers = unet_layers(model, name)
            plain = predictions.outputs(model, prompts, x, sigma, options)
            with attached(layers, new_factors(shapes_of(layers), 4, 0)):
                assert torch.equal(predictions.outputs(model, prompts, x, sigma, options), plain)
            changed = {k: LowRank(f.up + 0.1, f.down) for k, f in new_factors(shapes_of(layers), 4, 0).items()}
            with attached(layers, changed):
                assert not torch.allclose(predictions.outputs(model, prompts, x, sigma, options), plain)
            assert torch.equal(predictions.outputs(model, prompts, x, sigma, options), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_what_the_network_gives(new_model, kind):
    patcher, seen = new_model(kind), []
    with _region(patcher) as (model, options), torch.no_grad():
        handle = model.diffusion_model.register_forward_hook(lambda m, i, out: seen.append(out))
        x, sigma, prompts = _inputs()
        ours = predictions.outputs(model, prompts[:1], x, sigma, options)[0]
        handle.remove()
        clean = predictions.clean_of(model.model_sampling, x, sigma, ours)
    assert torch.allclose(ours, seen[0], atol=2e-4)
    with torch.no_grad():
        noise = torch.randn_like(x)
        target = predictions.target_of(model.model_sampling, clean, noise, sigma)
        noisy = predictions.noised(model.model_sampling, clean, noise, sigma)
        assert torch.allclose(predictions.clean_of(model.model_sampling, noisy, sigma, target), clean, atol=1e-4)
        if kind == "EPS":
            assert torch.allclose(target, noise, atol=1e-4)
        if kind == "FLOW":
            assert torch.allclose(target, noise - clean, atol=1e-4)


def test_the_gradient_of_a_factor_is_that_of_finite_differences(new_model):
    patcher = _as_loaded_by_the_host(new_model("EPS", torch.float64))
    with _region(patcher) as (model, options):
        layers = unet_layers(model, "cross k/v")
        factors = {
            k: LowRank(f.up.double() + 0.05, f.down.double()) for k, f in new_factors(shapes_of(layers), 2, 0).items()
        }
        (x, sigma, prompts), raw = _inputs(torch.float64), []

        def loss():
            with attached(layers, factors):
                predictions.outputs(model, prompts, x, sigma, options)
            return raw[-1].square().mean()  # before the host casts it to float32

        key = sorted(factors)[3]
        handle = model.diffusion_model.register_forward_hook(lambda module, inputs, output: raw.append(output))
        up = factors[key].up.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(), up)
        direction = torch.randn(up.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        step, found = 1e-4, []
        for sign in (1, -1):
            factors[key] = LowRank(up.detach() + sign * step * direction, factors[key].down)
            found.append(float(loss().detach()))
        handle.remove()
    wanted = (found[0] - found[1]) / (2 * step)
    assert abs(wanted) > 1e-8
    assert abs(float((gradient * direction).sum()) - wanted) < 1e-5 * abs(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_leaves_the_model_and_its_clones_as_they_were_and_repeats_itself(new_model, kind):
    patcher = _as_loaded_by_the_host(new_model(kind))
    clone = patcher.clone()
    predictions.loaded(patcher)
    before = _state(patcher), _state(clone)
    first = train_unet(patcher, TinyClip(), _plan())
    assert (_state(patcher), _state(clone)) == before
    again = train_unet(patcher, TinyClip(), _plan())
    assert first.outcome.erase == again.outcome.erase
    for key, factor in first.outcome.factors.items():
        assert factor.up.abs().max() > 0
        assert all(torch.equal(a, b) for a, b in zip(factor, again.outcome.factors[key], strict=True))
    assert first.outcome.reason.startswith("all 4")
    assert first.previews.shape[0] == 3  # after the first, the third, and at the end
    assert train_unet(patcher, TinyClip(), _plan(seed=1)).outcome.erase != first.outcome.erase


class _Cancelled(BaseException):
    """As a keyboard interrupt."""


@pytest.mark.parametrize(
    "error",
    [RuntimeError, torch.OutOfMemoryError, _Cancelled, comfy.model_management.InterruptProcessingException],
)
@pytest.mark.parametrize("at", [2, 14])  # while the trajectories are sampled, and in an iteration
def test_an_error_leaves_the_model_as_it_was(new_model, error, at):
    patcher = _as_loaded_by_the_host(new_model("V_PREDICTION"))
    clone = patcher.clone()
    predictions.loaded(patcher)
    before, calls = (_state(patcher), _state(clone)), []

    def fail(*_):
        calls.append(1)
        if len(calls) == at:
            raise error("here")

    layer = patcher.model.diffusion_model.output_blocks[1][0].in_layers
    handle = layer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(error):
            train_unet(patcher, TinyClip(), _plan(preview_every=0, keep_on_cancel=False, schedule=Schedule(20, 1e-3)))
    finally:
        handle.remove()
    after = _state(patcher), _state(clone)
    assert [s[:-1] for s in after] == [s[:-1] for s in before]


def test_a_cancel_gives_what_has_been_learned(new_model):
    patcher, calls = new_model("EPS"), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 30:
            comfy.model_management.interrupt_current_processing()

    handle = patcher.model.diffusion_model.register_forward_pre_hook(fail)
    before = _state(patcher)[:2]
    trained = train_unet(patcher, TinyClip(), _plan(schedule=Schedule(400, 1e-3), preview_every=0))
    handle.remove()
    assert 0 < len(trained.outcome.erase) < 30
    assert "cancelled" in trained.outcome.reason
    assert all(torch.isfinite(t).all() for f in trained.outcome.factors.values() for t in f)
    assert _state(patcher)[0] == before[0]
    comfy.model_management.throw_exception_if_processing_interrupted()


def test_going_on_from_an_edit_starts_where_it_ended(new_model):
    patcher = new_model("EPS")
    first = train_unet(patcher, TinyClip(), _plan(schedule=Schedule(15, 2e-2), preview_every=0)).outcome
    second = train_unet(
        patcher, TinyClip(), _plan(start=first.factors, target_modules="cross", preview_every=0)
    ).outcome
    assert second.erase[0] < 0.9 * first.erase[0]
    assert all(second.factors[k].down.shape[0] == 2 * f.down.shape[0] for k, f in first.factors.items())
    assert len(second.factors) == 2 * len(first.factors)
    back = train_unet(patcher, TinyClip(), _plan(start=second.factors, schedule=Schedule(1), preview_every=0)).outcome
    assert len(back.factors) == len(second.factors)


@pytest.mark.parametrize("kind", ["V_PREDICTION"])
def test_esd_halves_its_loss_in_sixty_steps_and_holds_the_empty_prompt(new_model, kind):
    plan = _plan(schedule=Schedule(60, 1e-2, preserve_weight=1.0), preview_every=0)
    outcome = train_unet(new_model(kind), TinyClip(), plan).outcome
    assert sum(outcome.erase[-10:]) < 0.5 * sum(outcome.erase[:3]) / 3 * 10
    assert sum(outcome.preserve[-10:]) / 10 < 0.2 * sum(outcome.erase[:3]) / 3


def test_all_but_one_holds_the_unconditional_prediction(new_model):
    patcher = new_model("V_PREDICTION")
    settings = MethodSettings(batch=2, preserve_batch=2, eta=0.0, unconditional_weight=100.0)
    plan = _plan(
        method=all_but_one,
        settings=settings,
        schedule=Schedule(30, 5e-3),
        anchor=("", ""),
        preview_every=0,
        replaced=(False, False),
    )
    outcome = train_unet(patcher, TinyClip(), plan).outcome
    assert sum(outcome.erase[-5:]) < 0.6 * sum(outcome.erase[:5])  # the guidance goes to ĝ
    with _region(patcher) as (model, options):
        layers = unet_layers(model, "cross k/v")
        x, sigma, _ = _inputs()
        empty = predictions.prompts_of(TinyClip(), [""])
        plain = predictions.outputs(model, [empty], x * 5, sigma * 5, options)
        with attached(layers, outcome.factors):
            change = (predictions.outputs(model, [empty], x * 5, sigma * 5, options) - plain).square().mean()
    assert float(change.detach()) < 1e-4


def test_the_bank_is_the_hosts_own_trajectory(new_model):
    patcher = new_model("V_PREDICTION")
    prompts = predictions.prompts_of(TinyClip(), ["a", "b"])
    empty = predictions.prompts_of(TinyClip(), [""])
    bank = TrajectorySampler(patcher, empty, (8, 8), 5, 3.0).sample_trajectories(prompts, [0, 1, 0], 7)
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "normal", 5)
    assert bank.x.shape == (3, 5, 4, 8, 8)
    assert torch.equal(bank.sigma, sigmas[:-1])
    assert not bank.x.is_inference()
    levels = bank.x.float().flatten(2).std(-1)  # (trajectories, steps)
    assert torch.allclose(levels[:, 0], (bank.sigma[0] ** 2 + 1).sqrt().expand(3), rtol=0.3)
    drawn = bank.draw(50, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert set(drawn.prompt.tolist()) == {0, 1}
    assert set(drawn.sigma.tolist()) <= set(bank.sigma.tolist())


def test_what_cannot_be_trained_is_refused(new_model, monkeypatch):
    patcher = new_model("EPS")
    patcher.model.model_lowvram = True
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *a, **k: None)
    with pytest.raises(ValueError, match=r"does not fit.*closed-form"):
        train_unet(patcher, TinyClip(), _plan())
    monkeypatch.undo()
    patcher = new_model("EPS")
    patcher.model.diffusion_model.out = torch.compile(patcher.model.diffusion_model.out)
    with pytest.raises(ValueError, match="compiled"):
        train_unet(patcher, TinyClip(), _plan())
    patcher = new_model("EPS")
    patcher.model.diffusion_model.out.fast = type("Linear", (torch.nn.Module,), {"__qualname__": "fp8_ops.Linear"})()
    with pytest.raises(ValueError, match="quantised"):
        train_unet(patcher, TinyClip(), _plan())
    with (
        pytest.raises(ValueError, match="'nowhere'"),
        attached({}, {"nowhere": LowRank(torch.ones(2, 1), torch.ones(1, 2))}),
    ):
        pass


def test_an_infinite_loss_ends_with_the_last_finite_adapter(new_model):
    def spoiled(context, settings):
        terms, calls = esd(context, settings), []

        def spoil(generator):
            calls.append(1)
            made = terms(generator)
            return Losses(made.erase * (float("inf") if len(calls) == 4 else 1), made.preserve)

        return spoil

    patcher = new_model("EPS")
    three = train_unet(patcher, TinyClip(), _plan(schedule=Schedule(3, 5e-3))).outcome
    ended = train_unet(patcher, TinyClip(), _plan(method=spoiled)).outcome
    assert "not finite in iteration 4" in ended.reason
    assert all(torch.equal(f.up, ended.factors[k].up) for k, f in three.factors.items())


def _gradient(patcher, scale):
    """Of a small loss with respect to every ``up``, in one row."""
    with _region(patcher) as (model, options):
        x, sigma, prompts = _inputs()
        layers = unet_layers(model, "cross k/v")
        factors = {k: LowRank(f.up + 0.05, f.down) for k, f in new_factors(shapes_of(layers), 2, 0).items()}
        ups = [f.up.requires_grad_(True) for f in factors.values()]
        with attached(layers, factors):
            out = predictions.outputs(model, prompts, x, sigma, options).float()
        loss = (out - out.detach() * 0.9).square().mean() * 0.01
        return torch.cat([g.flatten() / scale for g in torch.autograd.grad(loss * scale, ups)])


def test_half_precision_gradients_vanish_without_the_loss_scale_and_not_with_it(new_model):
    half, full = (new_model("EPS", dtype, native=True) for dtype in (torch.float16, torch.float32))
    full.model.load_state_dict(half.model.state_dict())
    assert gradients.loss_scale(full.model) == 1.0
    exact = _gradient(full, 1.0)
    assert not _gradient(half, 1.0).any()
    ours = _gradient(half, gradients.loss_scale(half.model))
    assert torch.nn.functional.cosine_similarity(ours, exact, 0) > 0.99
    first, second = (train_unet(p, TinyClip(), _plan(schedule=Schedule(3, 1e-3))).outcome.factors for p in (half, full))
    same = [(torch.sign(first[k].up) == torch.sign(f.up)).float().mean() for k, f in second.items()]
    assert min(same) > 0.7  # of so small steps only the signs count; chance is a half


def test_several_concepts_are_trained_in_turn(new_model):
    """Each has its own states; the third was never seen where the sentences of the first came first."""
    seen = []

    def watched(context, settings):
        seen.append((context.trajectories.concept.prompt % context.prompts.concepts).tolist())
        return esd(context, settings)

    plan = _plan(
        method=watched, anchor=("a", "a", "a") * 2,
        concept=("a cat", "a car", "a cup", "the cat", "the car", "the cup"),
        concepts=3, trajectories=7,
    )  # fmt: skip
    train_unet(new_model("EPS"), TinyClip(), plan)
    assert seen == [[0, 1, 2, 0, 1, 2, 0]]


def test_the_hosts_own_compiling_is_refused(new_model):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patcher = new_model("EPS")
    set_torch_compile_wrapper(patcher, backend="eager")
    with pytest.raises(ValueError, match=r"compiled.*TorchCompileModel"):
        train_unet(patcher, TinyClip(), _plan())


def test_a_clip_of_another_width_is_refused(new_model):
    class Wider(TinyClip):
        def encode_from_tokens_scheduled(self, text):
            return [[torch.zeros(1, 7, 48), {}]]

    with pytest.raises(
        ValueError, match=r"CLIP makes text embeddings of width 48 and this MODEL reads width 32.*same checkpoint"
    ):
        train_unet(new_model("EPS"), Wider(), _plan())


def test_a_model_that_was_partly_unloaded_in_between_is_loaded_whole_again(new_model, monkeypatch):
    patcher, loads = new_model("EPS"), []
    load_models = comfy.model_management.load_models_gpu

    def load(models, *args, **kwargs):
        loads.append(kwargs.get("force_full_load", False))
        load_models(models, *args, **kwargs)

    def partly(context, settings):
        terms = esd(context, settings)

        def unloaded(generator):
            patcher.model.model_lowvram = True  # as the host marks it, when something else has wanted memory
            return terms(generator)

        loads.clear()
        return unloaded

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    trained = train_unet(patcher, TinyClip(), _plan(method=partly, preview_every=0))
    assert loads == [True] * 3  # before every iteration but the first
    assert len(trained.outcome.erase) == 4
    patcher.model.model_lowvram = False


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_esd_learns_in_the_other_parameterisations(new_model, kind):
    plan = _plan(schedule=Schedule(60, 1e-2, preserve_weight=1.0), preview_every=0)
    outcome = train_unet(new_model(kind), TinyClip(), plan).outcome
    assert sum(outcome.erase[-10:]) < 0.5 * sum(outcome.erase[:3]) / 3 * 10


@pytest.fixture
def judged(monkeypatch):
    """What DoCo's discriminator is shown, and the states it is made of: (clean latents, noise levels), (x_t, noise
    levels)."""
    shown, states = [], []

    class Watched(Discriminator):
        def forward(self, clean, sigma):
            shown.append((clean.detach().clone(), sigma.clone()))
            return super().forward(clean, sigma)

    def watched(sampling, x, sigma, output, *, clean_of=predictions.clean_of):
        states.append((x.clone(), sigma.clone()))
        return clean_of(sampling, x, sigma, output)

    monkeypatch.setattr(importlib.import_module(doco.__module__), "Discriminator", Watched)
    monkeypatch.setattr(predictions, "clean_of", watched)
    return shown, states


def _docos(**changes):
    schedule = Schedule(ALONE + 5, 5e-3, surgery=True)
    return _plan(
        **{"method": doco, "anchor_states": True, "schedule": schedule, "preview_every": 0, "steps": 8} | changes
    )


def test_docos_discriminator_cannot_tell_its_classes_by_their_noise(new_model, judged):
    """Both classes and what is to pass for the anchor are of the same states, in every iteration."""
    patcher, (shown, states) = new_model("EPS"), judged
    outcome = train_unet(patcher, TinyClip(), _docos()).outcome
    assert len(shown) == 3 * len(outcome.erase) == 3 * (ALONE + 5)
    assert len(states) == 2 * len(outcome.erase)
    timestep = patcher.get_model_object("model_sampling").timestep
    seen = set()
    for n in range(len(outcome.erase)):
        (anchor, level), *others = shown[3 * n : 3 * n + 3]
        assert all(torch.equal(level, sigma) for _, sigma in others)
        assert all(torch.equal(a, b) for a, b in zip(*states[2 * n : 2 * n + 2], strict=True))
        assert torch.equal(states[2 * n][1], level)
        assert torch.equal(others[0][0], others[1][0])
        assert not torch.equal(anchor, others[0][0])
        seen |= set(timestep(level).tolist())
    assert len(seen) > 3
    assert max(seen) < 674  # of 1000


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_its_own_anchor_gives_docos_discriminator_nothing_to_tell(new_model, judged, kind):
    sentences, (shown, _) = ("a cat", "the cat"), judged
    schedule = Schedule(4, 0.0, surgery=True)  # the student stays the teacher
    train_unet(new_model(kind), TinyClip(), _docos(concept=sentences, anchor=sentences, schedule=schedule))
    assert len(shown) == 12
    for n in range(4):
        (anchor, _), (concept, _), _ = shown[3 * n : 3 * n + 3]
        assert torch.allclose(anchor, concept, atol=1e-3 * float(anchor.abs().max()))
    anchors = torch.cat([anchor for anchor, _ in shown[::3]])
    assert (anchors - anchors[:1]).abs().amax((1, 2, 3)).max() > 0.1 * anchors.abs().max()  # not always the same one


def test_docos_steps_never_go_against_what_must_be_kept(new_model, monkeypatch):
    """In a real training: what AdamW gets is the exact projection of the erase gradient, layer by layer."""
    taken, asked, weight = [], [], 0.25

    def watched(factors, terms_of, *rest, train=training.train, **named):
        tensors = [t for f in factors.values() for t in f]

        def terms(generator):
            made = terms_of(generator)
            taken.append([
                torch.autograd.grad(loss, tensors, retain_graph=True) if loss.requires_grad else None for loss in made
            ])  # fmt: skip
            return made

        return train(factors, terms, *rest, **named)

    def step(optimiser, *_):
        if type(optimiser) is torch.optim.AdamW:
            asked.append([p.grad.clone() for group in optimiser.param_groups for p in group["params"]])

    monkeypatch.setattr(training, "train", watched)
    schedule = Schedule(ALONE + 6, 2e-2, preserve_weight=weight, surgery=True, clip=1e9)
    handle = register_optimizer_step_pre_hook(step)
    try:
        train_unet(new_model("V_PREDICTION"), TinyClip(), _docos(schedule=schedule))
    finally:
        handle.remove()
    assert len(asked) == len(taken) == ALONE + 6
    conflicts = []
    for (erase, preserve), stepped in zip(taken[ALONE:], asked[ALONE:], strict=True):
        for a, b, g in zip(erase, preserve, stepped, strict=True):
            a, b, g = a.double(), b.double(), g.double()
            wanted = g - weight * b
            scale = float(a.norm() * b.norm())
            product = float((a * b).sum())
            if b.norm() < 1e-15:  # its square is none in float32
                continue
            assert float((wanted * b).sum()) >= -1e-5 * scale
            conflicts.append(product < -1e-3 * scale)
            along = product / float(b.square().sum()) if product < 0 else 0.0
            assert (wanted - (a - along * b)).norm() <= 1e-5 * (a.norm() + weight * b.norm())
    assert 0 < sum(conflicts) < len(conflicts)
