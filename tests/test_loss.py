"""The policy loss matches its definition token by token, and its gradient matches autograd on the formula."""

import copy
import math

import numpy as np
import pytest
import torch
from doubles import config, make_policy, walk_task
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagym.agent import Agent
from llamagym.algorithms.batch import Batch
from llamagym.algorithms.forward import compute_values_and_ref_logprobs
from llamagym.algorithms.losses import k2_kl, log_ratios, policy_loss
from llamagym.algorithms.registry import Algorithm
from llamagym.config import PPOConfig
from llamagym.rollout import collect

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action")


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-4, 4),
    st.floats(-3, 3),
    st.floats(0.01, 0.9),
    st.floats(0.01, 2) | st.none(),
    st.floats(1.01, 5) | st.none(),
)
def test_loss_matches_its_definition(log_ratio, advantage, low, high, dual):
    """The loss is the smaller of unclipped and clipped objective, bounded by the dual clip for negative advantages"""
    ratio = math.exp(log_ratio)
    gain = min(
        ratio * advantage, min(max(ratio, 1 - low), 1 + (low if high is None else high)) * advantage
    )
    if dual is not None and advantage < 0:
        gain = max(gain, dual * advantage)
    x = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    loss, clipped = policy_loss(x, torch.tensor([advantage], dtype=torch.float64), low, high, dual)
    assert loss.item() == pytest.approx(-gain, rel=1e-9, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    if clipped.item():
        assert gradient.item() == 0
    else:
        assert gradient.item() == pytest.approx(-ratio * advantage, rel=1e-9, abs=1e-12)


def test_loss_gradient_is_zero_outside_the_clip_range():
    """The gradient is zero exactly outside the clip range, for positive and negative advantages"""
    ratios = torch.tensor([0.5, 0.79, 0.81, 1.19, 1.25, 1.31, 2.9, 3.1])
    has_gradient = {
        sign: (~policy_loss(ratios.log(), sign * torch.ones(8), 0.2, 0.3, 3.0)[1]).tolist()
        for sign in (1, -1)
    }
    assert has_gradient == {1: [True] * 5 + [False] * 3, -1: [False] * 2 + [True] * 5 + [False]}


def agent_of(**options) -> Agent:
    settings = (
        dict(
            ppo__epochs=1,
            ppo__kl_coef=0.0,
            ppo__mini_batch_size=1000,
            ppo__vf_coef=0.0,
            ppo__max_grad_norm=1e9,
            ppo__normalize_returns=False,
        )
        | options
    )
    return Agent.for_task(
        walk_task(3, context="full"), make_policy("lora"), config=config(**settings)
    )


def off_policy_episodes(agent, noise=0.3):
    """Return episodes sampled by another policy than the trained one"""
    episodes, generator = collect(agent, episodes=6, num_envs=3), np.random.default_rng(0)
    for turn in (turn for episode in episodes for turn in episode.turns):
        turn.logprobs = turn.logprobs + noise * generator.normal(size=len(turn.logprobs)).astype(
            np.float32
        )
    return episodes


def test_loss_ratios_match_their_definition():
    agent = agent_of()
    episodes = off_policy_episodes(agent)
    for turn in (turn for episode in episodes for turn in episode.turns):
        turn.advantage = turn.returns = 0.0
    batch = Batch.from_episodes(episodes)
    new = batch.logprobs + torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(0))
    log_ratio = (new - batch.logprobs).tolist()
    for scope in ("token", "turn", "sequence"):
        ratio, counts = log_ratios(new, batch, scope)
        for i in range(batch.num_tokens):
            index = {
                "token": torch.arange(batch.num_tokens),
                "turn": batch.turn_of_token,
                "sequence": batch.row_of_token,
            }[scope]
            same_scope = [log_ratio[j] for j in range(batch.num_tokens) if index[j] == index[i]]
            expected = sum(same_scope) / (len(same_scope) if scope == "sequence" else 1)
            assert ratio[i].item() == pytest.approx(expected, abs=1e-5) and counts[
                i
            ].item() == pytest.approx(1 / len(same_scope))
    assert batch.num_tokens > batch.num_turns > batch.num_rows


def gradients(agent, episodes) -> list[torch.Tensor]:
    """Return the gradients of an update's single step"""
    found, step = [], agent.learner.optimizer.step
    agent.learner.optimizer.step = lambda: (
        found.extend(p.grad.clone() for p in agent.policy.parameters()) or step()
    )
    agent.learner.update(copy.deepcopy(episodes))
    return found


