"""The nodes. Each declares its inputs and outputs, converts units, and makes one call."""

from __future__ import annotations

from ..host.schema import ComfyExtension, io
from . import concept, demo, phrase, region
from .anagram import options as anagram_options
from .anagram import pictures as anagram_pictures
from .anagram import sampling as anagram_sampling
from .anagram import scores as anagram_scores
from .anagram import views as anagram_views
from .compose import composer, objects
from .conduct import conductor
from .erase import apply as erase_apply
from .erase import concepts as erase_concepts
from .erase import files as erase_files
from .erase import solve as erase_solve
from .erase import train as erase_train
from .erase import train_options as erase_train_options

NODES: tuple[type[io.ComfyNode], ...] = (
    *anagram_views.NODES,
    *anagram_sampling.NODES,
    *anagram_options.NODES,
    *phrase.NODES,
    *anagram_pictures.NODES,
    *anagram_scores.NODES,
    *concept.NODES,
    *conductor.NODES,
    *erase_concepts.NODES,
    *erase_solve.NODES,
    *erase_apply.NODES,
    *erase_files.NODES,
    *erase_train.NODES,
    *erase_train_options.NODES,
    *region.NODES,
    *composer.NODES,
    *objects.NODES,
    *demo.NODES,
)
"""Every node of the pack, in menu order."""


class ConceptsExtension(ComfyExtension):
    """The pack as the host sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)
