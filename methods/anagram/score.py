"""How well an anagram reads: alignment and concealment ("Visual Anagrams", 2311.17919, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CLIP_TEMPERATURE = 0.01


@dataclass(frozen=True)
class Readings:
    """How well each picture, in each of its N views, matches each of the N prompts.

    Attributes:
        similarity: (pictures, views, prompts); cosines of unit-length embeddings, or probabilities of a classifier.
        temperature: of the softmax in the concealment; CLIP's own for cosines.
    """

    similarity: torch.Tensor
    temperature: float = CLIP_TEMPERATURE

    @property
    def alignment(self) -> torch.Tensor:
        """The worst view's match with its own prompt, (pictures,): A = min S_ii."""
        return self.similarity.diagonal(dim1=1, dim2=2).amin(-1)

    @property
    def concealment(self) -> torch.Tensor:
        """How well view and prompt find each other among all, (pictures,): the mean of the diagonal of softmax(S/τ)
        along rows and along columns; 1/N is chance, 1 is best."""
        scaled = self.similarity / self.temperature
        both = (scaled.softmax(1) + scaled.softmax(2)) / 2
        return both.diagonal(dim1=1, dim2=2).mean(-1)

    def ranking(self) -> list[int]:
        """The pictures from best to worst: by alignment, then by concealment."""
        keys = list(zip(self.alignment.tolist(), self.concealment.tolist(), strict=True))
        return sorted(range(len(keys)), key=lambda i: keys[i], reverse=True)

    def report(self) -> str:
        """A line for each picture, best first."""
        lines = [
            f"picture {i + 1}: alignment {self.alignment[i]:.3f}, concealment {self.concealment[i]:.3f}, each view "
            + ", ".join(f"{s:.3f}" for s in self.similarity[i].diagonal().tolist())
            for i in self.ranking()
        ]
        return "\n".join(lines)
