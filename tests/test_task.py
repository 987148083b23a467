"Tasks: conversion between responses and actions, invalid responses, baselines and `check_env`."

import functools
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagym.chat.conversation import Window
from llamagym.envs.actions import (
    DiscreteActions,
    ObservationFormatter,
    actions_for,
    after_label,
    enumerate_actions,
    format_space_value,
)
from llamagym.envs.adapters import LegacyGymEnv, episode_seed
from llamagym.envs.baselines import RandomAgent, ScriptedAgent, play
from llamagym.envs.check import check_env
from llamagym.envs.registry import TASKS, for_env, get_task
from llamagym.envs.tabular import tabular_model
from llamagym.envs.task import Retry, Task
from llamagym.envs.text_env import TextEnv
from llamagym.envs.toy_text import (
    BLACKJACK_ACTIONS,
    LAKE_ACTIONS,
    TAXI_ACTIONS,
    basic_strategy,
    blackjack,
    cliff_walking,
    format_blackjack,
    format_taxi,
    frozen_lake,
    optimal_policy,
    taxi,
)

TASK_FACTORIES = {
    "blackjack": blackjack,
    "lake": frozen_lake,
    "dry lake": functools.partial(frozen_lake, False),
    "big lake": functools.partial(frozen_lake, map_name="8x8"),
    "cliff": cliff_walking,
    "taxi": taxi,
}


class Corridor(gym.Env):
    """An environment that rewards walking right; actions 5, 6, 7 are left, stay, right"""

    action_space, observation_space = spaces.Discrete(3, start=5), spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.received_actions = 0, []
        return self.at, {}

    def step(self, action):
        self.received_actions.append(action)
        self.at = min(3, max(0, self.at + action - 6))
        return self.at, float(self.at == 3), self.at == 3, False, {}


def corridor(**overrides) -> Task:
    return for_env(Corridor, **overrides)


# --- responses


@pytest.mark.parametrize(
    "response, action",
    [
        ("Action: hit", 1),
        ("Action: stick", 0),
        ("action: HIT", 1),
        ("Action: 1", 1),
        ("Action:0", 0),
        ("Action = hit", 1),
        ("hit", 1),
        ("Hit.", 1),
        ("  1\n", 1),
        ("**Action:** hit", 1),
        ("Action: **hit**", 1),
        ("Action: [1]", 1),
        ('{"action": "hit"}', 1),
        ('{"action": 1, "sure": 0.9}', 1),
        ("Action: stick\nNo: 12 is low.\nAction: hit", 1),
        ("Rather than Action: 0, Action: 1", 1),
        ("Action:\nhit", 1),
        ("Action: 1.", 1),
        ("Action: hit (1)", 1),
        ("Action: hit, since sticking loses", 1),
        ("Action: hit\n0 cards would be too few", 1),
        ("Action: I will hit", 1),
        ("Action: stand", 0),
        ("Action: hit, 16 is low", 1),
        ("Action: hit 2 more times", 1),
        ("I have 10 and the dealer 1.\nAction: stick", 0),
    ],
)
def test_blackjack_actions_are_extracted_from_responses(response, action):
    assert BLACKJACK_ACTIONS.extract_action(response) == action


@pytest.mark.parametrize(
    "response, reason",
    [
        ("", "no action in ''"),
        ("I am not sure", "no action"),
        ("I hit it", "says more than an action"),
        ("Action:", "nothing follows"),
        ("Action: hit\nAction:", "nothing follows"),
        ("Action: 10", "10 is not an action"),
        ("Action: -1", "-1 is not an action"),
        ("Action: 1.5", "1.5 is not an action"),
        ("Action: 2", "2 is not an action"),
        ("Action: fold", "'fold' does not start with an action"),
        ("Action: hit or stick", "several actions (hit, stick)"),
        ("Action: 0/1", "several actions (0, 1)"),
        ("hit, stick", "several actions"),
        ("Action: 1 (stick)", "several actions"),
        ("Action: hitting", "does not start"),
        ("Reaction: hit", "no action"),
        ("Action: don't hit", "does not start"),
        ("Action: hit\nAction: fold", "'fold' does not start"),
        ("١", "no action"),
    ],
)
def test_unclear_response_error_gives_the_reason(response, reason):
    with pytest.raises(ValueError) as error:
        BLACKJACK_ACTIONS.extract_action(response)
    assert reason in str(error.value) and '"Action: " and one of stick (0), hit (1)' in str(
        error.value
    )


