"""The attentions of a UNet: all found, read without a trace, changed where asked."""

from __future__ import annotations

import comfy.ldm.modules.attention as host_attention
import comfy.model_patcher
import pytest
import torch
from comfyui_concepts.host.engine.attention import CROSS, SELF, capture, find_sites, sites_of
from comfyui_concepts.host.engine.attention_patches import after_attention, override_attention
from comfyui_concepts.host.registry import unet_of


def _call(model, x, options=None, rows=1):
    context = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(1)).to(x.dtype).expand(rows, 7, 24)
    return model.apply_model(x, torch.full((rows,), 2.0), c_crossattn=context, transformer_options=options or {})


def _x(rows=1, height=16, width=16, dtype=torch.float32):
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.fixture
def model(new_model):
    return new_model("EPS", sd15=True).model


def test_the_sites_of_an_sd15_unet_have_the_numbers_everybody_uses(model):
    """Spec A, the layer dictionary: 16 layers; the guidance layer and the mask layer of Concept Conductor."""
    unet = unet_of(model)
    sites = sites_of(unet)
    assert len(sites) == 32
    blocks = [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("middle", 0)] + [("output", n) for n in range(3, 12)]
    assert [s.block for s in sites[::2]] == blocks
    assert [s.layer for s in sites[::2]] == list(range(16))
    assert [s.factor for s in sites[::2]] == [1, 1, 2, 2, 4, 4, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1]
    assert {s.block for s in find_sites(unet, CROSS, factor=4)} == {("input", 7), ("input", 8)} | {
        ("output", n) for n in (3, 4, 5)
    }
    assert len(find_sites(unet, block="output")) == 18


def test_reading_changes_nothing_and_leaves_nothing(model):
    unet, x = unet_of(model), _x()
    plain = _call(model, x)
    with capture(unet, sites_of(unet)) as seen:
        assert torch.equal(_call(model, x), plain)
    assert set(seen.keys) == set(sites_of(unet))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


@pytest.mark.parametrize("kind", [SELF, CROSS])
def test_the_probabilities_are_what_the_attention_uses(model, kind):
    """probabilities @ values, through to_out, is what comes out of the module."""
    unet, x = unet_of(model), _x(2, 16, 24)
    site = find_sites(unet, kind, "output", factor=2)[1]
    module, found = site.module(unet), {}
    values = module.to_v.register_forward_hook(lambda m, i, out: found.update(v=out))
    output = module.register_forward_hook(lambda m, i, out: found.update(out=out))
    with capture(unet, [site]) as seen:
        _call(model, x, rows=2)
    values.remove(), output.remove()
    probabilities = seen.probabilities(site)
    assert seen.grid(site) == (8, 12)
    assert probabilities.shape == (2, module.heads, 96, 96 if kind == SELF else 7)
    heads = found["v"].unflatten(-1, (module.heads, -1)).transpose(1, 2)
    torch.testing.assert_close(
        module.to_out((probabilities @ heads).transpose(1, 2).flatten(2)), found["out"], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(seen.probabilities(site, [1]), probabilities[1:])


def test_stopping_skips_the_rest_of_the_network(model):
    unet, reached = unet_of(model), []
    site = find_sites(unet, SELF, "output")[0]
    handle = unet.out.register_forward_pre_hook(lambda *_: reached.append(1))
    with capture(unet, [site], stop=True) as seen:
        _call(model, _x())
        reached.append(2)
    handle.remove()
    assert reached == []
    assert seen.key(site).shape == (1, 16, 128)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_an_error_in_the_body_is_not_swallowed(model):
    unet = unet_of(model)
    with pytest.raises(RuntimeError, match="mine"), capture(unet, sites_of(unet), stop=True):
        raise RuntimeError("mine")
    with capture(unet, sites_of(unet)[:1]), capture(unet, sites_of(unet)[2:3], stop=True):
        _call(model, _x())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_a_change_after_an_attention_sees_every_output_where_it_is(model):
    places = []

    def change(output, place, options):
        places.append((place.block, place.depth, place.kind, place.grid, tuple(output.shape)))
        return output

    x = _x(1, 16, 24)
    options = after_attention({"transformer_options": {"sigmas": 1}}, change)
    assert torch.equal(_call(model, x, options["transformer_options"]), _call(model, x))
    assert [p[:3] for p in places] == [(s.block, s.depth, s.kind) for s in sites_of(unet_of(model))]
    assert all(height * width == shape[1] for *_, (height, width), shape in places)
    assert options["transformer_options"]["sigmas"] == 1


def test_a_change_after_an_attention_runs_after_those_of_others_and_touches_only_its_copy(model):
    others = {"transformer_options": {"patches": {"attn2_output_patch": [lambda n, extra: n * 0]}}}
    seen = []
    options = after_attention(others, lambda out, place, _: seen.append((place.kind, float(out.abs().max()))) or out)
    _call(model, _x(), options["transformer_options"])
    assert {value for kind, value in seen if kind == CROSS} == {0.0}
    assert len(others["transformer_options"]["patches"]["attn2_output_patch"]) == 1


@pytest.mark.parametrize("depth", [None, 0])
@pytest.mark.parametrize("later", [False, True])
def test_what_another_pack_puts_into_the_slot_is_the_attention_that_is_called(model, depth, later):
    """Before us or after us, for a whole transformer or for one block of it."""
    unet, told = unet_of(model), []

    def around(q, k, v, site, extra, attend):
        told.append((attend.foreign, attend.later))
        return attend(q, k, v)

    def with_theirs(options):
        theirs = lambda q, k, v, extra: v * 0.5  # noqa: E731
        return comfy.model_patcher.set_model_options_patch_replace({**options}, theirs, "attn1", "middle", 0, depth)

    def with_ours(options):
        return override_attention(options, unet, find_sites(unet, SELF, "middle"), around)

    x, plain = _x(), {"transformer_options": {}}
    options = with_theirs(with_ours(plain)) if later else with_ours(with_theirs(plain))
    alone = _call(model, x, with_theirs(plain)["transformer_options"])
    assert not torch.equal(alone, _call(model, x))
    assert torch.equal(_call(model, x, options["transformer_options"]), alone)
    assert told == [(True, later)]
    assert torch.equal(_call(model, x, with_ours(plain)["transformer_options"]), _call(model, x))
    assert told[-1] == (False, False)


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="needs a UNet"):
        unet_of(host_attention.FeedForward(8))
