"""Algorithms selected by name train the policy (and the critic if they use one) with the expected advantages."""

import copy

import numpy as np
import pytest
import torch
from doubles import config, make_policy, walk_task

from llamagym.agent import Agent
from llamagym.algorithms.advantages import return_to_go
from llamagym.algorithms.forward import compute_values_and_ref_logprobs
from llamagym.algorithms.group_advantages import (
    gigpo,
    grpo,
    rebn,
    rloo,
)
from llamagym.algorithms.registry import (
    ALGORITHMS,
    Algorithm,
    as_algorithm,
    register_algorithm,
)
from llamagym.envs.adapters import episode_seed
from llamagym.ppo import PPO
from llamagym.rollout import collect
from llamagym.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action")


def later_reward(seed, t):
    """Return a reward that depends on the step and the walk's number only"""
    return (seed % 97) / 10 + t


def agent_of(policy=None, **options) -> Agent:
    return Agent.for_task(
        walk_task(3, reward_function=later_reward),
        policy or make_policy("lora"),
        config=config(ppo__epochs=1, ppo__kl_coef=0.0, credit__gamma=0.9, **options),
    )


def collect_groups(agent, groups=2, size=4, **options):
    return collect(agent, episodes=groups * size, num_envs=3, group_size=size, **options)


