"""PPO options: token critic, critic warmup, truncated importance sampling, group filter and normalization scope."""

import copy

import numpy as np
import pytest
import torch
from doubles import lake_agent, make_policy, perturb

import llamagym.ppo as ppo
from llamagym.algorithms.advantages import bilevel_gae, standardize, token_gae
from llamagym.algorithms.batch import Batch
from llamagym.algorithms.forward import learner_logprobs
from llamagym.algorithms.group_advantages import filter_groups_by_return_std, group_by_seed
from llamagym.inference.kv_cache import OutOfMemory
from llamagym.models.value_head import ValueHead
from llamagym.ppo import PPO
from llamagym.rollout import collect
from llamagym.training.checkpoints import load_learner, save_learner

pytestmark = pytest.mark.filterwarnings(
    "ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing"
)


def agent_of(critic="reference", **options):
    """Return an agent with a non-zero value head"""
    policy = make_policy("lora", critic=critic, value_head_width=4)
    perturb(policy.value_head.parameters(), 0.2)
    return lake_agent(
        policy,
        max_steps=3,
        **dict(ppo__epochs=1, ppo__mini_batch_size=1000, credit__gamma=0.9, credit__gae_lambda=0.8)
        | options,
    )


def collect_with_random_rewards(agent, episodes=4, **options):
    """Collect episodes with a random reward for every turn"""
    collected, rng = (
        collect(agent, episodes=episodes, num_envs=4, **options),
        np.random.default_rng(0),
    )
    for turn in collected.turns:
        turn.reward = float(rng.normal())
    return collected


@pytest.mark.parametrize("critic", ["reference", "detached", "shared"])
@pytest.mark.parametrize("name", ["ppo_token", "ppo_bilevel"])
def test_credit_of_tokens_matches_the_estimator_and_trains_the_critic(name, critic):
    """Token values match the model, and advantages match the estimator

    Advantages are normalized over all tokens, and the loss matches autograd.
    """
    agent = agent_of(
        critic,
        credit__algorithm=name,
        credit__token_lambda=0.7,
        ppo__kl_coef=0.0,
        ppo__max_grad_norm=1e9,
    )
    episodes, policy, learner = collect_with_random_rewards(agent), agent.policy, agent.learner
    reference = learner.compute_values_and_ref_logprobs(episodes)
    for turn in episodes.turns:
        segment = next(e for e in episodes if turn in e.turns).segments[turn.segment]
        ids = torch.tensor([segment.ids])
        with torch.no_grad():
            if critic == "reference":
                with policy.as_reference():
                    hidden = policy.backbone(ids)
            else:
                hidden = policy.backbone(ids)
            positions = torch.arange(turn.start - 1, turn.start - 1 + len(turn.response_ids))
            assert turn.values == pytest.approx(
                policy.value_head(hidden[0, positions]).numpy(), abs=1e-4
            )
            assert turn.values[0] == pytest.approx(turn.value, abs=1e-5)
    learner.assign_advantages(episodes)
    raw = []
    for e in episodes:
        values, end = [t.values for t in e.turns], 0.0 if e.terminated else e.final_value
        if name == "ppo_token":
            advantages, returns = token_gae(e.rewards, values, 0.9, 0.8, end)
        else:
            advantages, returns = bilevel_gae(e.rewards, values, 0.9, 0.8, end, 1.0, 0.7)
        raw += advantages
        assert np.concatenate([t.token_returns for t in e.turns]) == pytest.approx(
            np.concatenate(returns), abs=1e-5
        )
    batch = Batch.from_episodes(episodes)
    assert batch.advantages.numpy() == pytest.approx(standardize(np.concatenate(raw))[0], abs=1e-5)
    before = copy.deepcopy(policy.value_head)
    error = 0.5 * (batch.token_values - batch.token_returns).square().mean()
    stats = learner.train_on_batch(batch, reference)
    assert stats["value_loss"] == pytest.approx(error.item(), rel=1e-3)
    assert any(
        not torch.equal(p, q) for p, q in zip(before.parameters(), policy.value_head.parameters())
    )
    new_learner = agent_of(critic, credit__algorithm=name).learner
    assert np.isfinite(new_learner.update(collect_with_random_rewards(agent))["explained_variance"])


