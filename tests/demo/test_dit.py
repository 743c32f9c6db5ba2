"""The second demo model, with random weights: how it is trained, and how the host loads and samples it."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import comfy.ldm.lumina.model
import comfy.model_management
import comfy.sample
import comfy.sd
import nodes as host_nodes
import pytest
import torch
from comfyui_concepts.boards import demo_models, score_model
from comfyui_concepts.demo import architecture, sampling
from comfyui_concepts.demo.autoencoder import Autoencoder
from comfyui_concepts.demo.files import FOLDER
from comfyui_concepts.demo.loader import load_demo_model
from comfyui_concepts.demo.training import adapters, checkpoint, export, train_dit
from comfyui_concepts.demo.training.dit_loss import velocity_loss, velocity_of
from comfyui_concepts.demo.training.muon import Muon, orthogonal
from comfyui_concepts.demo.training.networks import Tokenizer, build_dit, bundled_dit, bundled_networks

SMALL = architecture.DIT | {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2}


@pytest.fixture
def gradients():
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def text():
    return bundled_networks()[1].requires_grad_(False).train(False)


def _open_gates(dit: torch.nn.Module) -> torch.nn.Module:
    """A fresh network predicts zero; this one answers to all that goes in."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in dit.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return dit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights as they are exported, of a network that has learned nothing."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("text", "dit-decoder"):
        (folder / f"{name}.safetensors").symlink_to(FOLDER / f"{name}.safetensors")
    torch.manual_seed(0)
    state = train_dit.State(_open_gates(build_dit()))
    training = checkpoint.CountedTraining(folder / train_dit.CHECKPOINT, 1)
    training.keep(state.tensors())
    export.main(["--out", str(folder), "--to", str(folder)])
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_demo_model(folder, "dit")


def test_a_step_of_a_matrix_has_equal_singular_values():
    matrices = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices, 5))
    assert values.min() > 0.6  # the iteration swings around 1, between 0.68 and 1.13
    assert values.max() < 1.2


def _moved_by_one_of_two(process: int, folder: Path, matrices: torch.Tensor) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=process, world_size=2)
    torch.save(_moved(matrices), folder / str(process))


def _moved(matrices: torch.Tensor) -> torch.Tensor:
    parameters = [torch.nn.Parameter(matrix.clone()) for matrix in matrices]
    for parameter in parameters:
        parameter.grad = parameter.detach() ** 2
    Muon(parameters, 0.1).step()
    return torch.stack([parameter.detach() for parameter in parameters])


@pytest.mark.parametrize("count", [4, 3])  # three cannot be shared by two
def test_processes_that_share_the_work_move_matrices_as_one_does(tmp_path, count):
    matrices = torch.randn(count, 6, 10, generator=torch.Generator().manual_seed(0))
    torch.multiprocessing.start_processes(_moved_by_one_of_two, (tmp_path, matrices), nprocs=2, start_method="fork")
    for process in range(2):
        torch.testing.assert_close(torch.load(tmp_path / str(process)), _moved(matrices))


def test_every_matrix_of_a_block_moves_by_muon_and_nothing_twice():
    dit = build_dit(SMALL)
    muon, adam = train_dit.optimisers_of(dit)
    assert isinstance(muon, Muon)
    names = {id(parameter): name for name, parameter in dit.named_parameters()}
    moved = [names[id(p)] for optimiser in (muon, adam) for p in optimiser.param_groups[0]["params"]]
    assert sorted(moved) == sorted(names.values())
    inner = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert {"layers.0.attention.qkv.weight", "context_refiner.0.feed_forward.w2.weight"} <= inner
    assert not any("adaLN" in name or "embedder" in name or "norm" in name for name in inner)


def test_a_fresh_transformer_predicts_zero():
    x, rows = torch.randn(2, 4, 16, 16), torch.randn(2, 32, 128)
    out = velocity_of(build_dit(SMALL), x, torch.tensor([0.3, 0.9]), rows)
    assert out.shape == (2, 4, 16, 16)
    assert not out.any()


@pytest.fixture(scope="module")
def batch():
    ids, at = Tokenizer()("a cat", ("cat",))
    return torch.full((2, 3, 128, 128), 0.4), torch.tensor([ids] * 2), torch.tensor([at] * 2), torch.ones(2, 1, 16, 16)


class Killed(BaseException):
    """What a kill does to a training: it ends in the middle, and nothing tidies up."""


