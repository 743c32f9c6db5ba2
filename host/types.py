"""The host's types as the pack uses them: the values it passes around, and protocols for its objects.

The protocols list only what the pack calls. They serve annotations: nothing checks an object against them at run time.
A UNet is annotated with the host's own ``UNetModel``, the id of a conditioning entry with ``uuid.UUID``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypedDict
from uuid import UUID

import torch

Options: TypeAlias = dict[str, Any]
"""A table of the host whose values are of any kind."""

ModelOptions: TypeAlias = Options
"""The options of a model and its sampling. ``transformer_options`` is one of its entries."""

TransformerOptions: TypeAlias = Options
"""The options of one model call: patches, wrappers, ``uuids`` and ``cond_or_uncond`` of its rows. The host passes the
same dictionary, with the block's name, to patches as ``extra_options``."""

CondEntry: TypeAlias = Options
"""One entry of a conditioning inside a sampling; ``entry["uuid"]`` is its id."""

Conds: TypeAlias = list[CondEntry]
"""One conditioning as the sampler holds it."""

Conditioning: TypeAlias = list[list[Any]]
"""A CONDITIONING as it travels on a wire: a list of ``[context, values]``."""

Tokens: TypeAlias = dict[str, list[list[tuple[Any, ...]]]]
"""Each text encoder's tokens, in sections: ``(token, weight, …)``, where a token is a number or an embedding vector."""

StepCallback: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor, int], object]
"""A guider's callback: step, clean latents, noisy latents, number of steps."""

SamplerCallback: TypeAlias = Callable[[Options], object]
"""The callback of a sampler's function (k-diffusion): ``i``, ``x``, ``denoised``, …"""

Wrapper: TypeAlias = Callable[..., Any]
"""A wrapper as the host calls it: an ``Executor`` first, then the arguments of the wrapped function."""

HookInputs: TypeAlias = tuple[torch.Tensor, ...]
"""The positional inputs of a module, as torch passes them to its hooks."""


class Executor(Protocol):
    """What a wrapper is handed: calling it runs the next wrapper, or the wrapped function. ``class_obj`` owns that
    function."""

    class_obj: Any

    __call__: Callable[..., Any]


class EvaluationArguments(TypedDict):
    """What the host passes to the function in its single slot, ``sampler_calc_cond_batch_function``."""

    conds: list[Conds | None]
    input: torch.Tensor
    sigma: torch.Tensor
    model: BaseModel
    model_options: ModelOptions


class WeightedLayer(Protocol):
    """A layer of a network that has a weight, of whatever class: the host's, or one of another pack."""

    weight: torch.Tensor


class Convolution(WeightedLayer, Protocol):
    """A convolution over two or three axes."""

    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]


Norm: TypeAlias = torch.nn.LayerNorm | torch.nn.GroupNorm | torch.nn.RMSNorm
"""A norm with a weight. The host's own are subclasses."""


class HasModules(Protocol):
    """Anything with torch modules inside: the host's models, text encoders, a plain module."""

    def modules(self) -> Iterator[torch.nn.Module]: ...


