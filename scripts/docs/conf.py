"Sphinx settings; scripts/build_docs.py adds the project's name and version, and where its package is."

import ast
import html
import re
from pathlib import Path
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"
ACCENTS = {"ˆ", "~", "ˉ", "→", "˙"}
ElementTree.register_namespace("", NAMESPACE[1:-1])
logger = logging.getLogger(__name__)

extensions = ["myst_nb", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
pygments_style = "default"
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # tables in the outputs of cells, too
nb_code_prompt_show = "Source"
nb_code_prompt_hide = "Source"
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
# Outputs are shown with whatever headings they have.
suppress_warnings = ["myst.header"]
python_display_short_literal_types = True
python_maximum_signature_line_length = 90
myst_dmath_double_inline = True
add_module_names = False
toc_object_entries_show_parents = "hide"
viewcode_follow_imported_members = False
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp"


def source_of(app, modname):
    "A module's source and where its definitions are, without importing it"
    relative = modname.split(".", 1)[1].replace(".", "/")
    path = Path(app.config.package_folder) / f"{relative}.py"
    source = path.read_text(encoding="utf-8")
    tags = {}

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                kind = "class" if isinstance(node, ast.ClassDef) else "def"
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                tags[prefix + node.name] = (kind, first, node.end_lineno)
                if kind == "class":
                    visit(node.body, prefix + node.name + ".")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            tags[prefix + name.id] = ("other", node.lineno, node.end_lineno)

    body = ast.parse(source).body
    visit(body, "")
    # What a class has from a private base has its entry under the class.
    for node in body:
        for base in node.bases if isinstance(node, ast.ClassDef) else []:
            if isinstance(base, ast.Name) and base.id.startswith("_"):
                tags = {
                    node.name + name.removeprefix(base.id): tag
                    for name, tag in tags.items()
                    if name.startswith(f"{base.id}.")
                } | tags
    return source, tags


# LaTeX that docutils' converter does not know, and what says the same.
REWRITES = [
    (r"\\(frac|tfrac|dfrac)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}"),
    (r"\\dots(?![a-z])", r"\\ldots"),
    (r"\\[bB]ig(?![a-z])", ""),
]


def mathml(latex, display):
    "LaTeX as MathML, which browsers show by themselves: no script and no font has to be fetched"
    for pattern, replacement in REWRITES:
        latex = re.sub(pattern, replacement, latex)
    text = re.sub(
        r"&(?!(?:amp|gt|lt);)\w+;",
        lambda entity: html.unescape(entity[0]),
        tex2mathml(latex, as_block=display),
    )
    root = ElementTree.fromstring(text)
    for element in root.iter():
        # An accented letter with an index: the converter puts the index under the letter.
        if element.tag == NAMESPACE + "munderover" and element[2].text in ACCENTS:
            base, index, accent = element
            accented = ElementTree.Element(NAMESPACE + "mover")
            accented.extend([base, accent])
            element[:] = [accented, index]
            element.tag = NAMESPACE + "msub"
        # The label of a brace belongs under or over it; the converter makes it a sub- or superscript.
        pair = [element.tag, element[0].tag] if len(element) else []
        for script, limits in (("msub", "munder"), ("msup", "mover")):
            if pair == [NAMESPACE + script, NAMESPACE + limits] and element[0][1].text in (
                "⏟",
                "⏞",
            ):
                element.tag = NAMESPACE + limits
    return ElementTree.tostring(root, encoding="unicode")


def math_visitor(display):
    def visit(self, node):
        try:
            self.body.append(mathml(node.astext(), display))
        except MathError as error:
            logger.warning("%s, in the formula %s", error, node.astext(), location=node)
        raise nodes.SkipNode

    return visit


def setup(app):
    app.add_config_value("package_folder", "", "env")
    app.connect("viewcode-find-source", source_of)
    app.add_html_math_renderer("mathml", (math_visitor(False), None), (math_visitor(True), None))
