"""Environments as they really are: each is played by hand, and `collect` and the user's loop must agree."""

import copy
import functools
import random
import warnings
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import config, make_policy
from gymnasium import spaces
from worlds import (
    OBSERVATIONS,
    Bare,
    Converts,
    HalfOldWorld,
    OldWorld,
    OldWorldWithSeed,
    PassesOn,
    Returns,
    SeededBy,
    Unclosable,
    World,
    draw_31_bits,
    draw_int32,
    draw_text,
)

from llamagym.agent import Agent
from llamagym.envs.adapters import LegacyGymEnv, episode_seed, make_env
from llamagym.envs.baselines import RandomAgent, play
from llamagym.envs.check import check_env
from llamagym.envs.registry import for_env
from llamagym.envs.results import copy_containers, reset_env, split_reset
from llamagym.envs.task import Task
from llamagym.envs.text_env import TextEnv
from llamagym.envs.worker import SubprocessEnv
from llamagym.rollout import RolloutError, collect, evaluate
from llamagym.training.branch import branch, replay
from llamagym.training.cloning import as_transcripts, encode
from llamagym.widgets.player import EpisodePlayer


@pytest.fixture(scope="module")
def policy():
    return make_policy("plain")


class Plays(Agent):
    "An agent whose every response means the same action"

    action = 1

    def get_system_prompt(self):
        return "Go."

    def format_observation(self, observation):
        return f"{observation!r}"

    def extract_action(self, response):
        return self.action


def agent_of(policy, action=1, cls=Plays, **options):
    agent = cls(policy, config=config(**{"generate__max_new_tokens": 1} | options))
    agent.action = action
    return agent


for name, entry in [("OldWorld-v0", OldWorld), ("HalfOldWorld-v0", HalfOldWorld)]:
    if name not in gym.registry:
        gym.register(name, entry_point=entry, max_episode_steps=50)


def by_hand(episode, kind="number", ends=(True, False), step_reward=float):
    "Play the actions of an episode in the present interface, with nothing but Gymnasium's calls"
    env = World(kind, ends)
    obs, _ = env.reset(seed=episode.seed)
    observations, rewards = [], []
    for turn in episode.turns:
        observations.append(f"{obs!r}")
        obs, reward, terminated, truncated, _ = env.step(turn.action)
        rewards.append(step_reward(reward))
    return observations, rewards, (terminated, truncated and not terminated), f"{obs!r}"


def assert_played_as_by_hand(episodes, kind="number", ends=(True, False)):
    for episode in episodes:
        observations, rewards, last, final = by_hand(episode, kind, ends)
        assert [turn.observation for turn in episode.turns] == observations
        assert [turn.reward for turn in episode.turns] == rewards
        assert len(episode) == 3 and (episode.terminated, episode.truncated) == last
        assert episode.final_observation == (final if episode.truncated else None)
        episode.validate()
    assert len({episode.turns[0].observation for episode in episodes}) > 1  # seeds count


# --- the old interface


@pytest.mark.parametrize("kind", OBSERVATIONS)
@pytest.mark.parametrize("info", [{}, {"lives": 3, 4: "four"}])
def test_old_interface_is_played_as_by_hand(policy, kind, info):
    env = lambda: OldWorld(kind, info=info)  # noqa: E731
    if kind == "pair outside its space":  # gymnasium's own bounds are not ours to enforce
        assert split_reset((7, {"key": 1}), env().observation_space) == ((7, {"key": 1}), {})
    assert_played_as_by_hand(collect(agent_of(policy), env, episodes=3, num_envs=2), kind)


@pytest.mark.parametrize(
    "env",
    [
        OldWorldWithSeed,
        HalfOldWorld,
        OldWorld(),
        "OldWorld-v0",
        "HalfOldWorld-v0",
        lambda: gym.make("OldWorld-v0"),
        lambda: gym.wrappers.TimeLimit(OldWorld(), 9),
        lambda: gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(OldWorld(), 9)),
        lambda: gym.wrappers.TimeLimit(PassesOn(OldWorld()), 9),
        lambda: PassesOn(OldWorldWithSeed()),
        lambda: gym.wrappers.TimeLimit(Converts(OldWorld()), 9),
        lambda: LegacyGymEnv(OldWorld()),
        lambda: gym.wrappers.TimeLimit(LegacyGymEnv(OldWorldWithSeed()), 9),
    ],
)
def test_old_interface_given_in_any_form(policy, env):
    num_envs = 1 if isinstance(env, gym.Env) else 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nor does Gymnasium complain
        episodes = collect(agent_of(policy), env, episodes=3, num_envs=num_envs)
    assert_played_as_by_hand(episodes)


