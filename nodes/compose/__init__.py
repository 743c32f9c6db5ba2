"""Nodes that compose concepts."""
