"""The doctor: each ailment is caused on purpose in a real run and named there, once; runs that learn hear nothing."""

import dataclasses
import json

import gymnasium as gym
import pytest
import torch

from llamagym.actions import DiscreteActions
from llamagym.agent import Agent
from llamagym.config import Config, LoRAConfig
from llamagym.doctor import CHECKS
from llamagym.policy import Policy
from llamagym.scored import ScoredAgent
from llamagym.task import RandomAgent, ScriptedAgent, Task, play
from llamagym.trainer import Callback, Trainer
from llamagym.warmstart import clone

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing",
                                        "ignore:Could not find a config file")  # fmt: skip
WAYS = DiscreteActions(("left", "right", "up", "down"))


class Steps(gym.Env):
    """Some steps, each rewarded by `pay(random generator, step, action)`"""

    def __init__(self, pay, length=2):
        self.pay, self.length = pay, length
        self.action_space, self.observation_space = gym.spaces.Discrete(4), gym.spaces.Discrete(1000)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return self.at, {}

    def step(self, action):
        self.at += 1
        return self.at, float(self.pay(self.np_random, self.at, action)), self.at == self.length, False, {}


def steps(pay, length=2, **changes) -> Task:
    words = dict(describe=lambda obs, info: f"Step {obs}.", parse=WAYS.parse, action_text=WAYS.text, system_prompt="Walk.")
    return Task(lambda: Steps(pay, length), **(words | changes))


def nothing(random, at, action) -> float:
    return 0.0


def noise(random, at, action) -> float:
    return random.normal()


def up(random, at, action) -> float:
    return action == 2


class Between(Callback):
    """Does something before each update but the first"""

    def __init__(self, do):
        self.do = do

    def on_update_start(self, trainer):
        if trainer.update:
            self.do(trainer)


def findings(folder, task, before=(), plays=None, kind=Agent, algorithm=None, settle=None, **options) -> dict[str, str]:
    """What the doctor says in a run of an agent that was warmed up on the actions `plays` chooses, random ones by default"""
    defaults = {"generate.max_new_tokens": 8, "rollout.episodes": 64, "rollout.num_envs": 64,
                "ppo.epochs": 1, "ppo.mini_batch_size": 64, "ppo.learning_rate": 3e-4, "warmstart.learning_rate": 3e-3, "warmstart.epochs": 2,
                "trainer.updates": 3, "trainer.eval_every": 0, "trainer.checkpoint_every": 0}  # fmt: skip
    config = Config.from_dict(defaults | {"trainer.output_dir": str(folder)} | {name.replace("__", "."): value for name, value in options.items()})
    agent = kind.for_task(task, Policy.load("tiny", lora=LoRAConfig(r=8), seed=config.trainer.seed), config=config)
    clone(agent, play(task, RandomAgent(task) if plays is None else ScriptedAgent(task, plays), episodes=300, seed=7), progress=False)
    if settle:
        settle(agent)
    run = Trainer(agent, callbacks=[Between(do) for do in before], algorithm=algorithm).fit()
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("findings") for line in written] == [line.get("findings") for line in run.history]
    found = [item for line in run.history for item in line.get("findings", {}).items()]
    assert len(dict(found)) == len(found), "said twice"
    return dict(found)


def sharpen(trainer) -> None:
    """Make the policy sure of what it likes best"""
    with torch.no_grad():
        trainer.agent.policy.causal_lm.get_output_embeddings().weight.mul_(20)


def forget(trainer) -> None:
    """Make the policy babble"""
    with torch.no_grad():
        trainer.agent.policy.causal_lm.get_output_embeddings().weight.normal_()


def skew_sampler(agent) -> None:
    """Sample at another temperature than the learner believes"""
    agent.engine.config = dataclasses.replace(agent.engine.config, temperature=1.6)


CAUSES = {
    "constant rewards": dict(task=steps(nothing)),
    "zero advantages": dict(task=steps(nothing), algorithm="grpo"),
    "zero gradient": dict(task=steps(nothing), algorithm="grpo", ppo__kl_coef=0.0),
    "entropy collapsed": dict(task=steps(noise), before=[sharpen]),
    "one action": dict(task=steps(noise), plays=lambda obs, info: 2),
    "invalid responses": dict(task=steps(noise), before=[forget], trainer__updates=5),
    "KL running away": dict(task=steps(noise), ppo__learning_rate=3e-2, ppo__kl_coef=0.0, ppo__epochs=4),
    "useless critic": dict(task=steps(noise), trainer__updates=10, ppo__critic_learning_rate=1e-4),
    "log-probability gap": dict(task=steps(noise), settle=skew_sampler),
    "cut responses": dict(task=steps(noise), generate__max_new_tokens=2),
    "cut context": dict(task=steps(noise, length=8), context__max_length=60),
}


@pytest.mark.parametrize("ailment", CAUSES)
def test_doctor_names_what_was_caused(ailment, tmp_path, capsys):
    found = findings(tmp_path, **CAUSES[ailment])
    assert ailment in found
    assert f"{ailment}: {found[ailment]}" in capsys.readouterr().out.replace("\n", " ")


def test_doctor_knows_a_cause_for_every_check():
    assert set(CAUSES) == set(CHECKS)


@pytest.mark.parametrize("how", [dict(), dict(kind=ScoredAgent), dict(algorithm="reinforce"), dict(algorithm="grpo")], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_doctor_is_silent_where_a_run_learns(how, seed, tmp_path):
    task = steps(up, reference_returns={"random": 0.5, "optimal": 2.0})
    assert findings(tmp_path, task, trainer__seed=seed, trainer__updates=16, ppo__learning_rate=5e-4, **how) == {}
    returns = [json.loads(line)["mean_return"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert returns[-1] > 1.7, returns


def test_doctor_says_nothing_twice_after_a_resume(tmp_path, capsys):
    agent = Agent.for_task(steps(nothing), Policy.load("tiny"), config=Config.from_dict({
        "generate.max_new_tokens": 2, "rollout.episodes": 4, "ppo.epochs": 1, "trainer": dict(updates=4, eval_every=0, output_dir=str(tmp_path))}))  # fmt: skip
    Trainer(agent).fit(updates=3)
    assert "constant rewards" in capsys.readouterr().out
    run = Trainer(agent).fit(updates=6, resume=True)
    assert len(run.history) == 6 and "constant rewards" not in capsys.readouterr().out
    assert sum("constant rewards" in line.get("findings", {}) for line in run.history) == 1
