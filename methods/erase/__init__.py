"""Erasing a concept from a model."""
