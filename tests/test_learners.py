"""What PPO can be told besides its losses: a critic of tokens and its warm-up, another sampler, groups that say nothing, scopes of normalisation."""

import copy

import numpy as np
import pytest
import torch
from doubles import lake_agent, make_policy, shake

import llamagym.ppo as ppo
from llamagym.batch import Batch
from llamagym.credit import bilevel_gae, standardized, token_gae
from llamagym.groups import differing, groups_of
from llamagym.passes import learner_logprobs
from llamagym.policy import ValueHead
from llamagym.ppo import PPO
from llamagym.rollout import collect
from llamagym.trainer import load_learner, save_learner

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing")


def agent_of(critic="reference", **options):
    """An agent whose critic has an opinion"""
    policy = make_policy("lora", critic=critic, value_hidden=4)
    shake(policy.value_head.parameters(), 0.2)
    return lake_agent(policy, max_steps=3, **dict(ppo__epochs=1, ppo__mini_batch_size=1000, credit__gamma=0.9, credit__gae_lambda=0.8) | options)


def played(agent, episodes=4, **how):
    """Episodes with a reward for every turn"""
    collected, rng = collect(agent, episodes=episodes, num_envs=4, **how), np.random.default_rng(0)
    for turn in collected.turns:
        turn.reward = float(rng.normal())
    return collected


@pytest.mark.parametrize("critic", ["reference", "detached", "shared"])
@pytest.mark.parametrize("name", ["ppo_token", "ppo_bilevel"])
def test_credit_of_tokens_is_the_estimators_and_teaches_the_critic(name, critic):
    """A value before each token, read from the model itself; advantages of the estimator, normalised over all tokens; the loss against autograd"""
    agent = agent_of(critic, credit__algorithm=name, credit__token_lambda=0.7, ppo__kl_coef=0.0, ppo__max_grad_norm=1e9)
    episodes, policy, learner = played(agent), agent.policy, agent.learner
    reference = learner.annotate(episodes)
    for turn in episodes.turns:
        segment = next(e for e in episodes if turn in e.turns).segments[turn.segment]
        ids = torch.tensor([segment.ids])
        with torch.no_grad():
            if critic == "reference":
                with policy.as_reference():
                    hidden = policy.trunk(ids)
            else:
                hidden = policy.trunk(ids)
            places = torch.arange(turn.start - 1, turn.start - 1 + len(turn.response_ids))
            assert turn.values == pytest.approx(policy.value_head(hidden[0, places]).numpy(), abs=1e-4)
            assert turn.values[0] == pytest.approx(turn.value, abs=1e-5)
    learner.assign_credit(episodes)
    raw = []
    for e in episodes:
        values, end = [t.values for t in e.turns], 0.0 if e.terminated else e.final_value
        if name == "ppo_token":
            advantages, returns = token_gae(e.rewards, values, 0.9, 0.8, end)
        else:
            advantages, returns = bilevel_gae(e.rewards, values, 0.9, 0.8, end, 1.0, 0.7)
        raw += advantages
        assert np.concatenate([t.token_returns for t in e.turns]) == pytest.approx(np.concatenate(returns), abs=1e-5)
    batch = Batch.from_episodes(episodes)
    assert batch.advantages.numpy() == pytest.approx(standardized(np.concatenate(raw))[0], abs=1e-5)
    before = copy.deepcopy(policy.value_head)
    error = 0.5 * (batch.token_values - batch.token_returns).square().mean()
    stats = learner.update(batch, reference)
    assert stats["value_loss"] == pytest.approx(error.item(), rel=1e-3)
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), policy.value_head.parameters()))
    again = agent_of(critic, credit__algorithm=name).learner
    assert np.isfinite(again.learn(played(agent))["explained_variance"])