def test_long_responses_are_shortened_in_errors():
    with pytest.raises(ValueError) as error:
        BLACKJACK_ACTIONS.extract_action("hm " * 1000)
    assert len(str(error.value)) < 200


def test_action_names_may_have_several_words_and_shared_prefixes():
    actions = DiscreteActions(("go", "go north", "pick-up"))
    assert [
        actions.extract_action(f"Action: {name}")
        for name in ("go", "Go  North", "go_north", "pick up")
    ] == [0, 1, 1, 2]
    assert [actions.extract_action(actions.format_action(a)) for a in range(3)] == [0, 1, 2]
    assert (
        TAXI_ACTIONS.extract_action("Action: pickup") == 4
        and LAKE_ACTIONS.extract_action("Action: move left") == 0
    )


@given(st.integers(-20, 20), st.integers(1, 30), st.data())
def test_discrete_actions_round_trip(start, n, data):
    actions = actions_for(spaces.Discrete(n, start=start))
    action = data.draw(st.integers(start, start + n - 1))
    assert (
        actions.extract_action(actions.format_action(action))
        == actions.extract_action(f"Not {start}, no.\nAction: {action}. That is it")
        == action
    )
    outside = data.draw(st.integers(start + n, start + n + 100))
    with pytest.raises(ValueError, match="not an action"):
        actions.extract_action(f"Action: {outside}")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
@settings(max_examples=50)
def test_multi_discrete_actions_round_trip(nvec, data):
    space = spaces.MultiDiscrete(nvec, start=[data.draw(st.integers(-3, 3)) for _ in nvec])
    actions = actions_for(space)
    action = np.array(
        [data.draw(st.integers(s, s + n - 1)) for s, n in zip(space.start.tolist(), nvec)]
    )
    extracted = actions.extract_action("I think 7.\n" + actions.format_action(action))
    assert np.array_equal(extracted, action) and space.contains(extracted)
    assert len(enumerate_actions(space)) == np.prod(nvec)


def test_array_actions_of_any_shape_round_trip():
    for space in (
        spaces.MultiBinary(3),
        spaces.MultiBinary([2, 2]),
        spaces.MultiDiscrete([[2, 3], [4, 5]]),
    ):
        actions = actions_for(space)
        for action in enumerate_actions(space):
            assert np.array_equal(actions.extract_action(actions.format_action(action)), action)
    assert actions_for(spaces.MultiBinary(3)).extract_action('{"action": [1, 0, 1]}').tolist() == [
        1,
        0,
        1,
    ]


@given(st.text(max_size=40))
def test_text_actions_round_trip_or_raise(command):
    actions = actions_for(spaces.Text(50, charset=frozenset("abc :A\nction")))
    try:
        response = actions.format_action(command)
    except ValueError:
        return
    assert actions.extract_action("Action: old\n" + response) == command


@given(st.text(max_size=60))
def test_extract_action_raises_value_errors_only(text):
    for actions in (
        BLACKJACK_ACTIONS,
        TAXI_ACTIONS,
        actions_for(spaces.MultiDiscrete([3, 3])),
        actions_for(spaces.Text(20)),
    ):
        for response in (text, "Action: " + text):
            try:
                assert actions.extract_action(response) is not None
            except ValueError as error:
                assert "expected" in str(error)


def test_after_label_returns_the_text_after_the_label():
    assert after_label("Action: a\nANSWER: b", "answer") == " b" and after_label("nothing") is None


# --- observations


