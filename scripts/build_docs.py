"""Build the HTML site from the notebooks: python scripts/build_docs.py [_site]

Every notebook becomes a page. An exported definition is shown with its signature, its parameters with
their comments, and a link to its source; the code is folded away below. Nothing is downloaded: modules
are parsed, stored outputs are shown, and formulas become MathML. Only notebooks with cells marked
`#| exec_doc` are run, and these cells show their new outputs: a live player instead of a picture.
The finished site is checked: every public name has an entry, every internal link has a target, and
every table is rendered as one.
"""

import argparse
import ast
import contextlib
import hashlib
import html
import io
import json
import posixpath
import re
import shutil
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llamagym"


# ---------------------------------------------------------------------------------------------------------------------
# Modules, read and not imported


@dataclass
class Parameter:
    name: str
    annotation: str = ""
    default: str = ""
    comment: str = ""


@dataclass
class Entry:
    "A public definition: what its entry on a page shows"

    kind: str  # function, class, method, property, attribute, data
    name: str  # as written after the module's name, e.g. Conversation.fork
    signature: str = ""
    doc: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    returns: Parameter | None = None
    members: list["Entry"] = field(default_factory=list)
    flag: str = ""  # classmethod, staticmethod
    is_dataclass: bool = False  # the parameters are its fields
    bases: list[str] = field(default_factory=list)
    # documented base → the names of its members that the class has from it
    inherited: dict[str, list[str]] = field(default_factory=dict)


def comments_by_line(source: str) -> dict[int, tuple[str, bool]]:
    "Return line number → comment, and whether the comment stands alone on its line"
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = (
                token.string.lstrip("# ").strip(),
                not token.line[: token.start[1]].strip(),
            )
    return found