@pytest.mark.parametrize("critic", ["reference", "detached", "shared"])
def test_credit_warm_up_teaches_the_critic_alone(critic, tmp_path):
    """Two updates leave the policy alone, the third moves it; the count is part of a checkpoint"""
    agent = agent_of(critic, ppo__critic_warmup=2)
    learner, policy = agent.learner, agent.policy
    for update in range(3):
        weights, head = ([p.detach().clone() for p in ps] for ps in (policy.parameters(), policy.value_head.parameters()))
        stats = learner.learn(played(agent))
        moved = any(not torch.equal(p, q) for p, q in zip(policy.parameters(), weights))
        assert moved == (update == 2) and (stats["grad_norm"] > 0) == moved
        assert any(not torch.equal(p, q) for p, q in zip(policy.value_head.parameters(), head))
        if update == 0:
            save_learner(learner, tmp_path)
            fresh = PPO(policy, agent.config.ppo)
            load_learner(fresh, tmp_path)
            assert fresh.updates == 1 and fresh.warming_up
    assert not agent_of(critic, ppo__critic_warmup=2, credit__algorithm="reinforce").learner.warming_up


def test_loss_of_what_another_policy_sampled():
    """Ratios start at 1, and each advantage is weighed by how much likelier the learner makes its token, at most the cap: against the written gradient"""
    agent = agent_of(ppo__importance_cap=1.5, ppo__kl_coef=0.0, ppo__vf_coef=0.0, ppo__max_grad_norm=1e9)
    episodes, learner, policy = played(agent), agent.learner, agent.policy
    shake(policy.parameters(), 0.05, seed=5)  # now it is another one
    policy.touch()
    reference = learner.annotate(episodes)
    learner.assign_credit(episodes)
    batch = Batch.from_episodes(episodes)
    seen = []
    for row, position, token in zip(batch.token_row.tolist(), batch.token_position.tolist(), batch.token_ids.tolist()):
        logits = policy.answering(torch.from_numpy(batch.rows[row])[None]).logits[0, position - 1]
        seen.append(logits.log_softmax(-1)[token])
    now = torch.stack(seen)
    assert torch.allclose(learner_logprobs(policy, batch, 1.0, False, 50), now, atol=1e-4)
    weights = (now.detach() - batch.logprobs).exp().clamp(max=1.5)
    assert weights.max() == 1.5 and weights.min() < 0.9
    (-(weights * batch.advantages) * (now - now.detach()).exp()).mean().backward()
    written = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    learner.optimizer.zero_grad()
    caught = []
    learner.optimizer.step = lambda: caught.extend(p.grad.clone() for p in policy.parameters() if p.grad is not None)
    stats = learner.update(batch, reference)
    for ours, theirs in zip(caught, written, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-3)
    assert stats["logprob_gap"] == pytest.approx((now - batch.logprobs).abs().max().item(), rel=1e-3)


def test_credit_of_groups_that_differ_most():
    """Those without a difference are left out; of the others the share with the largest deviation; all where none differs"""
    agent = agent_of(rollout__group_size=2)
    episodes = collect(agent, episodes=8, num_envs=4, group_size=2)
    for i, e in enumerate(episodes):
        for t in e.turns:
            t.reward = 0.0
        e.turns[-1].reward = [0, 0, 0, 1, 0, 3, 0, 2][i]
    assert [episodes.episodes.index(e) for e in differing(episodes, 1.0)] == [2, 3, 4, 5, 6, 7]
    assert [episodes.episodes.index(e) for e in differing(episodes, 0.5)] == [4, 5, 6, 7]
    same = [e for i, e in enumerate(episodes) if i < 2]
    assert differing(same, 0.5) == same
    stats = agent_of(credit__algorithm="grpo", credit__keep_groups=0.5).learner.learn(episodes)
    assert stats["mean_return"] == pytest.approx(6 / 8) and stats["tokens"] == sum(e.num_tokens for e in episodes[4:])


@pytest.mark.parametrize("over", ["batch", "group", "mini-batch"])
def test_credit_is_normalised_over_what_was_asked(over):
    """Mean 0 and deviation 1 within each part, and not within others"""
    agent = agent_of(credit__normalize_over=over, ppo__mini_batch_size=6, rollout__group_size=2)
    episodes = played(agent, episodes=6, group_size=2)
    learner = agent.learner
    learner.annotate(episodes)
    learner.assign_credit(episodes)
    whole = np.array([t.advantage for t in episodes.turns])
    parts = {"batch": [whole], "group": [np.array([t.advantage for e in g for t in episodes[e].turns]) for g in groups_of(episodes)]}.get(over)
    minis = learner.mini_batches(Batch.from_episodes(episodes))
    if over == "mini-batch":
        parts = [np.array([float(m.advantages[m.token_turn == i][0]) for i in range(m.num_turns) if (m.token_turn == i).any()]) for m in minis]
        assert abs(whole.std() - 1) > 1e-3 and len(parts) > 1
    for part in parts:
        assert part.mean() == pytest.approx(0, abs=1e-5) and part.std() == pytest.approx(1, abs=1e-4)


