"""T2I-Zero: objects gather their own features and lose attention at each other's places (erasure spec, A25, A26)."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.methods.compose import suppression as suppression_module
from comfyui_concepts.methods.compose.similarity import ObjectPositions, correct
from comfyui_concepts.methods.compose.suppression import suppression, winners

WORDS = ObjectPositions(((2,), (5, 6), (80,)), ((1, 9), (78, 82)))  # two sections of 77


def _context(channels=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(1, 1, channels, generator=generator, dtype=dtype)
    return base + 0.6 * torch.randn(2, 154, channels, generator=generator, dtype=dtype)


def test_without_strength_the_context_comes_back():
    context = _context()
    assert correct(context, WORDS, alpha=0) is context


def test_it_is_the_papers_formula():
    """By hand, for one token: cosine above the threshold, within the window, inside the words of the section."""
    context, c, alpha, window, threshold = _context(), 2, 0.3, 3, 0.5
    f = context[0, c]
    near = [j for j in range(1, 9) if abs(j - c) <= window]
    similar = [(float(torch.dot(f, context[0, j]) / f.norm() / context[0, j].norm()), j) for j in near]
    kept = [(s, j) for s, j in similar if s > threshold]
    assert 1 < len(kept) < len(near)
    gathered = sum(s * context[0, j] for s, j in kept) / sum(s for s, _ in kept)
    wanted = (1 - alpha) * f + alpha * gathered * f.norm() / gathered.norm()
    assert torch.allclose(correct(context, WORDS, alpha, window, threshold)[0, c], wanted, atol=1e-12)


def test_only_the_objects_move_and_a_full_correction_keeps_their_norm():
    context = _context()
    out = correct(context, WORDS, alpha=1.0)
    touched = [2, 5, 6, 80]
    rest = [n for n in range(154) if n not in touched]
    assert torch.equal(out[:, rest], context[:, rest])
    assert not torch.equal(out[:, touched], context[:, touched])
    assert torch.allclose(out[:, touched].norm(dim=-1), context[:, touched].norm(dim=-1), atol=1e-12)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_in_between_no_norm_grows_and_none_falls_below_what_the_two_directions_leave(alpha):
    """f and f̂ are of one norm, so that what lies between them is as long as their angle says, and no longer than f."""
    context = _context()
    out, whole = correct(context, WORDS, alpha), correct(context, WORDS, alpha=1.0)
    assert torch.allclose(out, (1 - alpha) * context + alpha * whole, atol=1e-12)
    touched = [2, 5, 6, 80]
    before, after = context[:, touched].norm(dim=-1), out[:, touched].norm(dim=-1)
    angle = torch.cosine_similarity(context[:, touched], whole[:, touched], dim=-1)
    assert (after <= before * (1 + 1e-12)).all()
    assert torch.allclose(after, before * ((1 - alpha) ** 2 + alpha**2 + 2 * alpha * (1 - alpha) * angle).sqrt())


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_at_threshold_one_an_object_is_only_like_itself_and_stays_as_it_is(alpha, dtype):
    context = _context(768, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    assert torch.allclose(correct(context, WORDS, alpha, threshold=1.0), context, atol=tolerance)


def test_what_points_the_other_way_is_not_gathered_at_any_threshold():
    """A negative weight would take features away, and weights that cancel would leave nothing to scale to the norm."""
    context = _context()
    context[:, 3] = -context[:, 2]
    out = correct(context, WORDS, alpha=1.0, threshold=-1.0)
    assert torch.equal(out, correct(context, WORDS, alpha=1.0, threshold=0.0))
    touched = [2, 5, 6, 80]
    assert torch.allclose(out[:, touched].norm(dim=-1), context[:, touched].norm(dim=-1), atol=1e-12)


def test_neither_the_frame_nor_another_section_nor_what_is_far_is_gathered():
    context = _context()
    outside = [0, *range(9, 78), *range(82, 154)]
    changed = context.clone()
    changed[:, outside] = 7 * changed[:, outside].flip(-1)
    for position in (2, 5, 6, 80):
        assert torch.equal(correct(changed, WORDS)[:, position], correct(context, WORDS)[:, position])
    far = context.clone()
    far[:, 8] *= -3  # beyond the window of token 2
    assert torch.equal(correct(far, WORDS, window=3)[:, 2], correct(context, WORDS, window=3)[:, 2])


def test_each_encoder_of_sdxl_is_corrected_by_itself():
    context = _context(2048)
    out = correct(context, WORDS)
    assert torch.equal(out[..., :768], correct(context[..., :768].contiguous(), WORDS))
    assert torch.equal(out[..., 768:], correct(context[..., 768:].contiguous(), WORDS))


def test_a_context_in_half_precision_stays_in_it():
    assert correct(_context(dtype=torch.float64).half(), WORDS).dtype == torch.float16


GRID, OBJECTS = (3, 5), ((2,), (4, 5), (7,))


def _qkv(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, n, 6, generator=generator, dtype=dtype) for n in (15, 9, 9)]


def _attention(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _plain(q, k, v, alpha, renormalise=False):
    """The plainest version: one picture, one token at a time."""
    p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    for picture in p:
        maps = torch.stack([picture[..., list(c)].mean(-1).mean(0) for c in OBJECTS])
        best = winners(maps[None], GRID)[0]
        for token in range(p.shape[-2]):
            for index, columns in enumerate(OBJECTS):
                if index != best[token]:
                    picture[:, token, list(columns)] *= 1 - alpha
    return (p / p.sum(-1, keepdim=True) if renormalise else p) @ v


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_attention_and_the_change_are_the_plainest_version(alpha, renormalise):
    q, k, v = _qkv()
    out = _attention(q, k, v) + suppression(q, k, v, OBJECTS, GRID, alpha, renormalise=renormalise)
    assert torch.allclose(out, _plain(q, k, v, alpha, renormalise), atol=1e-12)


def test_at_full_strength_one_object_is_left_at_each_token():
    """Values that only count an object's columns: two of three are zero at every token."""
    q, k, _ = _qkv()
    v = torch.zeros(2, 4, 9, 3, dtype=torch.float64)
    for index, columns in enumerate(OBJECTS):
        v[:, :, list(columns), index] = 1
    left = _attention(q, k, v) + suppression(q, k, v, OBJECTS, GRID, 1.0)
    assert ((left.abs() > 1e-12).sum(-1) == 1).all()


def test_taking_heads_in_turn_changes_nothing(monkeypatch):
    q, k, v = _qkv()
    whole = suppression(q, k, v, OBJECTS, GRID, 0.7)
    monkeypatch.setattr(suppression_module, "MOST_NUMBERS", 2 * 15 * 9)
    assert torch.allclose(suppression(q, k, v, OBJECTS, GRID, 0.7), whole, atol=1e-14)


def test_the_blur_decides_for_the_neighbourhood_and_knows_rows_from_columns():
    maps = torch.zeros(1, 2, 12)
    maps[0, 0] = 0.1
    maps[0, 1, 5] = 1.0  # row 1, column 1 of 3 × 4
    assert winners(maps, (3, 4)).view(3, 4).tolist() == [[0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]]
    assert winners(maps, (2, 6)).view(2, 6).tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]]
