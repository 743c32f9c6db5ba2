"""Pixel sync: with a VAE that loses nothing it is the plain guider's picture; with one view it changes nothing."""

from __future__ import annotations

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.pixel_sync import PixelSyncGuider
from comfyui_concepts.host.anagram.views import ViewPrompt
from comfyui_concepts.host.engine.time_travel import travelling_sampler
from comfyui_concepts.host.engine.vae import decoded_pictures, encoded_latents
from comfyui_concepts.methods.anagram.blend import blend
from comfyui_concepts.methods.anagram.views import view_named


class Lossless:
    """A VAE that is exact: pictures of four channels, one pixel a cell. (The demo model has a real one.)"""

    def __init__(self, loss=0.0):
        self.loss, self.calls = loss, []

    def spacial_compression_encode(self):
        return 1

    def decode(self, z):
        self.calls.append("decode")
        return (z.movedim(1, -1) + 1) / 2

    def encode(self, picture):
        self.calls.append("encode")
        return (picture * 2 - 1).movedim(-1, 1) * (1 - self.loss)


class Crowding(Lossless):
    """A VAE that needs all memory for itself, as the host's may on a small GPU."""

    def decode(self, z):
        comfy.model_management.free_memory(1e30, torch.device("cpu"))
        return super().decode(z)

    def encode(self, picture):
        comfy.model_management.free_memory(1e30, torch.device("cpu"))
        return super().encode(picture)


def _cond(seed):
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), {}]]


def _prompts(*views):
    return [ViewPrompt(view_named(v), _cond(i), _cond(99)) for i, v in enumerate(views)]


def _sample(guider, steps=4, batch=1, **known):
    noise = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    latent = known.pop("latent", torch.zeros_like(noise))
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", steps)
    return guider.sample(
        noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=3, **known
    )


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
def test_one_view_is_plain_sampling_bit_for_bit_whatever_the_vae(tiny_models, kind):
    plain = comfy.samplers.CFGGuider(tiny_models[kind])
    plain.set_conds(_cond(0), _cond(99))
    plain.set_cfg(5.0)
    vae = Lossless(loss=0.5)
    ours = PixelSyncGuider(tiny_models[kind], _prompts("identity"), 5.0, vae, blend)
    assert torch.equal(_sample(ours), _sample(plain))
    assert vae.calls == []


def test_other_packs_are_told_0_for_positives_and_1_for_negatives_though_all_views_are_evaluated_at_once(tiny_models):
    """The host numbers the six conditionings of three views from 0 to 5."""
    told, model, negative = [], tiny_models["EPS"].clone(), _cond(99)[0][0]

    def patch(q, context, value, extra):
        sides = extra["cond_or_uncond"]
        rows = context.chunk(len(sides))
        told.append((sides, [int(torch.equal(row[..., :7, :], negative.expand_as(row[..., :7, :]))) for row in rows]))
        return q, context, value

    model.set_model_attn2_patch(patch)
    guider = PixelSyncGuider(model, _prompts("identity", "negate", "skew"), 5.0, Lossless(), lambda p: p.mean(0))
    _sample(guider, steps=2)
    assert max(len(sides) for sides, _ in told) == 6
    assert all(sides == wanted for sides, wanted in told)


def test_the_views_become_views_of_one_picture(tiny_models):
    model, finals = tiny_models["EPS"], []
    guider = PixelSyncGuider(model, _prompts("identity", "negate", "skew"), 5.0, Lossless(), lambda p: p.mean(0))
    _sample(guider, batch=2, callback=lambda step, x0, x, total: finals.append(x0))
    first, negative, skewed = finals[-1].chunk(3)
    torch.testing.assert_close(view_named("negate").inverse(negative), first)
    torch.testing.assert_close(view_named("skew").inverse(skewed), first)


def test_equal_noise_and_a_lossless_vae_give_what_the_plain_guider_gives(tiny_models, monkeypatch):
    """With noise that is a view of the first view's, the state of each view is the view of one state."""
    views = ["identity", "rotate_180"]
    model = tiny_models["EPS"]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ours, plainly = _prompts(*views), _prompts(*views)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: view_named("rotate_180").forward(noise))
    ours = PixelSyncGuider(model, ours, 5.0, Lossless(), lambda p: p.mean(0))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
    sampler = comfy.samplers.sampler_object("euler")
    synced = ours.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=3)

    def mean(p):
        return torch.stack(p.positive).mean(0), torch.stack(p.negative).mean(0)

    plain = ViewsGuider(model, plainly, mean, 5.0)
    wanted = plain.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=3)
    torch.testing.assert_close(synced, wanted, rtol=1e-4, atol=1e-4)


