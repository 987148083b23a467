"""Public names are importable, documented, typed and completed by editors."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import build_docs
import jedi
import pytest

import llamagym

ROOT = Path(__file__).parent.parent
MODULES = build_docs.module_names()
SCRIPT = '''
"""What a user may write, checked as strictly as checkers can"""

from collections.abc import Sequence

import gymnasium as gym

from llamagym import (
    Agent,
    Anneal,
    Callback,
    Config,
    Episode,
    EpisodeBuffer,
    EpisodePlayer,
    LoRAConfig,
    Policy,
    RandomAgent,
    Trainer,
    blackjack,
    clone,
    collect,
    evaluate,
    plan,
    play,
)


class Printing(Callback):
    def on_update_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        print(trainer.update, metrics["mean_return"])


class MyAgent(Agent):
    def get_system_prompt(self) -> str:
        return "Reply Action: 0 or Action: 1."

    def format_observation(self, observation: tuple[int, int, int]) -> str:
        return f"Your total: {observation[0]}."

    def extract_action(self, response: str) -> int:
        return int(response[-1])


def mean_return(episodes: Sequence[Episode]) -> float:
    return sum(episode.total_reward for episode in episodes) / len(episodes)


policy = Policy.load("tiny", lora=LoRAConfig(r=8), seed=0)
config = Config.from_dict({"rollout.episodes": 8})
task = blackjack()
agent = Agent.for_task(task, policy, config=config)
clone(agent, play(task, RandomAgent(task), episodes=8), progress=False)
run = Trainer(agent, callbacks=[Printing(), Anneal(kl_coef=(0.1, 0.01))]).fit(updates=1)
episodes: EpisodeBuffer = collect(agent, episodes=4)
print(mean_return(episodes), evaluate(agent, episodes=4), run.history[-1])
EpisodePlayer(episodes, agent=agent).save("episode.html")
env = gym.make("Blackjack-v1")
mine = MyAgent(policy, action_space=env.action_space)
observation, _ = env.reset(seed=0)
action: int = mine.act(observation)
mine.assign_reward(1.0)
stats: dict[str, float] = mine.terminate_episode()
policy.save("policy")
print(Policy.load("policy"), plan("tiny", gpu="8GB"))
'''


def run(*command: str, cwd: Path) -> str:
    """Output of a tool that finds the package in the repository

    An editable install is found by an import hook, which type checkers do not run.
    """
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("user") / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


@pytest.mark.slow
def test_public_names_type_check_with_mypy(script):
    options = ["--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    assert "Success: no issues found" in run("mypy", *options, script.name, cwd=script.parent)


@pytest.mark.slow
def test_public_names_type_check_with_pyright(script):
    config = {"typeCheckingMode": "standard", "include": [script.name], "extraPaths": [str(ROOT)]}
    (script.parent / "pyrightconfig.json").write_text(json.dumps(config))
    assert "0 errors" in run(
        "basedpyright", "--pythonpath", sys.executable, script.name, cwd=script.parent
    )


def test_public_methods_are_completed_by_editors():
    code = "from llamagym import Policy\nPolicy.lo"
    completed = {c.name for c in jedi.Script(code).complete(2, 9)}
    assert "load" in completed
    (signature,) = jedi.Script("from llamagym import Policy\nPolicy.load(").get_signatures(2, 12)
    assert {"name", "quantize", "lora", "seed"} <= {p.name for p in signature.params}


def docstring_of(name: str) -> str:
    module = build_docs.Module(
        ROOT / "llamagym" / build_docs.module_file(llamagym._MODULE_OF[name])
    )
    return module.entries[name].doc


@pytest.mark.parametrize("name", llamagym.__all__)
def test_public_names_are_documented(name):
    assert len(docstring_of(name)) > 20


def test_public_names_are_imported_for_type_checkers():
    source = (ROOT / "llamagym" / "__init__.py").read_text(encoding="utf-8")
    imported = {
        alias.name: node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert imported == llamagym._MODULE_OF


def notebook_code(notebook: str) -> str:
    cells = json.loads((ROOT / "nbs" / notebook).read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


PAGES = ["index.ipynb", *(f"tutorials/{p.name}" for p in (ROOT / "nbs/tutorials").glob("*.ipynb"))]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_public_names_are_the_only_imports_of_tutorials(name):
    assert not re.findall(r"(?:from|import) llamagym\.[\w.]+", notebook_code(name))


def unannotated(node: ast.FunctionDef, method: bool) -> list[str]:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
    arguments = arguments[1:] if method and not static else arguments
    missing = [a.arg for a in arguments if a.annotation is None]
    return missing + (["return"] if node.returns is None and node.name != "__init__" else [])


@pytest.mark.parametrize("name", MODULES)
def test_public_signatures_are_annotated(name):
    module = build_docs.Module(ROOT / "llamagym" / build_docs.module_file(name))
    missing = []
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in module.public:
            missing += [f"{node.name}: {x}" for x in unannotated(node, method=False)]
        if isinstance(node, ast.ClassDef) and node.name in module.public:
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    is_public = member.name == "__init__" or not member.name.startswith("_")
                    names = unannotated(member, method=True) if is_public else []
                    missing += [f"{node.name}.{member.name}: {x}" for x in names]
    assert not missing, missing