class Module:
    "A module's public definitions, by name"

    def __init__(self, path: Path, name: str = ""):  # its dotted name within the package
        self.name = f"{PACKAGE}.{name or path.stem}"
        self.source = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.source)
        self.comments = comments_by_line(self.source)
        self.public: list[str] = []
        self.entries: dict[str, Entry] = {}
        self.classes: dict[str, Entry] = {}  # private ones too
        self.imports = {
            alias.asname or alias.name: (self.imported_module(node), alias.name)
            for node in self.tree.body
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        for node in self.tree.body:
            for name in assigned_names(node):
                if name == "__all__":
                    self.public = ast.literal_eval(node.value)
        for node in self.tree.body:
            for entry in self.read(node):
                if entry.kind == "class":
                    self.classes[entry.name] = entry
                if entry.name in self.public:
                    self.entries[entry.name] = entry

    def imported_module(self, node: ast.ImportFrom) -> str:
        "Return the dotted name, within the package, of the module that an import names"
        parents = self.name.split(".")[1 : -node.level] if node.level else []
        return ".".join([*parents, node.module.removeprefix(f"{PACKAGE}.")])

    def read(self, node: ast.stmt) -> Iterator[Entry]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield self.function(node, "function", node.name)
        elif isinstance(node, ast.ClassDef):
            yield self.class_(node)
        else:
            for name in assigned_names(node):
                comment = self.comment_of(node.lineno, node.end_lineno)
                annotation = (
                    f": {ast.unparse(node.annotation)}" if isinstance(node, ast.AnnAssign) else ""
                )
                value = ast.unparse(node.value) if node.value else ""
                yield Entry(
                    "data",
                    name,
                    annotation + (f" = {value}" if value and len(value) <= 60 else ""),
                    comment,
                )

    def comment_of(self, first: int, last: int) -> str:
        "Return the comment behind a definition, or else the comment lines above it"
        if last in self.comments:
            return self.comments[last][0]
        above = []
        while self.comments.get(first - 1, ("", False))[1] and not self.comments[first - 1][
            0
        ].startswith("%%"):
            first -= 1
            above.insert(0, self.comments[first][0])
        return " ".join(above)

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, kind: str, name: str) -> Entry:
        decorators = {ast.unparse(d) for d in node.decorator_list}
        entry = Entry(kind, name, doc=ast.get_docstring(node) or "")
        if decorators & {"property", "cached_property", "functools.cached_property"}:
            entry.kind = "property"
            entry.signature = f": {ast.unparse(node.returns)}" if node.returns else ""
            return entry
        entry.flag = next(iter(decorators & {"classmethod", "staticmethod"}), "")
        arguments = node.args
        drop_first = kind == "method" and "staticmethod" not in decorators
        positional = [*arguments.posonlyargs, *arguments.args]
        defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
        parts = []
        for i, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
            if not (drop_first and i == 0):
                parts.append(self.parameter(argument, default, entry))
            if arguments.posonlyargs and i == len(arguments.posonlyargs) - 1 and parts:
                parts.append("/")
        if arguments.vararg:
            parts.append(self.parameter(arguments.vararg, None, entry, "*"))
        elif arguments.kwonlyargs:
            parts.append("*")
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            parts.append(self.parameter(argument, default, entry))
        if arguments.kwarg:
            parts.append(self.parameter(arguments.kwarg, None, entry, "**"))
        entry.signature = f"({', '.join(parts)})"
        if node.returns:
            annotation = ast.unparse(node.returns)
            entry.signature += f" -> {annotation}"
            comment = self.comments.get(node.returns.end_lineno, ("", False))[0]
            behind_last_argument = any(
                node.returns.end_lineno == a.end_lineno
                for a in ast.walk(arguments)
                if isinstance(a, ast.arg)
            )
            if comment and not behind_last_argument:
                entry.returns = Parameter("", annotation, "", comment)
        return entry

    def parameter(
        self, argument: ast.arg, default: ast.expr | None, entry: Entry, stars: str = ""
    ) -> str:
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        value = ast.unparse(default) if default else ""
        last = (default or argument).end_lineno
        comment, alone = self.comments.get(last, ("", False))
        entry.parameters.append(
            Parameter(stars + argument.arg, annotation, value, "" if alone else comment)
        )
        text = stars + argument.arg + (f": {annotation}" if annotation else "")
        return text + ((f" = {value}" if annotation else f"={value}") if value else "")

    def class_(self, node: ast.ClassDef) -> Entry:
        entry = Entry(
            "class",
            node.name,
            doc=ast.get_docstring(node) or "",
            bases=[ast.unparse(base) for base in node.bases],
        )
        dataclass_fields, init = [], None
        is_dataclass = any(
            ast.unparse(d).split("(")[0] in ("dataclass", "dataclasses.dataclass")
            for d in node.decorator_list
        )
        for member in node.body:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                if member.name == "__init__":
                    init = self.function(member, "method", "__init__")
                elif not member.name.startswith("_"):
                    entry.members.append(
                        self.function(member, "method", f"{node.name}.{member.name}")
                    )
            elif (
                isinstance(member, ast.AnnAssign)
                and isinstance(member.target, ast.Name)
                and not member.target.id.startswith("_")
            ):
                annotation = ast.unparse(member.annotation)
                comment = self.comment_of(member.lineno, member.end_lineno)
                if is_dataclass and not annotation.startswith("ClassVar"):
                    default, described = field_default(member.value)
                    dataclass_fields.append(
                        Parameter(member.target.id, annotation, default, comment or described)
                    )
                elif comment or not is_dataclass:
                    entry.members.append(
                        Entry(
                            "attribute",
                            f"{node.name}.{member.target.id}",
                            f": {annotation}",
                            comment,
                        )
                    )
            elif (
                isinstance(member, ast.Assign)
                and isinstance(member.value, ast.Call)
                and ast.unparse(member.value.func) == "property"
            ):
                described = {
                    k.arg: ast.literal_eval(k.value)
                    for k in member.value.keywords
                    if k.arg == "doc"
                }.get("doc", "")
                entry.members += [
                    Entry("property", f"{node.name}.{name}", "", described)
                    for name in assigned_names(member)
                    if not name.startswith("_")
                ]
        if init:
            entry.signature = init.signature.removesuffix(" -> None")
            entry.parameters = init.parameters
            entry.doc = "\n\n".join(filter(None, [entry.doc, init.doc]))
        elif is_dataclass:
            entry.is_dataclass, entry.parameters, entry.signature = (
                True,
                dataclass_fields,
                fields_signature(dataclass_fields),
            )
        return entry


