"""The sprites: emoji art as straight-alpha pictures. Needed only to train.

``emoji`` is Noto Color Emoji (Debian package ``fonts-noto-color-emoji``; art Apache-2.0), ``flat`` is Fluent Emoji Flat
(npm package ``@iconify-json/fluent-emoji-flat``; MIT). ``sketch`` and ``mosaic`` are made from the first.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

NOTO_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NOTO_SIZE = 109  # the only size the bitmap font holds
FLAT_PACKAGE = "@iconify-json/fluent-emoji-flat@1.2.6"
MASTER = 160  # px; sprites are kept at this size and shrunk from it

# concept -> (character in Noto, icon in Fluent Emoji Flat)
GLYPHS = {
    "cat": ("🐱", "cat-face"),
    "dog": ("🐶", "dog-face"),
    "panda": ("🐼", "panda"),
    "fox": ("🦊", "fox"),
    "frog": ("🐸", "frog"),
    "pig": ("🐷", "pig-face"),
    "rabbit": ("🐰", "rabbit-face"),
    "penguin": ("🐧", "penguin"),
    "owl": ("🦉", "owl"),
    "fish": ("🐠", "tropical-fish"),
    "octopus": ("🐙", "octopus"),
    "butterfly": ("🦋", "butterfly"),
    "ladybug": ("🐞", "lady-beetle"),
    "turtle": ("🐢", "turtle"),
    "car": ("🚗", "automobile"),
    "bus": ("🚌", "bus"),
    "house": ("🏠", "house"),
    "tree": ("🌳", "deciduous-tree"),
    "cactus": ("🌵", "cactus"),
    "sunflower": ("🌻", "sunflower"),
    "mushroom": ("🍄", "mushroom"),
    "apple": ("🍎", "red-apple"),
    "banana": ("🍌", "banana"),
    "strawberry": ("🍓", "strawberry"),
    "pizza": ("🍕", "pizza"),
    "burger": ("🍔", "hamburger"),
    "cake": ("🎂", "birthday-cake"),
    "donut": ("🍩", "doughnut"),
    "watermelon": ("🍉", "watermelon"),
    "star": ("⭐", "star"),
    "heart": ("❤", "red-heart"),
    "moon": ("🌙", "crescent-moon"),
    "clock": ("⏰", "alarm-clock"),
    "pumpkin": ("🎃", "jack-o-lantern"),
    "snowman": ("⛄", "snowman-without-snow"),
    "crown": ("👑", "crown"),
    "lion": ("🦁", "lion"),
    "tiger": ("🐯", "tiger-face"),
    "koala": ("🐨", "koala"),
    "monkey": ("🐵", "monkey-face"),
    "unicorn": ("🦄", "unicorn"),
    "bear": ("🐻", "bear"),
    "robot": ("🤖", "robot"),
    "dinosaur": ("🦕", "sauropod"),
}


class ArtMissing(RuntimeError):
    """The art package is not installed; the message names the command that installs it."""


@cache
def _noto() -> ImageFont.FreeTypeFont:
    if not NOTO_FONT.exists():
        raise ArtMissing("training needs the emoji font; install it with: apt-get install fonts-noto-color-emoji")
    return ImageFont.truetype(str(NOTO_FONT), NOTO_SIZE)


@cache
def _flat_icons() -> dict[str, str]:
    """Icon name to SVG body, from the npm package (kept in the cache folder after the first time)."""
    root = Path(os.environ.get("CONCEPTS_CACHE", Path.home() / ".cache" / "comfyui-concepts")) / "art"
    root.mkdir(parents=True, exist_ok=True)
    tarballs = sorted(root.glob("iconify-json-fluent-emoji-flat-*.tgz"))
    if not tarballs:
        with tempfile.TemporaryDirectory(dir=root) as fresh:  # another trainer never sees half of it
            try:
                subprocess.run(["npm", "pack", "--silent", FLAT_PACKAGE], cwd=fresh, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise ArtMissing(f"training needs the flat art; in {root} run: npm pack {FLAT_PACKAGE}") from error
            for made in Path(fresh).glob("*.tgz"):
                made.replace(root / made.name)
        tarballs = sorted(root.glob("iconify-json-fluent-emoji-flat-*.tgz"))
    with tarfile.open(tarballs[-1]) as archive:
        member = archive.extractfile("package/icons.json")
        assert member is not None
        document = json.load(member)
    icons = {name: icon["body"] for name, icon in document["icons"].items()}
    icons.update({name: icons[a["parent"]] for name, a in document.get("aliases", {}).items() if a["parent"] in icons})
    return icons


def _fit(picture: Image.Image) -> Image.Image:
    """Cropped to what is drawn, padded to a square, at the master size."""
    picture = picture.crop(picture.getchannel("A").getbbox())
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((MASTER, MASTER), Image.Resampling.LANCZOS)


def _emoji(concept: str) -> Image.Image:
    canvas = Image.new("RGBA", (150, 150))
    ImageDraw.Draw(canvas).text((4, 4), GLYPHS[concept][0], font=_noto(), embedded_color=True)
    return _fit(canvas)


def _flat(concept: str) -> Image.Image:
    import resvg_py  # only the trainer's environment has it

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{_flat_icons()[GLYPHS[concept][1]]}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=MASTER, height=MASTER))
    return _fit(Image.open(io.BytesIO(png)).convert("RGBA"))


def _sketch(concept: str) -> Image.Image:
    """Dark contour lines on paper, inside the sprite's own outline."""
    emoji = _emoji(concept)
    alpha = emoji.getchannel("A")
    flattened = Image.new("RGB", emoji.size, "white")
    flattened.paste(emoji, mask=alpha)
    smooth = flattened.filter(ImageFilter.GaussianBlur(1.2))
    lines = smooth.convert("L").filter(ImageFilter.CONTOUR).filter(ImageFilter.MinFilter(3))
    ink = np.clip((np.asarray(lines, np.float32) - 120) * 2.2, 40, 250)
    rim = np.asarray(alpha.filter(ImageFilter.MinFilter(7)), np.float32) / 255
    ink = (ink * rim + 40 * (1 - rim)).astype(np.uint8)
    return Image.merge("RGBA", (*[Image.fromarray(ink)] * 3, alpha))


_DRAW = {"emoji": _emoji, "flat": _flat, "sketch": _sketch, "mosaic": _emoji}


@cache
def master(concept: str, style: str) -> Image.Image:
    """The sprite of a concept, RGBA, ``MASTER`` px square. (A mosaic is laid over the finished scene.)"""
    return _DRAW[style](concept)


@cache
def sprite(concept: str, style: str, size: int, angle: int) -> np.ndarray:
    """The sprite at ``size`` px turned by ``angle`` degrees: float32 (size, size, 4), premultiplied, 0..1."""
    picture = np.asarray(master(concept, style).rotate(angle, Image.Resampling.BICUBIC), np.float32) / 255
    picture[..., :3] *= picture[..., 3:]
    channels = [
        np.asarray(Image.fromarray(picture[..., c]).resize((size, size), Image.Resampling.BOX)) for c in range(4)
    ]
    shrunk = np.clip(np.stack(channels, -1), 0, 1)
    shrunk[..., :3] = np.minimum(shrunk[..., :3], shrunk[..., 3:])
    return shrunk
