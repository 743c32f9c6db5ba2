"""Every node loads, explains itself, and keeps the shape that saved workflows rely on."""

import asyncio
import json
from pathlib import Path

import pytest
from comfyui_concepts import comfy_entrypoint
from comfyui_concepts.nodes import NODES

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS, WORKFLOWS = ROOT / "web" / "docs", ROOT / "workflows" / "api"
GOLDEN = Path(__file__).with_name("golden.json")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
MOST_WIDGETS = 6


def _shape(node) -> dict:
    schema = node.GET_SCHEMA()
    return {
        "inputs": [[i.id, i.get_io_type()] for i in schema.inputs],
        "outputs": [[o.id, o.get_io_type()] for o in schema.outputs],
    }


def test_the_entry_point_lists_every_node():
    async def listed():
        return await (await comfy_entrypoint()).get_node_list()

    assert asyncio.run(listed()) == list(NODES)


@pytest.mark.parametrize("node", NODES, ids=lambda n: n.__name__)
def test_a_node_loads_and_explains_itself(node):
    schema = node.GET_SCHEMA()
    assert schema.node_id == node.__name__
    assert schema.node_id.startswith("Concepts")
    assert schema.category.startswith("concepts")
    assert schema.display_name
    assert len(schema.description) > 40
    for socket in (*schema.inputs, *schema.outputs):
        assert socket.tooltip, f"{schema.node_id}.{socket.id} has no tooltip"
    for output in schema.outputs:
        assert output.display_name
    assert sum(i.get_io_type() in WIDGETS for i in schema.inputs) <= MOST_WIDGETS


@pytest.mark.parametrize("node", NODES, ids=lambda n: n.__name__)
def test_a_node_has_a_help_page_that_names_its_inputs_and_choices(node):
    schema = node.GET_SCHEMA()
    page = (DOCS / f"{schema.node_id}.md").read_text()
    assert page.startswith(f"# {schema.display_name}\n")
    for socket in schema.inputs:
        assert socket.id in page, f"{schema.node_id}.md does not name {socket.id}"
        for choice in getattr(socket, "options", None) or ():
            if choice.endswith(".safetensors"):  # the user's files, or those another test has saved
                continue
            assert choice in page, f"{schema.node_id}.md does not name {choice}"
    used = any(schema.node_id in path.read_text() for path in WORKFLOWS.rglob("*.json"))
    assert used, f"no template uses {schema.node_id}"


def test_saved_workflows_keep_working():
    """Ids, inputs and their order are frozen once landed; new widgets go last. Extend golden.json, never edit it."""
    golden = json.loads(GOLDEN.read_text())
    now = {node.__name__: _shape(node) for node in NODES}
    assert set(golden) <= set(now), "a node was removed or renamed"
    for name, shape in golden.items():
        for side in ("inputs", "outputs"):
            assert now[name][side][: len(shape[side])] == shape[side], (
                f"{name}: {side} were reordered, renamed or removed"
            )
    assert set(now) <= set(golden), (
        f"add the new nodes to golden.json: {json.dumps({n: now[n] for n in set(now) - set(golden)})}"
    )