@pytest.mark.parametrize("critic", ["reference", "detached", "shared"])
def test_credit_critic_warmup_trains_only_the_critic(critic, tmp_path):
    """The first two updates train the critic only; checkpoints save the number of updates"""
    agent = agent_of(critic, ppo__critic_warmup=2)
    learner, policy = agent.learner, agent.policy
    for update in range(3):
        weights, head = (
            [p.detach().clone() for p in ps]
            for ps in (policy.parameters(), policy.value_head.parameters())
        )
        stats = learner.update(collect_with_random_rewards(agent))
        policy_changed = any(not torch.equal(p, q) for p, q in zip(policy.parameters(), weights))
        assert policy_changed == (update == 2) and (stats["grad_norm"] > 0) == policy_changed
        assert any(not torch.equal(p, q) for p, q in zip(policy.value_head.parameters(), head))
        if update == 0:
            save_learner(learner, tmp_path)
            loaded = PPO(policy, agent.config.ppo)
            load_learner(loaded, tmp_path)
            assert loaded.num_updates == 1 and loaded.in_critic_warmup
    assert not agent_of(
        critic, ppo__critic_warmup=2, credit__algorithm="reinforce"
    ).learner.in_critic_warmup


def test_loss_applies_truncated_importance_sampling():
    """Advantages are weighted by the learner-to-sampler probability ratio, up to the cap"""
    agent = agent_of(ppo__tis_cap=1.5, ppo__kl_coef=0.0, ppo__vf_coef=0.0, ppo__max_grad_norm=1e9)
    episodes, learner, policy = collect_with_random_rewards(agent), agent.learner, agent.policy
    perturb(policy.parameters(), 0.05, seed=5)  # the policy differs from the sampler
    policy.bump_version()
    reference = learner.compute_advantages(episodes)
    batch = Batch.from_episodes(episodes)
    token_logprobs = []
    for row, position, token in zip(
        batch.row_of_token.tolist(), batch.token_position.tolist(), batch.token_ids.tolist()
    ):
        logits = policy.active_model(torch.from_numpy(batch.rows[row])[None]).logits[
            0, position - 1
        ]
        token_logprobs.append(logits.log_softmax(-1)[token])
    logprobs = torch.stack(token_logprobs)
    assert torch.allclose(learner_logprobs(policy, batch, 1.0, False, 50), logprobs, atol=1e-4)
    weights = (logprobs.detach() - batch.logprobs).exp().clamp(max=1.5)
    assert weights.max() == 1.5 and weights.min() < 0.9
    (-(weights * batch.advantages) * (logprobs - logprobs.detach()).exp()).mean().backward()
    expected = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    learner.optimizer.zero_grad()
    actual = []
    learner.optimizer.step = lambda: actual.extend(
        p.grad.clone() for p in policy.parameters() if p.grad is not None
    )
    stats = learner.train_on_batch(batch, reference)
    for actual_gradient, expected_gradient in zip(actual, expected, strict=True):
        assert torch.allclose(actual_gradient, expected_gradient, atol=1e-5, rtol=1e-3)
    assert stats["max_logprob_diff"] == pytest.approx(
        (logprobs - batch.logprobs).abs().max().item(), rel=1e-3
    )


def test_credit_group_filter_keeps_the_groups_with_the_largest_deviation():
    """Groups of equal returns are dropped first; if all groups have equal returns, all are kept"""
    agent = agent_of(rollout__group_size=2)
    episodes = collect(agent, episodes=8, num_envs=4, group_size=2)
    for i, e in enumerate(episodes):
        for t in e.turns:
            t.reward = 0.0
        e.turns[-1].reward = [0, 0, 0, 1, 0, 3, 0, 2][i]
    assert [episodes.episodes.index(e) for e in filter_groups_by_return_std(episodes, 1.0)] == [
        2,
        3,
        4,
        5,
        6,
        7,
    ]
    assert [episodes.episodes.index(e) for e in filter_groups_by_return_std(episodes, 0.5)] == [
        4,
        5,
        6,
        7,
    ]
    equal_returns = [e for i, e in enumerate(episodes) if i < 2]
    assert filter_groups_by_return_std(equal_returns, 0.5) == equal_returns
    stats = agent_of(credit__algorithm="grpo", credit__group_filter=0.5).learner.update(episodes)
    assert stats["mean_return"] == pytest.approx(6 / 8) and stats["tokens"] == sum(
        e.num_tokens for e in episodes[4:]
    )


@pytest.mark.parametrize("scope", ["batch", "group", "mini-batch"])
def test_credit_is_normalized_over_the_configured_scope(scope):
    """Advantages have mean 0 and deviation 1 within the configured scope only"""
    agent = agent_of(credit__normalize_over=scope, ppo__mini_batch_size=6, rollout__group_size=2)
    episodes = collect_with_random_rewards(agent, episodes=6, group_size=2)
    learner = agent.learner
    learner.compute_advantages(episodes)
    all_advantages = np.array([t.advantage for t in episodes.turns])
    parts = {
        "batch": [all_advantages],
        "group": [
            np.array([t.advantage for e in g for t in episodes[e].turns])
            for g in group_by_seed(episodes)
        ],
    }.get(scope)
    mini_batches = learner.mini_batches(Batch.from_episodes(episodes))
    if scope == "mini-batch":
        parts = [
            np.array(
                [
                    float(m.advantages[m.turn_of_token == i][0])
                    for i in range(m.num_turns)
                    if (m.turn_of_token == i).any()
                ]
            )
            for m in mini_batches
        ]
        assert abs(all_advantages.std() - 1) > 1e-3 and len(parts) > 1
    for part in parts:
        assert part.mean() == pytest.approx(0, abs=1e-5) and part.std() == pytest.approx(
            1, abs=1e-4
        )