@pytest.mark.parametrize(
    "clip",
    [dict(), dict(ppo__clip_range=0.1, ppo__clip_range_high=0.25, ppo__dual_clip=1.3)],
    ids=["wide", "narrow"],
)
@pytest.mark.parametrize("ratio", ["token", "turn", "sequence"])
def test_loss_gradient_matches_the_formula(ratio, clip):
    """The gradient matches autograd on the written objective: a mean over tokens, turns or rows"""
    options = dict(ppo__ratio=ratio, ppo__clip_range=50.0) | clip
    agent = agent_of(**options)
    episodes, policy_copy, ppo_config = (
        off_policy_episodes(agent),
        copy.deepcopy(agent.policy),
        agent.config.ppo,
    )
    actual = gradients(agent, episodes)
    with_advantages = copy.deepcopy(episodes)
    # computes the advantages, which do not depend on the weights with a critic on the reference
    agent.learner.update(with_advantages)
    objective, tokens, turns = 0.0, sum(e.num_tokens for e in episodes), sum(map(len, episodes))

    def token_objective(ratio, advantage):
        value = torch.minimum(
            ratio * advantage,
            ratio.clamp(
                1 - ppo_config.clip_range, 1 + (ppo_config.clip_range_high or ppo_config.clip_range)
            )
            * advantage,
        )
        return (
            torch.maximum(value, torch.tensor(ppo_config.dual_clip * advantage))
            if ppo_config.dual_clip and advantage < 0
            else value
        )

    for episode in with_advantages:
        ids, parts = torch.tensor([episode.segments[0].ids]), []
        for turn in episode.turns:
            positions = torch.arange(turn.start, turn.start + len(turn.response_ids))
            parts.append(
                (
                    policy_copy.score(ids, torch.zeros_like(positions), positions).logprobs
                    - torch.from_numpy(turn.logprobs),
                    turn.advantage,
                )
            )
        if ratio == "token":
            objective = (
                objective
                + sum(token_objective(x.exp(), a) for log_ratio, a in parts for x in log_ratio)
                / tokens
            )
        elif ratio == "turn":
            objective = (
                objective
                + sum(token_objective(log_ratio.sum().exp(), a) for log_ratio, a in parts) / turns
            )
        else:
            mean = torch.cat([log_ratio for log_ratio, _ in parts]).mean().exp()
            objective = objective + sum(
                len(log_ratio) * token_objective(mean, a) for log_ratio, a in parts
            ) / sum(len(r) for r, _ in parts) / len(episodes)
    expected = torch.autograd.grad(-objective, list(policy_copy.parameters()))
    assert max(g.abs().max() for g in expected) > 1e-4
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("ratio", ["turn", "sequence"])
def test_loss_does_not_depend_on_micro_batches(ratio):
    """Each micro-batch holds whole turns and rows"""
    agent = agent_of(ppo__ratio=ratio)
    episodes = off_policy_episodes(agent)
    whole = gradients(agent, episodes)
    split = gradients(agent_of(ppo__ratio=ratio, ppo__token_budget=1), episodes)
    for a, b in zip(whole, split):
        # single entries are sums that cancel, so only their norm is accurate in float32
        assert (a - b).norm() <= 2e-4 * b.norm()


def test_loss_with_kl_in_the_reward_equals_lowered_rewards():
    """Gradients equal those for explicitly lowered rewards; the stored rewards do not change"""
    agent = agent_of(ppo__kl_placement="reward", ppo__kl_coef=0.7, credit__normalize=False)
    episodes = off_policy_episodes(agent)
    compute_values_and_ref_logprobs(agent.policy, episodes)
    for turn in (turn for episode in episodes for turn in episode.turns):
        turn.reward += 0.1
    rewards = [e.rewards.tolist() for e in episodes]
    lowered = copy.deepcopy(episodes)
    for turn in (turn for episode in lowered for turn in episode.turns):
        turn.reward -= 0.7 * sum(turn.logprobs.tolist()) - 0.7 * sum(turn.ref_logprobs.tolist())
    expected = gradients(agent_of(ppo__kl_coef=0.0, credit__normalize=False), lowered)
    for a, b in zip(gradients(agent, episodes), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    agent.learner.update(episodes)
    assert [e.rewards.tolist() for e in episodes] == rewards
    # the critic's returns include the penalties
    assert abs(episodes[0].turns[0].returns - sum(rewards[0])) > 1e-3

    def interrupt(*args):
        raise KeyboardInterrupt

    agent.learner.algorithm = Algorithm("stopped", interrupt)
    with pytest.raises(KeyboardInterrupt):
        agent.learner.update(episodes)
    assert [e.rewards.tolist() for e in episodes] == rewards


def test_loss_k2_has_the_gradient_of_the_kl_and_k3_does_not():
    """The expected gradient is that of the KL for k2, of the reverse KL for k3, and zero for k1"""
    generator = torch.Generator().manual_seed(0)
    logits, ref = (
        torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_(),
        torch.randn(7, generator=generator, dtype=torch.float64),
    )
    p, q = logits.log_softmax(-1), ref.log_softmax(-1)

    def expected_gradient(estimate):  # weighted by the tokens' probabilities
        (gradient,) = torch.autograd.grad(
            (p.detach().exp() * estimate).sum(), logits, retain_graph=True
        )
        return gradient

    (kl,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((q.exp() * (q - p)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(expected_gradient(k2_kl(p, q)), kl)
    k3 = expected_gradient((q - p).exp() - 1 - (q - p))
    torch.testing.assert_close(k3, reverse)
    assert (
        torch.linalg.norm(k3 - kl) > 0.1 * torch.linalg.norm(kl)
        and expected_gradient(p - q).abs().max() < 1e-12
    )


def test_loss_options_are_validated():
    for invalid, message in (
        (dict(ratio="word"), "ratio='word'"),
        (dict(dual_clip=1.0), "dual_clip=1.0"),
        (dict(clip_range_high=0.0), "clip_range_high=0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            PPOConfig(**invalid)
