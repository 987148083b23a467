"""Token and group estimators match brute force in float64 and other libraries' results."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer

from llamagym.algorithms.advantages import bilevel_gae, return_to_go, token_gae, turn_gae
from llamagym.algorithms.group_advantages import (
    assign_gigpo,
    assign_group_advantages,
    assign_rebn,
    gigpo,
    group_by_seed,
    grpo,
    rebn,
    rloo,
    state_anchored_advantages,
)
from llamagym.episodes.episode import Episode, Turn
from llamagym.models.tiny import tiny_model, tiny_tokenizer

numbers = st.floats(-100, 100, allow_nan=False, width=64)
factors = st.floats(0, 1, width=64)
# turns: a reward and the values of the tokens
ragged_turns = st.lists(
    st.tuples(numbers, st.lists(numbers, min_size=1, max_size=5)), min_size=1, max_size=6
)
# episodes: pairs of reward and state
group = st.lists(
    st.lists(st.tuples(numbers, st.integers(0, 3)), min_size=1, max_size=6), min_size=2, max_size=5
)
fast = settings(max_examples=60, deadline=None)


@fast
@given(ragged_turns, factors, factors, numbers)
def test_credit_token_gae_matches_its_definition(turns, gamma, gae_lambda, bootstrap):
    """Each token is a step, and the sum is written out"""
    steps = [
        (reward if last else 0.0, value)
        for reward, values in turns
        for value, last in zip(values, [False] * (len(values) - 1) + [True])
    ]
    next_values = [*(value for _, value in steps[1:]), bootstrap]
    deltas = [reward + gamma * v1 - v0 for (reward, v0), v1 in zip(steps, next_values)]
    expected = [
        sum((gamma * gae_lambda) ** k * d for k, d in enumerate(deltas[i:]))
        for i in range(len(deltas))
    ]
    advantages, returns = token_gae(
        [r for r, _ in turns], [v for _, v in turns], gamma, gae_lambda, bootstrap
    )
    assert [len(a) for a in advantages] == [len(r) for r in returns] == [len(v) for _, v in turns]
    np.testing.assert_allclose(np.concatenate(advantages), expected, rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(
        np.concatenate(returns), np.array(expected) + [v for _, v in steps], rtol=1e-9, atol=1e-8
    )


@fast
@given(ragged_turns, factors, factors, factors, factors, numbers)
def test_credit_bilevel_gae_matches_its_definition(
    turns, gamma, gae_lambda, token_gamma, token_lambda, bootstrap
):
    """GAE over turns gives the advantage of a turn's last token, GAE within the turn the others"""
    last_values = [values[-1] for _, values in turns]
    deltas = [
        reward + gamma * v1 - v0
        for (reward, _), v0, v1 in zip(turns, last_values, [*last_values[1:], bootstrap])
    ]
    advantages, returns = bilevel_gae(
        [r for r, _ in turns],
        [v for _, v in turns],
        gamma,
        gae_lambda,
        bootstrap,
        token_gamma,
        token_lambda,
    )
    for t, (_, values) in enumerate(turns):
        turn_advantage = sum((gamma * gae_lambda) ** k * d for k, d in enumerate(deltas[t:]))
        token_deltas = [token_gamma * b - a for a, b in zip(values, values[1:])] + [turn_advantage]
        expected = [
            sum((token_gamma * token_lambda) ** k * d for k, d in enumerate(token_deltas[i:]))
            for i in range(len(values))
        ]
        np.testing.assert_allclose(advantages[t], expected, rtol=1e-9, atol=1e-8)
        np.testing.assert_allclose(returns[t], np.array(expected) + values, rtol=1e-9, atol=1e-8)


