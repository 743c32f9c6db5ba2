"""Files that peft, lycoris-lora and diffusers make: each is what they and the host add, or is refused by its own name.

The packages are pinned: peft and diffusers in requirements-dev.txt, lycoris-lora beside the outside checkers.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings

import comfy.lora
import peft
import pytest
import torch
from comfyui_concepts.host.lora.concept import with_text_part
from comfyui_concepts.host.lora.factors import layer_names, network_factors
from comfyui_concepts.host.lora.files import LoraFile, read_lora
from comfyui_concepts.methods.lora_file import check_kinds
from comfyui_concepts.methods.lora_names import Target
from comfyui_concepts.workbench.checkers import checkers
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from .lora_cases import CONV, DIFFUSERS, LINEAR, ONE_BY_ONE, OUT

LINEARS = ["to_q", "to_out.0"]


@pytest.fixture(scope="module")
def patcher(new_model):
    return new_model("EPS", sd15=True)


@pytest.fixture
def network(patcher):
    """Some layers of the UNet by diffusers' names, as a network of their own."""
    return _network(patcher)


def _network(patcher, layers=tuple(DIFFUSERS)):
    with torch.inference_mode(False):
        root = torch.nn.Module()
        for layer, name in ((layer, DIFFUSERS[layer]) for layer in layers):
            theirs, parent = patcher.model.diffusion_model.get_submodule(layer), root
            shape, bias = theirs.weight.shape, theirs.bias is not None
            own = torch.nn.Linear(shape[1], shape[0], bias)
            if len(shape) == 4:
                own = torch.nn.Conv2d(shape[1], shape[0], shape[2], theirs.stride, theirs.padding, bias=bias)
            own.load_state_dict({key: value.clone() for key, value in theirs.state_dict().items()})
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, own)
    return root


def _filled(module, seed=0):
    """Random values in everything that is trained, as if it had been."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def _ours(lora, patcher):
    """The change of every layer's weight as this pack adds it."""
    changes = {}
    for layer, (f,) in network_factors(lora, patcher.model).items():
        matrix = f.down.flatten(1) if f.up is None else f.up @ f.down.flatten(1)
        changes[layer] = matrix.float() * f.scale
    return changes


def _hosts(lora, patcher, layer):
    """The change of a layer's weight as the host adds it."""
    weight = f"diffusion_model.{layer}.weight"
    names = {n: weight for n, target in layer_names(patcher.model).items() if target == Target(layer)}
    patch = [(1.0, comfy.lora.load_lora(dict(lora.tensors), names, log_missing=False)[weight], 1.0, None, None)]
    return comfy.lora.calculate_weight(patch, torch.zeros_like(patcher.model.state_dict()[weight]), weight).flatten(1)


def _check(lora, patcher, wanted, atol=1e-5, host_fails=()):
    """``wanted``: the change of each layer as the library that made the file adds it, None if it does not say.

    ``host_fails``: the layers that the host logs an error for and leaves as they are.
    """
    changes = _ours(lora, patcher)
    assert set(changes) == set(wanted)
    for layer, change in changes.items():
        assert change.abs().max() > 1e-3
        for other in (None if layer in host_fails else _hosts(lora, patcher, layer), wanted[layer]):
            if other is not None:
                torch.testing.assert_close(change, other.flatten(1).float(), rtol=1e-4, atol=atol)


@pytest.fixture(scope="module")
def lycoris():
    """lycoris-lora, from where the outside checkers are."""
    (site,) = (checkers().parent / "lib").glob("python*/site-packages")
    sys.path.append(str(site))
    yield importlib.import_module("lycoris")
    sys.path.remove(str(site))


