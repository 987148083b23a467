"""The doctor reports each issue once, in real runs that cause it, and none in runs that learn."""

import dataclasses
import json
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from doubles import some

from llamagym.agent import Agent
from llamagym.agents.scored import ScoredAgent
from llamagym.config import Config, LoRAConfig
from llamagym.envs.actions import DiscreteActions
from llamagym.envs.baselines import RandomAgent, ScriptedAgent, play
from llamagym.envs.task import Task
from llamagym.models.policy import Policy
from llamagym.trainer import Trainer
from llamagym.training.callbacks import Callback
from llamagym.training.cloning import clone
from llamagym.training.doctor import CHECKS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from doctor import FAULTS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing",
                                        "ignore:Could not find a config file")  # fmt: skip
DIRECTIONS = DiscreteActions(("left", "right", "up", "down"))


class StepsEnv(gym.Env):
    """An environment of a few steps, rewarded by `reward(random generator, step, action)`"""

    def __init__(self, reward, length=2):
        self.reward, self.length = reward, length
        self.action_space, self.observation_space = (
            gym.spaces.Discrete(4),
            gym.spaces.Discrete(1000),
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return self.at, {}

    def step(self, action):
        self.at += 1
        return (
            self.at,
            float(self.reward(self.np_random, self.at, action)),
            self.at == self.length,
            False,
            {},
        )


class SecretEnv(StepsEnv):
    """An environment whose return is a secret number, which the observation tells"""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.secret = int(self.np_random.integers(4))
        return self.secret, {}

    def step(self, action):
        _, _, *rest = super().step(action)
        return self.secret, float(self.secret), *rest


def steps_task(reward, length=2, **changes) -> Task:
    methods = dict(
        format_observation=lambda obs, info: f"Step {obs}.",
        extract_action=DIRECTIONS.extract_action,
        format_action=DIRECTIONS.format_action,
        system_prompt="Walk.",
    )
    return Task(**(dict(env=lambda: StepsEnv(reward, length)) | methods | changes))


def zero_reward(random, at, action) -> float:
    return 0.0


def random_reward(random, at, action) -> float:
    return random.normal()


def reward_for_up(random, at, action) -> float:
    return action == 2


class BeforeUpdates(Callback):
    """A callback that calls a function before each update except the first"""

    def __init__(self, function):
        self.function = function

    def on_update_start(self, trainer):
        if trainer.update:
            self.function(trainer)


def findings(
    folder,
    task,
    before=(),
    demonstration=None,
    agent_class=Agent,
    algorithm=None,
    prepare=None,
    **options,
) -> dict[str, str]:
    """Return the findings in a run of an agent that cloned a demonstration, by default random"""
    defaults = {"generate.max_new_tokens": 8, "rollout.episodes": 64, "rollout.num_envs": 64,
                "ppo.epochs": 1, "ppo.mini_batch_size": 64, "ppo.learning_rate": 3e-4, "warmstart.learning_rate": 3e-3, "warmstart.epochs": 2,
                "trainer.updates": 3, "trainer.eval_every": 0, "trainer.checkpoint_every": 0}  # fmt: skip
    config = Config.from_dict(
        defaults
        | {"trainer.output_dir": str(folder), "trainer.stop_if_invalid": 1}
        | {name.replace("__", "."): value for name, value in options.items()}
    )
    agent = agent_class.for_task(
        task, Policy.load("tiny", lora=LoRAConfig(r=8), seed=config.trainer.seed), config=config
    )
    clone(
        agent,
        play(
            task,
            RandomAgent(task) if demonstration is None else ScriptedAgent(task, demonstration),
            episodes=300,
            seed=7,
        ),
        progress=False,
    )
    if prepare:
        prepare(agent)
    run = Trainer(
        agent, callbacks=[BeforeUpdates(function) for function in before], algorithm=algorithm
    ).fit()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("findings") for line in lines] == [
        line.get("findings") for line in run.history
    ]
    items = [item for line in run.history for item in line.get("findings", {}).items()]
    assert len(dict(items)) == len(items), "reported twice"
    return dict(items)


