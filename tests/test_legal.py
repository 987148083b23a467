"""Illegal actions are invalid and never reach the environment; fallbacks are legal, and never made up."""

import dataclasses
import functools
import itertools
import re

import gymnasium as gym
import numpy as np
import pytest
from doubles import config, make_policy, tokenizer_of, users_model
from games import House, TicTacToe
from gymnasium import spaces
from walks import Walk

from llamagym.agent import Agent, InvalidResponse
from llamagym.agents.scored import ScoredAgent
from llamagym.config import Config
from llamagym.envs.actions import equal_values, is_among, masked_actions, sample_action
from llamagym.envs.adapters import LegacyGymEnv
from llamagym.envs.baselines import RandomAgent, play
from llamagym.envs.check import check_env
from llamagym.envs.exact import legal_table, optimal_value, random_value
from llamagym.envs.registry import for_env
from llamagym.envs.task import Retry, Task, parse_action
from llamagym.envs.text_env import TextEnv
from llamagym.envs.toy_text import taxi
from llamagym.rollout import collect

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action")


@pytest.fixture(scope="module")
def policy():
    return make_policy("lora")


# --- a board game with illegal actions


def free_cells(obs, info):
    return np.flatnonzero(obs == 0).tolist()


MASKS = ("info", "obs", "function")


def board_game(mask: str | None, **changes) -> Task:
    env = functools.partial(TicTacToe, mask if mask in ("info", "obs") else None)
    if mask == "function":
        changes = dict(legal_actions=free_cells) | changes
    return for_env(env, **changes)


class RandomText:
    """A policy over all nine actions, legal or not"""

    def __init__(self, task, seed=0):
        self.task, self.seed = task, seed

    def start(self, episode):
        self.rng = np.random.default_rng([self.seed, episode])

    def respond(self, env):
        return self.task.format_action(int(self.rng.integers(9)))


@pytest.mark.parametrize("mask", MASKS)
def test_illegal_responses_are_invalid_and_lose_no_episode(mask):
    task = board_game(
        mask,
        format_observation=lambda obs, info: "".join(
            map(str, obs["observation"] if mask == "obs" else obs)
        ),
    )
    game = task.make()
    played = play(dataclasses.replace(task, env=game), RandomText(task), episodes=64)
    assert len(played) == 64 and all(episode.terminated for episode in played)
    illegal = 0
    for episode in played:
        for turn in episode.turns:
            free = [cell for cell in range(9) if turn.observation[cell] == "0"]
            cell = task.extract_action(turn.response)
            assert turn.valid == (cell in free)
            assert turn.action == (cell if turn.valid else free[0])
            if not turn.valid:
                illegal += 1
                expected = (
                    f"is not legal in this state: expected one of {', '.join(map(str, free))}"
                )
                assert turn.invalid_reason.endswith(expected)
    assert illegal > 50 and len(game.received) == len(played.turns)


def test_illegal_actions_end_episodes_where_nothing_says_so():
    """Why it matters: without a mask and without a function the environment raises"""
    task = board_game(None)
    with pytest.raises(ValueError, match="is occupied"):
        play(task, RandomText(task), episodes=64)


@pytest.mark.parametrize("rule", ["fallback", "terminate", Retry(1)], ids=str)
def test_illegal_responses_follow_the_rule_for_invalid_ones(rule):
    env = TextEnv(board_game("info", on_invalid=rule, invalid_reward=-0.5))
    env.reset(seed=0)
    env.step("Action: 4")
    received = list(env.env.received)
    first = env.step("Action: 4")
    assert not first.valid and "the action 4 in 'Action: 4' is not legal" in first.invalid_reason
    if rule == "terminate":
        assert first.terminated and first.action is None and env.env.received == received
    elif rule == "fallback":
        assert first.action not in (4, None) and env.env.received == [*received, first.action]
    else:
        assert first.action is None and env.env.received == received
        assert env.step("Action: 4").action not in (4, None)
    assert first.reward == -0.5 or rule == "fallback"


