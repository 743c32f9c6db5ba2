"""T2I-Zero where text and picture attend together, and where the picture of a transformer attends to the text."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfyui_concepts.host import keys
from comfyui_concepts.host.anagram.guider import ViewsGuider
from comfyui_concepts.host.anagram.views import ViewPrompt
from comfyui_concepts.host.compose.cross import CrossGuider
from comfyui_concepts.host.compose.suppression import SuppressedCall, with_suppression
from comfyui_concepts.host.engine.attention import heads_apart
from comfyui_concepts.host.families.cosmos import Cosmos
from comfyui_concepts.host.registry import architecture_of
from comfyui_concepts.methods.anagram.combine import AVERAGING, combiner
from comfyui_concepts.methods.anagram.views import view_named
from comfyui_concepts.methods.compose.settings import Compose
from comfyui_concepts.methods.compose.similarity import ObjectPositions
from torch.nn.functional import conv2d, pad

from ..faults import FAULTS, assert_as_remembered, remembered
from ..tiny_transformers import compiled, counted, names, shared_transformer
from .joint_cases import SIZE, apart, base, concept, guider, plain, sample

WORDS = ObjectPositions(((1,), (3, 4), (7,)), ((0, 10),))
FAMILIES = [name for name in names() if name not in ("flux_schnell", "flux2", "anima")]
"""Flux.2's prompts have 512 rows each; it has a test of its own."""
EVEN = (10, 8)
"""Cosmos takes only even sizes on older hosts."""


def size_of(name):
    return EVEN if name == "cosmos" else SIZE


def marked(name, lengths=(10, 10), cfg=2.0):
    """Prompts of which both mark their objects."""
    return base(name, lengths, cfg, **{keys.OBJECT_POSITIONS: WORDS})


def by_hand(q, k, v, image, columns, grid, strength, renormalise):
    """The output of one row's attention, (heads, queries, channels): the plainest form, with the whole softmax."""
    p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)  # (heads, queries, keys)
    maps = torch.stack([p[:, image][..., list(words)].mean((0, 2)) for words in columns]).unflatten(-1, grid)
    line = torch.tensor([-1.0, 0.0, 1.0], dtype=p.dtype).square().mul(-0.5).exp()
    blur = torch.outer(line, line) / line.sum() ** 2
    winner = conv2d(pad(maps[:, None], (1, 1, 1, 1), mode="replicate"), blur[None, None])[:, 0].flatten(1).argmax(0)
    for number, words in enumerate(columns):
        for column in words:
            p[:, image, column] *= 1 - strength * (winner != number).to(p)
    if renormalise:
        p = p / p.sum(-1, keepdim=True)
    return p @ v, winner


@pytest.mark.parametrize(
    ("name", "strength", "renormalise"), [*((name, 1.0, False) for name in FAMILIES), ("sd3", 0.6, True)]
)
def test_every_attention_to_text_is_the_plainest_form_in_float64(name, strength, renormalise, monkeypatch):
    architecture, size = architecture_of(shared_transformer(name).model), size_of(name)
    grid, met, whole = architecture.grid(*size), [], SuppressedCall.attention

    def watched(self, attend, q, k, v, mask):
        tokens = self.tokens.get(self.site)
        precise = [t.double() for t in (q, k, v)]
        out, before = whole(self, attend, *precise, mask), attend(*precise, mask)
        if tokens is None:
            assert torch.equal(out, before)
            return out.to(q.dtype)
        v = precise[2].flatten(2) if v.ndim > q.ndim else precise[2]
        rows = [[heads_apart(t, self.heads)[row] for t in (*precise[:2], v)] for row in (0, 1)]
        for row in (0, 1):
            suppressed = row in range(*self.objects[0][0].indices(2))
            wanted, winner = by_hand(
                *rows[row], tokens.image, WORDS.objects, grid, strength if suppressed else 0.0, renormalise
            )
            met.append(len(winner.unique()))
            assert (heads_apart(out, self.heads)[row] - wanted).abs().max() <= 1e-12 * wanted.abs().max()
            if not suppressed:
                assert torch.equal(out[row], before[row])
        return whole(self, attend, q, k, v.to(q.dtype) if v.ndim == q.ndim else v, mask)

    monkeypatch.setattr(SuppressedCall, "attention", watched)
    model = with_suppression(shared_transformer(name), strength, 0.0, 1.0, renormalise=renormalise)
    sample(plain(model, marked(name)), size=size)
    sites = [s for s in architecture.sites() if s.attention.kind in ("joint", "cross")]
    assert len(met) == 2 * len(sites) > 0
    assert max(met) > 1  # not one object everywhere