@pytest.fixture
def trained(tmp_path, monkeypatch, gradients, text, batch):
    """Trains for four steps in all: call it with a file's name, and with the step at which the training is killed."""
    monkeypatch.setattr(train_dit, "Tokenizer", lambda: None)
    monkeypatch.setattr(train_dit, "Batches", lambda *_: SimpleNamespace(next=lambda _size: batch))
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0.0)

    def run(name: str, killed_at: int | None = None) -> dict[str, torch.Tensor]:
        training = checkpoint.CountedTraining(tmp_path / name, 4)
        count = training.step

        def counted() -> bool:
            if training.steps == killed_at:
                raise Killed
            return count()

        monkeypatch.setattr(training, "step", counted)
        torch.manual_seed(0)
        state = train_dit.State(build_dit(SMALL))
        if training.tensors:
            state.load(training.tensors)
        train_dit.fit(state, text, training, train_dit.FitOptions())
        return checkpoint.read(tmp_path / name)[0]

    return run


def test_a_training_that_was_killed_ends_as_one_that_was_not(trained):
    whole = trained("whole")
    with pytest.raises(Killed):
        trained("killed", 2)
    again = trained("killed")
    assert whole.keys() == again.keys()
    assert sum(name.startswith(train_dit.MOMENT) for name in whole) > len(list(build_dit(SMALL).parameters()))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_a_few_steps_lower_the_loss(gradients, text, batch):
    torch.manual_seed(0)
    state, losses = train_dit.State(build_dit(SMALL)), []
    for step in range(20):
        generator = torch.Generator().manual_seed(1)
        loss = velocity_loss(state.dit, text, Autoencoder("dit").encode, batch, generator)
        state.step(loss, 1.0, step)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_it_is_a_real_member_of_the_hosts_family(loaded):
    model, clip, vae = loaded
    assert isinstance(model.model.diffusion_model, comfy.ldm.lumina.model.NextDiT)
    assert isinstance(clip, comfy.sd.CLIP)
    assert isinstance(vae, comfy.sd.VAE)
    assert model.get_model_object("model_sampling").sigma_max == 1


def _encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def test_it_reads_the_first_rows_of_the_same_text(loaded, demo_model):
    caption = "a sketch of on the left a butterfly and on the right a strawberry, purple background"
    long, short = (_encode(parts[1], caption)[0][0] for parts in (demo_model, loaded))
    assert short.shape == (1, architecture.TEXT_ROWS, 128)
    torch.testing.assert_close(short, long[:, : architecture.TEXT_ROWS], rtol=1e-5, atol=1e-5)
    assert _encode(loaded[1], "a cat and " * 20)[0][0].shape[1] % architecture.TEXT_ROWS == 0


def test_the_host_predicts_what_the_trainer_does(loaded, folder):
    model, clip, _ = loaded
    trained = bundled_dit(folder)
    x, t, rows = torch.randn(2, 4, 32, 32), torch.tensor([0.25, 0.9]), _encode(clip, "a cat")[0][0]
    with torch.no_grad():
        velocity = velocity_of(trained, x, t, rows.expand(2, -1, -1))
        theirs = model.model.apply_model(x, t, c_crossattn=rows.expand(2, -1, -1), num_tokens=rows.shape[1])
    assert velocity.std() > 0.1
    torch.testing.assert_close(theirs, x - t.view(-1, 1, 1, 1) * velocity, rtol=1e-4, atol=1e-4)


def _sampled(model, clip, steps=1, size=(32, 32)):
    latent = {"samples": torch.zeros(2, 4, *size)}
    prompts = _encode(clip, "a cat"), _encode(clip, "")
    return host_nodes.common_ksampler(model, 1, steps, 3.0, "euler", "simple", *prompts, latent)[0]["samples"]


def test_an_empty_latent_of_wider_cells_is_enlarged_by_newer_hosts_and_refused_in_words_on_older_ones(loaded):
    wider = {"samples": torch.zeros(1, 4, 16, 16), "downscale_ratio_spacial": 8}  # as a newer Empty Latent Image says
    prompts = _encode(loaded[1], "a cat"), _encode(loaded[1], "")

    def sampled():
        return host_nodes.common_ksampler(loaded[0], 1, 1, 3.0, "euler", "simple", *prompts, wider)[0]["samples"]

    if "downscale_ratio_spacial" in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters:
        assert sampled().shape == (1, 4, 32, 32)
    else:
        with pytest.raises(ValueError, match="64 × 64; set width and height in Empty Latent Image to 128, or to 256"):
            sampled()


