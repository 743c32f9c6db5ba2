"""Draws the icon and the banner that the registry and the Manager show, from pictures of the pack's own help pages.

``python3 -m workbench.brand`` writes both into ``docs/``. They stay out of the archive: pyproject.toml has their
addresses in the repository.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
PICTURES, DOCS = ROOT / "web" / "docs" / "pictures", ROOT / "docs"
STEP, SIDE = 140, 128  # px: the pictures of a help page stand side by side
TILES = {"compose": ("compose_regions", 1), "conduct": ("conduct_layout", 1), "anagram": ("anagram_turn", 0)}
TILES["erase"] = ("erase_before_after", 2)
ICON, BANNER = 400, (1680, 720)  # px: a square of at most 400, and 21:9
INK, PAPER = (38, 34, 48), (250, 247, 240)


def tile(verb: str, side: int) -> Image.Image:
    """One picture that the demo model made with a verb, with round corners."""
    name, place = TILES[verb]
    with Image.open(PICTURES / f"{name}.jpg") as strip:
        picture = strip.convert("RGB").crop((STEP * place, 0, STEP * place + SIDE, SIDE))
    return _rounded(picture.resize((side, side), Image.Resampling.LANCZOS), side // 8)


def _rounded(picture: Image.Image, radius: int) -> Image.Image:
    """The picture with transparent corners; the mask is drawn larger first, for smooth edges."""
    scale = 4
    mask = Image.new("L", (picture.width * scale, picture.height * scale), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), radius * scale, fill=255)
    picture.putalpha(mask.resize(picture.size, Image.Resampling.LANCZOS))
    return picture


def icon() -> Image.Image:
    """The four verbs, two by two, on nothing."""
    gap = 16
    side = (ICON - gap) // 2
    drawn = Image.new("RGBA", (ICON, ICON))
    for number, verb in enumerate(TILES):
        drawn.alpha_composite(tile(verb, side), ((number % 2) * (side + gap), number // 2 * (side + gap)))
    return drawn


def banner() -> Image.Image:
    """The name, what it is, and the four verbs with a picture each."""
    drawn = Image.new("RGBA", BANNER, PAPER)
    pen, margin, side = ImageDraw.Draw(drawn), 80, 350
    pen.text((margin, 56), "Concepts", INK, _letters(110))
    pen.text((margin, 186), "several characters, objects and styles under control", INK, _letters(44))
    step = (BANNER[0] - 2 * margin - side) / (len(TILES) - 1)
    for number, verb in enumerate(TILES):
        left = round(margin + number * step)
        drawn.alpha_composite(tile(verb, side), (left, 270))
        pen.text((left + side // 2, 640), verb, INK, _letters(40), anchor="ma")
    return drawn.convert("RGB")


def _letters(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """The font that comes with pillow: the same letters on every machine."""
    return ImageFont.load_default(size)


def main() -> None:
    """Writes both pictures."""
    icon().save(DOCS / "icon.png", optimize=True)
    banner().save(DOCS / "banner.jpg", quality=90, subsampling=0)


if __name__ == "__main__":
    main()