@pytest.mark.parametrize("name", FAMILIES)
def test_without_strength_marks_or_window_the_picture_is_the_plain_one_bit_for_bit(name):
    model, size = shared_transformer(name), size_of(name)
    theirs = sample(plain(model, base(name, cfg=2.0)), size=size)
    patched_model, calls = counted(with_suppression(model, 1.0, 0.0, 1.0))
    assert torch.equal(sample(plain(with_suppression(model, 0.0, 0.0, 1.0), marked(name)), size=size), theirs)
    assert torch.equal(sample(plain(with_suppression(model, 1.0, 0.5, 0.4), marked(name)), size=size), theirs)
    assert torch.equal(sample(plain(patched_model, base(name, cfg=2.0)), size=size), theirs)
    moved = sample(plain(patched_model, marked(name)), size=size)
    assert calls == [2, 2]  # no further call or row
    assert apart(moved, theirs) > 1e-4
    assert torch.equal(sample(plain(model, base(name, cfg=2.0)), size=size), theirs)


@pytest.mark.parametrize("name", ["flux", "lumina2", "zimage"])
def test_the_negative_and_other_pictures_of_a_batch_do_not_matter(name):
    model, size = with_suppression(shared_transformer(name), 1.0, 0.0, 1.0), size_of(name)
    one = sample(plain(model, marked(name, cfg=1.0)), size=size)
    both = sample(plain(model, marked(name, cfg=1.0)), size=size, batch=2)
    assert apart(both[:1], one) < 1e-6
    prompts = marked(name)
    unmarked = prompts._replace(negative=base(name).negative)
    assert torch.equal(sample(plain(model, prompts), size=size), sample(plain(model, unmarked), size=size))


@pytest.mark.parametrize("name", [n for n in FAMILIES if n in ("chroma", "lumina2", "qwen", "zimage", "krea2")])
def test_prompts_of_unequal_length_in_one_call_are_those_of_their_own_calls(name):
    """Where the picture lies behind the text, a shorter prompt's words move."""

    def drawn(model, one_call):
        views = [ViewPrompt(view_named("identity"), *marked(name, (10, 17))[:2])]
        views.append(ViewPrompt(view_named("flip"), *marked(name, (13, 40))[:2]))
        made = ViewsGuider(model, views, combiner(AVERAGING, [1.0, 1.0]), 2.0)
        if not one_call:
            for entries in made.original_conds.values():
                for entry in entries:
                    entry["mask"] = torch.ones(1, *SIZE)
        return sample(made)

    model, calls = counted(with_suppression(shared_transformer(name), 1.0, 0.0, 1.0))
    together = drawn(model, True)
    count = len(calls)
    assert apart(together, drawn(model, False)) < 1e-6
    assert count < len(calls) - count or name == "zimage"
    assert apart(together, drawn(shared_transformer(name), True)) > 1e-4


@pytest.mark.skipif("flux2" not in names(), reason="this host has no Flux 2")
def test_flux2_s_words_lie_behind_the_rows_that_the_host_puts_in_front(monkeypatch):
    model, found, whole = with_suppression(shared_transformer("flux2"), 1.0, 0.0, 1.0), [], SuppressedCall.__init__
    monkeypatch.setattr(SuppressedCall, "__init__", lambda self, *given: (found.append(given), whole(self, *given))[1])
    prompts = marked("flux2", cfg=1.0)
    out = sample(plain(model, prompts), size=(4, 4))
    ((_, call, ((_, words),), *_),) = found
    columns = [p for positions in words.objects for p in positions]
    own = [p for positions in WORDS.objects for p in positions]
    assert torch.equal(call.c_crossattn[0, columns], prompts.positive[0][0][0, own])
    assert apart(out, sample(plain(shared_transformer("flux2"), base("flux2")), size=(4, 4))) > 1e-6


