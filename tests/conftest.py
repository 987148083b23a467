"""What all tests share: quiet, policies that were taught a form of dialogue, and copies of them."""

import contextlib
import copy
import io
import os

import pytest
import torch
from doubles import config, lake, make_policy

from llamagym.agent import Agent
from llamagym.config import WarmstartConfig
from llamagym.task import RandomAgent, play
from llamagym.warmstart import clone

# Tiny models gain next to nothing from a second thread, and lose much where the cores are shared. The variable is for programs that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def _taught(request):
    made = {}

    def of(kind):
        if kind not in made:
            policy = make_policy(kind, shaken=False)
            task = lake(max_steps=8)
            with contextlib.redirect_stdout(io.StringIO()):
                clone(Agent.for_task(task, policy, config=config()), play(task, RandomAgent(task), 48),
                      WarmstartConfig(epochs=4, batch_size=8, learning_rate=3e-3), progress=False)
            made[kind] = policy
        return made[kind]

    return of


@pytest.fixture
def taught(_taught):
    """`taught(kind)`: a policy of its own that speaks FrozenLake's form, its reference frozen after the warm start"""

    def of(kind):
        policy = _taught(kind)
        return copy.deepcopy(policy, {id(policy.tokenizer): policy.tokenizer})

    return of
