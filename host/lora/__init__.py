"""LoRA files, their branches in the host's layers, and LoRA export."""