def test_the_hosts_sampler_draws_with_it(loaded):
    picture = loaded[2].decode(_sampled(loaded[0], loaded[1], steps=2, size=(32, 48)))
    assert picture.shape == (2, 128, 192, 3)
    assert picture.isfinite().all()


def test_a_lora_of_split_layers_changes_it_and_one_of_a_large_model_is_refused(loaded):
    """Trainers write q, k and v apart; the host adds each to its third of the fused weight."""
    model, clip, _ = loaded

    def with_lora(rows: int):
        name = "diffusion_model.layers.0.attention.to_k"
        factors = {f"{name}.lora_A.weight": torch.ones(4, 192), f"{name}.lora_B.weight": torch.ones(rows, 4)}
        return comfy.sd.load_lora_for_models(model, clip, factors, 1.0, 0.0)[0]

    plain = _sampled(model, clip)
    assert not torch.equal(_sampled(with_lora(192), clip), plain)
    with pytest.raises(ValueError, match="it changes 3840 × 192 values of .*which has 192 × 192"):
        _sampled(with_lora(3840), clip)


def test_split_rows_are_the_fused_layer():
    fused = torch.nn.Linear(6, 12, bias=False)
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(adapters.SplitRows(fused)(x), fused(x))


def test_a_lora_in_the_names_of_trainers_does_in_the_host_what_it_does_in_training(
    loaded, folder, gradients, batch, monkeypatch, caplog
):
    dit = bundled_dit(folder)
    monkeypatch.setattr(adapters, "bundled_dit", lambda: dit)
    torch.manual_seed(0)
    adapted = adapters.adapted_dit(rank=2)
    with torch.no_grad():
        for parameter in adapted.adapters.values():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    loss = adapted.loss(batch, torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(
        loss, [p for n, p in adapted.adapters.items() if "layers.5.attention.qkv.to_v.lora_B" in n]
    )
    assert gradient.any()
    file = adapted.file()
    assert {
        "diffusion_model.layers.0.attention.to_q.lora_A.weight",
        "diffusion_model.layers.0.attention.to_out.0.lora_B.weight",
    } <= file.keys()
    model, clip, _ = loaded
    patched = comfy.sd.load_lora_for_models(model, clip, file, 1.0, 0.0)[0]
    assert not [record for record in caplog.records if "not loaded" in record.message]
    x, t, rows = torch.randn(1, 4, 32, 32), torch.tensor([0.5]), _encode(clip, "a cat")[0][0].clone()

    def predicted(by):
        comfy.model_management.load_models_gpu([by])
        return by.model.apply_model(x, t, c_crossattn=rows, num_tokens=rows.shape[1])

    with torch.no_grad():
        theirs, plain = predicted(patched), predicted(model)
        ours = x - 0.5 * velocity_of(dit, x, t, rows)
    assert (theirs - plain).std() > 0.05
    torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-2)  # the file is in half precision


def test_its_latents_keep_what_those_of_the_unet_lose_and_follow_turns_as_a_picture_does(loaded, monkeypatch):
    vaes, psnr = {"unet": load_demo_model()[2], "dit": loaded[2]}, {}
    monkeypatch.setattr(score_model, "sampler_with", lambda _lora, kind: SimpleNamespace(vae=vaes[kind]))
    for kind in vaes:
        score_model.score_decoder(kind, metrics := {})
        psnr[kind] = metrics["psnr_db"]
    assert psnr["dit"] > psnr["unet"] + 3
    vae, (pictures, _scenes) = vaes["dit"], score_model.held_out()
    latent = vae.encode(pictures[:16])
    upright = vae.decode(latent)
    for of_latent, of_pictures in (
        (latent.rot90(1, (-2, -1)), upright.rot90(1, (1, 2))),
        (latent.rot90(2, (-2, -1)), upright.rot90(2, (1, 2))),
        (latent.flip(-1), upright.flip(2)),
    ):
        error = (vae.decode(of_latent) - of_pictures).square().mean()
        assert -10 * torch.log10(error) > psnr["dit"]  # nearer than the decoder is to the truth


def test_the_board_of_a_model_takes_it(loaded, monkeypatch):
    kinds: list[str] = []
    monkeypatch.setattr(sampling, "load_demo_model", lambda kind: kinds.append(kind) or loaded)
    demo_models.sampler_with.cache_clear()
    (row, _) = score_model.object_rows([1], 1, [], "dit")
    metrics, pictures = row.run_job(row.jobs[0])
    demo_models.sampler_with.cache_clear()
    assert kinds == ["dit"]
    assert pictures.shape == (1, 128, 128, 3)
    assert metrics.figures()["n"] == 1
