"""Edits: what they hold, how two become one, and their files."""

from dataclasses import replace

import pytest
import torch
from comfyui_concepts.methods.erase import edit_file
from comfyui_concepts.methods.erase.edit import Edit, chain
from comfyui_concepts.methods.erase.lowrank import LowRank, balanced_factors, followed_by
from comfyui_concepts.methods.erase.targets import targeted_keys

KEY = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
OTHER = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
CLIP = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"


def low(seed: int, out: int = 12, rank: int = 2, width: int = 12) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, rank, generator=g), torch.randn(rank, width, generator=g))


def full_edit() -> Edit:
    return Edit(
        low(1), low(2, 6, 1, 6), {KEY: low(3, 20, 4), CLIP: low(4, 30, 2)}, {CLIP[:-6] + "bias": torch.ones(30)},
        ("v",), "input_blocks", {"concepts": [["cat", ""]], "seed": 3}, (1.5, 2.25), (0.125,), {"rank": 2},
    )  # fmt: skip


def same(a: Edit, b: Edit) -> bool:
    left, right = edit_file.tensors_of(a), edit_file.tensors_of(b)
    rest = [replace(e, text=None, pooled=None, layers={}, diffs={}) for e in (a, b)]
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left) and rest[0] == rest[1]


def test_a_file_gives_back_the_edit_and_equal_edits_are_equal_bytes(tmp_path):
    edit = full_edit()
    edit_file.save_edit(edit, tmp_path / "a.safetensors")
    edit_file.save_edit(full_edit(), tmp_path / "b.safetensors")
    assert same(edit_file.load_edit(tmp_path / "a.safetensors"), edit)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_files_that_are_no_edit_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"is not an edit.*Load LoRA"):
        edit_file.load_edit(tmp_path / "lora.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a file")
    with pytest.raises(ValueError, match=r"bad\.safetensors cannot be read"):
        edit_file.load_edit(tmp_path / "bad.safetensors")
    edit_file.write_tensors({"x": torch.zeros(2)}, tmp_path / "new.safetensors", {"concepts_edit": '{"version": 99}'})
    with pytest.raises(ValueError, match=r"edit format 99.*update the pack"):
        edit_file.load_edit(tmp_path / "new.safetensors")


def test_a_chain_is_the_edits_one_after_the_other():
    first = Edit(low(1), None, {KEY: low(3, 20, 4)})
    second = Edit(low(5), None, {KEY: low(6, 20, 3), OTHER: low(7, 20, 1)})
    both = chain(first, second)
    assert both.text.rank == 4
    assert both.layers[KEY].rank == 7
    W, one = torch.randn(20, 12, generator=torch.Generator().manual_seed(9)), torch.eye(12)
    after_first = W @ (one + first.text.matrix()) + first.layers[KEY].matrix()
    after_both = after_first @ (one + second.text.matrix()) + second.layers[KEY].matrix()
    made = W @ (one + both.text.matrix()) + both.layers[KEY].matrix()
    torch.testing.assert_close(made, after_both, rtol=1e-4, atol=1e-3)
    assert torch.equal(both.layers[OTHER].matrix(), second.layers[OTHER].matrix())


def test_chains_of_three_do_not_depend_on_how_they_are_bracketed():
    a, b, c = (Edit(low(seed)) for seed in (1, 2, 3))
    left, right = chain(chain(a, b), c).text.matrix(), chain(a, chain(b, c)).text.matrix()
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3)


def test_a_chain_with_an_edit_that_changes_nothing_is_the_other_one():
    edit = full_edit()
    assert chain(edit, Edit()) is edit
    assert chain(Edit(), edit) is edit
    three = chain(chain(Edit(low(1), spec={"a": 1}), Edit(low(2), spec={"b": 2})), Edit(low(3), spec={"c": 3}))
    assert three.specs() == [{"a": 1}, {"b": 2}, {"c": 3}]


def test_edits_of_different_families_do_not_chain():
    with pytest.raises(ValueError, match=r"width 12, the other for 8"):
        chain(Edit(low(1)), Edit(low(1, 8, 2, 8)))
    with pytest.raises(ValueError, match=r"different weights.*Apply Erasure twice"):
        chain(Edit(low(1)), Edit(low(1), targets=("v",)))


def test_the_product_of_two_maps_keeps_the_ranks():
    a, b, one = low(1), low(2), torch.eye(12)
    both = followed_by(a, b)
    assert both.rank == 4
    torch.testing.assert_close(one + both.matrix(), (one + a.matrix()) @ (one + b.matrix()), rtol=1e-4, atol=1e-4)


def test_balancing_changes_the_factors_and_not_the_matrix():
    lopsided = LowRank(low(1).up * 1e-4, low(1).down * 1e4)
    even = balanced_factors(lopsided)
    torch.testing.assert_close(even.matrix(), lopsided.matrix(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(even.up.norm(dim=0), even.down.norm(dim=1))
    assert not balanced_factors(LowRank(torch.zeros(3, 1), torch.ones(1, 3))).matrix().any()


def test_only_cross_attention_keys_and_values_are_reached():
    keys = [KEY, KEY.replace("to_k", "to_v"), KEY.replace("to_k", "to_q"), OTHER, CLIP, KEY.replace("input", "output")]
    assert targeted_keys(keys, ("k", "v")) == [keys[0], keys[1], keys[5]]
    assert targeted_keys(keys, ("v",)) == [keys[1]]
    assert targeted_keys(keys, ("k", "v"), "input_blocks") == keys[:2]


def test_an_edit_knows_what_is_in_it():
    edit = full_edit()
    assert list(edit.on_clip()) == [CLIP]
    assert list(edit.on_model()) == [KEY]
    assert edit.width == 12
    assert not edit.empty
    assert Edit().empty
    assert Edit(LowRank(torch.zeros(12, 0), torch.zeros(0, 12))).empty
