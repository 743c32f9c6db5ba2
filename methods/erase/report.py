"""The report of an edit for people: a table of text, and a picture of bars."""

from __future__ import annotations

from itertools import zip_longest

import torch
from PIL import Image, ImageDraw, ImageFont

from .curve import training_text
from .records import ConceptResult, EditReport, EditSpec, PromptDrift, links

PROMISE = (
    "This reduces the model's ability to respond to these text concepts; it does not guarantee removal. Paths that "
    "start from images (img2img, ControlNet, image prompts) are unaffected."
)
LATER = "A later LoRA can bring a concept back, unless the edit is delivered as text."
TRAINED_LATER = "A later LoRA can bring a concept back."
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Colour = tuple[int, int, int]

_MOST = 14  # bars of one kind on a picture
_MOST_ROWS = 8  # of one prompt
_LINE, _BAR, _LABEL, _MARGIN = 22, 330, 230, 12  # px
_GONE, _MOVED, _INK, _PAPER = (214, 84, 74), (70, 130, 200), (40, 40, 40), (250, 250, 248)


def report_text(report: EditReport, spec: EditSpec) -> str:
    """The report as a table. A chain has one table per edit; what holds for all of them comes once."""
    if not report:
        return "Nothing is erased: the list is empty, and the model stays as it is."
    reports, specs = links(report), links(spec)
    tables = [_table(r or EditReport(), s or EditSpec()) for r, s in zip_longest(reports, specs)]
    later = TRAINED_LATER if any("training" in r for r in reports) else LATER
    skip = f" CLIP skip: {specs[0]['clip_skip'] or 'off'}." if "clip_skip" in specs[0] else ""
    return "\n".join([*tables, f"{later}{skip} {PROMISE}"])


def _table(report: EditReport, spec: EditSpec) -> str:
    if "training" in report:
        return training_text(report, spec)
    if "concepts" not in report:
        return f"{spec.get('solver', 'an edit')}: nothing was measured"
    lines = [f"{spec.get('solver', 'solved')}: {_concepts(len(report['concepts']))}, rank {report['rank']}"]
    lines[0] += f" of {report['rows']} token rows (lost {report['lost']:.1%})" if report["lost"] else ""
    lines.append(f"weights change by {report['change']:.2%}")
    for c in report["concepts"]:
        lines.append(f"  {c['concept']}: {c['left']:.1%} left (worst token {c['most']:.1%}){_margin(c)}")
    for drift in sorted(report["kept"], key=lambda drift: -drift["moved"])[:_MOST]:
        lines.append(f"  preserved '{drift['prompt']}': moved {drift['moved']:.2%}{_held(drift)}")
    if "captions" in report:
        lines.append(f"  preserved captions: moved {report['captions']:.2%} on average")
    if report["regeneration"]:
        lines.append("  regeneration residual by epoch: " + ", ".join(f"{r:.2f}" for r in report["regeneration"]))
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join(lines)


def _held(drift: PromptDrift) -> str:
    """What is held of the prompt, with how far each moved; of many rows those that moved most."""
    rows = drift.get("rows", [])
    most = sorted(rows, key=lambda row: -row["moved"])[:_MOST_ROWS]
    named = [f"{row['row']} {row['moved']:.2%}" for row in rows if row in most]
    return f" ({', '.join(named)}{', …' if len(most) < len(rows) else ''})" if named else ""


def _concepts(count: int) -> str:
    return "1 concept" if count == 1 else f"{count} concepts"


def _margin(concept: ConceptResult) -> str:
    if "margin" not in concept:
        return ""
    return ", margin " + ("beyond measure" if concept["margin"] is None else f"{concept['margin']:.1f} ×")


def report_picture(report: EditReport) -> torch.Tensor:
    """Bars: what is left of each concept (red), how far each preserved prompt moved (blue), (1, h, w, 3) in 0..1.

    Both scales go from 0 to 100 %; short is good.
    """
    rows: list[tuple[str, float, Colour]] = [
        (c["concept"], c["left"], _GONE) for c in report.get("concepts", [])[:_MOST]
    ]
    drifts = sorted(report.get("kept", []), key=lambda drift: -drift["moved"])[:_MOST]
    rows += [(drift["prompt"], drift["moved"], _MOVED) for drift in drifts]
    width, height = 2 * _MARGIN + _LABEL + _BAR + 60, 2 * _MARGIN + _LINE * (len(rows) + 2)
    image = Image.new("RGB", (width, height), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    draw.text((_MARGIN, _MARGIN), "left of the concept", _GONE, font)
    draw.text((_MARGIN + _LABEL, _MARGIN), "kept prompts moved", _MOVED, font)
    for number, (label, value, colour) in enumerate(rows, 1):
        _bar(draw, font, _MARGIN + _LINE * number + 6, label, value, colour)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(1, height, width, 3).float() / 255


def _bar(draw: ImageDraw.ImageDraw, font: Font, y: int, label: str, value: float, colour: Colour) -> None:
    draw.text((_MARGIN, y), label if len(label) < 32 else f"{label[:30]}…", _INK, font)
    x = _MARGIN + _LABEL
    draw.rectangle((x, y + 2, x + _BAR, y + _LINE - 6), outline=(215, 215, 212))
    draw.rectangle((x, y + 2, x + round(_BAR * min(value, 1.0)), y + _LINE - 6), fill=colour)
    draw.text((x + _BAR + 8, y), f"{value:.1%}", _INK, font)