@pytest.mark.parametrize("mask", MASKS)
def test_illegal_actions_of_an_agent_in_collect(policy, mask):
    """A user's agent whose responses are read as any of the nine cells: no episode is lost"""

    class Board(Agent):
        def get_system_prompt(self):
            return "Play."

        def format_observation(self, observation):
            board = observation["observation"] if mask == "obs" else observation
            self.free = np.flatnonzero(board == 0).tolist()
            return str(board)

        def extract_action(self, response):
            return sum(map(ord, response)) % 9

        def legal_actions(self, observation):
            return self.free if mask == "function" else None

    task = board_game(None if mask == "function" else mask)
    played = collect(Board(policy, config=config()), task.env, episodes=12, num_envs=4)
    assert len(played) == 12 and not played.failures
    turns = played.turns
    assert 0 < sum(not turn.valid for turn in turns) < len(turns)
    for turn in turns:
        read = sum(map(ord, turn.response)) % 9
        assert (turn.action == read) == turn.valid and ("not legal" in str(turn.invalid_reason)) != turn.valid  # fmt: skip
    # and in the user's own loop, of the same random numbers
    agent = Board(policy, config=config(), action_space=TicTacToe.action_space)
    env = task.make()
    for episode in played[:4]:
        obs, info = env.reset(seed=episode.seed)
        agent.start_episode(np.random.default_rng([0, episode.index]))
        done = False
        while not done:
            obs, reward, done, _, info = env.step(agent.act(obs, info))
            agent.assign_reward(reward)
        agent.terminate_episode()
        mine = agent.buffer[-1]
        assert [(t.response, t.action, t.valid) for t in mine.turns] == [
            (t.response, t.action, t.valid) for t in episode.turns
        ]


def test_illegal_actions_in_the_loop_of_a_task_agent(policy):
    agent = Agent.for_task(
        board_game("info", extract_action=lambda text: 4), policy, config=config()
    )
    env = TicTacToe("info")
    obs, info = env.reset(seed=0)
    obs, _, _, _, info = env.step(agent.act(obs, info))
    assert env.received == [4] and agent.act(obs, info) == np.flatnonzero(obs == 0)[0]
    assert [turn.valid for turn in agent.recorder.turns] == [True, False]


@pytest.mark.parametrize("mask", MASKS)
def test_illegal_actions_are_no_candidates(policy, mask):
    """Scored agents of a task, and of a user, follow masks in `act` and in `collect`"""

    class Board(ScoredAgent):
        def get_system_prompt(self):
            return "Play."

        def format_observation(self, observation):
            return str(observation["observation"] if mask == "obs" else observation)

        def extract_action(self, response):
            return int(response)

        def legal_actions(self, observation):
            return free_cells(observation, {}) if mask == "function" else None

    task = board_game(mask)
    bare = task if mask != "function" else board_game(None)
    mine = Board(policy, config=config(), action_space=TicTacToe.action_space)
    theirs = ScoredAgent.for_task(task, policy, config=config())
    for agent, env in ((mine, bare.env), (theirs, None)):
        played = collect(agent, env, episodes=4, num_envs=2)
        assert not played.failures and all(turn.valid for turn in played.turns)
        game = bare.make()
        obs, info = game.reset(seed=1)
        for _ in range(3):
            obs, _, done, _, info = game.step(agent.act(obs, info))
            if done:
                break
        assert all(turn.valid for turn in agent.recorder.turns)


# --- where legal actions come from


def test_illegal_is_what_the_function_says_then_the_mask_then_the_space():
    mask = {"action_mask": np.array([1, 0, 1], bool)}
    space = spaces.Discrete(3, start=5)
    task = board_game(None)
    assert task.restricted_actions(0, {}, space) is None
    assert task.restricted_actions(0, mask, space) == [5, 7]
    assert task.restricted_actions(mask, {}, space) == [5, 7]
    assert task.list_legal_actions(0, {}, space) == [5, 6, 7]
    own = dataclasses.replace(task, legal_actions=lambda obs, info: (6,))
    assert own.restricted_actions(0, mask, space) == [6]
    unsure = dataclasses.replace(task, legal_actions=lambda obs, info: None)
    assert unsure.restricted_actions(0, mask, space) == [5, 7]
    everything = dataclasses.replace(task, legal_actions="all")
    assert everything.restricted_actions(0, mask, space) is None
    assert everything.list_legal_actions(0, mask, space) == [5, 6, 7]


