"Invalid input to tasks and exact returns raises errors that name the value given, the value expected and the fix."

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from llamagym.agents.exact import blackjack_return, by_state
from llamagym.envs.actions import (
    DiscreteActions,
    ObservationFormatter,
    actions_for,
    after_label,
    format_space_value,
)
from llamagym.envs.adapters import LegacyGymEnv
from llamagym.envs.baselines import RandomAgent, ScriptedAgent, play
from llamagym.envs.check import check_env
from llamagym.envs.exact import optimal_value
from llamagym.envs.registry import for_env, get_task
from llamagym.envs.task import Retry, Task
from llamagym.envs.text_env import TextEnv
from llamagym.envs.toy_text import (
    BLACKJACK_ACTIONS,
    blackjack,
    frozen_lake,
    optimal_policy,
)


def make_task(**changes) -> Task:
    fields = dict(
        env="Blackjack-v1",
        format_observation=lambda obs, info: str(obs),
        extract_action=BLACKJACK_ACTIONS.extract_action,
        format_action=BLACKJACK_ACTIONS.format_action,
        system_prompt="",
    )
    return Task(**(fields | changes))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(env=3), TypeError, "env=3: expected an id, a factory or a gymnasium.Env, got int"),
        (dict(format_observation=None), TypeError, "format_observation=None: expected a function"),
        (dict(extract_action="int"), TypeError, "extract_action='int': expected a function"),
        (dict(success=1), TypeError, "success=1: expected a function or None"),
        (
            dict(legal_actions=[0, 1]),
            TypeError,
            'legal_actions=[0, 1]: expected a function, "all" or None',
        ),
        (dict(system_prompt=5), TypeError, "system_prompt=5: expected text or None"),
        (
            dict(on_invalid="ignore"),
            ValueError,
            'on_invalid=\'ignore\': expected "fallback", "terminate" or Retry(n)',
        ),
        (dict(context=4), ValueError, 'context=4: expected "full" or Window(k)'),
        (dict(history="full"), ValueError, 'history=\'full\': expected "append" or "template"'),
        (
            dict(max_steps=0),
            ValueError,
            "max_steps=0: expected a whole number of at least 1, or None",
        ),
        (
            dict(invalid_reward=float("nan")),
            ValueError,
            "invalid_reward=nan: expected a finite number",
        ),
    ],
)
def test_task_fields_raise(changes, error, message):
    with pytest.raises(error) as caught:
        make_task(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("attempts", [0, -1, 1.5, True, "2"])
def test_retry_attempts_raise(attempts):
    with pytest.raises(ValueError, match="expected a whole number of at least 1"):
        Retry(attempts)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: get_task("Blackjak-v1"),
            "unknown environment 'Blackjak-v1': did you mean 'Blackjack-v1'?",
        ),
        (lambda: get_task("taxi"), "did you mean 'Taxi-v4'?"),
        (lambda: get_task("Taxi-v3"), "did you mean 'Taxi-v4'?"),
        (lambda: get_task("qqqqqqqq"), "unknown environment 'qqqqqqqq': Ready tasks: Blackjack-v1"),
        (
            lambda: get_task(None),
            "None: expected a Task, an environment id, a factory or a gymnasium.Env, got NoneType",
        ),
        (lambda: get_task(dict), "made a dict: expected a gymnasium.Env"),
        (lambda: make_task(env=lambda: None).make(), "made a NoneType: expected a gymnasium.Env"),
        (lambda: frozen_lake(map_name="5x5"), 'map_name=\'5x5\': expected "4x4" or "8x8"'),
        (
            lambda: for_env("CartPole-v1", action_names=("left",)),
            "1 action names for Discrete(2): expected 2",
        ),
        (
            lambda: for_env("CartPole-v1", colour="red"),
            "['colour'] are no fields of Task: expected env, format_observation",
        ),
        (lambda: for_env("Pendulum-v1"), "no text format for the action space Box"),
        (
            lambda: actions_for(spaces.Text(3), ["a"]),
            "only the actions of a Discrete space have names",
        ),
        (lambda: DiscreteActions(()), "names is empty"),
        (lambda: DiscreteActions(("up", "Up")), "'Up' names both action 0 and action 1"),
        (
            lambda: DiscreteActions(("1", "0")),
            "action 0 has the name '1': a number can only be the name of itself",
        ),
        (
            lambda: DiscreteActions(("a", "!")),
            "action 1 has the name '!': expected at least one letter or digit",
        ),
        (lambda: BLACKJACK_ACTIONS.format_action(2), "action 2: expected 0 to 1"),
        (lambda: BLACKJACK_ACTIONS.format_action("hit"), "action 'hit': expected an int, got str"),
        (lambda: BLACKJACK_ACTIONS.format_action(True), "action True: expected an int, got bool"),
        (
            lambda: BLACKJACK_ACTIONS.extract_action(None),
            "a response is text: expected str, got NoneType",
        ),
        (lambda: after_label(b"Action: 1"), "expected str, got bytes"),
        (
            lambda: actions_for(spaces.MultiDiscrete([2, 2])).format_action([1]),
            "expected shape (2,), got (1,)",
        ),
        (
            lambda: actions_for(spaces.MultiDiscrete([2, 2])).extract_action("Action: 1"),
            '"Action: " and 2 numbers, as in "Action: 0 0"',
        ),
        (
            lambda: actions_for(spaces.MultiDiscrete([2, 2])).extract_action("Action: 1 2"),
            "[1, 2] in 'Action: 1 2' is not an action",
        ),
        (
            lambda: actions_for(spaces.MultiDiscrete([2, 2])).extract_action("I take 1 1 now"),
            'no "Action:"',
        ),
        (lambda: actions_for(spaces.Text(5)).format_action("too long a text"), "is not an action"),
        (
            lambda: actions_for(spaces.Text(20, charset="ab \n")).format_action("a\nb"),
            "can't be stated as an action",
        ),
        (lambda: actions_for(spaces.Text(5)).format_action(5), "5 can't be stated as an action"),
        (
            lambda: format_space_value(spaces.Box(0, 255, (8, 9), np.uint8), np.zeros((8, 9))),
            "72 numbers in Box",
        ),
        (
            lambda: ObservationFormatter(spaces.Box(0, 1, (2,)), ("x",))(np.zeros(2), {}),
            "1 labels for 2 entries",
        ),
        (
            lambda: format_space_value(spaces.Sequence(spaces.Discrete(2)), (1,)),
            "no text format for Sequence",
        ),
        (
            lambda: play(blackjack(), RandomAgent(blackjack()), -1),
            "episodes=-1: expected a whole number of at least 0",
        ),
        (
            lambda: check_env(blackjack(), episodes=0),
            "episodes=0: expected a whole number of at least 1",
        ),
        (
            lambda: ScriptedAgent(blackjack(), "hit"),
            "choose='hit': expected a function of (obs, info)",
        ),
        (lambda: optimal_policy("Blackjack-v1"), "Blackjack-v1 publishes no transition table"),
        (
            lambda: optimal_policy("FrozenLake-v1", gamma=1.0),
            "gamma=1.0: expected at least 0 and below 1",
        ),
        (lambda: optimal_value("CliffWalking-v1-typo"), "unknown environment"),
        (
            lambda: optimal_value(gym.make("CliffWalking-v1").unwrapped, 0),
            "horizon=0: expected a whole number of at least 1",
        ),
        (
            lambda: blackjack_return(lambda histories: [0]),
            "choose gave 1 actions for 270 histories: expected one each",
        ),
        (lambda: blackjack_return(by_state(lambda obs: None)), "expected 0 (stick) or 1 (hit)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_task_calls_raise(call, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert message in str(caught.value)


def test_fallback_outside_the_space_raises():
    class TextActionEnv(gym.Env):
        action_space = observation_space = spaces.Text(8)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return "say", {}

        def step(self, action):
            return action, 0.0, True, False, {}

    env = TextEnv(for_env(TextActionEnv, fallback=lambda obs, info: 5))
    env.reset()
    with pytest.raises(ValueError, match="the fallback 5 is not in Text"):
        env.step("")
    env = TextEnv(for_env(TextActionEnv, legal_actions=lambda obs, info: []))
    env.reset()
    with pytest.raises(ValueError, match="legal_actions gave no action for 'say'"):
        env.step("")


def test_legacy_environment_raises():
    class Old:
        action_space, observation_space = "two", spaces.Discrete(2)

        def reset(self):
            return 0

        def step(self, action):
            return 0, 0.0, True, False, {}

    with pytest.raises(
        TypeError,
        match="action_space is 'two': expected a gymnasium space. Pass action_space= to LegacyGymEnv",
    ):
        LegacyGymEnv(Old())
    env = LegacyGymEnv(Old(), action_space=spaces.Discrete(2))
    env.reset()
    with pytest.raises(
        ValueError, match="step returned 5 values: expected obs, reward, done, info"
    ):
        env.step(0)


def test_check_env_reports_an_environment_error():
    class Broken(gym.Env):
        action_space = observation_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            raise RuntimeError("no power")

    report = check_env(Broken)
    assert not report.ok and "RuntimeError: no power" in str(report)
    with pytest.raises(ValueError, match="no power"):
        check_env(Broken, raise_on_failure=True)