def test_each_step_decodes_once_and_encodes_twice_a_view(tiny_models):
    for every, steps in ((1, 4), (2, 2)):
        vae = Lossless(loss=0.1)
        _sample(PixelSyncGuider(tiny_models["EPS"], _prompts("identity", "flip", "negate"), 5.0, vae, blend, every))
        assert vae.calls.count("decode") == 3 * steps
        assert vae.calls.count("encode") == 6 * steps


def test_a_resampled_disc_has_its_place_here_and_nowhere_else(tiny_models):
    vae = Lossless()
    ours = PixelSyncGuider(tiny_models["EPS"], _prompts("identity", "disc"), 5.0, vae, blend)
    assert torch.isfinite(_sample(ours)).all()
    plain = ViewsGuider(tiny_models["EPS"], _prompts("identity", "disc"), lambda p: None, 5.0)
    with pytest.raises(ValueError, match="Anagram Pixel Guider"):
        _sample(plain)


def test_what_has_no_place_here_is_refused(tiny_models):
    model, vae = tiny_models["EPS"], Lossless()
    with pytest.raises(ValueError, match="'identity' first"):
        PixelSyncGuider(model, _prompts("negate", "identity"), 5.0, vae, blend)
    with pytest.raises(ValueError, match="component"):
        PixelSyncGuider(model, _prompts("identity", "low_pass"), 5.0, vae, blend)
    guider = PixelSyncGuider(model, _prompts("identity", "negate"), 5.0, vae, blend)
    with pytest.raises(ValueError, match="starts every view from noise"):
        _sample(guider, latent=torch.ones(1, 4, 8, 8))
    with pytest.raises(ValueError, match="starts every view from noise"):
        _sample(guider, denoise_mask=torch.ones(1, 1, 8, 8))


def test_the_negative_on_a_real_latent_model(demo_model):
    model, clip, vae = demo_model
    encode = lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))  # noqa: E731
    prompts = [
        ViewPrompt(view_named("identity"), encode("a panda"), encode("")),
        ViewPrompt(view_named("negate"), encode("a penguin"), encode("")),
    ]
    guider = PixelSyncGuider(model, prompts, 5.0, vae, blend)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 8)
    finals = []
    guider.sample(
        noise,
        torch.zeros_like(noise),
        comfy.samplers.sampler_object("euler"),
        sigmas,
        disable_pbar=True,
        seed=3,
        callback=lambda step, x0, x, total: finals.append(x0),
    )
    first, second = (vae.decode(model.model.process_latent_out(z)) for z in finals[-1].chunk(2))
    apart = (first - second).abs().mean()
    together = (first - (1 - second)).abs().mean()
    assert together < 0.25 * apart


def test_no_view_starts_from_the_noise_that_time_travel_adds(tiny_models, monkeypatch):
    drawn, randn = [], torch.randn

    def noting(*args, **known):
        drawn.append(randn(*args, **known))
        return drawn[-1]

    guider = PixelSyncGuider(tiny_models["EPS"], _prompts("identity", "negate"), 5.0, Lossless(), blend)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", 6)
    travel = travelling_sampler(comfy.samplers.sampler_object("euler"), 0.2, 0.8, 2)
    monkeypatch.setattr(torch, "randn", noting)
    first = guider.sample(noise, torch.zeros_like(noise), travel, sigmas, disable_pbar=True, seed=3)
    assert [len(noise) for noise in drawn[:2]] == [1, 2]  # the second view's, then both views' on the first way back
    everyone = torch.nn.functional.normalize(torch.cat([noise, *drawn]).flatten(1), dim=1)
    alike = everyone @ everyone.T
    assert (alike - torch.eye(len(alike))).abs().max() < 0.5
    again = guider.sample(noise, torch.zeros_like(noise), travel, sigmas, disable_pbar=True, seed=3)
    assert torch.equal(again, first)  # the same seed, the same picture


def _patched(model, by=0.05):
    """A clone with a patch, as a LoRA makes it."""
    key = "diffusion_model.out.2.weight"
    clone = model.clone()
    clone.add_patches({key: ("diff", (torch.full_like(model.model.state_dict()[key], by),))}, 1.0)
    return clone


def test_a_vae_that_takes_all_memory_leaves_the_models_patches_where_they_were(new_model):
    model = new_model("EPS")
    patched = _patched(model)
    wanted = _sample(PixelSyncGuider(patched, _prompts("identity", "negate"), 5.0, Lossless(), blend))
    crowded = _sample(PixelSyncGuider(patched, _prompts("identity", "negate"), 5.0, Crowding(), blend))
    assert torch.equal(crowded, wanted)
    unpatched = _sample(PixelSyncGuider(model, _prompts("identity", "negate"), 5.0, Lossless(), blend))
    assert not torch.allclose(unpatched, wanted)


def test_the_vae_is_loaded_together_with_the_model(demo_model):
    model, _, vae = demo_model
    guider = PixelSyncGuider(model, _prompts("identity", "negate"), 5.0, vae, blend)
    assert guider.model_patcher.get_nested_additional_models() == [vae.patcher]
    assert model.get_nested_additional_models() == []