@pytest.mark.parametrize("mask", [None, "110", [1, 1], [1, 2, 0], [0.5, 1, 0], [[1, 1, 0]], 3, ([1, 0], [1])], ids=str)  # fmt: skip
def test_illegal_mask_is_no_mask(mask):
    assert masked_actions(0, {"action_mask": mask}, spaces.Discrete(3)) is None


def test_illegal_everywhere_raises_and_names_the_environment():
    task = board_game("info", name="board")
    with pytest.raises(ValueError, match='board: the action_mask allows no action for 3: .*"all"'):
        task.restricted_actions(3, {"action_mask": [0] * 9}, spaces.Discrete(9))
    empty = dataclasses.replace(task, legal_actions=lambda obs, info: [])
    with pytest.raises(ValueError, match="board: legal_actions gave no action"):
        empty.restricted_actions(3, {}, spaces.Discrete(9))


EQUAL = [
    (np.int64(3), 3), (np.array(3), 3), (np.array([1, 2]), (1, 2)), ((1, np.array([2, 3])), (1, [2, 3])), ("go", "go"),
    ({"arm": np.array([0, 1]), "say": "hi"}, {"say": "hi", "arm": np.array([0, 1])}), (np.float32(0.5), 0.5), (True, 1),
]  # fmt: skip
UNEQUAL = [
    (3, "3"), (3, None), ((1, 2), (1, 2, 3)), ({"a": 1}, {"a": 1, "b": 1}), ({"a": 1}, 1), (np.zeros(2), np.zeros(3)),
    ("ab", ("a", "b")), ((1, np.zeros(2)), (1, np.ones(2))),
]  # fmt: skip


@pytest.mark.parametrize("pairs, same", [(EQUAL, True), (UNEQUAL, False)], ids=["equal", "unequal"])
def test_illegal_actions_are_compared_by_value(pairs, same):
    for a, b in pairs:
        assert equal_values(a, b) is same and equal_values(b, a) is same, (a, b)
        assert is_among(a, ["no", b]) is same
        parsed = parse_action(lambda text, a=a: a, "", None, [b])
        assert parsed.valid is (same and a is not None)


def test_illegal_actions_of_a_large_space_cost_nothing(monkeypatch):
    """No list is made of a space that nothing restricts, however small"""

    def listed(*arguments):
        raise AssertionError("the space was listed")

    monkeypatch.setattr("llamagym.envs.task.enumerate_actions", listed)
    env = TextEnv(for_env(TicTacToe))
    env.reset(seed=0)
    assert env.step("Action: 3").valid


def test_illegal_moves_of_taxi_change_nothing():
    """The mask takes away nothing that the table shows to be of use, so that the optimum stays"""
    task = taxi()
    env = task.make()
    legal = legal_table(task, env)
    for state, action in zip(*np.nonzero(~legal)):
        assert all(following == state and not end for _, following, _, end in env.unwrapped.P[state][action])  # fmt: skip
    everything = dataclasses.replace(task, legal_actions="all")
    assert (~legal).sum() == 1608 and legal_table(everything, env).all()
    assert optimal_value(task) == pytest.approx(task.reference_returns["optimal"], abs=0.005)
    assert random_value(task) == pytest.approx(task.reference_returns["random"], abs=0.05)
    assert random_value(everything) == pytest.approx(-771.1, abs=0.05)
    returns = play(task, RandomAgent(task), episodes=16).returns
    reference = task.reference_returns["random"]
    assert reference == pytest.approx(returns.mean(), abs=4 * returns.std(ddof=1) / 4)


# --- check_env


@pytest.mark.parametrize("mask", MASKS)
def test_illegal_actions_are_tried_by_check_env(mask):
    report = check_env(board_game(mask))
    assert report.ok, str(report)
    (check,) = [check for check in report.checks if check.name == "illegal actions are invalid"]
    assert "tried, as 'Action: " in check.detail
    assert "is not legal in this state: expected one of" in check.detail


def test_illegal_actions_that_count_as_valid_are_found_by_check_env():
    another = dict(extract_action=lambda text: (int(text.split()[-1]) + 1) % 9)
    report = check_env(board_game("info", **another))
    failed = {check.name: check.detail for check in report.checks if not check.ok}
    assert re.search(r"the illegal action (\d), 'Action: \1', is valid", failed["illegal actions are invalid"])  # fmt: skip


