"""One batched call with a path for each concept is what N + 1 separately patched models would compute."""

from __future__ import annotations

import contextlib
import uuid

import comfy.conds
import comfy.lora
import comfy.model_management
import pytest
import torch
from comfyui_concepts.host import keys
from comfyui_concepts.host.conduct.paths import ConceptPath, Paths
from comfyui_concepts.host.engine.attention import sites_of
from comfyui_concepts.host.engine.attention_patches import after_attention, after_transformers
from comfyui_concepts.host.lora.branches import prepared
from comfyui_concepts.host.lora.factors import layer_names, network_factors
from comfyui_concepts.host.lora.files import LoraFile
from comfyui_concepts.methods.conduct.settings import Meeting
from comfyui_concepts.methods.masks import MaskPyramid
from comfyui_concepts.methods.regions import Box, Region

HALVES = [Region("left", (Box(0, 0, 0.5, 1),)), Region("right", (Box(0.5, 0, 0.5, 1),))]


def _noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lora_for(model, seed, only=lambda path: True):
    """A random LoRA on every Linear and some convolutions of a few blocks of each part of the UNet."""
    tensors, generator = {}, torch.Generator().manual_seed(seed)
    for path, module in model.diffusion_model.named_modules():
        wanted = ".transformer_blocks." in path or path.endswith(("in_layers.2", "proj_in"))
        wanted = wanted and path.startswith(("input_blocks.1.", "middle_block", "output_blocks.3.", "output_blocks.8."))
        if not wanted or not hasattr(module, "weight") or module.weight.ndim < 2 or not only(path):
            continue
        shape = module.weight.shape
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, *shape[1:], generator=generator, dtype=torch.float64) * 0.2
        up = torch.randn(shape[0], 4, *[1] * (len(shape) - 2), generator=generator, dtype=torch.float64)
        tensors[f"{name}.lora_up.weight"] = up * 0.2
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
    return LoraFile(f"random {seed}", tensors)


def conds(seed, tokens=7):
    context = comfy.conds.CONDCrossAttn(_noise(1, tokens, 24, seed=seed))
    return [{"uuid": uuid.uuid4(), "model_conds": {"c_crossattn": context}}]


@contextlib.contextmanager
def patched(patcher, lora, strength):
    """The model with the LoRA merged into its weights, by the host."""
    clone = patcher.clone()
    weights = {name: f"diffusion_model.{t.layer}.weight" for name, t in layer_names(patcher.model).items()}
    clone.add_patches(comfy.lora.load_lora(dict(lora.tensors), weights, log_missing=False), strength)
    before = {key: patcher.model.state_dict()[key].clone() for key in clone.patches}
    state = patcher.model.state_dict()
    with torch.no_grad():
        for key, patches in clone.patches.items():
            state[key].copy_(comfy.lora.calculate_weight(patches, state[key].clone(), key, torch.float64))
        yield
        for key, weight in before.items():
            state[key].copy_(weight)


