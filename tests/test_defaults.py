"""What a new user gets without setting anything: a critic that learns, and a solved task that stays solved"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from unseen_tasks import lock_task  # noqa: E402

from llamagym import Agent, Policy, Trainer, clone, collect, evaluate  # noqa: E402
from llamagym.config import TrainerConfig  # noqa: E402


def default_run(task, updates, folder, seed=0):
    "Do what the README's first example does, and return the agent, its warm start and its run"
    agent = Agent.for_task(task, Policy.load("tiny", seed=seed))
    agent.config.trainer.seed = seed
    warm_start = clone(agent, progress=False)
    config = TrainerConfig(
        updates, eval_every=0, checkpoint_every=0, output_dir=str(folder), seed=seed
    )
    return agent, warm_start, Trainer(agent, config=config).fit()


@pytest.fixture(scope="module")
def lock_run(tmp_path_factory):
    torch.set_num_threads(1)
    return default_run(lock_task(3), 20, tmp_path_factory.mktemp("lock"))


def test_critic_default_explains_returns_within_20_updates(lock_run):
    "The dials that are set already tell much of the return: the default critic finds out how much"
    explained = [metrics["explained_variance"] for metrics in lock_run[2].history]
    assert abs(explained[0]) < 0.3 <= np.mean(explained[-5:])


def test_critic_default_predicts_the_return_of_a_state(lock_run):
    "The value of a turn follows from the number of dials that are still closed"
    agent, _, run = lock_run
    episodes = collect(agent, episodes=64, num_envs=64, seed=10**6)
    agent.learner.compute_values_and_ref_logprobs(episodes)
    values = np.array([[turn.value for turn in episode.turns] for episode in episodes])
    returns = np.array([np.cumsum(e.rewards[::-1])[::-1] for e in episodes])
    assert np.corrcoef(values.ravel(), returns.ravel())[0, 1] > 0.8


def test_defaults_learn_a_lock_that_nobody_prepared(lock_run):
    "From random play to nearly the optimum in 1,280 episodes, and hardly an invalid response"
    agent, warm_start, run = lock_run
    assert warm_start.valid.share > 0.9
    returns = [metrics["mean_return"] for metrics in run.history]
    assert returns[0] < 0.35 and returns[-1] > 0.6
    assert evaluate(agent, episodes=8, greedy=True).greedy.mean_return > 0.6
    assert run.history[-1]["invalid_rate"] < 0.05
