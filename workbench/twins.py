"""The twins of the graphs for the user's own checkpoints. ``dev.py workflows`` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gallery import CHECKPOINTS
from .public_models import ANIMA, FLUX, KLEIN, KREA_2, QWEN_IMAGE, SD15, SDXL, Z_IMAGE
from .twin import Twin, text_of


def _prompts(*texts: str, first: int = 2) -> dict[tuple[str, str], Any]:
    return {(str(first + at), "text"): text for at, text in enumerate(texts)}


def _sampled_as_usual(*samplers: str) -> dict[tuple[str, str], Any]:
    """Steps and cfg of these KSamplers, as people set them for their own checkpoints."""
    return {(node, name): value for node in samplers for name, value in (("steps", 25), ("cfg", 7.0))}


def _two_loras(at: str, first: str, second: str, prompts: Sequence[str]) -> dict[tuple[str, str], Any]:
    """Nodes 4 and 5, the concepts: the user's LoRAs in place of the demo's."""
    return {
        ("4", "lora"): "my_first_concept.safetensors",
        ("4", "phrase"): first,
        ("4", "prompt"): prompts[0] + at,
        ("5", "lora"): "my_second_concept.safetensors",
        ("5", "phrase"): second,
        ("5", "prompt"): prompts[1] + at,
    }


def _both_places(at: str, first: str, second: str) -> dict[tuple[str, str], Any]:
    """As Concept Conductor takes them: each concept's prompt has it at both places."""
    prompts = tuple(f"a photo of {phrase} on the left and {phrase} on the right" for phrase in (first, second))
    return _two_loras(at, first, second, prompts)


_PAINTINGS = _prompts("an oil painting of a snowy mountain village", "an oil painting of a horse") | {
    ("11", "amount"): 1,
}
_PETS = "a photo of a dog on the left and a cat on the right, a meadow"
_ONE_PET_EACH = _two_loras(
    ", a meadow",
    "my dog",
    "my cat",
    ("a photo of my dog on the left and a cat on the right", "a photo of a dog on the left and my cat on the right"),
)
_PETS_IN_REGIONS = _prompts("a photo of a meadow") | _ONE_PET_EACH | {("9", "amount"): 1, ("12", "steps"): 20}
_TWO_THINGS = _prompts("a photo of a cat, a meadow", "a photo of a basket of strawberries, a meadow") | {
    ("12", "cfg"): 7.0
}
_TRAINING = {
    ("4", "batch_size"): 1,
    ("7", "trajectories"): 0,
    ("7", "steps"): 0,
    ("8", "iterations"): 0,
    ("8", "rate"): 0.0002,
    ("8", "rank"): 16,
    ("11", "steps"): 25,
    ("11", "cfg"): 7.0,
}

