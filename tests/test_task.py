"The words of environments: replies to actions and back, invalid replies, players, `check_env`."
import functools
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagym.actions import DiscreteActions, SpaceDescriber, actions_for, enumerate_actions, space_text, stated
from llamagym.chat import window
from llamagym.check import check_env
from llamagym.env import OldGymEnv, episode_seed, tabular_model
from llamagym.task import (
    BLACKJACK_ACTIONS, LAKE_ACTIONS, TASKS, TAXI_ACTIONS, RandomAgent, Retry, ScriptedAgent, Task, TextEnv, basic_strategy, blackjack,
    cliff_walking, describe_blackjack, describe_taxi, for_env, frozen_lake, get_task, masked_actions, optimal_policy, play, retry, taxi)

READY = {"blackjack": blackjack, "lake": frozen_lake, "dry lake": functools.partial(frozen_lake, False),
         "big lake": functools.partial(frozen_lake, map_name="8x8"), "cliff": cliff_walking, "taxi": taxi}


class Corridor(gym.Env):
    "Walk right to the end; actions 5, 6, 7 are left, stay, right"
    action_space, observation_space = spaces.Discrete(3, start=5), spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.given = 0, []
        return self.at, {}

    def step(self, action):
        self.given.append(action)
        self.at = min(3, max(0, self.at + action - 6))
        return self.at, float(self.at == 3), self.at == 3, False, {}


def corridor(**overrides) -> Task:
    return for_env(Corridor, **overrides)


# --- replies

@pytest.mark.parametrize("reply, action", [
    ("Action: hit", 1), ("Action: stick", 0), ("action: HIT", 1), ("Action: 1", 1), ("Action:0", 0), ("Action = hit", 1), ("hit", 1), ("Hit.", 1),
    ("  1\n", 1), ("**Action:** hit", 1), ("Action: **hit**", 1), ("Action: [1]", 1), ('{"action": "hit"}', 1), ('{"action": 1, "sure": 0.9}', 1),
    ("Action: stick\nNo: 12 is low.\nAction: hit", 1), ("Rather than Action: 0, Action: 1", 1), ("Action:\nhit", 1), ("Action: 1.", 1),
    ("Action: hit (1)", 1), ("Action: hit, since sticking loses", 1), ("Action: hit\n0 cards would be too few", 1), ("Action: I will hit", 1),
    ("Action: stand", 0), ("Action: hit, 16 is low", 1), ("Action: hit 2 more times", 1), ("I have 10 and the dealer 1.\nAction: stick", 0)])
def test_blackjack_replies(reply, action):
    assert BLACKJACK_ACTIONS.parse(reply) == action


@pytest.mark.parametrize("reply, why", [
    ("", "no action in ''"), ("I am not sure", "no action"), ("I hit it", "says more than an action"), ("Action:", "nothing follows"),
    ("Action: hit\nAction:", "nothing follows"), ("Action: 10", "10 is not an action"), ("Action: -1", "-1 is not an action"),
    ("Action: 1.5", "1.5 is not an action"), ("Action: 2", "2 is not an action"), ("Action: fold", "'fold' does not start with an action"),
    ("Action: hit or stick", "several actions (hit, stick)"), ("Action: 0/1", "several actions (0, 1)"), ("hit, stick", "several actions"),
    ("Action: 1 (stick)", "several actions"), ("Action: hitting", "does not start"), ("Reaction: hit", "no action"), ("Action: don't hit", "does not start"),
    ("Action: hit\nAction: fold", "'fold' does not start"), ("١", "no action")])
def test_unclear_replies_say_why(reply, why):
    with pytest.raises(ValueError) as error: BLACKJACK_ACTIONS.parse(reply)
    assert why in str(error.value) and '"Action: " and one of stick (0), hit (1)' in str(error.value)


def test_long_replies_are_shortened_in_errors():
    with pytest.raises(ValueError) as error: BLACKJACK_ACTIONS.parse("hm " * 1000)
    assert len(str(error.value)) < 200


def test_names_of_several_words_and_prefixes():
    words = DiscreteActions(("go", "go north", "pick-up"))
    assert [words.parse(f"Action: {name}") for name in ("go", "Go  North", "go_north", "pick up")] == [0, 1, 1, 2]
    assert [words.parse(words.text(a)) for a in range(3)] == [0, 1, 2]
    assert TAXI_ACTIONS.parse("Action: pickup") == 4 and LAKE_ACTIONS.parse("Action: move left") == 0


