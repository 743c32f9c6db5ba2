"""Concept erasure in closed form: one d × d map on text embeddings, shared by every cross-attention of a model."""
