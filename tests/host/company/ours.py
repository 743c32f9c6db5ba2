"""Everything of ours that samples, as guiders for a setting: plain by theory, or doing something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.model_patch import with_views
from comfyui_concepts.host.anagram.views import ViewPrompt
from comfyui_concepts.host.compose.guider import ComposeGuider
from comfyui_concepts.host.compose.suppression import with_suppression
from comfyui_concepts.host.conduct.guider import ConductGuider
from comfyui_concepts.host.conduct.layout import LayoutReference
from comfyui_concepts.host.engine.base_prompts import BasePrompts
from comfyui_concepts.host.erase.apply import apply_edit
from comfyui_concepts.host.lora.concept import Concept
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.methods.anagram.combine import AVERAGING, combiner
from comfyui_concepts.methods.anagram.overlap import AntiSegregation, gradient_step_of
from comfyui_concepts.methods.anagram.views import view_named
from comfyui_concepts.methods.compose.settings import Compose
from comfyui_concepts.methods.conduct.settings import Conduct
from comfyui_concepts.methods.regions import Box, Region

from .parties import CFG, WORDS, Setting, direction, plain, text

TINIEST = 1e-6
EVERYWHERE = [Region("a", (Box(0, 0, 1, 1),))]
ERASURE = direction(11, 1.0)

Ours = Callable[[Setting, bool], Any]
"""Makes a guider for a setting: one that is plain by theory (False), or one that does something (True)."""


def _combine():
    return combiner(AVERAGING, [1.0, 1.0])


def _views(setting: Setting, does: bool) -> list[ViewPrompt]:
    views = [ViewPrompt(view_named("identity"), *setting.prompts()) for _ in range(2)]
    return [views[0], replace(views[1], view=view_named("rotate_180"))] if does else views


def _anagram(setting: Setting, does: bool):
    return ViewsGuider(setting.model, _views(setting, does), _combine(), CFG)


def _anagram_by_ksampler(setting: Setting, does: bool):
    model, positive, negative = with_views(setting.model, _views(setting, does), _combine())
    guider = plain(replace(setting, model=model))
    guider.set_conds(positive, negative)
    return guider


def _anti_segregation(setting: Setting, does: bool):
    """Views that show the same need no step, so plain is a step of no length."""
    step = gradient_step_of(AntiSegregation(0.5 if does else TINIEST))
    step = replace(step, loss=lambda maps: sum(m.square().sum((-2, -1)) for m in maps) + 1)
    return ViewsGuider(setting.model, _views(setting, False), _combine(), CFG, step)


def _concept(setting: Setting, does: bool) -> Concept:
    """The base itself; or other words under a LoRA on everything that reads or is attention."""
    tensors, draw = {}, torch.Generator().manual_seed(1)
    for key, weight in setting.model.model.state_dict().items():
        if key.endswith(".weight") and ("attn" in key or "ff." in key) and weight.ndim == 2:
            name, size = key.removesuffix(".weight"), 0.3 * does
            tensors[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=draw) * size
            tensors[f"{name}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=draw)
    positive, negative = [[text(1 if does else 0), WORDS]], [[text(99), {}]]
    return Concept("a", "a", LoraFile("a", tensors), 1.0, positive, negative)


PAPER = Conduct()


def _conductor(setting: Setting, does: bool, settings: Conduct = PAPER, layout: LayoutReference | None = None):
    concepts = [_concept(setting, does)]
    return ConductGuider(setting.model, BasePrompts(*setting.prompts(), CFG), concepts, EVERYWHERE, settings, layout)


def _conductor_refining(setting: Setting, does: bool):
    return _conductor(setting, does, Conduct(refine_start=0.0, refine_end=1.0))


def _conductor_with_layout(setting: Setting, does: bool):
    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    settings = Conduct(guidance_weight=0.04 if does else TINIEST**2, guidance_end=1.0, iterations=1)
    return _conductor(setting, does, settings, LayoutReference([[text(7), {}]], picture))


def _composer(setting: Setting, does: bool, **settings: Any):
    chosen = Compose(**{"enhancement": 0.0, "reinit": "off", **settings})
    coverage_at = None if settings else (lambda height, width: torch.ones(1, height, width))
    base = BasePrompts(*setting.prompts(), CFG)
    return ComposeGuider(setting.model, base, [_concept(setting, does)], coverage_at, chosen)


def _composer_enhanced(setting: Setting, does: bool):
    chosen = Compose(enhancement=0.05 if does else TINIEST**2, reinit="off", end=1.0)
    base = BasePrompts(*setting.prompts(), CFG)
    coverage = lambda height, width: torch.ones(1, height, width)  # noqa: E731
    return ComposeGuider(setting.model, base, [_concept(setting, does)], coverage, chosen)


def _objects_apart(setting: Setting, does: bool):
    return plain(replace(setting, model=with_suppression(setting.model, 1.0 if does else TINIEST, 0.0, 1.0)))


def _erasure(setting: Setting, does: bool, delivery: str):
    """The counterpart is plain sampling of edited words, so it does something either way."""
    return plain(replace(setting, model=apply_edit(setting.model, ERASURE, 1.0, delivery)))


@dataclass(frozen=True)
class Row:
    """One of ours.

    Attributes:
        edits: whether its counterpart is plain sampling of erased words.
        two_calls: whether there is no memory for one call.
    """

    make: Ours
    edits: bool = False
    two_calls: bool = False


OURS = {
    "Anagram Guider": Row(_anagram),
    "Anagram for KSampler": Row(_anagram_by_ksampler),
    "Anti-segregation": Row(_anti_segregation),
    "Concept Conductor": Row(_conductor),
    "Concept Conductor in two calls": Row(_conductor, two_calls=True),
    "Concept Conductor, refining": Row(_conductor_refining),
    "Concept Conductor with a layout": Row(_conductor_with_layout),
    "LoRA Composer": Row(_composer),
    "LoRA Composer, finding regions": Row(partial(_composer, automatic=0.3)),
    "LoRA Composer, enhancing": Row(_composer_enhanced),
    "Keep Objects Apart": Row(_objects_apart),
    "Apply Erasure in the weights": Row(partial(_erasure, delivery="weights"), edits=True),
    "Apply Erasure by text": Row(partial(_erasure, delivery="text"), edits=True),
}
"""By the name in the table."""
GRADIENTS = ("Anti-segregation", "Concept Conductor with a layout", "LoRA Composer, enhancing")
"""Those of them that take gradients."""
