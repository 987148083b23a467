"Exact returns match independent computations and simulation."

import dataclasses
import functools

import gymnasium as gym
import numpy as np
import pytest
from doubles import make_policy

from llamagym.agent import Agent
from llamagym.agents.exact import blackjack_return, by_state, greedy_table, plot_policy
from llamagym.agents.scored import ScoredAgent
from llamagym.chat.conversation import Window
from llamagym.config import Config
from llamagym.envs.baselines import ScriptedAgent, play
from llamagym.envs.exact import (
    CARDS,
    after_hit,
    blackjack_tree,
    dealer_outcomes,
    first_observations,
    hand_total,
    optimal_value,
    policy_value,
    random_value,
    stick_return,
)
from llamagym.envs.registry import get_task
from llamagym.envs.tabular import tabular_model
from llamagym.envs.toy_text import (
    TabularPolicy,
    basic_strategy,
    blackjack,
    cliff_walking,
    frozen_lake,
    optimal_policy,
    taxi,
)
from llamagym.rollout import collect

RULES = {
    "plain": {},
    "sab": dict(sab=True),
    "natural": dict(natural=True),
    "both": dict(sab=True, natural=True),
}
POLICIES = {
    "always stick": lambda obs: 0,
    "hit below 17": lambda obs: int(obs[0] < 17),
    "optimal": basic_strategy,
}


@functools.cache
def brute_force(policy=None, sab=False, natural=False) -> float:
    """Return the expected return of a state policy, or the optimal one without a policy

    The recursion is over hands as lists of cards, dealt as in Gymnasium.
    """

    def count(hand):
        soft = 1 in hand and sum(hand) + 10 <= 21
        return sum(hand) + 10 * soft, int(soft)

    @functools.cache
    def dealer_hands(hand):  # sorted cards -> {final hand: probability}
        if len(hand) > 1 and count(hand)[0] >= 17:
            return {hand: 1.0}
        probabilities = {}
        for card, p in CARDS.items():
            for end, q in dealer_hands(tuple(sorted(hand + (card,)))).items():
                probabilities[end] = probabilities.get(end, 0) + p * q
        return probabilities

    @functools.cache
    def stick(own_total, up, own_natural):
        value = 0.0
        for end, p in dealer_hands((up,)).items():
            dealer_total = count(end)[0] if count(end)[0] <= 21 else 0
            reward = float(own_total > dealer_total) - float(own_total < dealer_total)
            if sab and own_natural and end != (1, 10):
                reward = 1.0
            elif not sab and natural and own_natural and reward == 1.0:
                reward = 1.5
            value += p * reward
        return value

    @functools.cache
    def best(hand, up):
        total, soft = count(hand)
        if total > 21:
            return -1.0

        def hit():
            return sum(p * best(tuple(sorted(hand + (card,))), up) for card, p in CARDS.items())

        stick_value = stick(total, up, hand == (1, 10))
        if policy is None:
            return max(stick_value, hit())
        return hit() if policy((total, up, soft)) else stick_value

    return sum(
        p * q * r * best(tuple(sorted((a, b))), up)
        for up, p in CARDS.items()
        for a, q in CARDS.items()
        for b, r in CARDS.items()
    )


@pytest.mark.parametrize("rules", RULES)
def test_blackjack_return_matches_brute_force(rules):
    for name, policy in POLICIES.items():
        if name == "optimal" and rules != "natural":
            continue  # this tree takes the longest
        assert blackjack_return(by_state(policy), **RULES[rules]) == pytest.approx(
            brute_force(policy, **RULES[rules]), abs=1e-12
        )


def test_basic_strategy_is_optimal():
    assert (
        brute_force(basic_strategy)
        == pytest.approx(brute_force(), abs=1e-12)
        == pytest.approx(-0.04656, abs=1e-5)
    )


@pytest.mark.parametrize("rules", ["plain", "sab", "natural"])
def test_blackjack_reference_returns_match_brute_force(rules):
    reference_returns = blackjack(**RULES[rules]).reference_returns
    assert {
        name: round(brute_force(policy, **RULES[rules]), 4) for name, policy in POLICIES.items()
    } == {k: reference_returns[k] for k in POLICIES}


