"""DoCo: a discriminator learns to tell pictures of the concept from pictures of the anchor, and the model learns to
make them alike ("Unlearning Concepts in Diffusion Model via Concept Domain Correction and Concept Preserving
Gradient", 2405.15304).

Differs from the authors' code: the discriminator reads the noise level and has spectral norm instead of batch
statistics. The gradient surgery (in ``train.py``) is the exact projection.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.utils.parametrizations import spectral_norm

from ..train import Losses, LossFunction
from .context import MethodSettings, UNetContext, teacher_predictions
from .preservation import PreservationLoss
from .trajectories import TrajectoryBank

RATE = 1e-3  # of the discriminator
ALONE = 10  # iterations at the start in which only the discriminator learns
NOISE_LIMIT = 3.0  # sigma above which a state shows little of the picture (t < 674 of 1000 on the SD schedule)


class Discriminator(nn.Module):
    """Tells anchor from concept.

    From clean latents (rows, channels, h, w) and noise levels (rows,) to logits of patches (rows, 1, h/4, w/4). The
    anchor's are below zero, the concept's above.
    """

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        sizes = (channels + 1, width, 2 * width, 4 * width)
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(sizes[0], sizes[1], 3, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(sizes[1], sizes[2], 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(sizes[2], sizes[3], 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            nn.Conv2d(sizes[3], 1, 3, padding=1),
        )

    def forward(self, clean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        noise = torch.log1p(sigma).view(-1, 1, 1, 1).expand(-1, 1, *clean.shape[-2:])
        return self.layers(torch.cat([clean, noise.to(clean)], 1))


def quiet(bank: TrajectoryBank) -> TrajectoryBank:
    """The part of a bank with little enough noise to see something: at least its quieter half."""
    limit = max(NOISE_LIMIT, float(bank.sigma.median()))
    chosen = bank.sigma <= limit
    return TrajectoryBank(bank.x[:, chosen], bank.sigma[chosen], bank.prompt)


class Adversary:
    """The discriminator while it learns."""

    def __init__(self, channels: int, seed: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.discriminator = Discriminator(channels).to(device)
        self.optimiser = torch.optim.Adam(self.discriminator.parameters(), lr=RATE, betas=(0.5, 0.999))
        self.iterations = 0

    def learn(self, anchor: torch.Tensor, concept: torch.Tensor, sigma: torch.Tensor) -> None:
        """One step towards telling clean latents of the anchor from those of the concept."""
        real, fake = self.discriminator(anchor, sigma), self.discriminator(concept.detach(), sigma)
        loss = bce(real, torch.zeros_like(real)) + bce(fake, torch.ones_like(fake))
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.iterations += 1

    def erase_loss(self, concept: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """How far the concept's clean latents are from passing for the anchor. Off the graph while it learns alone."""
        logits = self.discriminator(concept, sigma)
        loss = bce(logits, torch.zeros_like(logits))
        return loss if self.iterations > ALONE else loss.detach()


def doco(context: UNetContext, settings: MethodSettings) -> LossFunction:
    """DoCo's losses at states of the anchor's trajectories.

    The discriminator learns to tell x̂₀ of the teacher with the anchor from x̂₀ of the student with the concept. The
    student learns to pass for the anchor. Each iteration does both, in this order.
    """
    trajectories, prompts = context.trajectories, context.prompts
    bank, clean_of = quiet(trajectories.anchor), context.noise.clean
    preservation = PreservationLoss(context, settings.preserve_batch)
    targets = teacher_predictions(context, bank, lambda states: [prompts.anchor.at(states.prompt)])[0]
    adversary = Adversary(bank.x.shape[2], settings.seed, context.device)

    def losses(generator: torch.Generator) -> Losses:
        states = bank.draw(settings.batch, generator, context.device)
        near = trajectories.concept.draw(1, generator, context.device)
        prediction, drift = preservation.student(states, prompts.concept.at(states.prompt), generator, near)
        anchor = clean_of(states.x, states.sigma, targets[states.position].to(prediction))
        concept = clean_of(states.x, states.sigma, prediction)
        adversary.learn(anchor, concept, states.sigma)
        return Losses(adversary.erase_loss(concept, states.sigma), drift)

    return losses