def test_illegal_actions_that_nobody_declares_are_found_by_check_env():
    (check,) = check_env(board_game(None)).checks
    assert not check.ok and "is occupied" in check.detail
    assert "give the task legal_actions=, or let the environment put an action_mask" in check.detail


def test_illegal_mask_is_found_by_check_env():
    class Odd(TicTacToe):
        def seen(self):
            return self.board.copy(), {"action_mask": (self.board == 0).astype(int) * 2}

    report = check_env(for_env(Odd, legal_actions=free_cells))
    assert report.ok, str(report)
    details = {c.name: c.detail for c in check_env(for_env(Odd, max_steps=1)).checks if not c.ok}
    assert "has no effect: expected a vector of zeros and ones" in details["illegal actions are invalid"]  # fmt: skip


# --- fallbacks


SPACES = {
    "text": spaces.Text(8),
    "box": spaces.Box(-1, 1, (3,)),
    "dict": spaces.Dict(arm=spaces.Box(0, 1, (2,)), hand=spaces.Discrete(3)),
    "tuple": spaces.Tuple([spaces.Discrete(2), spaces.Text(4)]),
    "large": spaces.MultiDiscrete([10] * 6),
    "sequence": spaces.Sequence(spaces.Discrete(5)),
}


class Takes(gym.Env):
    """Five steps with actions of any space, which refuses all others"""

    observation_space = spaces.Discrete(6)

    def __init__(self, space):
        self.action_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return 0, {}

    def step(self, action):
        assert self.action_space.contains(action), f"the environment got {action!r}"
        self.t += 1
        return self.t, 0.0, self.t == 5, False, {}


class Mute(Agent):
    """No response has an action"""

    def get_system_prompt(self):
        return "Act."

    def format_observation(self, observation):
        return f"Step {observation}."

    def extract_action(self, response):
        return None


@pytest.mark.parametrize("name", SPACES)
def test_fallback_is_a_seeded_sample_of_a_space_that_cannot_be_listed(policy, name):
    space = SPACES[name]

    def actions(num_envs, seed=0):
        played = collect(
            Mute(policy, config=config()), functools.partial(Takes, space), 4, num_envs, seed
        )
        assert len(played) == 4 and not played.failures
        return [turn.action for turn in played.turns]

    four, one, other = actions(4), actions(1), actions(2, seed=1)
    assert all(map(equal_values, four, one))  # whatever the number of slots
    assert not all(map(equal_values, four, other))
    assert not all(equal_values(a, four[0]) for a in four)
    assert all(map(space.contains, four))

    def looped():
        agent, env = Mute(policy, config=config(), action_space=space), Takes(space)
        observation, _ = env.reset(seed=0)
        for _ in range(5):
            observation, reward, *_ = env.step(agent.act(observation))
            agent.assign_reward(reward)
        return [turn.action for turn in agent.recorder.turns]

    assert all(map(equal_values, looped(), looped()))


def test_fallback_of_a_text_task_is_its_own_word(policy):
    task = for_env(
        lambda: LegacyGymEnv(House(), *house_spaces()), max_steps=4, fallback="look",
        extract_action=lambda text: None, format_action=str,
    )  # fmt: skip
    played = collect(Agent.for_task(task, policy, config=config()), episodes=8, num_envs=3)
    assert len(played) == 8 and not played.failures
    assert {turn.action for turn in played.turns} == {"look"}


def test_fallback_is_the_users_own_then_the_first_legal_action(policy):
    class Own(Mute):
        def fallback_action(self, observation):
            return None if int(observation[1]) == 0 else 1

    (episode,) = collect(Own(policy, config=config()), Walk, episodes=1, num_envs=1)
    assert [turn.action for turn in episode.turns] == [0, 1, 1]

    class Listed(Mute):
        def legal_actions(self, observation):
            return ["wait", "go"]

    assert Listed(policy, config=config()).act(0) == "wait"


