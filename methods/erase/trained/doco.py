"""DoCo: what the concept's prompt draws is made indistinguishable from what the anchor's prompt draws, by a discriminator
("Unlearning Concepts in Diffusion Model via Concept Domain Correction and Concept Preserving Gradient", 2405.15304).

Differences from the authors' code: the discriminator is told the noise level and has spectral norm instead of batch
statistics, and the gradient surgery (in ``train.py``) is the exact projection.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.utils.parametrizations import spectral_norm

from ..train import Terms
from .ground import Bank, Ground, Keeper, Settings, States, answers

RATE = 1e-3  # of the discriminator
ALONE = 10  # iterations in which only the discriminator learns
NOISE_LIMIT = 3.0  # states noisier than this say little about what is drawn (t < 674 of 1000 on the SD schedule)


class Discriminator(nn.Module):
    """Clean latents (rows, channels, h, w) and noise levels (rows,) to logits of patches (rows, 1, h/4, w/4): anchor below
    zero, concept above."""

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        sizes = (channels + 1, width, 2 * width, 4 * width)
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(sizes[0], sizes[1], 3, padding=1)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(sizes[1], sizes[2], 4, stride=2, padding=1)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(sizes[2], sizes[3], 4, stride=2, padding=1)), nn.LeakyReLU(0.2),
            nn.Conv2d(sizes[3], 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, clean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = torch.log1p(sigma).view(-1, 1, 1, 1).expand(-1, 1, *clean.shape[-2:])
        return self.layers(torch.cat([clean, level.to(clean)], 1))


def quiet(bank: Bank) -> Bank:
    """The part of a bank where the noise leaves something to be seen: at least its quieter half."""
    limit = max(NOISE_LIMIT, float(bank.sigma.median()))
    chosen = bank.sigma <= limit
    return Bank(bank.x[:, chosen], bank.sigma[chosen], bank.prompt)


def doco(ground: Ground, settings: Settings) -> Callable[[torch.Generator], Terms]:
    """At states of the anchor's trajectories: the discriminator learns to tell x̂₀ of the teacher with the anchor from x̂₀ of
    the student with the concept, and the student learns to pass for the anchor; in every iteration, one after the other."""
    assert ground.anchor_bank is not None
    assert ground.bank is not None
    assert ground.clean_of is not None
    own = ground.bank
    bank, clean_of = quiet(ground.anchor_bank), ground.clean_of
    keeper = Keeper(ground, settings.kept_batch)
    said = answers(ground, bank, lambda states: [ground.anchor.at(states.prompt)])[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        judge = Discriminator(bank.x.shape[2]).to(ground.device)
    learner = torch.optim.Adam(judge.parameters(), lr=RATE, betas=(0.5, 0.999))
    done = [0]

    def learn(anchor: torch.Tensor, concept: torch.Tensor, sigma: torch.Tensor) -> None:
        real, fake = judge(anchor, sigma), judge(concept.detach(), sigma)
        loss = bce(real, torch.zeros_like(real)) + bce(fake, torch.ones_like(fake))
        learner.zero_grad()
        loss.backward()
        learner.step()

    def terms(generator: torch.Generator) -> Terms:
        states: States = bank.draw(settings.batch, generator, ground.device)
        near = own.draw(1, generator, ground.device)
        student, drift = keeper.student(states, ground.concept.at(states.prompt), generator, near)
        anchor = clean_of(states.x, states.sigma, said[states.place].to(student))
        concept = clean_of(states.x, states.sigma, student)
        learn(anchor, concept, states.sigma)
        done[0] += 1
        logits = judge(concept, states.sigma)
        erase = bce(logits, torch.zeros_like(logits))
        return Terms(erase if done[0] > ALONE else erase.detach(), drift)

    return terms
