"""Co-Erasing: the concept is erased for words and for pictures of it together ("One Image is Worth a Thousand Words: A
Usability Preservable Text-Image Collaborative Erasing Framework", 2505.11131).

Differs from the paper: it reads pictures with an IP-Adapter. Here the model itself finds a picture's tokens, as in
textual inversion: the k context tokens behind the prompt '' that explain the picture best. Nothing further has to be
loaded, and the tokens are in the space that an image prompt would use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..train import Losses, LossFunction
from .context import MethodSettings, TrainingContext, UNetContext, teacher_predictions
from .esd import negative_guidance
from .noised_pictures import noised_pictures
from .preservation import PreservationLoss, mean_square
from .prompts import EncodedPrompts
from .trajectories import States

TOKENS = 4  # per picture, as an IP-Adapter gives
STEPS = 40  # of finding them


def refined(tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Image tokens refined by the text: ĩ = softmax(q kᵀ/√d) v, in the convex hull of the text's rows.

    q are the image tokens (rows, k, d), and k = v is the text (rows, n, d).
    """
    return (tokens @ text.transpose(1, 2) * text.shape[-1] ** -0.5).softmax(-1) @ text


def image_tokens(context: TrainingContext, seed: int, rate: float = 0.1) -> torch.Tensor:
    """The context tokens (images, k, d) that explain each picture best.

    Gradient descent on the model's own loss finds them, from the last rows of ''. ``rate`` is in units of the rows'
    size.
    """
    pictures, empty = len(context.pictures.latents), context.prompts.empty
    start = empty.context[:, -TOKENS:].repeat(pictures, 1, 1)
    size = float(start.square().mean().sqrt())
    tokens = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([tokens], lr=rate * size)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(seed + step)
        states, target = noised_pictures(context, max(pictures, 4), generator)
        which = states.position[0].to(tokens.device)
        prompt = empty.repeated(len(which)).followed_by(tokens[which])
        prediction = context.predict(states.x, states.sigma, [prompt], adapted=False)[0]
        (gradient,) = torch.autograd.grad(mean_square(prediction, target) * context.loss_scale, tokens)
        if not bool(torch.isfinite(gradient).all()):
            continue  # an overflow of a float16 model
        tokens.grad = gradient / context.loss_scale
        optimiser.step()
    return tokens.detach()


def co_erasing(context: UNetContext, settings: MethodSettings) -> LossFunction:
    """ESD's loss for the words alone and for the words followed by refined image tokens, half of the rows each.

    ‖ε_θ(x_t, c, ĩ) − (u − η (ε*(x_t, c, ĩ) − u))‖² with u the anchor of the words alone. Each trajectory has one
    picture: trajectories and own pictures take the concepts in the same turn.
    """
    bank, concept = context.trajectories.concept, context.prompts.concept
    preservation = PreservationLoss(context, settings.preserve_batch)
    with_picture = _with_pictures(concept, image_tokens(context, settings.seed), settings.refine)
    text_target, picture_target = _targets(context, with_picture, settings.eta)
    half = max(settings.batch // 2, 1)

    def losses(generator: torch.Generator) -> Losses:
        states, with_tokens = (bank.draw(half, generator, context.device) for _ in range(2))
        words, drift = preservation.student(states, concept.at(states.prompt), generator)
        (pictures,) = context.student(with_tokens, [with_picture(with_tokens)])
        erase = mean_square(words, text_target[states.position].to(words))
        target = picture_target[with_tokens.position].to(pictures)
        return Losses((erase + mean_square(pictures, target)) / 2, drift)

    return losses


def _with_pictures(concept: EncodedPrompts, tokens: torch.Tensor, refine: bool) -> Callable[[States], EncodedPrompts]:
    """A function of states: their concept prompts, each followed by the tokens of its trajectory's picture."""

    def prompts_at(states: States) -> EncodedPrompts:
        text = concept.at(states.prompt)
        picture = tokens[(states.position[0] % len(tokens)).to(tokens.device)]
        return text.followed_by(refined(picture, text.context) if refine else picture)

    return prompts_at


def _targets(
    context: UNetContext, with_picture: Callable[[States], EncodedPrompts], eta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """ESD's targets at every state of the concept's bank: for the words, and for the words with image tokens."""
    prompts = context.prompts
    words, anchor, pictures = teacher_predictions(
        context,
        context.trajectories.concept,
        lambda s: [prompts.concept.at(s.prompt), prompts.anchor.at(s.prompt), with_picture(s)],
    )
    return negative_guidance(words, anchor, eta), negative_guidance(pictures, anchor, eta)
