"""Run the notebooks and compare what they print with what is committed: python scripts/notebooks.py [NOTEBOOK ...]

Each notebook runs in a copy and in a process of its own, as many at a time as there are cores, with
LLAMAGYM_FAST=1, which keeps tutorials short. A notebook fails if a cell raises, or if a text output
differs from the committed one: words must be equal, numbers within a tolerance; times, addresses and
paths are masked. Pictures and widgets are compared by their kind alone. The output of a cell that
begins with `#| varies` is not compared: what it shows depends on how long a model was trained, or on
the machine. `--save` stores the new outputs instead of comparing them (not those of such cells).
"""

import argparse
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_docs import notebook_paths
from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
RELATIVE_TOLERANCE = 0.02
ABSOLUTE_TOLERANCE = 2e-3  # of numbers that are written with a decimal point or an exponent

MASKS = [
    (r"\x1b\[[\d;]*m", ""),
    (r"0x[0-9a-fA-F]{6,}", "<address>"),
    (r"(seconds['\"]?\s?[:=]\s?)[\d.e-]+", r"\1<time>"),
    (r"(?:/[\w.\-+]+){2,}/?", "<path>"),
    (r"(?<![\w.])\d+(?:\.\d+)?\s?(?:ns|µs|us|ms|s|sec|seconds?|min|minutes?)\b", "<time>"),
    (r"\b\d{1,2}:\d{2}(?::\d{2})?\b", "<time>"),
]
NUMBER = re.compile(r"(?<![\w.])[-−+]?\d+(?:[.,]\d+)*(?:[eE][-+]?\d+)?")


def masked(text: str) -> str:
    "Replace what differs from run to run: colors, addresses, paths, times"
    for pattern, mask in MASKS:
        text = re.sub(pattern, mask, text)
    return text


def as_number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def close(a: str, b: str) -> bool:
    "Compare two numbers as they are written: whole numbers are equal, others close"
    if a == b:
        return True
    if not any(mark in x for x in (a, b) for mark in ".e"):
        return False
    x, y = as_number(a), as_number(b)
    return abs(x - y) <= max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * max(abs(x), abs(y)))


def same_text(a: str, b: str) -> bool:
    "Compare two texts: words and line breaks are equal, spaces fold, numbers are close"
    a, b = masked(a), masked(b)
    words = [re.sub(r"[ \t]+|-{3,}|─{3,}", " ", NUMBER.sub("#", x)).strip() for x in (a, b)]
    numbers = [NUMBER.findall(x) for x in (a, b)]
    return words[0] == words[1] and all(close(x, y) for x, y in zip(*numbers, strict=True))


def texts_of(cell: dict) -> list[tuple[str, str]]:
    "Return what a cell shows, as (kind, text); pictures and widgets have their kind alone"
    shown: list[tuple[str, str]] = []
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream":
            if output["name"] == "stderr":  # progress bars and warnings
                continue
            text = "".join(output["text"])
            if shown and shown[-1][0] == "stdout":
                text = shown.pop()[1] + text
            shown.append(("stdout", text))
            continue
        data = output.get("data", {})
        picture = next((kind for kind in data if kind.startswith("image/")), None)
        kind = picture or next((k for k in ("text/markdown", "text/plain") if k in data), None)
        if kind:
            html_only = "text/html" in data and kind == "text/plain"
            text = "" if picture or html_only else "".join(data[kind])
            shown.append((kind, text))
    return shown


def varies(cell: dict) -> bool:
    return bool(re.search(r"^#\|\s*varies\b", "".join(cell["source"]), re.MULTILINE))


def differences(committed: dict, executed: dict) -> list[str]:
    "Compare the outputs of two notebooks with the same cells, and describe each difference"
    found = []
    for before, after in zip(committed["cells"], executed["cells"], strict=True):
        if before["cell_type"] != "code" or varies(before):
            continue
        old, new = texts_of(before), texts_of(after)
        same = [kind for kind, _ in old] == [kind for kind, _ in new]
        if same and all(same_text(a, b) for (_, a), (_, b) in zip(old, new)):
            continue
        lines = [
            [line for kind, text in shown for line in (f"[{kind}]", *text.splitlines())]
            for shown in (old, new)
        ]
        changed = difflib.unified_diff(*lines, "committed", "executed", n=1, lineterm="")
        found.append(f"cell {before['id']}:\n" + "\n".join(f"    {line}" for line in changed))
    return found


def execute(path: Path, folder: Path) -> tuple[dict, str]:
    "Run a copy of a notebook, and return it with its outputs; the second value says why it failed"
    copy = folder / "nbs" / path
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(NBS / path, copy)
    for beside in (NBS / path).parent.iterdir():  # data and pictures that notebooks read
        if beside.is_file() and beside.suffix != ".ipynb":
            shutil.copy(beside, copy.parent / beside.name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    environment = {
        **os.environ,
        "LLAMAGYM_FAST": "1",
        "LLAMAGYM_OUTPUT": str(folder / "output"),
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [Path(sys.executable).with_name("nbdev-test"), copy, "--n-workers", "0", "--save"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        return {}, done.stdout[-6000:]
    book = json.loads(copy.read_text(encoding="utf-8"))
    clean_nb(book)
    return book, ""


def store(path: Path, executed: dict) -> None:
    "Write new outputs into the notebook, except those of cells that vary"
    book = json.loads((NBS / path).read_text(encoding="utf-8"))
    for before, after in zip(book["cells"], executed["cells"], strict=True):
        if before["cell_type"] == "code" and not varies(before):
            # Progress bars and warnings are not part of what a notebook shows.
            before["outputs"] = [o for o in after["outputs"] if o.get("name") != "stderr"]
    text = json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    (NBS / path).write_text(text, encoding="utf-8")


def check(path: Path, save: bool = False) -> tuple[list[str], float]:
    "Run one notebook; return what is wrong with it, and how many seconds it took"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        executed, failure = execute(path, Path(folder))
    seconds = time.perf_counter() - began
    if failure:
        return [failure], seconds
    problems = differences(json.loads((NBS / path).read_text(encoding="utf-8")), executed)
    if save and problems:
        store(path, executed)
        return [], seconds
    return problems, seconds


def main() -> int:
    description = "Run notebooks and compare their text outputs with the committed ones."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of nbs/")
    parser.add_argument("--save", action="store_true", help="store new outputs, compare nothing")
    arguments = parser.parse_args()
    paths = [path.resolve().relative_to(NBS) for path in arguments.notebooks]
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {
            path: pool.submit(check, path, arguments.save) for path in paths or notebook_paths(NBS)
        }
        for path, run in runs.items():
            problems, seconds = run.result()
            failed += bool(problems)
            print(
                f"{'FAILED' if problems else 'ok':6} {path.as_posix()}  {seconds:.0f} s", flush=True
            )
            for problem in problems:
                print("  " + problem.replace("\n", "\n  "))
    if failed:
        print(f"{failed} notebooks failed. If their new outputs are right: make outputs")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
