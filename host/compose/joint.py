"""LoRA-Composer on networks where text and picture attend together: all prompts in one sequence with the picture.

There the text changes from block to block, so a concept's keys and values cannot be computed once. Its prompt lies
behind the base's in the same text instead. Who reads whom is said in groups (``methods/compose/groups.py``), positions
are those that each prompt has alone, and each LoRA acts on its own words and on its region.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle

from ...methods.compose.groups import Extent, RegionGroups, grouped
from ...methods.compose.settings import WHO
from ..engine.attention import attention_to_phrase
from ..engine.model_call import ModelCall, RunCall
from ..lora.branches import Branch, TokensByKind
from ..text.equal_lengths import Attention, TextAttentionCall, TextAttentions
from ..text.sequence import SequenceText
from ..types import HookInputs
from .transformer import TransformerGuider, TransformerInjection, changed_by_another


class JointInjection(TransformerInjection):
    """What puts concepts into the sequence of text and picture."""

    @functools.cached_property
    def picture_alone(self) -> set[str]:
        """The blocks in which the picture attends to itself."""
        own = (site for site in self.architecture.sites() if site.attention.kind == "self")
        return {site.block for site in own if site.attention.output == ("image",)}

    def made(self, call: ModelCall, run: RunCall, entries: Sequence[tuple[slice, int]]) -> torch.Tensor:
        prompts = [[concept.prompts[number] for concept in self.concepts] for _, number in entries]
        text = SequenceText(self.architecture, call, prompts, WHO)
        within = self._grouped(text, entries)
        out = self.ran(within, text.call, run, self._branches(text, call.x.device))
        if isinstance(within, SearchingCall):
            self.maps = self.maps + torch.as_tensor(within.maps).cpu()
        return out

    def _grouped(self, text: SequenceText, entries: Sequence[tuple[slice, int]]) -> GroupedCall:
        """The call by groups; while the regions are not known, with a look at the phrases in its positive entries."""
        given = (self.attentions, text, [rows for rows, _ in entries], self.groups(), self.picture_alone)
        if self.masks is not None:
            return GroupedCall(*given)
        positives = [entry for entry, (_, number) in enumerate(entries) if number == 0]
        return SearchingCall(*given, [concept.phrase for concept in self.concepts], positives)

    def _branches(self, text: SequenceText, device: torch.device) -> list[Branch]:
        """Each LoRA on its own words, and on the tokens of its region; none while the regions are not known."""
        if self.masks is None:
            return []
        weights = self.masks.weights(self.grid)[1:].to(device) * float(self.settings.token_lora)
        return [
            Branch(
                concept.factors,
                concept.strength,
                tokens=TokensByKind(self.architecture, text.size, own, text.words(number, device), text.references),
            )
            for number, (concept, own) in enumerate(zip(self.concepts, weights, strict=True), 1)
        ]


class JointGuider(TransformerGuider):
    """LoRA Composer where text and picture attend together. Soft regions fade in all that concepts do to the picture.

    A concept's own words read the part of the picture that its region covers by half.
    """

    injection = JointInjection


class GroupedCall(TextAttentionCall):
    """One model call in which every token reads what its group does.

    Args:
        rows: of every entry of the call.
        groups: who reads whom.
        picture_alone: blocks in which the picture attends to itself.
    """

    def __init__(
        self,
        network: TextAttentions,
        text: SequenceText,
        rows: Sequence[slice],
        groups: RegionGroups,
        picture_alone: Collection[str],
    ) -> None:
        super().__init__(network, WHO)
        self.text, self.rows, self.groups = text, rows, groups
        self.picture_alone = picture_alone
        self.positions, self.passed = text.positions(), 0

    def hooks(self) -> Iterator[RemovableHandle]:
        yield from super().hooks()
        for block in self.picture_alone:
            yield from self.site_hooks(block, self.network.network.get_submodule(block))
        embedder = self.text.architecture.position_embedder
        if embedder is not None:
            yield self.network.network.get_submodule(embedder).register_forward_pre_hook(self._placed)

    def _placed(self, module: torch.nn.Module, inputs: HookInputs) -> HookInputs:
        """The positions of the text's tokens, and of the picture behind it. Text and picture may come one by one."""
        positions, text = inputs[0].clone(), self.text  # (rows or 1, tokens, axes)
        start, self.passed = self.passed, self.passed + positions.shape[1]
        if self.positions is not None:
            own = self.positions[start : self.passed]
            positions[:, : len(own)] = own.to(positions)
        first = max(text.slots.length - start, 0)
        image = slice(first, max(first, first + text.architecture.image_tokens(text.size)[0]))
        positions[:, image, 0] -= text.moved_back
        return (positions, *inputs[1:])

    def filled_in(self) -> Iterator[tuple[slice, slice]]:
        for rows, places in zip(self.rows, self.text.slots.places, strict=True):
            for place in places:
                yield rows, slice(place.text.stop, place.filled.stop)

    def attention(
        self, attend: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if mask is not None or k.shape[-2] != q.shape[-2]:
            raise changed_by_another()
        k, v = (t.flatten(2) if t.ndim > q.ndim else t for t in (k, v))  # SD3's values have their heads apart
        alone = self.site in self.picture_alone
        by_prompts: dict[tuple[Extent, ...], list[torch.Tensor]] = {}
        for rows, places in zip(self.rows, self.text.slots.places, strict=True):
            prompts = (Extent(0, 0),) * len(places) if alone else tuple(place.filled for place in places)
            by_prompts.setdefault(prompts, []).append(torch.arange(rows.start, rows.stop, device=q.device))
        parts = []
        for prompts, own in by_prompts.items():
            groups = self.groups(prompts, 0 if alone else self.text.slots.length, q.shape[-2], q.device)
            chosen = (q, k, v) if len(by_prompts) == 1 else (t.index_select(0, torch.cat(own)) for t in (q, k, v))
            parts.append(grouped(groups, *chosen, partial(attend, mask=None)))
        order = torch.cat([at for own in by_prompts.values() for at in own])
        return parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, order.argsort())


class SearchingCall(GroupedCall):
    """The same, in which it is also summed how much the picture attends to each concept's phrase.

    Args:
        phrases: the positions of each concept's phrase in its positive.
        positives: the entries of the call that are positive, by number.

    ``maps`` is (concepts, tokens of the picture), the mean over heads and rows, summed over attentions.
    """

    def __init__(
        self,
        network: TextAttentions,
        text: SequenceText,
        rows: Sequence[slice],
        groups: RegionGroups,
        picture_alone: Collection[str],
        phrases: Sequence[Sequence[int]],
        positives: Collection[int],
    ) -> None:
        super().__init__(network, text, rows, groups, picture_alone)
        self.phrases, self.positives = phrases, positives
        self.maps: torch.Tensor | float = 0.0

    def attention(
        self, attend: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if self.site not in self.picture_alone and q.shape[-2] > self.text.slots.length:
            for entry in self.positives:
                self.maps = self.maps + self._map(q[self.rows[entry]], k[self.rows[entry]], entry)
        return super().attention(attend, q, k, v, mask)

    def _map(self, q: torch.Tensor, k: torch.Tensor, entry: int) -> torch.Tensor:
        """How much the picture attends to each phrase among the concept's own words, (concepts, tokens)."""
        start, found = self.text.slots.length, []
        image = slice(start, start + self.text.architecture.image_tokens(self.text.size)[0])
        for place, phrase in zip(self.text.slots.places[entry][1:], self.phrases, strict=True):
            words = k[..., slice(*place.text), :]
            found.append(attention_to_phrase(q[..., image, :], words, self.heads, phrase))
        return torch.stack(found)
