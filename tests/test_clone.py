"""`clone` measures what it achieved: intervals, learning curves, rounds of random play, and the same weights as without measuring."""

import math
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import config, lake, make_policy, walk_task

from llamagym.agent import Agent
from llamagym.agents.scored import ScoredAgent
from llamagym.chat.conversation import Window
from llamagym.config import LoRAConfig
from llamagym.envs.actions import DiscreteActions
from llamagym.envs.adapters import episode_seed
from llamagym.envs.baselines import RandomAgent, play
from llamagym.envs.task import Task
from llamagym.models.policy import Policy
from llamagym.rollout import collect, evaluate
from llamagym.training import cloning
from llamagym.training.clone_result import (
    CloneResult,
    ValidShare,
    transcripts_needed,
    wilson_interval,
)
from llamagym.training.cloning import (
    ValidityProbe,
    affordable_episodes,
    clone,
    from_messages,
    measuring_plan,
    random_games,
    rows_per_step,
    sft_columns,
)
from llamagym.training.rescoring import score_decisions

pytestmark = pytest.mark.filterwarnings("ignore:.*of the responses are valid after the warm start")


class OneTurn(gym.Env):
    """Shows one observation and ends after any action: all prompts are the same"""

    observation_space = gym.spaces.Discrete(1)
    action_space = gym.spaces.Discrete(3)
    seeds: list[int] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        return 0, {}

    def step(self, action):
        return 0, float(action), True, False, {}


def one_turn(**changes) -> Task:
    def extract(response: str):
        match = re.fullmatch("Action: ([0-2])", response)
        return int(match[1]) if match else None

    return Task(
        changes.pop("env", OneTurn),
        lambda obs, info: "Choose.",
        extract,
        "Action: {}".format,
        system_prompt="Play.",
        reference_returns=dict(random=1.0, optimal=2.0),
        **changes,
    )


def agent_of(task, kind="plain", seed=0, **options) -> Agent:
    options = dict(generate__max_new_tokens=6, warmstart__batch_size=8) | options
    return Agent.for_task(task, make_policy(kind, seed=seed), config=config(**options))


# intervals


@pytest.mark.parametrize(("k", "n"), [(0, 64), (1, 64), (28, 64), (63, 64), (64, 64), (1, 1)])
def test_clone_wilson_bounds_are_where_the_score_test_rejects(k, n):
    z = 1.959964
    for bound, side in zip(wilson_interval(k, n), (1, -1)):
        if 0 < bound < 1:
            standard_error = math.sqrt(bound * (1 - bound) / n)
            assert side * (k / n - bound) == pytest.approx(z * standard_error, rel=1e-6)
        else:
            assert (bound, k) in ((0.0, 0), (1.0, n))


def test_clone_wilson_covers_the_share():
    rng, n = np.random.default_rng(0), 64
    for share in (0.03, 0.5, 0.98):
        found = [wilson_interval(k, n) for k in rng.binomial(n, share, 2000)]
        assert 0.92 < np.mean([low <= share <= high for low, high in found]) < 0.99


# learning curves


def falling(seen, start=100.0, scale=400.0, n=64):
    """A share of invalid responses that falls exponentially"""
    share = [1 - math.exp(-max(0.0, x - start) / scale) for x in seen]
    return [ValidShare(x, round(n * p), n) for x, p in zip(seen, share)]


def test_clone_curve_finds_the_exponential():
    curve = falling([200, 400, 600, 800], n=100_000)
    exact = 100 + 400 * math.log(1 / 0.05)
    assert transcripts_needed(curve, 0.95) == pytest.approx(exact, rel=0.01)


