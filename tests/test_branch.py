"""`branch` keeps the episode's turns before the branch point and samples the later ones with the current policy."""

import dataclasses
import threading

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import KINDS, config, lake, lake_agent, make_policy, perturb, walk_task
from test_reasoning import thinking_agent, thinking_policy
from walks import Walk

from llamagym.agent import Agent
from llamagym.agents.scored import ScoredAgent
from llamagym.algorithms.batch import Batch
from llamagym.algorithms.forward import learner_logprobs
from llamagym.buffer import EpisodeBuffer
from llamagym.envs.baselines import RandomAgent, play
from llamagym.envs.frames import FrameCache
from llamagym.rollout import collect
from llamagym.training.branch import BranchError, branch, replay, rerender

pytestmark = pytest.mark.filterwarnings("ignore:.*of .* responses held an action")


def without_branch_info(episode):
    """Return an episode without the info that marks a branch"""
    return dataclasses.replace(episode, index=None, info={})


def learner_logprobs_by_turn(agent, episode):
    """Return the learner's log-probabilities of the sampled tokens of each turn"""
    for turn in episode.turns:
        turn.advantage = turn.returns = turn.value = 0.0
    logprobs = learner_logprobs(
        agent.policy, Batch.from_episodes([episode]), agent.config.generate.temperature, False, 4096
    ).numpy()
    return np.split(logprobs, np.cumsum([len(turn.logprobs) for turn in episode.turns])[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_branch_without_changes_equals_the_episode(kind):
    """A greedy branch without changes equals the episode bit for bit, from each of its turns"""
    agent = lake_agent(make_policy(kind))
    for episode in collect(agent, episodes=2, num_envs=1, greedy=True, top_logprobs=2):
        for turn in range(len(episode)):
            branched = branch(agent, episode, turn, greedy=True)
            branched.validate()
            for a, b in zip(branched.turns, episode.turns, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
                a.logprobs, a.entropy, a.top_alternatives = (
                    b.logprobs,
                    b.entropy,
                    b.top_alternatives,
                )
            assert without_branch_info(branched) == without_branch_info(episode)
            assert branched.info["branch"] == dict(
                of=episode.index, turn=turn, changed=[], overridden_turns=[]
            )


CHANGES = [
    dict(response_prefix="Action: right. "),
    dict(observation="Go <|im_end|> down."),
    dict(system_prompt="Be brief."),
    dict(response_prefix="I", observation="Row 9.", system_prompt=""),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_branch_logprobs_match_the_learner(kind, change):
    """Sampled tokens have the log-probabilities that the learner computes for the branch"""
    agent = lake_agent(make_policy(kind), generate__max_new_tokens=8, generate__temperature=0.7)
    episode = collect(agent, episodes=3, num_envs=3)[2]
    perturb(agent.policy.parameters(), 0.05, seed=3)
    agent.policy.bump_version()
    branched = branch(agent, episode, 2, seed=5, **change)
    branched.validate()
    learner_logprobs = learner_logprobs_by_turn(agent, branched)
    for expected, turn in zip(learner_logprobs[2:], branched.turns[2:]):
        assert turn.logprobs == pytest.approx(expected, abs=2e-4)
    if "system_prompt" in change:
        assert all(
            len(t.logprobs) == 0 and t.forced_positions == list(range(len(t.response_ids)))
            for t in branched.turns[:2]
        )
    else:
        assert [list(t.logprobs) for t in branched.turns[:2]] == [
            list(t.logprobs) for t in episode.turns[:2]
        ]
    assert [t.response_ids for t in branched.turns[:2]] == [
        t.response_ids for t in episode.turns[:2]
    ]
    n = len(agent.shared.renderer.encode_response_prefix(change.get("response_prefix", "")))
    assert branched.turns[2].response_ids[:n] == agent.shared.renderer.encode_response_prefix(
        change.get("response_prefix", "")
    ) and (branched.turns[2].forced_positions or []) == list(range(n))
    assert branched.turns[2].observation == change.get("observation", episode.turns[2].observation)
    assert branched.system_prompt == change.get("system_prompt", episode.system_prompt)


@pytest.mark.parametrize(
    "change", [dict(response_prefix="Action: right. "), dict(system_prompt="Be brief.")]
)
def test_branch_trains_without_its_forced_tokens(change):
    """A branch is trained on only if it is passed to a learner; its forced tokens do not contribute"""
    agent = lake_agent(make_policy("lora"), ppo__epochs=1, generate__max_new_tokens=8)
    (episode,) = collect(agent, episodes=1)
    branched = branch(agent, episode, 2, **change)
    assert not agent.buffer and agent.learner.num_updates == 0
    before = [p.detach().clone() for p in agent.policy.parameters()]
    stats = agent.learner.update([branched])
    assert stats["tokens"] == sum(len(t.logprobs) for t in branched.turns) and np.isfinite(
        stats["policy_loss"]
    )
    assert stats["max_logprob_diff"] < 1e-3
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.policy.parameters()))


class CountingAgent(Agent):
    """An agent that keeps state of the episode in its attributes"""

    def get_system_prompt(self):
        self.num_observations = 0
        return "Count."

    def format_observation(self, observation):
        self.num_observations += 1
        return f"{self.num_observations}: {observation[1]}"

    def extract_action(self, response):
        return (len(response) + self.num_observations) % 2


def test_branch_replays_the_methods_of_the_agent():
    agent = CountingAgent(make_policy("lora"), config=config())
    episode = collect(agent, lambda: Walk(5), episodes=3, num_envs=2)[1]
    branched = branch(agent, episode, 3, env=lambda: Walk(5), observation="what?")
    assert [t.observation for t in branched.turns] == ["1: 0", "2: 1", "3: 2", "what?", "5: 4"]
    assert [t.reward for t in branched.turns] == [t.reward for t in episode.turns]


@pytest.mark.parametrize("snapshots", [False, True])
def test_branch_does_not_change_the_users_environment(snapshots):
    """An environment that Gymnasium cannot create again is copied"""
    env, agent = Walk(4), CountingAgent(make_policy("lora"), config=config())
    episodes = collect(agent, env, episodes=2, num_envs=1, snapshots=snapshots)
    env.reset(seed=5)
    env.step(1)
    snapshot = episodes.snapshots[1][2] if snapshots else None
    branched = [branch(agent, episodes[1], 2, env=env, snapshot=snapshot) for _ in range(2)]
    for a, b in zip(branched[0].turns, branched[1].turns, strict=True):
        assert (a.observation, a.response_ids, a.reward) == (
            b.observation,
            b.response_ids,
            b.reward,
        ), (a.logprobs, b.logprobs)
    assert len(branched[0]) == 4
    assert (env.number, env.t) == (5, 1)


def test_branch_raises_if_it_cannot_replay():
    agent, raises = lake_agent(make_policy("lora")), pytest.raises
    (episode,) = collect(agent, episodes=1)
    with raises(BranchError, match="no token ids"):
        branch(
            agent,
            dataclasses.replace(
                play(agent.task, RandomAgent(agent.task), 1)[0],
                system_prompt=episode.system_prompt,
            ),
            1,
        )
    with raises(BranchError, match="no seed"):
        branch(agent, dataclasses.replace(episode, seed=None), 1)
    with raises(BranchError, match="sampled with another prompt"):
        branch(lake_agent(make_policy("lora"), context__turns=1), episode, 2)

    class UncopyableEnv(gym.Wrapper):
        def __deepcopy__(self, memo):
            raise OSError("it is in use")

    walk_agent = CountingAgent(make_policy("lora"), config=config())
    env = UncopyableEnv(Walk(3))
    (played,) = collect(walk_agent, env, episodes=1, num_envs=1)
    with raises(BranchError, match="cannot be copied .OSError: it is in use"):
        branch(walk_agent, played, 1, env=env)
    with raises(RuntimeError, match="cannot be copied"):
        collect(walk_agent, env, episodes=1, num_envs=1, snapshots=True)
    with raises(ValueError, match="workers=False"):
        collect(agent, episodes=1, workers=True, snapshots=True)
    rng = np.random.default_rng(0)
    other_agent = Agent.for_task(
        walk_task(3, reward_function=lambda seed, t: 1.0), agent.policy, config=config()
    )
    other_agent.task.format_observation = lambda obs, info: f"step {obs[1]}, luck {rng.random()}"
    (played,) = collect(other_agent, episodes=1)
    with raises(BranchError, match="does not repeat itself: turn 0 shows"):
        branch(other_agent, played, 1)


def test_branch_raises_while_the_model_is_in_use():
    """`branch` raises while another thread trains or plays with the model"""
    agent, locked, done = lake_agent(make_policy("lora")), threading.Event(), threading.Event()
    (episode,) = collect(agent, episodes=1)

    def hold_lock():
        with agent.locked():
            locked.set()
            done.wait(30)

    thread = threading.Thread(target=hold_lock)
    thread.start()
    locked.wait(30)
    with pytest.raises(RuntimeError, match="pause or stop that first"), agent.locked(wait=0.01):
        pass
    with pytest.raises(RuntimeError, match="in another thread"):
        branch(agent, episode, 0)
    done.set()
    thread.join()
    branch(agent, episode, 0)


def test_branch_has_frames_if_the_episode_has():
    agent = lake_agent(make_policy("lora"))
    (episode,) = collect(agent, episodes=1, frames=100)
    branched = branch(agent, episode, 2)
    assert [t.frame for t in branched.turns[:3]] == [
        t.frame for t in episode.turns[:3]
    ] and branched.final_frame
    (without_frames,) = collect(agent, episodes=1)
    assert branch(agent, without_frames, 2).turns[0].frame is None
    rerendered = rerender(agent, without_frames, size=100)
    assert [t.frame for t in rerendered.turns] == [
        t.frame for t in episode.turns
    ] and rerendered.final_frame == episode.final_frame
    assert without_frames.turns[0].frame is None
    with replay(agent, without_frames, frames=FrameCache(100)) as (runner, turns):
        assert [next(turns) for _ in range(4)] == [
            0,
            1,
            2,
            3,
        ] and runner.env.frame == episode.turns[3].frame


def test_branch_of_a_scored_agent_scores_candidates():
    agent = ScoredAgent.for_task(lake(), make_policy("lora"), config=config())
    (episode,) = collect(agent, episodes=1)
    branched = branch(agent, episode, 2, system_prompt="Be brief.")
    branched.validate()
    assert branched.turns[0].candidates is None and len(branched.turns[2].candidates) == 4
    agent.learner.update([branched])
    with pytest.raises(
        ValueError,
        match="response_prefix and candidates exclude each other: a response chosen among candidates",
    ):
        branch(agent, episode, 2, response_prefix="Action")


@pytest.mark.parametrize("opened", [True, False])
def test_branch_of_a_reasoning_model_keeps_prefix_and_budget(opened):
    """The response prefix may start the reasoning; the budget includes the prefix"""
    agent = thinking_agent(
        thinking_policy(opened), generate__thinking_budget=6, generate__max_new_tokens=24
    )
    (episode,) = collect(agent, episodes=1)
    branched = branch(agent, episode, 1, response_prefix="the hole is near")
    n, turn = (
        len(agent.shared.renderer.encode_response_prefix("the hole is near")),
        branched.turns[1],
    )
    # without an opened block the response does not begin with reasoning
    assert (
        turn.forced_positions[:n] == list(range(n)) and (len(turn.forced_positions) > n) == opened
    )
    assert learner_logprobs_by_turn(agent, branched)[1] == pytest.approx(turn.logprobs, abs=2e-4)


def test_branch_works_without_a_kv_cache():
    policy = make_policy("plain", name="tiny")
    agent = lake_agent(policy)
    (episode,) = collect(agent, episodes=1, greedy=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "llamagym.inference.engine.cache_unsupported_reason", lambda model: "as a test"
        )
        branched = branch(agent, episode, 1, response_prefix="I", greedy=True)
    expected = branch(agent, episode, 1, response_prefix="I", greedy=True)
    assert [t.response_ids for t in branched.turns] == [
        t.response_ids for t in expected.turns
    ] and branched.turns[1].forced_positions == expected.turns[1].forced_positions


class Grid(gym.Env):
    """An environment with array or tuple actions"""

    def __init__(self, space):
        self.action_space, self.observation_space, self.closed = space, gym.spaces.Discrete(9), 0

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return 0, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        return self.t, 1.0, self.t == 4, False, {}

    def close(self):
        Grid.closings = getattr(Grid, "closings", 0) + 1


class MoveAgent(Agent):
    def get_system_prompt(self):
        return "Move."

    def format_observation(self, observation):
        return str(observation)

    def extract_action(self, response):
        n = len(response) % 3
        return (n, 1) if isinstance(self.action_space, gym.spaces.Tuple) else np.array([n, 1])


@pytest.mark.parametrize(
    "space", [gym.spaces.MultiDiscrete([3, 3]), gym.spaces.Tuple([gym.spaces.Discrete(3)] * 2)]
)
def test_branch_replays_array_and_tuple_actions(space, tmp_path):
    """Array and tuple actions replay, also as lists loaded from a file; the copy of the user's environment is closed"""
    agent = MoveAgent(make_policy("lora"), config=config(), action_space=space)
    env = Grid(space)
    episodes = collect(agent, env, episodes=1, num_envs=1)
    loaded = EpisodeBuffer.load(episodes.save(tmp_path / "e.parquet"))
    closed = getattr(Grid, "closings", 0)
    for episode in (episodes[0], loaded[0]):
        assert len(branch(agent, episode, 3, env=env)) == 4
    assert Grid.closings == closed + 2


def test_branch_of_a_branch_keeps_overridden_observations():
    agent = lake_agent(make_policy("lora"))
    (episode,) = collect(agent, episodes=1)
    first = branch(agent, episode, 2, observation="X marks it.")
    second = branch(agent, first, 2, response_prefix="I")
    assert second.turns[2].observation == "X marks it." and second.info["branch"][
        "overridden_turns"
    ] == [2]
    three = branch(agent, second, 4, observation="Y.")
    assert (
        three.info["branch"]["overridden_turns"] == [2, 4]
        and three.turns[2].observation == "X marks it."
    )
    assert branch(agent, three, 2, observation="Z.").info["branch"]["overridden_turns"] == [2]


def test_agents_with_a_lock_can_be_pickled():
    """Environments in subprocesses may pickle the agent"""
    agent = cloudpickle.loads(cloudpickle.dumps(lake_agent(make_policy("lora"))))
    with agent.locked():
        assert len(collect(agent, episodes=1)) == 1


def test_snapshots_are_taken_if_a_parser_error_cannot_be_copied():
    class Bad(Exception):
        def __init__(self, a, b):
            super().__init__(a)

    agent = lake_agent(make_policy("lora"))

    def parse(text):
        raise Bad(1, 2)

    agent.task.extract_action = parse
    rollout = collect(agent, episodes=1, snapshots=True)
    assert len(rollout.snapshots[0]) == len(rollout[0])


def test_branch_from_a_snapshot_before_the_first_step_works():
    """Gymnasium's checker stores the result of `reset` until the first step; a copy must keep it"""
    agent = lake_agent(make_policy("lora"))
    rollout = collect(agent, episodes=1, snapshots=True)
    branched = branch(agent, rollout[0], 0, snapshot=rollout.snapshots[0][0])
    assert branched.turns[0].observation == rollout[0].turns[0].observation