@pytest.mark.parametrize("name", ["flux", "zimage"])
def test_beside_lora_composer_it_acts_where_the_base_prompt_is_read(name):
    """Its sequence has the concepts' prompts behind the base's, and regions that do not read the base's."""
    model, whole = shared_transformer(name), torch.ones(1, *SIZE)
    suppressing, prompts, own = with_suppression(model, 1.0, 0.0, 1.0), marked(name, cfg=1.0), concept(name)
    half = whole.clone()
    half[..., 4:] = 0
    alone = Compose()
    for covered, moves in ((whole, False), (half, True)):
        pictures = [sample(guider(name, [own], covered, alone, model=m, prompts=prompts)) for m in (model, suppressing)]
        assert (apart(*pictures) > 1e-5) == moves
    nowhere = sample(guider(name, [own], torch.zeros(1, *SIZE), alone, model=suppressing, prompts=prompts))
    assert torch.equal(nowhere, sample(plain(suppressing, prompts)))


def test_beside_lora_composer_on_wan_a_region_that_does_not_read_the_base_s_prompt_stays_as_it_is():
    """There the function around the attention adds the concepts' words itself."""
    model, prompts = shared_transformer("wan"), marked("wan", cfg=1.0)
    suppressing, still = with_suppression(model, 1.0, 0.0, 1.0), Compose(enhancement=0.0, reinit="off")
    own, whole = concept("wan", kinds=("image",)), torch.ones(1, *EVEN)
    half = whole.clone()
    half[..., 4:] = 0
    for covered, moves in ((whole, False), (half, True)):
        made = [CrossGuider(m, prompts, [own], lambda h, w, c=covered: c, still) for m in (model, suppressing)]
        pictures = [sample(guider, size=EVEN) for guider in made]
        assert (apart(*pictures) > 1e-6) == moves


def test_another_pack_s_function_around_attentions_is_called_inside():
    model, scale = shared_transformer("flux").clone(), []

    def halved(attention, *args, **kwargs):
        scale.append(0.5)
        return 0.5 * attention(*args, **kwargs)

    model.model_options["transformer_options"][keys.ATTENTION_OVERRIDE] = halved
    alone = sample(plain(model, base("flux", cfg=2.0)))
    count = len(scale)
    assert apart(sample(plain(with_suppression(model, 1.0, 0.0, 1.0), marked("flux"))), alone) > 1e-4
    assert len(scale) == 4 * count  # once more, for what the function adds of its own


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_after_a_failure_in_the_middle_everything_is_as_it_was(name, fault):
    model = with_suppression(shared_transformer(name), 1.0, 0.0, 1.0)
    sample(plain(model, base(name)))
    before = remembered(model)
    path = {"flux": "single_blocks.0.linear2", "wan": "blocks.1.cross_attn.k"}[name]

    def failing(*_):
        raise FAULTS[fault]()

    handle = model.model.diffusion_model.get_submodule(path).register_forward_hook(failing)
    with pytest.raises((RuntimeError, comfy.model_management.InterruptProcessingException)):
        sample(plain(model, marked(name)))
    handle.remove()
    assert_as_remembered(model, before)


def test_what_it_cannot_do_is_refused_by_name(monkeypatch):
    flux = shared_transformer("flux")
    with monkeypatch.context() as patch:
        patch.setattr(Cosmos, "text_encoder", "t5xxl")
        with pytest.raises(ValueError, match=r"adapter of Anima.*does not work on Cosmos and Anima"):
            with_suppression(shared_transformer("cosmos"), 0.0, 0.0, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(type(flux.model.diffusion_model.double_blocks[0]), "__module__", "another_pack")
        with pytest.raises(ValueError, match="not the host's own does not work on Flux.*host's loader"):
            with_suppression(flux, 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="bypass the TorchCompileModel node"):
        sample(plain(with_suppression(compiled("flux"), 1.0, 0.0, 1.0), marked("flux")))
    more = with_suppression(flux, 1.0, 0.0, 1.0)
    whole = SuppressedCall.attention
    monkeypatch.setattr(
        SuppressedCall,
        "attention",
        lambda self, attend, q, k, v, mask: whole(self, attend, q, *(t.repeat(1, 1, 2, 1) for t in (k, v)), mask),
    )
    with pytest.raises(ValueError, match="adds tokens to the attention that Keep Objects Apart"):
        sample(plain(more, marked("flux")))