def test_clone_curve_weights_as_least_squares_does():
    curve = [ValidShare(100, 8, 64), ValidShare(200, 20, 64), ValidShare(400, 45, 64)]
    q = np.array([(64 - p.valid + 0.5) / 65 for p in curve])
    weights = np.sqrt(65 * q / (1 - q))  # `polyfit` weights residuals, not squares
    slope, intercept = np.polyfit([100, 200, 400], np.log(q), 1, w=weights)
    expected = (math.log(0.05) - intercept) / slope
    assert transcripts_needed(curve, 0.95) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "curve",
    [
        [],
        falling([300, 600]),
        [ValidShare(x, 2, 64) for x in (100, 200, 400, 800)],  # nothing was learned
        [ValidShare(x, 30, 64) for x in (100, 200, 400, 800)],  # nothing more was learned
        [ValidShare(x, k, 64) for x, k in ((100, 40), (200, 36), (400, 30), (800, 25))],
        [ValidShare(x, k, 64) for x, k in ((100, 20), (200, 21), (400, 23), (800, 25))],  # noise
        falling([2000, 3000, 4000]),  # enough
    ],
)
def test_clone_curve_says_nothing_it_cannot_know(curve):
    assert transcripts_needed(curve, 0.95) is None


def test_clone_curve_is_not_extrapolated_far():
    curve = falling([150, 160, 170, 180], n=10_000)
    assert transcripts_needed(curve, 0.95) > 1000 and transcripts_needed(curve, 0.999) is None


def result_of(curve, **changes) -> CloneResult:
    return CloneResult(0.5, 0.1, 1e4, 3.0, transcripts=600, curve=curve, **changes)


def test_clone_result_says_how_many_more_transcripts():
    # three passes over 600
    curve = falling([445, 855, 1473, 1800], start=300, scale=2000, n=10_000)
    needed = (300 + 2000 * math.log(1 / 0.05)) / 3 - 600
    result = result_of(curve)
    (number,) = re.findall(r"about ([\d,]+) more transcripts", result.advice)
    assert 0.98 * needed <= int(number.replace(",", "")) <= 1.1 * needed
    assert result.advice in repr(result) and result.advice in result._repr_markdown_()
    assert result["loss"] == 0.5 and f"{result.valid}" in repr(result)
    with pytest.raises(KeyError):
        result["advice"]
    assert "cannot tell" in result_of([ValidShare(1800, 28, 64)]).advice
    assert result_of([ValidShare(1800, 63, 64)]).advice is None and result_of([]).advice is None
    assert "extract_action" in result_of([ValidShare(9, 0, 64)], transcripts_valid=0.0).advice


# measuring


@pytest.mark.parametrize(
    ("kind", "lora"), [("plain", None), ("lora", LoRAConfig(r=4, dropout=0.2))]
)
def test_clone_trains_the_same_weights_whether_it_is_measured_or_not(kind, lora):
    task, found = lake(max_steps=2), []
    for measured in (0, 16):
        policy = make_policy(kind, **({} if lora is None else dict(lora=lora)))
        agent = Agent.for_task(task, policy, config=config(trainer__seed=3))
        options = agent.config.warmstart.replace(
            dict(batch_size=4, epochs=2, probe_responses=measured, probe_episodes=measured)
        )
        result = clone(agent, play(task, RandomAgent(task), 8), options, progress=False)
        assert bool(result.curve) == bool(result.games) == bool(measured)
        found.append([p.detach().clone() for p in policy.model.parameters()])
        assert not policy.model.training and collect(agent, episodes=2)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_clone_share_agrees_with_an_independent_count():
    task = one_turn()
    agent = agent_of(task, warmstart__epochs=1)
    games = play(task, RandomAgent(task), 56)
    result = clone(agent, games, progress=False)
    valid = 1 - evaluate(agent, episodes=600, num_envs=100, greedy=False).sampled.invalid_rate
    again = ValidityProbe(agent, games, responses=300, seed=1).measure(56)
    low, high = wilson_interval(result.valid.valid, result.valid.responses, z=3.3)
    assert 0.05 < valid < 0.95 and low < valid < high
    assert abs(again.share - valid) < 3 * math.sqrt(2 * 0.25 / 300)