@given(st.integers(-20, 20), st.integers(1, 30), st.data())
def test_numbers_round_trip(start, n, data):
    words = actions_for(spaces.Discrete(n, start=start))
    action = data.draw(st.integers(start, start + n - 1))
    assert words.parse(words.text(action)) == words.parse(f"Not {start}, no.\nAction: {action}. That is it") == action
    outside = data.draw(st.integers(start + n, start + n + 100))
    with pytest.raises(ValueError, match="not an action"): words.parse(f"Action: {outside}")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
@settings(max_examples=50)
def test_rows_of_numbers_round_trip(nvec, data):
    space = spaces.MultiDiscrete(nvec, start=[data.draw(st.integers(-3, 3)) for _ in nvec])
    words = actions_for(space)
    action = np.array([data.draw(st.integers(s, s + n - 1)) for s, n in zip(space.start.tolist(), nvec)])
    back = words.parse("I think 7.\n" + words.text(action))
    assert np.array_equal(back, action) and space.contains(back)
    assert len(enumerate_actions(space)) == np.prod(nvec)


def test_rows_of_numbers_of_any_shape():
    for space in (spaces.MultiBinary(3), spaces.MultiBinary([2, 2]), spaces.MultiDiscrete([[2, 3], [4, 5]])):
        words = actions_for(space)
        for action in enumerate_actions(space): assert np.array_equal(words.parse(words.text(action)), action)
    assert actions_for(spaces.MultiBinary(3)).parse('{"action": [1, 0, 1]}').tolist() == [1, 0, 1]


@given(st.text(max_size=40))
def test_text_actions_round_trip_or_refuse(command):
    words = actions_for(spaces.Text(50, charset=frozenset("abc :A\nction")))
    try: reply = words.text(command)
    except ValueError: return
    assert words.parse("Action: old\n" + reply) == command


@given(st.text(max_size=60))
def test_no_reply_breaks_a_parser(text):
    for words in (BLACKJACK_ACTIONS, TAXI_ACTIONS, actions_for(spaces.MultiDiscrete([3, 3])), actions_for(spaces.Text(20))):
        for reply in (text, "Action: " + text):
            try: assert words.parse(reply) is not None
            except ValueError as error: assert "expected" in str(error)


def test_stated():
    assert stated("Action: a\nANSWER: b", "answer") == " b" and stated("nothing") is None


# --- observations

def test_blackjack_words_hold_the_state():
    states = [(t, d, u) for t in range(4, 22) for d in range(1, 11) for u in (0, 1)]
    assert len({describe_blackjack(s) for s in states}) == len(states)
    assert describe_blackjack((14, 1, 0)) == "You: hard 14. Dealer: ace." and describe_blackjack((18, 7, 1)) == "You: soft 18. Dealer: 7."


def test_taxi_words_hold_the_state():
    bare = gym.make("Taxi-v4").unwrapped
    assert len({describe_taxi(s) for s in range(500)}) == 500
    for row, column, passenger, destination in [(0, 4, 4, 3), (3, 1, 2, 0)]:
        text = describe_taxi(bare.encode(row, column, passenger, destination))
        assert text == (f"Row {row + 1}, column {column + 1}. Passenger: {['red', 'green', 'yellow', 'blue', 'taxi'][passenger]}. "
                        f"Destination: {['red', 'green', 'yellow', 'blue'][destination]}.")


def test_taxi_prompt_tells_the_truth():
    "The walls and stops in the prompt are those of the environment"
    bare, model = gym.make("Taxi-v4").unwrapped, tabular_model(gym.make("Taxi-v4"))
    assert bare.locs == [(0, 0), (0, 4), (4, 0), (4, 3)]
    walls = {(row, column) for row in range(5) for column in range(4)
             if model.following[bare.encode(row, column, 0, 1), 2, 0] == bare.encode(row, column, 0, 1)}
    assert walls == {(0, 1), (1, 1), (3, 0), (4, 0), (3, 2), (4, 2)}


