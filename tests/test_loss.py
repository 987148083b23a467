"""The parts of the policy's loss: against their definition token by token, and their gradient against autograd on the written formula."""

import copy
import math

import numpy as np
import pytest
import torch
from doubles import config, make_policy, walk_task
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagym.agent import Agent
from llamagym.algorithms import Algorithm
from llamagym.batch import Batch
from llamagym.config import PPOConfig
from llamagym.losses import k2_kl, log_ratios, policy_loss
from llamagym.passes import annotate
from llamagym.rollout import collect

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action")


@settings(max_examples=200, deadline=None)
@given(st.floats(-4, 4), st.floats(-3, 3), st.floats(0.01, 0.9), st.floats(0.01, 2) | st.none(), st.floats(1.01, 5) | st.none())
def test_loss_is_its_definition(log_ratio, advantage, low, high, dual):
    """min of the free and the clipped gain, and for a bad token never less than the dual clip"""
    ratio = math.exp(log_ratio)
    gain = min(ratio * advantage, min(max(ratio, 1 - low), 1 + (low if high is None else high)) * advantage)
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


def test_loss_clips_where_it_says():
    """Each side of each edge, for good and bad tokens: which of them are still pulled"""
    ratios = torch.tensor([0.5, 0.79, 0.81, 1.19, 1.25, 1.31, 2.9, 3.1])
    pulled = {sign: (~policy_loss(ratios.log(), sign * torch.ones(8), 0.2, 0.3, 3.0)[1]).tolist() for sign in (1, -1)}
    assert pulled == {1: [True] * 5 + [False] * 3, -1: [False] * 2 + [True] * 5 + [False]}


def agent_of(**options) -> Agent:
    given = dict(ppo__epochs=1, ppo__kl_coef=0.0, ppo__mini_batch_size=1000, ppo__vf_coef=0.0, ppo__max_grad_norm=1e9, ppo__normalize_returns=False) | options
    return Agent.for_task(walk_task(3, context="full"), make_policy("lora"), config=config(**given))


def sampled(agent, noise=0.3):
    """Episodes whose log-probabilities are those of another policy than the one that is trained"""
    episodes, generator = collect(agent, episodes=6, num_envs=3), np.random.default_rng(0)
    for turn in (turn for episode in episodes for turn in episode.turns):
        turn.logprobs = turn.logprobs + noise * generator.normal(size=len(turn.logprobs)).astype(np.float32)
    return episodes


def test_loss_ratios_are_their_definition():
    agent = agent_of()
    episodes = sampled(agent)
    for turn in (turn for episode in episodes for turn in episode.turns):
        turn.advantage = turn.returns = 0.0
    batch = Batch.from_episodes(episodes)
    new = batch.logprobs + torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(0))
    step = (new - batch.logprobs).tolist()
    for of in ("token", "turn", "sequence"):
        ratio, counts = log_ratios(new, batch, of)
        for i in range(batch.num_tokens):
            index = {"token": torch.arange(batch.num_tokens), "turn": batch.token_turn, "sequence": batch.token_row}[of]
            mine = [step[j] for j in range(batch.num_tokens) if index[j] == index[i]]
            expected = sum(mine) / (len(mine) if of == "sequence" else 1)
            assert ratio[i].item() == pytest.approx(expected, abs=1e-5) and counts[i].item() == pytest.approx(1 / len(mine))
    assert batch.num_tokens > batch.num_turns > batch.num_rows


def gradients(agent, episodes) -> list[torch.Tensor]:
    """What an update's only step goes down"""
    found, step = [], agent.learner.optimizer.step
    agent.learner.optimizer.step = lambda: found.extend(p.grad.clone() for p in agent.policy.parameters()) or step()
    agent.learner.learn(copy.deepcopy(episodes))
    return found


