"""Every key under which the pack hangs something on the host: wrappers, transformer options, entries of a conditioning.

One ledger, so that no two notions share a key and a reader finds both ends of it. None of them is written into files.
"""

from __future__ import annotations

# wrappers and additional models on a patcher or on model options
VIEWS = "concepts.views"
PATHS = "concepts.paths"
COMPOSER = "concepts.composer"
SUPPRESSION = "concepts.suppression"
PIXEL_SYNC = "concepts.pixel_sync"
ERASE = "concepts.erase"
ATTENTION = "concepts.attention"
ANTI_SEGREGATION = "concepts.anti_segregation"
AUXILIARY_MODELS = "concepts.auxiliary_models"

# the model options of one sampling (model patch of anagrams)
ANAGRAM_RUN = "concepts_anagram_run"
"""What one sampling of an anagram works with (``anagram.guidance.AnagramRun``)."""

# transformer options of one model call
PATH_ROWS = "concepts_path_rows"
"""The path and side of every row of the batch (``conduct.paths``)."""
CONCEPT_SIDES = "concepts_sides"
"""0 (positive) or 1 (negative) for every entry of the batch, while concepts stand in regions
(``compose.injection``)."""
BASE_WEIGHT = "concepts_base_weight"
"""While concepts are active: a function (height, width) to (tokens,), the base prompt's weight for each image token."""

# values of a conditioning entry
PHRASE_POSITIONS = "concepts_phrase"
"""Token positions of the phrase, (number, …)."""
OBJECT_POSITIONS = "concepts_objects"
"""Token positions of every object of the prompt (``methods.compose.similarity.ObjectPositions``)."""
LAYER_CONTEXTS = "concepts_layers"
"""A context for each cross-attention layer, (layers, tokens, channels) (ED-LoRA)."""
VIEW_INDEX = "concepts_view"
"""The view that the entry describes (model patch of anagrams)."""
PROMPT_SIDE = "concepts_side"
"""The name under which the sampler holds the entry, where the host has not said it (``compose.suppression``)."""
