"""The order of the code: every figure within its bound, and a measure that sees what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_concepts.workbench import import_arrows, measure_house, retired_names

ROOT = Path(__file__).resolve().parent.parent.parent
FIGURES = {figure.name: figure for figure in measure_house.figures(ROOT)}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_within_its_bound(name):
    figure = FIGURES[name]
    assert not figure.missed, f"{figure.value} where at most {figure.bound} is allowed:\n" + "\n".join(figure.where)


def test_the_command_needs_nothing_but_the_standard_library():
    """As in a fresh checkout: no host, no environment.

    ``-I -S`` leave out site packages. ``-I`` also ignores PYTHONDONTWRITEBYTECODE, hence ``-B``: no test writes here.
    """
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from workbench.measure_house import figures; figures()"
    done = subprocess.run([sys.executable, "-I", "-S", "-B", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


SOURCES = {
    "host/a/one.py": "from . import two\nfrom .two import x\nfrom .. import keys\nfrom ...demo import files\n",
    "host/a/two.py": "if True:\n    from .three import y\n",
    "host/a/three.py": "def late():\n    from .one import x\n",
    "host/keys.py": "",
    "demo/files.py": "",
}


def test_arrows_are_counted_once_per_pair_wherever_the_import_is():
    inside = import_arrows.inside_folders(import_arrows.arrows(SOURCES), "host")
    assert inside == {
        "host/a": [
            ("host/a/one.py", "host/a/two.py"),
            ("host/a/three.py", "host/a/one.py"),
            ("host/a/two.py", "host/a/three.py"),
        ]
    }


def test_an_arrow_up_and_a_circle_are_found():
    arrows = import_arrows.arrows({**SOURCES, "host/b.py": "from ..demo import files\n", "demo/files.py": ""})
    assert import_arrows.upward(arrows) == [("host/a/one.py", "demo/files.py"), ("host/b.py", "demo/files.py")]
    assert [set(circle) for circle in import_arrows.circles(arrows)] == [
        {"host/a/one.py", "host/a/two.py", "host/a/three.py"}
    ]


def test_a_function_is_as_long_as_its_lines_without_decorators():
    source = "@one\n@two\ndef f():\n    '''Doc.'''\n\n    return 1\n\n\ndef define_schema():\n    pass\n"
    assert measure_house.function_lengths({"a.py": source}) == {"a.py:3 f": 4}
    assert measure_house.percentile(range(1, 11), 0.9) == 9


def test_a_name_is_retired_only_where_it_was():
    source = "class Order:\n    even: int\n\n\ndef f(covered):\n    return covered.Puller\n"
    assert {f.name for f in retired_names.retired("boards/a.py", source)} == {"Order", "even", "Puller"}
    assert {f.name for f in retired_names.retired("host/conduct/guider.py", source)} == {"covered", "Puller"}
    assert {f.name for f in retired_names.retired("methods/regions.py", source)} == {"Puller"}


def test_identical_lines_of_two_guiders_are_found(tmp_path):
    body = "".join(f"    value_{n} = {n}\n" for n in range(measure_house.RUN))
    for folder, head in (("one", "a = 1\n"), ("two", "b = 2\n")):
        (tmp_path / "host" / folder).mkdir(parents=True)
        (tmp_path / "host" / folder / "guider.py").write_text(f"{head}if True:\n{body}")
    assert measure_house.duplicate_figure(tmp_path).value == 1
    (tmp_path / "host" / "two" / "guider.py").write_text("if True:\n" + body.replace("value_3", "other"))
    assert measure_house.duplicate_figure(tmp_path).value == 0