def _counted(model):
    """A clone, and the rows of each call of its network."""
    rows, clone = [], model.clone()

    def wrapper(executor, x, *args, **known):
        rows.append(len(x))
        return executor(x, *args, **known)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "counting", wrapper)
    return clone, rows


@pytest.mark.parametrize(("cfg", "each"), [(5.0, 2), (1.0, 1)])
@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
def test_all_views_are_asked_in_one_call_and_answer_as_alone(tiny_models, kind, cfg, each):
    views = ("identity", "negate", "skew")
    model, rows = _counted(tiny_models[kind])
    together = _sample(PixelSyncGuider(model, _prompts(*views), cfg, Lossless(), blend), batch=2)
    assert rows == [3 * each * 2] * 4
    rows.clear()
    model.set_model_unet_function_wrapper(lambda apply, known: apply(known["input"], known["timestep"], **known["c"]))
    alone = _sample(PixelSyncGuider(model, _prompts(*views), cfg, Lossless(), blend), batch=2)
    assert rows == [each * 2] * 12
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_a_prompt_for_a_part_of_the_canvas_stays_in_its_view(tiny_models):
    model, rows = _counted(tiny_models["EPS"])
    prompts = _prompts("identity", "negate")
    prompts[1].positive[0][1].update(area=(4, 8, 0, 0), strength=1.0)
    out = _sample(PixelSyncGuider(model, prompts, 5.0, Lossless(), blend), steps=2)
    assert torch.isfinite(out).all()
    assert max(rows) <= 2  # a view at a time


def test_patches_after_guidance_meet_each_view_with_its_own_latent(tiny_models):
    seen, finals = [], []
    model = tiny_models["EPS"].clone()
    model.set_model_sampler_post_cfg_function(lambda args: seen.append(args["input"].clone()) or args["denoised"])
    guider = PixelSyncGuider(model, _prompts("identity", "negate"), 5.0, Lossless(), blend)
    _sample(guider, steps=1, callback=lambda step, x0, x, total: finals.append(x))
    assert torch.equal(torch.cat(seen), finals[0])


def test_what_the_vae_loses_is_given_back(tiny_models, monkeypatch):
    """Two views that are one and the same, noise and prompt and all, are plain sampling, however much the VAE loses."""
    model = tiny_models["EPS"]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = comfy.samplers.CFGGuider(model)
    plain.set_conds(_cond(0), _cond(99))
    plain.set_cfg(5.0)
    wanted = _sample(plain)
    twice = [ViewPrompt(view_named("identity"), _cond(0), _cond(99)) for _ in range(2)]
    monkeypatch.setattr(torch, "randn", lambda *a, **k: noise)
    vae = Lossless(loss=0.4)
    ours = PixelSyncGuider(model, twice, 5.0, vae, blend)
    torch.testing.assert_close(_sample(ours), wanted, rtol=1e-4, atol=1e-4)
    assert vae.calls


@pytest.mark.parametrize("travels", [1, 2])
def test_a_sampler_that_goes_on_with_one_negative_is_refused(tiny_models, travels):
    guider = PixelSyncGuider(tiny_models["EPS"], _prompts("identity", "flip"), 5.0, Lossless(), blend)
    sampler = travelling_sampler(comfy.samplers.sampler_object("euler_cfg_pp"), 0.2, 0.8, travels)
    noise = torch.randn(1, 4, 8, 8)
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", 4)
    with pytest.raises(ValueError, match=r"cfg\+\+ .*every view has its own; use euler"):
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)


class Film(Lossless):
    """A VAE with a time axis, as Qwen-Image's and Wan's: what it encodes in one batch it takes for the frames of one
    film."""

    def encode(self, picture):
        return super().encode(picture).movedim(1, 0)[None]


def test_a_vae_with_a_time_axis_gives_and_takes_pictures():
    latent = torch.rand(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    pictures = decoded_pictures(Film(), latent)
    assert pictures.shape == (3, 8, 8, 4)
    torch.testing.assert_close(encoded_latents(Film(), pictures, latent), latent)
    assert decoded_pictures(Film(), latent.expand(-1, -1, 5, -1, -1)).shape == (15, 8, 8, 4)
    flat = latent[:, :, 0]
    torch.testing.assert_close(encoded_latents(Lossless(), decoded_pictures(Lossless(), flat), flat), flat)


def test_films_are_refused(tiny_models):
    guider = PixelSyncGuider(tiny_models["EPS"], _prompts("identity", "flip"), 5.0, Film(), blend)
    with pytest.raises(ValueError, match="not films; set the latent's length to 1"):
        guider.sample(torch.zeros(1, 4, 5, 8, 8), torch.zeros(1, 4, 5, 8, 8), None, None)