def test_returns_of_any_size_teach_the_same():
    """Rewards a thousand times as large: the same policy, and values that are a thousand times as large"""
    found = {}
    for size in (1.0, 1000.0):
        policy = make_policy("lora", critic="shared")
        agent = lake_agent(policy, max_steps=3, ppo__epochs=4, ppo__learning_rate=1e-3, ppo__critic_learning_rate=0.03, credit__gamma=0.9)
        for first in (0, 8, 16):
            episodes = played(agent, 8, first=first)
            for turn in episodes.turns:
                turn.reward *= size
            stats = agent.learner.learn(episodes)
        agent.learner.annotate(episodes)
        found[size] = [p.detach().clone() for p in policy.parameters()], np.array([t.value for t in episodes.turns]) / size, stats["explained_variance"]
    for ours, theirs in zip(found[1.0][0], found[1000.0][0]):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    assert found[1.0][1] == pytest.approx(found[1000.0][1], rel=1e-2, abs=1e-3) and np.std(found[1.0][1]) > 0.01
    assert found[1.0][2] == pytest.approx(found[1000.0][2], abs=1e-2)


def test_an_update_that_fails_leaves_the_unit_of_returns():
    agent = agent_of()
    episodes, head = played(agent), agent.policy.value_head
    before = copy.deepcopy(head.state_dict())

    def fail(*_):
        raise KeyboardInterrupt

    handle = agent.learner.optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        agent.learner.learn(episodes)
    handle.remove()
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items()) and head.scale == 1
    agent.learner.learn(episodes)
    assert head.scale != 1 and head.known == 1


def test_unit_of_returns_is_a_running_mean_and_deviation():
    head, hidden, rng = ValueHead(8, 4), torch.randn(5, 8), np.random.default_rng(0)
    mean = square = None
    for i, size in enumerate((300.0, 20.0, 0.0, 1.0)):
        returns = torch.tensor(rng.normal(-size, size, 50), dtype=torch.float32)
        before = head(hidden).detach()
        head.rescale(returns)
        if size:  # returns that are all the same say nothing
            a, b = returns.double().mean().item(), returns.double().square().mean().item()
            mean, square = (a, b) if mean is None else (0.8 * mean + 0.2 * a, 0.8 * square + 0.2 * b)
        assert head.center.item() == pytest.approx(mean, rel=1e-5) and head.scale.item() == pytest.approx((square - mean**2) ** 0.5, rel=1e-4)
        assert head(hidden).detach() == pytest.approx(before if i else torch.full((5,), mean), rel=1e-4)
        shake(head.parameters(), 0.5, seed=i)


def test_memory_that_runs_out_changes_no_update(monkeypatch):
    """A step whose second micro-batch does not fit is begun again with smaller ones, statistics included"""
    results, real = [], ppo.loss_terms
    for budget, failing in ((64, ()), (128, (2,))):
        agent, calls = agent_of(ppo__token_budget=budget, ppo__epochs=2, ppo__mini_batch_size=6), []
        episodes = played(agent, 6)

        def scarce(*args, calls=calls, failing=failing):
            calls.append(args)
            if len(calls) in failing:
                raise torch.OutOfMemoryError("no room")
            return real(*args)

        monkeypatch.setattr(ppo, "loss_terms", scarce)
        stats = agent.learner.learn(episodes)
        stats.pop("tokens_per_second")
        results.append((stats, [p.detach().clone() for p in agent.policy.parameters()]))
        assert agent.learner.budget.tokens == 64
    (stats, weights), (again, theirs) = results
    assert again == pytest.approx(stats, rel=1e-3, abs=1e-5)
    for a, b in zip(weights, theirs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_memory_for_not_even_a_row_leaves_all_as_it_was(monkeypatch):
    agent = agent_of()
    episodes, before = played(agent), [p.detach().clone() for p in agent.policy.parameters()]

    def none(*args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(ppo, "loss_terms", none)
    with pytest.raises(ppo.OutOfMemory, match="not even one row at a time fits into memory"):
        agent.learner.learn(episodes)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters()))