def test_fallback_of_an_unknown_space_repeats_the_turn_then_the_last_action(policy):
    said = itertools.count()

    class Rarely(Mute):
        def extract_action(self, response):
            return "jump" if next(said) == 2 else None

    agent = Rarely(policy, config=config())
    assert agent.act(0) == "jump"
    turns = agent.recorder.turns
    assert [turn.observation for turn in turns] == ["Step 0."] * 3
    assert [turn.action for turn in turns] == [None, None, "jump"]
    agent.assign_reward(1.0)
    assert agent.act(1) == "jump"  # after four invalid responses
    assert [turn.observation for turn in turns[3:]] == ["Step 1."] * 4
    assert [turn.action for turn in turns[3:]] == [None, None, None, "jump"]
    agent.assign_reward(2.0)
    agent.terminate_episode()
    assert [t.reward for t in agent.buffer[0].turns] == [0, 0, 1, 0, 0, 0, 2]
    assert agent.act(0) == "jump"  # of an earlier episode


def test_fallback_of_an_unknown_space_is_read_from_the_system_prompt(policy):
    class Example(Mute):
        def get_system_prompt(self):
            return 'Respond with a number, such as "Action: 7".'

        def extract_action(self, response):
            match = re.search(r"Action: (\d)", response)
            return int(match[1]) if match else None

    agent = Example(policy, config=config())
    assert agent.act(0) == 7 and not any(turn.valid for turn in agent.recorder.turns)


def test_fallback_that_nobody_knows_raises(policy):
    agent = Mute(policy, config=config())
    with pytest.raises(InvalidResponse, match=r"Give Mute action_space=env.action_space, or write"):
        agent.act(0)
    assert len(agent.recorder.turns) == 4


def test_fallback_of_text_without_letters_raises():
    with pytest.raises(ValueError, match="hold no text but spaces"):
        sample_action(spaces.Text(3, charset=" "), 0)


# --- the text world of 2024


class TextworldAgent(Agent):
    """As in `examples/text-world.py`"""

    def get_system_prompt(self) -> str:
        return (
            "You will be playing a text-based game. Here are some example commands: 'go west', 'inventory', 'drop teacup', "
            "'examine broom'. Not all commands will work, but there are many others that you can try beyond these examples. "
            "When responding, first reason about the game state to decide the best action and then say 'command: <your command>'."
        )

    def format_observation(self, observation) -> str:
        return observation.split("$$$$$$$ \n\n")[-1].strip()

    def extract_action(self, response: str):
        command_match = re.search(r"([Cc]ommand|[Aa]ction): (.+?)(?=\n|$)", response)
        command = command_match.group(2) if command_match else None
        if not command:
            return None
        return command


def house_spaces():
    text = spaces.Text(400, charset=spaces.text.alphanumeric | set(" .,!$\n"))
    return text, text


@pytest.mark.filterwarnings("ignore:.*has no chat template")
def test_fallback_lets_the_text_world_of_2024_run():
    """Its loop, with only the model lines changed: nearly all responses of an untrained model are invalid"""
    tokenizer = tokenizer_of("chatml")
    model = users_model("lora", tokenizer)
    agent = TextworldAgent(
        model,
        tokenizer,
        "cpu",
        {"generate/max_new_tokens": 4, "generate/do_sample": True, "generate/temperature": 0.9},
        {"batch_size": 48, "mini_batch_size": 48, "ppo_epochs": 1},
    )
    env = House(limit=3)
    updates = []
    for _ in range(10):
        observation = env.reset()
        done = False
        while not done:
            action = agent.act(observation)
            observation, reward, done, info = env.step(action)
            agent.assign_reward(reward)
        assert len(agent.current_episode_rewards) >= 3
        train_stats = agent.terminate_episode()
        updates += [train_stats] if train_stats else []
    assert len(env.received) == 30 and all(isinstance(action, str) for action in env.received)
    assert len(updates) >= 2 and all(np.isfinite(stats["policy_loss"]) for stats in updates)
    assert all(stats["invalid_rate"] > 0.9 for stats in updates)


def test_fallback_keeps_all_episodes_of_a_text_task(policy):
    """The same agent in `collect`"""
    agent = TextworldAgent(policy, config=Config.from_dict({"generate.max_new_tokens": 8}))
    env = lambda: LegacyGymEnv(House(limit=4), *house_spaces())  # noqa: E731
    played = collect(agent, env, episodes=8, num_envs=4)
    assert len(played) == 8 and not played.failures
    assert all(isinstance(turn.action, str) for turn in played.turns)