def test_old_interface_in_a_process_of_its_own(policy):
    rollout = collect(agent_of(policy), OldWorld, episodes=2, num_envs=1, workers=True)
    assert_played_as_by_hand(rollout)


@pytest.mark.parametrize("ends", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("world", [World, OldWorld])
def test_old_interface_and_both_end_flags(policy, world, ends):
    """TimeLimit.truncated is a truncation; both flags at once are a termination"""
    episodes = collect(agent_of(policy), lambda: world(ends=ends), episodes=3)
    assert_played_as_by_hand(episodes, ends=ends)
    assert all(e.terminated != e.truncated for e in episodes)


@pytest.mark.parametrize("max_steps", [2, 3])
def test_old_interface_with_a_time_limit(policy, max_steps):
    """The limit truncates at 2; at 3 it and the environment end the episode together"""
    task = for_env(OldWorld, max_steps=max_steps)
    (episode,) = play(task, RandomAgent(task), 1)
    assert len(episode) == max_steps
    assert (episode.terminated, episode.truncated) == (max_steps == 3, max_steps == 2)
    assert (episode.final_observation is None) == (max_steps == 3)
    turn = collect(Agent.for_task(task, policy, config=config()), episodes=1)[0].turns[-1]
    assert (turn.terminated, turn.truncated) == (max_steps == 3, max_steps == 2)


@pytest.mark.parametrize(
    ("flags", "final"),
    [
        (dict(truncated=True, terminated=False), True),
        (dict(truncated=True, terminated=True), False),
        (dict(truncated=np.bool_(True), terminated=np.array([1])), False),
        (dict(truncated=torch.tensor(True)), True),
        (dict(truncated=np.bool_(False), terminated=np.bool_(True)), False),
    ],
    ids=str,
)
def test_both_end_flags_bootstrap_only_what_was_truncated(policy, flags, final):
    """A critic that predicts 10 everywhere: the return of one step is its reward, or 10 more"""
    mine = copy.deepcopy(policy, {id(policy.tokenizer): policy.tokenizer})
    torch.nn.init.zeros_(mine.value_head.out.weight)
    torch.nn.init.constant_(mine.value_head.out.bias, 10.0)
    options = dict(ppo__turns_per_update=1, credit__gae_lambda=1.0, credit__gamma=1.0)
    agent = agent_of(mine, **options, ppo__normalize_returns=False)
    batches, update = [], agent.learner.train_on_batch
    agent.learner.train_on_batch = lambda b, r: batches.append(b) or update(b, r)
    agent.act(1)
    agent.assign_reward(1.0)
    agent.terminate_episode(**flags, next_observation=2)
    assert batches[0].returns.item() == pytest.approx(11.0 if final else 1.0)


def test_both_end_flags_of_a_turn_made_by_hand_are_a_termination(policy):
    episode = collect(agent_of(policy), lambda: World(ends=(False, True)), episodes=1)[0]
    episode.turns[-1].terminated = True
    assert episode.terminated and not episode.truncated


# --- what can't be adapted with certainty is a clear error


UNCLEAR_RESETS = {
    "reset returned None: expected obs, info": (lambda o, i: None, "number"),
    r"reset returned \(\d+, 7\): expected obs, info.* it is not in Discrete": (
        lambda o, i: (o, 7),
        "number",
    ),
    r"reset returned \(array.*, 7\): .*no observation_space tells": (lambda o, i: (o, 7), "none"),
    r"reset returned \(\d+, 0.0, False, {}\)": (lambda o, i: (o, 0.0, False, i), "number"),
}
UNCLEAR_STEPS = {
    "step returned 3 values: expected obs, reward, terminated": lambda o, r, a, b, i: (o, r, a),
    "step returned 4 values, the last of them False": lambda o, r, a, b, i: (o, r, a, b),
    r"step returned \d+: .*got int": lambda o, r, a, b, i: o,
    r"info \[{}\]: expected a dict, got list": lambda o, r, a, b, i: (o, r, a, b, [i]),
    "terminated None: expected a number": lambda o, r, a, b, i: (o, r, None, b, i),
    "truncated 'no': expected a number": lambda o, r, a, b, i: (o, r, a, "no", i),
    "terminated 2: expected True or False": lambda o, r, a, b, i: (o, r, 2, b, i),
    r"reward array\(\[1., 1.\]\): expected a number, got 2 of them": lambda o, r, a, b, i: (
        o,
        np.ones(2),
        a,
        b,
        i,
    ),
}


@pytest.mark.parametrize("message", UNCLEAR_RESETS)
def test_unclear_reset_is_an_error(policy, message):
    change, kind = UNCLEAR_RESETS[message]
    with pytest.raises(RolloutError, match=message):
        collect(agent_of(policy), lambda: Returns(reset=change, kind=kind), episodes=1)


@pytest.mark.parametrize("message", UNCLEAR_STEPS)
def test_unclear_step_is_an_error_also_in_check_env(policy, message):
    env = lambda: Returns(step=UNCLEAR_STEPS[message])  # noqa: E731
    with pytest.raises(RolloutError, match=message):
        collect(agent_of(policy), env, episodes=1)
    (failure,) = check_env(env, episodes=1).checks
    with pytest.raises(ValueError, match=message):
        check_env(env, episodes=1, raise_on_failure=True)
    assert not failure.ok and "legal_actions=" not in failure.detail  # no wrong advice


def test_vector_environments_and_other_objects_given_by_mistake(policy):
    cards = gym.make_vec("Blackjack-v1", 2)
    with pytest.raises(RolloutError, match="made a vector environment.*Give collect the vector"):
        collect(agent_of(policy), lambda: gym.make_vec("Blackjack-v1", 2), episodes=1)
    with pytest.raises(TypeError, match="expected an id, a factory .*got SyncVectorEnv"):
        for_env(cards)
    cards.reset(seed=0)
    agent = agent_of(policy)
    agent.act(1)
    with pytest.raises(TypeError, match="expected a number, got 2 of them. A vector environment"):
        agent.assign_reward(cards.step(np.array([0, 0]))[1])
    with pytest.raises(TypeError, match="Put LegacyGymEnv around an environment of the old"):
        Task(object(), str, str, str)
    with pytest.raises(RolloutError, match="wrap environments of the old 4-tuple API"):
        collect(agent_of(policy), object, episodes=1)


def test_wrappers_around_an_old_instance_explain_themselves(policy):
    """An instance of the user is not changed; the error says what to do, and that works"""
    with pytest.raises(RolloutError, match="put LegacyGymEnv around the environment"):
        collect(agent_of(policy), gym.wrappers.TimeLimit(OldWorld(), 9), episodes=1, num_envs=1)
    env = gym.wrappers.TimeLimit(LegacyGymEnv(OldWorld()), 9)
    assert_played_as_by_hand(collect(agent_of(policy), env, episodes=2, num_envs=1))


# --- seeds

DRAWS = {
    "RandomState": lambda seed: int(np.random.RandomState(seed).randint(400)),
    "random": lambda seed: random.Random(seed).randrange(400),
    "int32": draw_int32,
    "assert": draw_31_bits,
    "ValueError": draw_text,
}
SMALL_SEEDS_ONLY = ("int32", "assert", "ValueError")


@pytest.mark.parametrize("draw", DRAWS)
def test_seeds_are_taken_by_every_generator(policy, draw):
    agent = agent_of(policy)
    env = lambda: SeededBy(DRAWS[draw])  # noqa: E731
    episodes = collect(agent, env, episodes=8, num_envs=3)
    assert any(e.seed >= 2**31 for e in episodes) and any(e.seed < 2**31 for e in episodes)
    for e, i in zip(episodes, range(8)):
        assert e.seed == episode_seed(0, i)
        taken = e.seed % 2**31 if draw in SMALL_SEEDS_ONLY else e.seed
        assert int(e.turns[0].observation) == DRAWS[draw](taken)
    large = next(e for e in episodes if e.seed >= 2**31)
    with replay(agent, large, env) as (_, turns):  # raises if an observation differs
        assert list(turns) == [0, 1, 2]
    assert branch(agent, large, 1, env=env).turns[0].observation == large.turns[0].observation


def test_seeds_are_the_same_in_paired_evaluations_groups_and_processes(policy):
    agent = agent_of(policy)
    env = lambda: SeededBy(draw_int32)  # noqa: E731
    first, second = (evaluate(agent, env, 6, greedy=True).greedy.episodes for _ in range(2))
    starts = [[e.turns[0].observation for e in episodes] for episodes in (first, second)]
    assert starts[0] == starts[1] and len(set(starts[0])) > 1
    apart = collect(agent, env, 6, seed=1_000_000, workers=True, num_envs=1)
    assert [e.turns[0].observation for e in apart] == starts[0]
    groups = collect(agent, env, 6, group_size=2)
    texts = [e.turns[0].observation for e in groups]
    assert texts[::2] == texts[1::2]


@pytest.mark.parametrize("seed", [5, 2**31 + 5])
@pytest.mark.parametrize("error", [ValueError("no level fits"), OSError("no level of this seed")])
def test_an_error_that_is_not_about_the_seed_is_not_hidden(seed, error):
    calls = []

    class Broken(World):
        def reset(self, *, seed=None, options=None):
            calls.append(seed)
            raise error

    with pytest.raises(type(error), match="no level"):
        reset_env(Broken(), seed)
    assert calls == [seed]


# --- what is changed in place


class Clips(World):
    "Changes the action in place, as code that scales or clips actions does"

    def __init__(self, space):
        super().__init__()
        self.action_space = space

    def step(self, action):
        self.received = copy.deepcopy(action)
        if isinstance(action, np.ndarray):
            action *= 0
        elif isinstance(action, list):
            action.clear()
        elif isinstance(action, dict):
            action["move"] = None
            action.pop("say", None)
        else:
            action[0][:] = 0
        return super().step(1)


class AnySpace(spaces.Space):
    "A space that has everything"

    def contains(self, x):
        return True

    def sample(self, mask=None, probability=None):
        return [1]


IN_PLACE = {
    "array": np.array([0.5, -2.0], np.float32),
    "list": ["go", "north"],
    "dict": {"move": np.array([1, 2]), "say": "hello"},
    "tuple": (np.array([3, 4]), "x"),
}


def same(a, b):
    return repr(a) == repr(b)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_action_recorded_is_the_one_chosen(policy, kind):
    chosen, shared = IN_PLACE[kind], copy.deepcopy(IN_PLACE[kind])
    agent = agent_of(policy, shared)
    envs = []
    make = lambda: envs.append(Clips(AnySpace())) or envs[-1]  # noqa: E731
    (episode,) = collect(agent, make, episodes=1)
    assert len(episode) == 3 and all(same(t.action, chosen) for t in episode.turns)
    assert same(shared, chosen) and same(envs[-1].received, chosen)  # the user's object, too

    env = Clips(AnySpace())
    obs, _ = env.reset(seed=0)
    for _ in range(3):
        action = agent.act(obs)
        assert same(action, chosen)
        obs, reward, *_ = env.step(action)
        agent.assign_reward(reward)
    assert all(same(turn.action, chosen) for turn in agent.recorder.turns)
    assert same(shared, chosen) and same(agent.shared.last_action, chosen)


def test_legal_and_fallback_actions_are_not_changed_in_place(policy):
    class Legal(Plays):
        moves = [np.array([1.0, 2.0])]

        def extract_action(self, response):
            return None

        def legal_actions(self, observation):
            return self.moves

    make = lambda: Clips(spaces.Box(-9, 9, (2,), float))  # noqa: E731
    (episode,) = collect(agent_of(policy, cls=Legal), make, episodes=1)
    assert [t.action.tolist() for t in episode.turns] == [[1, 2]] * 3
    assert Legal.moves[0].tolist() == [1, 2]

    task = for_env(
        make,
        extract_action=lambda text: None,
        format_action=str,
        fallback=np.array([3.0, 4.0]),
    )
    env = TextEnv(task)
    env.reset(seed=0)
    assert [env.step("?").action.tolist() for _ in range(2)] == [[3, 4]] * 2


def test_objects_stay_themselves_and_types_of_containers_are_kept():
    class Move:
        pass

    class Point(NamedTuple):
        x: list
        y: Move

    move = Move()
    value = OrderedDict(a=Point([1], move), b={1, 2}, c=np.ma.array([1, 2], mask=[0, 1]))
    copied = copy_containers(value)
    assert type(copied) is OrderedDict and type(copied["a"]) is Point and copied["a"].y is move
    assert copied["a"].x == [1] and copied["a"].x is not value["a"].x
    assert type(copied["c"]) is np.ma.MaskedArray and copied["b"] is not value["b"]


class Buffers(World):
    "Writes all observations and infos of all its instances into one array and one dict"

    observation_space = spaces.Box(-1e9, 1e9, (2,))
    buffer, facts = np.zeros(2, np.float32), {}

    def __init__(self):
        super().__init__()
        self.observation_space = type(self).observation_space
        self.describe = self.write

    def write(self, n):
        self.buffer[:] = n, self.n
        return self.buffer

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.facts["at"] = None
        return self.begin(), self.facts

    def step(self, action):
        obs, *rest, _ = super().step(action)
        self.facts["at"] = self.n
        return obs, *rest, self.facts


class Remembers(Plays):
    "Shows all observations of the episode so far"

    def get_system_prompt(self):
        self.seen = []
        return "Go."

    def format_observation(self, observation):
        self.seen.append(observation)
        return " ".join(str(o[0]) for o in self.seen)


def test_observations_of_one_buffer_stay_as_they_were(policy):
    episodes = collect(agent_of(policy, cls=Remembers), Buffers, episodes=6, num_envs=3)
    for episode in episodes:
        start = int(np.random.Generator(np.random.PCG64(episode.seed)).integers(500))
        assert start == int(gym.utils.seeding.np_random(episode.seed)[0].integers(500))
        for t, turn in enumerate(episode.turns):
            assert turn.observation == " ".join(str(float(start + k)) for k in range(t + 1))


def test_infos_and_observations_of_a_text_environment_are_copies():
    task = for_env(Buffers, legal_actions=lambda obs, info: info.clear())
    env = TextEnv(task)
    env.reset(seed=0)
    obs, before = env.obs, env.obs.copy()
    env.step("Action: 1")
    assert (obs == before).all() and not (env.obs == before).all()
    assert env.info == {"at": env.env.n} and env.info is not Buffers.facts
    env.legal_actions()
    assert Buffers.facts == {"at": env.env.n}  # the user cleared a copy


# --- rewards

REWARDS = {
    "bool": (True, 1.0),
    "int": (-3, -3.0),
    "numpy": (np.float32(0.25), 0.25),
    "numpy bool": (np.True_, 1.0),
    "unsigned": (np.uint8(200), 200.0),
    "array": (np.array(0.5), 0.5),
    "array of one": (np.array([0.5]), 0.5),
    "matrix of one": (np.array([[2]]), 2.0),
    "tensor": (torch.tensor(0.5), 0.5),
    "tensor of one": (torch.tensor([1.5], requires_grad=True), 1.5),
    "Fraction": (Fraction(1, 4), 0.25),
    "Decimal": (Decimal("0.125"), 0.125),
}
BAD_REWARDS = {
    "nan": (float("nan"), "reward nan: expected a finite number"),
    "inf": (np.float32("inf"), "reward .*inf.*: expected a finite number"),
    "huge": (10**400, "reward 1000.*: expected a finite number"),
    "tensor nan": (torch.tensor([float("nan")]), "reward .*nan.*: expected a finite number"),
    "Decimal nan": (Decimal("NaN"), "reward .*(nan|NaN).*: expected a finite number"),
    "text": ("1", "reward '1': expected a number, got str"),
    "numpy text": (np.str_("1"), "reward .*: expected a number, got str_"),
    "None": (None, "reward None: expected a number, got NoneType"),
    "complex": (1 + 0j, r"reward \(1\+0j\): expected a number, got complex"),
    "numpy complex": (np.complex64(1), "reward .*: expected a number, got complex64"),
    "list": ([1.0], r"reward \[1.0\]: expected a number, got list"),
    "two": (np.ones(2), "expected a number, got 2 of them"),
    "none of them": (np.ones(0), "expected a number, got 0 of them"),
    "date": (np.datetime64("2020"), "reward .*: expected a number, got datetime64"),
}


@pytest.mark.parametrize("kind", REWARDS)
def test_rewards_count_the_same_in_both_loops(policy, kind):
    given, expected = REWARDS[kind]
    agent = agent_of(policy)
    change = lambda o, r, a, b, i: (o, given, a, b, i)  # noqa: E731
    (episode,) = collect(agent, lambda: Returns(step=change), episodes=1)
    agent.act(1)
    agent.assign_reward(given)
    by_loop = agent.current_episode_rewards
    assert [turn.reward for turn in episode.turns] == [expected] * 3 and by_loop == [expected]
    assert {type(turn.reward) for turn in episode.turns} == {type(by_loop[0])} == {float}


@pytest.mark.parametrize("kind", BAD_REWARDS)
def test_bad_rewards_are_the_same_error_in_both_loops(policy, kind):
    given, message = BAD_REWARDS[kind]
    agent = agent_of(policy)
    agent.act(1)
    agent.assign_reward(0.5)
    with pytest.raises((TypeError, ValueError), match=message):
        agent.assign_reward(given)
    assert agent.current_episode_rewards == [0.5]
    env = lambda: Returns(step=lambda o, r, a, b, i: (o, given, a, b, i))  # noqa: E731
    with pytest.raises(RolloutError, match=message):
        collect(agent, env, episodes=1)
    with pytest.raises(ValueError, match=message):
        check_env(env, episodes=1, raise_on_failure=True)
    task = for_env(env)
    with pytest.raises((TypeError, ValueError), match=message):
        play(task, RandomAgent(task), 1)


def test_rewards_for_the_format_are_numbers_too(policy):
    class Formats(Plays):
        value = np.array([0.5])

        def format_reward(self, response):
            return self.value

    agent = agent_of(policy, cls=Formats)
    agent.act(1)
    (episode,) = collect(agent, World, episodes=1)
    assert agent.recorder.turns[0].reward == 0.5
    assert episode.turns[0].reward == 0.5 + by_hand(episode)[1][0]
    Formats.value = None
    with pytest.raises(TypeError, match="format_reward None: expected a number"):
        agent.act(1)
    with pytest.raises(RolloutError, match="format_reward None: expected a number"):
        collect(agent, World, episodes=1)


# --- text that can't be encoded

LONE, SHOWN = "a\ud800b", "a�b"


class Mumbles(World):
    "Gives texts with lone surrogates everywhere"

    render_mode = "ansi"
    metadata = {"render_modes": ["ansi"]}

    def __init__(self, ends=(False, True)):
        super().__init__("text", ends)
        self.describe = lambda n: LONE

    def render(self):
        return LONE

    def step(self, action):
        *returned, _ = super().step(action)
        return *returned, {"note": LONE}


class Mutters(Plays):
    def get_system_prompt(self):
        return LONE

    def format_observation(self, observation):
        return observation

    def extract_action(self, response):
        raise ValueError(LONE)

    def fallback_action(self, observation):
        return 1


def test_lone_surrogates_are_replaced_in_episodes_files_and_pages(policy, tmp_path):
    agent = agent_of(policy, cls=Mutters)
    episodes = collect(agent, Mumbles, episodes=2, frames=True)
    for episode in episodes:
        assert [t.observation for t in episode.turns] == [SHOWN] * 3
        assert (episode.system_prompt, episode.final_observation) == (SHOWN, SHOWN)
        assert {t.frame for t in episode.turns} == {SHOWN}
        assert all(t.invalid_reason == f"ValueError: {SHOWN}" for t in episode.turns)
        # the ids are those of the replaced text
        prompt = episode.segments[0].ids[: episode.turns[0].start]
        conversation = agent.conversation(SHOWN)
        assert prompt == conversation.add_user(SHOWN)
    episodes.save(tmp_path / "episodes.parquet")
    loaded = type(episodes).load(tmp_path / "episodes.parquet")
    assert list(loaded) == list(episodes)
    EpisodePlayer(episodes, tokenizer=policy.tokenizer).save(tmp_path / "page.html")
    assert r"a\ufffdb" in (tmp_path / "page.html").read_text(encoding="utf-8")
    str(episodes[0])
    again = branch(agent, episodes[0], 1, observation=LONE, system_prompt=LONE, env=Mumbles)
    assert (again.turns[1].observation, again.system_prompt) == (SHOWN, SHOWN)


def test_lone_surrogates_in_the_users_own_loop(policy):
    agent = agent_of(policy, cls=Mutters, ppo__turns_per_update=1)
    agent.act(LONE)
    agent.assign_reward(1)
    assert [m["content"] for m in agent.current_episode_messages[:2]] == [SHOWN, SHOWN]
    stats = agent.terminate_episode(truncated=True, next_observation=LONE)
    assert stats["mean_return"] == 1.0


def test_lone_surrogates_of_made_up_episodes_are_stored_and_cloned(policy, tmp_path):
    task = for_env(
        Mumbles,
        extract_action=int,
        format_action=str,
        system_prompt=LONE,
        format_observation=lambda obs, info: f"{obs} {info.get('note')}",
    )
    games = play(task, RandomAgent(task), 2)
    assert games[0].turns[1].observation == f"{SHOWN} {SHOWN}" and games[0].system_prompt == SHOWN
    turn = games[0].turns[0]
    turn.observation = turn.response = turn.invalid_reason = turn.reasoning = LONE
    turn.action = {"say": LONE, "pair": "\ud83d\ude00"}
    turn.candidates = [LONE]
    games.save(tmp_path / "games.parquet")
    loaded = type(games).load(tmp_path / "games.parquet")[0]
    assert loaded == games[0]
    assert loaded.turns[0].observation == SHOWN and loaded.turns[0].candidates == [SHOWN]
    # JSON can hold what text can't
    assert loaded.turns[0].action["say"] == LONE
    EpisodePlayer(games).save(tmp_path / "page.html")
    agent = Agent.for_task(task, policy, config=config())
    rows = []
    for text in (LONE, SHOWN):  # chats of the user, for a warm start
        talk = [dict(role=r, content=text) for r in ("system", "user", "assistant")]
        rows.append(encode(agent, as_transcripts([talk])[0]).segments[0].ids)
    assert rows[0] == rows[1]


# --- more of the kind


@pytest.mark.parametrize("workers", [False, True])
def test_environment_without_spaces(policy, workers):
    episodes = collect(agent_of(policy), Bare, episodes=2, num_envs=1, workers=workers)
    assert_played_as_by_hand(episodes, "none")
    with pytest.raises(ValueError, match="Bare has no observation_space .*pass format_observation"):
        for_env(Bare)

    class Fails(Plays):
        def extract_action(self, response):
            raise KeyError(response)

    if not workers:
        with pytest.raises(RolloutError, match="the action space is None: expected a gymnasium"):
            collect(agent_of(policy, cls=Fails), Bare, episodes=1)


def test_flags_of_other_kinds_are_read(policy):
    for kind in (int, np.bool_, np.int8, lambda f: np.array([f]), torch.tensor, float):
        change = lambda o, r, a, b, i, kind=kind: (o, r, kind(a), kind(b), i)  # noqa: E731
        env = functools.partial(Returns, step=change)
        assert_played_as_by_hand(collect(agent_of(policy), env, 2))


def test_none_as_info_and_keys_that_are_no_texts(policy):
    for info in (None, {1: "one", (2, 3): "two", None: LONE}):
        env = functools.partial(
            Returns,
            lambda o, i, info=info: (o, info),
            lambda o, r, a, b, i, info=info: (o, r, a, b, info),
        )
        assert_played_as_by_hand(collect(agent_of(policy), env, 2))
        agent = agent_of(policy)
        assert agent.act(1, info) == 1 and agent.newest_info == (info or {})
    with pytest.raises(TypeError, match="info 'x': expected a dict, got str"):
        agent.act(1, "x")


def test_observation_none_reaches_the_users_method(policy):
    env = lambda: Returns(lambda o, i: (None, i), lambda o, *rest: (None, *rest))  # noqa: E731
    (episode,) = collect(agent_of(policy), env, 1)
    assert [t.observation for t in episode.turns] == ["None"] * 3
    report = str(check_env(env, episodes=1))
    assert "the observation is None: expected an element of Discrete(1000)" in report


class Forwards(gym.Env):
    "A wrapper by hand, which has every attribute that it is asked for"

    def __init__(self, env):
        self.inner = env

    def __getattribute__(self, name):
        if name in ("inner", "__class__", "__dict__", "unwrapped", "reset", "step", "close"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "inner"), name, f"any {name}")

    def reset(self, **kwargs):
        return self.inner.reset(**kwargs)

    def step(self, action):
        return self.inner.step(action)

    def close(self):
        return self.inner.close()

    @property
    def unwrapped(self):
        return self.inner.unwrapped


