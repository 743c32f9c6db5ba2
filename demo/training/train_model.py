"""Trains the UNet and the text encoder together on scenes made on the fly.

Two one-thread processes share the weights without locks (Hogwild, Recht et al. 2011): on two cores that is about
twice as fast as one process with two threads. The loss is the v-prediction error plus a small term that asks the
cross-attention of each noun to stay on its object (TokenCompose, Wang et al. 2312.03626, eq. 4), which is what
teaches "left" and "right" early.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F

from .. import architecture, vocabulary
from ..autoencoder import Autoencoder
from . import checkpoint, scenes
from .networks import Tokenizer, build_text, build_unet, bundled_networks

log = logging.getLogger(__name__)

RAW, EMA = "model-raw.safetensors", "model-ema.safetensors"
LOG_EVERY, SAVE_EVERY = 30, 180  # seconds
BATCH = 24
PEAK_RATE = 1e-3
EMA_EVERY, EMA_DECAY = 4, 0.98
CAPTION_DROPPED, BACKGROUND_NAMED, FILLER = 0.10, 0.8, 0.12
TOKEN_LOSS = 0.02
SceneSource = Callable[[Random, int], vocabulary.Scene]
"""(random numbers, how many objects) → a scene."""
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Pictures, token ids, noun positions, masks, as ``Batches.next`` returns them."""
OBJECTS = ((1, 0.50), (2, 0.42), (3, 0.08))