def test_blackjack_observations_contain_the_whole_state():
    states = [(t, d, u) for t in range(4, 22) for d in range(1, 11) for u in (0, 1)]
    assert len({format_blackjack(s) for s in states}) == len(states)
    assert (
        format_blackjack((14, 1, 0)) == "You: hard 14. Dealer: ace."
        and format_blackjack((18, 7, 1)) == "You: soft 18. Dealer: 7."
    )


def test_taxi_observations_contain_the_whole_state():
    env = gym.make("Taxi-v4").unwrapped
    assert len({format_taxi(s) for s in range(500)}) == 500
    for row, column, passenger, destination in [(0, 4, 4, 3), (3, 1, 2, 0)]:
        text = format_taxi(env.encode(row, column, passenger, destination))
        assert text == (
            f"Row {row + 1}, column {column + 1}. Passenger: {['red', 'green', 'yellow', 'blue', 'taxi'][passenger]}. "
            f"Destination: {['red', 'green', 'yellow', 'blue'][destination]}."
        )


def test_taxi_prompt_matches_the_environment():
    """The environment has the walls and stops that the prompt describes"""
    env, model = gym.make("Taxi-v4").unwrapped, tabular_model(gym.make("Taxi-v4"))
    assert env.locs == [(0, 0), (0, 4), (4, 0), (4, 3)]
    walls = {
        (row, column)
        for row in range(5)
        for column in range(4)
        if model.next_state[env.encode(row, column, 0, 1), 2, 0] == env.encode(row, column, 0, 1)
    }
    assert walls == {(0, 1), (1, 1), (3, 0), (4, 0), (3, 2), (4, 2)}


def test_observations_of_every_space_are_formatted():
    assert (
        format_space_value(spaces.Box(-1, 1, (2,)), np.array([0.12345, -1.0], np.float32))
        == "0.123 -1"
    )
    assert (
        format_space_value(spaces.Tuple((spaces.Discrete(3), spaces.Text(5))), (2, "ab")) == "2, ab"
    )
    assert format_space_value(spaces.MultiBinary(3), np.array([1, 0, 1], np.int8)) == "1 0 1"
    assert ObservationFormatter(spaces.Discrete(4))(np.int64(3), {}) == "Observation: 3."
    assert ObservationFormatter(spaces.Text(20))("You see a door.", {}) == "You see a door."
    assert (
        ObservationFormatter(spaces.Box(0, 1, (2,)), ("x", "speed"))(np.array([0.5, 1.0]), {})
        == "x: 0.5. speed: 1."
    )


# --- tasks


@pytest.mark.parametrize("name", TASK_FACTORIES)
def test_predefined_tasks_pass_check_env(name):
    task = TASK_FACTORIES[name]()
    report = check_env(task, episodes=10)
    assert report.ok, str(report)
    assert len(task.system_prompt.split()) <= (25 if name == "blackjack" else 80)
    legal = task.list_legal_actions(0, {}, task.make().action_space)
    assert [task.extract_action(task.format_action(a)) for a in legal] == legal
    assert pickle.loads(pickle.dumps(task)).system_prompt == task.system_prompt


def test_time_limits_of_task_and_environment():
    assert (
        get_task(gym.make("CliffWalking-v1", max_episode_steps=50)).make().spec.max_episode_steps
        == 50
    )
    assert (
        cliff_walking().make().spec.max_episode_steps == 100
        and cliff_walking(7).make().spec.max_episode_steps == 7
    )
    assert (
        frozen_lake().make().spec.max_episode_steps == 100
        and frozen_lake(map_name="8x8").make().spec.max_episode_steps == 200
    )
    episode = play(corridor(max_steps=5), ScriptedAgent(corridor(), lambda obs, info: 6), 1)[0]
    assert (
        len(episode) == 5
        and episode.truncated
        and not episode.terminated
        and episode.final_observation == "Observation: 0."
    )