def sharpen(trainer) -> None:
    """Lower the entropy of the policy"""
    with torch.no_grad():
        trainer.agent.policy.causal_lm.get_output_embeddings().weight.mul_(20)


def make_random(trainer) -> None:
    """Make the policy produce random tokens"""
    with torch.no_grad():
        trainer.agent.policy.causal_lm.get_output_embeddings().weight.normal_()


def forget_returns(agent) -> None:
    """Make the critic's prediction the same everywhere"""
    for parameter in agent.policy.value_head.parameters():
        torch.nn.init.zeros_(parameter)


def skew_sampler(agent) -> None:
    """Sample at another temperature than the learner assumes"""
    agent.engine.sampler.config = dataclasses.replace(agent.engine.config, temperature=1.6)


CAUSES = {
    "constant returns": dict(task=steps_task(zero_reward)),
    "zero advantages": dict(task=steps_task(zero_reward), algorithm="grpo"),
    "zero gradient": dict(task=steps_task(zero_reward), algorithm="grpo", ppo__kl_coef=0.0),
    "entropy collapsed": dict(task=steps_task(random_reward), before=[sharpen]),
    "single action": dict(task=steps_task(random_reward), demonstration=lambda obs, info: 2),
    "invalid responses": dict(
        task=steps_task(random_reward), before=[make_random], trainer__updates=5
    ),
    "KL too large": dict(
        task=steps_task(random_reward), ppo__learning_rate=3e-2, ppo__kl_coef=0.0, ppo__epochs=4
    ),
    "uninformative critic": dict(
        task=steps_task(zero_reward, env=lambda: SecretEnv(zero_reward)),
        trainer__updates=10,
        prepare=forget_returns,
        ppo__critic_learning_rate=1e-9,
    ),
    "sampler temperature": dict(task=steps_task(random_reward), prepare=skew_sampler),
    "truncated responses": dict(task=steps_task(random_reward), generate__max_new_tokens=2),
    "truncated context": dict(task=steps_task(random_reward, length=8), context__max_length=60),
}


@pytest.mark.parametrize("issue", CAUSES)
def test_doctor_finds_the_issue_that_was_caused(issue, tmp_path, capsys):
    reported = findings(tmp_path, **CAUSES[issue])
    assert issue in reported
    assert f"{issue}: {reported[issue]}" in capsys.readouterr().out.replace("\n", " ")


def test_every_check_has_a_run_that_causes_its_issue():
    in_benchmark = {issue for fault in FAULTS.values() for issue in fault.accepted}
    assert set(CAUSES) | in_benchmark == set(CHECKS)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(agent_class=ScoredAgent), dict(algorithm="reinforce"), dict(algorithm="grpo")],
    ids=str,
)
@pytest.mark.parametrize("seed", some([0, 1], [0]))
def test_doctor_finds_nothing_in_runs_that_learn(options, seed, tmp_path):
    task = steps_task(reward_for_up, reference_returns={"random": 0.5, "optimal": 2.0})
    assert (
        findings(
            tmp_path,
            task,
            trainer__seed=seed,
            trainer__updates=16,
            ppo__learning_rate=5e-4,
            **options,
        )
        == {}
    )
    returns = [
        json.loads(line)["mean_return"]
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert returns[-1] > 1.7, returns


def test_doctor_reports_an_issue_once_across_a_resume(tmp_path, capsys):
    agent = Agent.for_task(steps_task(zero_reward), Policy.load("tiny"), config=Config.from_dict({
        "generate.max_new_tokens": 2, "rollout.episodes": 4, "ppo.epochs": 1, "trainer": dict(updates=4, eval_every=0, output_dir=str(tmp_path), stop_if_invalid=1)}))  # fmt: skip
    Trainer(agent).fit(updates=3)
    assert "constant returns" in capsys.readouterr().out
    run = Trainer(agent).fit(updates=6, resume=True)
    assert len(run.history) == 6 and "constant returns" not in capsys.readouterr().out
    assert sum("constant returns" in line.get("findings", {}) for line in run.history) == 1
