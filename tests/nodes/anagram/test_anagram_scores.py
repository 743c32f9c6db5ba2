"""The nodes that read views by CLIP: with a small random CLIP of the host's classes, and with one whose scores are
known."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import comfy.clip_vision
import comfy.samplers
import comfy.sd
import comfy.sd1_clip
import pytest
import torch
from comfyui_concepts.host.text.clip_score import similarities
from comfyui_concepts.methods.anagram.combine import AVERAGING, MULTI_TASK_FAST
from comfyui_concepts.methods.anagram.views import Settings, view_named
from comfyui_concepts.nodes.anagram.sampling import ConceptsAnagramGuider
from comfyui_concepts.nodes.anagram.scores import (
    ConceptsAnagramClipBalance,
    ConceptsAnagramContactSheet,
    ConceptsAnagramScore,
)
from comfyui_concepts.nodes.anagram.views import AnagramView

TEXT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TEXT | {"hidden_size": 32, "image_size": 32, "patch_size": 8}


def _listed(*names, prompts=None):
    views = None
    for name, prompt in zip(names, prompts or [None] * len(names), strict=True):
        views = AnagramView(lambda cell, name=name: view_named(name, Settings(0, 0, cell)), prompt, None, 1.0, views)
    return views


@pytest.fixture(scope="module")
def reference():
    """A small random CLIP as its authors' library has it."""
    from transformers import CLIPConfig, CLIPModel

    more = {"bos_token_id": 49406, "eos_token_id": 49407, "vocab_size": 49408}
    torch.manual_seed(1)
    with torch.inference_mode(False), torch.no_grad():
        model = CLIPModel(CLIPConfig(text_config=TEXT | more, vision_config=VISION, projection_dim=24)).eval()
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def _text_encoder(weights: dict) -> comfy.sd.CLIP:
    """As CLIPLoader makes it from a file of a CLIP-L, but for its size."""
    target = SimpleNamespace(clip=comfy.sd1_clip.SD1ClipModel, tokenizer=comfy.sd1_clip.SD1Tokenizer, params={})
    clip = comfy.sd.CLIP(target, model_options={"clip_l_model_config": TEXT, "dtype": torch.float32})
    missing, _ = clip.load_sd({k: v.clone() for k, v in weights.items() if k.startswith("text_")})
    assert not missing
    return clip


@pytest.fixture(scope="module")
def pair(reference, tmp_path_factory):
    """The same as CLIP_VISION and CLIP."""
    config = tmp_path_factory.mktemp("clip") / "config.json"
    more = {"hidden_act": "quick_gelu", "num_channels": 3, "projection_dim": 24, "model_type": "clip_vision_model"}
    config.write_text(json.dumps(VISION | more))
    weights = reference.state_dict()
    vision = comfy.clip_vision.ClipVisionModel(config)
    missing, _ = vision.load_sd({k: v.clone() for k, v in weights.items() if k.startswith("visi") or "visual" in k})
    assert not missing
    return vision, _text_encoder(weights)


@torch.inference_mode()
def _wanted(reference, clip, pictures, prompts):
    """The cosines by the reference, for pictures of its own size."""
    tokens = torch.tensor([[token for token, _ in clip.tokenize(prompt)["l"][0]] for prompt in prompts])
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (((pictures * 255).round() / 255 - mean) / std).movedim(-1, 1)
    out = reference(input_ids=tokens, pixel_values=pixels)
    return out.image_embeds @ out.text_embeds.T


PROMPTS = ["a cat", "a house on a hill, oil painting"]


def _pictures(count, side=32, seed=1):
    return torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(seed))


def test_pictures_and_prompts_are_compared_as_the_authors_compare_them(reference, pair):
    """Though the encoder of SD 1, which CLIPLoader makes, hands on what stands before the projection."""
    found = similarities(*pair, _pictures(3), PROMPTS)
    torch.testing.assert_close(found, _wanted(reference, pair[1], _pictures(3), PROMPTS), rtol=1e-3, atol=1e-4)


