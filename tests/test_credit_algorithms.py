"""Algorithms by name: what they are given, what they do to the policy and the critic, and what they refuse."""

import copy

import numpy as np
import pytest
import torch
from doubles import config, make_policy, walk_task

from llamagym.agent import Agent
from llamagym.algorithms import ALGORITHMS, Algorithm, as_algorithm, register_algorithm
from llamagym.credit import return_to_go
from llamagym.groups import batch_normalized, gigpo, group_normalized, leave_one_out
from llamagym.passes import annotate
from llamagym.ppo import PPO
from llamagym.rollout import collect
from llamagym.task import episode_seed
from llamagym.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action")


def pays(seed, t):
    """Walk n pays more, the later and the larger its number; what was said does not matter"""
    return (seed % 97) / 10 + t


def agent_of(policy=None, **options) -> Agent:
    return Agent.for_task(walk_task(3, pays=pays), policy or make_policy("lora"), config=config(ppo__epochs=1, ppo__kl_coef=0.0, credit__gamma=0.9, **options))


def played(agent, groups=2, size=4, **how):
    return collect(agent, episodes=groups * size, num_envs=3, group_size=size, **how)


def test_credit_groups_begin_alike_and_speak_for_themselves():
    """Environments by i // G, words by i; whatever the slots"""
    agent = agent_of()
    episodes = played(agent, seed=2, first=4)
    assert [e.seed for e in episodes] == [episode_seed(2, i // 4) for i in range(4, 12)] and [e.index for e in episodes] == list(range(4, 12))
    for group in (episodes[:4], episodes[4:]):
        assert len({e.turns[0].observation for e in group}) == 1 and len({tuple(e.turns[0].response_ids) for e in group}) > 1
    for num_envs in (1, 8):
        again = collect(agent, episodes=8, num_envs=num_envs, group_size=4, seed=2, first=4)
        assert [[t.response_ids for t in e.turns] for e in again] == [[t.response_ids for t in e.turns] for e in episodes]
    with pytest.raises(ValueError, match="group_size=0"):
        collect(agent, episodes=4, group_size=0)


def expected_advantages(name, episodes, gamma):
    groups = [episodes[:4], episodes[4:]]
    if name == "reinforce":
        return batch_normalized([return_to_go(e.rewards, gamma) for e in episodes])
    if name == "gigpo":
        return [a for g in groups for a in gigpo([e.rewards for e in g], [[t.observation for t in e.turns] for e in g], gamma)]
    estimator = dict(rloo=leave_one_out, grpo=group_normalized, drgrpo=lambda r: group_normalized(r, scale=False))[name]
    return [np.full(len(e), a) for g in groups for e, a in zip(g, estimator([e.total_reward for e in g]))]


@pytest.mark.parametrize("name", sorted(name for name, algorithm in ALGORITHMS.items() if not algorithm.needs_critic))
def test_credit_without_a_critic_leaves_it_alone(name):
    """The advantages are the estimator's; the policy moves, the critic does not, and no state was valued"""
    agent = agent_of(credit__algorithm=name)
    episodes = played(agent)
    for i, episode in enumerate(episodes):  # rewards of their own for each episode of a group
        for turn in episode.turns:
            turn.reward += 0.3 * i
    head = [p.detach().clone() for p in agent.policy.value_head.parameters()]
    before = [p.detach().clone() for p in agent.policy.parameters()]
    stats = agent.learner.learn(episodes)
    assert agent.learner.algorithm is ALGORITHMS[name]
    for episode, advantages in zip(episodes, expected_advantages(name, episodes, 0.9)):
        assert [t.advantage for t in episode.turns] == pytest.approx(advantages) and all(t.value is None for t in episode.turns)
        assert [t.returns for t in episode.turns] == pytest.approx(return_to_go(episode.rewards, 0.9))
    assert all(torch.equal(p, q) for p, q in zip(agent.policy.value_head.parameters(), head))
    assert any(not torch.equal(p, q) for p, q in zip(agent.policy.parameters(), before))
    assert stats["value_loss"] == stats["explained_variance"] == 0 and np.isfinite(list(stats.values())).all()


def test_credit_loss_without_a_critic_is_the_policy_loss():
    """The gradient is that of mean(-ratio · advantage) over sampled tokens, by autograd on the formula"""
    policy = make_policy("lora")
    agent = agent_of(policy, credit__algorithm="rloo", ppo__mini_batch_size=1000)
    episodes = played(agent, groups=3)
    for i, episode in enumerate(episodes):
        episode.turns[-1].reward += i
    learner, gradients = agent.learner, []
    step = learner.optimizer.step
    learner.optimizer.step = lambda: gradients.extend(p.grad.clone() for p in policy.parameters()) or step()
    learner.config.max_grad_norm = 1e9
    twin = copy.deepcopy(policy)
    learner.learn(episodes)
    loss, tokens = 0.0, sum(e.num_tokens for e in episodes)
    for episode in episodes:
        ids = torch.tensor([episode.segments[0].ids])
        for turn in episode.turns:
            positions = torch.arange(turn.start, turn.start + len(turn.response_ids))
            logprobs = twin.score(ids, torch.zeros_like(positions), positions).logprobs
            loss = loss - (turn.advantage * (logprobs - logprobs.detach()).exp()).sum() / tokens
    for ours, theirs in zip(gradients, torch.autograd.grad(loss, list(twin.parameters()))):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_credit_by_a_function_of_ones_own():
    seen = []

    def mine(episodes, credit):
        seen.append((len(episodes), credit.gamma, episodes[0].turns[0].value))
        for episode in episodes:
            for turn in episode.turns:
                turn.advantage, turn.returns = turn.reward, turn.reward

    agent = agent_of()
    trainer = Trainer(agent, algorithm=mine)
    assert agent.learner.algorithm == Algorithm("mine", mine) and agent.config.credit.algorithm == "mine"
    episodes = collect(agent, episodes=3, num_envs=2)
    agent.learner.learn(episodes)
    assert seen == [(3, 0.9, episodes[0].turns[0].value)] and seen[0][2] is not None  # the critic was asked
    assert trainer.agent is agent
    policy = make_policy("lora")
    assert PPO(policy, algorithm=Algorithm("other", mine, needs_critic=False)).algorithm.name == "other"

    def forgets(episodes, credit):
        pass

    episodes = collect(agent, episodes=2, num_envs=2)
    with pytest.raises(ValueError, match="has no advantage"):
        PPO(policy, algorithm=forgets).learn(episodes)


def test_credit_by_name(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown algorithm 'pop'; expected one of drgrpo, gigpo, grpo, ppo, ppo_bilevel, ppo_token, reinforce, rloo"):
        agent_of(credit__algorithm="pop")
    for bad in (3, None, ["ppo"]):
        with pytest.raises(ValueError, match="unknown algorithm"):
            as_algorithm(bad)
    monkeypatch.setattr("llamagym.algorithms.ALGORITHMS", dict(ALGORITHMS))
    register_algorithm(Algorithm("mine", lambda episodes, credit: None))
    with pytest.raises(ValueError, match="named 'ppo' is registered already"):
        register_algorithm(Algorithm("ppo", lambda episodes, credit: None))
    agent = agent_of(trainer__output_dir=str(tmp_path), trainer__updates=1, trainer__eval_every=0, rollout__episodes=6)
    with pytest.raises(ValueError, match="rollout.episodes=6: expected a multiple of 8"):
        Trainer(agent, algorithm="grpo")


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_credit_by_trainer(name, tmp_path):
    """A whole run by each name, and the groups it collects"""
    seeds = []
    size = 1 if name in ("ppo", "reinforce") else 2
    agent = agent_of(trainer__output_dir=str(tmp_path), trainer__updates=2, trainer__eval_every=0, trainer__checkpoint_every=0,
                     rollout__episodes=4, rollout__num_envs=4, rollout__group_size=size if size > 1 else None)  # fmt: skip
    trainer = Trainer(agent, algorithm=name)
    learn = agent.learner.learn
    agent.learner.learn = lambda episodes: seeds.append([e.seed for e in episodes]) or learn(episodes)
    run = trainer.fit()
    assert seeds == [[episode_seed(0, i // size) for i in range(4)], [episode_seed(0, i // size) for i in range(4, 8)]]
    assert len(run.history) == 2 and all(np.isfinite(line["policy_loss"]) for line in run.history)


@pytest.mark.parametrize("critic", ["reference", "detached", "shared"])
def test_credit_without_a_critic_asks_none(critic):
    """Only what the reference says is read"""
    agent = agent_of(make_policy("lora", critic=critic))
    episodes = played(agent)
    full = copy.deepcopy(episodes)
    reference = annotate(agent.policy, episodes, values=False)
    assert all(t.value is None and t.ref_logprobs is not None for e in episodes for t in e.turns)
    again = annotate(agent.policy, full)
    assert torch.equal(reference.token_hidden, again.token_hidden)
    for a, b in zip(episodes, full):
        for t, u in zip(a.turns, b.turns):
            assert np.array_equal(t.ref_logprobs, u.ref_logprobs) and u.value is not None
