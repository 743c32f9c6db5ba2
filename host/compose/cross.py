"""LoRA-Composer on transformers whose picture attends to a text of its own (Wan, Cosmos, Anima).

There a concept's keys and values do not depend on the picture, as in a UNet: they are computed once per run. Inside a
region the base's queries read those of its concept and not the base's. A region's tokens attend to themselves and to
the background. Each LoRA acts on the tokens of its region, which are the same in every frame.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from ...methods.compose.groups import Extent, RegionGroups, grouped
from ...methods.compose.settings import WHO
from ...methods.lora import layer_shape
from ...methods.lora_tokens import unknown_grid
from .. import keys
from ..architecture import Architecture, AttentionKind
from ..engine.attention import attention_to_phrase
from ..engine.model_call import ModelCall, RunCall
from ..lora.branches import Branch, TokensByKind, low_rank
from ..text.equal_lengths import Attention, TextAttentionCall, TextAttentions
from ..text.sequence import check_layout, other_encoder
from .transformer import TransformerConcept, TransformerGuider, TransformerInjection, changed_by_another


class KeysAndValues(NamedTuple):
    """Keys and values of one prompt as an attention gets them, (1, …, tokens, channels)."""

    keys: torch.Tensor
    values: torch.Tensor


class Words:
    """The keys and values of a concept's prompt at every cross-attention, by its module.

    They are what these modules make of the prompt themselves, its LoRA in them.
    """

    def __init__(self, architecture: Architecture, attentions: TextAttentions, concept: TransformerConcept) -> None:
        self.architecture, self.attentions, self.concept = architecture, attentions, concept
        self.made: dict[int, dict[str, KeysAndValues]] = {}

    def of(self, number: int) -> dict[str, KeysAndValues]:
        """Those of the positive (0) or the negative (1), computed once."""
        if number not in self.made:
            self.made[number] = self._made(self.concept.prompts[number])
        return self.made[number]

    def _made(self, prompt: torch.Tensor) -> dict[str, KeysAndValues]:
        network, own, found = self.attentions.network, self.concept, dict[str, KeysAndValues]()
        text = {layer: f for layer, f in own.factors.items() if self.architecture.kind(layer) == "text"}
        with low_rank(network, [Branch(text, own.strength)]):
            embedder = self.architecture.text_embedder
            words = network.get_submodule(embedder)(prompt) if embedder else prompt
            for site in self.architecture.sites():
                path = module_of(site.keys.layer)
                if path in self.attentions.sites and site.after is not None:
                    # one query, whose answer nobody needs: a module has no other way to its keys
                    query = words.new_zeros(1, 1, layer_shape(network.get_submodule(site.after))[0])
                    options = {keys.ATTENTION_OVERRIDE: partial(_kept, found, path)}
                    network.get_submodule(path)(query, words, transformer_options=options)
        return found


def _kept(
    found: dict[str, KeysAndValues],
    path: str,
    attention: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *more: object,
    **options: object,
) -> torch.Tensor:
    """The host's attention, of which the keys and values are kept."""
    found[path] = KeysAndValues(k, v)
    return attention(q, k, v, *more, **options)


def module_of(layer: str) -> str:
    """The module that a layer is in."""
    return layer.rpartition(".")[0]


class CrossInjection(TransformerInjection):
    """What puts concepts into the attentions of a picture to its text."""

    words: Sequence[Words] = ()

    def made(self, call: ModelCall, run: RunCall, entries: Sequence[tuple[slice, int]]) -> torch.Tensor:
        check_layout(self.architecture, call, WHO, several_frames=True)
        if not self.words:
            self._check_encoder(call)
            by_concept = {id(c): Words(self.architecture, self.attentions, c) for c in self.concepts}
            self.words = [by_concept[id(concept)] for concept in self.concepts]
        read = [(rows, [words.of(number) for words in self.words]) for rows, number in entries]
        frames = int(call.x.shape[2]) if call.x.ndim > 4 else 1
        if self.masks is None:
            positives = [at for at, (_, number) in enumerate(entries) if number == 0]
            searching = SearchingCrossCall(self.attentions, read, positives, [c.phrase for c in self.concepts])
            out = self.ran(searching, call, run, [])
            self.maps = self.maps + torch.as_tensor(searching.maps).unflatten(-1, (frames, -1)).mean(-2).cpu()
            return out
        weights = self.masks.weights(self.grid).to(call.x.device)
        alone = self._modules("self") if self.settings.isolation and len(self.concepts) > 1 else ()
        within = CrossCall(self.attentions, read, weights.repeat(1, frames), self.groups(frames), alone)
        return self.ran(within, call, run, self._branches(weights[1:], frames))

    def _check_encoder(self, call: ModelCall) -> None:
        """Refuses prompts of another text encoder.

        Raises:
            ValueError: they have another width.
        """
        for prompt in (prompt for concept in self.concepts for prompt in concept.prompts):
            if call.c_crossattn is not None and prompt.shape[-1] != call.c_crossattn.shape[-1]:
                raise other_encoder(prompt, call.c_crossattn)

    def _modules(self, kind: AttentionKind) -> list[str]:
        """The modules with attentions of a kind."""
        return [module_of(site.keys.layer) for site in self.architecture.sites() if site.attention.kind == kind]

    def _branches(self, weights: torch.Tensor, frames: int) -> list[Branch]:
        """Each LoRA on the tokens of its region, (concepts, tokens); what it does to words is in their keys."""
        after = {site.after for site in self.architecture.sites() if site.attention.kind == "cross"}
        found = []
        for concept, own in zip(self.concepts, weights, strict=True):
            factors = {
                layer: f
                for layer, f in concept.factors.items()
                if self.architecture.kind(layer) == "image" and (self.settings.token_lora or layer in after)
            }
            tokens = TokensByKind(self.architecture, self.size, own, own.new_zeros(1), frames=frames)
            found.append(Branch(factors, concept.strength, tokens=tokens))
        return found


