"""Co-Erasing: the concept is erased for words and for pictures of it together ("One Image is Worth a Thousand Words: A
Usability Preservable Text-Image Collaborative Erasing Framework", 2505.11131).

The paper reads pictures with an IP-Adapter. Here a picture's tokens are found with the model itself: k context tokens behind
the prompt '' with which it explains the picture best, as in textual inversion; nothing further has to be loaded, and the
tokens are in the very space an image prompt would use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..train import Terms
from .esd import negative_guidance
from .few_shot import noised_pictures
from .ground import Encoded, Ground, Keeper, Settings, States, answers, mean_square

TOKENS = 4  # of a picture, as an IP-Adapter gives
STEPS = 40  # of finding them


def refined(tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Text-guided refinement: ĩ = softmax(q kᵀ/√d) v with q the image tokens (rows, k, d) and k = v the text (rows, n, d).
    What comes out lies in the convex hull of the text's rows."""
    return (tokens @ text.transpose(1, 2) * text.shape[-1] ** -0.5).softmax(-1) @ text


def image_tokens(ground: Ground, seed: int, rate: float = 0.1) -> torch.Tensor:
    """Context tokens (images, k, d) that explain each picture best: gradient descent on the model's own loss, from the last
    rows of ''. ``rate`` is in units of the rows' own size."""
    assert ground.images is not None
    start = ground.empty.context[:, -TOKENS:].repeat(len(ground.images), 1, 1)
    size = float(start.square().mean().sqrt())
    tokens = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([tokens], lr=rate * size)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(seed + step)
        states, target = noised_pictures(ground, max(len(ground.images), 4), generator)
        which = states.place[0].to(tokens.device)
        prompt = ground.empty.repeated(len(which)).followed_by(tokens[which])
        said = ground.predict(states.x, states.sigma, [prompt], adapted=False)[0]
        (gradient,) = torch.autograd.grad(mean_square(said, target) * ground.loss_scale, tokens)
        if not bool(torch.isfinite(gradient).all()):
            continue  # an overflow of a float16 model
        tokens.grad = gradient / ground.loss_scale
        optimiser.step()
    return tokens.detach()


def co_erasing(ground: Ground, settings: Settings) -> Callable[[torch.Generator], Terms]:
    """ESD's loss for the words alone and for the words followed by refined image tokens, half of the rows each:
    ‖ε_θ(x_t, c, ĩ) − (u − η (ε*(x_t, c, ĩ) − u))‖² with u the anchor of the words alone. Each trajectory has one picture
    (trajectories and own pictures go round the concepts in step)."""
    assert ground.bank is not None
    bank, keeper = ground.bank, Keeper(ground, settings.kept_batch)
    tokens = image_tokens(ground, settings.seed)

    def with_picture(states: States) -> Encoded:
        text = ground.concept.at(states.prompt)
        picture = tokens[(states.place[0] % len(tokens)).to(tokens.device)]
        return text.followed_by(refined(picture, text.context) if settings.refine else picture)

    def prompts(states: States) -> list[Encoded]:
        return [ground.concept.at(states.prompt), ground.anchor.at(states.prompt), with_picture(states)]

    said = answers(ground, bank, prompts)
    text_target = negative_guidance(said[0], said[1], settings.eta)
    picture_target = negative_guidance(said[2], said[1], settings.eta)
    half = replace(settings, batch=max(settings.batch // 2, 1))

    def terms(generator: torch.Generator) -> Terms:
        states, seen = (bank.draw(half.batch, generator, ground.device) for _ in range(2))
        words, drift = keeper.student(states, ground.concept.at(states.prompt), generator)
        (pictures,) = ground.student(seen, [with_picture(seen)])
        erase = mean_square(words, text_target[states.place].to(words))
        return Terms((erase + mean_square(pictures, picture_target[seen.place].to(pictures))) / 2, drift)

    return terms
