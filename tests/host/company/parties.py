"""What other nodes bring to a sampling: each as a setting in which ours and the host's own guider are compared.

The model is small enough for hundreds of samplings: one level, one transformer block in each part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.samplers
import torch
import torch.distributed.tensor.experimental  # tracing imports it, which fails once tests/nodes is a module
from comfy.ldm.modules.attention import optimized_attention
from comfyui_concepts.host import keys
from comfyui_concepts.host.erase.apply import apply_edit
from comfyui_concepts.methods.compose.similarity import ObjectPositions
from comfyui_concepts.methods.erase.edit import Edit
from comfyui_concepts.methods.erase.lowrank import LowRank

from ..conftest import TINY_UNET, tiny_model

SMALL = {"num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1]}
WORDS = {keys.PHRASE_POSITIONS: (2, 3), keys.OBJECT_POSITIONS: ObjectPositions(((1,), (3, 4)), ((1, 6),))}
CFG = 4.0


def text(seed: int) -> torch.Tensor:
    """A prompt of seven tokens."""
    return torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed))


def direction(seed: int, size: float) -> Edit:
    """An erasure of two random directions of the text, ``size`` of them."""
    away = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(seed)))[0]
    return Edit(LowRank(-size * away, away.T.contiguous()))


@dataclass(frozen=True)
class Setting:
    """A model, and what the base's prompts carry besides their words: a table for each entry of both.

    ``edit`` changes the words for whoever has no other way to say it.
    """

    model: Any
    positive: tuple[dict, ...] = ({},)
    negative: tuple[dict, ...] = ({},)
    steps: int = 2
    edit: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda words: words)

    def prompts(self, **more: object) -> tuple[list, list]:
        """Positive and negative, with further values in each entry."""
        sides = ((0, self.positive), (99, self.negative))
        pair = [[[self.edit(text(seed)), {**WORDS, **e, **more}] for e in entries] for seed, entries in sides]
        return pair[0], pair[1]


def plain(setting: Setting) -> comfy.samplers.CFGGuider:
    """The host's own guider."""
    guider = comfy.samplers.CFGGuider(setting.model)
    guider.set_conds(*setting.prompts())
    guider.set_cfg(CFG)
    return guider


def sample(guider: comfy.samplers.CFGGuider, steps: int, batch: int = 1) -> torch.Tensor:
    """Pictures of eight by eight cells, after all steps but the last, which changes next to nothing."""
    noise = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps + 1)[:-1]
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)


def _compiled(model: Any) -> Setting:
    """Traced and not built; it has drawn something before, as in any session."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = model.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    sample(plain(Setting(compiled)), 1)
    return Setting(compiled)


def _step_cache(model: Any) -> Setting:
    from comfy_extras.nodes_easycache import EasyCacheNode

    return Setting(EasyCacheNode.execute(model.clone(), 3.0, 0.0, 0.95, False).args[0], steps=5)


def _node(module: str, name: str, *arguments: object) -> Callable[[Any], Setting]:
    def made(model: Any) -> Setting:
        node = getattr(__import__(f"comfy_extras.{module}", fromlist=[name]), name)
        return Setting(node.execute(model, *arguments).args[0])

    return made


def control_net(seed: int = 6) -> Any:
    """A ControlNet of the small UNet's shape, with random weights and a random hint."""
    unet = TINY_UNET | SMALL
    parts = {k: v for k, v in unet.items() if k not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(**parts, hint_channels=3, dtype=torch.float32, device="cpu")
    draw = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.08)
    net = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
    return net.copy().set_cond_hint(torch.rand(1, 3, 64, 64, generator=draw), 0.7)


def _controlled(model: Any) -> Setting:
    return Setting(model, ({"control": control_net(), "control_apply_to_uncond": True},))


def _scheduled(model: Any) -> Setting:
    """The first half under one ControlNet, the second under another."""
    first = {"control": control_net(6), "start_percent": 0.0, "end_percent": 0.5}
    second = {"control": control_net(7), "start_percent": 0.5, "end_percent": 1.0}
    return Setting(model, (first, second), steps=3)


def _combined(model: Any) -> Setting:
    return Setting(model, ({"control": control_net(6)}, {"control": control_net(7), "strength": 0.5}))


def _inpainting(_: Any) -> Setting:
    """What InpaintModelConditioning writes into both prompts."""
    model = tiny_model("EPS", unet=TINY_UNET | SMALL | {"in_channels": 9})
    model.model.set_inpaint()
    draw = torch.Generator().manual_seed(3)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    values = {"concat_latent_image": 5 * torch.randn(1, 4, 8, 8, generator=draw), "concat_mask": mask}
    return Setting(model, (values,), (values,))


def _text_patch(model: Any) -> Setting:
    """A patch of the text that reads the picture's tokens, too."""
    patched = model.clone()
    patched.set_model_attn2_patch(lambda n, c, v, extra: (n, c.flip(-1) * (1 + n.mean((1, 2), keepdim=True)), v * 0.5))
    return Setting(patched)


def _image_prompt(model: Any) -> Setting:
    """A second attention to a picture's tokens, other ones for negatives, in the host's single slot."""
    draw = torch.Generator().manual_seed(8)
    tokens = torch.randn(1, 4, 32, generator=draw), torch.randn(1, 4, 32, generator=draw)

    def replaced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict) -> torch.Tensor:
        told, heads = extra["cond_or_uncond"], extra["n_heads"]
        picture = torch.cat([tokens[side].repeat(len(q) // len(told), 1, 1) for side in told])
        return optimized_attention(q, k, v, heads) + optimized_attention(q, picture, picture, heads)

    patched = model.clone()
    patched.set_model_attn2_replace(replaced, "middle", 0)
    return Setting(patched)


def _hooked(model: Any) -> Setting:
    """A LoRA of the positive's own, as the host's Create Hook LoRA and Cond Set Props make it.

    On a layer that reads the picture: one that reads the text would read it unedited beside an erasure in the weights.
    """
    draw, layer = torch.Generator().manual_seed(7), "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q"
    factors = {
        f"{layer}.lora_up.weight": torch.randn(32, 4, generator=draw),
        f"{layer}.lora_down.weight": torch.randn(4, 32, generator=draw),
    }
    conds = comfy.hooks.set_hooks_for_conditioning([[text(0), {}]], comfy.hooks.create_hook_lora(factors, 1.0, 1.0))
    return Setting(model.clone(), ({"hooks": conds[0][1]["hooks"]},))


def _erased_text(model: Any) -> Setting:
    return Setting(apply_edit(model, direction(4, 1.0), 1.0, "text"))


COMPANY: dict[str, Callable[[Any], Setting]] = {
    "TorchCompileModel": _compiled,
    "EasyCache": _step_cache,
    "ControlNet": _controlled,
    "scheduled prompts": _scheduled,
    "combined prompts": _combined,
    "inpaint model": _inpainting,
    "Self-Attention Guidance": _node("nodes_sag", "SelfAttentionGuidance", 0.5, 2.0),
    "Perturbed-Attention Guidance": _node("nodes_pag", "PerturbedAttentionGuidance", 3.0),
    "attn2_patch": _text_patch,
    "image prompt": _image_prompt,
    "LoRA hooks": _hooked,
    "erasure by text": _erased_text,
}
"""Whoever comes along, by the name in the table; each makes a setting of a small model."""