def test_words_for_every_space():
    assert space_text(spaces.Box(-1, 1, (2,)), np.array([0.12345, -1.0], np.float32)) == "0.123 -1"
    assert space_text(spaces.Tuple((spaces.Discrete(3), spaces.Text(5))), (2, "ab")) == "2, ab"
    assert space_text(spaces.MultiBinary(3), np.array([1, 0, 1], np.int8)) == "1 0 1"
    assert SpaceDescriber(spaces.Discrete(4))(np.int64(3), {}) == "Observation: 3."
    assert SpaceDescriber(spaces.Text(20))("You see a door.", {}) == "You see a door."
    assert SpaceDescriber(spaces.Box(0, 1, (2,)), ("x", "speed"))(np.array([0.5, 1.0]), {}) == "x: 0.5. speed: 1."


# --- tasks

@pytest.mark.parametrize("name", READY)
def test_ready_tasks_pass_their_checks(name):
    task = READY[name]()
    report = check_env(task, episodes=10)
    assert report.ok, str(report)
    assert len(task.system_prompt.split()) <= (25 if name == "blackjack" else 80)
    legal = task.legal(0, {}, task.make().action_space)
    assert [task.parse(task.action_text(a)) for a in legal] == legal
    assert pickle.loads(pickle.dumps(task)).system_prompt == task.system_prompt


def test_time_limits():
    assert get_task(gym.make("CliffWalking-v1", max_episode_steps=50)).make().spec.max_episode_steps == 50
    assert cliff_walking().make().spec.max_episode_steps == 100 and cliff_walking(7).make().spec.max_episode_steps == 7
    assert frozen_lake().make().spec.max_episode_steps == 100 and frozen_lake(map_name="8x8").make().spec.max_episode_steps == 200
    episode = play(corridor(max_steps=5), ScriptedAgent(corridor(), lambda obs, info: 6), 1)[0]
    assert len(episode) == 5 and episode.truncated and not episode.terminated and episode.final_observation == "Observation: 0."


def test_env_as_id_factory_or_instance():
    made = gym.make("FrozenLake-v1", is_slippery=False)
    for env in ("FrozenLake-v1", lambda: gym.make("FrozenLake-v1"), made):
        task = get_task(env)
        assert task.name == "FrozenLake-v1" and not task.single and task.make() is not task.make()
        assert ("slippery" in task.system_prompt) == (env is not made)
    assert task.make().unwrapped.spec.kwargs["is_slippery"] is False
    bare = Corridor()
    assert for_env(bare).single and for_env(bare).make() is bare

    class Plain(gym.Wrapper): "cannot be recorded, so cannot be made again"
    wrapped = Plain(made)
    assert for_env(wrapped).single and for_env(wrapped).make() is wrapped


def test_a_given_instance_stays_open():
    class Closing(Corridor):
        def close(self): raise AssertionError("closed")
    play(for_env(Closing(), max_steps=3), RandomAgent(corridor()), 2)


def test_spaces_too_large_to_list():
    class Big(gym.Env):
        action_space, observation_space = spaces.MultiDiscrete([10] * 6), spaces.Discrete(2)
        def reset(self, *, seed=None, options=None): super().reset(seed=seed); return 0, {}
        def step(self, action): return 1, 0.0, True, False, {}
    task = for_env(Big)
    assert enumerate_actions(Big.action_space) is None and enumerate_actions(spaces.Discrete(10**6)) is None and check_env(task).ok
    env = TextEnv(task)
    env.reset()
    assert env.step("?").action.tolist() == [0] * 6
    assert len({e.turns[0].response for e in play(task, RandomAgent(task), 20)}) == 20


def test_registry():
    for env_id in TASKS: assert get_task(env_id).name == env_id
    assert get_task("Blackjack-v1").reference_returns["optimal"] == -0.0431    # registered with sab=True
    assert blackjack().reference_returns["optimal"] == -0.0466 and blackjack(natural=True).reference_returns["optimal"] == -0.0257
    assert blackjack(sab=True, natural=True).reference_returns == blackjack(sab=True).reference_returns
    assert get_task(gym.make("FrozenLake-v1", desc=["SFG"])).reference_returns == {}
    task = blackjack()
    assert get_task(task) is task
    assert get_task("MountainCar-v0").system_prompt == "You act in MountainCar-v0. Reply Action: and one of 0, 1, 2."


