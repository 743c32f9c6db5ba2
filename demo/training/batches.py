"""What the networks are trained on: batches of scenes made on the fly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import torch

from .. import vocabulary
from . import scenes
from .networks import Tokenizer

CAPTION_DROPPED, BACKGROUND_NAMED, FILLER = 0.10, 0.8, 0.12
SceneSource = Callable[[Random, int], vocabulary.Scene]
"""(random numbers, how many objects) → a scene."""
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Pictures, token ids, noun positions, masks, as ``Batches.next`` returns them."""
OBJECTS = ((1, 0.50), (2, 0.42), (3, 0.08))


def used_tokens(tokenizer: Tokenizer) -> list[int]:
    """The token ids of every word a caption can hold."""
    ids = {Tokenizer.START, Tokenizer.END}
    for concept in vocabulary.CONCEPTS:
        for style in vocabulary.STYLES:
            for background in vocabulary.BACKGROUNDS:
                for places in ((None,), ("left",), ("middle",), ("right",)):
                    ids.update(tokenizer(vocabulary.Scene((concept,), places, background, style).caption())[0])
    ids.update(tokenizer("an and a")[0])
    return sorted(ids)


def _masks(drawn: scenes.Drawn, objects: int, whole: bool) -> np.ndarray:
    """The cells of each object's box, (objects, h/8, w/8); ``whole``: all cells of every object."""
    masks = np.ones((objects, scenes.HEIGHT // 8, drawn.picture.shape[1] // 8), np.float32)
    for i, (x0, y0, x1, y1) in enumerate(() if whole else drawn.boxes):
        masks[i] = 0
        masks[i, y0 // 8 : -(-y1 // 8), x0 // 8 : -(-x1 // 8)] = 1
    return masks


class Batches:
    """An endless stream of training batches."""

    def __init__(
        self,
        seed: int,
        tokenizer: Tokenizer,
        objects: Sequence[tuple[int, float]] = OBJECTS,
        draw_scene: SceneSource = scenes.random_scene,
    ) -> None:
        self.rng, self.tokenizer, self.objects, self.draw_scene = Random(seed), tokenizer, objects, draw_scene

    def _caption(self, scene: vocabulary.Scene) -> str:
        if self.rng.random() < CAPTION_DROPPED:
            return ""
        caption = scene.caption(name_background=self.rng.random() < BACKGROUND_NAMED)
        if self.rng.random() < FILLER:
            words = tuple(self.rng.choice(self.tokenizer.words) for _ in range(3))
            caption = vocabulary.random_caption_words(self.rng, caption, words)
        return caption

    def next(self, size: int) -> Batch:
        """A batch.

        Returns:
            Pictures (b, 3, h, w) in [-1, 1], token ids (b, 77), noun positions (b, objects), and masks
            (b, objects, h/8, w/8).
        """
        counts, _weights = zip(*self.objects, strict=True)
        wide = 3 in counts and self.rng.random() < dict(self.objects)[3]
        square = [(c, w) for c, w in self.objects if c != 3]
        pictures, tokens, nouns, masks = [], [], [], []
        objects = 3 if wide else max(c for c, _ in square)
        for _ in range(size if not wide else size * 2 // 3):
            count = 3 if wide else self.rng.choices(*zip(*square, strict=True))[0]
            drawn = scenes.draw(self.rng, self.draw_scene(self.rng, count))
            caption = self._caption(drawn.scene)
            ids, at = self.tokenizer(caption, drawn.scene.concepts if caption else ())
            pictures.append(drawn.picture)
            tokens.append(ids)
            nouns.append(at + [0] * (objects - len(at)))
            masks.append(_masks(drawn, objects, whole=not caption))
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return x, torch.tensor(tokens), torch.tensor(nouns), torch.from_numpy(np.stack(masks))
