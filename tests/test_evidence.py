"""The size of a step follows the evidence: equal returns move nothing, and invalid responses never pay"""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from doubles import config, lake, lake_agent, make_policy
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagym.agent import Agent
from llamagym.algorithms.advantages import (
    SCALE_WEIGHT,
    AdvantageScale,
    advantage_moments,
    lower_invalid_advantages,
    normalize_advantages,
    returns_differ,
    subtract_observation_baseline,
)
from llamagym.algorithms.registry import ALGORITHMS, Algorithm, as_algorithm
from llamagym.episodes.episode import Episode, Turn
from llamagym.ppo import EQUAL_RETURNS_NATS, PPO, kl_limit
from llamagym.rollout import collect
from llamagym.training.checkpoints import load_learner, save_learner
from llamagym.training.rescoring import decision_logprobs, score_decisions

pytestmark = pytest.mark.filterwarnings(
    "ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing"
)
fast = settings(max_examples=60, deadline=None)


def agent_of(**options):
    return lake_agent(make_policy("lora", perturbed=False), max_steps=3, **options)


def played(agent, rewards=None, episodes=8):
    "Collect groups of four valid episodes, and set the rewards of their last turns"
    collected = collect(agent, episodes=episodes, num_envs=4, group_size=4)
    for e, episode in enumerate(collected):
        for turn in episode.turns:
            turn.valid, turn.reward = True, 0.0
        if rewards is not None:
            episode.turns[-1].reward = float(rewards[e % len(rewards)])
    return collected


def logprobs_of(agent, episodes):
    "Return the log-probabilities of all sampled tokens under the current weights"
    decisions = score_decisions(agent, [(e, e.turns) for e in episodes])
    return decision_logprobs(decisions, agent.learner.temperature)


def weights_of(policy):
    return [p.detach().clone() for p in policy.parameters()]


@pytest.mark.parametrize("reward", [0.0, -1.0])
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_equal_returns_move_no_weight(name, reward):
    "Without differences between returns, no weight of the policy changes, whatever the critic says"
    agent = agent_of(credit__algorithm=name, ppo__kl_coef=0.0, ppo__epochs=1)
    torch.nn.init.normal_(agent.policy.value_head.out.weight, std=0.01)
    before = weights_of(agent.policy)
    for _ in range(2):
        agent.learner.update(played(agent, [reward]))
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters()))


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("name", ["ppo", "reinforce", "grpo"])
def test_equal_returns_drop_the_momentum_of_earlier_batches(name, kind):
    "After a batch with differences, one without moves no weight, although Adam has a direction"
    options = dict(credit__algorithm=name, ppo__kl_coef=0.0, ppo__learning_rate=1e-2)
    agent = agent_of(**options, ppo__optimizer=kind)
    metrics = agent.learner.update(played(agent, [0.0, 1.0]))
    assert metrics["grad_norm"] > 0
    before = weights_of(agent.policy)
    agent.learner.update(played(agent, [1.0]))
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters()))


def test_equal_returns_make_their_batch_hardly_less_likely():
    "With the KL penalty alone, a batch becomes at most e^3 times less likely, at any learning rate"
    agent = agent_of(
        ppo__learning_rate=1e-2, ppo__kl_coef=1.0, ppo__epochs=20, ppo__mini_batch_size=99
    )
    with torch.no_grad():  # away from the reference, so that the penalty has a gradient
        for parameter in agent.policy.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    agent.policy.bump_version()
    episodes = played(agent, [1.0], episodes=16)
    turns = [turn for episode in episodes for turn in episode.turns]
    sampled = np.concatenate([turn.logprobs for turn in turns])
    free, before = copy.deepcopy(agent), weights_of(agent.policy)
    agent.learner.update(episodes)
    lost = sampled.sum() - logprobs_of(agent, episodes).sum()
    assert lost < EQUAL_RETURNS_NATS + 0.5  # the step is cut by a linear model of the likelihood
    assert not all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llamagym.ppo.EQUAL_RETURNS_NATS", np.inf)
        free.learner.update(episodes)
    assert sampled.sum() - logprobs_of(free, episodes).sum() > 10 * EQUAL_RETURNS_NATS


def test_equal_returns_keep_the_policy_within_rounding_errors():
    "The KL penalty at the reference has a gradient of rounding errors, which Adam does not blow up"
    agent = agent_of()
    for _ in range(3):
        metrics = agent.learner.update(played(agent, [0.0]))
    assert metrics["ref_kl"] < 1e-5