def test_clone_measures_for_less_than_a_tenth_of_the_time():
    """Tokens that are read, in units of tokens that are trained on, at three passes each"""
    for wanted in (64, 200):
        for prompts in (10, 500, 2_000, 20_000):
            responses, at = measuring_plan(wanted, prompts)
            assert responses == 24 or responses * len(at) <= 0.1 * 3 * prompts
            assert 24 <= responses <= wanted and at[-1] == 1
    assert measuring_plan(64, 20_000) == (64, (1 / 8, 1 / 4, 1 / 2, 1))
    assert measuring_plan(8, 20_000)[0] == 8
    options = config().warmstart
    assert affordable_episodes(options, transcripts=8, turns=1.4) == 32
    for transcripts in (11, 40, 300):
        episodes = affordable_episodes(options, transcripts, turns=100)
        assert episodes <= 0.1 * options.epochs * transcripts and episodes != 1
    assert affordable_episodes(options, 11, 100) == 0 and affordable_episodes(options, 300, 7) == 32


def test_clone_probe_asks_in_the_context_of_the_transcript():
    task = lake(max_steps=5)
    agent = Agent.for_task(task, make_policy("plain"), config=config())
    games = play(task, RandomAgent(task), 6)
    probe = ValidityProbe(agent, games, responses=18, seed=1)
    every_prompt = []
    for game in games:
        conversation = agent.conversation(game.system_prompt)
        for turn in game.turns:
            every_prompt.append(list(conversation.add_user(turn.observation)))
            conversation.add_response(*conversation.renderer.encode_response(turn.response))
    assert all(prompt in every_prompt for prompt in probe.prompts)
    assert len({len(prompt) for prompt in probe.prompts}) > 2 and probe.transcripts_valid == 1.0
    assert ValidityProbe(agent, games, responses=18, seed=1).prompts == probe.prompts


def test_clone_counts_what_the_policy_says(monkeypatch):
    """A policy that has learned one chat by heart: every response is the chat's"""
    chat = from_messages([dict(role="user", content="Choose."), dict(role="assistant", content="Action: 2")])  # fmt: skip
    agent = agent_of(one_turn(), warmstart__learning_rate=1e-2, warmstart__epochs=30)
    result = clone(agent, [chat] * 8, progress=False)
    assert result.valid.share == 1 and result.advice is None
    assert result.games.mean_return == 2 and result.games.invalid_rate == 0
    assert result.references == dict(random=1.0, optimal=2.0)
    probe = ValidityProbe(agent, [chat], 8, seed=0)
    monkeypatch.setattr(agent.task, "extract_action", lambda response: None)
    assert probe.measure(1).valid == 0 and probe.transcripts_valid == 0


