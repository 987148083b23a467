"Shared fixtures: policies after behavior cloning, and copies of them"

import contextlib
import copy
import io
import os

import pytest
import torch
from doubles import config, lake, make_policy

from llamagym.agent import Agent
from llamagym.config import WarmstartConfig
from llamagym.envs.baselines import RandomAgent, play
from llamagym.training.cloning import clone

# A second thread hardly helps tiny models, and slows down tests that run in parallel. The
# environment variable is for child processes.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def _cloned_policies(request):
    made = {}

    def of(kind):
        if kind not in made:
            policy = make_policy(kind, perturbed=False)
            task = lake(max_steps=8)
            with contextlib.redirect_stdout(io.StringIO()):
                clone(
                    Agent.for_task(task, policy, config=config()),
                    play(task, RandomAgent(task), 48),
                    WarmstartConfig(epochs=4, batch_size=8, learning_rate=3e-3),
                    progress=False,
                )
            made[kind] = policy
        return made[kind]

    return of


@pytest.fixture
def cloned_policy(_cloned_policies):
    "Return `cloned_policy(kind)`: a copy of a policy cloned on FrozenLake's response format"

    def of(kind):
        policy = _cloned_policies(kind)
        return copy.deepcopy(policy, {id(policy.tokenizer): policy.tokenizer})

    return of
