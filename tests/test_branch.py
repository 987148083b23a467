"""Another way on from a turn: what was before it is what it was, what comes after it is what this policy says."""

import dataclasses
import threading

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import KINDS, config, lake, lake_agent, make_policy, shake, walk_task
from test_thought import thinking_agent, thinking_policy
from walks import Walk

from llamagym.agent import Agent
from llamagym.batch import Batch
from llamagym.branch import CannotBranch, begin_ids, branch, draw_again, replay
from llamagym.buffer import EpisodeBuffer
from llamagym.frames import Frames
from llamagym.passes import learner_logprobs
from llamagym.rollout import collect
from llamagym.scored import ScoredAgent
from llamagym.task import RandomAgent, play

pytestmark = pytest.mark.filterwarnings("ignore:.*of .* responses held an action")


def plain(episode):
    """An episode without what a branch says of itself"""
    return dataclasses.replace(episode, index=None, info={})


def scored(agent, episode):
    """The learner's log-probabilities of what was sampled, by turn"""
    for turn in episode.turns:
        turn.advantage = turn.returns = turn.value = 0.0
    logprobs = learner_logprobs(agent.policy, Batch.from_episodes([episode]), agent.config.generate.temperature, False, 4096).numpy()
    return np.split(logprobs, np.cumsum([len(turn.logprobs) for turn in episode.turns])[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_branch_that_changes_nothing_is_the_episode(kind):
    """Greedily, from each of its turns on, to the last number"""
    agent = lake_agent(make_policy(kind))
    for episode in collect(agent, episodes=2, num_envs=1, greedy=True, top=2):
        for turn in range(len(episode)):
            made = branch(agent, episode, turn, greedy=True)
            made.validate()
            for a, b in zip(made.turns, episode.turns, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
                a.logprobs, a.entropy, a.top_alternatives = b.logprobs, b.entropy, b.top_alternatives
            assert plain(made) == plain(episode)
            assert made.info["branch"] == dict(of=episode.index, turn=turn, changed=[], told=[])


CHANGES = [dict(begin="Action: right. "), dict(observation="Go <|im_end|> down."), dict(system_prompt="Be brief."),
           dict(begin="I", observation="Row 9.", system_prompt="")]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_branch_numbers_are_the_policys(kind, change):
    """All that counts as sampled has the probability that the learner gives it, in the rows of the branch"""
    agent = lake_agent(make_policy(kind), generate__max_new_tokens=8, generate__temperature=0.7)
    episode = collect(agent, episodes=3, num_envs=3)[2]
    shake(agent.policy.parameters(), 0.05, seed=3)
    agent.policy.touch()
    made = branch(agent, episode, 2, seed=5, **change)
    made.validate()
    again = scored(agent, made)
    for old, turn in zip(again[2:], made.turns[2:]):
        assert turn.logprobs == pytest.approx(old, abs=2e-4)
    if "system_prompt" in change:
        assert all(len(t.logprobs) == 0 and t.given == list(range(len(t.response_ids))) for t in made.turns[:2])
    else:
        assert [list(t.logprobs) for t in made.turns[:2]] == [list(t.logprobs) for t in episode.turns[:2]]
    assert [t.response_ids for t in made.turns[:2]] == [t.response_ids for t in episode.turns[:2]]
    n = len(begin_ids(agent, change.get("begin", "")))
    assert made.turns[2].response_ids[:n] == begin_ids(agent, change.get("begin", "")) and (made.turns[2].given or []) == list(range(n))
    assert made.turns[2].observation == change.get("observation", episode.turns[2].observation)
    assert made.system_prompt == change.get("system_prompt", episode.system_prompt)


@pytest.mark.parametrize("change", [dict(begin="Action: right. "), dict(system_prompt="Be brief.")])
def test_branch_can_be_learned_from(change):
    """It is not, unless it is given to a learner; what was put there then has no share in it"""
    agent = lake_agent(make_policy("lora"), ppo__epochs=1, generate__max_new_tokens=8)
    episode, = collect(agent, episodes=1)
    made = branch(agent, episode, 2, **change)
    assert not agent.buffer and agent.learner.updates == 0
    before = [p.detach().clone() for p in agent.policy.parameters()]
    stats = agent.learner.learn([made])
    assert stats["tokens"] == sum(len(t.logprobs) for t in made.turns) and np.isfinite(stats["policy_loss"])
    assert stats["logprob_gap"] < 1e-3
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.policy.parameters()))


class Counts(Agent):
    """Keeps something of an episode on itself"""

    def get_system_prompt(self):
        self.seen = 0
        return "Count."

    def format_observation(self, observation):
        self.seen += 1
        return f"{self.seen}: {observation[1]}"

    def extract_action(self, response):
        return (len(response) + self.seen) % 2


def test_branch_goes_through_the_methods_of_the_agent_again():
    agent = Counts(make_policy("lora"), config=config())
    episode = collect(agent, lambda: Walk(5), episodes=3, num_envs=2)[1]
    made = branch(agent, episode, 3, env=lambda: Walk(5), observation="what?")
    assert [t.observation for t in made.turns] == ["1: 0", "2: 1", "3: 2", "what?", "5: 4"]
    assert [t.reward for t in made.turns] == [t.reward for t in episode.turns]


@pytest.mark.parametrize("snapshots", [False, True])
def test_branch_leaves_the_users_own_environment_alone(snapshots):
    """One that Gymnasium can't make again is copied"""
    env, agent = Walk(4), Counts(make_policy("lora"), config=config())
    episodes = collect(agent, env, episodes=2, num_envs=1, snapshots=snapshots)
    env.reset(seed=5)
    env.step(1)
    kept = episodes.snapshots[1][2] if snapshots else None
    made = [branch(agent, episodes[1], 2, env=env, snapshot=kept) for _ in range(2)]
    for a, b in zip(made[0].turns, made[1].turns, strict=True):
        assert (a.observation, a.response_ids, a.reward) == (b.observation, b.response_ids, b.reward), (a.logprobs, b.logprobs)
    assert len(made[0]) == 4
    assert (env.number, env.t) == (5, 1)


def test_branch_of_what_cannot_be_brought_back():
    agent, refuses = lake_agent(make_policy("lora")), pytest.raises
    episode, = collect(agent, episodes=1)
    with refuses(CannotBranch, match="no token ids"):
        branch(agent, dataclasses.replace(play(agent.words, RandomAgent(agent.words), 1)[0], system_prompt=episode.system_prompt), 1)
    with refuses(CannotBranch, match="no seed"):
        branch(agent, dataclasses.replace(episode, seed=None), 1)
    with refuses(CannotBranch, match="sampled with another prompt"):
        branch(lake_agent(make_policy("lora"), context__context=1), episode, 2)

    class Stuck(gym.Wrapper):
        def __deepcopy__(self, memo):
            raise OSError("it is in use")

    walks = Counts(make_policy("lora"), config=config())
    env = Stuck(Walk(3))
    played, = collect(walks, env, episodes=1, num_envs=1)
    with refuses(CannotBranch, match="cannot be copied .OSError: it is in use"):
        branch(walks, played, 1, env=env)
    with refuses(RuntimeError, match="cannot be copied"):
        collect(walks, env, episodes=1, num_envs=1, snapshots=True)
    with refuses(ValueError, match="workers=False"):
        collect(agent, episodes=1, workers=True, snapshots=True)
    luck = np.random.default_rng(0)
    moody = Agent.for_task(walk_task(3, pays=lambda seed, t: 1.0), agent.policy, config=config())
    moody.words.describe = lambda obs, info: f"step {obs[1]}, luck {luck.random()}"
    played, = collect(moody, episodes=1)
    with refuses(CannotBranch, match="does not repeat itself: it shows .* at turn 0"):
        branch(moody, played, 1)


def test_branch_waits_for_nobody():
    """While a run is under way in another thread, its model is not touched"""
    agent, held, done = lake_agent(make_policy("lora")), threading.Event(), threading.Event()
    episode, = collect(agent, episodes=1)

    def run():
        with agent.exclusive():
            held.set()
            done.wait(30)

    thread = threading.Thread(target=run)
    thread.start()
    held.wait(30)
    with pytest.raises(RuntimeError, match="pause or stop that first"), agent.exclusive(wait=0.01):
        pass
    with pytest.raises(RuntimeError, match="in another thread"):
        branch(agent, episode, 0)
    done.set()
    thread.join()
    branch(agent, episode, 0)


def test_branch_has_pictures_where_the_episode_has():
    agent = lake_agent(make_policy("lora"))
    episode, = collect(agent, episodes=1, frames=100)
    made = branch(agent, episode, 2)
    assert [t.frame for t in made.turns[:3]] == [t.frame for t in episode.turns[:3]] and made.final_frame
    bare, = collect(agent, episodes=1)
    assert branch(agent, bare, 2).turns[0].frame is None
    drawn = draw_again(agent, bare, size=100)
    assert [t.frame for t in drawn.turns] == [t.frame for t in episode.turns] and drawn.final_frame == episode.final_frame
    assert bare.turns[0].frame is None
    with replay(agent, bare, frames=Frames(100)) as (slot, turns):
        assert [next(turns) for _ in range(4)] == [0, 1, 2, 3] and slot.env.frame == episode.turns[3].frame


def test_branch_where_actions_are_chosen():
    agent = ScoredAgent.for_task(lake(), make_policy("lora"), config=config())
    episode, = collect(agent, episodes=1)
    made = branch(agent, episode, 2, system_prompt="Be brief.")
    made.validate()
    assert made.turns[0].candidates is None and len(made.turns[2].candidates) == 4
    agent.learner.learn([made])
    with pytest.raises(ValueError, match="chosen among candidates cannot have a beginning"):
        branch(agent, episode, 2, begin="Action")


@pytest.mark.parametrize("opened", [True, False])
def test_branch_of_a_model_that_thinks(opened):
    """A beginning stands in front of a thought, or in it; its budget counts from the response's start"""
    agent = thinking_agent(thinking_policy(opened), generate__thinking_budget=6, generate__max_new_tokens=24)
    episode, = collect(agent, episodes=1)
    made = branch(agent, episode, 1, begin="the hole is near")
    n, turn = len(begin_ids(agent, "the hole is near")), made.turns[1]
    assert turn.given[:n] == list(range(n)) and (len(turn.given) > n) == opened     # it did not begin with a thought where none was opened
    assert scored(agent, made)[1] == pytest.approx(turn.logprobs, abs=2e-4)


def test_branch_of_a_model_that_keeps_nothing():
    policy = make_policy("plain", name="tiny")
    agent = lake_agent(policy)
    episode, = collect(agent, episodes=1, greedy=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llamagym.engine.why_not_kept", lambda model: "as a test")
        made = branch(agent, episode, 1, begin="I", greedy=True)
    same = branch(agent, episode, 1, begin="I", greedy=True)
    assert [t.response_ids for t in made.turns] == [t.response_ids for t in same.turns] and made.turns[1].given == same.turns[1].given


class Grid(gym.Env):
    """Takes arrays, or tuples"""

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


class Moves(Agent):
    def get_system_prompt(self):
        return "Move."

    def format_observation(self, observation):
        return str(observation)

    def extract_action(self, response):
        n = len(response) % 3
        return (n, 1) if isinstance(self.action_space, gym.spaces.Tuple) else np.array([n, 1])


@pytest.mark.parametrize("space", [gym.spaces.MultiDiscrete([3, 3]), gym.spaces.Tuple([gym.spaces.Discrete(3)] * 2)])
def test_branch_of_actions_of_any_kind(space, tmp_path):
    """Arrays and tuples, also after a file has made lists of them; the copy of a user's own environment is closed"""
    agent = Moves(make_policy("lora"), config=config(), action_space=space)
    env = Grid(space)
    episodes = collect(agent, env, episodes=1, num_envs=1)
    loaded = EpisodeBuffer.load(episodes.save(tmp_path / "e.parquet"))
    closed = getattr(Grid, "closings", 0)
    for episode in (episodes[0], loaded[0]):
        assert len(branch(agent, episode, 3, env=env)) == 4
    assert Grid.closings == closed + 2


def test_branch_of_a_branch_is_told_the_same():
    agent = lake_agent(make_policy("lora"))
    episode, = collect(agent, episodes=1)
    one = branch(agent, episode, 2, observation="X marks it.")
    two = branch(agent, one, 2, begin="I")
    assert two.turns[2].observation == "X marks it." and two.info["branch"]["told"] == [2]
    three = branch(agent, two, 4, observation="Y.")
    assert three.info["branch"]["told"] == [2, 4] and three.turns[2].observation == "X marks it."
    assert branch(agent, three, 2, observation="Z.").info["branch"]["told"] == [2]


def test_agents_can_be_pickled_with_their_lock():
    """As environments in processes of their own may need it"""
    agent = cloudpickle.loads(cloudpickle.dumps(lake_agent(make_policy("lora"))))
    with agent.exclusive():
        assert len(collect(agent, episodes=1)) == 1


def test_snapshots_where_a_parser_raises_what_cannot_be_copied():
    class Bad(Exception):
        def __init__(self, a, b):
            super().__init__(a)

    agent = lake_agent(make_policy("lora"))

    def parse(text):
        raise Bad(1, 2)

    agent.words.parse = parse
    rollout = collect(agent, episodes=1, snapshots=True)
    assert len(rollout.snapshots[0]) == len(rollout[0])
