"""The metadata agrees across settings, pyproject.toml, constraints, package and README."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

import build_docs
import pytest
from nbdev.config import get_config
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import llamagym
from llamagym.extras import install_command, repository

ROOT = Path(__file__).parent.parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = parser["DEFAULT"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIREMENTS = {
    key.removesuffix("requirements").removesuffix("_"): [
        Requirement(line) for line in SETTINGS[key].split("\n") if line
    ]
    for key in SETTINGS
    if key.endswith("requirements")
}
PINS = {
    re.sub(r"[-_.]+", "-", name.lower()): version
    for name, version in (
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and line[0] != "#"
    )
}
CORE = "torch transformers peft accelerate gymnasium numpy pyarrow matplotlib ipywidgets anywidget tqdm".split()
EXTRAS = "gpu warmstart gguf envs notebook docs dev".split()


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_pyproject_agrees_with_settings():
    project = PYPROJECT["project"]
    assert project["name"] == SETTINGS["lib_name"]
    assert project["description"] == SETTINGS["description"]
    assert project["requires-python"] == f">={SETTINGS['min_python']}"
    assert project["urls"] == {"Repository": SETTINGS["repository"]}
    assert not {"version", "dependencies", "optional-dependencies", "scripts"} & project.keys()


def test_nbdev_agrees_with_settings():
    config = get_config(ROOT)
    assert config.lib_path == ROOT / SETTINGS["lib_path"]
    assert config.nbs_path == ROOT / "nbs"
    assert config.git_url == SETTINGS["repository"] == repository()
    assert config.branch == SETTINGS["branch"]
    assert config.version == llamagym.__version__
    assert not config.jupyter_hooks, "it writes into the user's home"


def test_installed_package_agrees_with_settings():
    installed = distribution("llamagym")
    assert installed.version == llamagym.__version__, (
        "install again: make test does when the version changes"
    )
    assert installed.metadata["Summary"] == SETTINGS["description"]
    assert installed.metadata["License"] == SETTINGS["license"]
    assert installed.metadata["Requires-Python"] == f">={SETTINGS['min_python']}"
    assert installed.metadata.get_all("Provides-Extra") == EXTRAS
    scripts = [
        f"{e.name} = {e.value}" for e in installed.entry_points if e.group == "console_scripts"
    ]
    assert scripts == [line for line in SETTINGS["console_scripts"].split("\n") if line]
    declared = {
        extra: [r for r in map(Requirement, installed.requires) if belongs_to_extra(r, extra)]
        for extra in ["", *EXTRAS]
    }
    for extra, requirements in REQUIREMENTS.items():
        assert [(r.name, r.specifier) for r in declared[extra]] == [
            (r.name, r.specifier) for r in requirements
        ], extra


def belongs_to_extra(requirement: Requirement, extra: str) -> bool:
    match = re.search(r'extra == "(\w+)"', str(requirement.marker))
    return (match[1] if match else "") == extra


def test_core_and_extras_have_the_expected_packages():
    assert set(CORE) <= {r.name for r in REQUIREMENTS[""]}
    assert list(REQUIREMENTS) == ["", *EXTRAS]
    assert {r.name for r in REQUIREMENTS["gpu"]} == {"bitsandbytes"}
    assert {r.name for r in REQUIREMENTS["warmstart"]} == {"trl", "datasets"}


def test_every_requirement_is_pinned_to_a_version_it_allows():
    for extra, requirements in REQUIREMENTS.items():
        for requirement in requirements:
            pin = PINS.get(re.sub(r"[-_.]+", "-", requirement.name.lower()))
            assert pin, f"{requirement.name} ({extra or 'core'}) is not in constraints.txt"
            assert requirement.specifier.contains(pin), (
                f"{requirement} does not allow the pinned {pin}"
            )


def test_development_tools_are_pinned_exactly():
    exact = {
        r.name: str(r.specifier)
        for r in REQUIREMENTS["dev"]
        if r.name in ("nbdev", "fastcore", "execnb")
    }
    assert exact == {name: f"=={PINS[name]}" for name in ("nbdev", "fastcore", "execnb")}


def test_pins_fit_every_platform():
    assert all(Version(version).local is None for version in PINS.values()), (
        "a pin with +cpu or +cu fits one build only"
    )
    assert not [name for name in PINS if name.startswith("nvidia-")]


def test_python_versions_agree():
    versions = SETTINGS["python_versions"].split()
    assert versions[0] == SETTINGS["min_python"]
    classifiers = distribution("llamagym").metadata.get_all("Classifier")
    assert [c.rsplit(" ", 1)[1] for c in classifiers if re.search(r":: 3\.\d+$", c)] == versions
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + versions[0].replace(".", "")
    low, high = (version.replace(".", ", ") for version in (versions[0], versions[-1]))
    assert f"({low}) <= sys.version_info[:2] <= ({high})" in text("scripts/make_venv.sh")
    assert all(f"python{version}" in text("scripts/make_venv.sh") for version in versions)
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in SpecifierSet(f">={versions[0]}")


def test_changelog_begins_with_the_current_version():
    assert re.search(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)[1] == llamagym.__version__


def test_license_file_matches_settings():
    assert text("LICENSE").startswith(f"{SETTINGS['license']} License")
    assert SETTINGS["author"] in text("LICENSE")


def test_readme_installs_from_the_repository():
    assert install_command() in text("README.md")
    assert "pip install llamagym" not in text("README.md"), (
        "that name on the package index is another package"
    )


def test_repository_address_is_defined_in_settings():
    """settings.ini defines it; pyproject.toml, the README and examples may repeat it"""
    suffixes = {".py", ".ini", ".toml", ".txt", ".md", ".sh", ".yaml", ".ipynb", ""}
    file_list = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    host = SETTINGS["repository"].rsplit("/", 2)[0]
    for path in (ROOT / name for name in file_list.splitlines()):
        # nbdev writes _modidx.py from pyproject.toml
        if path.suffix not in suffixes or not path.is_file() or path.name == "_modidx.py":
            continue
        for address in re.findall(
            rf"{host}/{SETTINGS['lib_name']}/[\w.-]+", path.read_text(encoding="utf-8")
        ):
            assert address.removesuffix(".git") == SETTINGS["repository"], path
            assert path.suffix in (".ini", ".toml", ".ipynb", ".md"), (
                f"{path} spells the address out: read it from the metadata"
            )


def test_makefile_has_the_expected_targets():
    targets = set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))
    assert {"quickstart", "test", "lab", "docs", "clean"} <= targets


# Names and imports of `import llamagym`


def public_names(module: str) -> list[str]:
    for node in ast.parse(text(f"llamagym/{build_docs.module_file(module)}")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"llamagym/{module}.py has no __all__")


def test_top_level_names_are_public_in_their_modules():
    assert sorted(llamagym._MODULE_OF) == sorted(llamagym.__all__)
    for name, module in llamagym._MODULE_OF.items():
        assert name in public_names(module)
        assert getattr(llamagym, name) is getattr(
            importlib.import_module(f"llamagym.{module}"), name
        )
    assert set(llamagym.__all__) <= set(dir(llamagym))


def test_unknown_top_level_name_raises_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'llamagym' has no attribute 'Agnet'"):
        llamagym.Agnet  # noqa: B018


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_importing_the_package_imports_no_heavy_packages():
    heavy = {"torch", "transformers", "gymnasium", "numpy", "matplotlib"}
    loaded = run_python(
        "import sys; before = set(sys.modules); import llamagym; print(*(set(sys.modules) - before))"
    ).split()
    assert not heavy & set(loaded)
    assert len(loaded) < 30


def test_core_requirements_are_sufficient_to_import_every_module():
    """No module needs a package of the extras to be imported"""
    optional = {
        r.name.replace("-", "_")
        for extra, requirements in REQUIREMENTS.items()
        if extra
        for r in requirements
    }
    modules = build_docs.module_names()
    code = f"""
import importlib, sys
for name in {sorted(optional)!r}: sys.modules[name] = None
for name in {modules!r}: importlib.import_module("llamagym." + name)
print("imported")"""
    assert run_python(code).strip() == "imported"