@fast
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8), factors, factors, numbers)
def test_credit_of_tokens_equals_turn_gae_for_turns_of_one_token(
    turns, gamma, gae_lambda, bootstrap
):
    rewards, values = zip(*turns)
    token_values = [[v] for v in values]
    for result in (
        token_gae(rewards, token_values, gamma, gae_lambda, bootstrap),
        bilevel_gae(rewards, token_values, gamma, gae_lambda, bootstrap, 0.3, 0.4),
    ):
        for part, expected in zip(result, turn_gae(rewards, values, gamma, gae_lambda, bootstrap)):
            np.testing.assert_allclose(np.concatenate(part), expected, rtol=1e-12, atol=1e-12)


def test_credit_of_tokens_with_factors_one_is_return_minus_value():
    """The length of a response does not change the credit of its tokens"""
    generator = np.random.default_rng(0)
    values, rewards = [generator.normal(size=n) for n in (4, 1, 7)], [1.0, -2.0, 3.0]
    returns = return_to_go(rewards, 1, 0.5)
    for result in (token_gae(rewards, values, 1, 1, 0.5), bilevel_gae(rewards, values, 1, 1, 0.5)):
        for t in range(3):
            np.testing.assert_allclose(result[0][t], returns[t] - values[t], atol=1e-12)
            np.testing.assert_allclose(result[1][t], returns[t], atol=1e-12)


@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(0.9, 0.8), (1.0, 0.95), (0.99, 1.0), (0.5, 0.0)]
)
def test_credit_turn_gae_matches_stable_baselines(gamma, gae_lambda):
    """Its buffer holds episodes of several lengths; the last one is not finished"""
    import gymnasium as gym

    generator = np.random.default_rng(0)
    lengths = [3, 1, 5, 4]
    buffer = RolloutBuffer(
        sum(lengths),
        gym.spaces.Discrete(2),
        gym.spaces.Discrete(2),
        gae_lambda=gae_lambda,
        gamma=gamma,
        n_envs=1,
    )
    episodes = [(generator.normal(size=n), generator.normal(size=n)) for n in lengths]
    for rewards, values in episodes:
        for t, (reward, value) in enumerate(zip(rewards, values)):
            buffer.add(
                np.zeros((1, 1)),
                np.zeros((1, 1)),
                np.array([reward]),
                np.array([t == 0]),
                torch.tensor([value]),
                torch.zeros(1),
            )
    buffer.compute_returns_and_advantage(torch.tensor([0.7]), np.array([False]))
    ours = [
        turn_gae(rewards, values, gamma, gae_lambda, 0.7 if e == 3 else 0.0)
        for e, (rewards, values) in enumerate(episodes)
    ]
    np.testing.assert_allclose(
        np.concatenate([a for a, _ in ours]), buffer.advantages[:, 0], atol=1e-5
    )
    np.testing.assert_allclose(
        np.concatenate([r for _, r in ours]), buffer.returns[:, 0], atol=1e-5
    )


# Group estimators