def fields_signature(parameters: list[Parameter]) -> str:
    "Return the signature of a dataclass"
    signature = f"({', '.join(p.name + ': ' + p.annotation + (' = ' + p.default if p.default else '') for p in parameters)})"
    if len(signature) > 400:  # the table beneath says it all, and readably
        return f"({', '.join(p.name + ('=...' if p.default else '') for p in parameters)})"
    return signature


SIGNS = {"above": ">", "at_least": "≥", "below": "<", "at_most": "≤"}


def field_default(value: ast.expr | None) -> tuple[str, str]:
    "Return a dataclass field's default, and the description that `llamagym.options.option` gives it"
    if not (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Name)
        and value.func.id in ("field", "option")
    ):
        return (ast.unparse(value) if value else ""), ""
    keywords = {k.arg: k.value for k in value.keywords}
    if value.func.id == "field":
        if "default_factory" in keywords:
            return f"{ast.unparse(keywords['default_factory'])}()", ""
        return ast.unparse(keywords["default"]) if "default" in keywords else "", ""
    default, described = value.args
    bounds = ", ".join(
        f"{sign} {ast.unparse(keywords[name])}" for name, sign in SIGNS.items() if name in keywords
    )
    call = "()" if isinstance(default, ast.Name) else ""
    return ast.unparse(default) + call, ast.literal_eval(described) + (
        f" ({bounds})" if bounds else ""
    )


def assigned_names(node: ast.stmt) -> list[str]:
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    targets = [
        name
        for target in targets
        for name in (target.elts if isinstance(target, ast.Tuple) else [target])
    ]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def module_names(package: Path = ROOT / PACKAGE) -> list[str]:
    "Return the dotted names of a package's modules, as in `envs.task`"
    paths = (path.relative_to(package).with_suffix("") for path in sorted(package.rglob("*.py")))
    return [".".join(path.parts) for path in paths if not path.name.startswith("_")]


def module_file(name: str) -> str:
    return f"{name.replace('.', '/')}.py"


def read_modules(package: Path) -> dict[str, Module]:
    modules = {name: Module(package / module_file(name), name) for name in module_names(package)}
    done: dict[str, dict[str, Entry]] = {}
    for module in modules.values():
        for entry in module.classes.values():
            inherit(entry, module, modules, done)
    return modules


def find_class(
    name: str, module: Module, modules: dict[str, Module]
) -> tuple[Entry, Module] | None:
    "Resolve a base's name in a module: return the class and the module that defines it"
    stem, name = module.imports.get(name, (module.name.removeprefix(f"{PACKAGE}."), name))
    return (
        (modules[stem].classes[name], modules[stem])
        if stem in modules and name in modules[stem].classes
        else None
    )


def inherit(
    entry: Entry, module: Module, modules: dict[str, Module], done: dict[str, dict[str, Entry]]
) -> dict[str, Entry]:
    """Give a class what it has from its bases: how it is called, what private bases hold, and the names of what documented ones
    hold. All members it has then, its own and others'"""
    if f"{module.name}.{entry.name}" in done:
        return done[f"{module.name}.{entry.name}"]
    own = {member.name.split(".")[-1]: member for member in entry.members}
    held, inherited, bases, entry.bases = dict(own), {}, entry.bases, []
    done[f"{module.name}.{entry.name}"] = held
    for name in bases:
        found = find_class(name, module, modules)
        if found is None:
            entry.bases.append(name)
            continue
        base, home = found
        further = inherit(base, home, modules, done)
        documented = base.name in home.entries
        entry.bases += [base.name] if documented else base.bases
        if entry.is_dataclass and base.is_dataclass:
            entry.parameters = list(
                {p.name: p for p in [*base.parameters, *entry.parameters]}.values()
            )
            entry.signature = fields_signature(entry.parameters)
        elif not entry.signature:
            entry.signature, entry.parameters, entry.is_dataclass = (
                base.signature,
                base.parameters,
                base.is_dataclass,
            )
        for short in own.keys() & further.keys():
            own[short].doc = own[short].doc or further[short].doc
        owners = {short: owner for owner, shorts in base.inherited.items() for short in shorts}
        for short, member in further.items():
            if short in held:
                continue
            held[short] = member
            if short in owners or documented:
                inherited.setdefault(owners.get(short, f"{home.name}.{base.name}"), []).append(
                    short
                )
            else:
                held[short] = replace(member, name=f"{entry.name}.{short}")
                entry.members.append(held[short])
    entry.inherited = inherited
    return held


