"""Notebooks are clean, small, exported and current, and an example or a test uses each export."""

import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import build_docs
import notebooks
import pytest
import readme
from fastcore.nbio import nb2str
from nbdev.clean import clean_nb

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = [path.as_posix() for path in build_docs.notebook_paths(NBS)]
MODULES = build_docs.module_names()
each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def load(name: str) -> dict:
    return json.loads((NBS / name).read_text(encoding="utf-8"))


def is_exported(source: str) -> bool:
    return bool(re.match(r"(#\|.*\n)*#\|\s*export", source))


@each_notebook
def test_notebook_is_clean(name):
    notebook = load(name)
    clean_nb(notebook)
    assert nb2str(notebook) == (NBS / name).read_text(encoding="utf-8"), (
        f"run: nbdev-clean --fname nbs/{name}"
    )


@each_notebook
def test_notebook_has_no_widgets_and_no_errors(name):
    notebook = load(name)
    assert "widgets" not in notebook["metadata"]
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    assert not [
        o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})
    ], "dead after reloading"
    assert not [o for o in outputs if o["output_type"] == "error"]


@each_notebook
def test_notebook_is_small(name):
    assert len(load(name)["cells"]) <= 70
    assert (NBS / name).stat().st_size < 2_000_000


@each_notebook
def test_notebook_begins_with_title_and_subtitle(name):
    first = load(name)["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# .+\n\n> .+", "".join(first["source"]))


def test_export_gives_the_committed_modules(tmp_path):
    """Exporting all notebooks to a copy gives exactly the committed modules"""
    shutil.copytree(NBS, tmp_path / "nbs", ignore=shutil.ignore_patterns(".*", "_*", "runs"))
    (tmp_path / "llamagym").mkdir()
    for name in ("pyproject.toml", "llamagym/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run(
        [Path(sys.executable).with_name("nbdev-export")], cwd=tmp_path, check=True, env=environment
    )
    committed, exported = (
        {
            p.relative_to(root).as_posix(): p.read_text(encoding="utf-8")
            for p in (root / "llamagym").rglob("*.py")
        }
        for root in (ROOT, tmp_path)
    )
    assert sorted(committed) == sorted(exported), "run: nbdev-export"
    for name in committed:
        difference = "\n".join(
            difflib.unified_diff(
                committed[name].splitlines(),
                exported[name].splitlines(),
                "here",
                "exported",
                lineterm="",
            )
        )
        assert not difference, (
            f"{name} is not what its notebook exports: run nbdev-export\n{difference}"
        )


def test_readme_is_up_to_date():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme.readme(), "run: make readme"


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / "llamagym" / build_docs.module_file(name)).read_text(encoding="utf-8"))


def imported_modules(name: str) -> Iterator[str]:
    """Yield the package's modules that a module imports, also in functions and by name in strings

    Imports for type checkers do not count.
    """
    module = tree(name)
    module.body = [node for node in module.body if ast.unparse(node)[:17] != "if TYPE_CHECKING:"]
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: -node.level] if node.level else []
            base = [*parents, *(node.module or "").removeprefix("llamagym").strip(".").split(".")]
            base = ".".join(filter(None, base))
            if node.level or (node.module or "").partition(".")[0] == "llamagym":
                for alias in node.names:
                    inner = f"{base}.{alias.name}".lstrip(".")
                    yield inner if inner in MODULES else base
        elif isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("llamagym.")
                for a in node.names
                if a.name.startswith("llamagym.")
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if (named := node.value.removeprefix("llamagym.")) in MODULES and named != node.value:
                yield named


def import_order() -> list[str]:
    """Return the modules in the order of the table on the index page"""
    listed = (path.replace("/", ".") for path in build_docs.listed_notebooks(NBS))
    return [name for name in listed if name in MODULES]


def test_imports_order_lists_every_module_and_notebook():
    assert sorted(import_order()) == sorted(MODULES)
    listed = {f"{name}.ipynb" for name in build_docs.listed_notebooks(NBS)}
    assert {*NOTEBOOKS} - {"index.ipynb"} == listed


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_of_modules_earlier_in_the_index(name):
    """Exported code does not import the tools of the notebooks either"""
    order = import_order()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert (module or "").partition(".")[0] not in ("fastcore", "nbdev", "execnb")
    for module in imported_modules(name):
        if module:
            assert order.index(module) < order.index(name), f"{name} imports {module}"


# Folders that a folder does not import, although the index lists them before it.
FORBIDDEN_IMPORTS = {
    "envs": ("models",),
    "inference": ("envs",),
    "algorithms": ("envs",),
    "ppo": ("envs",),
    "trainer": ("widgets",),
}


