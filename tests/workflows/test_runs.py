"""Graphs through the real server: pictures with their workflow inside, and a sentence for what cannot run."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import pytest
from comfyui_concepts.workbench.client import GraphFailed, run_graph
from comfyui_concepts.workbench.host_folder import LOCK
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent


def _graph(name: str, **changes) -> dict:
    """A shipped graph with some inputs changed: ``node="value"`` as ``n11_width=192``."""
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())
    for key, value in changes.items():
        node, widget = key[1:].split("_", 1)
        if value is None:
            del graph[node]["inputs"][widget]
        else:
            graph[node]["inputs"][widget] = value
    return graph


def _run(server, graph, **options):
    return asyncio.run(run_graph(server.url, graph, **options))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "workflows" / "api").glob("*.json")), ids=lambda p: p.stem)
def test_every_graph_runs_and_its_pictures_hold_the_workflow(finished, path):
    template = json.loads((ROOT / "workflows" / path.name).read_text())
    pictures = finished(path.stem).pictures
    assert pictures
    for picture in pictures:
        image = Image.open(io.BytesIO(picture.data))
        assert min(image.size) >= 128
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100  # a picture, not a blank
        if image.format == "WEBP":  # a film
            assert image.n_frames > 20
            continue
        assert json.loads(image.info["prompt"]) == json.loads(path.read_text())
        assert json.loads(image.info["workflow"]) == template


def test_a_wide_canvas_runs_with_views_that_take_it(server):
    pictures = _run(server, _graph("anagram_turn", n11_width=192, n11_batch_size=1, n10_steps=2))
    assert [Image.open(io.BytesIO(p.data)).size for p in pictures] == [(192, 128)] * 2


@pytest.mark.parametrize(
    ("graph", "changes", "sentence"),
    [
        ("anagram_turn", {"n6_view": "rotate_cw", "n11_width": 192}, "needs a square canvas.*3:2"),
        ("anagram_turn", {"n6_view": "spin"}, "spin"),
        ("anagram_turn", {"n5_weight": 0.0, "n6_weight": 0.0}, "Weights must be 0 or more, and at least one above 0"),
        ("anagram_turn", {"n7_views": None}, "views"),
        (
            "demo_first_picture",
            {"n4_width": 512, "n4_height": 512},
            "draws pictures of 128 × 128.*512 × 512.*set width and height",
        ),
        ("demo_first_picture", {"n4_width": 16, "n4_height": 16}, "this canvas is 16 × 16"),
    ],
)
def test_bad_input_gets_a_sentence_and_the_next_run_works(server, graph, changes, sentence):
    with pytest.raises(GraphFailed, match=sentence):
        _run(server, _graph(graph, **changes))
    assert _run(server, _graph("demo_first_picture", n5_steps=1, n4_batch_size=1))


def test_an_empty_prompt_is_a_prompt(server):
    assert _run(server, _graph("demo_first_picture", n2_text="", n5_steps=2, n4_batch_size=1))


def test_a_lora_of_another_model_is_harmless(server, host_path):
    """The host's own loader warns and goes on; the picture is the plain model's, bit for bit."""
    import torch
    from safetensors.torch import save_file

    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    name = "lora_unet_down_blocks_9_attentions_9_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(4, 320), f"{name}.lora_up.weight": torch.ones(320, 4)},
        folder / "foreign.safetensors",
    )
    graph = _graph("demo_lora_concept", n5_steps=3, n4_batch_size=1)
    graph["8"]["inputs"]["lora_name"] = "foreign.safetensors"
    plain = _graph(
        "demo_lora_concept", n5_steps=3, n4_batch_size=1, n5_model=["1", 0], n2_clip=["1", 1], n3_clip=["1", 1]
    )
    del plain["8"]
    shown = [Image.open(io.BytesIO(_run(server, g)[0].data)).tobytes() for g in (graph, plain)]
    assert shown[0] == shown[1]


def test_cancel_ends_the_run_within_seconds(server):
    import time
    import urllib.request

    async def cancelled():
        run = asyncio.create_task(run_graph(server.url, _graph("anagram_turn", n10_steps=900, n8_noise_seed=77)))
        await asyncio.sleep(3)
        urllib.request.urlopen(urllib.request.Request(server.url + "/interrupt", method="POST"))
        started = time.monotonic()
        with pytest.raises(GraphFailed, match="interrupted"):
            await run
        return time.monotonic() - started

    assert asyncio.run(cancelled()) < 30  # generous: the machine is noisy; 900 steps would take minutes
    assert _run(server, _graph("anagram_turn", n10_steps=2, n11_batch_size=1))


def test_a_graph_of_which_a_part_is_refused_has_failed(server):
    graph = _graph("demo_first_picture", n5_steps=1, n4_batch_size=1)
    graph["90"] = {"class_type": "PreviewImage", "inputs": {}}
    with pytest.raises(GraphFailed, match="node 90 \\(PreviewImage\\)"):
        _run(server, graph)


def test_a_host_that_is_gone_gets_a_sentence():
    from comfyui_concepts.workbench.server import free_port

    with pytest.raises(GraphFailed, match="did not answer as ComfyUI does"):
        asyncio.run(run_graph(f"http://127.0.0.1:{free_port()}", _graph("demo_first_picture")))


def test_the_pack_writes_only_where_the_host_does(server, untouched):
    """Runs of every graph leave the repository and the host's folder as they were when the session began."""

    def there():
        files = (p.relative_to(server.base) for p in server.base.rglob("*") if p.is_file() and not p.is_symlink())
        return {p for p in files if p.parts[0] not in ("output", "temp", "user", "host.log", LOCK)}

    before = there()
    _run(server, _graph("anagram_turn", n10_steps=1, n11_batch_size=1, n8_noise_seed=5))
    assert there() == before
    assert {p.parts[0] for p in before} <= {"models", "input"}  # what other tests have laid there
    untouched()