def test_task_shows_itself():
    shown = frozen_lake()._repr_markdown_()
    assert "Map: SFFF" in shown and "optimal 0.7442" in shown


# --- invalid replies

def outcomes(task: Task, *replies: str):
    env = TextEnv(task)
    env.reset(seed=0)
    return env, [env.step(reply) for reply in replies]


def test_fallback_is_a_legal_action():
    env, (first, second) = outcomes(corridor(invalid_reward=-0.25), "nonsense", "Action: 7")
    assert (first.action, first.valid, first.reward) == (5, False, -0.25) and "no action in 'nonsense'" in first.invalid_reason
    assert isinstance(first.error, ValueError) and (second.action, second.valid, second.error) == (7, True, None)
    assert env.env.given == [5, 7]
    env, (first,) = outcomes(corridor(fallback=lambda obs, info: 7), "nonsense")
    assert first.action == 7 and env.observation == "Observation: 1."


def test_terminate_leaves_the_environment_alone():
    env, (out,) = outcomes(corridor(on_invalid="terminate", invalid_reward=-1.0), "nonsense")
    assert out.terminated and not out.truncated and out.action is None and out.reward == -1.0 and env.env.given == []


def test_retry_counts_per_observation():
    task = corridor(on_invalid=retry(2), invalid_reward=-1.0)
    env, outs = outcomes(task, "a", "b", "Action: 7", "c", "d", "e")
    assert [o.action for o in outs] == [None, None, 7, None, None, 5] and env.env.given == [7, 5]
    assert [o.reward for o in outs] == [-1.0, -1.0, 0.0, -1.0, -1.0, -1.0] and not any(o.done for o in outs)
    assert task.on_invalid == Retry(2)


@pytest.mark.parametrize("parse", [lambda text: None, lambda text: 1 / 0, lambda text: 99, lambda text: "6", lambda text: 6.0, lambda text: [6]])
def test_the_environment_gets_actions_only(parse):
    env, (out,) = outcomes(corridor(parse=parse, action_text=str), "Action: 6")
    assert not out.valid and out.action == 5 and env.env.given == [5] and out.invalid_reason


def test_rewards_of_the_turn():
    task = corridor(format_reward=lambda reply: 0.125 * reply.startswith("Action"), invalid_reward=-1.0)
    _, (good, bad) = outcomes(task, "Action: 7", "?")
    assert good.reward == 0.125 and bad.reward == -1.0


def test_legal_actions():
    task = taxi()
    task.legal_actions = masked_actions
    env = TextEnv(task)
    env.reset(seed=0)
    legal = env.legal_actions()
    assert 0 < len(legal) < 6 and legal == np.flatnonzero(env.info["action_mask"]).tolist() and check_env(task, episodes=3).ok
    assert env.step("nonsense").action == legal[0]


# --- players

def test_streams_belong_to_episodes():
    task = blackjack()
    many, alone = play(task, RandomAgent(task, 3), 6, seed=10), play(task, RandomAgent(task, 3), 1, seed=10)
    assert [t.response for t in many[0].turns] == [t.response for t in alone[0].turns]
    assert [e.seed for e in many] == [episode_seed(10, i) for i in range(6)] and [e.index for e in many] == list(range(6))
    again = play(task, RandomAgent(task, 3), 6, seed=10)
    assert [[(t.observation, t.response, t.reward) for t in e.turns] for e in many] == [[(t.observation, t.response, t.reward) for t in e.turns] for e in again]
    assert play(task, RandomAgent(task), 0).__len__() == 0


def test_transcripts_are_complete(tmp_path):
    task = blackjack()
    buffer = play(task, ScriptedAgent(task, basic_strategy), 30)
    for episode in buffer:
        assert episode.env_id == "Blackjack-v1" and episode.system_prompt == task.system_prompt and episode.terminated
        assert episode.total_reward in (-1, 0, 1) and task.success(episode) == (episode.total_reward == 1)
        assert [t.terminated for t in episode.turns] == [False] * (len(episode) - 1) + [True] and episode.final_observation is None
        assert all(t.response == task.action_text(t.action) and t.valid and list(t.response_ids) == [] for t in episode.turns)
    buffer.save(tmp_path / "e.parquet")
    assert len(type(buffer).load(tmp_path / "e.parquet")) == 30