def test_clone_warns_once_that_too_few_responses_are_valid():
    task = one_turn()
    agent = agent_of(task, warmstart__epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = clone(agent, play(task, RandomAgent(task), 8), progress=False)
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert result.valid.share < 0.5 and messages == [result.advice]


def test_clone_measures_an_agent_without_an_environment():
    class ByHand(Agent):
        def get_system_prompt(self):
            return "Play."

        def format_observation(self, observation):
            return "Choose."

        def extract_action(self, response):
            return one_turn().extract_action(response)

    agent = ByHand(make_policy("plain"), config=config(warmstart__epochs=1))
    task = one_turn()
    result = clone(agent, play(task, RandomAgent(task), 8), progress=False)
    assert result.valid.responses == 24 and result.games is None and result.references == {}
    with pytest.raises(TypeError, match="ByHand has none: pass trajectories"):
        clone(agent)


def test_clone_does_not_ask_an_agent_that_chooses_candidates():
    task = lake(max_steps=4)
    agent = ScoredAgent.for_task(task, make_policy("plain"), config=config())
    result = clone(agent, play(task, RandomAgent(task), 8), progress=False)
    assert result.valid is None and result.advice is None
    assert result.games.invalid_rate == 0


def test_clone_without_progress_prints_nothing(capsys):
    task = one_turn()
    agent = agent_of(task, warmstart__epochs=1)
    clone(agent, play(task, RandomAgent(task), 8), progress=False)
    assert capsys.readouterr() == ("", "")
    clone(agent, play(task, RandomAgent(task), 8))
    shown = capsys.readouterr()
    assert shown.out == "" and "clone" in shown.err and "valid=" in shown.err


# rounds of random play


def test_clone_plays_by_itself_until_enough_responses_are_valid():
    OneTurn.seeds.clear()
    agent = agent_of(one_turn(), warmstart__random_turns=8, warmstart__learning_rate=2e-3)
    result = clone(agent, progress=False)
    limits = [3 * 8 * (2**i - 1) for i in range(1, 9)]  # three passes over rounds that double
    ends = [p for p in result.curve if any(p.transcripts == pytest.approx(x) for x in limits)]
    assert len(ends) > 1 and ends[-1] == result.valid
    assert result.transcripts == 8 * (2 ** len(ends) - 1)  # each game has one turn
    assert ends[-1].share >= 0.95 and max(point.share for point in ends[:-1]) < 0.95
    played = [s for s in OneTurn.seeds if s is not None]
    assert len(set(played)) == result.transcripts + len(result.games.episodes)
    others = {episode_seed(seed, i) for seed in (0, 1_000_000) for i in range(2000)}
    assert not others & set(played)


def rounds_of(task, transcripts, repeat, **options):
    agent = agent_of(task, **options)
    return list(cloning.clone_rounds(agent, transcripts, agent.config.warmstart, repeat))


def test_clone_rounds_double_up_to_the_limit():
    rounds = rounds_of(
        one_turn(), None, True, warmstart__random_turns=8, warmstart__max_random_turns=40
    )
    assert [len(games) for games in rounds] == [8, 16, 16]
    assert len({game.seed for games in rounds for game in games}) == 40
    again = rounds_of(
        one_turn(), None, True, warmstart__random_turns=8, warmstart__max_random_turns=40
    )
    assert [[g.seed for g in games] for games in rounds] == [[g.seed for g in r] for r in again]
    assert [len(r) for r in rounds_of(one_turn(), None, False, warmstart__random_turns=24)] == [24]
    long_games = rounds_of(lake(max_steps=20), None, False, warmstart__random_turns=100)[0]
    assert 100 <= sum(map(len, long_games)) < 130


def test_clone_rounds_repeat_given_transcripts_only_if_asked():
    games = play(one_turn(), RandomAgent(one_turn()), 8)
    assert rounds_of(one_turn(), games, False) == [games]
    assert rounds_of(one_turn(), games, True, warmstart__max_random_turns=20) == [games] * 3


def test_clone_gives_up_at_the_limit_of_turns():
    agent = agent_of(one_turn(), warmstart__random_turns=8, warmstart__max_random_turns=24,
                     warmstart__learning_rate=1e-6, warmstart__epochs=1)  # fmt: skip
    with pytest.warns(UserWarning, match="cannot tell how many more"):
        result = clone(agent, progress=False)
    assert result.transcripts == 24 and result.valid.share < 0.5


def test_clone_of_random_play_stops_after_one_round_if_nothing_is_measured():
    agent = agent_of(one_turn(), warmstart__random_turns=16, warmstart__probe_responses=0)
    assert clone(agent, progress=False).transcripts == 16


def test_clone_goes_on_if_no_game_can_be_played(monkeypatch):
    def fails(*args, **kwargs):
        raise RolloutFails()

    monkeypatch.setattr(cloning, "collect", fails)
    task = walk_task(2)
    agent = Agent.for_task(task, make_policy("plain"), config=config())
    with pytest.warns(UserWarning, match="its return is not known: out of cards"):
        result = clone(agent, play(task, RandomAgent(task), 4), progress=False)
    assert result.games is None and agent.policy.reference.is_set


class RolloutFails(cloning.RolloutError):
    def __init__(self):
        Exception.__init__(self, "out of cards")


def test_clone_takes_steps_of_equal_turns():
    agent = agent_of(lake(max_steps=20))
    games = play(lake(max_steps=20), RandomAgent(lake(max_steps=20)), 40)
    columns = sft_columns(agent, games, 1.0)
    rows, turns = rows_per_step(columns), sum(map(len, games)) / 40
    assert 1 < rows < 32 and abs(rows * turns - 64) <= turns
    assert rows_per_step(dict(returns=[[0.0]])) == 32 and rows_per_step(dict(returns=[[0.0] * 500])) == 1  # fmt: skip


class Mask(OneTurn):
    """Of the three actions, one is legal, in a second turn another"""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.legal = seed % 3
        return 0, dict(action_mask=np.eye(3, dtype=np.int8)[self.legal])

    def step(self, action):
        done, self.legal = self.legal == -1, -1
        return 0, 0.0, done, False, dict(action_mask=np.eye(3, dtype=np.int8)[(action + 1) % 3])


def test_clone_counts_illegal_actions_as_invalid():
    task = one_turn(env=Mask)
    agent, games = agent_of(task), play(task, RandomAgent(task), 30)
    probe = ValidityProbe(agent, games, responses=60, seed=0)
    assert probe.transcripts_valid == 1 and {len(legal) for legal in probe.legal_actions} == {1}
    legal = [actions[0] for actions in probe.legal_actions]
    assert probe.count_valid([f"Action: {a}" for a in legal]) == 60
    assert probe.count_valid([f"Action: {(a + 1) % 3}" for a in legal]) == 0
    assert probe.count_valid(["Action: 1"] * 60) == legal.count(1) > 0
    changed = [from_messages([dict(role="user", content="Choose."), dict(role="assistant", content="Action: 1")])]  # fmt: skip
    assert ValidityProbe(agent, changed, 4, seed=0).legal_actions == [None] * 4


def masked_task(context):
    "Two actions, of which the second is legal in the first turn of an episode alone"

    class Masked(gym.Env):
        observation_space = gym.spaces.Discrete(8)
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.turn = 0
            return 0, {"action_mask": np.array([1, 1])}

        def step(self, action):
            self.turn += 1
            return self.turn, 0.0, self.turn == 7, False, {"action_mask": np.array([1, 0])}

    actions = DiscreteActions(["stay", "leave"])
    return Task(
        Masked,
        lambda obs, info: f"turn {obs}",
        actions.extract_action,
        actions.format_action,
        context=context,
    )


def test_clone_of_a_scored_agent_makes_seldom_legal_actions_as_likely_as_others():
    "Random games contain `leave` in 1 of 14 turns; where it is legal, half of the choices are it"
    agent = ScoredAgent.for_task(masked_task(Window(1)), Policy.load("tiny", seed=0))
    clone(agent, progress=False)
    decisions = [
        decision
        for decision in score_decisions(agent, [(e, e.turns) for e in collect(agent, episodes=4)])
        if len(decision.scores) == 2
    ]
    assert len(decisions) == 4
    shares = [float(decision.scores.softmax(-1)[1]) for decision in decisions]
    assert np.allclose(shares, 0.5, atol=0.15)


@pytest.mark.parametrize(
    "kind,context,redrawn",
    [(ScoredAgent, Window(1), True), (ScoredAgent, "full", False), (Agent, Window(1), False)],
)
def test_clone_leaves_responses_alone_that_a_later_turn_sees(kind, context, redrawn):
    agent = kind.for_task(masked_task(context), Policy.load("tiny", seed=0))
    games = random_games(agent, turns=70, seeds=iter(range(100)))
    later = [turn.response for game in games for turn in game.turns[1:]]
    assert ("Action: leave" in later) == redrawn
    again = random_games(agent, turns=70, seeds=iter(range(100)))
    assert [t.response for g in games for t in g.turns] == [
        t.response for g in again for t in g.turns
    ]
