"""What the paths need of their network: one file for UNets, one for transformers."""
