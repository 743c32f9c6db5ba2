"""Nodes that erase concepts."""
