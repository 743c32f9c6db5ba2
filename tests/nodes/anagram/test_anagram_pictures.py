"""Pictures of anagrams at a size a film can take; what looks at them in the middle of a sampling."""

from __future__ import annotations

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfyui_concepts.host.anagram.pictures import views_on
from comfyui_concepts.methods.anagram.views import Settings, view_named
from comfyui_concepts.nodes.anagram import scores as anagram_scores
from comfyui_concepts.nodes.anagram.pictures import ConceptsAnagramAnimate, ConceptsAnagramDecode
from comfyui_concepts.nodes.anagram.sampling import ConceptsAnagramGuider
from comfyui_concepts.nodes.anagram.scores import ConceptsAnagramClipBalance
from comfyui_concepts.nodes.anagram.views import AnagramView, ConceptsAnagramView, ConceptsAnagramViewFromImage


def _listed(*names, parts=0, prompts=None):
    """The views on a wire, each with its conditioning."""
    views = None
    for name, prompt in zip(names, prompts or [None] * len(names), strict=True):
        views = AnagramView(
            lambda cell, name=name: view_named(name, Settings(parts, 0, cell)), prompt, None, 1.0, views
        )
    return views


class Colours:
    """A CLIP Vision whose embedding of a picture is its mean colour. ``crowding``: it takes all memory for that."""

    def __init__(self, crowding=False):
        self.crowding = crowding

    def encode_image(self, pictures, crop):
        if self.crowding:
            comfy.model_management.free_memory(1e30, torch.device("cpu"))
        return {"image_embeds": pictures.mean((1, 2))}


def test_a_clip_that_takes_all_memory_leaves_the_models_patches_where_they_were(demo_model, monkeypatch):
    model, clip, vae = demo_model
    monkeypatch.setattr(anagram_scores, "text_embeddings", lambda *_: torch.eye(3)[:2])
    encode = lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))  # noqa: E731
    views = _listed("identity", "rotate_180", prompts=[encode("a panda"), encode("a fox")])
    patched, key = model.clone(), "diffusion_model.out.2.weight"
    patched.add_patches({key: ("diff", (torch.full_like(model.model.state_dict()[key], 0.01),))}, 1.0)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)

    def made(crowding):
        options = ConceptsAnagramClipBalance.execute(model, vae, views, Colours(crowding), clip, "a\nb").args[0]
        guider = ConceptsAnagramGuider.execute(patched, views, encode(""), 5.0, options).args[0]
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=3)

    assert torch.equal(made(crowding=True), made(crowding=False))


class Cells:
    """A VAE of 8 × 8 pixels a cell that paints each cell in one grey."""

    def spacial_compression_encode(self):
        return 8

    def decode(self, latent):
        return latent[:, :1].repeat_interleave(8, -2).repeat_interleave(8, -1).expand(-1, 3, -1, -1).movedim(1, -1)


def test_a_painted_view_is_shown_as_it_was_sampled_and_has_its_own_cfg():
    painted = torch.rand(1, 50, 50, 3, generator=torch.Generator().manual_seed(1))
    link = ConceptsAnagramViewFromImage.execute(None, painted, 1.0, None, None, 7.0).args[0]
    assert link.cfg == 7.0
    latent = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    sampled = Cells().decode(link.view.forward(latent))
    (view,) = views_on(sampled, link.all_at_cells(), Cells())
    assert torch.equal(view.show(Cells().decode(latent).movedim(-1, 1)).movedim(1, -1), sampled)


@pytest.mark.parametrize(
    ("name", "parts", "says"),
    [
        ("negate", 0, "'negate' has no meaning on latents.*take VAE Decode"),
        ("skew", 0, "'skew' has no meaning on latents"),
        ("disc", 0, "'disc' has no meaning on latents"),
        ("patch_permute", 3, "into 3 equal parts.*try parts = 2 or 4 or 8"),
    ],
)
def test_what_no_sampling_on_latents_takes_is_not_decoded_either(name, parts, says):
    latent = {"samples": torch.rand(1, 4, 8, 8)}
    with pytest.raises(ValueError, match=says):
        ConceptsAnagramDecode.execute(latent, Cells(), _listed("identity", name, parts=parts))


class Pixels:
    """The VAE of a model that works on pixels: −1..1 to 0..1."""

    def spacial_compression_encode(self):
        return 1

    def decode(self, latent):
        return ((latent + 1) / 2).movedim(1, -1)


def test_pixels_are_decoded_in_every_view_they_can_be_sampled_in():
    latent = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    views = _listed("identity", "negate", "skew", "rotate_180")
    picture = ConceptsAnagramDecode.execute({"samples": latent}, Pixels(), views).args[0]
    torch.testing.assert_close(picture, Pixels().decode(latent))
    with pytest.raises(ValueError, match="'disc' has no meaning"):
        ConceptsAnagramDecode.execute({"samples": latent}, Pixels(), _listed("identity", "disc"))


@pytest.mark.parametrize(
    ("side", "largest", "made", "name", "parts"),
    [(256, 128, 128, "square_hinge", 0), (256, 128, 128, "inner_circle", 0), (192, 128, 120, "patch_permute", 6)],
)
def test_a_film_made_smaller_ends_in_the_view_that_was_sampled(side, largest, made, name, parts):
    image = torch.rand(1, side // 8, side // 8, 3, generator=torch.Generator().manual_seed(1))
    image = image.repeat_interleave(8, 1).repeat_interleave(8, 2)
    views = _listed("identity", name, parts=parts)
    shots = ConceptsAnagramAnimate.execute(image, views, 1, 2, False, largest, Cells()).args[0]
    edge = (shots.shape[1] - made) // 2
    last = shots[-1, edge : edge + made, edge : edge + made]
    sampled = views_on(image, views.all_at_cells(), Cells())[-1].show(image.movedim(-1, 1))
    wanted = torch.nn.functional.interpolate(sampled, size=(made, made), mode="area")[0].movedim(0, -1)
    torch.testing.assert_close(last, wanted, rtol=0, atol=0.003)  # eight bits


def test_a_film_says_what_each_view_shows():
    image, views = torch.rand(1, 64, 64, 3), _listed("identity", "rotate_180")
    plain, captioned = (
        ConceptsAnagramAnimate.execute(image, views, 2, 4, False, 64, captions=words).args[0]
        for words in ("", "up\ndown")
    )
    margin = slice(80, None)  # below the picture
    assert (plain[0, margin] == 1).all()
    assert all(captioned[at, margin].min() < 0.5 for at in (0, -1))
    assert torch.equal(captioned[:, :80][[0, -1]], plain[:, :80][[0, -1]])
    with pytest.raises(ValueError, match="There are 2 views and 1 lines of captions"):
        ConceptsAnagramAnimate.execute(image, views, 2, 4, False, 64, captions="up")


def test_a_film_without_a_vae_is_made_at_a_size_its_views_can_cut():
    views = _listed("identity", "patch_permute", parts=6)
    shots = ConceptsAnagramAnimate.execute(torch.rand(1, 96, 96, 3), views, 1, 2, False, 64).args[0]
    assert shots.shape[1:] == (90, 90, 3)
    with pytest.raises(ValueError, match="into 6 equal parts, and a side of 100"):
        ConceptsAnagramAnimate.execute(torch.rand(1, 100, 100, 3), views, 1, 2, False, 64)


def test_a_view_on_a_wire_works_out_its_places_once():
    link = ConceptsAnagramView.execute([], "jigsaw", 1.0).args[0]
    assert link.view is link.view
    assert link.at_cells(8) is link.at_cells(8) is not link.view
