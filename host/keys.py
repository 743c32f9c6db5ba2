"""Every key under which the pack adds something to the host: wrappers, transformer options, entries of a conditioning.

One ledger: no two notions share a key, and a search for a constant finds who writes it and who reads it. No key is
written into files.
"""

from __future__ import annotations

# wrappers and additional models on a patcher or on model options
VIEWS = "concepts.views"
PATHS = "concepts.paths"
COMPOSER = "concepts.composer"
CONCEPT_WORDS = "concepts.concept_words"
SUPPRESSION = "concepts.suppression"
EQUAL_LENGTHS = "concepts.equal_lengths"
PIXEL_SYNC = "concepts.pixel_sync"
ERASE = "concepts.erase"
ATTENTION = "concepts.attention"
ANTI_SEGREGATION = "concepts.anti_segregation"
AUXILIARY_MODELS = "concepts.auxiliary_models"

# transformer options of the host's own
ATTENTION_OVERRIDE = "optimized_attention_override"
"""A single function that stands around every attention; whoever sets it calls the one that was there."""

# the model options of one sampling (model patch of anagrams)
ANAGRAM_RUN = "concepts_anagram_run"
"""What one sampling of an anagram works with (``anagram.guidance.AnagramRun``)."""

# transformer options of one model call
PATH_ROWS = "concepts_path_rows"
"""The path of every row of the batch, and whether it is positive or negative (``conduct.paths``)."""
CONCEPT_COND_OR_UNCOND = "concepts_sides"
"""While concepts are active: 0 (positive) or 1 (negative) for every entry of the batch (``compose.injection``)."""
BASE_WEIGHT = "concepts_base_weight"
"""While concepts are active: a function (height, width) to (tokens,), the base prompt's weight for each image token."""

# values of a conditioning entry
PHRASE_POSITIONS = "concepts_phrase"
"""Token positions of the phrase, (number, …)."""
OBJECT_POSITIONS = "concepts_objects"
"""Token positions of every object of the prompt (``methods.compose.similarity.ObjectPositions``)."""
WORDS_MOVED = "concepts_words_moved"
"""By how many tokens an entry's words have moved where it was made as long as others (``text.equal_lengths``)."""
LAYER_CONTEXTS = "concepts_layers"
"""A context for each cross-attention layer, (layers, tokens, channels) (ED-LoRA)."""
ENTRY_NUMBER = "concepts_entry"
"""Which entry of a concept goes with an entry of the base (``engine.base_prompts``)."""
VIEW_INDEX = "concepts_view"
"""The view that the entry describes (model patch of anagrams)."""
PROMPT_TYPE = "concepts_side"
"""The name of the entry's prompt in its guider; for entries without the host's ``prompt_type``
(``compose.suppression``)."""