@pytest.mark.parametrize("rules", ["plain", "sab", "natural"])
def test_blackjack_return_matches_simulation(rules):
    env = gym.make("Blackjack-v1", **({"sab": False, "natural": False} | RULES[rules])).unwrapped

    def choose(history):  # depends on the history: sticks after two hits
        return 0 if len(history) > 2 else int(history[-1][0] < 16)

    exact = blackjack_return(lambda histories: [choose(h) for h in histories], **RULES[rules])
    env.reset(seed=0)
    rewards = []
    for _ in range(8_000):
        history, done = (env.reset()[0],), False
        while not done:
            obs, reward, done, _, _ = env.step(choose(history))
            history = (*history, obs)
        rewards.append(reward)
    assert abs(np.mean(rewards) - exact) < 4 * np.std(rewards) / len(rewards) ** 0.5


def test_first_observations_and_hits_match_simulation():
    env = gym.make("Blackjack-v1", sab=False).unwrapped
    env.reset(seed=1)
    counts: dict = {}
    for _ in range(4000):
        obs = env.reset()[0]
        counts[obs] = counts.get(obs, 0) + 1
    exact = first_observations()
    assert set(counts) <= set(exact) and sum(exact.values()) == pytest.approx(1)
    assert all(
        abs(count / 4000 - exact[obs]) < 5 * (exact[obs] / 4000) ** 0.5 + 1e-3
        for obs, count in counts.items()
    )
    for obs in exact:
        next_states, bust = after_hit(obs)
        assert sum(next_states.values()) + bust == pytest.approx(1)
        assert all(state[1] == obs[1] and (state[0] > obs[0] or obs[2]) for state in next_states)


def test_dealer_outcomes_and_hand_totals():
    assert sum(dealer_outcomes(1, True).values()) == pytest.approx(1)
    assert dealer_outcomes(1, True)[21, True] == pytest.approx(4 / 13)  # a natural, given an ace
    assert all(
        total == 0 or total >= 17 for up in CARDS for total, _ in dealer_outcomes(up, up == 1)
    )
    assert (
        hand_total(12, True) == (12, 0)
        and hand_total(11, True) == (21, 1)
        and hand_total(2, True) == (12, 1)
    )
    assert stick_return(21, 1, first=True, sab=True) == pytest.approx(1 - 4 / 13)


def test_bounds_contain_the_exact_return():
    for policy in (basic_strategy, lambda obs: 1):
        exact = brute_force(policy)
        tree = blackjack_tree(by_state(policy), min_probability=1e-5)
        assert (
            tree.low - 1e-9 <= exact <= tree.high + 1e-9
            and tree.high - tree.low == pytest.approx(2 * tree.skipped)
        )
    assert blackjack_tree(by_state(lambda obs: 0)).skipped == 0


def test_tree_extends_histories_level_by_level():
    levels = []

    def choose(histories):
        levels.append({len(h) for h in histories})
        return [1] * len(histories)

    tree = blackjack_tree(choose, min_probability=1e-4)
    assert levels == [{n + 1} for n in range(len(levels))] and set(tree.table().values()) == {1.0}
    assert all(h[:-1] in tree.actions for h in tree.actions if len(h) > 1)


def test_table_averages_over_histories():
    tree = blackjack_tree(lambda hs: [int(len(h) == 1 and h[-1][0] < 17) for h in hs])
    assert (
        0 < tree.table()[14, 10, 0] < 1
        and tree.table()[20, 10, 0] == 0
        and tree.table()[5, 10, 0] == 1
    )


def test_tree_is_displayed_with_its_return():
    tree = blackjack_tree(by_state(lambda obs: 0))
    assert (
        tree._repr_markdown_() == "**expected return -0.1864**, exact, over 270 histories"
        and len(repr(tree)) < 200
    )
    assert (
        "(between -0."
        in blackjack_tree(by_state(basic_strategy), min_probability=1e-4)._repr_markdown_()
    )