@fast
@given(st.lists(numbers, min_size=2, max_size=9))
def test_credit_rloo_and_grpo_match_their_definitions(returns):
    mean, deviation = statistics.fmean(returns), statistics.stdev(returns)
    baselines = [statistics.fmean(returns[:i] + returns[i + 1 :]) for i in range(len(returns))]
    np.testing.assert_allclose(
        rloo(returns),
        [r - baseline for r, baseline in zip(returns, baselines)],
        rtol=1e-9,
        atol=1e-9,
    )
    np.testing.assert_allclose(
        grpo(returns, scale=False), [r - mean for r in returns], rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(
        grpo(returns),
        [(r - mean) / (deviation + 1e-4) for r in returns],
        rtol=1e-6,
        atol=1e-6,
    )


def test_credit_of_equal_returns_is_zero():
    for estimator in (rloo, grpo):
        assert not estimator([0.3] * 5).any() and not estimator([4.0]).any()
        with pytest.raises(ValueError, match=r"expected \[G\]"):
            estimator([])


def test_credit_rloo_is_unbiased():
    """For a two-armed bandit, the mean estimate over all groups of three is the true gradient

    With the mean of the whole group as the baseline, it is two thirds of it.
    """
    p, reward = 0.3, (1.0, 5.0)  # probability of arm 1, rewards of both arms

    def mean_estimate(estimator):
        total = 0.0
        for arms in itertools.product((0, 1), repeat=3):
            weight = math.prod(p if a else 1 - p for a in arms)
            # derivative of the log-probability with respect to p
            scores = np.array([1 / p if a else -1 / (1 - p) for a in arms])
            total += weight * (scores * estimator([reward[a] for a in arms])).mean()
        return total

    assert mean_estimate(rloo) == pytest.approx(reward[1] - reward[0])
    assert mean_estimate(lambda r: grpo(r, scale=False)) == pytest.approx(
        2 / 3 * (reward[1] - reward[0])
    )


@fast
@given(st.lists(st.lists(numbers, min_size=1, max_size=6), min_size=1, max_size=6))
def test_credit_rebn_matches_its_definition(returns):
    flat = [r for episode in returns for r in episode]
    mean, deviation = statistics.fmean(flat), statistics.pstdev(flat)
    result = rebn(returns)
    assert [len(g) for g in result] == [len(r) for r in returns]
    if deviation > 1e-6:
        np.testing.assert_allclose(
            np.concatenate(result), [(r - mean) / deviation for r in flat], rtol=1e-6, atol=1e-6
        )


@fast
@given(group, factors, st.booleans(), st.integers(0, 3), st.floats(0, 2), st.floats(0, 2))
def test_credit_gigpo_matches_its_definition(episodes, gamma, scale, history, alpha, step_weight):
    """Each turn is compared with all turns of the same observation and history"""
    rewards, states = [[r for r, _ in e] for e in episodes], [[s for _, s in e] for e in episodes]
    returns = [
        [sum(gamma ** (k - t) * e[k] for k in range(t, len(e))) for t in range(len(e))]
        for e in rewards
    ]
    turns = [(i, t) for i, e in enumerate(states) for t in range(len(e))]

    def recent_states(i, t, depth):
        return [states[i][k] for k in range(max(0, t - depth), t + 1)]

    def relative_return(value, others):
        if len(others) < 2:
            return 0.0
        deviation = statistics.stdev(others) + 1e-4 if scale else 1.0
        return (value - statistics.fmean(others)) / deviation

    result, total_returns = (
        gigpo(rewards, states, gamma, step_weight, scale, history, alpha),
        [sum(r) for r in rewards],
    )
    for i, t in turns:
        terms, weights = 0.0, 0.0
        for depth in range(history + 1):
            others = [
                returns[j][u]
                for j, u in turns
                if recent_states(j, u, depth) == recent_states(i, t, depth)
            ]
            if len(others) > 1:
                terms, weights = (
                    terms + (depth + 1) ** alpha * relative_return(returns[i][t], others),
                    weights + (depth + 1) ** alpha,
                )
        expected = relative_return(total_returns[i], total_returns) + step_weight * (
            terms / weights if weights else 0.0
        )
        assert result[i][t] == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_credit_rloo_and_grpo_match_trl(name, tmp_path):
    """TRL's own trainers pass the same advantages to their losses for the same rewards"""
    import datasets
    import trl

    rewards, recorded, size = [1.0, 0.0, 0.5, 2.0, -1.0, 0.0, 0.0, 3.0], [], 4
    trainer_class, config_class = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")

    class RecordingTrainer(trainer_class):
        def compute_loss(self, model, inputs, *args, **kwargs):
            recorded.append(inputs["advantages"].flatten().clone())
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = config_class(str(tmp_path), use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=len(rewards), num_generations=size, beta=0.0,
                  max_completion_length=2, report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True, shuffle_dataset=False,
                  gradient_checkpointing=False)  # fmt: skip
    RecordingTrainer(tiny_model(), reward_funcs=lambda prompts, **_: rewards, args=args, processing_class=tiny_tokenizer(),
            train_dataset=datasets.Dataset.from_dict(dict(prompt=["Hit or stick?", "Left or right?"]))).train()  # fmt: skip
    ours = [(rloo if name == "RLOO" else grpo)(rewards[i : i + size]) for i in (0, size)]
    np.testing.assert_allclose(
        sorted(torch.cat(recorded).tolist()), sorted(np.concatenate(ours)), atol=1e-5
    )


# Assignment to episodes


def make_episode(seed, rewards, end="terminated", words=None, env_id="walk") -> Episode:
    turns = [
        Turn(word, "", segment=t // 2, reward=r)
        for t, (r, word) in enumerate(zip(rewards, words or map(str, range(len(rewards)))))
    ]
    setattr(turns[-1], end, True)
    return Episode(turns, env_id=env_id, seed=seed)


def test_credit_groups_share_environment_and_seed():
    """Episodes of a group may be in any order, and some may be missing"""
    episodes = [
        make_episode(1, [0.0]),
        make_episode(2, [1.0]),
        make_episode(1, [2.0]),
        make_episode(2, [3.0], env_id="other"),
        make_episode(1, [4.0]),
        Episode(seed=1, env_id="walk"),
    ]
    assert group_by_seed(episodes) == [[0, 2, 4], [1], [3]]
    assign_group_advantages(episodes, rloo)
    assert [e.turns[0].advantage for e in episodes[:5]] == [-3.0, 0.0, 0.0, 0.0, 3.0]


def test_credit_of_groups_covers_truncation_and_segments():
    """All turns get credit, for any end of the episode and any number of segments"""
    episodes = [
        make_episode(1, [0, 0, 1, 0, 0]),
        make_episode(1, [0, 2], end="truncated"),
        make_episode(1, [1, 0, 0]),
    ]
    assign_group_advantages(episodes, grpo, gamma=0.5)
    for episode, advantage in zip(episodes, grpo([1, 2, 1])):
        assert [t.advantage for t in episode.turns] == pytest.approx([advantage] * len(episode))
        assert [t.returns for t in episode.turns] == pytest.approx(
            return_to_go(episode.rewards, 0.5)
        )
    assign_gigpo(episodes, 0.5, step_weight=2.0, history=1)
    expected = gigpo(
        [e.rewards for e in episodes],
        [[t.observation for t in e.turns] for e in episodes],
        0.5,
        2.0,
        history=1,
    )
    for episode, advantages in zip(episodes, expected):
        assert [t.advantage for t in episode.turns] == pytest.approx(advantages)
    assign_rebn(episodes, 0.5)
    for episode, advantages in zip(
        episodes, rebn([return_to_go(e.rewards, 0.5) for e in episodes])
    ):
        assert [t.advantage for t in episode.turns] == pytest.approx(advantages)


def test_credit_errors_of_groups_name_the_missing_data():
    with pytest.raises(ValueError, match="episode 1 has no seed.*group_size"):
        group_by_seed([make_episode(1, [0.0]), make_episode(None, [0.0])])
    with pytest.raises(ValueError, match="no two of 2 episodes share environment and seed"):
        group_by_seed([make_episode(1, [0.0]), make_episode(2, [0.0])])
    with pytest.raises(ValueError, match="episode 0 is not over"):
        group_by_seed([Episode([Turn("", "")], seed=1)])
    with pytest.raises(TypeError, match="item 0 is a Turn"):
        group_by_seed([Turn("", "")])
    with pytest.raises(ValueError, match="episode 0 has 2 returns and 1 states"):
        state_anchored_advantages([[1, 2], [1]], [["a"], ["a"]])
    with pytest.raises(ValueError, match="2 rewards and 1 turns with values"):
        token_gae([1, 2], [[0.0]], 1, 1)
    with pytest.raises(ValueError, match="turn 1 has no token"):
        bilevel_gae([1, 2], [[0.0], []], 1, 1)
