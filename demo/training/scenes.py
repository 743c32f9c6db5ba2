"""Scenes made on the fly: a picture, its caption, and where each object is."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from .. import vocabulary as words
from .art import sprite

HEIGHT = 128
WIDTH = {1: 128, 2: 128, 3: 192}  # px, by number of objects
STYLE_SHARE = {"emoji": 0.64, "flat": 0.14, "sketch": 0.10, "mosaic": 0.12}
STONE = {1: 8, 2: 4, 3: 4}  # px, a mosaic stone by number of objects: smaller objects need smaller stones


@dataclass(frozen=True)
class Drawn:
    """A drawn scene: ``picture`` uint8 (height, width, 3); ``boxes[i]`` = (x0, y0, x1, y1) in px around object i."""

    scene: words.Scene
    picture: np.ndarray
    boxes: tuple[tuple[int, int, int, int], ...]


def random_scene(
    rng: Random,
    objects: int,
    concepts: tuple[str, ...] = words.CONCEPTS,
    style_share: dict[str, float] = STYLE_SHARE,
) -> words.Scene:
    """A scene of distinct concepts; a single object is sometimes placed on one side."""
    chosen = tuple(rng.sample(concepts, objects))
    style = rng.choices(list(style_share), list(style_share.values()))[0]
    places = (rng.choice(("left", "right")),) if objects == 1 and rng.random() < 0.15 else None
    return words.scene_of(chosen, rng.choice(list(words.BACKGROUNDS)), style, places)


def _column(scene: words.Scene, place: str | None) -> tuple[int, int]:
    """The columns (from, to) in px an object of this place may use."""
    width = WIDTH[len(scene.concepts)]
    if place is None:
        return 0, width
    if len(scene.concepts) == 3:
        third = words.PLACES[3].index(place)
        return third * 64, third * 64 + 64
    return (0, width // 2) if place == "left" else (width // 2, width)


# the sizes (px) and tilts (degrees) are few: the sprite cache stays small
FREE_SIZES, PLACED_SIZES, TILTS = (72, 80, 88, 96, 104, 112), (48, 52, 56, 60), (-8, 0, 0, 8)


def draw(
    rng: Random, scene: words.Scene, sizes: tuple[int, ...] | None = None, tilts: tuple[int, ...] = TILTS
) -> Drawn:
    """Draws a scene with jitter of place, size, tilt and colour."""
    width = WIDTH[len(scene.concepts)]
    base = np.asarray(words.BACKGROUNDS[scene.background], np.float32) / 255
    jitter = np.asarray([rng.gauss(0, 0.02) for _ in range(3)], np.float32)
    picture = np.broadcast_to(np.clip(base + jitter, 0, 1), (HEIGHT, width, 3)).copy()
    boxes = []
    for concept, place in zip(scene.concepts, scene.places, strict=True):
        left, right = _column(scene, place)
        size = rng.choice(sizes or (PLACED_SIZES if place else FREE_SIZES))
        size = min(size, right - left)
        x = rng.randint(left, right - size)
        y = rng.randint(0, HEIGHT - size) if not place else rng.randint(20, HEIGHT - size - 20)
        thing = sprite(concept, scene.style, size, rng.choice(tilts))
        patch = picture[y : y + size, x : x + size]
        patch *= 1 - thing[..., 3:]
        patch += np.clip(thing[..., :3] * (1 + rng.gauss(0, 0.04)), 0, thing[..., 3:])
        boxes.append((x, y, x + size, y + size))
    if scene.style == "mosaic":
        picture = _mosaic(rng, picture, STONE[len(scene.concepts)])
    return Drawn(scene, (picture * 255 + 0.5).astype(np.uint8), tuple(boxes))


def _mosaic(rng: Random, picture: np.ndarray, stone: int) -> np.ndarray:
    """Stones of one colour each with a darker joint between them."""
    h, w, _ = picture.shape
    stones = picture.reshape(h // stone, stone, w // stone, stone, 3).mean((1, 3))
    shade = np.random.default_rng(rng.getrandbits(32)).normal(0, 0.025, (*stones.shape[:2], 1)).astype(np.float32)
    laid = np.repeat(np.repeat(np.clip(stones + shade, 0, 1), stone, 0), stone, 1)
    laid[::stone] *= 0.85
    laid[:, ::stone] *= 0.85
    return laid
