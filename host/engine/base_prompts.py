"""Base prompts that the concepts of a picture share a model call with, and what they carry besides their words."""

from __future__ import annotations

from typing import NamedTuple

from .. import keys
from ..types import Conditioning, Options

_NOT_IN_ONE_CALL = {
    "area": "an area (Conditioning (Set Area))",
    "mask": "a mask (Conditioning (Set Mask))",
    "gligen": "GLIGEN boxes",
    "hooks": "LoRA hooks",
    "default": "a default conditioning",
}
_OF_TEXT = ("pooled_output", "attention_mask", "t5xxl_ids", "t5xxl_weights")  # the last two are Anima's
WORDS = (*_OF_TEXT, keys.PHRASE_POSITIONS, keys.OBJECT_POSITIONS, keys.LAYER_CONTEXTS)
"""The values of an entry that belong to its words. All others say what stands beside them: ControlNets, pictures beside
the latent, reference latents, sizes, when the entry counts."""
_WITHOUT_REFERENCE = ("control", "control_apply_to_uncond", "start_percent", "end_percent")


class BasePrompts(NamedTuple):
    """The prompts of the whole picture, and the guidance scale that weighs them."""

    positive: Conditioning
    negative: Conditioning
    cfg: float

    def checked(self) -> dict[str, Conditioning]:
        """Both prompts by name, as the host's guider takes them.

        Raises:
            ValueError: an empty conditioning, or one that needs separate model calls: areas, masks, GLIGEN or hooks.
        """
        prompts = {"positive": self.positive, "negative": self.negative}
        for name, conds in prompts.items():
            if not conds:
                raise ValueError(f"The {name} prompt is empty; connect a CLIP Text Encode (its text may be empty).")
            if what := needs_own_call(conds):
                raise ValueError(
                    f"The {name} prompt has {what}, which would split the one model call of all concepts; use the "
                    "regions of the concepts to say where things are."
                )
        return prompts


def needs_own_call(conditioning: Conditioning) -> str | None:
    """What the entries carry that the host evaluates in a model call of its own, in words; None if nothing."""
    for _, values in conditioning:
        for key, what in _NOT_IN_ONE_CALL.items():
            if values.get(key) is not None:
                return what
    return None


def own_controls(positive: Conditioning, negative: Conditioning) -> tuple[Conditioning, Conditioning]:
    """The controls of the positive on the negative too, where the older Apply ControlNet wants that.

    The host does this at sampling, but for every conditioning of a guider, whichever pair it belongs to.
    """
    shared = [v["control"] for _, v in positive if v.get("control_apply_to_uncond") and "area" not in v]
    if not shared:
        return positive, negative
    negative = list(negative)
    free = [number for number, (_, values) in enumerate(negative) if "area" not in values]
    if free and not any(negative[number][1].get("control") for number in free):
        for count, control in enumerate(shared):
            at = free[count % len(free)]
            context, values = negative[at]
            negative[at] = [context, {**values, "control": control}]
    return [[context, {**values, "control_apply_to_uncond": False}] for context, values in positive], negative


def numbered(base: Conditioning) -> Conditioning:
    """The base's entries with a number each: entries that differ in nothing but words and strength share one."""
    kinds: dict[tuple[tuple[str, object], ...], int] = {}
    return [
        [context, {**values, keys.ENTRY_NUMBER: kinds.setdefault(_kind(values), len(kinds))}]
        for context, values in base
    ]


def _kind(values: Options) -> tuple[tuple[str, object], ...]:
    """What an entry carries besides its words; its strength weighs a prediction that nobody takes from a concept."""
    simple = (bool, int, float, str, type(None))
    besides = (key for key in sorted(values) if key not in (*WORDS, "strength"))
    return tuple((key, values[key] if isinstance(values[key], simple) else id(values[key])) for key in besides)


def with_words_of(base: Conditioning, words: Conditioning, prompt_type: str) -> Conditioning:
    """The base's entries with other words, one for each number of ``numbered``.

    Args:
        words: whose first entry says the words; without any there are no entries.
        prompt_type: ``positive`` or ``negative``, for the host.
    """
    first_of = {values[keys.ENTRY_NUMBER]: values for _, values in reversed(base)}
    return [
        [context, {**_besides(first_of[number]), **_said(own), "prompt_type": prompt_type}]
        for context, own in words[:1]
        for number in sorted(first_of)
    ]


def reference_words(base: Conditioning, words: Conditioning) -> Conditioning:
    """The words of a reference picture beside what the base's first entry carries, at every noise level.

    Without the base's ControlNet: the reference has its own layout.
    """
    values = {key: value for key, value in _besides(base[0][1]).items() if key not in _WITHOUT_REFERENCE}
    return [[context, {**values, **own}] for context, own in words[:1]]


def _said(values: Options) -> Options:
    return {key: value for key, value in values.items() if key in WORDS}


def _besides(values: Options) -> Options:
    return {key: value for key, value in values.items() if key not in WORDS}