# ---------------------------------------------------------------------------------------------------------------------
# Notebooks → pages


def listed_notebooks(notebooks: Path) -> dict[str, str]:
    """Read the table on the index page: notebook → floor, in the order of imports

    A row without a floor belongs to the one above."""
    index = notebooks / "index.ipynb"
    cells = json.loads(index.read_text(encoding="utf-8"))["cells"] if index.exists() else []
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    listed: dict[str, str] = {}
    floor = ""
    for row in re.finditer(r"^\|(?: (.*?) ?\|)? \[.*?\]\(([\w/]+)\.ipynb\) \|", text, re.MULTILINE):
        floor = row[1].strip() if row[1] and row[1].strip() else floor
        listed.setdefault(row[2], floor)
    return listed


def notebook_paths(notebooks: Path) -> list[Path]:
    """The project's notebooks, relative to their folder, in the order of the index, unlisted ones last

    Copies that tools keep (.ipynb_checkpoints) and notebooks that runs leave are not among them."""
    order = {name: i for i, name in enumerate(listed_notebooks(notebooks))}
    paths = [p.relative_to(notebooks) for p in notebooks.rglob("*.ipynb")]
    paths = [p for p in paths if not any(part[0] in "._" or part == "runs" for part in p.parts)]
    return sorted(paths, key=lambda p: (order.get(p.with_suffix("").as_posix(), len(order)), p))


def picture_paths(notebooks: Path) -> list[Path]:
    "Return the pictures of the notebooks, relative to their folder"
    folders = {path.parent for path in notebook_paths(notebooks)}
    return sorted(
        path.relative_to(notebooks)
        for folder in folders
        for kind in ("svg", "png")
        for path in (notebooks / folder).glob(f"*.{kind}")
    )


def page_name(notebook: Path) -> str:
    "Return the name of a notebook's page: its path in nbs/, a tutorial's without its number"
    return notebook.with_name(re.sub(r"^\d+[a-z]?_", "", notebook.stem)).as_posix()


def escape_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def reference(text: str, target: str) -> str:
    return f"{{py:obj}}`{text} <{target}>`"


def entry_markdown(entry: Entry, module: Module, prose, depth: int = 0) -> str:
    "Return the directive that makes an entry, with its members inside"
    fence = ":" * (8 - depth)
    option = (
        f"\n:type: {entry.signature.lstrip(': ')}"
        if entry.kind in ("property", "attribute") and entry.signature
        else ""
    )
    if entry.flag:
        option += f"\n:{entry.flag}:"
    argument = entry.name + ("" if entry.kind in ("property", "attribute") else entry.signature)
    if entry.kind == "data":
        annotation, _, value = entry.signature.partition(" = ")
        argument = entry.name
        option = (f"\n:type: {annotation[2:]}" if annotation.startswith(": ") else "") + (
            f"\n:value: {value}" if value else ""
        )
    parts = [f"{fence}{{py:{entry.kind}}} {argument}\n:module: {module.name}{option}\n"]
    if entry.bases:
        parts.append(f"Bases: {prose(', '.join(map(code, entry.bases)))}")
    parts.append(prose(entry.doc))
    rows = entry.parameters if any(p.comment for p in entry.parameters) else []
    if rows:
        has_default = any(p.default for p in rows)
        cells = [["parameter", "type", *(["default"] if has_default else []), ""]]
        cells.append(["---"] * len(cells[0]))
        cells += [
            [
                code(p.name),
                code(p.annotation),
                *([code(p.default)] if has_default else []),
                p.comment,
            ]
            for p in rows
        ]
        cells = [[*map(escape_cell, row[:-1]), prose(escape_cell(row[-1]))] for row in cells]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
    if entry.returns:
        parts.append(f"*Returns* {code(entry.returns.annotation)}: {prose(entry.returns.comment)}")
    for owner, names in entry.inherited.items():
        links = ", ".join(reference(name, f"{owner}.{name}") for name in names)
        parts.append(f"Inherited from {reference(owner.split('.')[-1], owner)}: {links}")
    parts += [entry_markdown(member, module, prose, depth + 1) for member in entry.members]
    return "\n\n".join(filter(None, parts)) + f"\n{fence}"


