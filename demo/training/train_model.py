"""``dev.py train model``: trains one of the two demo models."""

from __future__ import annotations

import argparse

from . import train_dit, train_unet

TRAINERS = {"unet": train_unet.main, "dit": train_dit.main}


def main(arguments: list[str]) -> int:
    """Hands the other arguments to the trainer of the model that ``--model`` names."""
    parser = argparse.ArgumentParser(prog="dev.py train model", add_help=False, allow_abbrev=False)
    parser.add_argument("--model", choices=TRAINERS, default="unet")
    options, rest = parser.parse_known_args(arguments)
    return TRAINERS[options.model](rest)
