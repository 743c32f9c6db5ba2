"""Points that mark the concepts in a reference picture."""

from __future__ import annotations


def parse_points(text: str) -> tuple[tuple[float, float], ...]:
    """Points ``x,y; x,y`` in fractions of the canvas.

    Raises:
        ValueError: the text holds something else.
    """
    points = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        try:
            x, y = (float(number) for number in part.split(","))
        except ValueError:
            x = y = -1.0
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise ValueError(
                f"'{part}' is not a point; write each one as x,y in fractions of the canvas: 0.25,0.5; 0.75,0.5"
            )
        points.append((x, y))
    return tuple(points)


def check_points(concepts: int, points: int) -> None:
    """Refuses points that do not mark every concept.

    Raises:
        ValueError: there are none, or another number.
    """
    if not points:
        raise ValueError(
            "No positions for the concepts: connect regions, or a Layout Reference with one point per concept."
        )
    if points != concepts:
        raise ValueError(f"There are {concepts} concepts and {points} points; give one to each, in their order.")
