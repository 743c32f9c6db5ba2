"""LoRA Composer on transformers without regions: they are found in the attention to the concepts' phrases."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_concepts.host.compose.joint import JointGuider, SearchingCall
from comfyui_concepts.methods.compose.groups import Extent
from comfyui_concepts.methods.compose.sequence import Place, Slots
from comfyui_concepts.methods.compose.settings import Compose

from ..tiny_transformers import shared_transformer
from .joint_cases import FAST, SIZE, apart, base, concept, plain, sample

STEPS = 4
LATE = Compose(enhancement=0.0, reinit="off", automatic=0.8)
SOON = Compose(enhancement=0.0, reinit="off", automatic=0.3)


def _concepts(name):
    """Two concepts, whose phrases are the third and fourth token."""
    made = [concept(name, 0), concept(name, 1)]
    for one in made:
        one.positive[0][1]["concepts_phrase"] = (2, 3)
    return made


def _guider(name, settings, cfg=2.0, model=None):
    return JointGuider(model or shared_transformer(name), base(name, cfg=cfg), _concepts(name), None, settings)


@pytest.mark.parametrize("name", FAST)
def test_until_the_regions_are_found_the_base_draws_alone_and_an_early_end_is_said(name, caplog):
    made = _guider(name, LATE)
    ours = sample(made, steps=1)
    assert apart(ours, sample(plain(shared_transformer(name), base(name, cfg=2.0)))) < 2e-6
    assert made.regions is None
    assert any("ended before the regions were found, which is after 80 %" in message for message in caplog.messages)


@pytest.mark.parametrize("name", FAST)
def test_each_concept_gets_a_place_and_acts_from_then_on(name):
    made = _guider(name, SOON)
    ours = sample(made, steps=STEPS)
    grid = (-(-SIZE[0] // 2), -(-SIZE[1] // 2))
    assert made.regions.shape == (2, *grid)
    assert made.regions.flatten(1).any(1).all()
    assert apart(ours, sample(plain(shared_transformer(name), base(name, cfg=2.0)), steps=STEPS)) > 1e-3


def _run_of(made):
    """The injection of the guider's next sampling."""
    kept, begin = [], made.begin

    def remembering(sampling):
        kept.append(begin(sampling))
        return kept[0]

    made.begin = remembering
    return kept


@pytest.mark.parametrize("name", FAST)
def test_of_all_words_together_every_part_of_the_picture_has_all_attention(name):
    made = _guider(name, LATE, cfg=1.0)
    for one in made.concepts:
        one.positive[0][1]["concepts_phrase"] = tuple(range(one.positive[0][0].shape[1]))
    kept = _run_of(made)
    sample(made, steps=2)
    run = kept[0]
    joint = [site for site in run.architecture.sites() if site.attention.kind == "joint"]
    torch.testing.assert_close(run.maps, torch.full_like(run.maps, 2.0 * len(joint)))


@pytest.mark.parametrize("apart_", [True, False])
def test_a_map_is_the_picture_s_attention_to_the_phrase_among_the_concept_s_own_words(apart_):
    """Against the plainest form in float64: 2 heads of 3 channels, 4 words of base, 5 and 3 of concepts, 6 tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, 18, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    places = (Place(Extent(0, 4), Extent(0, 4)), Place(Extent(4, 9), Extent(4, 9)), Place(Extent(9, 12), Extent(9, 12)))
    slots = Slots(tuple(place.text for place in places), (places,))
    architecture = SimpleNamespace(image_tokens=lambda size: (6, 0))
    call = SearchingCall.__new__(SearchingCall)
    call.text = SimpleNamespace(slots=slots, size=(4, 6), architecture=architecture)
    call.phrases, call.heads = ((1, 2), (0,)), 2
    given = (q, k) if apart_ else (t.transpose(1, 2).flatten(2) for t in (q, k))
    found = call._map(*given, 0)
    for number, (first, last, phrase) in enumerate(((4, 9, (1, 2)), (9, 12, (0,)))):
        for token in range(6):
            shares = []
            for row in range(2):
                for head in range(2):
                    logits = [sum(q[row, head, 12 + token] * k[row, head, w]) / 3**0.5 for w in range(first, last)]
                    weights = torch.stack(logits).exp()
                    shares.append(sum(weights[p] for p in phrase) / weights.sum())
            assert abs(found[number, token] - sum(shares) / 4) < 1e-6


def test_a_concept_without_a_phrase_is_refused():
    made = JointGuider(shared_transformer("flux"), base("flux"), [concept("flux")], None, SOON)
    with pytest.raises(ValueError, match="has no phrase in its prompt, so its place"):
        sample(made)
