"""Several concepts in one picture: LoRA-Composer (2403.11627) and Multi-Concept T2I-Zero (2310.07419)."""
