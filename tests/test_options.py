"""Every option is set in an example, names are distinct, and former names raise an error."""

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

from llamagym.config import Config
from llamagym.options import Section

ROOT = Path(__file__).parent.parent
SECTIONS = {c.__name__: c for c in Section.__subclasses__() if c.__module__ == "llamagym.config"}
NAMES = Config.names()
RENAMED = [
    (f"{section.path}.{old}", new)
    for section in SECTIONS.values()
    for old, new in section.renamed.items()
]
# Functions whose keyword arguments are options of a section.
PARAMETERS_OF = {"load": "model", "collect": "rollout", "Trainer": "credit"}


def examples() -> list[str]:
    """Return the source of tutorials, benchmarks and notebook cells that are not exported"""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")]
    for path in (ROOT / "nbs").glob("**/*.ipynb"):
        # In the notebooks that define the options, setting an option has no effect.
        if path.stem in ("config", "options", "compat") or ".ipynb_checkpoints" in path.parts:
            continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and not source.startswith("#| export"):
                sources.append(re.sub(r"(?m)^(\s*)%.*$", r"\1pass", source))  # no magics
    return sources


def named_values(node: ast.expr) -> list[tuple[str, ast.expr]]:
    """Return names and values of a dictionary display or of a call's keyword arguments"""
    if isinstance(node, ast.Dict):
        return [
            (key.value, value)
            for key, value in zip(node.keys, node.values)
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        ]
    if isinstance(node, ast.Call):
        return [(keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg]
    return []


def options_set_in(node: ast.AST) -> list[str]:
    """Return the dotted names of the options that a node of a program sets"""
    if isinstance(node, ast.Assign):
        targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
        return [".".join(ast.unparse(target).split(".")[-2:]) for target in targets]
    if not isinstance(node, ast.Dict | ast.Call):
        return []
    found = []
    for name, value in named_values(node):
        found.append(name.replace("__", "."))  # "ppo.epochs": 2, and ppo__epochs=2
        found += [f"{name}.{inner}" for inner, _ in named_values(value)]  # ppo=dict(epochs=2)
        found += [f"model.{name}.{inner}" for inner, _ in named_values(value) if name == "lora"]
    if isinstance(node, ast.Call):
        function = ast.unparse(node.func).rpartition(".")[2]
        section = SECTIONS[function].path if function in SECTIONS else PARAMETERS_OF.get(function)
        found += [f"{section}.{name}" for name, _ in named_values(node) if section]
    return found


@cache
def options_in_examples() -> set[str]:
    nodes = [node for source in examples() for node in ast.walk(ast.parse(source))]
    return {name for node in nodes for name in options_set_in(node)}


@pytest.mark.parametrize("name", NAMES)
def test_options_are_set_in_an_example(name):
    """Each option is set in a tutorial, a benchmark or an example of a notebook"""
    assert name in options_in_examples(), f"{name} is set in no example: show it, or remove it"


def test_options_are_found_in_each_syntax():
    source = """
Config.from_dict({"ppo.epochs": 2, "credit": dict(gamma=0.9), "model": {"lora": {"r": 8}}})
run_probe("bandit", ppo__kl_coef=0.0)
PPOConfig(clip_range=0.1)
Policy.load("tiny", critic="shared")
agent.config.trainer.seed, other = 3, 4
"""
    nodes = ast.walk(ast.parse(source))
    found = {name for node in nodes for name in options_set_in(node)} & set(NAMES)
    assert found == {
        "ppo.epochs", "credit.gamma", "model.lora.r", "ppo.kl_coef", "ppo.clip_range",
        "model.critic", "trainer.seed",
    }  # fmt: skip


def test_options_differ_in_more_than_word_order():
    name_of_words: dict[tuple[str, ...], str] = {}
    for name in NAMES:
        section, _, option = name.rpartition(".")
        assert option != section, f"{name} repeats its section"
        key = (section, *sorted(option.split("_")))
        assert key not in name_of_words, (
            f"{name} and {name_of_words[key]} differ in the order of words alone"
        )
        name_of_words[key] = name


def test_options_of_different_sections_share_three_names_only():
    """Two sections share an option name only for a training term that both have"""
    sections: dict[str, set[str]] = {}
    for name in NAMES:
        sections.setdefault(name.rpartition(".")[2], set()).add(name.rpartition(".")[0])
    shared = {option for option, owners in sections.items() if len(owners) > 1}
    assert shared == {"epochs", "learning_rate", "seed"}


@pytest.mark.parametrize(("old", "new"), RENAMED)
def test_options_renamed_raise_an_error_with_the_new_name(old, new, tmp_path):
    assert new in NAMES and old not in NAMES
    section, _, name = old.rpartition(".")
    config = Config()
    section_config = getattr(config, section)
    file = tmp_path / "run.toml"
    file.write_text(f"[{section}]\n{name} = 1\n")
    for error, use in (
        (ValueError, lambda: Config.from_dict({old: 1})),
        (ValueError, lambda: Config.from_dict({section: {name: 1}})),
        (ValueError, lambda: config.replace({old: 1})),
        (ValueError, lambda: Config.load(file)),
        (ValueError, lambda: Config.from_json(json.dumps({section: {name: 1}}))),
        (TypeError, lambda: type(section_config)(**{name: 1})),
        (AttributeError, lambda: setattr(section_config, name, 1)),
        (AttributeError, lambda: getattr(section_config, name)),
    ):
        with pytest.raises(error, match=f"'{old}' was renamed; use '{new}'"):
            use()


def test_options_renamed_are_rejected_by_the_command_line(capsys):
    from llamagym.cli import main

    assert main(["plan", "tiny", "--gpu", "16GB", "--set", "ppo.target_kl=0.1"]) == 1
    assert "use 'ppo.early_stop_kl'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kl_target", "kl_in", "importance_cap", "history", "keep_groups"])
def test_options_renamed_are_rejected_in_dictionaries_of_2024(name):
    with pytest.raises(ValueError, match="was renamed; use '(ppo|credit)"):
        Config.from_2024(None, {name: 1})


def test_options_of_2024_are_accepted():
    """The names `batch_size` and `target_kl` of trl 0.7 are accepted"""
    config = Config.from_2024(None, {"batch_size": 8, "target_kl": 0.1})
    assert (config.ppo.turns_per_update, config.ppo.early_stop_kl) == (8, 0.1)
