"""The guider that samples several concepts, each with its own LoRA, in one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...methods.conduct.settings import WHO
from ...methods.lora import LayerLoras
from ...methods.masks import MaskPyramid
from ...methods.panels import AttentionSnapshot, Panel, attention_panels, concept_panels
from .. import keys
from ..engine.base_prompts import BasePrompts, numbered, own_controls, with_words_of
from ..engine.guider import RunGuider, Sampling
from ..engine.model_call import with_evaluation
from ..engine.preview import Painter
from ..engine.reach import check_reaches_network
from ..lora.branches import prepared
from ..lora.concept import Concept, check_concept_prompts, check_layers
from ..lora.factors import network_factors
from ..registry import architecture_of
from ..types import BaseModel, Conds, EvaluationArguments, ModelOptions, ModelPatcher
from .paths import ConceptPath, Paths


@dataclass(eq=False)
class PathRun:
    """One sampling with paths, and what happens around each of its predictions; here, nothing."""

    paths: Paths

    def before(self, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions) -> torch.Tensor:
        """The latent to predict at."""
        return x

    def needs_concepts(self) -> bool:
        """Whether the prediction that follows has concepts in it, or in its masks. Otherwise it is the base's alone."""
        return True

    def after(self, x: torch.Tensor, sigma: torch.Tensor) -> None:
        """Follows a prediction with concepts at ``x``."""

    def attention(self) -> AttentionSnapshot | None:
        """The concepts' attention when it was last recorded."""
        return None

    def masks_like(self, x: torch.Tensor) -> torch.Tensor:
        """The masks at the grid of latents ``x``, background first, (batch, 1 + concepts, height, width) on the CPU."""
        masks = self.paths.merging.masks.at(*x.shape[-2:])
        return (masks if masks.ndim == 4 else masks.expand(len(x), *masks.shape)).detach().cpu().float()


class PathGuider(RunGuider[PathRun]):
    """Samples with a path for each concept. Without any, it is the host's own guider.

    Args:
        masks_for: the masks of all concepts for a latent of (height, width).
    """

    def __init__(
        self,
        model: ModelPatcher,
        base: BasePrompts,
        concepts: Sequence[Concept],
        masks_for: Callable[[int, int], MaskPyramid],
    ) -> None:
        super().__init__(model, base.cfg, keys.PATHS, 1 + len(concepts))
        self.inner_set_conds(base.checked())
        check_concept_prompts(concepts)
        if concepts:
            check_layers(concepts, model.model)
        self.concepts, self.masks_for = tuple(concepts), masks_for
        if self.concepts:
            self._set_concepts(base)

    def _set_concepts(self, base: BasePrompts) -> None:
        """Each concept's entries are the base's with its own words."""
        positive, negative = (numbered(conds) for conds in own_controls(base.positive, base.negative))
        self.inner_set_conds({"positive": positive, "negative": negative})
        for number, concept in enumerate(self.concepts):
            own = with_words_of(positive, concept.positive, "positive")
            against = with_words_of(negative, concept.negative, "negative")
            self.inner_set_conds({f"positive {number}": own, f"negative {number}": against})

    def is_plain(self) -> bool:
        return not self.concepts

    def begin(self, sampling: Sampling) -> PathRun:
        return PathRun(self.new_paths(sampling.noise))

    def new_paths(self, x: torch.Tensor) -> Paths:
        """All paths for one sampling of a latent like ``x``. The conditionings are processed by now."""
        model = self.inner_model
        check_reaches_network(model.current_patcher, WHO)
        dtype = model.manual_cast_dtype or model.get_dtype()
        factors = [prepared(_factors_of(concept, model), x.device, dtype) for concept in self.concepts]
        base, *others = self.path_conds()
        paths = [
            ConceptPath(*conds, own, concept.strength)
            for conds, own, concept in zip(others, factors, self.concepts, strict=True)
        ]
        return Paths(model, [ConceptPath(*base), *paths], self.masks_for(*x.shape[-2:]))

    def path_conds(self) -> list[tuple[Conds, Conds]]:
        """The processed positive and negative of the base and each concept."""
        ends = ["", *(f" {number}" for number in range(len(self.concepts)))]
        return [(self.conds[f"positive{end}"], self.conds[f"negative{end}"]) for end in ends]

    def predict(
        self, run: PathRun, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions, seed: int | None
    ) -> torch.Tensor:
        x = run.before(x, sigma, options)
        if not run.needs_concepts():
            return self.guided(x, sigma, options, seed)

        def all_paths(args: EvaluationArguments) -> list[torch.Tensor]:
            return run.paths.predict(args["input"], args["sigma"], options, negative=args["conds"][1] is not None)

        # patches that run after guidance get options under which rows of ours still take their paths
        routed = with_evaluation(run.paths.routed(options), all_paths)
        out = self.guided(x, sigma, routed, seed)
        run.after(x, sigma)
        return out

    def panels(self, run: PathRun, x0: torch.Tensor, paint: Painter) -> list[Panel]:
        """The picture under the masks of all concepts and of each one, and below it their attention if recorded."""
        picture, names, attention = paint(x0), [concept.phrase for concept in self.concepts], run.attention()
        panels = concept_panels(picture, first_masks(run.paths.merging.masks, *x0.shape[-2:]), names)
        return panels if attention is None else [*panels, *attention_panels(picture, attention, names)]

    def attention(self) -> AttentionSnapshot | None:
        """The concepts' attention when it was last recorded; None outside of a sampling."""
        return None if self.run is None else self.run.attention()


def _factors_of(concept: Concept, model: BaseModel) -> LayerLoras:
    """The concept's factors by layer of the network.

    Raises:
        ValueError: some are of layers that run before any model call.
    """
    factors, architecture = network_factors(concept.lora, model), architecture_of(model)
    if early := next((layer for layer in factors if architecture.before_call(layer)), None):
        raise architecture.lacks(
            f"The part of the LoRA '{concept.name}' on '{early}', which prepares the prompts,", "use a LoRA without it"
        )
    return factors


def first_masks(masks: MaskPyramid, height: int, width: int) -> torch.Tensor:
    """The masks of the first picture's concepts, without the background, (concepts, height, width)."""
    at = masks.at(height, width)
    return (at if at.ndim == 3 else at[0])[1:]
