"""Ordinary captions: what people ask pictures of, none of it in particular.

Their average says which directions of a text encoder everyday prompts use (OCE, 2605.28902, takes it from MS COCO).
"""

from __future__ import annotations

_OPENINGS = (
    "",
    "a photo of ",
    "a close-up of ",
    "a painting of ",
    "a drawing of ",
    "a black and white photo of ",
    "a watercolor of ",
    "an illustration of ",
)
# fmt: off
_SUBJECTS = (
    "a man", "a woman", "a child", "an old man", "a young woman", "a group of people", "a couple", "a crowd",
    "a baby", "a police officer", "a chef", "a doctor", "a dancer", "a soccer player", "a surfer", "a skier",
    "a dog", "a cat", "a horse", "a cow", "a sheep", "a bird", "an elephant", "a bear", "a zebra", "a giraffe",
    "a lion", "a rabbit", "a fish", "a butterfly", "a duck", "an owl", "a monkey", "a fox", "a turtle", "a snake",
    "a car", "a bus", "a train", "a truck", "a bicycle", "a motorcycle", "an airplane", "a boat", "a ship",
    "a tractor", "a taxi", "a house", "a castle", "a church", "a bridge", "a lighthouse", "a tower", "a skyscraper",
    "a shop", "a market", "a cabin", "a fountain", "a statue", "a street", "a tree", "a flower", "a rose",
    "a cactus", "a mushroom", "a garden", "a field", "a waterfall", "a volcano", "a river", "a chair", "a table",
    "a couch", "a bed", "a lamp", "a clock", "a book", "a vase", "a mirror", "a piano", "a guitar", "a violin",
    "a computer", "a phone", "a camera", "an umbrella", "a hat", "a dress", "a pair of shoes", "a bag",
    "a suitcase", "a ball", "a kite", "a toy", "a pizza", "a cake", "a sandwich", "an apple", "a banana",
    "a bowl of soup", "a cup of coffee", "a glass of wine", "a plate of food", "a knife and a fork", "a robot",
    "a knight", "a dragon", "an astronaut", "a wizard", "a pirate",
)
_SETTINGS = (
    "on a wooden table", "in the snow", "on the beach at sunset", "in a city at night", "in front of a white wall",
    "in a forest", "on a green field", "by a lake in the mountains", "in a kitchen", "in the rain",
    "under a blue sky", "in a living room", "on a street", "in the desert", "by the window",
    "with mountains in the background", "in a park with trees", "in soft light", "on a red background",
    "in the fog", "at a market", "in a museum", "next to a river",
)
# fmt: on
_TURNS = 4  # captions a subject


def everyday_captions() -> tuple[str, ...]:
    """Some four hundred captions: every subject in four settings, in every kind of picture."""
    captions = []
    for number, subject in enumerate(_SUBJECTS):
        for turn in range(_TURNS):
            opening = _OPENINGS[(number + 3 * turn) % len(_OPENINGS)]
            captions.append(f"{opening}{subject} {_SETTINGS[(5 * number + 7 * turn) % len(_SETTINGS)]}")
    return tuple(captions)