@pytest.mark.parametrize("clip", [dict(), dict(ppo__clip_range=0.1, ppo__clip_range_high=0.25, ppo__dual_clip=1.3)], ids=["wide", "narrow"])
@pytest.mark.parametrize("ratio", ["token", "turn", "sequence"])
def test_loss_gradient_is_that_of_the_formula(ratio, clip):
    """Autograd on the objective as it is written: a mean over tokens, over turns, or over rows"""
    options = dict(ppo__ratio=ratio, ppo__clip_range=50.0) | clip
    agent = agent_of(**options)
    episodes, twin, c = sampled(agent), copy.deepcopy(agent.policy), agent.config.ppo
    ours = gradients(agent, episodes)
    credited = copy.deepcopy(episodes)
    agent.learner.learn(credited)  # for the advantages, which the weights have no part in: the critic reads the reference
    objective, tokens, turns = 0.0, sum(e.num_tokens for e in episodes), sum(map(len, episodes))

    def gain(ratio, advantage):
        value = torch.minimum(ratio * advantage, ratio.clamp(1 - c.clip_range, 1 + (c.clip_range_high or c.clip_range)) * advantage)
        return torch.maximum(value, torch.tensor(c.dual_clip * advantage)) if c.dual_clip and advantage < 0 else value

    for episode in credited:
        ids, parts = torch.tensor([episode.segments[0].ids]), []
        for turn in episode.turns:
            positions = torch.arange(turn.start, turn.start + len(turn.response_ids))
            parts.append((twin.score(ids, torch.zeros_like(positions), positions).logprobs - torch.from_numpy(turn.logprobs), turn.advantage))
        if ratio == "token":
            objective = objective + sum(gain(x.exp(), a) for log_ratio, a in parts for x in log_ratio) / tokens
        elif ratio == "turn":
            objective = objective + sum(gain(log_ratio.sum().exp(), a) for log_ratio, a in parts) / turns
        else:
            mean = torch.cat([log_ratio for log_ratio, _ in parts]).mean().exp()
            objective = objective + sum(len(log_ratio) * gain(mean, a) for log_ratio, a in parts) / sum(len(r) for r, _ in parts) / len(episodes)
    theirs = torch.autograd.grad(-objective, list(twin.parameters()))
    assert max(g.abs().max() for g in theirs) > 1e-4
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("ratio", ["turn", "sequence"])
def test_loss_does_not_depend_on_micro_batches(ratio):
    """Turns and rows are whole in each"""
    agent = agent_of(ppo__ratio=ratio)
    episodes = sampled(agent)
    whole = gradients(agent, episodes)
    pieces = gradients(agent_of(ppo__ratio=ratio, ppo__token_budget=1), episodes)
    for a, b in zip(whole, pieces):
        assert (a - b).norm() <= 2e-4 * b.norm()  # single entries are sums that cancel, and as inexact as the processor's float32


def test_loss_of_the_kl_in_the_reward():
    """Gradients are those of rewards that were lowered by hand, with no KL in the loss; the environment's rewards stay what they were"""
    agent = agent_of(ppo__kl_in="reward", ppo__kl_coef=0.7, credit__normalize=False)
    episodes = sampled(agent)
    annotate(agent.policy, episodes)
    for turn in (turn for episode in episodes for turn in episode.turns):
        turn.reward += 0.1
    rewards = [e.rewards.tolist() for e in episodes]
    lowered = copy.deepcopy(episodes)
    for turn in (turn for episode in lowered for turn in episode.turns):
        turn.reward -= 0.7 * sum(turn.logprobs.tolist()) - 0.7 * sum(turn.ref_logprobs.tolist())
    by_hand = gradients(agent_of(ppo__kl_coef=0.0, credit__normalize=False), lowered)
    for a, b in zip(gradients(agent, episodes), by_hand):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    agent.learner.learn(episodes)
    assert [e.rewards.tolist() for e in episodes] == rewards
    assert abs(episodes[0].turns[0].returns - sum(rewards[0])) > 1e-3  # the critic is taught the costs as well

    def stopped(*args):
        raise KeyboardInterrupt

    agent.learner.algorithm = Algorithm("stopped", stopped)
    with pytest.raises(KeyboardInterrupt):
        agent.learner.learn(episodes)
    assert [e.rewards.tolist() for e in episodes] == rewards


def test_loss_of_k3_has_another_gradient_than_the_kl():
    """Over all tokens of a distribution: the expected gradient of k2 is the KL's, that of k3 is the other KL's; k1's is nothing"""
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_(), torch.randn(7, generator=generator, dtype=torch.float64)
    p, q = logits.log_softmax(-1), ref.log_softmax(-1)

    def gradient(estimate):  # of each token, weighed by how often it is sampled
        (found,) = torch.autograd.grad((p.detach().exp() * estimate).sum(), logits, retain_graph=True)
        return found

    (kl,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((q.exp() * (q - p)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(gradient(k2_kl(p, q)), kl)
    k3 = gradient((q - p).exp() - 1 - (q - p))
    torch.testing.assert_close(k3, reverse)
    assert torch.linalg.norm(k3 - kl) > 0.1 * torch.linalg.norm(kl) and gradient(p - q).abs().max() < 1e-12


def test_loss_options_are_checked():
    for bad, told in ((dict(ratio="word"), "ratio='word'"), (dict(dual_clip=1.0), "dual_clip=1.0"), (dict(clip_range_high=0.0), "clip_range_high=0.0")):
        with pytest.raises(ValueError, match=told):
            PPOConfig(**bad)