def alphas_and_sigmas() -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise levels of the 1000 training steps, variance preserving: a² + s² = 1."""
    schedule = architecture.SCHEDULE
    roots = torch.linspace(schedule["linear_start"] ** 0.5, schedule["linear_end"] ** 0.5, schedule["timesteps"])
    signal = torch.cumprod(1 - roots.double() ** 2, 0)
    return signal.sqrt().float(), (1 - signal).sqrt().float()


def used_tokens(tokenizer: Tokenizer) -> list[int]:
    """The token ids of every word a caption can hold."""
    ids = {Tokenizer.START, Tokenizer.END}
    for concept in vocabulary.CONCEPTS:
        for style in vocabulary.STYLES:
            for background in vocabulary.BACKGROUNDS:
                for places in ((None,), ("left",), ("middle",), ("right",)):
                    ids.update(tokenizer(vocabulary.Scene((concept,), places, background, style).caption())[0])
    ids.update(tokenizer("an and a")[0])
    return sorted(ids)


class AttentionMaps:
    """The attention of one forward pass, differentiable, with the cross-attention maps of each noun kept."""

    def __init__(self, nouns: torch.Tensor) -> None:
        self.nouns = nouns  # (batch, objects): token position of each object's noun
        self.maps: list[torch.Tensor] = []  # each (batch, objects, pixels), a distribution over pixels

    def __call__(
        self, _original: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **_: object
    ) -> torch.Tensor:
        b, pixels, _width = q.shape
        q, k, v = (t.view(b, t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)  # (batch, heads, pixels, keys)
        if k.shape[2] == Tokenizer.LENGTH and pixels >= 64:
            columns = self.nouns[:, None, None].expand(-1, heads, pixels, -1)
            noun = weights.gather(3, columns).float().mean(1).transpose(1, 2)
            self.maps.append(noun / noun.sum(-1, keepdim=True).clamp(min=1e-8))
        return (weights @ v).transpose(1, 2).reshape(b, pixels, -1)

    def loss(self, masks: torch.Tensor) -> torch.Tensor:
        """Mean of (1 − mass inside the object's mask)²; ``masks`` is (batch, objects, h, w) at latent size."""
        total = masks.new_zeros(())
        for noun in self.maps:
            factor = round((masks.shape[-2] * masks.shape[-1] / noun.shape[-1]) ** 0.5)
            inside = F.max_pool2d(masks, factor).flatten(2)
            total = total + ((1 - (noun * inside).sum(-1)) ** 2).mean()
        return total / max(len(self.maps), 1)


def _masks(drawn: scenes.Drawn, objects: int, whole: bool) -> np.ndarray:
    """The cells of each object's box, (objects, h/8, w/8); ``whole``: all cells of every object."""
    masks = np.ones((objects, scenes.HEIGHT // 8, drawn.picture.shape[1] // 8), np.float32)
    for i, (x0, y0, x1, y1) in enumerate(() if whole else drawn.boxes):
        masks[i] = 0
        masks[i, y0 // 8 : -(-y1 // 8), x0 // 8 : -(-x1 // 8)] = 1
    return masks


class Batches:
    """An endless stream of training batches."""

    def __init__(
        self,
        seed: int,
        tokenizer: Tokenizer,
        objects: Sequence[tuple[int, float]] = OBJECTS,
        draw_scene: SceneSource = scenes.random_scene,
    ) -> None:
        self.rng, self.tokenizer, self.objects, self.draw_scene = Random(seed), tokenizer, objects, draw_scene

    def _caption(self, scene: vocabulary.Scene) -> str:
        if self.rng.random() < CAPTION_DROPPED:
            return ""
        caption = scene.caption(name_background=self.rng.random() < BACKGROUND_NAMED)
        if self.rng.random() < FILLER:
            words = tuple(self.rng.choice(self.tokenizer.words) for _ in range(3))
            caption = vocabulary.random_caption_words(self.rng, caption, words)
        return caption

    def next(self, size: int) -> Batch:
        """A batch.

        Returns:
            Pictures (b, 3, h, w) in [-1, 1], token ids (b, 77), noun positions (b, objects), and masks
            (b, objects, h/8, w/8).
        """
        counts, _weights = zip(*self.objects, strict=True)
        wide = 3 in counts and self.rng.random() < dict(self.objects)[3]
        square = [(c, w) for c, w in self.objects if c != 3]
        pictures, tokens, nouns, masks = [], [], [], []
        objects = 3 if wide else max(c for c, _ in square)
        for _ in range(size if not wide else size * 2 // 3):
            count = 3 if wide else self.rng.choices(*zip(*square, strict=True))[0]
            drawn = scenes.draw(self.rng, self.draw_scene(self.rng, count))
            caption = self._caption(drawn.scene)
            ids, at = self.tokenizer(caption, drawn.scene.concepts if caption else ())
            pictures.append(drawn.picture)
            tokens.append(ids)
            nouns.append(at + [0] * (objects - len(at)))
            masks.append(_masks(drawn, objects, whole=not caption))
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return x, torch.tensor(tokens), torch.tensor(nouns), torch.from_numpy(np.stack(masks))


def training_loss(
    unet: torch.nn.Module,
    text: torch.nn.Module,
    encode: Callable[[torch.Tensor], torch.Tensor],
    batch: Batch,
    levels: tuple[torch.Tensor, torch.Tensor],
    generator: torch.Generator,
) -> torch.Tensor:
    """The loss of one batch at random noise levels."""
    pictures, tokens, nouns, masks = batch
    alphas, sigmas = levels
    z = encode(pictures)
    t = torch.randint(0, len(alphas), (len(z),), generator=generator)
    a, s = alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)
    noise = torch.randn(z.shape, generator=generator)
    maps = AttentionMaps(nouns)
    context = text(tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        v = unet(a * z + s * noise, t, context, transformer_options={"optimized_attention_override": maps})
    return F.mse_loss(v.float(), a * noise - s * z) + TOKEN_LOSS * maps.loss(masks)


def _rate(progress: float, steps: int) -> float:
    """Warm-up over 100 steps, then flat, then a cosine to zero over the last 70 % of the time."""
    decay = 0.5 * (1 + math.cos(math.pi * max(0.0, progress - 0.3) / 0.7))
    return PEAK_RATE * min(1.0, (steps + 1) / 100) * decay


class _Recorder:
    """What the first process does between its steps: the moving average, the clock, the log and the checkpoints."""

    def __init__(self, unet: torch.nn.Module, text: torch.nn.Module, folder: Path, clock: torch.Tensor) -> None:
        self.unet, self.text, self.folder, self.clock = unet, text, folder, clock
        self.ema = checkpoint.read(folder / EMA)[0] or _state(unet, text)
        self.saved = self.logged = time.time()

    def step(self, steps: int, losses: list[float]) -> None:
        """After every step of the first process."""
        if steps % EMA_EVERY == 0:
            for name, value in _state(self.unet, self.text).items():
                if value.is_floating_point():
                    self.ema[name].lerp_(value.to(self.ema[name]), 1 - EMA_DECAY)
        if time.time() - self.logged > LOG_EVERY:
            self.clock[0] += (time.time() - self.logged) / 60
            self.logged = time.time()
            loss = sum(losses[-100:]) / len(losses[-100:])
            log.info("%.1f min, %d samples, loss %.4f", self.clock[0], self.clock[1], loss)
        if time.time() - self.saved > SAVE_EVERY:
            self.saved = time.time()
            self.save()

    def save(self) -> None:
        _save(self.folder, self.unet, self.text, self.ema, self.clock)


def _worker(
    rank: int, unet: torch.nn.Module, text: torch.nn.Module, arguments: argparse.Namespace, clock: torch.Tensor
) -> None:
    torch.set_num_threads(1)
    os.nice(arguments.nice)
    logging.basicConfig(force=True, level=logging.INFO, format="%(asctime)s %(message)s")
    recorder = _Recorder(unet, text, arguments.out, clock) if rank == 0 else None
    _fit(rank, unet, text, arguments.minutes, clock, recorder)
    if recorder is not None:
        recorder.save()


def _fit(
    rank: int,
    unet: torch.nn.Module,
    text: torch.nn.Module,
    minutes: float,
    clock: torch.Tensor,
    recorder: _Recorder | None,
) -> None:
    """Trains the shared weights until the clock says that the time is up."""
    generator = torch.Generator().manual_seed(int(time.time()) * 2 + rank)
    encoder, levels = Autoencoder(), alphas_and_sigmas()
    batches = Batches(int(time.time()) * 2 + rank, Tokenizer())
    parameters = [p for p in [*unet.parameters(), *text.parameters()] if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    losses: list[float] = []
    steps = 0
    while clock[0] < minutes:
        for group in optimiser.param_groups:
            group["lr"] = _rate(clock[0].item() / minutes, steps)
        batch = batches.next(BATCH)
        loss = training_loss(unet, text, encoder.encode, batch, levels, generator)
        _take_step(optimiser, parameters, loss, losses)
        steps += 1
        clock[1] += len(batch[0])
        if recorder is not None:
            recorder.step(steps, losses)


def _take_step(
    optimiser: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], loss: torch.Tensor, losses: list[float]
) -> None:
    """One step of the optimiser, whose loss is noted; one with a non-finite gradient is skipped."""
    loss.backward()
    if torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, 1.0)):
        optimiser.step()
        losses.append(loss.item())
    else:
        log.info("a step with a non-finite gradient was skipped")
    optimiser.zero_grad(set_to_none=True)


def _state(unet: torch.nn.Module, text: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Both networks' tensors, under ``unet.`` and ``text.``."""
    both = {f"unet.{k}": v for k, v in unet.state_dict().items()} | {
        f"text.{k}": v for k, v in text.state_dict().items()
    }
    return {k: v.detach().clone() for k, v in both.items()}


def _save(
    folder: Path, unet: torch.nn.Module, text: torch.nn.Module, ema: dict[str, torch.Tensor], clock: torch.Tensor
) -> None:
    for name, state in ((RAW, _state(unet, text)), (EMA, ema)):
        checkpoint.write(folder / name, state, minutes=clock[0].item(), samples=clock[1].item())


def _begin(folder: Path, warm: bool) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """Both networks and the clock (minutes, samples): as the folder holds them, else at their start."""
    unet, text = bundled_networks() if warm else (build_unet(), build_text(used_tokens(Tokenizer())))
    state, at = checkpoint.read(folder / RAW)
    if state:
        unet.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("unet.")})
        text.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("text.")})
    return unet, text, torch.tensor([at.get("minutes", 0.0), at.get("samples", 0.0)])


def main(arguments: list[str]) -> int:
    """``dev.py train model``: trains for so many minutes in all; resumes from what is in the folder."""
    parser = argparse.ArgumentParser(prog="dev.py train model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--warm", action="store_true", help="start from the bundled weights instead of from nothing")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    unet, text, clock = _begin(options.out, options.warm)
    for module in (unet, text, clock):
        module.share_memory() if isinstance(module, torch.nn.Module) else module.share_memory_()
    # forked, not spawned: the children find the host and the pack already imported
    torch.multiprocessing.start_processes(_worker, (unet, text, options, clock), nprocs=2, start_method="fork")
    return 0