def test_task_accepts_id_factory_and_instance():
    instance = gym.make("FrozenLake-v1", is_slippery=False)
    for env in ("FrozenLake-v1", lambda: gym.make("FrozenLake-v1"), instance):
        task = get_task(env)
        assert (
            task.name == "FrozenLake-v1"
            and not task.is_single_instance
            and task.make() is not task.make()
        )
        assert ("slippery" in task.system_prompt) == (env is not instance)
    assert task.make().unwrapped.spec.kwargs["is_slippery"] is False
    unregistered = Corridor()
    assert for_env(unregistered).is_single_instance and for_env(unregistered).make() is unregistered

    class UnrecordedWrapper(gym.Wrapper):
        """A wrapper that Gymnasium does not record and cannot create again"""

    wrapped = UnrecordedWrapper(instance)
    assert for_env(wrapped).is_single_instance and for_env(wrapped).make() is wrapped


def test_instance_of_the_user_stays_open():
    class Closing(Corridor):
        def close(self):
            raise AssertionError("closed")

    play(for_env(Closing(), max_steps=3), RandomAgent(corridor()), 2)


def test_large_action_spaces_are_not_listed():
    class Big(gym.Env):
        action_space, observation_space = spaces.MultiDiscrete([10] * 6), spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return 0, {}

        def step(self, action):
            return 1, 0.0, True, False, {}

    task = for_env(Big)
    assert (
        enumerate_actions(Big.action_space) is None
        and enumerate_actions(spaces.Discrete(10**6)) is None
        and check_env(task).ok
    )
    env = TextEnv(task)
    env.reset()
    assert Big.action_space.contains(env.step("?").action)
    assert len({e.turns[0].response for e in play(task, RandomAgent(task), 20)}) == 20


def test_registry_returns_the_task_of_an_environment():
    for env_id in TASKS:
        assert get_task(env_id).name == env_id
    # Gymnasium registers Blackjack with sab=True
    assert get_task("Blackjack-v1").reference_returns["optimal"] == -0.0431
    assert (
        blackjack().reference_returns["optimal"] == -0.0466
        and blackjack(natural=True).reference_returns["optimal"] == -0.0257
    )
    assert (
        blackjack(sab=True, natural=True).reference_returns == blackjack(sab=True).reference_returns
    )
    assert get_task(gym.make("FrozenLake-v1", desc=["SFG"])).reference_returns == {}
    task = blackjack()
    assert get_task(task) is task
    assert (
        get_task("MountainCar-v0").system_prompt
        == "You act in MountainCar-v0. Reply Action: and one of 0, 1, 2."
    )


def test_task_is_displayed_with_its_reference_returns():
    table = frozen_lake()._repr_markdown_()
    assert "Map: SFFF" in table and "optimal 0.7442" in table


# --- invalid responses


def step_responses(task: Task, *responses: str):
    env = TextEnv(task)
    env.reset(seed=0)
    return env, [env.step(response) for response in responses]


def test_fallback_is_a_legal_action():
    env, (first, second) = step_responses(corridor(invalid_reward=-0.25), "nonsense", "Action: 7")
    assert (first.action, first.valid, first.reward) == (
        5,
        False,
        -0.25,
    ) and "no action in 'nonsense'" in first.invalid_reason
    assert isinstance(first.error, ValueError) and (second.action, second.valid, second.error) == (
        7,
        True,
        None,
    )
    assert env.env.received_actions == [5, 7]
    env, (first,) = step_responses(corridor(fallback=lambda obs, info: 7), "nonsense")
    assert first.action == 7 and env.observation == "Observation: 1."


def test_terminate_does_not_step_the_environment():
    env, (result,) = step_responses(
        corridor(on_invalid="terminate", invalid_reward=-1.0), "nonsense"
    )
    assert (
        result.terminated
        and not result.truncated
        and result.action is None
        and result.reward == -1.0
        and env.env.received_actions == []
    )


def test_retry_counts_attempts_per_observation():
    task = corridor(on_invalid=Retry(2), invalid_reward=-1.0)
    env, results = step_responses(task, "a", "b", "Action: 7", "c", "d", "e")
    assert [result.action for result in results] == [
        None,
        None,
        7,
        None,
        None,
        5,
    ] and env.env.received_actions == [7, 5]
    assert [result.reward for result in results] == [-1.0, -1.0, 0.0, -1.0, -1.0, -1.0] and not any(
        result.done for result in results
    )
    assert task.on_invalid == Retry(2)


