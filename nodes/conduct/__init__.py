"""Nodes that conduct concepts."""
