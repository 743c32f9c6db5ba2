"""What LoRA Composer and T2I-Zero need of the host."""