class Setting:
    """Two concepts beside a base on a tiny model with the blocks of SD 1.5."""

    def __init__(self, patcher, masks, only=lambda path: True, strengths=(0.7, 1.2), batch=2, grid=(16, 24)):
        self.patcher, self.model = patcher, patcher.model
        self.model.current_patcher = patcher
        self.dtype = self.model.diffusion_model.dtype
        self.loras = [lora_for(self.model, n, only) for n in (1, 2)][: len(strengths)]
        self.strengths, self.masks = strengths, masks
        self.prompts = [(conds(10 * n + 1), conds(10 * n + 2)) for n in range(1 + len(strengths))]
        self.x = _noise(batch, 4, *grid, seed=77, dtype=self.dtype)
        self.sigma = torch.full((batch,), 2.0, dtype=self.dtype)
        self.options = {"transformer_options": {}}

    def paths(self, order=None):
        made = [ConceptPath(*self.prompts[0])]
        for n, (lora, strength) in enumerate(zip(self.loras, self.strengths, strict=True), 1):
            factors = prepared(network_factors(lora, self.model), torch.device("cpu"), self.dtype)
            made.append(ConceptPath(*self.prompts[n], factors, strength))
        return Paths(self.model, made, self.masks)

    @contextlib.contextmanager
    def seeing(self):
        """What comes out of the UNet itself, in its own precision, by path and side; the host's wrapper rounds to
        float32."""
        outputs = []
        handle = self.model.diffusion_model.register_forward_hook(lambda m, i, out: outputs.append(out.clone()))
        try:
            yield outputs
        finally:
            handle.remove()

    def batched(self, paths=None):
        """UNet outputs of the base, (positive, negative), each (batch, …)."""
        paths, found = paths or self.paths(), {}
        original = paths._record_maps
        tables = []
        paths._record_maps = lambda table, seen: (tables.append(table), original(table, seen))
        with self.seeing() as outputs, torch.no_grad():
            paths.predict(self.x, self.sigma, self.options)
        for table, out in zip(tables, outputs, strict=True):
            found |= {row.owner[:2]: out[row.rows] for row in table}
        return found

    def alone(self, prompt, change=None):
        """The UNet's output for one prompt, by itself."""
        options = (
            {"transformer_options": {}} if change is None else after_attention({"transformer_options": {}}, change)
        )
        context = prompt[0]["model_conds"]["c_crossattn"].cond.to(self.dtype)
        with self.seeing() as outputs, torch.no_grad():
            self.model.apply_model(
                self.x,
                self.sigma,
                c_crossattn=context.expand(len(self.x), -1, -1),
                transformer_options=options["transformer_options"],
            )
        return outputs[0]

    def one_by_one(self):
        """The same as N + 1 models, each with its own merged weights, one after the other."""
        found = {}
        for side in (0, 1):
            answers = []
            for n, (lora, strength) in enumerate(zip(self.loras, self.strengths, strict=True), 1):
                seen = {}

                def keep(out, place, extra, seen=seen):
                    seen[place] = out.clone()
                    return out

                with patched(self.patcher, lora, strength):
                    found[n, side] = self.alone(self.prompts[n][side], keep)
                answers.append(seen)

            def merge(out, place, extra, answers=answers):
                if place.block[0] != "output":
                    return out
                masks = self.masks.at(*place.grid).flatten(-2).to(out.dtype)
                parts = [masks[..., 0, :, None] * out]
                parts += [masks[..., n, :, None] * seen[place] for n, seen in enumerate(answers, 1)]
                return sum(parts)

            found[0, side] = self.alone(self.prompts[0][side], merge)
        return found


def _difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.fixture(scope="module")
def precise(new_model):
    return new_model("EPS", torch.float64, sd15=True)


@pytest.fixture(scope="module")
def single(new_model):
    return new_model("EPS", torch.float32, sd15=True)


def halves(soft=False):
    return MaskPyramid.of(HALVES, 16, 24, soft)


@pytest.mark.parametrize("soft", [False, True])
def test_one_call_is_what_separately_patched_models_compute(precise, soft):
    """Spec A8.2 and A8.3, in float64, positive and negative, two pictures; the concepts' rows too."""
    masks = MaskPyramid.of(
        [Region("left", (Box(0, 0, 0.4, 1),)), Region("right", (Box(0.3, 0, 0.7, 0.8),))], 16, 24, soft
    )
    setting = Setting(precise, masks)
    expected = setting.one_by_one()
    assert float((expected[0, 0] - setting.alone(setting.prompts[0][0])).abs().max()) > 1e-2
    assert _difference(setting.batched(), expected) < 1e-12


def test_in_single_precision_it_is_equal_to_rounding(single):
    setting = Setting(single, halves())
    assert _difference(setting.batched(), setting.one_by_one()) < 1e-5


def test_two_phases_give_the_same(precise, monkeypatch):
    setting = Setting(precise, halves())
    whole = setting.batched()
    monkeypatch.setattr(Paths, "_fits_one_call", lambda *_: False)
    paths = setting.paths()
    assert _difference(setting.batched(paths), whole) < 1e-12
    assert paths.calls == 3
    assert paths.merging.cached_outputs is None


def test_little_memory_chooses_two_phases(precise, monkeypatch):
    """The host then splits the base and the negatives as well."""
    setting = Setting(precise, halves())
    whole, paths = setting.batched(), setting.paths()
    little = 10.0
    monkeypatch.setattr(
        comfy.model_management, "get_free_memory", lambda _, torch_too=False: (little, little) if torch_too else little
    )
    assert _difference(setting.batched(paths), whole) < 1e-12
    assert paths.calls == 3


def test_the_base_does_not_depend_on_the_order_of_the_rows(precise):
    setting = Setting(precise, halves())
    forward = setting.batched()
    paths = setting.paths()
    ask = paths._evaluate

    def turned(lists, x, sigma, options):
        out = ask(lists[::-1], x, sigma, options)
        return out[::-1]

    paths._evaluate = turned
    assert _difference(setting.batched(paths), forward) < 1e-12


