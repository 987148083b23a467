"The documentation site has an entry for every public name, no broken internal links and no external requests."

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import build_docs
import pytest

ROOT = Path(__file__).parent.parent


@dataclass
class Built:
    "A built site and the notebooks it was built from"

    site: Path
    problems: list[str]
    modules: dict[str, build_docs.Module]
    notebooks: Path


def build_part(folder: Path) -> Built:
    "Build a site of three notebooks"
    package, notebooks = folder / "llamagym", folder / "nbs"
    (package / "models").mkdir(parents=True)
    (notebooks / "models").mkdir(parents=True)
    shutil.copy(ROOT / "llamagym" / "__init__.py", package)
    for name in ("extras", "models/value_head"):
        shutil.copy(ROOT / "llamagym" / f"{name}.py", package / f"{name}.py")
        shutil.copy(ROOT / "nbs" / f"{name}.ipynb", notebooks / f"{name}.ipynb")
    for name in ("extras", "models/value_head"):  # links to pages that this small site lacks
        path = notebooks / f"{name}.ipynb"
        text = re.sub(r"\[([^\]]*)\]\([\w./]+\.ipynb\)", r"\1", path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
    for picture in (ROOT / "nbs" / "models").glob("*.svg"):
        shutil.copy(picture, notebooks / "models")
    book = json.loads((notebooks / "extras.ipynb").read_text(encoding="utf-8"))
    text = (
        "# part\n\n> Of a site\n\n| | |\n|---|---|\n| [extras](extras.ipynb) | optional packages |"
    )
    book["cells"] = [{**book["cells"][0], "source": [text]}]
    (notebooks / "index.ipynb").write_text(json.dumps(book), encoding="utf-8")
    problems = build_docs.build(folder / "site", notebooks, package)
    return Built(folder / "site", problems, build_docs.read_modules(package), notebooks)


def build_whole(folder: Path) -> Built:
    "Return the site of `make docs` if it is up to date, else build it"
    site, problems = ROOT / "_site", []
    if not build_docs.is_fresh(site):
        site = folder / "site"
        problems = build_docs.build(site)
    return Built(site, problems, build_docs.read_modules(ROOT / "llamagym"), ROOT / "nbs")


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> Built:
    return build_part(tmp_path_factory.mktemp("part"))


@pytest.fixture(scope="module", params=["part", pytest.param("whole", marks=pytest.mark.slow)])
def built(request, tmp_path_factory) -> Built:
    if request.param == "part":
        return request.getfixturevalue("part")
    return build_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def modules():
    return build_docs.read_modules(ROOT / "llamagym")


def test_the_build_has_no_warnings(built):
    assert built.problems == []


def test_every_public_name_has_an_entry_and_every_internal_link_resolves(built):
    assert sum(len(module.public) for module in built.modules.values()) > 5
    assert build_docs.check(built.site, built.modules) == []


def test_every_notebook_has_a_page(built):
    for notebook in build_docs.notebook_paths(built.notebooks):
        assert (built.site / f"{build_docs.page_name(notebook)}.html").exists()


def test_an_entry_shows_signature_comments_and_source(built):
    page = (built.site / "extras.html").read_text(encoding="utf-8")
    entry = page[page.index('id="llamagym.extras.require"') :]
    words = re.sub(r"<[^>]+>", "", entry[:6000])
    assert "extra: str" in words and "ModuleType" in words
    comment = next(
        p.comment
        for p in built.modules["extras"].entries["require"].parameters
        if p.name == "extra"
    )
    assert comment and comment in words
    assert 'href="_modules/llamagym/extras.html#require"' in entry


def test_the_site_can_be_searched(built):
    assert "llamagym.extras" in (built.site / "searchindex.js").read_text(encoding="utf-8")


def test_a_missing_entry_is_detected(part, tmp_path):
    site = shutil.copytree(part.site, tmp_path / "site")
    page = site / "extras.html"
    page.write_text(
        page.read_text(encoding="utf-8").replace('id="llamagym.extras.require"', ""),
        encoding="utf-8",
    )
    problems = build_docs.check(site, part.modules)
    assert "llamagym.extras.require has no entry in the site" in problems


def test_a_broken_link_is_detected(part, tmp_path):
    site = shutil.copytree(part.site, tmp_path / "site")
    before = build_docs.check(site, part.modules)
    (site / "broken.html").write_text(
        '<a href="nowhere.html">x</a> <a href="extras.html#nowhere">y</a> <a href="extras.html">z</a>'
    )
    assert sorted(set(build_docs.check(site, part.modules)) - set(before)) == [
        "broken.html: extras.html#nowhere leads to no such place in the page",
        "broken.html: nowhere.html leads to no file",
    ]


def test_a_table_shown_as_text_is_detected(part, tmp_path):
    site = shutil.copytree(part.site, tmp_path / "site")
    before = build_docs.check(site, part.modules)
    (site / "raw.html").write_text("<p>| a | b |</p>")
    assert set(build_docs.check(site, part.modules)) - set(before) == {
        "raw.html: a table is shown as the text it is written in"
    }


def test_methods_are_listed_with_their_class_without_private_ones(modules):
    policy = modules["models.policy"].entries["Policy"]
    conversation = modules["chat.conversation"].entries["Conversation"]
    assert policy.signature.startswith("(model: ")
    assert {"Policy.load", "Policy.save", "Policy.score"} <= {m.name for m in policy.members}
    load = next(m for m in policy.members if m.name == "Policy.load")
    assert load.signature.startswith("(name: ") and load.flag in ("staticmethod", "classmethod")
    assert "tokenizer" in conversation.signature
    entries = [e for module in modules.values() for e in module.entries.values()]
    assert not [m.name for entry in entries for m in entry.members if "._" in m.name]


def test_inherited_members_are_found_across_modules(tmp_path):
    package = tmp_path / "llamagym"
    package.mkdir()
    (package / "below.py").write_text("""
__all__ = ["Open"]
class _Root:
    def __init__(self,
        size: int, # metres
    ): ...
    def whole(self): "All of it"
class Open(_Root):
    def part(self): "Some of it"
""")
    (package / "above.py").write_text("""
__all__ = ["Top"]
from .below import Open
class _Hidden(Open, dict):
    def secret(self): "Of a private class"
    _inner = property(lambda self: 0)
class Top(_Hidden):
    def part(self): ...
    @staticmethod
    def read(path: str): "From a file"
""")
    modules = build_docs.read_modules(package)
    assert [m.name for m in modules["below"].entries["Open"].members] == ["Open.part", "Open.whole"]
    top = modules["above"].entries["Top"]
    assert (top.bases, top.signature, top.parameters[0].comment) == (
        ["Open", "dict"],
        "(size: int)",
        "metres",
    )
    assert top.inherited == {"llamagym.below.Open": ["whole"]}
    assert [(m.name, m.signature, m.flag, m.doc) for m in top.members] == [
        ("Top.part", "()", "", "Some of it"),
        ("Top.read", "(path: str)", "staticmethod", "From a file"),
        ("Top.secret", "()", "", "Of a private class"),
    ]


def test_an_inherited_name_links_to_its_entry(modules):
    pages = build_docs.Pages(ROOT / "nbs", modules, "https://example.org", "main")
    assert pages.prose("`Policy.load` and `Config.load()`") == (
        "{py:obj}`Policy.load <llamagym.models.policy.Policy.load>` and {py:obj}`Config.load() <llamagym.options.Section.load>`"
    )


def test_a_pipe_is_escaped_in_tables_only():
    module = build_docs.Module(ROOT / "llamagym" / "extras.py")
    both = build_docs.Parameter("x", "int | None", "", "a | b")
    text = build_docs.entry_markdown(
        build_docs.Entry("function", "f", "(x)", parameters=[both], returns=both),
        module,
        lambda s: s,
    )
    assert "| `x` | `int \\| None` | a \\| b |" in text and "*Returns* `int | None`: a | b" in text


def test_an_undocumented_module_is_detected(tmp_path):
    "The build warns about a public name that no notebook defines"
    package = tmp_path / "llamagym"
    package.mkdir()
    shutil.copy(ROOT / "llamagym" / "__init__.py", package)
    (package / "loose.py").write_text('__all__ = ["stray"]\ndef stray(): "Nowhere"\n')
    notebooks = tmp_path / "nbs"
    notebooks.mkdir()
    shutil.copy(ROOT / "nbs" / "index.ipynb", notebooks)
    problems = build_docs.build(tmp_path / "site", notebooks, package)
    assert "llamagym.loose.stray has no entry in the site" in problems


def test_pages_make_no_external_requests(built):
    for page in built.site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]*\bsrc="([^"]+)"|<link[^>]*\bhref="([^"]+)"',
            page.read_text(encoding="utf-8"),
        )
        addresses = [a or b for a, b in loaded]
        assert not [a for a in addresses if a.startswith(("http:", "https:", "//"))], page


def test_docments_are_read_from_the_source(tmp_path):
    (tmp_path / "sample.py").write_text("""
__all__ = ["LIMIT", "Point", "scale"]

# how many there may be
LIMIT: int = 3

@dataclass
class Point:
    "A place"
    x: float         # metres
    tags: list[str] = field(default_factory=list) # words
    def moved(self,
        by: float = 1.0, # metres
    ) -> "Point":    # another place
        "A place elsewhere"
    @property
    def norm(self) -> float: "Its distance"

def scale(point: Point, *, factor: float = 2.0): "Larger"
""")
    entries = build_docs.Module(tmp_path / "sample.py").entries
    assert (entries["LIMIT"].doc, entries["LIMIT"].signature) == (
        "how many there may be",
        ": int = 3",
    )
    point = entries["Point"]
    assert [(p.name, p.annotation, p.default, p.comment) for p in point.parameters] == [
        ("x", "float", "", "metres"),
        ("tags", "list[str]", "list()", "words"),
    ]
    moved, norm = point.members
    assert (moved.signature, moved.parameters[0].comment, moved.returns.comment) == (
        "(by: float = 1.0) -> 'Point'",
        "metres",
        "another place",
    )
    assert (norm.kind, norm.signature) == ("property", ": float")
    assert entries["scale"].signature == "(point: Point, *, factor: float = 2.0)"


@pytest.mark.slow
def test_player_works_in_the_site():
    "A notebook marked for execution is run when the site is built, and its log output is not shown"
    outputs = build_docs.outputs_of(ROOT / "nbs" / "widgets" / "player.ipynb")
    marked = [
        c["id"]
        for c in json.loads((ROOT / "nbs" / "widgets" / "player.ipynb").read_text())["cells"]
        if "#| exec_doc" in "".join(c["source"])
    ]
    assert marked
    for cell in marked:
        (shown,) = outputs[cell]
        assert '<script type="module">' in "".join(shown["data"]["text/html"])