def test_score_anagram_reads_every_picture_in_every_view(reference, pair):
    pictures, views = _pictures(2), _listed("identity", "rotate_180")
    readings, report = ConceptsAnagramScore.execute(pictures, views, *pair, "\n".join(PROMPTS)).args
    each = [_wanted(reference, pair[1], shown, PROMPTS) for shown in (pictures, pictures.rot90(2, (1, 2)))]
    torch.testing.assert_close(readings.similarity, torch.stack(each, 1), rtol=1e-3, atol=1e-4)
    assert len(report.splitlines()) == 2
    sheet, best = ConceptsAnagramContactSheet.execute(pictures, views, readings).args
    assert torch.equal(best[0], pictures[readings.ranking()[0]])
    assert sheet.shape[0] == 1


def test_a_file_without_a_projection_is_refused_whatever_the_host_puts_in_its_place(reference, pair):
    for stand_in in (torch.eye(24), torch.zeros(24, 24), torch.full((24, 24), float("nan"))):
        bare = _text_encoder(reference.state_dict() | {"text_projection.weight": stand_in})
        with pytest.raises(ValueError, match=r"no text projection.*CLIPLoader"):
            ConceptsAnagramScore.execute(_pictures(1), _listed("identity"), pair[0], bare, "a cat")
    other = SimpleNamespace(cond_stage_model=torch.nn.Module())
    with pytest.raises(ValueError, match="no text projection"):
        ConceptsAnagramScore.execute(_pictures(1), _listed("identity"), pair[0], other, "a cat")


def test_encoders_that_are_no_pair_are_refused(pair, monkeypatch):
    vision, clip = pair

    def score(vision, clip):
        ConceptsAnagramScore.execute(_pictures(1), _listed("identity"), vision, clip, "a cat")

    with pytest.raises(ValueError, match=r"returns 3 numbers per picture and the CLIP 24.*not belong together"):
        score(Colours(), clip)
    with pytest.raises(ValueError, match=r"returns None numbers.*not belong together"):
        score(SimpleNamespace(encode_image=lambda *_, **__: {"image_embeds": None}), clip)
    monkeypatch.setattr(clip, "encode_from_tokens", lambda *_, **__: (None, torch.zeros(1, 48)))
    with pytest.raises(ValueError, match=r"48 numbers per prompt and projects 24.*several in one"):
        score(vision, clip)


@pytest.mark.parametrize("prompts", ["", "a cat", "a cat\na dog\na fox", "\n\na cat\n"])
def test_each_view_needs_a_line(pair, prompts):
    with pytest.raises(ValueError, match=r"There are 2 views and \d lines of prompts; write"):
        ConceptsAnagramScore.execute(_pictures(1), _listed("identity", "flip"), *pair, prompts)


class Colours:
    """A CLIP Vision whose embedding of a picture is its mean colour."""

    def encode_image(self, pictures, crop):
        return {"image_embeds": pictures.mean((1, 2))}


class Named:
    """A CLIP that knows colours: its projection swaps two of the three numbers, and so do its encodings."""

    def __init__(self):
        with torch.inference_mode(False):
            swap = torch.nn.Linear(3, 3, bias=False)
            swap.weight = torch.nn.Parameter(torch.eye(3)[[1, 0, 2]], requires_grad=False)
            self.cond_stage_model = torch.nn.ModuleDict({"text_projection": swap})

    def tokenize(self, text):
        return text

    def encode_from_tokens(self, tokens, return_pooled):
        return None, torch.eye(3)[["green", "red", "blue"].index(tokens)][None]