def _by_lycoris(lycoris, network, path, **settings):
    """Saves what lycoris-lora makes of the network; its modules by the layers' names."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    with torch.inference_mode(False):
        made = lycoris.create_lycoris(network, 1.0, linear_dim=4, linear_alpha=2, conv_dim=4, conv_alpha=2, **settings)
        made.apply_to()
        _filled(made)
        made.save_weights(str(path), torch.float32, None)
    by_name = {f"lycoris_{name.replace('.', '_')}": layer for layer, name in DIFFUSERS.items()}
    return {by_name[module.lora_name]: module for module in made.loras}


def _as_lycoris(module):
    """What a module adds to its layer's weight; of DyLoRA a draw, so nothing to compare with."""
    if type(module).__name__ == "DyLoraModule":
        return None
    if module.name in ("loha", "kron"):  # their get_diff_weight has the scale twice (4.1.3), their forward once
        return module.get_weight(module.shape) * module.scalar
    return module.get_diff_weight(1.0)[0]


ADDED = {
    "locon": {},
    "locon with a core": {"algo": "locon", "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha with a core": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr"},
    "lokr of two pairs": {"algo": "lokr", "decompose_both": True, "factor": 4},
    "lokr of whole factors": {"algo": "lokr", "full_matrix": True},
    "lokr with a core": {"algo": "lokr", "use_tucker": True},
    "dylora": {"algo": "dylora", "block_size": 1},
    "full": {"algo": "full"},
}


@pytest.mark.parametrize("kind", ADDED)
def test_what_lycoris_adds_is_added(lycoris, network, patcher, tmp_path, kind):
    path = tmp_path / "x.safetensors"
    modules = _by_lycoris(lycoris, network, path, **ADDED[kind])
    with torch.inference_mode(False), torch.no_grad():
        wanted = {layer: _as_lycoris(module) for layer, module in modules.items()}
    assert {CONV, LINEAR, ONE_BY_ONE, OUT} <= set(wanted)
    _check(read_lora(path), patcher, wanted)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"algo": "glora"}, "GLoRA"),
        ({"algo": "diag-oft"}, "OFT"),
        ({"algo": "boft"}, "BOFT"),
        ({"algo": "ia3"}, r"\(IA\)³"),
        ({"algo": "tlora"}, "T-LoRA"),
        ({"algo": "lora", "dora_wd": True}, "DoRA"),
    ],
)
def test_what_lycoris_does_besides_is_refused_by_its_name(lycoris, patcher, tmp_path, settings, name):
    _by_lycoris(lycoris, _network(patcher, [LINEAR]), tmp_path / "x.safetensors", **settings)
    with pytest.raises(ValueError, match=f"'x' holds {name} "):
        network_factors(read_lora(tmp_path / "x.safetensors"), patcher.model)


def _by_peft(network, folder, config):
    """A network under a random adapter that peft has saved."""
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(network, config)
        _filled(model)
        model.save_pretrained(folder)
    return model


def _deltas(model, layers=(LINEAR, OUT), adapter="default"):
    with torch.inference_mode(False), torch.no_grad():
        return {n: model.base_model.model.get_submodule(DIFFUSERS[n]).get_delta_weight(adapter) for n in layers}


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "use_rslora": True},
        {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"to_out.0": 3}},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"velora_config": VeloraConfig(num_groups=4)},
    ],
)
def test_pefts_lora_is_added(network, patcher, tmp_path, settings):
    model = _by_peft(network, tmp_path, peft.LoraConfig(target_modules=LINEARS, **settings))
    _check(read_lora(tmp_path), patcher, _deltas(model))


def test_pefts_lora_of_convolutions_is_added(network, patcher, tmp_path):
    model = _by_peft(network, tmp_path, peft.LoraConfig(target_modules=["conv1", "proj_in"]))
    _check(read_lora(tmp_path), patcher, _deltas(model, (CONV, ONE_BY_ONE)))


