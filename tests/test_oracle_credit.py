"""Advantages against their definition, summed term by term in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagym.buffer import Episode, Turn
from llamagym.credit import assign, normalize_advantages, return_to_go, turn_gae

numbers = st.floats(-100, 100, allow_nan=False, width=64)
factors = st.floats(0, 1, width=64)
turns = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12)
fast = settings(max_examples=60, deadline=None)


def gae_by_definition(rewards, values, gamma, gae_lambda, bootstrap):
    """Â_t = Σ_k (γλ)^k δ_{t+k}, each δ and each sum written out."""
    after = [*values[1:], bootstrap]
    deltas = [r + gamma * v1 - v0 for r, v0, v1 in zip(rewards, values, after, strict=True)]
    return [sum((gamma * gae_lambda) ** k * deltas[t + k] for k in range(len(rewards) - t)) for t in range(len(rewards))]


def gae_by_n_step_returns(rewards, values, gamma, gae_lambda, bootstrap):
    """The other definition: n-step returns mixed with weights (1-λ)λ^(n-1), the rest of the weight on the longest."""
    ends, total = [*values, bootstrap], len(rewards)

    def n_step(t, n):
        return sum(gamma**k * rewards[t + k] for k in range(n)) + gamma**n * ends[t + n]

    return [
        (1 - gae_lambda) * sum(gae_lambda ** (n - 1) * n_step(t, n) for n in range(1, total - t))
        + gae_lambda ** (total - t - 1) * n_step(t, total - t)
        - values[t]
        for t in range(total)
    ]


@fast
@given(turns, factors, factors, numbers)
def test_gae_is_its_definition(steps, gamma, gae_lambda, bootstrap):
    rewards, values = map(list, zip(*steps, strict=True))
    advantages, returns = turn_gae(rewards, values, gamma, gae_lambda, bootstrap)
    assert advantages.dtype == returns.dtype == np.float64
    np.testing.assert_allclose(advantages, gae_by_definition(rewards, values, gamma, gae_lambda, bootstrap), rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(advantages, gae_by_n_step_returns(rewards, values, gamma, gae_lambda, bootstrap), rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(returns - advantages, values, rtol=1e-10, atol=1e-9)


@fast
@given(st.lists(numbers, max_size=12), factors, numbers)
def test_return_to_go_is_its_definition(rewards, gamma, bootstrap):
    n = len(rewards)
    expected = [sum(gamma ** (k - t) * rewards[k] for k in range(t, n)) + gamma ** (n - t) * bootstrap for t in range(n)]
    np.testing.assert_allclose(return_to_go(rewards, gamma, bootstrap), expected, rtol=1e-10, atol=1e-9)


@fast
@given(turns, factors, numbers)
def test_gae_with_lambda_one_is_return_to_go_minus_value(steps, gamma, bootstrap):
    rewards, values = map(np.array, zip(*steps, strict=True))
    advantages, returns = turn_gae(rewards, values, gamma, 1, bootstrap)
    np.testing.assert_allclose(advantages, return_to_go(rewards, gamma, bootstrap) - values, rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(returns, return_to_go(rewards, gamma, bootstrap), rtol=1e-9, atol=1e-8)


@fast
@given(turns, factors, st.floats(0, 1, exclude_max=True))
def test_gae_of_a_perfect_critic_is_zero(steps, gae_lambda, gamma):
    rewards = [r for r, _ in steps]
    advantages, _ = turn_gae(rewards, return_to_go(rewards, gamma, 7.0), gamma, gae_lambda, 7.0)
    np.testing.assert_allclose(advantages, 0, atol=1e-9)


def episode(steps, end, final_value=None, segments_of=lambda t: 0):
    made = [Turn("", "", segment=segments_of(t), reward=r, value=v) for t, (r, v) in enumerate(steps)]
    setattr(made[-1], end, True)
    return Episode(made, final_value=final_value)


@fast
@given(turns, factors, factors, numbers)
def test_assign_bootstraps_truncated_episodes_only(steps, gamma, gae_lambda, final_value):
    rewards, values = map(list, zip(*steps, strict=True))
    truncated = episode(steps, "truncated", final_value)
    terminated, unused = episode(steps, "terminated"), episode(steps, "terminated", final_value)
    both = episode(steps, "terminated", final_value)
    both.turns[-1].truncated = True
    assign([truncated, terminated, unused, both], gamma, gae_lambda)
    for played, bootstrap in ((truncated, final_value), (terminated, 0), (unused, 0), (both, 0)):
        expected = gae_by_definition(rewards, values, gamma, gae_lambda, bootstrap)
        np.testing.assert_allclose([t.advantage for t in played.turns], expected, rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose([t.returns for t in played.turns], np.add(expected, values), rtol=1e-10, atol=1e-9)


def test_segments_do_not_cut_credit():
    steps = [(0.0, 0.1), (0.0, 0.2), (1.0, 0.3)]
    whole, cut = episode(steps, "terminated"), episode(steps, "terminated", segments_of=lambda t: t)
    assign([whole, cut], 0.9, 0.8)
    assert [t.advantage for t in whole.turns] == [t.advantage for t in cut.turns]


def test_win_is_worth_its_reward_however_long_the_conversation():
    """One-turn and twenty-turn wins: nothing is divided by the number of messages."""
    for n in (1, 20):
        won = episode([(0.0, 0.0)] * (n - 1) + [(1.0, 0.0)], "terminated")
        assign([won], 1.0, 1.0)
        assert [t.advantage for t in won.turns] == [1.0] * n


@fast
@given(st.lists(turns, min_size=1, max_size=5))
def test_normalisation_is_over_all_turns_of_the_batch(batch):
    episodes = [episode(steps, "terminated") for steps in batch]
    assign(episodes, 0.9, 0.9)
    before = np.array([t.advantage for e in episodes for t in e.turns])
    mean, deviation = normalize_advantages(episodes)
    after = np.array([t.advantage for e in episodes for t in e.turns])
    assert (mean, deviation) == (before.mean(), before.std())
    np.testing.assert_allclose(after, (before - before.mean()) / (before.std() if before.std() > 1e-8 else 1), atol=1e-12)


def test_empty_episodes_have_no_credit_to_assign():
    lone = episode([(1.0, 0.0)], "terminated")
    assign([Episode(), lone], 1.0, 1.0)
    assert lone.turns[0].advantage == 1.0


@pytest.mark.parametrize("n", [2_000])
def test_assign_is_quick(n):
    from timeit import repeat

    episodes = [episode([(0.0, 0.1), (1.0, 0.2)], "terminated") for _ in range(n)]
    assert min(repeat(lambda: assign(episodes, 0.99, 0.95), number=1, repeat=5)) < 0.1