@pytest.mark.parametrize("name", [m for m in MODULES if m.partition(".")[0] in FORBIDDEN_IMPORTS])
def test_imports_exclude_forbidden_folders(name):
    forbidden = FORBIDDEN_IMPORTS[name.partition(".")[0]]
    assert not [m for m in imported_modules(name) if m.partition(".")[0] in forbidden]


def names_in(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
    }


@pytest.fixture(scope="session")
def used_names() -> set[str]:
    """Return the names that examples and tests use, directly or through other definitions"""
    examples = [
        "".join(cell["source"]) for path in NOTEBOOKS for cell in load(path)["cells"]
        if cell["cell_type"] == "code" and not is_exported("".join(cell["source"]))
    ]  # fmt: skip
    tests = [p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("*.py")]
    used = set(re.findall(r"\w+", "\n".join(examples + tests)))
    uses: dict[str, set[str]] = {}
    for module in MODULES:
        for node in tree(module).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                uses.setdefault(node.name, set()).update(names_in(node) - {node.name})
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for name in names_in(target):
                        uses.setdefault(name, set()).update(names_in(node) - {name})
    new = used
    while new:
        new = set().union(*(uses.get(name, set()) for name in new)) - used
        used |= new
    return used


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_and_classes_are_used_by_an_example_or_a_test(name, used_names):
    defined = {
        n.name
        for n in tree(name).body
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    public = next(
        ast.literal_eval(n.value)
        for n in tree(name).body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
    )
    assert not [n for n in public if n in defined and n not in used_names]


# Execution: `make notebooks` runs all notebooks; these tests run a few short ones.


@pytest.mark.parametrize(
    "name", ["extras.ipynb", "models/packing.ipynb", "algorithms/losses.ipynb"]
)
def test_notebook_run_gives_the_committed_outputs(name):
    problems, _ = notebooks.check(Path(name))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "before, after, same",
    [
        ("return 0.7312", "return 0.7309", True),
        ("return 0.7312", "return 0.6312", False),
        ("12 episodes", "12 episodes", True),
        ("12 episodes", "13 episodes", False),
        ("1,024 games in 3.2 s", "1,024 games in 4.9 s", True),
        ("1,024 games", "1,025 games", False),
        ("saved to /tmp/abc/run", "saved to /tmp/xyz/run", True),
        ("<Policy at 0x7f1234567890>", "<Policy at 0x7FFFFFFFFFFF>", True),
        ("{'loss': 0.5, 'seconds': 4.06}", "{'loss': 0.5, 'seconds': 11.5}", True),
        ("{'loss': 0.5, 'seconds': 4.06}", "{'loss': 0.9, 'seconds': 4.06}", False),
        ("a | b", "a | c", False),
        ("−0.0466", "-0.0466", True),
        ("1e-07", "3e-07", True),
        ("-1.5", "1.5", False),
        ("1 2", "1 2 3", False),
    ],
)
def test_outputs_are_compared_by_words_and_numbers(before, after, same):
    assert notebooks.same_text(before, after) == same


def make_notebook(source: str, *outputs: dict) -> dict:
    return {
        "cells": [{"cell_type": "code", "id": "x", "source": [source], "outputs": list(outputs)}]
    }


def make_output(text: str, kind: str = "text/plain") -> dict:
    return {"output_type": "execute_result", "data": {kind: [text]}}


def test_changed_outputs_are_reported_unless_marked_as_varying():
    stdout = {"output_type": "stream", "name": "stdout", "text": ["one\n"]}
    stderr = {"output_type": "stream", "name": "stderr", "text": ["50%\n"]}
    assert not notebooks.differences(make_notebook("x", stdout, stderr), make_notebook("x", stdout))
    (difference,) = notebooks.differences(
        make_notebook("x", make_output("1")), make_notebook("x", make_output("2"))
    )
    assert "cell x" in difference and "-1" in difference and "+2" in difference
    assert notebooks.differences(make_notebook("x", make_output("1")), make_notebook("x"))
    assert notebooks.differences(
        make_notebook("x", make_output("…", "image/png")), make_notebook("x", make_output("1"))
    )
    assert not notebooks.differences(
        make_notebook("x", make_output("old", "image/png")),
        make_notebook("x", make_output("new", "image/png")),
    )
    varies = "#| varies\nx"
    assert not notebooks.differences(
        make_notebook(varies, make_output("1")), make_notebook(varies, make_output("2"))
    )


def test_notebook_that_raises_is_reported(tmp_path, monkeypatch):
    notebook = load("extras.ipynb")
    notebook["cells"].append(
        {
            **notebook["cells"][-1],
            "cell_type": "code",
            "execution_count": None,
            "outputs": [],
            "id": "boom",
            "source": ["raise KeyError('boom')"],
        }
    )
    (tmp_path / "broken.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    monkeypatch.setattr(notebooks, "NBS", tmp_path)
    problems, _ = notebooks.check(Path("broken.ipynb"))
    assert "boom" in problems[0]
