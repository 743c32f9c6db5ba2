"""Concepts from a CLIP that carries hooks or a schedule: what one model call of all concepts cannot hold is refused."""

from __future__ import annotations

import comfy.hooks
import pytest
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from comfyui_concepts.host import keys
from comfyui_concepts.host.compose.guider import ComposeGuider
from comfyui_concepts.host.conduct.path_guider import PathGuider
from comfyui_concepts.host.engine.base_prompts import BasePrompts
from comfyui_concepts.host.lora.concept import Concept, make_concept
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.methods.compose.settings import Compose


def _hooked(clip, *, conds, schedule):
    """The CLIP after Set CLIP Hooks, with a LoRA that acts in the second half alone."""
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength, start))
    hooks.set_keyframes_on_hooks(frames)
    return SetClipHooks().apply_hooks(clip, schedule, conds, hooks)[0]


@pytest.mark.parametrize("word", ["lion", "<cat>"])
@pytest.mark.parametrize(
    ("conds", "schedule", "what"),
    [(True, False, "LoRA hooks"), (False, True, "a schedule"), (True, True, "a schedule")],
)
def test_a_clip_with_hooks_or_a_schedule_is_refused_for_concepts(demo_model, word, conds, schedule, what):
    """For learned words too, whose prompts are put together from one encoding per layer."""
    lora = LoraFile("ed", {}, embeddings={"<cat>": {"l": torch.ones(1, 64)}})
    clip = _hooked(demo_model[1], conds=conds, schedule=schedule)
    with pytest.raises(ValueError, match=rf"gives its prompt {what} \(Set CLIP Hooks\).*connect the checkpoint's CLIP"):
        make_concept(lora, 1.0, clip, f"a {word}", word, "")


def test_a_clip_whose_hooks_change_the_text_alone_encodes_concepts(demo_model):
    clip = _hooked(demo_model[1], conds=False, schedule=False)
    concept = make_concept(LoraFile("x", {}), 1.0, clip, "a lion", "lion", "")
    assert concept.positive[0][1][keys.PHRASE_POSITIONS] == (2,)


GUIDERS = {
    "conduct": lambda model, base, concepts: PathGuider(model, base, concepts, lambda height, width: None),
    "compose": lambda model, base, concepts: ComposeGuider(model, base, concepts, None, Compose()),
}


@pytest.mark.parametrize("guider", GUIDERS)
@pytest.mark.parametrize("side", ["positive", "negative"])
@pytest.mark.parametrize("kind", ["hooks", "a schedule"])
def test_concepts_made_elsewhere_with_either_are_refused_before_they_are_drawn(new_model, guider, side, kind):
    def prompt(*values):
        return [[torch.zeros(1, 7, 32), {keys.PHRASE_POSITIONS: (1,), **more}] for more in values or ({},)]

    times = [{"clip_start_percent": a, "clip_end_percent": b} for a, b in ((0.0, 0.5), (0.5, 1.0))]
    own = prompt({"hooks": comfy.hooks.create_hook_lora({}, 1.0, 1.0)}) if kind == "hooks" else prompt(*times)
    sides = {"positive": prompt(), "negative": prompt()} | {side: own}
    concept, base = Concept("c", "c", LoraFile("x", {}), 1.0, **sides), BasePrompts(prompt(), prompt(), 3.0)
    with pytest.raises(ValueError, match=f"the concept 'c' gives its prompt (LoRA )?{kind}"):
        GUIDERS[guider](new_model("EPS"), base, [concept])
