"""Everything of ours beside everything that others bring: equal to its plain counterpart, or refused in words.

Each of ours has a setting in which it is plain sampling by theory, with all its machinery at work: views that turn
nothing, concepts that are the base, steps of no length. And it has one in which it does something, which must show.
What is found goes into the table of docs/RESULTS.md (``dev.py company --write``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch._dynamo
from comfyui_concepts.host.compose import guider as compose_guider
from comfyui_concepts.host.conduct import path_guider
from comfyui_concepts.host.conduct.paths import Paths
from comfyui_concepts.host.erase.entry.hooks import mapped_rows

from ..conftest import TINY_UNET, tiny_model
from .ours import ERASURE, GRADIENTS, OURS
from .parties import COMPANY, SMALL, Setting, plain, sample

_IN_THE_NETWORK = [name for name in OURS if name.startswith(("Concept", "LoRA", "Keep", "Apply Erasure by"))]
_IN_REGIONS = [name for name in OURS if name.startswith(("Concept", "LoRA"))]
REFUSED = {
    **{(name, "TorchCompileModel"): "bypass the TorchCompileModel node" for name in (*_IN_THE_NETWORK, *GRADIENTS)},
    **{(name, "EasyCache"): "through EasyCache.*bypass that node" for name in GRADIENTS},
    ("LoRA Composer, finding regions", "EasyCache"): "did not run",  # it answers in every step after the search
    **{(name, "LoRA hooks"): "has LoRA hooks, which would split" for name in _IN_REGIONS},
}
"""What cannot be, and the words in which it is refused; everything else is equal."""
LEFT_OUT = {("Concept Conductor in two calls", "EasyCache")}
"""Where the other has no say: the cache skips the call of the concepts, so the base's call is made in every step."""


@pytest.fixture(scope="module")
def company():
    """Each kind of company, made once; with the pictures that are compared, sampled once."""
    model, made, pictures = tiny_model("EPS", unet=TINY_UNET | SMALL), {}, {}

    def setting(kind: str) -> Setting:
        if kind not in made:
            made[kind] = COMPANY[kind](model) if kind in COMPANY else Setting(model)
        return made[kind]

    def picture(kind: str, edits: bool) -> torch.Tensor:
        if (kind, edits) not in pictures:
            erased = partial(mapped_rows, matrix=ERASURE.text, strength=1.0)
            whose = replace(setting(kind), edit=erased) if edits else setting(kind)
            pictures[kind, edits] = sample(plain(whose), whose.steps)
        return pictures[kind, edits]

    return setting, picture


@pytest.mark.parametrize("kind", COMPANY)
@pytest.mark.parametrize("ours", OURS)
def test_beside_others_it_is_its_plain_counterpart_or_refused(company, ours, kind, record_property, monkeypatch):
    setting, picture = company
    row, beside = OURS[ours], setting(kind)
    record_property("ours", ours)
    record_property("company", kind)
    if row.two_calls:
        monkeypatch.setattr(Paths, "_fits_one_call", lambda *_: False)
    if (ours, kind) in REFUSED:
        record_property("found", "refused")
        with pytest.raises(ValueError, match=REFUSED[ours, kind]):
            sample(row.make(beside, True), beside.steps)
        return
    left_out = (ours, kind) in LEFT_OUT
    record_property("found", "equal to plain without it" if left_out else "equal")
    should = sample(plain(Setting(setting("none").model)), beside.steps) if left_out else picture(kind, row.edits)
    apart = (sample(row.make(beside, False), beside.steps) - should).abs().max()
    assert apart <= 1e-3 * should.std()
    if not row.edits:
        assert (sample(row.make(beside, True), beside.steps) - should).abs().max() > 3 * apart


@pytest.mark.parametrize("kind", [kind for kind in COMPANY if kind != "TorchCompileModel"])
def test_the_company_shows(company, kind):
    """Or the table would say nothing."""
    setting, picture = company
    beside = setting(kind)
    bare = replace(beside, positive=({},), negative=({},), model=setting("none").model)
    bare = replace(bare, model=beside.model) if kind == "inpaint model" else bare
    assert (sample(plain(bare), beside.steps) - picture(kind, False)).abs().max() > 1e-4 * picture(kind, False).std()


@pytest.mark.parametrize("ours", ["Concept Conductor", "LoRA Composer"])
def test_hooks_and_patches_that_did_not_answer_are_told(ours, monkeypatch):
    """Whatever a compiled model looks like to us: what was traced before does not run them.

    One block is compiled: to trace the whole network takes a minute of processor time, and shows the same.
    """
    torch._dynamo.reset()  # what other tests have traced would soon count as too much, and be run as it is
    compiled = Setting(tiny_model("EPS", unet=TINY_UNET | SMALL))
    compiled.model.get_model_object("diffusion_model.middle_block.1.transformer_blocks.0").compile(backend="eager")
    sample(plain(compiled), 1, batch=2 if ours == "Concept Conductor" else 1)  # as many rows as with a concept
    for module in (compose_guider, path_guider):
        monkeypatch.setattr(module, "check_reaches_network", lambda *_: None)
    refused = pytest.raises(ValueError, match=f"{ours} hangs on the layer .* did not run.*TorchCompileModel")
    with torch._dynamo.config.patch(recompile_limit=64), refused:
        sample(OURS[ours].make(compiled, True), 1)
