"Wrong input to tasks and exact returns: the errors say what was given, what was expected and what to do."
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from llamagym.actions import DiscreteActions, SpaceDescriber, actions_for, space_text, stated
from llamagym.check import check_env
from llamagym.env import OldGymEnv
from llamagym.exact import blackjack_return, by_state, optimal_value
from llamagym.task import (
    BLACKJACK_ACTIONS, RandomAgent, ScriptedAgent, Task, TextEnv, blackjack, for_env, frozen_lake, get_task, masked_actions, optimal_policy,
    play, retry)


def make_task(**changes) -> Task:
    fields = dict(env="Blackjack-v1", describe=lambda obs, info: str(obs), parse=BLACKJACK_ACTIONS.parse, action_text=BLACKJACK_ACTIONS.text, system_prompt="")
    return Task(**(fields | changes))


@pytest.mark.parametrize("changes, error, message", [
    (dict(env=3), TypeError, "env=3: expected an id, a factory or a gymnasium.Env, got int"),
    (dict(describe=None), TypeError, "describe=None: expected a function"),
    (dict(parse="int"), TypeError, "parse='int': expected a function"),
    (dict(success=1), TypeError, "success=1: expected a function or None"),
    (dict(system_prompt=5), TypeError, "system_prompt=5: expected text or None"),
    (dict(on_invalid="ignore"), ValueError, 'on_invalid=\'ignore\': expected "fallback", "terminate" or retry(n)'),
    (dict(context=4), ValueError, 'context=4: expected "full" or window(k)'),
    (dict(history="full"), ValueError, 'history=\'full\': expected "append" or "template"'),
    (dict(max_steps=0), ValueError, "max_steps=0: expected a whole number of at least 1, or None"),
    (dict(invalid_reward=float("nan")), ValueError, "invalid_reward=nan: expected a finite number")])