class CrossCall(TextAttentionCall):
    """One model call in which the picture reads its concepts' words where their regions are.

    Args:
        read: the rows of every entry of the call, and what each concept's prompt is there.
        weights: of background and regions, (1 + regions, tokens); they add up to one in every token.
        groups: who reads whom in the picture.
        alone: modules in which the picture attends to itself, and regions do not see each other.
    """

    def __init__(
        self,
        network: TextAttentions,
        read: Sequence[tuple[slice, Sequence[dict[str, KeysAndValues]]]],
        weights: torch.Tensor,
        groups: RegionGroups,
        alone: Collection[str],
    ) -> None:
        super().__init__(network, WHO)
        self.read, self.weights, self.groups, self.alone = read, weights, groups, alone
        self.tokens = [(row > 0).nonzero().flatten() for row in weights]

    def hooks(self) -> Iterator[RemovableHandle]:
        yield from super().hooks()
        for path in self.alone:
            yield from self.site_hooks(path, self.network.network.get_submodule(path))

    def attention(
        self, attend: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        count, itself = q.shape[-2], self.site in self.alone
        if mask is not None or (itself and k.shape[-2] != count):
            raise changed_by_another()
        if count != self.weights.shape[-1]:
            raise unknown_grid(count, [self.weights.shape[-1]])
        whole = partial(attend, mask=None)
        if itself:
            return grouped(self.groups((Extent(0, 0),) * len(self.weights), 0, count, q.device), q, k, v, whole)
        return torch.cat([self._of_entry(whole, q[r], k[r], v[r], words) for r, words in self.read])

    def _of_entry(
        self,
        attend: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        words: Sequence[dict[str, KeysAndValues]],
    ) -> torch.Tensor:
        """What the picture's tokens read: the base's words in the background, a concept's in its region."""
        assert self.site is not None
        out = torch.zeros(())
        sources = [KeysAndValues(k, v), *(by_site[self.site] for by_site in words)]
        for own, weights, source in zip(self.tokens, self.weights, sources, strict=True):
            if len(own):
                there = (t.to(q).expand(len(q), *t.shape[1:]) for t in source)
                part = attend(q.index_select(-2, own), *there) * weights[own, None].to(q)
                out = out if out.ndim else part.new_zeros(*part.shape[:-2], q.shape[-2], part.shape[-1])
                out = out.index_add(-2, own, part)
        return out


class SearchingCrossCall(TextAttentionCall):
    """A call of the base alone, in which it is summed how much the picture attends to each concept's phrase.

    Args:
        read: as ``CrossCall``.
        positives: the entries of the call that are positive, by number.
        phrases: the positions of each concept's phrase in its positive.

    ``maps`` is (concepts, tokens), the mean over heads and rows, summed over attentions.
    """

    def __init__(
        self,
        network: TextAttentions,
        read: Sequence[tuple[slice, Sequence[dict[str, KeysAndValues]]]],
        positives: Collection[int],
        phrases: Sequence[Sequence[int]],
    ) -> None:
        super().__init__(network, WHO)
        self.read, self.positives, self.phrases = read, positives, phrases
        self.maps: torch.Tensor | float = 0.0

    def attention(
        self, attend: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        assert self.site is not None
        for rows, words in (self.read[entry] for entry in self.positives):
            pairs = zip((by_site[self.site].keys for by_site in words), self.phrases, strict=True)
            found = [attention_to_phrase(q[rows], own, self.heads, phrase) for own, phrase in pairs]
            self.maps = self.maps + torch.stack(found)
        return attend(q, k, v, mask)


class CrossGuider(TransformerGuider):
    """LoRA Composer where the picture attends to a text of its own. Soft regions fade in all that concepts do."""

    injection = CrossInjection
