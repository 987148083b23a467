"""Advantages match their definition, summed term by term in float64."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagym.algorithms.advantages import (
    assign_turn_gae,
    normalize_advantages,
    return_to_go,
    turn_gae,
)
from llamagym.episodes.episode import Episode, Turn

numbers = st.floats(-100, 100, allow_nan=False, width=64)
factors = st.floats(0, 1, width=64)
turns = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12)
fast = settings(max_examples=60, deadline=None)


def gae_by_definition(rewards, values, gamma, gae_lambda, bootstrap):
    """Return Â_t = Σ_k (γλ)^k δ_{t+k} with all sums written out"""
    next_values = [*values[1:], bootstrap]
    deltas = [r + gamma * v1 - v0 for r, v0, v1 in zip(rewards, values, next_values, strict=True)]
    return [
        sum((gamma * gae_lambda) ** k * deltas[t + k] for k in range(len(rewards) - t))
        for t in range(len(rewards))
    ]


def gae_by_n_step_returns(rewards, values, gamma, gae_lambda, bootstrap):
    """Return the mean of n-step returns with weights (1-λ)λ^(n-1), minus the value

    The longest n-step return has the remaining weight.
    """
    bootstraps, num_turns = [*values, bootstrap], len(rewards)

    def n_step(t, n):
        return sum(gamma**k * rewards[t + k] for k in range(n)) + gamma**n * bootstraps[t + n]

    return [
        (1 - gae_lambda)
        * sum(gae_lambda ** (n - 1) * n_step(t, n) for n in range(1, num_turns - t))
        + gae_lambda ** (num_turns - t - 1) * n_step(t, num_turns - t)
        - values[t]
        for t in range(num_turns)
    ]


@fast
@given(turns, factors, factors, numbers)
def test_gae_matches_its_definition(steps, gamma, gae_lambda, bootstrap):
    rewards, values = map(list, zip(*steps, strict=True))
    advantages, returns = turn_gae(rewards, values, gamma, gae_lambda, bootstrap)
    assert advantages.dtype == returns.dtype == np.float64
    np.testing.assert_allclose(
        advantages,
        gae_by_definition(rewards, values, gamma, gae_lambda, bootstrap),
        rtol=1e-10,
        atol=1e-9,
    )
    np.testing.assert_allclose(
        advantages,
        gae_by_n_step_returns(rewards, values, gamma, gae_lambda, bootstrap),
        rtol=1e-9,
        atol=1e-8,
    )
    np.testing.assert_allclose(returns - advantages, values, rtol=1e-10, atol=1e-9)


@fast
@given(st.lists(numbers, max_size=12), factors, numbers)
def test_return_to_go_matches_its_definition(rewards, gamma, bootstrap):
    n = len(rewards)
    expected = [
        sum(gamma ** (k - t) * rewards[k] for k in range(t, n)) + gamma ** (n - t) * bootstrap
        for t in range(n)
    ]
    np.testing.assert_allclose(
        return_to_go(rewards, gamma, bootstrap), expected, rtol=1e-10, atol=1e-9
    )


@fast
@given(turns, factors, numbers)
def test_gae_with_lambda_one_is_return_to_go_minus_value(steps, gamma, bootstrap):
    rewards, values = map(np.array, zip(*steps, strict=True))
    advantages, returns = turn_gae(rewards, values, gamma, 1, bootstrap)
    np.testing.assert_allclose(
        advantages, return_to_go(rewards, gamma, bootstrap) - values, rtol=1e-9, atol=1e-8
    )
    np.testing.assert_allclose(
        returns, return_to_go(rewards, gamma, bootstrap), rtol=1e-9, atol=1e-8
    )


@fast
@given(turns, factors, st.floats(0, 1, exclude_max=True))
def test_gae_of_a_perfect_critic_is_zero(steps, gae_lambda, gamma):
    rewards = [r for r, _ in steps]
    advantages, _ = turn_gae(rewards, return_to_go(rewards, gamma, 7.0), gamma, gae_lambda, 7.0)
    np.testing.assert_allclose(advantages, 0, atol=1e-9)


def make_episode(steps, end, final_value=None, segments_of=lambda t: 0):
    episode_turns = [
        Turn("", "", segment=segments_of(t), reward=r, value=v) for t, (r, v) in enumerate(steps)
    ]
    setattr(episode_turns[-1], end, True)
    return Episode(episode_turns, final_value=final_value)


@fast
@given(turns, factors, factors, numbers)
def test_assign_bootstraps_truncated_episodes_only(steps, gamma, gae_lambda, final_value):
    rewards, values = map(list, zip(*steps, strict=True))
    truncated = make_episode(steps, "truncated", final_value)
    terminated, with_unused_value = (
        make_episode(steps, "terminated"),
        make_episode(steps, "terminated", final_value),
    )
    both = make_episode(steps, "terminated", final_value)
    both.turns[-1].truncated = True
    assign_turn_gae([truncated, terminated, with_unused_value, both], gamma, gae_lambda)
    for episode, bootstrap in (
        (truncated, final_value),
        (terminated, 0),
        (with_unused_value, 0),
        (both, 0),
    ):
        expected = gae_by_definition(rewards, values, gamma, gae_lambda, bootstrap)
        np.testing.assert_allclose(
            [t.advantage for t in episode.turns], expected, rtol=1e-10, atol=1e-9
        )
        np.testing.assert_allclose(
            [t.returns for t in episode.turns], np.add(expected, values), rtol=1e-10, atol=1e-9
        )


def test_advantages_do_not_depend_on_segments():
    steps = [(0.0, 0.1), (0.0, 0.2), (1.0, 0.3)]
    one_segment, many_segments = (
        make_episode(steps, "terminated"),
        make_episode(steps, "terminated", segments_of=lambda t: t),
    )
    assign_turn_gae([one_segment, many_segments], 0.9, 0.8)
    assert [t.advantage for t in one_segment.turns] == [t.advantage for t in many_segments.turns]


def test_advantage_of_a_win_does_not_depend_on_the_number_of_turns():
    """Wins after one and after twenty turns have the same advantage"""
    for n in (1, 20):
        episode = make_episode([(0.0, 0.0)] * (n - 1) + [(1.0, 0.0)], "terminated")
        assign_turn_gae([episode], 1.0, 1.0)
        assert [t.advantage for t in episode.turns] == [1.0] * n


@fast
@given(st.lists(turns, min_size=1, max_size=5))
def test_normalization_is_over_all_turns_of_the_batch(batch):
    episodes = [make_episode(steps, "terminated") for steps in batch]
    assign_turn_gae(episodes, 0.9, 0.9)
    before = np.array([t.advantage for e in episodes for t in e.turns])
    mean, deviation = normalize_advantages(episodes)
    after = np.array([t.advantage for e in episodes for t in e.turns])
    assert (mean, deviation) == (before.mean(), before.std())
    np.testing.assert_allclose(
        after, (before - before.mean()) / (before.std() if before.std() > 1e-8 else 1), atol=1e-12
    )


def test_episodes_without_turns_are_skipped():
    episode = make_episode([(1.0, 0.0)], "terminated")
    assign_turn_gae([Episode(), episode], 1.0, 1.0)
    assert episode.turns[0].advantage == 1.0


@pytest.mark.parametrize("n", [2_000])
def test_assign_turn_gae_cost_is_linear_in_episodes(n):
    """Eight times as many episodes take at most eight times as many calls"""

    def count_calls(count):
        episodes = [make_episode([(0.0, 0.1), (1.0, 0.2)], "terminated") for _ in range(count)]
        calls = 0

        def count_call(frame, event, argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count_call)
        try:
            assign_turn_gae(episodes, 0.99, 0.95)
        finally:
            sys.setprofile(None)
        return calls

    assert 0 < count_calls(n) <= 8 * count_calls(n // 8) + 100
