"""Concept Conductor (Yao et al., 2408.03632): several concepts in the layout of a reference."""
