"""A small client of the host's API: queue a graph on ``/prompt``, follow it on ``/ws``, fetch its pictures."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

Progress = Callable[[str, float, float], None]
"""Called with the node's id, the step and the number of steps."""


class GraphFailed(RuntimeError):
    """The host refused a graph or a node raised; the message is the host's own sentence."""


@dataclass(frozen=True)
class Picture:
    """A saved picture: the node it came from, its file name in the host, its PNG bytes."""

    node: str
    name: str
    data: bytes


def refusal(answer: dict[str, Any]) -> str:
    """The host's reasons for refusing a graph, in one line."""
    reasons = [answer.get("error", {}).get("message", "the host refused the graph")]
    for node, errors in (answer.get("node_errors") or {}).items():
        reasons += [f"node {node} ({errors['class_type']}): {e['message']}, {e['details']}" for e in errors["errors"]]
    return "; ".join(reasons)


async def run_graph(
    url: str,
    graph: dict[str, Any],
    *,
    workflow: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Picture]:
    """Runs a graph in API format to its end and returns the pictures it saved.

    Args:
        workflow: the same graph in UI format; the host embeds it in the PNGs: dropping one restores the graph.

    Raises:
        GraphFailed: the host refused the graph or a part of it, a node raised, or the run or the host was ended.
    """
    try:
        return await _run(url, graph, workflow, progress)
    except aiohttp.ClientError as error:
        raise GraphFailed(f"the host did not answer as ComfyUI does ({type(error).__name__}: {error})") from error


async def _run(
    url: str, graph: dict[str, Any], workflow: dict[str, Any] | None, progress: Progress | None
) -> list[Picture]:
    client = str(uuid.uuid4())
    async with (
        aiohttp.ClientSession(url) as session,
        session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket,
    ):
        request: dict[str, Any] = {"prompt": graph, "client_id": client, "prompt_id": str(uuid.uuid4())}
        if workflow is not None:
            request["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        async with session.post("/prompt", json=request) as response:
            answer = await response.json()
            # the host runs what it can of a graph, and answers 200, if some of its outputs are in order
            if response.status != 200 or answer.get("node_errors"):
                raise GraphFailed(refusal(answer))
        await _follow(socket, answer["prompt_id"], progress)
        return await _pictures(session, answer["prompt_id"])


async def _follow(socket: aiohttp.ClientWebSocketResponse, prompt: str, progress: Progress | None) -> None:
    """Reads events until the prompt has ended."""
    async for message in socket:
        if message.type != aiohttp.WSMsgType.TEXT:
            continue  # previews are binary
        event = json.loads(message.data)
        kind, data = event["type"], event["data"]
        if data.get("prompt_id") not in (prompt, None):
            continue
        if kind == "progress" and progress is not None:
            progress(data["node"], data["value"], data["max"])
        elif kind == "execution_success":
            return
        elif kind == "execution_error":
            raise GraphFailed(f"node {data['node_id']} ({data['node_type']}): {data['exception_message'].strip()}")
        elif kind == "execution_interrupted":
            raise GraphFailed("the run was interrupted")
    raise GraphFailed("the host closed the connection before the graph had ended")


async def _pictures(session: aiohttp.ClientSession, prompt: str) -> list[Picture]:
    """The pictures of type ``output`` that a finished prompt saved."""
    history: dict[str, Any] = {}
    while prompt not in history:  # the host files a prompt a moment after it has reported its success
        async with session.get(f"/history/{prompt}") as response:
            history = await response.json()
        await asyncio.sleep(0.02)
    outputs = history[prompt]["outputs"]
    pictures = []
    for node, output in outputs.items():
        for image in output.get("images", ()):
            if image["type"] != "output":
                continue
            async with session.get("/view", params=image) as response:
                response.raise_for_status()
                pictures.append(Picture(node, image["filename"], await response.read()))
    return pictures