def test_wrapper_that_has_every_attribute(policy):
    assert Forwards(World()).spec is None and Forwards(World()).anything == "any anything"
    assert_played_as_by_hand(collect(agent_of(policy), lambda: Forwards(World()), 2))
    assert_played_as_by_hand(collect(agent_of(policy), lambda: Forwards(OldWorld()), 2))


def test_environment_that_raises_when_closed(policy):
    warns = lambda: pytest.warns(UserWarning, match="could not be closed: OSError: the door")  # noqa: E731
    with warns():
        assert_played_as_by_hand(collect(agent_of(policy), Unclosable, 2))
    with warns():
        task = for_env(Unclosable)
    with warns():
        assert len(play(task, RandomAgent(task), 2)) == 2
    with warns():
        assert check_env(task, episodes=2).ok
    with warns():
        assert Agent.for_task(task, policy, config=config()).action_space == World.action_space
    remote = SubprocessEnv(Unclosable)
    remote.reset(seed=0)
    remote.close()
    assert remote.process.returncode == 0


class Rendered(World):
    "Can be rendered only if that was asked for when it was made"

    metadata = {"render_modes": ["ansi"]}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        if self.render_mode is None:
            raise RuntimeError("give render_mode when it is made")
        return f"at {self.n}"


class WithoutMetadata(World):
    metadata = None