def test_random_text_actions():
    class Echo(gym.Env):
        action_space, observation_space = spaces.Text(8, charset="ab \n"), spaces.Text(8, charset="ab \nsy")
        def reset(self, *, seed=None, options=None): super().reset(seed=seed); return "say", {}
        def step(self, action): return action, 0.0, True, False, {}
    task = for_env(Echo, on_invalid="terminate")
    assert check_env(task).ok
    assert all(t.valid for e in play(task, RandomAgent(task), 20) for t in e.turns)


@pytest.mark.parametrize("task, worst, best", [(frozen_lake(False), 1, 1), (cliff_walking(), -13, -13), (taxi(), 1, 20)], ids=["lake", "cliff", "taxi"])
def test_optimal_teachers(task, worst, best):
    returns = [e.total_reward for e in play(task, ScriptedAgent(task, optimal_policy(task)), 30)]
    assert worst <= min(returns) and max(returns) <= best and all(task.success(e) for e in play(task, ScriptedAgent(task, optimal_policy(task)), 3))


# --- old environments

class OldCorridor:
    "The 4-tuple interface"
    action_space, observation_space = spaces.Discrete(2), spaces.Discrete(100)
    seeds: list = []
    def seed(self, seed): self.seeds.append(seed)
    def reset(self): self.n = 0; return 0
    def step(self, action): self.n += 1; return self.n, 1, self.n >= 3, {"TimeLimit.truncated": True} if self.n >= 3 and action else {}
    def close(self): pass
    def render(self): return "picture"


def test_old_environments():
    env = OldGymEnv(OldCorridor())
    assert env.reset(seed=5) == (0, {}) and OldCorridor.seeds == [5] and env.render() == "picture"
    env.step(0); env.step(0)
    assert env.step(1) == (3, 1.0, False, True, {"TimeLimit.truncated": True})
    env.reset(); env.step(0); env.step(0)
    assert env.step(0)[2:4] == (True, False)
    assert check_env(for_env(lambda: OldGymEnv(OldCorridor()))).ok


# --- check_env

def failures(task) -> dict[str, str]:
    return {check.name: check.detail for check in check_env(task, max_steps=30).checks if not check.ok}


def test_check_env_finds_what_is_wrong():
    assert "hold the whole state" in failures(corridor(describe=lambda obs, info: "?"))["different observations have different texts"]
    assert "not understood" in failures(corridor(action_text=lambda a: "hm"))["every legal action can be said and is read back"]
    assert "read as 5" in failures(corridor(parse=lambda text: 5))["every legal action can be said and is read back"]
    assert "was read as 5" in failures(corridor(parse=lambda text: 5))["a reply without an action is refused"]
    assert "give the task max_steps" in failures(corridor(parse=lambda text: 6, action_text=str))["episodes end"]
    assert "expected text, got int" in failures(corridor(describe=lambda obs, info: 3))["random episodes can be played"]
    assert "expected words" in failures(corridor(describe=lambda obs, info: " "))["observations become text"]

    class Odd(Corridor):
        def step(self, action): return self.at + 50, float("nan"), True, False, {}
    assert set(failures(Odd)) == {"observations are in the observation space", "rewards are finite numbers"}

    class Unseeded(Corridor):
        observation_space = spaces.Discrete(10**9)
        def reset(self, *, seed=None, options=None): super().reset(); return int(np.random.default_rng().integers(10**9)), {}
    assert "two episodes with seed 0 differ in step 0" in failures(Unseeded)["the same seed gives the same episode"]

    class Broken(Corridor):
        def step(self, action): raise RuntimeError("the door is stuck")
    assert failures(Broken) == {"random episodes can be played": "RuntimeError: the door is stuck"}


def test_check_env_reports():
    report = check_env(blackjack())
    assert str(report).startswith("Blackjack-v1: all 10 checks passed\nok ") and "user: You: " in str(report)
    assert report._repr_markdown_().count("| ✓ |") == 10 and report.raise_for_failures() is report
    with pytest.raises(ValueError, match="FAILED  every legal action"):
        check_env(corridor(action_text=lambda a: "hm"), max_steps=30, raise_on_failure=True)


def test_context_is_full_or_a_window():
    assert corridor(context=window(3)).context == window(3)
