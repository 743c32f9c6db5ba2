"""Nodes of anagrams."""
