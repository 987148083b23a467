"""The notebooks are clean, exported, small, and run from top to bottom; what they export is used by an example or a test.

Each notebook runs in a process of its own, two at a time. LLAMAGYM_FAST=1 tells tutorials to be quick.
"""

import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import build_docs
import pytest
import readme
from fastcore.nbio import nb2str
from nbdev.clean import clean_nb

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = [path.as_posix() for path in build_docs.notebook_paths(NBS)]
MODULES = sorted(p.stem for p in (ROOT / "llamagym").glob("*.py") if not p.stem.startswith("_"))
each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def load(name: str) -> dict:
    return json.loads((NBS / name).read_text(encoding="utf-8"))


def is_exported(source: str) -> bool:
    return bool(re.match(r"(#\|.*\n)*#\|\s*export", source))


@each_notebook
def test_clean(name):
    book = load(name)
    clean_nb(book)
    assert nb2str(book) == (NBS / name).read_text(encoding="utf-8"), f"run: nbdev-clean --fname nbs/{name}"


@each_notebook
def test_holds_no_widgets_and_no_errors(name):
    book = load(name)
    assert "widgets" not in book["metadata"]
    outputs = [o for cell in book["cells"] for o in cell.get("outputs", [])]
    assert not [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})], "dead after reloading"
    assert not [o for o in outputs if o["output_type"] == "error"]


@each_notebook
def test_is_small(name):
    assert len(load(name)["cells"]) <= 70
    assert (NBS / name).stat().st_size < 2_000_000


@each_notebook
def test_begins_with_title_and_subtitle(name):
    first = load(name)["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# .+\n\n> .+", "".join(first["source"]))


def test_export_leaves_no_difference(tmp_path):
    "Exported anew in a copy, every module is as it is here, and no module is without its notebook"
    shutil.copytree(NBS, tmp_path / "nbs", ignore=shutil.ignore_patterns(".*", "_*", "runs"))
    (tmp_path / "llamagym").mkdir()
    for name in ("pyproject.toml", "llamagym/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run([Path(sys.executable).with_name("nbdev-export")], cwd=tmp_path, check=True, env=environment)
    here, there = ({p.name: p.read_text(encoding="utf-8") for p in (root / "llamagym").glob("*.py")} for root in (ROOT, tmp_path))
    assert sorted(here) == sorted(there), "run: nbdev-export"
    for name in here:
        difference = "\n".join(difflib.unified_diff(here[name].splitlines(), there[name].splitlines(), "here", "exported", lineterm=""))
        assert not difference, f"llamagym/{name} is not what its notebook exports: run nbdev-export\n{difference}"


def test_readme_is_up_to_date():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme.readme(), "run: make readme"


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / "llamagym" / f"{name}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_only_from_floors_below(name):
    "A notebook's number is its floor; and exported code does without the tools of the notebooks"
    floors = {match[2]: int(match[1]) for path in NOTEBOOKS if (match := re.match(r"(\d+)_(\w+)\.ipynb", path))}
    for node in ast.walk(tree(name)):
        imported = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for module in filter(None, imported):
            top, _, below = module.partition(".")
            assert top not in ("fastcore", "nbdev", "execnb")
            if top == "llamagym" and below:
                assert floors[below] < floors[name] or (floors[below], below) < (floors[name], name), f"{name} imports {below}"


def names_in(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


@pytest.fixture(scope="session")
def reached() -> set[str]:
    "Names that examples and tests use, and the names that those definitions use in turn"
    examples = [
        "".join(cell["source"]) for path in NOTEBOOKS for cell in load(path)["cells"]
        if cell["cell_type"] == "code" and not is_exported("".join(cell["source"]))
    ]  # fmt: skip
    tests = [p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("*.py")]
    found = set(re.findall(r"\w+", "\n".join(examples + tests)))
    uses: dict[str, set[str]] = {}
    for module in MODULES:
        for node in tree(module).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                uses.setdefault(node.name, set()).update(names_in(node) - {node.name})
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for name in names_in(target):
                        uses.setdefault(name, set()).update(names_in(node) - {name})
    new = found
    while new:
        new = set().union(*(uses.get(name, set()) for name in new)) - found
        found |= new
    return found


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_and_classes_are_reached_by_an_example_or_a_test(name, reached):
    defined = {n.name for n in tree(name).body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    public = next(ast.literal_eval(n.value) for n in tree(name).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    assert not [n for n in public if n in defined and n not in reached]


# Running them.


def run(name: str, output: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "LLAMAGYM_FAST": "1", "LLAMAGYM_OUTPUT": str(output), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    return subprocess.run(
        [Path(sys.executable).with_name("nbdev-test"), str(NBS / name), "--n-workers", "0"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def runs(request, tmp_path_factory) -> dict[str, Future]:
    "The runs of all selected notebooks, started at once, two at a time"
    selected = [item.callspec.params["name"] for item in request.session.items if getattr(item, "originalname", "") == "test_runs"]
    with ThreadPoolExecutor(2) as pool:
        started = {name: pool.submit(run, name, tmp_path_factory.mktemp(Path(name).stem)) for name in selected}
        yield started
        for future in started.values():
            future.cancel()


@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name != "tutorials/01_blackjack.ipynb"])     # that one is run by test_quickstart.py
def test_runs(name, runs):
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-6000:]
