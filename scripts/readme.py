"""Write README.md from nbs/index.ipynb: python scripts/readme.py; with --check, only compare them.

Prose is copied, with links to notebooks and pictures made into links into nbs/; code cells become code
blocks, followed by their outputs.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "index.ipynb"
README = ROOT / "README.md"
NOTE = "<!-- Made from nbs/index.ipynb by scripts/readme.py: edit the notebook. -->"


def output_text(output: dict) -> str:
    "Return an output as Markdown; images are left out"
    data = output.get("data", {})
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    if output.get("name") == "stderr":  # progress bars and warnings
        return ""
    text = "".join(output.get("text", data.get("text/plain", "")))
    return (
        f"```text\n{text.rstrip()}\n```"
        if text and not any(kind.startswith("image/") for kind in data)
        else ""
    )


def readme(notebook: Path = NOTEBOOK) -> str:
    blocks = [NOTE]
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        lines = "".join(cell["source"]).split("\n")
        directives = {line[2:].strip() for line in lines if line.startswith("#|")}
        text = "\n".join(line for line in lines if not line.startswith("#|")).strip()
        if not text or "hide" in directives:
            continue
        if cell["cell_type"] == "markdown":
            blocks.append(re.sub(r"\]\((?!\w+:|#)([^)\s]+\.(?:ipynb|png|svg))", r"](nbs/\1", text))
        elif cell["cell_type"] == "code":
            blocks.append(f"```python\n{text}\n```")
            blocks += [text for output in cell["outputs"] if (text := output_text(output))]
    return "\n\n".join(blocks) + "\n"


def main() -> int:
    arguments = argparse.ArgumentParser(description="Write README.md from nbs/index.ipynb.")
    arguments.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit 1 when README.md is not up to date",
    )
    text = readme()
    if not arguments.parse_args().check:
        README.write_text(text, encoding="utf-8")
    elif not README.exists() or README.read_text(encoding="utf-8") != text:
        print("README.md is not what nbs/index.ipynb makes: run `make readme`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