def test_rendering_that_is_asked_for_when_made(policy):
    if "Rendered-v0" not in gym.registry:
        gym.register("Rendered-v0", entry_point=Rendered)
    (episode,) = collect(agent_of(policy), "Rendered-v0", 1, frames=True)
    assert [t.frame for t in episode.turns] == [f"at {t.observation}" for t in episode.turns]
    for env in (Rendered, WithoutMetadata, OldWorld):  # nothing can be rendered, all is played
        (episode,) = collect(agent_of(policy), env, 1, frames=True)
        assert len(episode) == 3 and {t.frame for t in episode.turns} == {None}


# --- the loop of 2024, and check_env


def test_loop_of_2024_over_an_old_environment(policy):
    """The loop of the 2024 README, with four values: what the agent records is what was played"""
    agent = agent_of(policy)
    env = OldWorldWithSeed()
    env.seed(3)
    observation, done, rewards, texts = env.reset(), False, [], []
    while not done:
        texts.append(f"{observation!r}")
        action = agent.act(observation)
        observation, reward, done, info = env.step(action)
        agent.assign_reward(np.array([reward]))
        rewards.append(reward)
    assert [t.observation for t in agent.recorder.turns] == texts
    assert agent.current_episode_rewards == rewards and len(rewards) == 3
    agent.terminate_episode(truncated=info.get("TimeLimit.truncated", False))
    assert agent.buffer[0].terminated