@pytest.mark.slow
def test_equal_returns_of_twenty_updates_keep_the_policy():
    "All rewards are 0, responses are as valid or invalid as they are: the KL to the start stays 0"
    agent = agent_of()
    invalid = []
    for update in range(20):
        episodes = collect(agent, episodes=16, num_envs=8, first=16 * update)
        assert not any(turn.reward for turn in episodes.turns)
        metrics = agent.learner.update(episodes)
        invalid.append(metrics["invalid_rate"])
    assert metrics["ref_kl"] < 1e-4
    assert np.mean(invalid[-5:]) == pytest.approx(np.mean(invalid[:5]), abs=0.1)


def test_equal_returns_leave_the_kl_penalty():
    "A policy that has moved is pulled back to the reference by a batch of equal returns"
    agent = agent_of(ppo__learning_rate=1e-3, ppo__kl_coef=1.0, ppo__epochs=2)
    for _ in range(2):
        agent.learner.update(played(agent, [0.0, 1.0]))
    moved = agent.learner.update(played(agent, [0.0, 1.0]))["ref_kl"]
    for _ in range(4):
        metrics = agent.learner.update(played(agent, [0.0]))
    assert moved > 1e-4 and metrics["ref_kl"] < 0.5 * moved


def test_equal_returns_are_no_obstacle_to_an_estimator_of_your_own():
    "A function that fills advantages from elsewhere than the rewards keeps them"
    agent = agent_of()

    def from_index(episodes, config):
        for episode in episodes:
            for turn in episode.turns:
                turn.advantage = turn.returns = float(episode.index)

    agent.learner.algorithm = as_algorithm(from_index)
    episodes = played(agent, [0.0])
    agent.learner.compute_advantages(episodes)
    assert len({turn.advantage for turn in episodes.turns}) > 1
    agent.learner.algorithm = Algorithm("strict", from_index)
    agent.learner.compute_advantages(episodes)
    assert {turn.advantage for turn in episodes.turns} == {0.0}


def test_equal_returns_with_bootstrapped_values_are_evidence_once_the_scale_is_known():
    "Truncated episodes may end in states of different value; before any difference that is noise"
    agent = agent_of()
    episodes = played(agent, [0.0])
    for episode in episodes:
        episode.turns[-1].terminated, episode.turns[-1].truncated = False, True
        episode.final_ids = episode.segments[-1].ids
    learner: PPO = agent.learner
    torch.nn.init.normal_(agent.policy.value_head.out.weight, std=0.5)
    learner.compute_advantages(episodes)
    assert {turn.advantage for turn in episodes.turns} == {0.0}
    learner.advantage_scale.std = 1e-3
    learner.compute_advantages(episodes)
    finals = [episode.final_value for episode in episodes]
    assert np.std(finals) > 1e-3
    assert len({turn.advantage for turn in episodes.turns}) > 1


@pytest.mark.parametrize(
    "rewards, gamma, expected",
    [
        ([[0, 1], [1, 0]], 1.0, False),  # equal sums
        ([[0, 1], [1, 0]], 0.9, True),  # but not when discounted
        ([[0, 0], [0, 0]], 1.0, False),
        ([[1e6], [1e6 + 1e-3]], 1.0, False),  # float noise of a large return
        ([[0.0], [1e-3]], 1.0, True),
        ([[0, 0]], 1.0, False),  # a single episode
        ([[0, 2]], 1.0, True),
        ([[1], []], 1.0, True),
        ([[np.inf], [0]], 1.0, True),
    ],
)
def test_returns_differ(rewards, gamma, expected):
    episodes = [Episode([Turn("", "", reward=r) for r in row]) for row in rewards]
    assert returns_differ(episodes, gamma) is expected


def test_advantages_are_divided_by_a_scale_that_does_not_collapse():
    "The divisor is the batch's deviation, but at least the running one: by hand"
    running, rng = 0.0, np.random.default_rng(0)
    scale = AdvantageScale()
    for size in (1.0, 0.8, 0.01, 0.01, 5.0):
        numbers = size * rng.normal(size=32)
        episodes = [Episode([Turn("", "", advantage=x)]) for x in numbers.tolist()]
        mean, std = normalize_advantages(episodes, scale.min_std)
        divisor = max(numbers.std(), running)
        found = [episode.turns[0].advantage for episode in episodes]
        np.testing.assert_allclose(found, (numbers - numbers.mean()) / divisor, atol=1e-12)
        scale.newest = std
        scale.advance()
        running = std if not running else (1 - SCALE_WEIGHT) * running + SCALE_WEIGHT * std
        assert scale.std == pytest.approx(running)


def test_moments_of_advantages():
    "Three of four advantages are -1, one is 3: deviation sqrt(3), third moment 6"
    episodes = [Episode([Turn("", "", advantage=a)]) for a in (-1.0, -1.0, -1.0, 3.0)]
    assert advantage_moments(episodes) == pytest.approx((3**0.5, 6 / 3**1.5))
    assert advantage_moments(episodes[:1] * 3) == (0.0, 0.0)