PEFTS_OWN = {
    "loha": ("LoHaConfig", {}),
    "loha with cores": ("LoHaConfig", {"use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"decompose_factor": 2}),
    "lokr of two pairs": ("LoKrConfig", {"decompose_both": True, "decompose_factor": 4}),
    "lokr with a core": ("LoKrConfig", {"use_effective_conv2d": True, "decompose_factor": 2}),
    "lokr of whole factors": ("LoKrConfig", {"rank_pattern": {"attn1.to_q": 64}, "decompose_factor": 2}),
}


@pytest.mark.parametrize("kind", PEFTS_OWN)
def test_pefts_loha_and_lokr_add_what_merging_them_adds(network, patcher, tmp_path, kind):
    """PEFT scales whole factors of LoKr too; the host does not, so an ``alpha`` in the file would be lost."""
    names = [DIFFUSERS[layer] for layer in (LINEAR, OUT, CONV, ONE_BY_ONE)]
    plain = {name: network.get_submodule(name).weight.detach().clone() for name in names}
    config, settings = PEFTS_OWN[kind]
    config = getattr(peft, config)(
        target_modules=names, r=2, alpha=3, alpha_pattern={"to_out.0": 5}, **{"rank_pattern": {"conv1": 3}} | settings
    )
    model = _by_peft(network, tmp_path, config)
    lora = read_lora(tmp_path)
    with torch.inference_mode(False):
        merged = model.merge_and_unload()
    wanted = {}
    for layer in (LINEAR, OUT, CONV, ONE_BY_ONE):
        name = DIFFUSERS[layer]
        wanted[layer] = merged.get_submodule(name).weight.detach() - plain[name]
    # torch.kron of torch 2.14.1 refuses the strides of what the host makes of a core and its factors
    _check(lora, patcher, wanted, atol=1e-6, host_fails=[CONV] if kind == "lokr with a core" else ())
    with pytest.raises(ValueError, match="without its adapter_config"):
        network_factors(LoraFile("bare", load_file(tmp_path / "adapter_model.safetensors")), patcher.model)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_changed_its_model_is_added_once_it_is_converted(network, patcher, tmp_path, start):
    """Unconverted, it is several times off: its base is not the model."""
    generator = torch.Generator().manual_seed(0)
    plain = {layer: network.get_submodule(DIFFUSERS[layer]).weight.detach().clone() for layer in (LINEAR, OUT)}
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(network, peft.LoraConfig(target_modules=LINEARS, init_lora_weights=start, r=4))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = start
        with torch.no_grad():  # a little training
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02 * parameter.requires_grad)
        model.save_pretrained(tmp_path / "as it is")
        model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        deltas = _deltas(model)
        merged = model.merge_and_unload()
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}'"):
        read_lora(tmp_path / "as it is")
    wanted = {n: merged.get_submodule(DIFFUSERS[n]).weight.detach() - plain[n] for n in plain}
    _check(read_lora(tmp_path / "converted"), patcher, wanted)
    assert (deltas[LINEAR] - wanted[LINEAR]).norm() > 2 * wanted[LINEAR].norm()