def test_weights_of_half_precision_cast_at_use_give_the_same(new_model):
    """fp16 weights that compute in float32, as the host casts them: the branch is added to what the layer answers."""
    cast = new_model("EPS", torch.float16, sd15=True)
    assert cast.model.manual_cast_dtype is torch.float32
    setting = Setting(cast, halves(), batch=1)
    setting.x, setting.sigma, setting.dtype = setting.x.float(), setting.sigma.float(), torch.float32
    batched = setting.batched()
    plain = Setting(cast, halves(), strengths=())
    plain.x, plain.sigma, plain.dtype, plain.prompts = setting.x, setting.sigma, torch.float32, setting.prompts
    with torch.no_grad():
        cast.model.diffusion_model.float()  # what fp16 weights hold, in float32
    assert _difference(batched, setting.one_by_one()) < 1e-5


def test_without_a_mask_anywhere_the_base_is_plain(precise):
    """Spec A8.4."""
    setting = Setting(precise, MaskPyramid(torch.zeros(2, 16, 24)))
    batched = setting.batched()
    for side in (0, 1):
        assert float((batched[0, side] - setting.alone(setting.prompts[0][side])).abs().max()) < 1e-12


@pytest.mark.parametrize(("decoder_only", "same_prompt"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_full_mask_is_the_plain_lora_only_if_prompts_agree_and_only_decoder_attentions_differ(
    precise, decoder_only, same_prompt
):
    """Spec A8.5, exactly those two facts."""

    def only(path):
        return not decoder_only or (path.startswith("output_blocks") and ".attn" in path)

    setting = Setting(precise, MaskPyramid(torch.ones(1, 16, 24)), only, strengths=(1.0,))
    if same_prompt:
        setting.prompts[1] = tuple([dict(e, uuid=uuid.uuid4()) for e in side] for side in setting.prompts[0])
    batched = setting.batched()
    gap = float((batched[0, 0] - batched[1, 0]).abs().max())
    assert (gap < 1e-12) == (decoder_only and same_prompt)


def test_a_concept_without_a_change_and_with_the_base_prompt_changes_nothing(precise):
    """Spec A8.10."""
    setting = Setting(precise, halves(), strengths=(0.0, 0.0))
    for n in (1, 2):
        setting.prompts[n] = tuple([dict(e, uuid=uuid.uuid4()) for e in side] for side in setting.prompts[0])
    assert float((setting.batched()[0, 0] - setting.alone(setting.prompts[0][0])).abs().max()) < 1e-12


def test_at_a_site_tokens_outside_are_the_bases_and_tokens_inside_the_concepts_bit_for_bit(precise):
    """Spec A8.6: at the first attention of the decoder; behind it convolutions and attentions carry it on."""
    setting, seen = Setting(precise, halves()), {}
    paths = setting.paths()
    merge = paths.merging.merge

    def watched(output, place, extra):
        before = output.clone()
        after = merge(output, place, extra)
        if place.block[0] == "output" and not seen:
            seen.update(before=before, after=after.clone(), table=extra[keys.PATH_ROWS], grid=place.grid)
        return after

    paths.merging.merge = watched
    with torch.no_grad():
        paths.predict(setting.x, setting.sigma, setting.options)
    rows = {r.owner[:2]: r.rows for r in seen["table"]}
    masks = setting.masks.at(*seen["grid"]).flatten(-2) > 0
    for side in (0, 1):
        after = seen["after"][rows[0, side]]
        for path in range(3):
            part = masks[path]
            assert torch.equal(after[:, part], seen["before"][rows[path, side]][:, part])
        assert torch.equal(seen["after"][rows[1, side]], seen["before"][rows[1, side]])


def test_every_picture_of_a_batch_has_its_own_masks(precise):
    left, right = (r.raster(16, 24) for r in HALVES)
    own = MaskPyramid(torch.stack([torch.stack([left, right]), torch.stack([right, left])]))
    both = Setting(precise, own).batched()
    swapped = Setting(precise, MaskPyramid(torch.stack([right, left]))).batched()
    same = Setting(precise, halves()).batched()
    for side in (0, 1):
        assert float((both[0, side][0] - same[0, side][0]).abs().max()) < 1e-12
        assert float((both[0, side][1] - swapped[0, side][1]).abs().max()) < 1e-12


def test_a_prompt_of_its_own_for_every_layer_reaches_every_layer(precise):
    """ED-LoRA: equal to exchanging the context in front of every cross-attention of the concept's model."""
    setting = Setting(precise, halves())
    layers = sum(s.kind == "cross" for s in sites_of(setting.model.diffusion_model))
    own = _noise(layers, 7, 24, seed=3)
    setting.prompts[1][0][0][keys.LAYER_CONTEXTS] = own
    batched = setting.batched()
    handles = [
        s.module(setting.model.diffusion_model).register_forward_pre_hook(
            lambda m, args, kwargs, layer=s.layer: (args, {**kwargs, "context": own[layer].expand(2, -1, -1)}),
            with_kwargs=True,
        )
        for s in sites_of(setting.model.diffusion_model)
        if s.kind == "cross"
    ]
    with patched(precise, setting.loras[0], setting.strengths[0]):
        expected = setting.alone(setting.prompts[1][0])
    for handle in handles:
        handle.remove()
    assert float((batched[1, 0] - expected).abs().max()) < 1e-12


def test_other_rows_and_other_calls_pass_untouched(precise):
    setting = Setting(precise, halves())
    paths, foreign = setting.paths(), conds(99)
    with torch.no_grad():
        plain = comfy.samplers.calc_cond_batch(setting.model, [foreign], setting.x, setting.sigma, {})
        out = comfy.samplers.calc_cond_batch(
            setting.model, [foreign], setting.x, setting.sigma, paths.routed(setting.options)
        )
    assert torch.equal(plain[0], out[0])
    assert not any(m._forward_hooks for m in setting.model.diffusion_model.modules())


@pytest.mark.parametrize("soft", [False, True])
def test_another_node_that_asks_for_the_base_alone_gets_the_base_whole(precise, soft, caplog):
    """The concepts are missing in that answer, which is said once; the base is not darkened by the background's
    mask."""
    setting = Setting(precise, halves(soft))
    paths = setting.paths()
    with setting.seeing() as outputs, torch.no_grad():
        for options in ({}, paths.routed({}), paths.routed({})):
            asked = [setting.prompts[0][0]]
            comfy.samplers.calc_cond_batch(setting.model, asked, setting.x, setting.sigma, options)
    plain, *others = outputs
    assert all(torch.equal(plain, other) for other in others)
    assert sum("requested a prediction for the base prompt only" in r.message for r in caplog.records) == 1


def test_rows_of_another_node_in_our_call_take_nothing_from_ours(precise):
    """And get nothing of ours: no LoRA, no merge."""
    setting, foreign = Setting(precise, halves()), conds(99)
    expected = setting.batched()
    paths, tables = setting.paths(), []
    ask, keep = paths._evaluate, paths._record_maps
    paths._record_maps = lambda table, seen: (tables.append(table), keep(table, seen))

    def beside(lists, x, sigma, options):
        return ask([*lists[:2], foreign, *lists[2:]], x, sigma, options)

    paths._evaluate = beside
    with setting.seeing() as outputs, torch.no_grad():
        paths.predict(setting.x, setting.sigma, setting.options)
    assert len(outputs) == 1
    rows = {row.owner[:2]: outputs[0][row.rows] for row in tables[0]}
    assert _difference(rows, expected) < 1e-12
    free = set(range(len(outputs[0]))) - {n for row in tables[0] for n in range(row.rows.start, row.rows.stop)}
    assert float((outputs[0][sorted(free)] - setting.alone(foreign)).abs().max()) < 1e-12


def deep_one_by_one(setting):
    """As ``one_by_one``, with what whole transformers answer instead of attentions."""
    found, unet = {}, setting.model.diffusion_model
    for side in (0, 1):
        answers = []
        for n, (lora, strength) in enumerate(zip(setting.loras, setting.strengths, strict=True), 1):
            seen = {}
            with (
                patched(setting.patcher, lora, strength),
                after_transformers(unet, lambda out, place, seen=seen: seen.update({place: out.clone()})),
            ):
                found[n, side] = setting.alone(setting.prompts[n][side])
            answers.append(seen)

        def merge(out, place, answers=answers):
            masks = setting.masks.at(*place.grid).flatten(-2).to(out.dtype)
            parts = [masks[..., n, :, None] * seen[place] for n, seen in enumerate(answers, 1)]
            out.copy_(masks[..., 0, :, None] * out + sum(parts))

        with after_transformers(unet, merge):
            found[0, side] = setting.alone(setting.prompts[0][side])
    return found


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("phases", [1, 2])
def test_whole_transformers_are_those_of_separately_patched_models(precise, soft, phases, monkeypatch):
    setting = Setting(precise, halves(soft))
    paths = setting.paths()
    paths.meeting = Meeting(whole_blocks=True)
    if phases == 2:
        monkeypatch.setattr(Paths, "_fits_one_call", lambda *_: False)
    found = setting.batched(paths)
    assert paths.calls == (1 if phases == 1 else 3)
    assert _difference(found, deep_one_by_one(setting)) < 1e-12


def test_weights_that_stay_off_the_device_give_the_same(new_model):
    """A partial load, in which every layer brings its weights when it runs."""
    low = new_model("EPS", torch.float32, sd15=True)
    setting = Setting(low, halves(), batch=1)
    whole = setting.batched()
    low.load(torch.device("cpu"), lowvram_model_memory=1)
    assert low.model.model_lowvram
    assert _difference(setting.batched(), whole) < 1e-6
