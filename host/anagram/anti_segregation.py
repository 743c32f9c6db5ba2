"""The gradient step of anti-segregation, taken before a prediction, inside any sampler.

What is differentiated is the attention of each view's concept words, and nothing behind it: the forward pass ends at the
last attention that is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import torch
import torch.nn.functional as F

from .. import keys
from ..engine.attention import CROSS, Captured, Site, capture, find_sites, unet_of
from ..engine.gradients import (
    check_differentiable,
    differentiable_conds,
    differentiable_options,
    gradient_of,
    plain_patcher,
    without_inference_tensors,
)
from ..engine.latent_edits import EditSchedule, edit_schedule_for
from ..engine.sampling import percent_of
from .views import ViewConds, frames_of, in_frames, needs_own_frame

WHO = "Anti-segregation"


@dataclass(frozen=True)
class Pull:
    """What the step is, handed in: ``loss(maps)`` of each view's map to (batch,), and ``step(x, gradient, loss)``.

    ``lasting``: whether it stays in the sampler's own latent, or only the prediction sees it; None is as the sampler can.
    """

    loss: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    start: float
    end: float
    iterations: int
    lasting: bool | None = None


def pulled_model(model: Any, views: Sequence[Any]) -> Any:
    """The MODEL to sample these views with under a pull: in a form that has gradients, on hosts that have another by default.

    Raises:
        ValueError: a prompt does not say which of its words are the concept, or the model has no such form.
    """
    counted = [prompt for prompt in views if prompt.counted]
    for prompt in counted:
        if prompt.known is not None or not all(values.get(keys.PHRASE_POSITIONS) for _, values in prompt.positive):
            raise ValueError(
                f"Anti-segregation must know which words of the prompt of view '{prompt.view.name}' are its concept; encode "
                "every view's prompt with 'Encode Concept Phrase' instead of CLIP Text Encode, or choose another preset."
            )
    return plain_patcher(model) if len(counted) > 1 else model


class Puller:
    """Pulls at the latent during one sampling; made anew for each."""

    def __init__(self, model: Any, views: Sequence[ViewConds], pull: Pull, once: EditSchedule) -> None:
        check_differentiable(model)
        self.model, self.views, self.pull, self.once = model, views, pull, once
        self.unet = unet_of(model)
        self.sites = _sites(self.unet)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, model_options: dict[str, Any]) -> torch.Tensor:
        """The latent to predict at."""
        due = self.once.is_due(sigma)
        progress = percent_of(self.model.model_sampling, float(sigma.max()))
        looks = _looks_at(self.views, sigma)
        if not due or not looks or not self.pull.start <= progress <= self.pull.end:
            return x
        moved = x
        for _ in range(self.pull.iterations):
            moved = self._pulled(looks, moved, sigma, model_options)
        return self.once.apply(x, moved)

    def _pulled(
        self, looks: Sequence[ViewConds], x: torch.Tensor, sigma: torch.Tensor, model_options: dict[str, Any]
    ) -> torch.Tensor:
        losses: list[torch.Tensor] = []

        def loss_of(z: torch.Tensor) -> torch.Tensor:
            each = self.pull.loss(self._maps(looks, z, without_inference_tensors(sigma), model_options))
            losses.append(each.detach())
            return each.sum()  # pictures of a batch do not meet, so each gets its own gradient

        gradient = gradient_of(self.model, x, loss_of)
        return x if gradient.value is None else x + self.pull.step(x, gradient.value, losses[0])

    def _maps(
        self, looks: Sequence[ViewConds], z: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any]
    ) -> list[torch.Tensor]:
        """Each view's map, of one batched call if the host makes one of it, else of a call a view; of a call of its own, on
        the turned latent, where something in the prompt lies as it was drawn in the view."""
        own = [needs_own_frame(look.positive) for look in looks]
        shared = [look for look, alone in zip(looks, own, strict=True) if not alone]
        maps = self._seen(shared, z, sigma, options) if shared else []
        rest = iter(maps or [self._seen([look], z, sigma, options)[0] for look in shared])
        return [
            self._seen([look], z, sigma, options, turned=True)[0] if alone else next(rest)
            for look, alone in zip(looks, own, strict=True)
        ]

    def _seen(
        self,
        looks: Sequence[ViewConds],
        z: torch.Tensor,
        sigma: torch.Tensor,
        options: dict[str, Any],
        turned: bool = False,
    ) -> list[torch.Tensor]:
        """Where the views' concept words look, in the canonical frame, (batch, height, width) of the latent; nothing if the
        host splits the call. ``turned``: the one view is shown the turned latent itself."""
        framed, calls = _watched(differentiable_options(in_frames(options, frames_of(looks), latent_is_turned=turned)))
        shown = looks[0].view.forward(z).contiguous() if turned else z
        with capture(self.unet, self.sites, stop=True) as seen:
            comfy.samplers.calc_cond_batch(
                self.model, differentiable_conds([look.positive for look in looks]), shown, sigma, framed
            )
        rows = calls[0]
        if len(rows) < len(looks):
            return []
        return [self._map(seen, look, rows.index(look.positive[0]["uuid"]), z) for look in looks]

    def _map(self, seen: Captured, look: ViewConds, chunk: int, z: torch.Tensor) -> torch.Tensor:
        (entry,) = look.positive
        rows, words = slice(chunk * len(z), (chunk + 1) * len(z)), list(entry[keys.PHRASE_POSITIONS])
        size, around = _place(entry, z)
        found = [
            _on_grid(seen.probabilities(s, rows)[..., words].sum(-1).mean(1), seen.grid(s), size) for s in self.sites
        ]
        return look.view.inverse(F.pad(torch.stack(found).sum(0), around))


def puller_for(
    model: Any, counted: Sequence[ViewConds], pull: Pull, sampler: Any, sigmas: torch.Tensor, denoise_mask: torch.Tensor | None
) -> Puller | None:  # fmt: skip
    """The puller at the views that count, for one sampling; none where fewer than two do.

    Raises:
        ValueError: a sampler or a model it cannot work with.
    """
    if len(counted) < 2:
        return None
    return Puller(
        model, counted, pull, edit_schedule_for(sampler, sigmas, denoise_mask, model.model_sampling, WHO, pull.lasting)
    )


def _looks_at(views: Sequence[ViewConds], sigma: torch.Tensor) -> list[ViewConds]:
    """The views with the one entry of each prompt to look at: the first that counts at this level and knows its concept (the
    host adds some that do not). Nothing if a view has none."""
    found = [[e for e in view.positive if e.get(keys.PHRASE_POSITIONS) and _counts(e, sigma)][:1] for view in views]
    return [replace(v, positive=e, negative=None) for v, e in zip(views, found, strict=True)] if all(found) else []


def _counts(entry: dict[str, Any], sigma: torch.Tensor) -> bool:
    """Whether the host asks an entry at this level: its sampling percents may not be reached yet, or be over."""
    above = "timestep_start" in entry and bool(sigma[0] > entry["timestep_start"])
    below = "timestep_end" in entry and bool(sigma[0] < entry["timestep_end"])
    return not (above or below)


def _watched(options: dict[str, Any]) -> tuple[dict[str, Any], list[list[Any]]]:
    """The options, and a list that will hold the uuid of each chunk of rows of every model call under them."""
    calls: list[list[Any]] = []

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        calls.append(list((transformer_options or {}).get("uuids", ())))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    comfy.patcher_extension.add_wrapper_with_key(kind, "concepts.pull", wrapper, options, is_model_options=True)
    return options, calls


def _sites(unet: Any) -> list[Site]:
    """The cross-attentions at half the latent's resolution, as in the paper; at full where there are none."""
    return find_sites(unet, CROSS, factor=2) or find_sites(unet, CROSS, factor=1) or find_sites(unet, CROSS)


def _place(entry: dict[str, Any], z: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Height and width of the part of the latent that an entry is asked for, and what is left of the latent around it, in the
    order of ``F.pad``: left, right, above, below."""
    full_height, full_width = z.shape[-2:]
    area = entry.get("area")
    height, width, y, x = (full_height, full_width, 0, 0) if area is None else area
    height, width = min(height, full_height - y), min(width, full_width - x)  # the host cuts it off there too
    return (height, width), (x, full_width - x - width, y, full_height - y - height)


def _on_grid(attention: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """(batch, tokens) as a map of height and width ``size``, (batch, height, width)."""
    return F.interpolate(attention.unflatten(-1, grid).unsqueeze(1), size=size, mode="nearest")[:, 0]
