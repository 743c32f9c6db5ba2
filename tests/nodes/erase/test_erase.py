"""Erasure as the graph hands it on: lists, edits, reports, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_concepts.host import folders
from comfyui_concepts.methods.erase.edit import Edit, chain
from comfyui_concepts.methods.erase.edit_file import save_edit
from comfyui_concepts.methods.erase.lowrank import LowRank
from comfyui_concepts.methods.erase.report import PROMISE, report_picture, report_text
from comfyui_concepts.methods.erase.solvers import SOLVERS
from comfyui_concepts.methods.erase.spec import LAST, TEMPLATES, UNSAFE_WORDS
from comfyui_concepts.nodes.erase import apply as erase_apply
from comfyui_concepts.nodes.erase import concepts as erase_concepts
from comfyui_concepts.nodes.erase import files as erase_files
from comfyui_concepts.nodes.erase import solve as erase

TRAINED = {"training": {"reason": "the budget is used up", "rank": 4, "erase": [1.0, 0.2], "preserve": []}}
TRAINED_SPEC = {"solver": "ESD", "budget": "draft", "seed": 0, "concepts": [{"concept": "bus"}], "kept": ["a car"]}


def _concepts(concept="cat", anchor="dog", templates="object", scope=LAST, names="", previous=None):
    return erase_concepts.ConceptsEraseConcept.execute(concept, anchor, templates, scope, 1.0, names, previous).args[0]


def _kept(prompts="a fox; a panda"):
    return erase_concepts.ConceptsPreserveConcepts.execute(prompts, 1.0, "last word and end").args[0]


def _solve(model, clip, concepts=None, solver="uce", projections="keys and values", options=None):
    return erase.ConceptsSolveErasure.execute(
        model, clip, concepts or _concepts(), solver, projections, False, -1, _kept(), options
    ).args


def test_concepts_chain_and_one_node_can_name_several():
    listed = _concepts("car; bus", previous=_concepts("cat", names="kitten; kitty")).in_order()
    assert [e.concept for e in listed] == ["cat", "car", "bus"]
    assert listed[0].names == ("kitten", "kitty")
    assert listed[0].templates == TEMPLATES["object"]


def test_the_unsafe_words_come_by_themselves():
    listed = _concepts("", "", "unsafe words").in_order()
    assert tuple(e.concept for e in listed) == UNSAFE_WORDS


def test_kept_prompts_are_apart_by_lines_or_semicolons():
    assert _kept("a fox\n a panda ;; the moon").prompts == ("a fox", "a panda", "the moon")
    assert _kept("a fox // red; wild\n/* birds\nan owl; */ a panda").prompts == ("a fox", "a panda")


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_gives_an_edit_a_report_and_a_picture(demo_model, solver):
    model, clip, _ = demo_model
    edit, report, picture = _solve(model, clip, solver=solver)
    assert edit.width == 128
    assert not edit.empty
    assert "cat" in report
    assert "'a fox'" in report
    assert "A later LoRA can bring a concept back, unless the edit is delivered as text" in report
    assert "does not guarantee removal" in report
    assert picture.shape[0] == 1
    assert picture.shape[-1] == 3
    assert 0 <= picture.min() < picture.max() <= 1


def test_the_numbers_reach_the_solver(demo_model):
    model, clip, _ = demo_model
    options = erase.ConceptsEraseOptions.execute(1000.0, 0.0, 1, 0.1, 1.0, 0.1).args[0]
    stiff, plain = (_solve(model, clip, options=o)[0].report["concepts"][0]["left"] for o in (options, None))
    assert stiff > 10 * plain
    assert _solve(model, clip, projections="values")[0].targets == ("v",)


def test_what_a_report_does_not_hold_back():
    assert "Nothing is erased" in report_text({}, {})
    assert "A later LoRA can bring a concept back. This reduces" in report_text(TRAINED, TRAINED_SPEC)
    assert "image prompts" in PROMISE
    assert report_picture({}).shape[-1] == 3


def test_choices_that_no_host_checks_are_refused(demo_model):
    model, clip, _ = demo_model
    with pytest.raises(ValueError, match=r"no template set 'x'.*object"):
        _concepts(templates="x")
    with pytest.raises(ValueError, match=r"no scope 'x'.*last subject token"):
        _concepts(scope="x")
    with pytest.raises(ValueError, match=r"no solver 'x'.*uce"):
        _solve(None, None, solver="x")  # before the model or the CLIP is asked
    with pytest.raises(ValueError, match=r"no choice of projections 'x'"):
        _solve(model, clip, projections="x")
    with pytest.raises(ValueError, match=r"no delivery 'x'.*automatic"):
        erase_apply.ConceptsApplyErasure.execute(model, Edit(), 1.0, "x")
    with pytest.raises(ValueError, match="no concept to erase"):
        _concepts("")


@pytest.mark.parametrize("strength", [-0.1, 1.6, float("nan")])
def test_strengths_out_of_range_are_refused(demo_model, strength):
    for run in (
        lambda: erase_apply.ConceptsApplyErasure.execute(demo_model[0], Edit(), strength, "automatic"),
        lambda: erase_apply.ConceptsEraseFromConditioning.execute([], Edit(), strength),
    ):
        with pytest.raises(ValueError, match="an edit takes 0 to 1.5; start with 1"):
            run()


def test_applying_gives_a_patched_clone_and_passes_the_encoder_on(demo_model):
    model, clip, _ = demo_model
    edit = _solve(model, clip)[0]
    edited, same = erase_apply.ConceptsApplyErasure.execute(model, edit, 1.0, "automatic", clip).args
    assert same is clip
    assert len(edited.patches) == 14
    assert not model.patches
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
    ((tokens, _),) = erase_apply.ConceptsEraseFromConditioning.execute(prompt, edit, 1.0).args[0]
    assert not torch.equal(tokens, prompt[0][0])


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The host's output folder and its folder of edits, elsewhere."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, folders.EDITS, ([str(tmp_path / folders.EDITS)], {".safetensors"})
    )
    (tmp_path / folders.EDITS).mkdir()
    return tmp_path


def test_an_edit_is_saved_and_loaded_by_its_name(demo_model, places):
    model, clip, _ = demo_model
    edit = _solve(model, clip)[0]
    name = erase_files.ConceptsSaveEdit.execute(edit, "concepts_edits/cat").args[0]
    assert name == "cat_00001_.safetensors"
    loaded, report = erase_files.ConceptsLoadEdit.execute(name).args
    assert torch.equal(loaded.text.up, edit.text.up)
    assert "cat" in report
    both, _ = erase_files.ConceptsLoadEdit.execute(name, edit).args
    assert both.text.rank == 2 * edit.text.rank
    assert erase_files.ConceptsLoadEdit.execute("none", edit).args[0] is edit


def test_a_trained_and_a_chained_edit_show_their_reports_when_they_are_loaded(demo_model, places):
    model, clip, _ = demo_model
    solved = _solve(model, clip)[0]
    layer = {"diffusion_model.a.weight": LowRank(torch.ones(2, 1), torch.ones(1, 2))}
    trained, silent = Edit(layers=layer, spec=TRAINED_SPEC, report=TRAINED), Edit(layers=layer)

    def report(edit):
        name = erase_files.ConceptsSaveEdit.execute(edit, "concepts_edits/edit").args[0]
        return erase_files.ConceptsLoadEdit.execute(name).args[1]

    assert report(trained).startswith("ESD, draft: the budget is used up\nconcepts: bus; rank 4")
    assert report(silent) == "no report in this file"
    both = report(chain(chain(solved, trained), silent))
    assert both.startswith("uce: 1 concept,")
    assert "'a fox'" in both
    assert "ESD, draft: the budget is used up" in both
    assert both.count(PROMISE) == 1
    nested = {"chain": [{"chain": [solved.report, TRAINED]}, {}]}  # as files of an earlier version have it
    assert report_text(nested, {"chain": [solved.spec, TRAINED_SPEC, {}]}) == both


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "gone.safetensors"])
def test_only_listed_files_are_loaded(places, name):
    save_edit(Edit(), places / "secret.safetensors")
    with pytest.raises(ValueError, match="no saved edit"):
        erase_files.ConceptsLoadEdit.execute(name)


def test_files_stay_in_the_output_folder(demo_model, places):
    with pytest.raises(ValueError, match="leads out of the output folder"):
        erase_files.ConceptsSaveEdit.execute(Edit(), "../../edit")


@pytest.mark.parametrize("prefix", ["taken/edit", "taken/deeper/edit", "x" * 300])
def test_what_cannot_be_written_says_what_the_system_said(places, prefix):
    """A file where a folder should be, and a name too long for the disk."""
    (places / "taken").write_text("")
    before = sorted(places.rglob("*"))
    with pytest.raises(ValueError, match=r"cannot be written .*(Not a directory|File exists|name too long)"):
        erase_files.ConceptsSaveEdit.execute(Edit(), prefix)
    assert sorted(places.rglob("*")) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_says_so_and_leaves_no_half_a_file(tmp_path):
    (tmp_path / "edit.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\); make room"):
        save_edit(Edit(), tmp_path / "edit.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_lora_is_saved_where_load_lora_looks(demo_model, places):
    model, clip, _ = demo_model
    edit = _solve(model, clip)[0]
    save = erase_files.ConceptsSaveErasureLora
    name = save.execute(model, edit, "loras/erase", "kohya", "fp16").args[0]
    assert (places / "loras" / name).stat().st_size > 1000
    with pytest.raises(ValueError, match=r"changes nothing.*add concepts"):
        save.execute(model, Edit(), "loras/erase", "kohya", "fp16")
    with pytest.raises(ValueError, match="no naming 'x'"):
        save.execute(model, edit, "loras/erase", "x", "fp16")
    with pytest.raises(ValueError, match="no precision 'x'"):
        save.execute(model, edit, "loras/erase", "kohya", "x")


def test_a_probe_reads_its_sentences_and_refuses_what_it_cannot_probe(demo_model):
    model, clip, _ = demo_model
    edit = _solve(model, clip)[0]
    report = erase_files.ConceptsProbeErasure.execute(model, clip, edit, "a sketch of a {}; the {}").args[0]
    assert "cat: as solved" in report
    assert "A later LoRA can bring a concept back" in report
    assert PROMISE in report
    with pytest.raises(ValueError, match=r"needs one \{\}"):
        erase_files.ConceptsProbeErasure.execute(model, clip, edit, "no place for it")
    with pytest.raises(ValueError, match=r"only edits solved in closed form"):
        erase_files.ConceptsProbeErasure.execute(model, clip, Edit(), "{}")