def test_reward_scale_does_not_change_the_policy_update():
    """Rewards scaled by a thousand give the same policy, and values scaled by a thousand"""
    results = {}
    for scale in (1.0, 1000.0):
        policy = make_policy("lora", critic="shared")
        agent = lake_agent(
            policy,
            max_steps=3,
            ppo__epochs=4,
            ppo__learning_rate=1e-3,
            ppo__critic_learning_rate=0.03,
            credit__gamma=0.9,
        )
        for first in (0, 8, 16):
            episodes = collect_with_random_rewards(agent, 8, first=first)
            for turn in episodes.turns:
                turn.reward *= scale
            stats = agent.learner.update(episodes)
        agent.learner.compute_values_and_ref_logprobs(episodes)
        results[scale] = (
            [p.detach().clone() for p in policy.parameters()],
            np.array([t.value for t in episodes.turns]) / scale,
            stats["explained_variance"],
        )
    for small, large in zip(results[1.0][0], results[1000.0][0]):
        assert (small - large).norm() <= 1e-3 * large.norm()
    assert (
        results[1.0][1] == pytest.approx(results[1000.0][1], rel=1e-2, abs=1e-3)
        and np.std(results[1.0][1]) > 0.01
    )
    assert results[1.0][2] == pytest.approx(results[1000.0][2], abs=1e-2)


def test_failed_update_restores_the_return_normalization():
    agent = agent_of()
    episodes, head = collect_with_random_rewards(agent), agent.policy.value_head
    before = copy.deepcopy(head.state_dict())

    def fail(*_):
        raise KeyboardInterrupt

    handle = agent.learner.optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        agent.learner.update(episodes)
    handle.remove()
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items()) and head.scale == 1
    agent.learner.update(episodes)
    assert head.scale != 1 and head.initialized == 1


def test_return_normalization_uses_a_running_mean_and_deviation():
    head, hidden, rng = ValueHead(8, 4), torch.randn(5, 8), np.random.default_rng(0)
    mean = square = None
    for i, size in enumerate((300.0, 20.0, 0.0, 1.0)):
        returns = torch.tensor(rng.normal(-size, size, 50), dtype=torch.float32)
        before = head(hidden).detach()
        head.rescale(returns)
        if size:  # constant returns are ignored
            a, b = returns.double().mean().item(), returns.double().square().mean().item()
            mean, square = (
                (a, b) if mean is None else (0.8 * mean + 0.2 * a, 0.8 * square + 0.2 * b)
            )
        assert head.center.item() == pytest.approx(
            mean, rel=1e-5
        ) and head.scale.item() == pytest.approx((square - mean**2) ** 0.5, rel=1e-4)
        assert head(hidden).detach() == pytest.approx(
            before if i else torch.full((5,), mean), rel=1e-4
        )
        perturb(head.parameters(), 0.5, seed=i)


def test_memory_error_in_a_step_does_not_change_the_update(monkeypatch):
    """The step is repeated with smaller micro-batches and gives the same metrics"""
    results, original = [], ppo.compute_loss_terms
    for budget, failing in ((64, ()), (128, (2,))):
        agent, calls = agent_of(ppo__token_budget=budget, ppo__epochs=2, ppo__mini_batch_size=6), []
        episodes = collect_with_random_rewards(agent, 6)

        def fail_in_some_calls(*args, calls=calls, failing=failing):
            calls.append(args)
            if len(calls) in failing:
                raise torch.OutOfMemoryError("no room")
            return original(*args)

        monkeypatch.setattr(ppo, "compute_loss_terms", fail_in_some_calls)
        stats = agent.learner.update(episodes)
        stats.pop("tokens_per_second")
        results.append((stats, [p.detach().clone() for p in agent.policy.parameters()]))
        assert agent.learner.token_budget.tokens == 64
    (stats, weights), (repeated_stats, repeated_weights) = results
    assert repeated_stats == pytest.approx(stats, rel=1e-3, abs=1e-5)
    for a, b in zip(weights, repeated_weights):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_memory_error_on_a_single_row_changes_nothing(monkeypatch):
    agent = agent_of()
    episodes, before = (
        collect_with_random_rewards(agent),
        [p.detach().clone() for p in agent.policy.parameters()],
    )

    def raise_out_of_memory(*args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(ppo, "compute_loss_terms", raise_out_of_memory)
    with pytest.raises(OutOfMemory, match="not even one row at a time fits into memory"):
        agent.learner.update(episodes)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters()))
