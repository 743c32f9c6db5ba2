"""The types of the pack's wires. Saved workflows hold the strings: they never change."""

from __future__ import annotations

from ..host.schema import io

Concepts = io.Custom("CONCEPTS_CONCEPT")
Regions = io.Custom("CONCEPTS_REGION")
BoundingBoxes = io.Custom("BOUNDING_BOX")  # the host's own types, which older hosts lack
Elements = io.Custom("ARRAY")

AnagramViews = io.Custom("CONCEPTS_VIEW")
AnagramOptions = io.Custom("CONCEPTS_ANAGRAM_OPTIONS")
AnagramScores = io.Custom("CONCEPTS_SCORES")

ComposerOptions = io.Custom("CONCEPTS_COMPOSER_OPTIONS")

Layouts = io.Custom("CONCEPTS_LAYOUT")
ConductorOptions = io.Custom("CONCEPTS_CONDUCTOR_OPTIONS")

Edits = io.Custom("CONCEPTS_EDIT")
EraseList = io.Custom("CONCEPTS_ERASE_LIST")
PreserveList = io.Custom("CONCEPTS_KEEP_LIST")
EraseOptions = io.Custom("CONCEPTS_ERASE_OPTIONS")
TrainingOptions = io.Custom("CONCEPTS_TRAIN_OPTIONS")