def test_kl_limit_follows_the_evidence():
    "A tenth of the usual advantages, a hundredth of the KL; never below what equal returns may spend"
    batch = SimpleNamespace(advantages=torch.tensor([1.0, -1.0]), num_decisions=1_000_000)
    assert kl_limit(batch, 1.0, 0.02) == pytest.approx(0.03)
    assert kl_limit(batch, 0.1, 0.02) == pytest.approx(0.03 / 100)
    assert kl_limit(batch, 1e-6, 0.02) == EQUAL_RETURNS_NATS / batch.num_decisions
    assert kl_limit(batch, 0.1, None) == math.inf
    batch.num_decisions = 10
    assert kl_limit(batch, 1e-6, 0.02) == pytest.approx(0.03)  # a small batch: the configured limit
    batch.advantages = torch.zeros(2)
    assert kl_limit(batch, 1.0, None) == EQUAL_RETURNS_NATS / 10
    assert kl_limit(batch, 1.0, 0.02) == pytest.approx(0.03)


@pytest.mark.parametrize(
    "advantages, running, invalid, expected",
    [
        ([1.0, 1.0, 1.0, -3.0], 3**0.5, 0, 1.0),
        ([0.1, 0.1, 0.1, -0.3], 3**0.5, 0, 0.1),  # few failures, smaller than usual
        ([-0.1, -0.1, -0.1, 0.3], 3**0.5, 0, 1.0),  # few successes
        ([1.0, 1.0, 1.0, -3.0], 0.1, 0, 1.0),  # larger than usual
        ([0.1, 0.1, 0.1, -0.3], 3**0.5, 1, 1.0),  # the format is still learned
        ([0.1, 0.1, 0.1, -0.3], 0.0, 0, 1.0),  # the first batch
        ([0.0, 0.0, 0.0, 0.0], 1.0, 0, 0.0),
    ],
)
def test_evidence_is_the_usual_share_unless_something_rare_is_learned(
    advantages, running, invalid, expected
):
    turns = [Turn("", "", advantage=a, valid=i >= invalid) for i, a in enumerate(advantages)]
    scale = AdvantageScale(running)
    scale.measure([Episode([turn]) for turn in turns])
    assert scale.evidence == pytest.approx(expected)


@fast
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(-3, 3), st.booleans()), min_size=1, max_size=12
    ),
    st.floats(0.5, 8),
)
def test_observation_baseline_equals_a_loop_over_pairs(rows, critic_weight):
    "Each turn is compared with the other valid turns of its observation, shrunken to the critic's value"
    turns = [Turn(o, "x", valid=valid, advantage=a) for o, a, valid in rows]
    expected = []
    for i, (observation, advantage, _) in enumerate(rows):
        others = [a for j, (o, a, ok) in enumerate(rows) if j != i and o == observation and ok]
        expected.append(advantage - sum(others) / (len(others) + critic_weight))
    subtract_observation_baseline([Episode(turns[:5]), Episode(turns[5:])], critic_weight)
    np.testing.assert_allclose([turn.advantage for turn in turns], expected, atol=1e-12)


@pytest.mark.parametrize("name", ["ppo", "ppo_token", "reinforce"])
def test_observation_baseline_is_for_turns_of_algorithms_with_a_critic(name):
    "Other advantages are as without it"
    found = []
    for weight in (None, 1.0):
        torch.manual_seed(0)
        agent = agent_of(credit__algorithm=name, credit__observation_baseline=weight)
        torch.nn.init.normal_(agent.policy.value_head.out.weight, std=0.1)
        episodes = played(agent, [0.0, 1.0, 3.0])
        for number, turn in enumerate(episodes.turns):
            turn.observation = "the same" if number % 3 else f"one of its own, {number}"
        agent.learner.compute_advantages(episodes)
        rows = [
            t.advantage if t.token_advantages is None else t.token_advantages
            for t in episodes.turns
        ]
        found.append(np.concatenate([np.atleast_1d(row) for row in rows]))
    assert np.allclose(*found) == (name != "ppo")


def test_observation_baseline_keeps_the_expected_gradient():
    "Bandit, exact expectation over all batches of three actions: as with the raw rewards"
    probs, rewards = np.array([0.2, 0.5, 0.3]), np.array([1.0, -2.0, 0.5])
    total = np.zeros(3)
    for actions in itertools.product(range(3), repeat=3):
        turns = [Turn("s", "x", advantage=rewards[a] - 0.7) for a in actions]  # a wrong critic
        subtract_observation_baseline([Episode(turns)], critic_weight=2.0)
        scores = np.eye(3)[list(actions)] - probs  # gradient of log-probabilities by logits
        weight = probs[list(actions)].prod() / 3
        total += weight * sum(t.advantage * score for t, score in zip(turns, scores))
    np.testing.assert_allclose(total, probs * (rewards - probs @ rewards), atol=1e-12)


