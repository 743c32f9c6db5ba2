"""The prompts of several concepts in one text, for networks where the text and the picture attend together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...methods.compose.sequence import Slots, slots_for
from ..architecture import Architecture, Size
from ..engine.model_call import ModelCall
from ..types import CondEntry


def text_of(architecture: Architecture, entry: CondEntry, who: str) -> torch.Tensor:
    """The text of a processed prompt, (1, tokens, channels).

    Raises:
        ValueError: some of its tokens are masked.
    """
    given = entry["model_conds"]
    _check_mask(architecture, getattr(given.get("attention_mask"), "cond", None), who)
    text: torch.Tensor = given["c_crossattn"].cond[:1]
    return text


class SequenceText:
    """The text of one model call: the base prompt, then the concepts'. ``call`` is the call with it.

    Args:
        prompts: of every entry of the call, one per concept, (1, tokens, channels).
        who: what cannot work if the call is refused, the subject of the refusal.

    Raises:
        ValueError: the call has masked tokens, several frames, or more text than one prompt.
    """

    def __init__(
        self, architecture: Architecture, call: ModelCall, prompts: Sequence[Sequence[torch.Tensor]], who: str
    ) -> None:
        _check_call(architecture, call, who)
        base, facts = call.c_crossattn, architecture.equal_lengths
        assert base is not None  # no family here is without text
        self.architecture, self.base = architecture, base
        self.size: Size = (int(call.x.shape[-2]), int(call.x.shape[-1]))
        self.references = references_of(architecture, call)
        lengths = [[base.shape[1], *(p.shape[1] for p in entry)] for entry in prompts]
        self.slots: Slots = slots_for(lengths, facts.multiple, facts.shifts)
        others = {key: value for key, value in call.others.items() if key != "attention_mask"}
        if facts.counts in others:
            others[facts.counts] = self.slots.length
        self.call = call._replace(c_crossattn=self._joined(prompts), others=others)

    def _joined(self, prompts: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """All prompts in their slots, (rows, tokens, channels); zeros are between them."""
        count = len(self.base) // len(prompts)
        out = self.base.new_zeros(len(self.base), self.slots.length, *self.base.shape[2:])
        for number, (entry, places) in enumerate(zip(prompts, self.slots.places, strict=True)):
            rows = slice(number * count, (number + 1) * count)
            for prompt, place in zip((self.base[rows], *entry), places, strict=True):
                if prompt.shape[2:] != self.base.shape[2:]:
                    raise other_encoder(prompt, self.base)
                out[rows, slice(*place.text)] = prompt.to(out)
        return out

    def words(self, number: int, device: torch.device) -> torch.Tensor:
        """Which tokens are of one prompt's slot, (tokens,) of 0 and 1."""
        weights = torch.zeros(self.slots.length, device=device)
        weights[slice(*self.slots.slots[number])] = 1
        return weights

    @property
    def moved_back(self) -> int:
        """How far the picture has to move back to where it lies behind the base prompt alone."""
        return self.slots.length - self.slots.slots[0].stop if self.architecture.equal_lengths.shifts else 0

    def positions(self) -> torch.Tensor | None:
        """Where each text token is, (tokens, axes): as alone, and next to the picture if that lies behind the text."""
        first, found = self.slots.slots[0].stop, []
        for slot in self.slots.slots:
            length = slot.stop - slot.start
            own = self.architecture.text_positions(length, self.size)
            if own is None:
                return None
            if self.architecture.equal_lengths.shifts:
                own[:, 0] += first - length
            found.append(own)
        return torch.cat(found)


def other_encoder(prompt: torch.Tensor, base: torch.Tensor) -> ValueError:
    """The refusal of a concept's prompt whose tokens are not as wide as those of the base's."""
    return ValueError(
        f"A concept's prompt has {prompt.shape[-1]} channels per token, and the base's has {base.shape[-1]}: it is "
        "from another text encoder; connect the CLIP of this model to Concept."
    )


def _check_call(architecture: Architecture, call: ModelCall, who: str) -> None:
    """Refuses what a sequence of several prompts has no place for.

    Raises:
        ValueError: what it is, and what to do.
    """
    _check_mask(architecture, call.others.get("attention_mask"), who)
    check_layout(architecture, call, who)


def check_layout(architecture: Architecture, call: ModelCall, who: str, several_frames: bool = False) -> None:
    """Refuses a call whose tokens have no known places.

    Args:
        several_frames: whether a picture may have them.

    Raises:
        ValueError: pictures beside the prompt, or several frames, and what to do.
    """
    if any(key in call.others for key in architecture.equal_lengths.not_with):
        raise architecture.lacks(f"{who} with pictures beside the prompt", "remove the reference images")
    if not several_frames and call.x.ndim == 5 and call.x.shape[2] != 1:
        raise architecture.lacks(f"{who} with several frames", "sample one picture")


def _check_mask(architecture: Architecture, mask: object, who: str) -> None:
    if isinstance(mask, torch.Tensor) and not bool((mask == 1).all()):
        raise architecture.lacks(f"{who} with a prompt of which some tokens are masked", "bypass what masks them")


def references_of(architecture: Architecture, call: ModelCall) -> list[Size]:
    """The sizes of the pictures behind the image. Krea 2 passes them over unless a way to place them is named."""
    default = getattr(architecture.network, "default_ref_method", "the network's")
    given = call.others.get("ref_latents")
    if not architecture.takes_references or call.others.get("ref_latents_method", default) is None:
        return []
    return [(int(r.shape[-2]), int(r.shape[-1])) for r in given] if isinstance(given, (list, tuple)) else []