def test_alignment_and_concealment_of_readings_worked_by_hand():
    """A picture of (0.8, 0.6, 0) and its negative, (0.2, 0.4, 1)."""
    picture = torch.tensor([0.8, 0.6, 0.0]).expand(1, 8, 8, 3)
    views = _listed("identity", "negate")
    readings, report = ConceptsAnagramScore.execute(picture, views, Colours(), Named(), "red\nblue").args
    length = math.sqrt(0.2**2 + 0.4**2 + 1)
    s = [[0.8, 0.0], [0.2 / length, 1 / length]]
    torch.testing.assert_close(readings.similarity[0], torch.tensor(s))
    assert readings.alignment.item() == pytest.approx(0.8)

    def share(own, other):
        return 1 / (1 + math.exp((other - own) / 0.01))

    rows = share(s[0][0], s[0][1]) + share(s[1][1], s[1][0])
    columns = share(s[0][0], s[1][0]) + share(s[1][1], s[0][1])
    assert readings.concealment.item() == pytest.approx((rows + columns) / 4)
    assert report == "picture 1: alignment 0.800, concealment 1.000, each view 0.800, 0.913"


@pytest.mark.parametrize("views", [2, 3, 4])
def test_concealment_is_between_chance_and_1_where_every_view_reads_as_itself(views):
    from comfyui_concepts.methods.anagram.score import Readings

    random = torch.rand(20, views, views, generator=torch.Generator().manual_seed(1)) * 0.3
    own = torch.eye(views) * 0.3
    found = Readings(random + own).concealment
    assert ((found >= 1 / views) & (found <= 1)).all()
    assert Readings(torch.full((1, views, views), 0.25)).concealment.item() == pytest.approx(1 / views)


def _balanced(demo_model, pair, views, **listened):
    model, _, vae = demo_model
    prompts = "\n".join(PROMPTS[: len(views.in_order())])
    return ConceptsAnagramClipBalance.execute(model, vae, views, *pair, prompts, MULTI_TASK_FAST, **listened).args[0]


def test_clip_balance_reads_the_pictures_of_latents_in_every_view(demo_model, reference, pair):
    """At the size of the reference, so that nothing is resampled in between."""
    model, _, vae = demo_model
    options = _balanced(demo_model, pair, _listed("identity", "flip"))
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    pictures = vae.decode(model.model.process_latent_out(latents))
    assert pictures.shape[1:3] == (32, 32)
    each = [_wanted(reference, pair[1], shown, PROMPTS)[:, at] for at, shown in enumerate((pictures, pictures.flip(1)))]
    torch.testing.assert_close(options.weighing.score(latents), torch.stack(each, 1), rtol=1e-3, atol=1e-4)
    assert (options.rectification, options.contrast) == (MULTI_TASK_FAST.rectification, MULTI_TASK_FAST.contrast)


def test_clip_balance_hands_on_how_the_reader_is_listened_to(demo_model, pair):
    scorer = _balanced(demo_model, pair, _listed("identity", "flip")).weighing
    assert (scorer.start, scorer.smoothing, scorer.min_weight) == (0.15, 0.0, 0.15)
    told = {"start_percent": 0.4, "smoothing": 0.2, "least": 0.05}
    scorer = _balanced(demo_model, pair, _listed("identity", "flip"), **told).weighing
    assert (scorer.start, scorer.smoothing, scorer.min_weight) == tuple(told.values())
    with pytest.raises(ValueError, match="There are 3 views and 2 lines"):
        _balanced(demo_model, pair, _listed("identity", "flip", "mirror"))


def test_a_sampling_balanced_by_clip_is_the_same_twice_and_is_another_picture(demo_model, pair):
    model, clip, _ = demo_model
    encode = lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))  # noqa: E731
    views = _listed("identity", "rotate_180", prompts=[encode("a panda"), encode("a fox")])
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)

    def guider(options):
        return ConceptsAnagramGuider.execute(model, views, encode(""), 5.0, options).args[0]

    def made(guider):
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=3)

    options = ConceptsAnagramClipBalance.execute(*demo_model[::2], views, *pair, "\n".join(PROMPTS)).args[0]
    balanced = guider(options)
    first = made(balanced)
    assert torch.equal(made(balanced), first)
    assert not torch.allclose(made(guider(AVERAGING)), first)
