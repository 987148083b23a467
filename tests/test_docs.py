"The site: every public name has an entry, every internal link resolves, and nothing is fetched from elsewhere."

import json
import re
import shutil
from pathlib import Path

import build_docs
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, list[str]]:
    "The site that `make docs` left if it is fresh, else one made here; and what was wrong when it was made"
    if build_docs.is_fresh(ROOT / "_site"):
        return ROOT / "_site", []
    site = tmp_path_factory.mktemp("site")
    return site, build_docs.build(site)


@pytest.fixture(scope="module")
def modules():
    return build_docs.read_modules(ROOT / "llamagym")


def test_the_build_has_no_warnings(built):
    assert built[1] == []


def test_every_public_name_has_an_entry_and_every_internal_link_resolves(built, modules):
    assert sum(len(module.public) for module in modules.values()) > 20
    assert build_docs.check(built[0], modules) == []


def test_every_notebook_has_a_page(built):
    for notebook in build_docs.notebook_paths(ROOT / "nbs"):
        assert (built[0] / f"{build_docs.page_name(notebook)}.html").exists()


def test_an_entry_shows_signature_comments_and_source(built):
    page = (built[0] / "extras.html").read_text(encoding="utf-8")
    entry = page[page.index('id="llamagym.extras.require"') :]
    words = re.sub(r"<[^>]+>", "", entry[:6000])
    assert "extra: str" in words and "ModuleType" in words
    assert "the extra that installs it" in words
    assert 'href="_modules/llamagym/extras.html#require"' in entry


def test_the_site_can_be_searched(built):
    assert "llamagym.extras" in (built[0] / "searchindex.js").read_text(encoding="utf-8")


def test_a_missing_entry_is_noticed(built, modules, tmp_path):
    site = shutil.copytree(built[0], tmp_path / "site")
    page = site / "extras.html"
    page.write_text(page.read_text(encoding="utf-8").replace('id="llamagym.extras.require"', ""), encoding="utf-8")
    assert "llamagym.extras.require has no entry in the site" in build_docs.check(site, modules)


def test_a_broken_link_is_noticed(built, modules, tmp_path):
    site = shutil.copytree(built[0], tmp_path / "site")
    before = build_docs.check(site, modules)
    (site / "broken.html").write_text('<a href="nowhere.html">x</a> <a href="extras.html#nowhere">y</a> <a href="extras.html">z</a>')
    assert sorted(set(build_docs.check(site, modules)) - set(before)) == [
        "broken.html: extras.html#nowhere leads to no such place in the page",
        "broken.html: nowhere.html leads to no file",
    ]


def test_a_table_shown_as_text_is_noticed(built, modules, tmp_path):
    site = shutil.copytree(built[0], tmp_path / "site")
    before = build_docs.check(site, modules)
    (site / "raw.html").write_text("<p>| a | b |</p>")
    assert set(build_docs.check(site, modules)) - set(before) == {"raw.html: a table is shown as the text it is written in"}


def test_what_a_class_inherits_or_is_given_is_shown(modules):
    policy, conversation = modules["policy"].entries["Policy"], modules["chat"].entries["Conversation"]
    assert policy.signature.startswith("(model: ") and policy.bases == ["PolicyReference"]
    assert "set_reference" in policy.inherited["llamagym.policy.PolicyReference"]
    assert "parameters" in policy.inherited["llamagym.policy.PolicyParts"]
    assert {"Policy.load", "Policy.save", "Policy.score"} <= {m.name for m in policy.members}
    load = next(m for m in policy.members if m.name == "Policy.load")
    assert load.signature.startswith("(name: ") and load.flag == "staticmethod" and "See `load_policy`." in load.doc
    assert "tokenizer" in conversation.signature and "from_dict" in modules["config"].entries["Config"].inherited["llamagym.config.Options"]
    assert not [m.name for module in modules.values() for entry in module.entries.values() for m in entry.members if "._" in m.name]


