"""What a user drags. A node declares its sockets, converts units, and makes one call."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    anagram,
    anagram_options,
    anagram_pictures,
    anagram_sampling,
    anagram_scores,
    compose,
    concept,
    conduct,
    demo,
    erase,
    erase_apply,
    erase_files,
    erase_train,
    erase_train_options,
    phrase,
    region,
    several,
)

NODES: tuple[type[io.ComfyNode], ...] = (
    *anagram.NODES,
    *anagram_sampling.NODES,
    *anagram_options.NODES,
    *phrase.NODES,
    *anagram_pictures.NODES,
    *anagram_scores.NODES,
    *concept.NODES,
    *conduct.NODES,
    *erase.NODES,
    *erase_apply.NODES,
    *erase_files.NODES,
    *erase_train.NODES,
    *erase_train_options.NODES,
    *region.NODES,
    *compose.NODES,
    *several.NODES,
    *demo.NODES,
)
"""Every node of the pack, in menu order."""


class ConceptsExtension(ComfyExtension):
    """The pack as the host sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)