DIRECTIVE = re.compile(r"^#\|\s*([\w-]+)\s*:?\s*(.*)$")
FENCED = re.compile(
    r"(^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[ \t]*$|``.+?``|\$\$.+?\$\$)", re.MULTILINE | re.DOTALL
)


class Pages:
    "Converter of notebooks into MyST notebooks for Sphinx"

    def __init__(
        self,
        notebooks: Path,
        modules: dict[str, Module],
        repository: str,
        branch: str,
        run: bool = False,
    ):
        self.run = run  # the notebooks with cells marked exec_doc
        self.notebooks, self.modules, self.source = (
            notebooks,
            modules,
            f"{repository}/blob/{branch}/{notebooks.name}",
        )
        self.paths = notebook_paths(notebooks)
        self.pages = {path.as_posix(): page_name(path) for path in self.paths}
        # A link may name the notebook or the page.
        self.pages_by_name = {
            name: page
            for path, page in self.pages.items()
            for name in (path.removesuffix(".ipynb"), page)
        }
        self.targets = {}
        for module in modules.values():
            for entry in module.entries.values():
                named = [(e.name, f"{module.name}.{e.name}") for e in [entry, *entry.members]]
                named += [
                    (f"{entry.name}.{name}", f"{owner}.{name}")
                    for owner, names in entry.inherited.items()
                    for name in names
                ]
                for name, target in named:
                    # A name that two modules define is left alone: which one is meant can't be known.
                    self.targets[name] = None if name in self.targets else target
        self.documented: set[str] = set()

    def prose(self, text: str, page: str = "") -> str:
        "Turn names in backticks, and links to notebooks, into links between pages"
        pieces = FENCED.split(text)
        return "".join(
            self.link(piece, page) if i % 3 == 0 else piece
            for i, piece in enumerate(pieces)
            if i % 3 != 2
        )

    def link(self, text: str, page: str) -> str:
        def name(match: re.Match) -> str:
            target = self.targets.get(match[1].removesuffix("()"))
            return reference(match[1], target) if target else match[0]

        def notebook(match: re.Match) -> str:
            target = self.pages_by_name.get(
                posixpath.normpath((Path(page).parent / match[1]).as_posix())
            )
            return f"](/{target}.ipynb{match[2] or ''})" if target else match[0]

        text = re.sub(r"(?<![`\[])`([A-Za-z_][\w.]*(?:\(\))?)`(?!`)", name, text)
        return re.sub(r"\]\((?!\w+:)([\w./-]+?)\.(?:ipynb|html)(#[\w.-]+)?\)", notebook, text)

    def convert(self, path: Path) -> dict:
        book = json.loads((self.notebooks / path).read_text(encoding="utf-8"))
        page, cells, module = self.pages[path.as_posix()], [], None
        marked = [
            c
            for c in book["cells"]
            if c["cell_type"] == "code" and "exec_doc" in split_directives("".join(c["source"]))[0]
        ]
        outputs = outputs_of(self.notebooks / path) if self.run and marked else {}
        for cell in marked:
            cell["outputs"] = outputs.get(cell["id"], cell["outputs"])
        for cell in book["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                directives, text = split_directives(text)
                if text.strip() and "hide" not in directives:
                    cells.append(
                        markdown(self.title(text, path) if not cells else self.prose(text, page))
                    )
            elif cell["cell_type"] == "code":
                directives, text = split_directives(text)
                if "default_exp" in directives:
                    module = self.modules.get(directives["default_exp"])
                    continue
                if "hide" in directives or directives.get("include") == "false" or not text.strip():
                    continue
                if directives.keys() & {"export", "exports", "exporti"}:
                    cells += self.exported(text, module, page)
                else:
                    cells.append(
                        {
                            **cell,
                            "source": text,
                            "metadata": {"tags": tags(directives)},
                            "execution_count": None,
                        }
                    )
        return {
            **book,
            "cells": cells,
            "metadata": {
                "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}
            },
        }

    def title(self, text: str, path: Path) -> str:
        "Return the first cell: title, subtitle as a lead paragraph, and the notebook's own address"
        text = self.prose(text, self.pages[path.as_posix()])
        text = re.sub(r"^> (.+)$", r"{.lead}\n\1", text, count=1, flags=re.MULTILINE)
        return f"{text}\n\n{{.source-notebook}}\n[{self.notebooks.name}/{path.as_posix()}]({self.source}/{path.as_posix()})"

    def exported(self, text: str, module: Module | None, page: str) -> list[dict]:
        "Return the entries of what an exported cell defines, and its code folded away"
        if module is None:
            return []
        tree = ast.parse(text)
        defined = []
        for node in tree.body:
            names = (
                [node.name]
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                else assigned_names(node)
            )
            defined += [name for name in names if name in module.entries]
        if all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body):
            return []
        self.documented |= {f"{module.name}.{name}" for name in defined}
        entries = [
            entry_markdown(module.entries[name], module, lambda s: self.prose(s, page))
            for name in defined
        ]
        folded = {
            "cell_type": "code",
            "id": hashlib.sha1(text.encode()).hexdigest()[:12],
            "source": text,
            "outputs": [],
            "metadata": {"tags": ["hide-input"]},
            "execution_count": None,
        }
        return [*map(markdown, entries), folded]

    def write(self, folder: Path) -> None:
        for path, page in self.pages.items():
            book = self.convert(Path(path))
            if page == "index":
                book["cells"].append(markdown(self.contents()))
            target = folder / f"{page}.ipynb"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(book), encoding="utf-8")
        for path in picture_paths(self.notebooks):
            shutil.copyfile(self.notebooks / path, folder / path)

    def contents(self) -> str:
        "Return the table of contents in the notebooks' order: tutorials first, then the floors"
        floors = listed_notebooks(self.notebooks)
        groups: dict[str, list[str]] = {"tutorials": []}
        for path, page in self.pages.items():
            if page != "index":
                name = path.removesuffix(".ipynb")
                floor = (
                    "tutorials" if name.startswith("tutorials/") else floors.get(name) or "modules"
                )
                groups.setdefault(floor, []).append(page)
        blocks = [
            f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```"
            for caption, pages in groups.items()
            if pages
        ]
        return "\n\n".join(
            [*blocks, "```{toctree}\n:hidden:\n:caption: project\n\nchangelog\ngenindex\n```"]
        )


def outputs_of(notebook: Path) -> dict[str, list]:
    "Run a notebook for its page, and return the outputs of its cells by their ids"
    from llamagym.cli import run_notebook

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        made = Path(folder) / notebook.name
        run_notebook(notebook, made, {"LLAMAGYM_DOCS": "1", "IN_TEST": ""})
        book = json.loads(made.read_text(encoding="utf-8"))
    return {
        cell["id"]: [o for o in cell["outputs"] if o["output_type"] != "stream"]
        for cell in book["cells"]
        if cell["cell_type"] == "code"
    }


def markdown(text: str) -> dict:
    return {
        "cell_type": "markdown",
        "id": hashlib.sha1(text.encode()).hexdigest()[:12],
        "metadata": {},
        "source": text,
    }


def split_directives(text: str) -> tuple[dict[str, str], str]:
    "Split a cell into the `#|` lines at its beginning and the rest"
    directives, lines = {}, text.split("\n")
    while lines and (match := DIRECTIVE.match(lines[0])):
        directives[match[1]] = match[2].strip()
        lines.pop(0)
    return directives, "\n".join(lines).strip("\n")


def tags(directives: dict[str, str]) -> list[str]:
    table = {
        ("hide_input", ""): "remove-input",
        ("echo", "false"): "remove-input",
        ("hide_output", ""): "remove-output",
        ("output", "false"): "remove-output",
        ("code-fold", "true"): "hide-input",
        ("code-fold", "show"): "hide-input",
    }
    return [tag for directive, tag in table.items() if directive in directives.items()]


# ---------------------------------------------------------------------------------------------------------------------
# The site


def settings() -> ConfigParser:
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def build(
    site: Path, notebooks: Path = ROOT / "nbs", package: Path = ROOT / PACKAGE, run: bool = False
) -> list[str]:
    "Build the site and return its problems; `run` executes notebooks with cells marked exec_doc"
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    config = settings()
    modules = read_modules(package)
    pages = Pages(notebooks, modules, config["repository"], config["branch"], run)
    version = re.search(
        r'^__version__ = "(.+?)"',
        (package / "__init__.py").read_text(encoding="utf-8"),
        re.MULTILINE,
    )[1]
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        source.mkdir()
        pages.write(source)
        (source / "changelog.md").write_text(
            (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), encoding="utf-8"
        )
        (source / "genindex.md").write_text("# Index\n", encoding="utf-8")  # Sphinx fills it
        title = f"{config['lib_name']} {version}"
        values = {
            "project": title,
            "html_title": title,
            "author": config["author"],
            "copyright": config["author"],
            "version": version,
            "package_folder": str(package),
        }
        output, warnings = Path(temporary) / "html", io.StringIO()
        with docutils_namespace():
            app = Sphinx(
                source,
                ROOT / "scripts" / "docs",
                output,
                Path(temporary) / "doctrees",
                "html",
                values,
                status=None,
                warning=warnings,
            )
            app.build(force_all=True)
        problems = [
            re.sub(r"\x1b\[[\d;]*m", "", line).replace(str(source) + "/", "")
            for line in warnings.getvalue().splitlines()
            if line.strip()
        ]
        if not (output / "index.html").exists():
            return [*problems, "no index.html was made: is there an nbs/index.ipynb?"]
        problems += check(output, modules)
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(output, site)
    if not problems:
        (site / FINGERPRINT).write_text(fingerprint(notebooks, package), encoding="utf-8")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Checks

FINGERPRINT = ".fingerprint"


def fingerprint(notebooks: Path = ROOT / "nbs", package: Path = ROOT / PACKAGE) -> str:
    "Return a digest of everything a site is made from"
    digest = hashlib.sha256()
    own = [ROOT / "CHANGELOG.md", ROOT / "settings.ini", *(ROOT / "scripts").rglob("*.*")]
    for path in sorted(
        [
            *(notebooks / p for p in [*notebook_paths(notebooks), *picture_paths(notebooks)]),
            *package.rglob("*.py"),
            *package.rglob("*.js"),
            *own,
        ]
    ):
        if "__pycache__" not in path.parts:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def is_fresh(site: Path) -> bool:
    return (site / FINGERPRINT).exists() and (site / FINGERPRINT).read_text(
        encoding="utf-8"
    ) == fingerprint()


class Links(HTMLParser):
    "The anchors and links of a page"

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for key, value in attributes:
            if key == "id" or (key == "name" and tag == "a"):
                self.anchors.add(value)
            elif key in ("href", "src") and value:
                self.links.append(html.unescape(value))


def check(site: Path, modules: dict[str, Module]) -> list[str]:
    "Return public names without an entry, broken internal links, and tables shown as raw text"
    texts = {
        page.relative_to(site).as_posix(): page.read_text(encoding="utf-8")
        for page in sorted(site.rglob("*.html"))
    }
    pages = {name: Links(text) for name, text in texts.items()}
    anchors = set().union(
        *(page.anchors for name, page in pages.items() if not name.startswith("_modules/"))
    )
    named = {
        f"{m.name}.{name}": None
        for m in modules.values()
        for name in [*m.public, *(e.name for c in m.entries.values() for e in c.members)]
    }
    problems = [f"{name} has no entry in the site" for name in named if name not in anchors]
    problems += [
        f"{name}: a table is shown as the text it is written in"
        for name, text in texts.items()
        if re.search(r"<p>\s*\|", text)
    ]
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            path = (site / name).parent / unquote(parts.path) if parts.path else site / name
            path = path.resolve()
            if not path.exists():
                problems.append(f"{name}: {link} leads to no file")
            elif parts.fragment and path.suffix == ".html":
                target = pages[path.relative_to(site.resolve()).as_posix()]
                if unquote(parts.fragment) not in target.anchors:
                    problems.append(f"{name}: {link} leads to no such place in the page")
    return problems


def main() -> int:
    arguments = argparse.ArgumentParser(description="Build the HTML site from the notebooks.")
    arguments.add_argument(
        "site", nargs="?", default="_site", type=Path, help="folder to write (default: %(default)s)"
    )
    site = arguments.parse_args().site.resolve()
    problems = build(site, run=True)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{len(problems)} problems", file=sys.stderr)
        return 1
    print(f"{site / 'index.html'}: {len(list(site.rglob('*.html')))} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
