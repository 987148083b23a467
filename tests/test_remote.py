"""Environments in processes of their own: the same episodes, alone in their failures, and nobody waits for a slow one."""

import os
import socket
import sys
import threading
import time
from multiprocessing.connection import Connection

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from doubles import config, make_policy, walk_task
from walks import Walk

from llamagym.agent import Agent
from llamagym.config import Config
from llamagym.remote import RemoteEnv, serve, wait_for_any
from llamagym.rollout import RolloutError, collect

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # what is defined here goes to processes that need not import it
pytestmark = [pytest.mark.filterwarnings("ignore:none of .* responses held an action"), pytest.mark.skipif(os.name == "nt", reason="POSIX only")]


@pytest.fixture(scope="module")
def policy():
    return make_policy("plain")


def agent_of(policy, task=None, **options) -> Agent:
    return Agent.for_task(task or walk_task(), policy, config=config(**options))


def content(rollout) -> list:
    return [(e.index, e.seed, [(t.observation, t.response_ids, t.action, t.reward, t.terminated) for t in e.turns]) for e in rollout]


def test_workers_change_nothing(policy):
    here = content(collect(agent_of(policy), episodes=7, num_envs=3, seed=2))
    assert content(collect(agent_of(policy), episodes=7, num_envs=3, seed=2, workers=True)) == here
    assert content(collect(agent_of(policy, rollout__workers=True), episodes=7, num_envs=2, seed=2)) == here


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_environments_are_played_one_by_one(policy, mode):
    agent = Agent.for_task(walk_task(), policy, config=config())
    kind = gym.vector.SyncVectorEnv if mode == "sync" else gym.vector.AsyncVectorEnv
    envs = kind([Walk] * 2)
    try:
        assert content(collect(agent, envs, episodes=5)) == content(collect(agent, episodes=5, num_envs=4))
    finally:
        envs.close()


def trouble_of(number: int, what: str):
    def trouble(where, walk, t):
        if walk == number and where == "step" and t == 1:
            if what == "raises":
                raise OSError("the bridge is out")
            os._exit(3)

    return trouble


@pytest.mark.parametrize(("what", "message"), [("raises", "OSError: the bridge is out"), ("dies", "RuntimeError: the process of .* ended with exit status 3")])
def test_a_worker_that_fails_costs_its_own_episode(policy, what, message):
    task = walk_task(trouble=trouble_of(4, what))
    with pytest.warns(UserWarning, match=f"episode 2 .* failed after 2 turns: {message}.* The other 7 episodes are kept"):
        played = collect(agent_of(policy, task), episodes=8, num_envs=3, seed=2, workers=True)
    assert [e.index for e in played] == [0, 1, 3, 4, 5, 6, 7]
    healthy = [e for e in content(collect(agent_of(policy), episodes=8, num_envs=3, seed=2)) if e[0] != 2]
    assert content(played) == healthy


def test_all_workers_that_fail(policy):
    def no_env():
        raise OSError("no such environment")

    with pytest.raises(RolloutError, match="all 3 episodes failed(.|\n)*no such environment"):
        collect(agent_of(policy), no_env, episodes=3, num_envs=2, workers=True)


class Waits(Walk):
    """Its first walk answers only when another one is over; it gives up after a while"""

    def __init__(self, flag: str):
        super().__init__(3)
        self.flag = flag

    def step(self, action):
        if self.number == 0 and self.t == 0:
            until = time.monotonic() + 30
            while not os.path.exists(self.flag):
                assert time.monotonic() < until, "nobody else went on"
                time.sleep(0.01)
        if self.number == 1 and self.t == 2:
            open(self.flag, "w").close()
        return super().step(action)


def test_a_slow_environment_keeps_nobody_waiting(policy, tmp_path):
    flag = str(tmp_path / "over")
    played = collect(agent_of(policy), lambda: Waits(flag), episodes=3, num_envs=2, workers=True)
    assert [len(e) for e in played] == [3, 3, 3] and not played.failures


def test_remote_is_an_ordinary_environment():
    there, here = RemoteEnv("FrozenLake-v1", max_steps=3), gym.make("FrozenLake-v1", max_episode_steps=3)
    assert there.action_space == here.action_space and there.observation_space == here.observation_space
    for env in (there, here):
        env.reset(seed=4)
    assert [there.step(1)[:4] for _ in range(3)] == [here.step(1)[:4] for _ in range(3)]
    with pytest.raises(ValueError, match="options are not passed on"):
        there.reset(options={"a": 1})
    there.send("step", 1)
    with pytest.raises(RuntimeError, match="step was sent before the answer to the last call was received"):
        there.send("step", 1)
    wait_for_any([there])
    assert there.ready()
    there.receive()
    there.close()
    assert there._process.poll() is not None


def test_remote_brings_the_traceback_along():
    env = RemoteEnv(lambda: Walk(trouble=trouble_of(1, "raises")))
    env.reset(seed=1)
    env.step(0)
    with pytest.raises(OSError, match="the bridge is out") as caught:
        env.step(0)
    assert "in trouble" in caught.value.__notes__[0]
    env.close()


class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def test_remote_errors_that_pickle_cannot_make_again():
    def trouble(where, walk, t):
        if where == "step":
            raise Unpicklable("this", "that")

    env = RemoteEnv(lambda: Walk(trouble=trouble))
    env.reset(seed=1)
    with pytest.raises(RuntimeError, match="this and that"):
        env.step(0)
    env.close()


def test_remote_instances_that_cannot_be_made_again():
    with pytest.raises(ValueError, match="Walk is one instance that Gymnasium cannot make again; pass a factory"):
        RemoteEnv(Walk())


def test_serving_ends_when_nobody_asks():
    mine, theirs = socket.socketpair()
    thread = threading.Thread(target=serve, args=(theirs.detach(),), daemon=True)
    thread.start()
    connection = Connection(mine.detach())
    ask = lambda *command: connection.send_bytes(cloudpickle.dumps(command)) or cloudpickle.loads(connection.recv_bytes())
    fine, (actions, _, name) = ask("make", Walk)
    assert fine and actions == Walk.action_space and name == "Walk"
    fine, (observation, _) = ask("reset", 5)
    assert fine and np.array_equal(observation, [5, 0])
    connection.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_workers_of_the_configuration():
    assert Config.from_dict({"rollout.workers": True}).rollout.workers
