"""Concepts for ComfyUI: compose, conduct, anagram and erase concepts on the models the host has loaded."""

from __future__ import annotations

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The host calls this once to learn the pack's nodes."""
    from .nodes import ConceptsExtension

    return ConceptsExtension()
