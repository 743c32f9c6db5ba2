"""What the paths need of a network, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from ....methods.conduct.settings import Meeting
from ....methods.lora_tokens import TokenWeights
from ...engine.attention import Captured
from ...engine.attention_patches import OutputSite
from ...engine.model_call import ModelCall
from ...types import ModelOptions, TransformerOptions

Merge = Callable[[torch.Tensor, OutputSite, TransformerOptions], torch.Tensor]
Change = Callable[[torch.Tensor, OutputSite], torch.Tensor]


class Recorded(Protocol):
    """The attention between image tokens that one call has recorded, at ``grid``."""

    @property
    def grid(self) -> tuple[int, int]: ...
    def attention(self, rows: slice) -> torch.Tensor | None:
        """Of these rows, mean over heads, (rows, tokens, tokens). None where another node answered."""


class PathNetwork(Protocol):
    """What the paths need of a network. ``patch`` is the side of an image token in cells."""

    patch: int

    @property
    def network(self) -> torch.nn.Module: ...

    def whole_rows(self, count: int) -> TokenWeights | None:
        """The weights of a branch on whole rows of a call with that many; None where its first axis says them."""

    @property
    def guidance_site(self) -> Hashable:
        """The attention whose keys are aligned."""

    def enter(self, call: ModelCall) -> None:
        """Precedes a model call."""

    def routed(self, options: ModelOptions, merge: Merge, meeting: Meeting) -> ModelOptions:
        """A copy of the options under which ``merge`` gets the outputs of attentions, where patches say them."""

    def merging(self, change: Change, meeting: Meeting) -> AbstractContextManager[set[str]]:
        """Inside it, ``change`` gets all further outputs at which paths meet. Yields the places that have not run."""

    def capture(self, stop: bool) -> AbstractContextManager[Captured]:
        """Records the keys of the guidance site; ``stop`` ends the call there."""

    def recording(self, call: ModelCall) -> AbstractContextManager[tuple[ModelCall, Recorded]]:
        """Records the attention that masks are made of, in the call that it yields."""