def test_credit_groups_share_the_environment_seed_and_sample_independently():
    """The environment seed depends on i // G and sampling on i, for any number of environments"""
    agent = agent_of()
    episodes = collect_groups(agent, seed=2, first=4)
    assert [e.seed for e in episodes] == [episode_seed(2, i // 4) for i in range(4, 12)] and [
        e.index for e in episodes
    ] == list(range(4, 12))
    for group in (episodes[:4], episodes[4:]):
        assert (
            len({e.turns[0].observation for e in group}) == 1
            and len({tuple(e.turns[0].response_ids) for e in group}) > 1
        )
    for num_envs in (1, 8):
        repeated = collect(agent, episodes=8, num_envs=num_envs, group_size=4, seed=2, first=4)
        assert [[t.response_ids for t in e.turns] for e in repeated] == [
            [t.response_ids for t in e.turns] for e in episodes
        ]
    with pytest.raises(ValueError, match="group_size=0"):
        collect(agent, episodes=4, group_size=0)


def expected_advantages(name, episodes, gamma):
    groups = [episodes[:4], episodes[4:]]
    if name == "reinforce":
        return rebn([return_to_go(e.rewards, gamma) for e in episodes])
    if name == "gigpo":
        return [
            a
            for g in groups
            for a in gigpo(
                [e.rewards for e in g], [[t.observation for t in e.turns] for e in g], gamma
            )
        ]
    estimator = dict(rloo=rloo, grpo=grpo, drgrpo=lambda r: grpo(r, scale=False))[name]
    return [
        np.full(len(e), a)
        for g in groups
        for e, a in zip(g, estimator([e.total_reward for e in g]))
    ]


@pytest.mark.parametrize(
    "name", sorted(name for name, algorithm in ALGORITHMS.items() if not algorithm.needs_critic)
)
def test_credit_without_a_critic_does_not_train_it(name):
    """Advantages equal the estimator's; the update changes the policy only, and no values are computed"""
    agent = agent_of(credit__algorithm=name)
    episodes = collect_groups(agent)
    for i, episode in enumerate(episodes):  # the episodes of a group get different rewards
        for turn in episode.turns:
            turn.reward += 0.3 * i
    head = [p.detach().clone() for p in agent.policy.value_head.parameters()]
    before = [p.detach().clone() for p in agent.policy.parameters()]
    stats = agent.learner.update(episodes)
    assert agent.learner.algorithm is ALGORITHMS[name]
    for episode, advantages in zip(episodes, expected_advantages(name, episodes, 0.9)):
        assert [t.advantage for t in episode.turns] == pytest.approx(advantages) and all(
            t.value is None for t in episode.turns
        )
        assert [t.returns for t in episode.turns] == pytest.approx(
            return_to_go(episode.rewards, 0.9)
        )
    assert all(torch.equal(p, q) for p, q in zip(agent.policy.value_head.parameters(), head))
    assert any(not torch.equal(p, q) for p, q in zip(agent.policy.parameters(), before))
    assert (
        stats["value_loss"] == stats["explained_variance"] == 0
        and np.isfinite(list(stats.values())).all()
    )


def test_credit_loss_without_a_critic_equals_the_policy_loss():
    """The gradient equals autograd's of mean(-ratio · advantage) over sampled tokens"""
    policy = make_policy("lora")
    agent = agent_of(policy, credit__algorithm="rloo", ppo__mini_batch_size=1000)
    episodes = collect_groups(agent, groups=3)
    for i, episode in enumerate(episodes):
        episode.turns[-1].reward += i
    learner, gradients = agent.learner, []
    step = learner.optimizer.step
    learner.optimizer.step = lambda: (
        gradients.extend(p.grad.clone() for p in policy.parameters()) or step()
    )
    learner.config.max_grad_norm = 1e9
    policy_copy = copy.deepcopy(policy)
    learner.update(episodes)
    loss, tokens = 0.0, sum(e.num_tokens for e in episodes)
    for episode in episodes:
        ids = torch.tensor([episode.segments[0].ids])
        for turn in episode.turns:
            positions = torch.arange(turn.start, turn.start + len(turn.response_ids))
            logprobs = policy_copy.score(ids, torch.zeros_like(positions), positions).logprobs
            loss = loss - (turn.advantage * (logprobs - logprobs.detach()).exp()).sum() / tokens
    for actual, expected in zip(
        gradients, torch.autograd.grad(loss, list(policy_copy.parameters()))
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)


def test_credit_accepts_a_custom_function():
    calls = []

    def mine(episodes, credit):
        calls.append((len(episodes), credit.gamma, episodes[0].turns[0].value))
        for episode in episodes:
            for turn in episode.turns:
                turn.advantage, turn.returns = turn.reward, turn.reward

    agent = agent_of()
    trainer = Trainer(agent, algorithm=mine)
    # a function of the user's own is asked even if all returns are equal
    assert agent.learner.algorithm == Algorithm("mine", mine, needs_differences=False)
    assert agent.config.credit.algorithm == "mine"
    episodes = collect(agent, episodes=3, num_envs=2)
    agent.learner.update(episodes)
    # values were computed
    assert calls == [(3, 0.9, episodes[0].turns[0].value)] and calls[0][2] is not None
    assert trainer.agent is agent
    policy = make_policy("lora")
    assert (
        PPO(policy, algorithm=Algorithm("other", mine, needs_critic=False)).algorithm.name
        == "other"
    )

    def assign_nothing(episodes, credit):
        pass

    episodes = collect(agent, episodes=2, num_envs=2)
    with pytest.raises(ValueError, match="has no advantage"):
        PPO(policy, algorithm=assign_nothing).update(episodes)


def test_credit_algorithm_is_selected_by_name(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError,
        match="unknown algorithm 'pop'; expected one of drgrpo, gigpo, grpo, ppo, ppo_bilevel, ppo_token, reinforce, rloo",
    ):
        agent_of(credit__algorithm="pop")
    for invalid in (3, None, ["ppo"]):
        with pytest.raises(ValueError, match="unknown algorithm"):
            as_algorithm(invalid)
    monkeypatch.setattr("llamagym.algorithms.registry.ALGORITHMS", dict(ALGORITHMS))
    register_algorithm(Algorithm("mine", lambda episodes, credit: None))
    with pytest.raises(ValueError, match="named 'ppo' is registered already"):
        register_algorithm(Algorithm("ppo", lambda episodes, credit: None))
    agent = agent_of(
        trainer__output_dir=str(tmp_path),
        trainer__updates=1,
        trainer__eval_every=0,
        rollout__episodes=6,
    )
    with pytest.raises(
        ValueError, match="rollout.episodes=6: expected a multiple of the group size 8"
    ):
        Trainer(agent, algorithm="grpo")


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_credit_trainer_runs_each_algorithm(name, tmp_path):
    """A training run with each algorithm collects the right groups"""
    seeds = []
    size = 1 if name in ("ppo", "reinforce") else 2
    agent = agent_of(trainer__output_dir=str(tmp_path), trainer__updates=2, trainer__eval_every=0, trainer__checkpoint_every=0,
                     rollout__episodes=4, rollout__num_envs=4, rollout__group_size=size if size > 1 else None)  # fmt: skip
    trainer = Trainer(agent, algorithm=name)
    update = agent.learner.update
    agent.learner.update = lambda episodes: (
        seeds.append([e.seed for e in episodes]) or update(episodes)
    )
    run = trainer.fit()
    assert seeds == [
        [episode_seed(0, i // size) for i in range(4)],
        [episode_seed(0, i // size) for i in range(4, 8)],
    ]
    assert len(run.history) == 2 and all(np.isfinite(line["policy_loss"]) for line in run.history)


@pytest.mark.parametrize("critic", ["reference", "detached", "shared"])
def test_credit_without_a_critic_does_not_evaluate_it(critic):
    """Without a critic, the model runs for reference log-probabilities only"""
    agent = agent_of(make_policy("lora", critic=critic))
    episodes = collect_groups(agent)
    full = copy.deepcopy(episodes)
    reference = compute_values_and_ref_logprobs(agent.policy, episodes, values=False)
    assert all(t.value is None and t.ref_logprobs is not None for e in episodes for t in e.turns)
    again = compute_values_and_ref_logprobs(agent.policy, full)
    assert torch.equal(reference.token_hidden, again.token_hidden)
    for a, b in zip(episodes, full):
        for t, u in zip(a.turns, b.turns):
            assert np.array_equal(t.ref_logprobs, u.ref_logprobs) and u.value is not None