TWINS = {
    "demo_first_picture_sd15": Twin(
        "demo_first_picture",
        SD15,
        _prompts("a photo of a cat in a garden") | {("4", "batch_size"): 1} | _sampled_as_usual("5"),
    ),
    "demo_two_objects_sdxl": Twin(
        "demo_two_objects", SDXL, _prompts(_PETS) | {("4", "batch_size"): 1} | _sampled_as_usual("5")
    ),
    "anagram_choose_best_sd15": Twin(
        "anagram_choose_best",
        SD15,
        _prompts("an oil painting of a vase with flowers", "an oil painting of a portrait of a woman")
        | {("9", "steps"): 30, ("9", "cfg"): 8.0, ("13", "captions"): "a vase with flowers\na portrait of a woman"},
        left_out=("11",),  # the judge
    ),
    "anagram_turn_sdxl": Twin(
        "anagram_turn",
        SDXL,
        _prompts("an oil painting of a snowy mountain village", "an oil painting of a horse")
        | {("11", "batch_size"): 2},
    ),
    "anagram_transformer_z_image": Twin(
        "anagram_transformer", Z_IMAGE, _PAINTINGS | {("7", "cfg"): 4.0, ("10", "steps"): 25}
    ),
    "anagram_transformer_flux": Twin("anagram_transformer", FLUX, _PAINTINGS | {("7", "cfg"): 1.0}),
    "anagram_transformer_qwen_image": Twin("anagram_transformer", QWEN_IMAGE, _PAINTINGS | {("7", "cfg"): 4.0}),
    "anagram_together_sd15": Twin(
        "anagram_together",
        SD15,
        {
            ("2", "text"): "a watercolor of a kitchen, soft light",
            ("2", "phrase"): "kitchen",
            ("3", "text"): "a watercolor of a panda, soft light",
            ("3", "phrase"): "panda",
        },
    ),
    "anagram_hybrid_sdxl": Twin(
        "anagram_hybrid",
        SDXL,
        _prompts("an oil painting of an owl, a forest behind it", "an oil painting of a waterfall in a forest")
        | {("20", "text"): "an oil painting of a clock tower", ("11", "batch_size"): 1, ("21", "cfg"): 7.0},
    ),
    "anagram_jigsaw_sd15": Twin(
        "anagram_jigsaw", SD15, _prompts("an ink drawing of houseplants", "an ink drawing of a portrait of an old man")
    ),
    "anagram_map_sd15": Twin(
        "anagram_map", SD15, _prompts("a pencil sketch of a turtle", "a pencil sketch of a mushroom")
    ),
    "anagram_negative_sd15": Twin(
        "anagram_negative", SD15, _prompts("a lithograph of a landscape", "a lithograph of a portrait of a woman")
    ),
    "compose_objects_sdxl": Twin(
        "compose_objects",
        SDXL,
        {
            ("2", "text"): "a photo of a cat, a bus and a cactus in a desert",
            ("2", "objects"): "cat, bus, cactus",
            ("6", "batch_size"): 1,
            ("7", "cfg"): 7.0,
        },
    ),
    "compose_regions_sd15": Twin(
        "compose_regions",
        SD15,
        _prompts(_PETS)
        | _ONE_PET_EACH
        | {
            ("8", "cfg"): 7.5,
            ("12", "steps"): 30,
            ("9", "batch_size"): 1,
            ("7", "enhancement"): 0.04,
        },
    ),
    "compose_transformer_z_image": Twin(
        "compose_transformer", Z_IMAGE, _PETS_IN_REGIONS | {("8", "cfg"): 4.0, ("12", "steps"): 25}
    ),
    "compose_transformer_flux": Twin("compose_transformer", FLUX, _PETS_IN_REGIONS | {("8", "cfg"): 1.0}),
    "compose_transformer_qwen_image": Twin("compose_transformer", QWEN_IMAGE, _PETS_IN_REGIONS | {("8", "cfg"): 4.0}),
    "compose_transformer_klein": Twin("compose_transformer", KLEIN, _PETS_IN_REGIONS | {("8", "cfg"): 5.0}),
    "compose_transformer_krea_2": Twin(
        "compose_transformer", KREA_2, _PETS_IN_REGIONS | {("8", "cfg"): 1.0, ("12", "steps"): 8}
    ),
    "compose_transformer_anima": Twin(
        "compose_transformer",
        ANIMA,
        _prompts("a meadow, flowers, blue sky, no humans, best quality", "worst quality, low quality")
        | _two_loras(
            ", flowers, blue sky, best quality",
            "my first character",
            "my second character",
            (
                "2girls, my first character on the left and another girl on the right, standing in a meadow",
                "2girls, a girl on the left and my second character on the right, standing in a meadow",
            ),
        )
        | {("9", "amount"): 1, ("8", "cfg"): 4.0, ("12", "steps"): 30},
    ),
    "compose_automatic_sdxl": Twin(
        "compose_automatic",
        SDXL,
        _prompts(_PETS)
        | _ONE_PET_EACH
        | {
            ("8", "cfg"): 7.0,
            ("12", "steps"): 30,
            ("9", "batch_size"): 1,
            ("7", "enhancement"): 0.0,
        },
    ),
    "conduct_layout_sdxl": Twin(
        "conduct_layout",
        SDXL,
        _prompts("a photo of a man on the left and a woman on the right, a city park")
        | _both_places(", a city park", "my first person", "my second person")
        | {
            ("7", "cfg"): 7.5,
            ("10", "steps"): 30,
            ("11", "batch_size"): 1,
            ("16", "cfg"): 7.0,
            ("18", "iterations"): 0,
            ("18", "guidance_weight"): 0.0391,
        },
    ),
    "conduct_regions_sd15": Twin(
        "conduct_regions",
        SD15,
        _prompts(_PETS)
        | _both_places(", a meadow", "my dog", "my cat")
        | {
            ("7", "cfg"): 7.5,
            ("10", "steps"): 30,
            ("11", "batch_size"): 1,
        },
    ),
    "erase_before_after_sd15": Twin(
        "erase_before_after",
        SD15,
        _prompts("a painting of a village at night by Van Gogh")
        | {
            ("5", "concept"): "Van Gogh",
            ("5", "anchor"): "art",
            ("5", "templates"): "artist",
            ("6", "prompts"): "Monet; Rembrandt; Picasso; Hokusai; Klimt; a photo of a village; a starry night",
            ("4", "batch_size"): 1,
        }
        | _sampled_as_usual("9", "12"),
    ),
    "erase_several_sdxl": Twin(
        "erase_several",
        SDXL,
        _prompts("a table with a pizza and a bowl of apples")
        | {
            ("19", "captions"): "everyday",
            ("19", "own"): "",
            ("4", "batch_size"): 1,
        }
        | _sampled_as_usual("12", "15"),
    ),
    "erase_export_lora_sd15": Twin(
        "erase_export_lora",
        SD15,
        _prompts("a photo of a car in a street") | {("4", "batch_size"): 1} | _sampled_as_usual("9"),
    ),
    "erase_probe_sd15": Twin(
        "erase_probe",
        SD15,
        _prompts("a photo of a snowman in a garden")
        | {
            ("9", "sentences"): "a sketch of a {}\na photo of the {} behind a house\nthe {}",
            ("4", "batch_size"): 1,
        }
        | _sampled_as_usual("12"),
    ),
    "erase_train_sd15": Twin("erase_train", SD15, _prompts("a photo of a cat in a garden") | _TRAINING),
    "erase_text_encoder_sd15": Twin(
        "erase_text_encoder", SD15, _prompts("a photo of a cat in a garden", first=10) | _TRAINING
    ),
    "regions_by_hand_sd15": Twin("regions_by_hand", SD15, _TWO_THINGS | {("11", "batch_size"): 2}),
    "app_two_boxes_sd15": Twin("app_two_boxes", SD15, _TWO_THINGS),
    "demo_lora_concept_sdxl": Twin(
        "demo_lora_concept",
        SDXL,
        _prompts("a photo of my concept in a green meadow")
        | {("8", "lora_name"): "my_concept.safetensors", ("5", "cfg"): 7.0, ("4", "batch_size"): 1},
    ),
}


def write_all() -> list[Path]:
    """Writes every twin into ``workflows/api/checkpoints``."""
    for name, twin in TWINS.items():
        (CHECKPOINTS / f"{name}.json").write_text(text_of(twin))
    return [CHECKPOINTS / f"{name}.json" for name in TWINS]
