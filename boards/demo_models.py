"""The demo models and their judge, loaded once per process."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import comfy.patcher_extension

from ..demo.files import lora_file
from ..demo.judge import Judge
from ..demo.sampling import DemoSampler


@cache
def the_judge() -> Judge:
    """The judge of this process."""
    return Judge.load()


@lru_cache(maxsize=2)
def sampler_with(lora: str | None, kind: str = "unet") -> DemoSampler:
    """A demo model of this process, with the LoRA of a concept."""
    return DemoSampler(None if lora is None else lora_file(lora, kind), kind=kind)


def counting_clone(model: Any) -> tuple[Any, list[int]]:
    """A clone of a MODEL, and a list that gets the number of rows of each of its calls."""
    clone, rows = model.clone(), list[int]()

    def count(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "score", count)
    return clone, rows