def test_advantage_scale_is_saved_with_the_learner(tmp_path):
    agent = agent_of()
    agent.learner.update(played(agent, [0.0, 1.0]))
    assert agent.learner.advantage_scale.std > 0
    save_learner(agent.learner, tmp_path)
    other = agent_of()
    load_learner(other.learner, tmp_path)
    assert other.learner.advantage_scale.std == agent.learner.advantage_scale.std
    assert other.learner.advantage_scale.peak == agent.learner.advantage_scale.peak > 0


turns = st.builds(
    Turn,
    st.sampled_from(["a", "b"]),
    st.just("x"),
    valid=st.booleans(),
    advantage=st.floats(-3, 3),
    invalid_reward=st.sampled_from([None, None, -1.0]),
)


@fast
@given(st.lists(turns, min_size=1, max_size=12), st.sampled_from([0.0, 0.5]), st.booleans())
def test_invalid_pays_less_than_any_valid_response_in_its_state(many, margin, per_token):
    "Brute force over all pairs; the order of invalid responses, and set penalties, are kept"
    many = copy.deepcopy(many)
    if per_token:
        for turn in many:
            turn.token_advantages = np.float32([turn.advantage, turn.advantage])
            turn.advantage = None

    def numbers():
        return [t.advantage if not per_token else float(t.token_advantages[0]) for t in many]

    before = numbers()
    lower_invalid_advantages([Episode([turn]) for turn in many], margin)
    after = numbers()
    ranked = [i for i, t in enumerate(many) if not t.valid and t.invalid_reward is None]
    valid = [i for i, t in enumerate(many) if t.valid]
    if not ranked or not valid:
        assert after == before
        return
    shift = np.mean([before[i] for i in valid])
    for i in set(range(len(many))) - set(ranked):
        assert after[i] == pytest.approx(before[i] - shift, abs=1e-5)
    for i in ranked:
        same = [j for j in valid if many[j].observation == many[i].observation]
        limit = min([after[j] for j in same] + [0.0]) - margin
        assert after[i] <= limit + 1e-5
        for j in ranked:
            if many[i].observation == many[j].observation:
                assert after[i] - after[j] == pytest.approx(before[i] - before[j], abs=1e-5)


def logprob_change(name, invalid_reward):
    "Return how one update changes the log-probability of invalid responses, whose fallback won"
    agent = agent_of(
        credit__algorithm=name, ppo__epochs=1, ppo__learning_rate=1e-4, ppo__mini_batch_size=1000
    )
    torch.manual_seed(0)
    episodes = played(agent, [0.0])
    for e, episode in enumerate(episodes):
        for turn in episode.turns:
            turn.observation = "the same state"
            turn.valid = e % 2 == 0
            turn.invalid_reward = None if turn.valid else invalid_reward
        episode.turns[-1].reward = float(e % 2)

    rows = [s for e in episodes for s in e.segments]
    owner = [e for e, episode in enumerate(episodes) for _ in episode.segments]

    def mean_logprob():
        changes = []
        for row, e in zip(rows, owner):
            if e % 2:
                ids = torch.tensor([row.ids])
                with torch.no_grad():
                    logits = agent.policy.causal_lm(ids).logits[0, :-1].log_softmax(-1)
                taken = logits.gather(-1, ids[0, 1:, None]).squeeze(-1)
                mask = torch.tensor(row.mask[1:], dtype=torch.bool)
                changes.append(taken[mask].mean().item())
        return float(np.mean(changes))

    before = mean_logprob()
    agent.learner.update(episodes)
    return mean_logprob() - before


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_invalid_pays_not_even_when_the_fallback_wins(name):
    "By the model's own logits: one update makes winning invalid responses less probable"
    assert logprob_change(name, None) < 0 < logprob_change(name, 0.0)


@pytest.mark.parametrize("given", [None, -0.5])
def test_invalid_rewards_are_recorded_with_their_turns(given):
    "Rollouts and `act` record whether a reward for invalid responses is set; valid turns have none"
    task = lake(max_steps=3)
    task.invalid_reward = given
    agent = Agent.for_task(task, make_policy("lora"), config=config())
    turns = collect(agent, episodes=4, num_envs=2).turns
    env = task.make()
    observation, _ = env.reset(seed=0)
    agent.act(observation)
    turns.append(agent.recorder.turns[-1])
    assert any(not turn.valid for turn in turns)
    for turn in turns:
        assert turn.invalid_reward == (None if turn.valid else given)
        assert turn.valid or turn.reward <= (given or 0.0)