def test_what_bases_hold_is_read_across_modules(tmp_path):
    package = tmp_path / "llamagym"
    package.mkdir()
    (package / "below.py").write_text('''
__all__ = ["Open"]
class _Root:
    def __init__(self,
        size: int, # metres
    ): ...
    def whole(self): "All of it"
class Open(_Root):
    def part(self): "Some of it"
''')
    (package / "above.py").write_text('''
__all__ = ["Top", "write"]
from .below import Open
class _Hidden(Open, dict):
    def secret(self): "Of a private class"
    _inner = property(lambda self: 0)
class Top(_Hidden):
    def part(self): ...
def write(top: Top, path: str): "To a file"
def _read(path: str): "From a file"
Top.save, Top.read = write, staticmethod(_read)
''')
    modules = build_docs.read_modules(package)
    assert [m.name for m in modules["below"].entries["Open"].members] == ["Open.part", "Open.whole"]
    top = modules["above"].entries["Top"]
    assert (top.bases, top.signature, top.parameters[0].comment) == (["Open", "dict"], "(size: int)", "metres")
    assert top.inherited == {"llamagym.below.Open": ["whole"]}
    assert [(m.name, m.signature, m.flag, m.doc) for m in top.members] == [
        ("Top.part", "()", "", "Some of it"),
        ("Top.save", "(path: str)", "", "To a file\n\nSee `write`."),
        ("Top.read", "(path: str)", "staticmethod", "From a file"),
        ("Top.secret", "()", "", "Of a private class"),
    ]


def test_a_name_that_a_class_inherits_leads_to_its_entry(modules):
    pages = build_docs.Pages(ROOT / "nbs", modules, "https://example.org", "main")
    assert pages.prose("`Policy.load` and `Config.load()`") == (
        "{py:obj}`Policy.load <llamagym.policy.Policy.load>` and {py:obj}`Config.load() <llamagym.config.Section.load>`"
    )


def test_a_pipe_is_escaped_in_tables_only():
    module = build_docs.Module(ROOT / "llamagym" / "extras.py")
    both = build_docs.Parameter("x", "int | None", "", "a | b")
    text = build_docs.entry_markdown(build_docs.Entry("function", "f", "(x)", parameters=[both], returns=both), module, lambda s: s)
    assert "| `x` | `int \\| None` | a \\| b |" in text and "*Returns* `int | None`: a | b" in text


def test_an_undocumented_module_is_noticed(tmp_path):
    "A public name that no notebook defines has no entry, and the build says so"
    package = shutil.copytree(ROOT / "llamagym", tmp_path / "llamagym", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "loose.py").write_text('__all__ = ["stray"]\ndef stray(): "Nowhere"\n')
    notebooks = tmp_path / "nbs"
    notebooks.mkdir()
    shutil.copy(ROOT / "nbs" / "index.ipynb", notebooks)
    problems = build_docs.build(tmp_path / "site", notebooks, package)
    assert "llamagym.loose.stray has no entry in the site" in problems


def test_nothing_is_fetched_from_elsewhere(built):
    for page in built[0].rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="([^"]+)"|<link[^>]*\bhref="([^"]+)"', page.read_text(encoding="utf-8"))
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
    assert (entries["LIMIT"].doc, entries["LIMIT"].signature) == ("how many there may be", ": int = 3")
    point = entries["Point"]
    assert [(p.name, p.annotation, p.default, p.comment) for p in point.parameters] == [
        ("x", "float", "", "metres"),
        ("tags", "list[str]", "list()", "words"),
    ]
    moved, norm = point.members
    assert (moved.signature, moved.parameters[0].comment, moved.returns.comment) == ("(by: float = 1.0) -> 'Point'", "metres", "another place")
    assert (norm.kind, norm.signature) == ("property", ": float")
    assert entries["scale"].signature == "(point: Point, *, factor: float = 2.0)"


@pytest.mark.slow
def test_a_player_plays_in_the_site():
    "A notebook whose cells want to be run for their page is run; what it says on the way stays away"
    outputs = build_docs.outputs_of(ROOT / "nbs" / "13_player.ipynb")
    marked = [c["id"] for c in json.loads((ROOT / "nbs" / "13_player.ipynb").read_text())["cells"] if "#| exec_doc" in "".join(c["source"])]
    assert marked
    for cell in marked:
        (shown,) = outputs[cell]
        assert '<script type="module">' in "".join(shown["data"]["text/html"])