@pytest.mark.parametrize(
    "parse",
    [
        lambda text: None,
        lambda text: 1 / 0,
        lambda text: 99,
        lambda text: "6",
        lambda text: 6.0,
        lambda text: [6],
    ],
)
def test_environment_gets_valid_actions_only(parse):
    env, (result,) = step_responses(corridor(extract_action=parse, format_action=str), "Action: 6")
    assert (
        not result.valid
        and result.action == 5
        and env.env.received_actions == [5]
        and result.invalid_reason
    )


def test_turn_reward_includes_format_and_invalid_rewards():
    task = corridor(
        format_reward=lambda response: 0.125 * response.startswith("Action"), invalid_reward=-1.0
    )
    _, (valid, invalid) = step_responses(task, "Action: 7", "?")
    assert valid.reward == 0.125 and invalid.reward == -1.0


def test_legal_actions_match_the_action_mask():
    task = taxi()
    env = TextEnv(task)
    env.reset(seed=0)
    legal = env.legal_actions()
    assert (
        0 < len(legal) < 6
        and legal == np.flatnonzero(env.info["action_mask"]).tolist()
        and check_env(task, episodes=3).ok
    )
    assert env.step("nonsense").action == legal[0]


# --- baselines


def test_random_agent_depends_only_on_the_episode():
    task = blackjack()
    episodes, single = (
        play(task, RandomAgent(task, 3), 6, seed=10),
        play(task, RandomAgent(task, 3), 1, seed=10),
    )
    assert [t.response for t in episodes[0].turns] == [t.response for t in single[0].turns]
    assert [e.seed for e in episodes] == [episode_seed(10, i) for i in range(6)] and [
        e.index for e in episodes
    ] == list(range(6))
    repeated = play(task, RandomAgent(task, 3), 6, seed=10)
    assert [[(t.observation, t.response, t.reward) for t in e.turns] for e in episodes] == [
        [(t.observation, t.response, t.reward) for t in e.turns] for e in repeated
    ]
    assert play(task, RandomAgent(task), 0).__len__() == 0


def test_baseline_episodes_are_complete(tmp_path):
    task = blackjack()
    buffer = play(task, ScriptedAgent(task, basic_strategy), 30)
    for episode in buffer:
        assert (
            episode.env_id == "Blackjack-v1"
            and episode.system_prompt == task.system_prompt
            and episode.terminated
        )
        assert episode.total_reward in (-1, 0, 1) and task.success(episode) == (
            episode.total_reward == 1
        )
        assert [t.terminated for t in episode.turns] == [False] * (len(episode) - 1) + [
            True
        ] and episode.final_observation is None
        assert all(
            t.response == task.format_action(t.action) and t.valid and list(t.response_ids) == []
            for t in episode.turns
        )
    buffer.save(tmp_path / "e.parquet")
    assert len(type(buffer).load(tmp_path / "e.parquet")) == 30


def test_random_text_actions_are_valid():
    class Echo(gym.Env):
        action_space, observation_space = (
            spaces.Text(8, charset="ab \n"),
            spaces.Text(8, charset="ab \nsy"),
        )

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return "say", {}

        def step(self, action):
            return action, 0.0, True, False, {}

    task = for_env(Echo, on_invalid="terminate")
    assert check_env(task).ok
    assert all(t.valid for e in play(task, RandomAgent(task), 20) for t in e.turns)


@pytest.mark.parametrize(
    "task, lowest, highest",
    [(frozen_lake(False), 1, 1), (cliff_walking(), -13, -13), (taxi(), 1, 20)],
    ids=["lake", "cliff", "taxi"],
)
def test_optimal_policies_reach_the_optimal_returns(task, lowest, highest):
    returns = [e.total_reward for e in play(task, ScriptedAgent(task, optimal_policy(task)), 30)]
    assert (
        lowest <= min(returns)
        and max(returns) <= highest
        and all(task.success(e) for e in play(task, ScriptedAgent(task, optimal_policy(task)), 3))
    )


