"""Every node that takes an IMAGE takes what other nodes hand on: colours, colours with alpha, and a single channel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_concepts.host.schema import io
from comfyui_concepts.host.text import clip_score
from comfyui_concepts.methods.anagram.views import Settings, view_named
from comfyui_concepts.methods.colours import colours_of
from comfyui_concepts.nodes import NODES
from comfyui_concepts.nodes.anagram import pictures, scores
from comfyui_concepts.nodes.anagram.views import AnagramView, ConceptsAnagramViewFromImage
from comfyui_concepts.nodes.conduct.conductor import ConceptsConceptMasks, ConceptsLayoutReference
from comfyui_concepts.nodes.demo import ConceptsDemoJudge
from comfyui_concepts.nodes.erase import train
from comfyui_concepts.nodes.erase.concepts import ConceptsEraseConcept
from comfyui_concepts.nodes.region import ConceptsRegionEditor

SIDE = 64


def _views():
    listed = None
    for name in ("identity", "rotate_180"):
        listed = AnagramView(lambda cell, name=name: view_named(name, Settings(0, 0, cell)), None, None, 1.0, listed)
    return listed


class _Encoder:
    """A CLIP Vision whose embedding is the mean colour, and a VAE whose latent is the picture: both want colours."""

    def encode_image(self, image, crop):
        assert image.shape[-1] == 3
        return {"image_embeds": image.mean((1, 2))}

    def spacial_compression_encode(self):
        return 8

    def encode(self, image):
        assert image.shape[-1] == 3
        return image.movedim(-1, 1)


def _conducted():
    masks = torch.zeros(1, 2, 16, 16)
    masks[:, 1] = 1
    return SimpleNamespace(masks=masks, concepts=[SimpleNamespace(phrase="a")])


def _drawn(image):
    half = torch.zeros(1, SIDE, SIDE)
    half[..., : SIDE // 2] = 1
    return ConceptsRegionEditor.execute("", SIDE, SIDE, background=image, mask=half)


def _latent_of_layout(image):
    layout = ConceptsLayoutReference.execute(None, "noised", image=image, vae=_Encoder()).args[0]
    return SimpleNamespace(args=(layout.latent,))


def _trained(node, *settings):
    erased = ConceptsEraseConcept.execute("cat", "", "object", "subject to end", 1.0).args[0]
    return lambda image: node.execute(None, None, erased, *settings, 0, SIDE, SIDE, images=image, vae=_Encoder())


SHOW = {
    "ConceptsRegionEditor": _drawn,
    "ConceptsAnagramShowViews": lambda image: pictures.ConceptsAnagramShowViews.execute(image, _views()),
    "ConceptsAnagramAnimate": lambda image: pictures.ConceptsAnagramAnimate.execute(image, _views(), 1, 2, True, SIDE),
    "ConceptsAnagramScore": lambda image: scores.ConceptsAnagramScore.execute(image, _views(), _Encoder(), 0, "a\nb"),
    "ConceptsAnagramContactSheet": lambda image: scores.ConceptsAnagramContactSheet.execute(image, _views()),
    "ConceptsAnagramViewFromImage": lambda image: ConceptsAnagramViewFromImage.execute(None, image, 1.0),
    "ConceptsConceptMasks": lambda image: ConceptsConceptMasks.execute(_conducted(), image),
    "ConceptsLayoutReference": lambda image: _latent_of_layout(image),
    "ConceptsDemoJudge": ConceptsDemoJudge.execute,
    "ConceptsTrainErasure": _trained(train.ConceptsTrainErasure, "Co-Erasing", "draft"),
    "ConceptsUnlearnInTextEncoder": _trained(train.ConceptsUnlearnInTextEncoder, "draft"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """The trainings stop at the latents of their pictures, and CLIP reads its prompts nowhere."""

    def stop(model, clip, plan, latents):
        raise StopIteration(latents)

    monkeypatch.setattr(train, "train_erasure", stop)
    monkeypatch.setattr(clip_score, "text_embeddings", lambda *_: torch.eye(3)[:2])


def _tensors(value):
    """Every tensor and text that a node has made of a picture, in order."""
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    if isinstance(value, AnagramView):
        return [value.at_cells(1).forward(torch.arange(SIDE * SIDE).view(1, 1, SIDE, SIDE).float())]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, str) else []


def _shown(node_id, image):
    with torch.inference_mode():
        try:
            return _tensors(SHOW[node_id](image).args)
        except StopIteration as stopped:
            return _tensors(stopped.value)


def test_every_node_that_takes_an_image_is_tried():
    taking = [n.define_schema() for n in NODES if any(i.io_type == io.Image.io_type for i in n.define_schema().inputs)]
    assert {schema.node_id for schema in taking} == set(SHOW)


@pytest.mark.parametrize("node_id", SHOW)
def test_alpha_is_left_out_and_a_single_channel_is_grey(node_id):
    image = torch.rand(1, SIDE, SIDE, 4, generator=torch.Generator().manual_seed(1))
    grey = image[..., :1]
    cases = [(image, image[..., :3])]
    if node_id != "ConceptsAnagramViewFromImage":
        cases.append((grey, grey.repeat(1, 1, 1, 3)))
    for given, plain in cases:
        found, wanted = _shown(node_id, given), _shown(node_id, plain)
        assert wanted
        for one, other in zip(found, wanted, strict=True):
            assert one == other if isinstance(one, str) else torch.equal(one, other)


def test_a_map_without_colours_says_what_to_paint():
    with pytest.raises(ValueError, match=r"paint red from left to right"):
        _shown("ConceptsAnagramViewFromImage", torch.rand(1, SIDE, SIDE, 1))


@pytest.mark.parametrize("node_id", SHOW)
def test_an_empty_batch_is_refused(node_id):
    with pytest.raises(ValueError, match="batch of pictures is empty"):
        _shown(node_id, torch.rand(0, SIDE, SIDE, 3))


def test_colours_are_as_they_were():
    image = torch.rand(2, 4, 4, 3)
    assert colours_of(image) is image
    assert torch.equal(colours_of(image[..., :2]), image[..., :1].repeat(1, 1, 1, 3))
    with pytest.raises(ValueError, match="which is no IMAGE"):
        colours_of(image[0])