def test_fields(changes, error, message):
    with pytest.raises(error) as caught: make_task(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("attempts", [0, -1, 1.5, True, "2"])
def test_retry(attempts):
    with pytest.raises(ValueError, match="expected a whole number of at least 1"): retry(attempts)


@pytest.mark.parametrize("call, message", [
    (lambda: get_task("Blackjak-v1"), "unknown environment 'Blackjak-v1': did you mean 'Blackjack-v1'?"),
    (lambda: get_task("taxi"), "did you mean 'Taxi-v4'?"),
    (lambda: get_task("Taxi-v3"), "did you mean 'Taxi-v4'?"),
    (lambda: get_task("qqqqqqqq"), "unknown environment 'qqqqqqqq': Ready tasks: Blackjack-v1"),
    (lambda: get_task(None), "None: expected a Task, an environment id, a factory or a gymnasium.Env, got NoneType"),
    (lambda: get_task(dict), "made a dict: expected a gymnasium.Env"),
    (lambda: make_task(env=lambda: None).make(), "made a NoneType: expected a gymnasium.Env"),
    (lambda: frozen_lake(map_name="5x5"), 'map_name=\'5x5\': expected "4x4" or "8x8"'),
    (lambda: for_env("CartPole-v1", action_names=("left",)), "1 action names for Discrete(2): expected 2"),
    (lambda: for_env("CartPole-v1", colour="red"), "['colour'] are no fields of Task: expected env, describe"),
    (lambda: for_env("Pendulum-v1"), "no generic words for the action space Box"),
    (lambda: actions_for(spaces.Text(3), ["a"]), "only the actions of a Discrete space have names"),
    (lambda: DiscreteActions(()), "names is empty"),
    (lambda: DiscreteActions(("up", "Up")), "'Up' names both action 0 and action 1"),
    (lambda: DiscreteActions(("1", "0")), "action 0 has the name '1': a number can only be the name of itself"),
    (lambda: DiscreteActions(("a", "!")), "action 1 has the name '!': expected at least one letter or digit"),
    (lambda: BLACKJACK_ACTIONS.text(2), "action 2: expected 0 to 1"),
    (lambda: BLACKJACK_ACTIONS.text("hit"), "action 'hit': expected an int, got str"),
    (lambda: BLACKJACK_ACTIONS.text(True), "action True: expected an int, got bool"),
    (lambda: BLACKJACK_ACTIONS.parse(None), "a reply is text: expected str, got NoneType"),
    (lambda: stated(b"Action: 1"), "expected str, got bytes"),
    (lambda: actions_for(spaces.MultiDiscrete([2, 2])).text([1]), "expected shape (2,), got (1,)"),
    (lambda: actions_for(spaces.MultiDiscrete([2, 2])).parse("Action: 1"), '"Action: " and 2 numbers, as in "Action: 0 0"'),
    (lambda: actions_for(spaces.MultiDiscrete([2, 2])).parse("Action: 1 2"), "[1, 2] in 'Action: 1 2' is not an action"),
    (lambda: actions_for(spaces.MultiDiscrete([2, 2])).parse("I take 1 1 now"), 'no "Action:"'),
    (lambda: actions_for(spaces.Text(5)).text("too long a text"), "is not an action"),
    (lambda: actions_for(spaces.Text(20, charset="ab \n")).text("a\nb"), "can't be stated as an action"),
    (lambda: actions_for(spaces.Text(5)).text(5), "5 can't be stated as an action"),
    (lambda: space_text(spaces.Box(0, 255, (8, 9), np.uint8), np.zeros((8, 9))), "72 numbers in Box"),
    (lambda: SpaceDescriber(spaces.Box(0, 1, (2,)), ("x",))(np.zeros(2), {}), "1 labels for 2 entries"),
    (lambda: space_text(spaces.Sequence(spaces.Discrete(2)), (1,)), "no generic words for Sequence"),
    (lambda: masked_actions(0, {"prob": 1}), "no action_mask in the info: expected one, got ['prob']"),
    (lambda: play(blackjack(), RandomAgent(blackjack()), -1), "episodes=-1: expected a whole number of at least 0"),
    (lambda: check_env(blackjack(), episodes=0), "episodes=0: expected a whole number of at least 1"),
    (lambda: ScriptedAgent(blackjack(), "hit"), "choose='hit': expected a function of (obs, info)"),
    (lambda: optimal_policy("Blackjack-v1"), "Blackjack-v1 publishes no transition table"),
    (lambda: optimal_policy("FrozenLake-v1", gamma=1.0), "gamma=1.0: expected at least 0 and below 1"),
    (lambda: optimal_value("CliffWalking-v1-typo"), "unknown environment"),
    (lambda: optimal_value(gym.make("CliffWalking-v1").unwrapped, 0), "horizon=0: expected a whole number of at least 1"),
    (lambda: blackjack_return(lambda histories: [0]), "choose gave 1 actions for 270 histories: expected one each"),
    (lambda: blackjack_return(by_state(lambda obs: None)), "expected 0 (stick) or 1 (hit)"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_messages(call, message):
    with pytest.raises((ValueError, TypeError)) as caught: call()
    assert message in str(caught.value)


def test_no_way_to_fall_back():
    class Say(gym.Env):
        action_space = observation_space = spaces.Text(8)
        def reset(self, *, seed=None, options=None): super().reset(seed=seed); return "say", {}
        def step(self, action): return action, 0.0, True, False, {}
    env = TextEnv(for_env(Say))
    env.reset()
    with pytest.raises(ValueError, match='fallback=, legal_actions= or on_invalid="terminate"'): env.step("")
    env = TextEnv(for_env(Say, fallback=lambda obs, info: None))
    env.reset()
    with pytest.raises(ValueError, match="the fallback None is not in Text"): env.step("")
    env = TextEnv(for_env(Say, legal_actions=lambda obs, info: []))
    env.reset()
    with pytest.raises(ValueError, match="legal_actions gave no action for 'say'"): env.step("")


def test_old_environments():
    class Old:
        action_space, observation_space = "two", spaces.Discrete(2)
        def reset(self): return 0
        def step(self, action): return 0, 0.0, True, False, {}
    with pytest.raises(TypeError, match="action_space is 'two': expected a gymnasium space. Pass action_space= to OldGymEnv"): OldGymEnv(Old())
    env = OldGymEnv(Old(), action_space=spaces.Discrete(2))
    env.reset()
    with pytest.raises(ValueError, match="step gave 5 values: expected obs, reward, done, info"): env.step(0)


def test_an_environment_that_raises_is_reported_not_raised():
    class Broken(gym.Env):
        action_space = observation_space = spaces.Discrete(2)
        def reset(self, *, seed=None, options=None): raise RuntimeError("no power")
    report = check_env(Broken)
    assert not report.ok and "RuntimeError: no power" in str(report)
    with pytest.raises(ValueError, match="no power"): check_env(Broken, raise_on_failure=True)