# --- legacy environments


class LegacyCorridor:
    """An environment with the 4-tuple interface"""

    action_space, observation_space = spaces.Discrete(2), spaces.Discrete(100)
    seeds: list = []

    def seed(self, seed):
        self.seeds.append(seed)

    def reset(self):
        self.n = 0
        return 0

    def step(self, action):
        self.n += 1
        return (
            self.n,
            1,
            self.n >= 3,
            {"TimeLimit.truncated": True} if self.n >= 3 and action else {},
        )

    def close(self):
        pass

    def render(self):
        return "picture"


def test_legacy_environments_are_adapted():
    env = LegacyGymEnv(LegacyCorridor())
    assert (
        env.reset(seed=5) == (0, {}) and LegacyCorridor.seeds == [5] and env.render() == "picture"
    )
    env.step(0)
    env.step(0)
    assert env.step(1) == (3, 1.0, False, True, {"TimeLimit.truncated": True})
    env.reset()
    env.step(0)
    env.step(0)
    assert env.step(0)[2:4] == (True, False)
    assert check_env(for_env(lambda: LegacyGymEnv(LegacyCorridor()))).ok


# --- check_env


def failed_checks(task) -> dict[str, str]:
    return {
        check.name: check.detail for check in check_env(task, max_steps=30).checks if not check.ok
    }


def test_check_env_finds_each_problem():
    assert (
        "hold the whole state"
        in failed_checks(corridor(format_observation=lambda obs, info: "?"))[
            "different observations have different texts"
        ]
    )
    assert (
        "is formatted as 'hm', which is invalid"
        in failed_checks(corridor(format_action=lambda a: "hm"))[
            "every legal action is extracted from its own response"
        ]
    )
    assert (
        "from which 5 is extracted"
        in failed_checks(corridor(extract_action=lambda text: 5))[
            "every legal action is extracted from its own response"
        ]
    )
    assert (
        "the action 5 was extracted from the empty response"
        in failed_checks(corridor(extract_action=lambda text: 5))[
            "a response without an action is rejected"
        ]
    )
    assert (
        "give the task max_steps"
        in failed_checks(corridor(extract_action=lambda text: 6, format_action=str))["episodes end"]
    )
    assert (
        "expected text, got int"
        in failed_checks(corridor(format_observation=lambda obs, info: 3))[
            "random episodes can be played"
        ]
    )
    assert (
        "expected text"
        in failed_checks(corridor(format_observation=lambda obs, info: " "))[
            "observations become text"
        ]
    )

    class InvalidResults(Corridor):
        def step(self, action):
            return self.at + 50, float("nan"), True, False, {}

    assert set(failed_checks(InvalidResults)) == {
        "observations are in the observation space",
        "rewards are finite numbers",
    }

    class Unseeded(Corridor):
        observation_space = spaces.Discrete(10**9)

        def reset(self, *, seed=None, options=None):
            super().reset()
            return int(np.random.default_rng().integers(10**9)), {}

    assert (
        "two episodes with seed 0 differ in step 0"
        in failed_checks(Unseeded)["the same seed gives the same episode"]
    )

    class Broken(Corridor):
        def step(self, action):
            raise RuntimeError("the door is stuck")

    (failure,) = failed_checks(Broken).items()
    assert failure[0] == "random episodes can be played"
    assert failure[1].startswith("RuntimeError: the door is stuck; after the response 'Action: ")
    assert "give the task legal_actions=" in failure[1]


def test_check_env_report_is_displayed_and_raises():
    report = check_env(blackjack())
    assert str(report).startswith(
        "Blackjack-v1: all 11 checks passed\nok "
    ) and "user: You: " in str(report)
    assert report._repr_markdown_().count("| ✓ |") == 11 and report.raise_for_failures() is report
    with pytest.raises(ValueError, match="FAILED  every legal action"):
        check_env(corridor(format_action=lambda a: "hm"), max_steps=30, raise_on_failure=True)


def test_task_context_can_be_a_window():
    assert corridor(context=Window(3)).context == Window(3)
