"""The bundled demo models as the MODEL, CLIP and VAE of ordinary host nodes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch

from . import architecture
from .autoencoder import Autoencoder, latent_rgb_factors
from .files import FOLDER, does_not_fit, load_strictly, read_weights

SIDE = 128  # px, of the canvas that both were trained on
CANVAS = {"unet": (64, 256), "dit": (96, 256)}
"""The smallest and the largest side of a canvas in px, by the kind of demo model. Both were trained on 128 × 128 and on
192 × 128."""

_TO_ENTER = {
    "unet": "128",
    "dit": "128, or to 256 on older hosts, whose cells of 8 px are twice as wide as this model's",
}
"""What to enter for the canvas that each was trained on."""

_TOKEN_KEY = "text_model.embeddings.token_embedding.weight"
_POSITION_KEY = "text_model.embeddings.position_embedding.weight"


class DemoLatents(comfy.latent_formats.LatentFormat):
    """Latents of the demo autoencoder: 4 channels, unscaled; the first three are the colours of the cells."""

    latent_channels = architecture.LATENTS["unet"].channels
    scale_factor = 1.0

    def __init__(self) -> None:
        self.latent_rgb_factors, self.latent_rgb_factors_bias = latent_rgb_factors()
        self.taesd_decoder_name = None


class SharpDemoLatents(DemoLatents):
    """The same with four times as many cells. Newer hosts enlarge an Empty Latent Image by what is said here."""

    latent_channels = architecture.LATENTS["dit"].channels
    spacial_downscale_ratio = architecture.LATENTS["dit"].factor


class DemoSD(comfy.supported_models_base.BASE):
    """The demo model as a member of the SD 1 family."""

    unet_config = architecture.UNET
    unet_extra_config = {"num_heads": -1, "num_head_channels": architecture.UNET["num_head_channels"]}
    latent_format = DemoLatents
    sampling_settings = architecture.SCHEDULE
    memory_usage_factor = 1.0

    def model_type(self, state_dict: dict[str, torch.Tensor], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.V_PREDICTION


class DemoDiT(comfy.supported_models_base.BASE):
    """The demo transformer as a member of the family of Lumina 2 and Z-Image."""

    unet_config = architecture.DIT
    unet_extra_config: dict[str, Any] = {}
    latent_format = SharpDemoLatents
    sampling_settings = architecture.FLOW
    memory_usage_factor = 1.0

    def get_model(
        self, state_dict: dict[str, torch.Tensor], prefix: str = "", device: Any = None
    ) -> comfy.model_base.Lumina2:
        return comfy.model_base.Lumina2(self, device=device)


class _Kind(NamedTuple):
    """One of the demo models: the host's description, the network's sizes, the rows of text it reads, and the file of
    its decoder."""

    description: type[comfy.supported_models_base.BASE]
    config: dict[str, Any]
    text_rows: int
    decoder: str


KINDS = {
    "unet": _Kind(DemoSD, architecture.UNET, architecture.TEXT["max_position_embeddings"], "decoder"),
    "dit": _Kind(DemoDiT, architecture.DIT, architecture.TEXT_ROWS, "dit-decoder"),
}
"""The demo models by the names of their files."""


class _TextEncoder(comfy.sd1_clip.SDClipModel):
    def __init__(
        self, device: str = "cpu", dtype: torch.dtype | None = None, model_options: dict | None = None
    ) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options or {},
            textmodel_json_config=dict(architecture.TEXT),
            return_projected_pooled=False,
        )


class _ClipModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(
        self, device: str = "cpu", dtype: torch.dtype | None = None, model_options: dict | None = None
    ) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=_TextEncoder)


class _BytePairs(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None) -> None:
        super().__init__(
            embedding_directory=embedding_directory,
            tokenizer_data=tokenizer_data or {},
            embedding_size=architecture.TEXT["hidden_size"],
        )


class _Tokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None) -> None:
        super().__init__(
            embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, tokenizer=_BytePairs
        )


class _Target:
    clip, tokenizer = _ClipModel, _Tokenizer
    params: dict[str, Any] = {}


def load_demo_model(folder: Path = FOLDER, kind: str = "unet") -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of the bundled weights. ``kind``: a name of ``KINDS``.

    Built outside inference mode: its weights are ordinary tensors whoever calls this.

    Raises:
        RuntimeError: a file is missing or damaged; the message says how to get it back.
    """
    files = [read_weights(folder / f"{name}.safetensors") for name in (kind, "text", KINDS[kind].decoder)]
    with torch.inference_mode(False), torch.no_grad():
        return _load_model(files[0], kind), _load_clip(files[1], KINDS[kind].text_rows), _load_vae(files[2], kind)


