"""Attacks with pictures on an edited demo model: learned tokens, found by gradient through text encoder and UNet.

Both match the edited model's prediction on noised pictures of the concept to the plain model's for the honest prompt,
with a fixed budget. Sources: UnlearnDiffAtk (Zhang et al. 2310.11868), and textual inversion as a circumvention (Pham
et al. 2308.01508).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from ..demo import vocabulary
from ..host.engine.gradients import differentiable, differentiable_options, without_inference_tensors

ITERATIONS, RATE = 24, 0.05
PREFIX = 5  # tokens, as in UnlearnDiffAtk
LEVELS = (9.0, 4.0, 2.0, 1.0)  # sigma of the noised pictures, a row each


@dataclass(frozen=True)
class Learned:
    """What an attack found: the tokens of the prompt with the learned embeddings among them."""

    tokens: dict[str, list]


def _tokens(clip: Any, concept: str, background: str) -> list:
    return list(clip.tokenize(vocabulary.scene_of((concept,), background).caption())["l"][0])


def with_prefix(section: list, learned: torch.Tensor) -> list:
    """The prompt behind learned tokens (n, d), at its usual length."""
    return [section[0], *((row, 1.0) for row in learned), *section[1:]][: len(section)]


def with_word(section: list, learned: torch.Tensor, concept_id: int) -> list:
    """The prompt with the concept's token replaced by a learned one, (1, d)."""
    return [(learned[0], w) if isinstance(t, int) and t == concept_id else (t, w) for t, w in section]


KINDS = ("prefix", "inversion")


def learn(
    kind: str, plain: Any, edited: Any, clips: tuple[Any, Any], pictures: torch.Tensor, concept: str, background: str
) -> Learned:
    """Learns the tokens of one attack.

    Args:
        plain, edited: the model before and after. Both share weights, so ``edited`` must carry its edit in its options.
        clips: the text encoder before and after.
        pictures: latents of the concept, (1, 4, h, w).
    """
    before, clip = clips
    section = _tokens(clip, concept, background)
    word = clip.tokenize(concept)["l"][0][1][0]
    generator = torch.Generator().manual_seed(7)
    start = _start(kind, clip, word, generator)
    noise = torch.randn((len(LEVELS), *pictures.shape[1:]), generator=generator)
    sigma = torch.tensor(LEVELS)
    x = pictures + noise * sigma[:, None, None, None]
    noised = _NoisedPictures(x, sigma, _predict(plain, x, sigma, before.encode_from_tokens({"l": [section]})))
    clip.encode_from_tokens({"l": [section]})  # loads the edited one before its weights are looked at
    prompt_of = partial(with_prefix, section) if kind == "prefix" else partial(with_word, section, concept_id=word)
    return Learned({"l": [prompt_of(_descend(edited, clip, prompt_of, start, noised))]})


def _start(kind: str, clip: Any, word: int, generator: torch.Generator) -> torch.Tensor:
    """Where the descent begins: random embeddings of a usual size, or the concept's own."""
    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    if kind == "prefix":
        return torch.randn((PREFIX, table.shape[1]), generator=generator) * float(table.std())
    return table[word][None].clone()


def _predict(
    patcher: Any, x: torch.Tensor, sigma: torch.Tensor, cond: torch.Tensor, options: Any = None
) -> torch.Tensor:
    options = patcher.model_options if options is None else options
    return patcher.model.apply_model(
        x, sigma, c_crossattn=cond.expand(len(x), -1, -1), transformer_options=options["transformer_options"]
    )


class _NoisedPictures(NamedTuple):
    """Noised latents x (b, 4, h, w) at noise levels sigma (b,), and the plain model's predictions for them."""

    x: torch.Tensor
    sigma: torch.Tensor
    target: torch.Tensor


def _descend(
    patcher: Any, clip: Any, prompt_of: Callable[[torch.Tensor], list], start: torch.Tensor, noised: _NoisedPictures
) -> torch.Tensor:
    """Adam on the learned tokens; the best of all iterations."""
    with differentiable(patcher.model, clip.cond_stage_model, in_place=False):
        x, sigma, target = (without_inference_tensors(t) for t in noised)
        learned = without_inference_tensors(start).clone().requires_grad_(True)
        optimiser = torch.optim.Adam([learned], lr=RATE)
        options = differentiable_options(patcher.model_options)
        weight = (1 / sigma.square())[:, None, None, None]  # the error of the noise, not of the picture
        best, lowest = learned.detach().clone(), float("inf")
        for _ in range(ITERATIONS):
            cond = _encoded(clip, prompt_of, learned).requires_grad_(True)
            loss = ((_predict(patcher, x, sigma, cond, options) - target).square() * weight).mean()
            if (reached := float(loss.detach())) < lowest:
                best, lowest = learned.detach().clone(), reached
            loss.backward()
            learned.grad = _encoded(clip, prompt_of, learned, cond.grad)
            optimiser.step()
    return best


def _encoded(
    clip: Any, prompt_of: Callable[[torch.Tensor], list], learned: torch.Tensor, gradient: torch.Tensor | None = None
) -> torch.Tensor:
    """The encoded prompt; with the ``gradient`` of a loss by it, the gradient by the learned tokens.

    Only the text encoder overwrites tensors. Encoding twice costs less than keeping such tensors for the UNet as well.
    """
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        cond = clip.encode_from_tokens({"l": [prompt_of(learned)]})
        return cond.detach() if gradient is None else torch.autograd.grad(cond, learned, gradient)[0]
