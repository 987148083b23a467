"""Environments in subprocesses play the same episodes, fail separately and do not delay each other."""

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
from llamagym.envs.worker import SubprocessEnv, serve, wait_for_any
from llamagym.rollout import RolloutError, collect

# Worker processes do not import this module, so its definitions are pickled by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [
    pytest.mark.filterwarnings("ignore:none of .* responses held an action"),
    pytest.mark.skipif(os.name == "nt", reason="POSIX only"),
]


@pytest.fixture(scope="module")
def policy():
    return make_policy("plain")


def agent_of(policy, task=None, **options) -> Agent:
    return Agent.for_task(task or walk_task(), policy, config=config(**options))


def episode_contents(rollout) -> list:
    return [
        (
            e.index,
            e.seed,
            [(t.observation, t.response_ids, t.action, t.reward, t.terminated) for t in e.turns],
        )
        for e in rollout
    ]


def test_workers_give_the_same_episodes(policy):
    expected = episode_contents(collect(agent_of(policy), episodes=7, num_envs=3, seed=2))
    assert (
        episode_contents(collect(agent_of(policy), episodes=7, num_envs=3, seed=2, workers=True))
        == expected
    )
    assert (
        episode_contents(
            collect(agent_of(policy, rollout__workers=True), episodes=7, num_envs=2, seed=2)
        )
        == expected
    )


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_environments_are_stepped_one_by_one(policy, mode):
    agent = Agent.for_task(walk_task(), policy, config=config())
    vector_class = gym.vector.SyncVectorEnv if mode == "sync" else gym.vector.AsyncVectorEnv
    envs = vector_class([Walk] * 2)
    try:
        assert episode_contents(collect(agent, envs, episodes=5)) == episode_contents(
            collect(agent, episodes=5, num_envs=4)
        )
    finally:
        envs.close()


def trouble_at_step_1(number: int, failure: str):
    def trouble(where, walk, t):
        if walk == number and where == "step" and t == 1:
            if failure == "raises":
                raise OSError("the bridge is out")
            os._exit(3)

    return trouble


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("raises", "OSError: the bridge is out"),
        ("dies", "RuntimeError: the process of .* ended with exit status 3"),
    ],
)
def test_worker_failure_fails_only_its_episode(policy, failure, message):
    task = walk_task(trouble=trouble_at_step_1(4, failure))
    with pytest.warns(
        UserWarning,
        match=f"episode 2 .* failed after 2 turns: {message}.* The other 7 episodes are kept",
    ):
        episodes = collect(agent_of(policy, task), episodes=8, num_envs=3, seed=2, workers=True)
    assert [e.index for e in episodes] == [0, 1, 3, 4, 5, 6, 7]
    expected = [
        e
        for e in episode_contents(collect(agent_of(policy), episodes=8, num_envs=3, seed=2))
        if e[0] != 2
    ]
    assert episode_contents(episodes) == expected


def test_collect_raises_if_all_workers_fail(policy):
    def failing_factory():
        raise OSError("no such environment")

    with pytest.raises(RolloutError, match="all 3 episodes failed(.|\n)*no such environment"):
        collect(agent_of(policy), failing_factory, episodes=3, num_envs=2, workers=True)


class WaitingWalk(Walk):
    """A walk whose number 0 waits in its first step until number 1 has ended, or 30 seconds"""

    def __init__(self, flag: str):
        super().__init__(3)
        self.flag = flag

    def step(self, action):
        if self.number == 0 and self.t == 0:
            deadline = time.monotonic() + 30
            while not os.path.exists(self.flag):
                assert time.monotonic() < deadline, "no other walk went on"
                time.sleep(0.01)
        if self.number == 1 and self.t == 2:
            open(self.flag, "w").close()
        return super().step(action)


def test_slow_environment_does_not_delay_others(policy, tmp_path):
    flag = str(tmp_path / "over")
    episodes = collect(
        agent_of(policy), lambda: WaitingWalk(flag), episodes=3, num_envs=2, workers=True
    )
    assert [len(e) for e in episodes] == [3, 3, 3] and not episodes.failures


def test_subprocess_env_behaves_like_a_local_environment():
    remote, local = (
        SubprocessEnv("FrozenLake-v1", max_steps=3),
        gym.make("FrozenLake-v1", max_episode_steps=3),
    )
    assert (
        remote.action_space == local.action_space
        and remote.observation_space == local.observation_space
    )
    for env in (remote, local):
        env.reset(seed=4)
    assert [remote.step(1)[:4] for _ in range(3)] == [local.step(1)[:4] for _ in range(3)]
    with pytest.raises(ValueError, match="options are not passed on"):
        remote.reset(options={"a": 1})
    remote.send("step", 1)
    with pytest.raises(
        RuntimeError, match="step was sent before the result of the last call was received"
    ):
        remote.send("step", 1)
    wait_for_any([remote])
    assert remote.ready()
    remote.receive()
    remote.close()
    assert remote.process.poll() is not None


def test_subprocess_env_raises_with_the_remote_traceback():
    env = SubprocessEnv(lambda: Walk(trouble=trouble_at_step_1(1, "raises")))
    env.reset(seed=1)
    env.step(0)
    with pytest.raises(OSError, match="the bridge is out") as caught:
        env.step(0)
    assert "in trouble" in caught.value.__notes__[0]
    env.close()


class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def test_subprocess_env_reports_exceptions_that_cannot_be_unpickled():
    def trouble(where, walk, t):
        if where == "step":
            raise Unpicklable("this", "that")

    env = SubprocessEnv(lambda: Walk(trouble=trouble))
    env.reset(seed=1)
    with pytest.raises(RuntimeError, match="this and that"):
        env.step(0)
    env.close()


def test_subprocess_env_rejects_instances_that_cannot_be_created_again():
    with pytest.raises(
        ValueError, match="Walk is one instance that Gymnasium cannot make again; pass a factory"
    ):
        SubprocessEnv(Walk())


def test_serve_ends_when_the_connection_closes():
    parent, child = socket.socketpair()
    thread = threading.Thread(target=serve, args=(child.detach(),), daemon=True)
    thread.start()
    connection = Connection(parent.detach())
    request = lambda *command: (
        connection.send_bytes(cloudpickle.dumps(command))
        or cloudpickle.loads(connection.recv_bytes())
    )
    succeeded, (actions, _, name) = request("make", Walk)
    assert succeeded and actions == Walk.action_space and name == "Walk"
    succeeded, (observation, _) = request("reset", 5)
    assert succeeded and np.array_equal(observation, [5, 0])
    connection.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_workers_are_a_rollout_option():
    assert Config.from_dict({"rollout.workers": True}).rollout.workers