def empty_latent(kind: str = "unet") -> torch.Tensor:
    """The latent of an empty canvas of 128 × 128 px, (1, 4, h, w)."""
    channels, factor = architecture.LATENTS[kind]
    return torch.zeros(1, channels, SIDE // factor, SIDE // factor)


def _load_model(weights: dict[str, torch.Tensor], kind: str) -> comfy.model_patcher.ModelPatcher:
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    config = KINDS[kind].description(dict(KINDS[kind].config))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=offload)
    unused = {k: v for k, v in model.diffusion_model.state_dict().items() if k in architecture.UNUSED}
    load_strictly(model.diffusion_model, unused | {k: v.float() for k, v in weights.items()}, kind)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)
    wrapper = partial(_check_run, kind)
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "concepts.demo", wrapper)
    return patcher


def _check_run(kind: str, executor: Any, noise: torch.Tensor, latent: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Refuses what would end in a smear or in a line of the host's log, in a sentence, before the first step."""
    _check_canvas(kind, *(side * architecture.LATENTS[kind].factor for side in latent.shape[-2:]))
    _check_loras(executor.class_obj.model_patcher)
    return executor(noise, latent, *args, **kwargs)


def _check_canvas(kind: str, height: int, width: int) -> None:
    smallest, largest = CANVAS[kind]
    if all(smallest <= side <= largest for side in (height, width)):
        return
    raise ValueError(
        f"The demo model draws pictures of 128 × 128 (or 192 × 128), and this canvas is {width} × {height}; set width "
        f"and height in Empty Latent Image to {_TO_ENTER[kind]} (it takes {smallest} to {largest}). If they "
        "come from Region Editor, set them there."
    )


def _check_loras(patcher: Any) -> None:
    """Refuses a LoRA of another model of the family: its layers have the same names, so the host only logs what does
    not fit. A part of a fused layer, such as q of qkv, has an offset: axis, start, length."""
    state = patcher.model_state_dict()
    for key, patches in patcher.patches.items():
        for _strength, adapter, _model_strength, offset, *_ in patches:
            factors: list[Any] = list(getattr(adapter, "weights", ())[:2])
            if len(factors) < 2 or not all(isinstance(f, torch.Tensor) for f in factors):
                continue
            rows = offset[2] if offset else state[key].shape[0]
            made, wanted = (factors[0].shape[0], factors[1][0].numel()), (rows, state[key][0].numel())
            if made != wanted:
                raise ValueError(
                    f"A LoRA loaded onto the demo model was made for another model: it changes {made[0]} × {made[1]} "
                    f"values of '{key}', which has {wanted[0]} × {wanted[1]}; take one named concepts-demo-…, or load "
                    "the checkpoint it was made for."
                )


def _load_clip(weights: dict[str, torch.Tensor], rows: int) -> comfy.sd.CLIP:
    """The text encoder for prompts of so many tokens; longer ones are encoded in pieces of that length.

    It is causal, so its first rows are the same whatever the length.
    """
    clip = comfy.sd.CLIP(
        _Target,
        parameters=1,
        model_options={"dtype": torch.float32, "clip_l_model_config": {"max_position_embeddings": rows}},
        tokenizer_data={"clip_l_max_length": rows},
    )
    table = architecture.untrained_rows()
    rest = {k: v.float() for k, v in weights.items() if k not in ("token_ids", "token_rows")}
    try:
        table[weights["token_ids"].long()] = weights["token_rows"].float()
        rest[_POSITION_KEY] = rest[_POSITION_KEY][:rows]
    except (KeyError, IndexError, RuntimeError) as error:
        raise does_not_fit("text") from error
    load_strictly(clip.cond_stage_model.clip_l.transformer, rest | {_TOKEN_KEY: table}, "text")
    return clip


def _load_vae(weights: dict[str, torch.Tensor], kind: str) -> comfy.sd.VAE:
    # the host builds a VAE object around a network it knows; its smallest one is then exchanged for ours
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    autoencoder = Autoencoder(kind).train(False)
    load_strictly(autoencoder.decoder, {k: v.float() for k, v in weights.items()}, KINDS[kind].decoder)
    vae.first_stage_model = autoencoder.to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.latent_channels, factor = architecture.LATENTS[kind]
    vae.downscale_ratio = vae.upscale_ratio = factor
    # bytes of the widest activations: 80 channels at half the picture's resolution, a few alive at once
    vae.memory_used_decode = lambda shape, dtype: shape[2] * shape[3] * factor**2 * 160 * 4
    vae.memory_used_encode = lambda shape, dtype: shape[2] * shape[3] * factor**2
    return vae