def test_plot_policy_marks_differences_from_basic_strategy():
    from matplotlib.patches import Rectangle

    figure = plot_policy(lambda obs: obs[0] < 17, "hit below 17")
    hard, soft = figure.axes
    letters = {
        (round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in hard.texts
    }
    assert (
        letters[10, 16] == "H"
        and letters[1, 17] == "S"
        and len(hard.texts) == 180
        and len(soft.texts) == 100
    )
    outlined = sum(
        isinstance(p, Rectangle) and not p.get_fill()
        for panel in (hard, soft)
        for p in panel.patches
    )
    assert (
        outlined == 36
        and figure.legends[0].get_texts()[2].get_text() == "differs from basic strategy (36)"
    )
    assert (
        hard.get_xlabel() == "dealer's card"
        and hard.get_ylabel() == "player's total"
        and figure.get_suptitle() == "hit below 17"
    )
    assert len(plot_policy({(14, 10, 0): 0.3}).axes[0].texts) == 1
    import matplotlib.pyplot as plt

    assert not plt.get_fignums()


@pytest.mark.parametrize(
    "task",
    [
        frozen_lake(),
        frozen_lake(False),
        frozen_lake(map_name="8x8"),
        frozen_lake(False, "8x8"),
        cliff_walking(),
        taxi(),
    ],
    ids=["lake", "dry lake", "big lake", "big dry lake", "cliff", "taxi"],
)
def test_tabular_reference_returns_match_exact_values(task):
    digits = 1 if abs(task.reference_returns["random"]) > 10 else 4
    assert round(optimal_value(task), 4) == task.reference_returns["optimal"]
    assert round(random_value(task), digits) == task.reference_returns["random"]


def test_optimal_values_of_toy_text_environments():
    assert (
        optimal_value("FrozenLake-v1") == pytest.approx(0.744, abs=5e-4)
        and optimal_value("FrozenLake-v1", 5) == 0
    )
    assert optimal_value(gym.make("FrozenLake-v1", is_slippery=False)) == 1
    assert (
        optimal_value("CliffWalking-v1", 100) == -13 and optimal_value("CliffWalking-v1", 5) == -5
    )
    assert optimal_value(get_task("FrozenLake-v1"), 5000) == pytest.approx(14 / 17)


def test_optimal_value_matches_policy_evaluation():
    """Policy evaluation gives the taxi's optimal value, a mean over all start states"""
    model, policy = tabular_model(taxi().make()), optimal_policy(taxi())
    values = np.zeros(500)
    for _ in range(200):
        values = model.backup(values)[np.arange(500), policy.actions]
    assert model.start @ values == pytest.approx(optimal_value(taxi())) == pytest.approx(7.93)


@pytest.mark.parametrize(
    "task", [frozen_lake(), cliff_walking(), taxi()], ids=["lake", "cliff", "taxi"]
)
def test_policy_value_matches_simulation(task):
    """A policy's value is its mean return in simulation, and at most the optimal value"""
    optimal = optimal_policy(task)
    assert (
        policy_value(task, optimal) == pytest.approx(optimal_value(task), abs=0.01)
        and policy_value(task, optimal) <= optimal_value(task) + 1e-9
    )
    rng = np.random.default_rng(0)
    noisy = TabularPolicy(
        np.where(
            rng.random(len(optimal.actions)) < 0.1,
            rng.integers(0, 4, len(optimal.actions)),
            optimal.actions,
        )
    )
    returns = [e.total_reward for e in play(task, ScriptedAgent(task, noisy), episodes=300, seed=1)]
    assert policy_value(task, noisy) == pytest.approx(
        np.mean(returns), abs=4 * np.std(returns) / np.sqrt(300) + 1e-9
    )


@pytest.mark.parametrize("kind", [Agent, ScoredAgent])
def test_greedy_table_matches_the_agents_actions(kind):
    """The table has the agent's action in each visited state, sampled or scored"""
    task = dataclasses.replace(taxi(), context=Window(1))
    agent = kind.for_task(
        task, make_policy("lora"), config=Config.from_dict({"generate.max_new_tokens": 4})
    )
    table, state_of_text = (
        greedy_table(agent, batch_size=100),
        {task.format_observation(s, {}): s for s in range(500)},
    )
    for episode in collect(agent, episodes=4, num_envs=4, seed=0, greedy=True):
        assert [turn.action for turn in episode.turns] == [
            table(state_of_text[turn.observation]) for turn in episode.turns
        ]
    with pytest.raises(ValueError, match=r"context is 'full'.*Expected Window\(1\)"):
        greedy_table(kind.for_task(dataclasses.replace(task, context="full"), agent.policy))
