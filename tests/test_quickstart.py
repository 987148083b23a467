"""`llamagym quickstart` runs end to end, and a wheel has the tutorials without a checkout."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMAND = Path(sys.executable).with_name("llamagym")


def test_quickstart_writes_its_artifacts(tmp_path):
    process = subprocess.run(
        [COMMAND, "quickstart", "--fast", "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "01_blackjack.ipynb",
        "learning_curve.png",
        "policy",
        "episodes.parquet",
        "metrics.jsonl",
        "summary.json",
    } <= files
    lines = process.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[:5]] == [
        "return before training", "return after (exact)", "optimal", "seconds of training", "artifacts:",
    ]  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(lines) == 5 + 1 + len(summary["artifacts"])
    assert all((tmp_path / line.split("  ")[-1].strip()).exists() for line in lines[5:])


def test_info_lists_the_optional_packages():
    lines = subprocess.run(
        [COMMAND, "info"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines[0].startswith("llamagym ")
    assert any(line.startswith("  warmstart  present: trl") for line in lines)


@pytest.mark.slow
def test_wheel_contains_the_tutorials(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            tmp_path,
            ROOT,
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        tutorials = {path.name for path in (ROOT / "nbs" / "tutorials").glob("*.ipynb")}
        assert {f"llamagym/tutorials/{name}" for name in tutorials} <= names
        assert not [name for name in names if name.startswith(("tests/", "scripts/", "nbs/"))]
        archive.extractall(tmp_path / "installed")
    code = "import llamagym.cli; print(llamagym.cli.find_tutorial())"
    tutorial = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert (
        Path(tutorial) == tmp_path / "installed" / "llamagym" / "tutorials" / "01_blackjack.ipynb"
    )