class ModelSampling(Protocol):
    """How a model is noised: its schedule and the formulas of its prediction."""

    def percent_to_sigma(self, percent: float) -> float: ...
    def calculate_denoised(self, sigma: torch.Tensor, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor: ...
    def noise_scaling(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, max_denoise: bool
    ) -> torch.Tensor: ...


class BaseModel(HasModules, Protocol):
    """The host's model: the network (``diffusion_model``) with all that a prediction needs. Nodes hold it in a
    patcher."""

    diffusion_model: Any
    model_sampling: ModelSampling
    model_config: Any
    manual_cast_dtype: torch.dtype | None
    latent_format: Any
    current_patcher: ModelPatcher
    """Who samples the model at the moment. Only while it samples."""
    extra_conds: Callable[..., Options]

    def get_dtype(self) -> torch.dtype: ...
    def memory_required(
        self, input_shape: Sequence[int], cond_shapes: Mapping[str, Sequence[object]] = ...
    ) -> float: ...
    def process_latent_in(self, latent: torch.Tensor) -> torch.Tensor: ...
    def process_latent_out(self, latent: torch.Tensor) -> torch.Tensor: ...
    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]: ...
    def state_dict(self) -> dict[str, torch.Tensor]: ...
    def _apply_model(self, x: torch.Tensor, t: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor: ...


class ModelPatcher(Protocol):
    """A MODEL on a wire: the host's model with its patches and options. Clones share the weights."""

    model: BaseModel
    model_options: ModelOptions
    load_device: torch.device
    patches_uuid: UUID
    patches: dict[str, list[Any]]
    backup: dict[str, Any]
    """What patched weights were before, by key, while the model is loaded."""
    hook_backup: dict[str, Any]
    """The same of weights that hooks patch."""
    forced_hooks: Any
    """The hooks that a text encoder always has (Set CLIP Hooks)."""
    injections: dict[str, list[Any]]
    """What other nodes put into the model while it is loaded."""

    def clone(self) -> ModelPatcher: ...
    def get_model_object(self, name: str) -> Any: ...
    def model_state_dict(self) -> dict[str, torch.Tensor]: ...
    def add_patches(self, patches: Mapping[Any, object], strength_patch: float = ...) -> Collection[object]: ...
    def set_model_attn2_patch(self, patch: Callable[..., object]) -> None: ...
    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Wrapper) -> None: ...
    def set_additional_models(self, key: str, models: list[ModelPatcher]) -> None: ...
    def get_nested_additional_models(self) -> list[ModelPatcher]: ...
    def get_non_dynamic_delegate(self) -> ModelPatcher: ...  # newer hosts


class TextEncoder(HasModules, Protocol):
    """The network inside a CLIP: one text encoder or several."""

    def reset_clip_options(self) -> None: ...
    def set_clip_options(self, options: Options) -> None: ...
    def encode_token_weights(self, tokens: Tokens) -> tuple[Any, ...]: ...
    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]: ...
    def named_children(self) -> Iterator[tuple[str, torch.nn.Module]]: ...


class Tokenizes(Protocol):
    """What tokenizes prompts for one or more text encoders."""

    tokenizer: Any

    def tokenize(self, text: str, **options: object) -> Tokens: ...


class CLIP(Tokenizes, Protocol):
    """A CLIP on a wire: tokenizer and text encoder."""

    cond_stage_model: TextEncoder
    patcher: ModelPatcher
    layer_idx: int | None
    use_clip_schedule: bool

    def clone(self) -> CLIP: ...
    def encode_from_tokens(self, tokens: Tokens, return_pooled: bool | str = ...) -> Any: ...
    def encode_from_tokens_scheduled(self, tokens: Tokens) -> Conditioning: ...
    def add_patches(self, patches: Mapping[Any, object], strength_patch: float = ...) -> Collection[object]: ...


class ClipVision(Protocol):
    """A CLIP_VISION on a wire."""

    def encode_image(self, image: torch.Tensor, crop: bool = ...) -> Mapping[str, Any]: ...


class VAE(Protocol):
    """A VAE on a wire."""

    patcher: ModelPatcher

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor: ...
    def decode(self, samples_in: torch.Tensor) -> torch.Tensor: ...
    def spacial_compression_encode(self) -> int: ...


class Sampler(Protocol):
    """A SAMPLER on a wire. One made of a k-diffusion function also has ``sampler_function``."""

    extra_options: Options
    inpaint_options: Options


class Guider(Protocol):
    """A GUIDER while it samples. ``conds`` holds its processed conditionings, by name."""

    inner_model: BaseModel
    model_patcher: ModelPatcher
    model_options: ModelOptions
    conds: dict[str, Conds]
    cfg: float
