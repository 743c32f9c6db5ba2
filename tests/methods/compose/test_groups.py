"""Who reads whom in a sequence of all prompts and the picture: groups against the mask that says it pair by pair."""

from __future__ import annotations

import itertools

import pytest
import torch
from comfyui_concepts.methods.compose.groups import Extent, grouped, prompt_groups, region_groups
from torch.nn.functional import scaled_dot_product_attention as attention

PROMPTS = (Extent(0, 5), Extent(6, 9), Extent(9, 13))  # the token 5 is of no prompt
START, TOKENS, LENGTH = 13, 24, 40  # 3 tokens are behind the picture


def _owners(inside: torch.Tensor, token: int) -> set[object]:
    """What a token is, or the regions that own it."""
    for number, extent in enumerate(PROMPTS):
        if extent.start <= token < extent.stop:
            return {f"prompt {number}"}
    if token < START:
        return {"nothing"}
    everywhere = bool(inside.any(0).all())
    if token >= START + TOKENS:
        return {"behind", *(range(len(inside)) if everywhere else ())}
    return {n for n in range(len(inside)) if inside[n, token - START]} or {"background"}


def _reads(query: set[object], key: set[object], isolation: bool, with_base: bool) -> bool:
    """The rule for one pair of tokens, as the method's page says it."""
    if "nothing" in query | key:
        return False
    regions = {n for n in query if isinstance(n, int)}
    text = next((str(k) for k in key if str(k).startswith("prompt")), None)
    asked = next((str(q) for q in query if str(q).startswith("prompt")), None)
    if asked == "prompt 0" or (asked is None and not regions):
        return text in (None, "prompt 0")
    if asked is not None:
        return text == asked if text else "behind" in key or int(asked[-1]) - 1 in key
    if text is not None:
        return with_base if text == "prompt 0" else int(text[-1]) - 1 in regions
    return not isolation or bool(key & ({"background", "behind"} | regions))


def _mask(inside: torch.Tensor, **how: bool) -> torch.Tensor:
    owners = [_owners(inside, token) for token in range(LENGTH)]
    return torch.tensor([[_reads(q, k, **how) for k in owners] for q in owners])


@pytest.mark.parametrize(("isolation", "with_base"), itertools.product((True, False), repeat=2))
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_groups_are_the_attention_under_a_mask_that_says_it_pair_by_pair(share, isolation, with_base):
    generator = torch.Generator().manual_seed(7)
    inside = torch.rand(2, TOKENS, generator=generator) < share
    how = {"isolation": isolation, "with_base": with_base}
    groups = region_groups(PROMPTS, inside, START, LENGTH, **how)
    q, k, v = torch.randn(3, 2, 3, LENGTH, 8, generator=generator, dtype=torch.float64)
    mask = _mask(inside, **how)
    theirs = attention(q, k, v, attn_mask=mask | ~mask.any(1, keepdim=True))
    theirs[..., ~mask.any(1), :] = 0  # of no prompt
    assert (grouped(groups, q, k, v, attention) - theirs).abs().max() < 1e-12


@pytest.mark.parametrize(("isolation", "with_base"), itertools.product((True, False), repeat=2))
def test_where_regions_fade_a_token_reads_the_weighted_mean_of_what_it_would_read_in_each(isolation, with_base):
    """Against the plainest form: every token asks every region whole, by the mask that says it pair by pair."""
    generator = torch.Generator().manual_seed(8)
    weights = torch.rand(3, TOKENS, generator=generator) * (torch.rand(3, TOKENS, generator=generator) < 0.6)
    weights[0] += (weights.sum(0) == 0).float()
    weights /= weights.sum(0)
    inside = weights[1:] >= 0.5
    how = {"isolation": isolation, "with_base": with_base}
    q, k, v = torch.randn(3, 2, 3, LENGTH, 8, generator=generator, dtype=torch.float64)
    mine = grouped(region_groups(PROMPTS, inside, START, LENGTH, **how, weights=weights), q, k, v, attention)
    owners = [_owners(inside, token) for token in range(LENGTH)]
    theirs = torch.zeros_like(mine)
    for token, own in enumerate(owners):
        asked = [(own, 1.0)]
        if START <= token < START + TOKENS:
            asked = list(zip([{"background"}, {0}, {1}], weights[:, token - START].tolist(), strict=True))
        for one, share in asked:
            mask = torch.tensor([[_reads(one, key, **how) for key in owners]])
            if share and mask.any():
                theirs[..., token, :] += share * attention(q[..., [token], :], k, v, attn_mask=mask)[..., 0, :]
    torch.testing.assert_close(mine, theirs)


def test_sharp_weights_are_the_groups_of_sharp_regions():
    inside = torch.zeros(2, TOKENS, dtype=torch.bool)
    inside[0, :9], inside[1, 12:20] = True, True
    weights = torch.cat([(~inside.any(0))[None], inside]).float()
    sharp, soft = (
        sorted((group.queries.tolist(), group.keys.tolist(), group.shares) for group in groups)
        for groups in (region_groups(PROMPTS, inside, START, LENGTH, weights=w) for w in (None, weights))
    )
    assert sharp == soft
    assert len(sharp) == 5  # the background with the base's prompt, two other prompts, two regions


def test_every_token_is_in_one_group_and_the_keys_of_groups_differ():
    inside = torch.zeros(2, TOKENS, dtype=torch.bool)
    inside[0, :12], inside[1, 8:18] = True, True
    groups = region_groups(PROMPTS, inside, START, LENGTH)
    asked = torch.cat([group.queries for group in groups]).sort().values
    assert asked.tolist() == [token for token in range(LENGTH) if token != 5]
    assert len({tuple(group.keys.tolist()) for group in groups}) == len(groups) == 6


def test_a_region_over_everything_that_reads_its_prompt_alone_never_meets_the_base():
    groups = region_groups(PROMPTS[:2], torch.ones(1, TOKENS, dtype=torch.bool), START, LENGTH, with_base=False)
    own = next(group for group in groups if START in group.queries)
    assert own.queries.tolist() == own.keys.tolist() == [*range(6, 9), *range(START, LENGTH)]


def test_regions_over_nothing_leave_the_base_and_the_picture_in_one_group():
    groups = region_groups(PROMPTS, torch.zeros(2, TOKENS, dtype=torch.bool), START, LENGTH)
    assert groups[0].queries.tolist() == groups[0].keys.tolist() == [*range(5), *range(START, LENGTH)]


def test_prompts_alone_read_themselves():
    groups = prompt_groups(PROMPTS, 13)
    assert [group.queries.tolist() for group in groups] == [[*range(5)], [6, 7, 8], [9, 10, 11, 12]]
    assert all(group.queries.equal(group.keys) for group in groups)