def test_check_env_names_what_is_adapted():
    (played, *others) = check_env(lambda: OldWorld(), episodes=2).checks
    assert played.ok and all(check.ok for check in others)
    for note in ("reset takes no seed", "reset returns the observation alone", "obs, reward, done"):
        assert note in played.detail
    (played, *_) = check_env(lambda: SeededBy(draw_int32), episodes=2).checks
    assert played.detail.endswith("Adapted: large seeds are refused, and taken modulo 2**31")
    (played, *_) = check_env(lambda: World(ends=(True, True)), episodes=2).checks
    assert played.detail.endswith("occur together, which counts as terminated")
    (played, *_) = check_env(Buffers, episodes=2).checks
    assert played.detail.endswith("Adapted: step changes earlier observations in place")
    (played, *_) = check_env(lambda: World(), episodes=2).checks
    assert "Adapted" not in played.detail
    task = for_env(
        lambda: Clips(spaces.MultiDiscrete([3, 3])),
        legal_actions=lambda obs, info: [np.array([1, 2])],
    )
    assert "step changes the action in place" in check_env(task, episodes=1).checks[0].detail


def test_environments_of_gymnasium_are_left_as_they_are():
    env = make_env("FrozenLake-v1", max_steps=7)
    assert str(env) == str(gym.make("FrozenLake-v1", max_episode_steps=7))
    old = make_env("OldWorld-v0")
    assert str(old) == str(gym.make("OldWorld-v0")) and old.spec == gym.make("OldWorld-v0").spec