OTHERS = {
    "AdaLoraConfig": ("ADALORA", {"total_step": 10}),
    "OFTConfig": ("OFT", {"oft_block_size": 4}),
    "BOFTConfig": ("BOFT", {"boft_block_size": 4}),
    "IA3Config": ("IA3", {"feedforward_modules": []}),
    "VeraConfig": ("VERA", {"r": 2}),
    "HRAConfig": ("HRA", {"r": 2}),
    "FourierFTConfig": ("FOURIERFT", {"n_frequency": 8}),
    "C3AConfig": ("C3A", {"block_size": 4}),
    "RoadConfig": ("ROAD", {"group_size": 4}),
    "DeloraConfig": ("DELORA", {"r": 2}),
}
VARIANTS = {
    "DoRA": lambda: {"use_dora": True},
    "BD-LoRA": lambda: {"use_bdlora": BdLoraConfig(target_modules_bd_a=["to_q"], nblocks=2, match_strict=False)},
    "KaSA": lambda: {"kasa_config": KasaConfig()},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_pefts_other_kinds_are_refused_by_name_with_and_without_their_configuration(network, patcher, tmp_path, kind):
    name, settings = OTHERS[kind]
    modules = ["attn1.to_q"] if kind == "VeraConfig" else LINEARS  # VeRA's layers share one size
    _by_peft(network, tmp_path, getattr(peft, kind)(target_modules=modules, **settings))
    with pytest.raises(ValueError, match=f"of the kind {name}"):
        read_lora(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="without its adapter_config"):
        network_factors(LoraFile("bare", tensors), patcher.model)
    named = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    with pytest.raises(ValueError, match=rf"holds (PEFT's {name}|\(IA\)³) "):
        network_factors(LoraFile("renamed", named), patcher.model)


def test_every_kind_of_peft_is_refused_by_name_or_read():
    """By what its tensors' names begin with."""
    read = {"lora_", "hada_", "lokr_"}
    of_language_models = {"adaption_prompt_", "cartridge_", "cpt_", "xlora_"} | {
        f"{kind}_tuning_" for kind in ("multitask_prompt", "p", "prefix", "prompt")
    }
    prefixes = set(PEFT_TYPE_TO_PREFIX_MAPPING.values()) - read - of_language_models
    assert len(prefixes) > 25
    for prefix in prefixes:
        with pytest.raises(ValueError, match="'x' holds "):
            check_kinds("x", {f"unet.down_blocks.0.to_q.{prefix}a.weight": torch.ones(1)})


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_pefts_lora_are_refused_by_name(network, tmp_path, variant):
    _by_peft(network, tmp_path, peft.LoraConfig(target_modules=LINEARS, r=4, **VARIANTS[variant]()))
    with pytest.raises(ValueError, match=f"of the kind LORA with {variant}"):
        read_lora(tmp_path)


def _config(adapter, model):
    values = model.peft_config[adapter].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


@pytest.mark.parametrize("spelling", ["peft", "diffusers", "kohya"])
def test_what_diffusers_saves_is_added(network, patcher, tmp_path, spelling):
    """Its metadata has the scale; what it converts for kohya's readers has ``alpha`` of its own, and scale 1."""
    with torch.inference_mode(False):
        model = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS))
        _filled(model)
        state = {k.removeprefix("base_model.model."): t for k, t in get_peft_model_state_dict(model).items()}
        path, deltas = tmp_path / "x.safetensors", _deltas(model)
    if spelling == "kohya":
        save_file(convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in state.items()}), path)
        deltas = {layer: delta / 2 for layer, delta in deltas.items()}
    else:
        state = convert_state_dict_to_diffusers(state) if spelling == "diffusers" else state
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            tmp_path, state, weight_name=path.name, unet_lora_adapter_metadata=_config("default", model)
        )
    _check(read_lora(path), patcher, deltas)


@pytest.mark.parametrize("spelling", ["peft", "diffusers", "kohya"])
def test_a_text_encoders_part_that_diffusers_saves_is_added(demo_model, tmp_path, spelling):
    """Under transformers 5 its names are without ``text_model.``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = demo_model[1]
    weights = {k: t for k, t in clip.cond_stage_model.state_dict().items() if k.startswith("clip_l.transformer.")}
    fc1 = weights["clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"]
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=fc1.shape[1], intermediate_size=len(fc1), num_hidden_layers=2, num_attention_heads=2
    )
    with torch.inference_mode(False):
        model = peft.get_peft_model(
            CLIPTextModel(config), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["fc1", "q_proj"])
        )
        _filled(model)
        state = {k.removeprefix("base_model.model."): t for k, t in get_peft_model_state_dict(model).items()}
        with torch.no_grad():
            deltas = [m.get_delta_weight("default") for n, m in model.named_modules() if n.endswith(("fc1", "q_proj"))]
    path, times = tmp_path / "x.safetensors", 1.0
    if spelling == "kohya":
        save_file(convert_state_dict_to_kohya({f"text_encoder.{key}": tensor for key, tensor in state.items()}), path)
        times = 0.5
    else:
        state = convert_state_dict_to_diffusers(state) if spelling == "diffusers" else state
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            tmp_path, None, state, weight_name=path.name, text_encoder_lora_adapter_metadata=_config("default", model)
        )
    changed, count = with_text_part(clip, read_lora(path), 1.0)
    assert count == len(deltas) == 4
    made = []
    for key, ((_, adapter, *_),) in changed.patcher.patches.items():
        zeros = torch.zeros_like(weights[key], dtype=torch.float32)
        made.append(adapter.calculate_weight(zeros, key, 1.0, 1.0, None, lambda weight: weight))
    for delta in deltas:
        assert any(m.shape == delta.shape and torch.allclose(m, delta * times, atol=1e-5) for m in made)
