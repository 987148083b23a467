"""PPO matches an independent float64 implementation of the formulas, one token at a time, on the model's full logits."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from doubles import lake_agent, make_policy, perturb

import llamagym.algorithms.forward as passes_module
import llamagym.algorithms.metrics as metrics_module
from llamagym.algorithms.advantages import assign_turn_gae, normalize_advantages
from llamagym.algorithms.batch import Batch
from llamagym.algorithms.forward import compute_values_and_ref_logprobs
from llamagym.algorithms.losses import (
    adapt_kl_coef,
    exact_kl,
    k2_kl,
    policy_loss,
    value_loss,
)
from llamagym.algorithms.optimization import ADAM_EPS, NonFiniteLoss
from llamagym.config import CreditConfig, PPOConfig
from llamagym.ppo import PPO
from llamagym.rollout import collect

pytestmark = pytest.mark.filterwarnings(
    "ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing"
)
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def make_episodes():
    """Return a function that returns seven FrozenLake episodes with random rewards

    Two of them are truncated. They are collected once per kind of policy.
    """

    def collect_episodes(kind):
        agent = lake_agent(
            make_policy(kind),
            max_steps=3,
            generate__temperature=TEMPERATURE,
            generate__max_new_tokens=3,
        )
        episodes = collect(agent, episodes=7, num_envs=7)
        rng = np.random.default_rng(0)
        for i, episode in enumerate(episodes):
            for turn in episode.turns:
                turn.reward = float(rng.normal())
            if i > 1:
                episode.turns[-1].truncated, episode.turns[-1].terminated, episode.final_ids = (
                    False,
                    True,
                    None,
                )
        return episodes

    cache = {}
    return lambda kind: copy.deepcopy(
        cache.setdefault(kind, collect_episodes(kind) if kind not in cache else None)
    )


def learner(kind="lora", critic="reference", gamma=0.9, gae_lambda=0.8, **options) -> PPO:
    """Return a learner with a non-zero value head

    By default it makes one step over the whole batch and does not clip gradients.
    """
    policy = make_policy(kind, critic=critic, value_head_width=4)
    perturb(policy.value_head.parameters(), 0.2)
    settings = (
        dict(
            epochs=1,
            mini_batch_size=1000,
            max_grad_norm=1e9,
            learning_rate=1e-3,
            kl_coef=0.3,
            vf_coef=0.7,
        )
        | options
    )
    return PPO(policy, PPOConfig(**settings), CreditConfig(gamma, gae_lambda), TEMPERATURE)


def prepare_update(ppo, episodes):
    """Return batch and reference as `update` prepares them before the gradient steps"""
    reference = compute_values_and_ref_logprobs(ppo.policy, episodes, TEMPERATURE)
    assign_turn_gae(episodes, ppo.credit.gamma, ppo.credit.gae_lambda)
    normalize_advantages(episodes)
    return Batch.from_episodes(episodes), reference


def record_steps(ppo, batch, reference):
    """Run an update and return its steps and metrics

    A step has the gradients, and the model and the value head before it.
    """
    steps = []

    def record_step(optimizer, args, kwargs):
        gradients = [
            p.grad.clone() if p.grad is not None else torch.zeros_like(p)
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        steps.append(
            (gradients, copy.deepcopy(ppo.policy.model), copy.deepcopy(ppo.policy.value_head))
        )

    handle = ppo.optimizer.register_step_pre_hook(record_step)
    stats = ppo.train_on_batch(batch, reference)
    handle.remove()
    return steps, stats


# the oracle


def predicted(head, hidden):
    """Return the value head's prediction in units of returns"""
    inputs = (hidden - head.input_mean) / head.input_std
    return head.center + head.scale * head.out(head.inner(inputs)).squeeze(-1)


class Oracle:
    """PPO's loss from the formulas; `first` is a float64 copy of the policy that sampled the episodes"""

    def __init__(self, ppo: PPO):
        self.config, self.credit, self.critic, self.peft = (
            ppo.config,
            ppo.credit,
            ppo.policy.critic,
            (ppo.policy.adapter is not None),
        )
        self.first = copy.deepcopy(ppo.policy.model).double()
        self.first_head = copy.deepcopy(ppo.policy.value_head).double()
        self.frozen = None if self.peft else copy.deepcopy(self.first)
        self.known = {}

    @staticmethod
    def forward(model, ids):
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        return (out.logits[0] / TEMPERATURE).log_softmax(-1), out.hidden_states[-1][0]

    def reference(self, ids):
        if tuple(ids) not in self.known:
            with torch.no_grad(), nullcontext() if self.frozen else self.first.disable_adapter():
                self.known[tuple(ids)] = self.forward(self.frozen or self.first, ids)
        return self.known[tuple(ids)]

    def old_value(self, ids, position) -> float:
        with torch.no_grad():
            hidden = (
                self.reference(ids)[1]
                if self.critic == "reference"
                else self.forward(self.first, ids)[1]
            )
            return predicted(self.first_head, hidden[position]).item()

    def targets(self, episodes):
        """Return old value, advantage and return of every turn, with GAE as an explicit sum"""
        gamma, lam, values, advantages, returns = (
            self.credit.gamma,
            self.credit.gae_lambda,
            [],
            [],
            [],
        )
        for episode in episodes:
            v = [
                self.old_value(episode.segments[t.segment].ids, t.start - 1) for t in episode.turns
            ]
            v.append(
                self.old_value(episode.final_ids, len(episode.final_ids) - 1)
                if episode.turns[-1].truncated
                else 0.0
            )
            delta = [turn.reward + gamma * v[t + 1] - v[t] for t, turn in enumerate(episode.turns)]
            for t in range(len(delta)):
                advantages.append(sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])))
                returns.append(advantages[-1] + v[t])
                values.append(v[t])
        mean = sum(advantages) / len(advantages)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(advantages))
        return values, [(a - mean) / deviation for a in advantages], returns

    def loss(self, episodes, model, head, targets):
        """Return the loss of the whole batch at the weights of `model` and `head`"""
        c, values, advantages, returns = self.config, *targets
        turns = [(e, t) for e in episodes for t in e.turns]
        now = {id(s): self.forward(model, s.ids) for e in episodes for s in e.segments}
        policy_terms, kl_terms, entropies, value_terms = [], [], [], []
        for (episode, turn), old, advantage, target in zip(turns, values, advantages, returns):
            (dist, hidden), (ref, ref_hidden) = (
                now[id(episode.segments[turn.segment])],
                self.reference(episode.segments[turn.segment].ids),
            )
            state = {"reference": ref_hidden, "detached": hidden.detach(), "shared": hidden}[
                self.critic
            ][turn.start - 1]
            value = predicted(head, state)
            error = (value - target) ** 2
            if c.value_clip is not None:
                error = max(
                    error,
                    (
                        old
                        + max(min(value - old, value * 0 + c.value_clip), value * 0 - c.value_clip)
                        - target
                    )
                    ** 2,
                )
            value_terms.append(error / 2)
            for k, token in enumerate(turn.response_ids):
                at = turn.start + k - 1
                ratio = torch.exp(dist[at, token] - float(turn.logprobs[k]))
                limited = min(
                    max(ratio, ratio * 0 + 1 - c.clip_range), ratio * 0 + 1 + c.clip_range
                )
                policy_terms.append(-min(ratio * advantage, limited * advantage))
                p = dist[at].exp()
                entropies.append(-(p * dist[at]).sum())
                kl_terms.append(
                    (p * (dist[at] - ref[at])).sum()
                    if c.kl_loss == "exact"
                    else (dist[at, token] - ref[at, token]) ** 2 / 2
                )
        mean = lambda terms: sum(terms) / len(terms)
        return (
            mean(policy_terms)
            + c.kl_coef * mean(kl_terms)
            - c.entropy_coef * mean(entropies)
            + c.vf_coef * mean(value_terms) / head.scale**2
        )

    def gradients(self, episodes, model, head, targets):
        model, head = copy.deepcopy(model).double(), copy.deepcopy(head).double()
        model.zero_grad()
        head.zero_grad()
        loss = self.loss(episodes, model, head, targets)
        loss.backward()
        weights = [*(p for p in model.parameters() if p.requires_grad), *head.parameters()]
        return [p.grad if p.grad is not None else torch.zeros_like(p) for p in weights], loss.item()


def relative_distance(ours, theirs) -> float:
    """Return the relative distance of two gradients"""
    ours, theirs = (
        torch.cat([x.double().flatten() for x in gradients]) for gradients in (ours, theirs)
    )
    return ((ours - theirs).norm() / theirs.norm()).item()


CASES = {
    "lora": dict(kind="lora"),
    "lora-k2": dict(kind="lora", kl_loss="k2", kl_coef=2.0),
    "lora-detached": dict(kind="lora", critic="detached", value_clip=0.05, vf_coef=3.0),
    "lora-shared": dict(kind="lora", critic="shared", entropy_coef=0.4),
    "plain": dict(kind="plain", entropy_coef=0.1),
    "plain-shared": dict(kind="plain", critic="shared", kl_loss="k2", value_clip=0.05),
    "plain-detached": dict(kind="plain", critic="detached", clip_range=0.05),
    "lora-raw": dict(kind="lora", normalize_returns=False),
}


@pytest.mark.parametrize("case", CASES)
def test_oracle_gradient_matches_the_formulas(case, make_episodes):
    """Values, GAE, normalization, loss and gradient match, with clipped and unclipped ratios"""
    ppo, episodes = learner(**CASES[case]), make_episodes(CASES[case]["kind"])
    oracle = Oracle(ppo)
    targets = oracle.targets(episodes)
    batch, reference = prepare_update(ppo, episodes)
    for actual, expected_values in zip(
        (batch.values, [t.advantage for e in episodes for t in e.turns], batch.returns), targets
    ):
        np.testing.assert_allclose(actual, expected_values, atol=3e-6)
    perturb(ppo.policy.parameters(), 0.02 if (ppo.policy.adapter is not None) else 0.004, seed=5)
    perturb(ppo.policy.value_head.parameters(), 0.1, seed=5)
    ((gradients, model, head),), stats = record_steps(ppo, batch, reference)
    expected, loss = oracle.gradients(episodes, model, head, targets)
    assert 0.1 < stats["clip_fraction"] < 0.9  # some tokens are clipped and some are not
    assert relative_distance(gradients, expected) < 2e-5
    critic = len(list(head.parameters()))
    assert (
        relative_distance(gradients[:-critic], expected[:-critic]) < 2e-5
        and relative_distance(gradients[-critic:], expected[-critic:]) < 2e-5
    )
    if ppo.config.kl_loss == "exact":
        ppo_config = ppo.config
        actual = (
            stats["policy_loss"]
            + ppo_config.kl_coef * stats["ref_kl"]
            - ppo_config.entropy_coef * stats["entropy"]
            + ppo_config.vf_coef * stats["value_loss"] / head.scale.item() ** 2
        )
        assert actual == pytest.approx(loss, rel=1e-4, abs=1e-6)


def test_oracle_steps_of_an_epoch_average_to_the_batch_gradient(make_episodes):
    """The mean gradient of an epoch's three steps is the batch's gradient at constant weights"""
    ppo, episodes = learner(epochs=2, mini_batch_size=7, learning_rate=1e-12), make_episodes("lora")
    batch, reference = prepare_update(ppo, episodes)
    steps, _ = record_steps(ppo, batch, reference)
    ((gradients, *_),), _ = record_steps(learner(), batch, reference)
    assert len(steps) == 6 and batch.num_turns == 21
    for epoch in (steps[:3], steps[3:]):
        assert (
            relative_distance([sum(g) / 3 for g in zip(*(s[0] for s in epoch))], gradients) < 1e-5
        )
        assert (
            relative_distance(epoch[0][0], gradients) > 0.05
        )  # the gradient of a single step differs
    assert relative_distance(steps[0][0], steps[3][0]) > 0.05  # each epoch has another order


def test_oracle_weights_after_an_update_match(make_episodes):
    """Each group's norm is clipped, then AdamW makes the step

    Clipping below Adam's epsilon makes its step linear in the gradient.
    """
    ppo, episodes = (
        learner(
            max_grad_norm=1e-6,
            learning_rate=0.1,
            critic_learning_rate=0.2,
            epochs=2,
            normalize_returns=False,
        ),
        make_episodes("lora"),
    )
    batch, reference = prepare_update(ppo, episodes)
    # The update does the same again, which changes nothing: what changes are the weights alone.
    ppo.policy.value_head.standardize_inputs(reference.critic_inputs)
    oracle = Oracle(ppo)
    targets = oracle.targets(episodes)
    trained = [p for group in ppo.optimizer.param_groups for p in group["params"]]
    before = [p.detach().double() for p in trained]
    ppo.train_on_batch(batch, reference)
    changes = [p.detach().double() - old for p, old in zip(trained, before)]
    model, head = copy.deepcopy(oracle.first), copy.deepcopy(oracle.first_head)
    groups = [[p for p in model.parameters() if p.requires_grad], list(head.parameters())]
    optimizer = torch.optim.AdamW(
        [dict(params=groups[0], lr=0.1), dict(params=groups[1], lr=0.2)],
        eps=ADAM_EPS,
        weight_decay=0.0,
    )
    for _ in range(2):
        optimizer.zero_grad()
        oracle.loss(episodes, model, head, targets).backward()
        for group in groups:
            norm = math.sqrt(sum(p.grad.square().sum().item() for p in group))
            for p in group:
                p.grad *= 1e-6 / norm
        optimizer.step()
    expected = [p.detach() - old for p, old in zip([*groups[0], *groups[1]], before)]
    count = len(groups[0])
    assert all(any(x.any() for x in c) for c in (changes[:count], changes[count:]))
    assert (
        relative_distance(changes[:count], expected[:count]) < 1e-3
        and relative_distance(changes[count:], expected[count:]) < 1e-3
    )


@pytest.mark.parametrize("critic", ["reference", "shared"])
def test_oracle_micro_batch_size_changes_nothing(critic, make_episodes):
    """Any micro-batch size gives the same gradients, weights and metrics"""
    results = []
    for budget in (1, 250, 400, 10**6):
        ppo, episodes = (
            learner(
                critic=critic, token_budget=budget, epochs=2, mini_batch_size=11, max_grad_norm=0.5
            ),
            make_episodes("lora"),
        )
        batch, reference = prepare_update(ppo, episodes)
        steps, stats = record_steps(ppo, batch, reference)
        results.append(
            (
                len(batch.micro_batches(budget)),
                steps[0][0],
                [p.detach() for p in ppo.policy.parameters()],
                stats,
            )
        )
    assert (
        [n for n, *_ in results] == sorted({n for n, *_ in results}, reverse=True)
        and results[0][0] == batch.num_rows
        and results[-1][0] == 1
    )
    for _, gradients, weights, stats in results[1:]:
        assert relative_distance(gradients, results[0][1]) < 1e-5
        # Adam divides by the gradient's own size
        assert max((a - b).abs().max().item() for a, b in zip(weights, results[0][2])) < 2e-4
        for name, value in stats.items():
            if name not in ("tokens_per_second", "max_logprob_diff"):
                assert value == pytest.approx(results[0][3][name], rel=1e-3, abs=1e-5), name


def test_oracle_order_of_episodes_changes_nothing(make_episodes):
    gradients = []
    for order in (slice(None), slice(None, None, -1)):
        ppo, episodes = learner(), make_episodes("lora")[order]
        gradients.append(record_steps(ppo, *prepare_update(ppo, episodes))[0][0][0])
    assert relative_distance(*gradients) < 1e-5


# KL


def test_oracle_gradients_of_kl_losses():
    """The expected gradient of k2 is that of the KL; the one of k3 is not"""
    generator = torch.Generator().manual_seed(0)
    logits, ref = (
        torch.randn(5, 13, generator=generator, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 13, generator=generator, dtype=torch.float64),
    )
    log_ref = ref.log_softmax(-1)

    def gradient(loss):
        return torch.autograd.grad(loss, logits)[0]

    def expected_gradient(estimator):
        """Return the expected gradient of a single-sample estimator under the policy"""
        dist = logits.log_softmax(-1)
        return gradient((dist.exp().detach() * estimator(dist, log_ref)).sum())

    p, q = logits.softmax(-1), ref.softmax(-1)
    true = gradient(
        sum(p[i, v] * torch.log(p[i, v] / q[i, v]) for i in range(5) for v in range(13))
    )
    assert torch.allclose(
        gradient(exact_kl(logits.log_softmax(-1), log_ref).sum()), true, rtol=1e-10, atol=1e-12
    )
    assert torch.allclose(expected_gradient(k2_kl), true, rtol=1e-10, atol=1e-12)
    k3 = expected_gradient(lambda logp, logq: (logq - logp).exp() - 1 - (logq - logp))
    assert (k3 - true).abs().max() > 0.1 * true.abs().max()
    # it is the gradient of the reverse KL
    assert torch.allclose(
        k3, gradient((q * (log_ref - logits.log_softmax(-1))).sum()), rtol=1e-10, atol=1e-12
    )
    for wrong in (
        lambda: k2_kl(logits.log_softmax(-1), log_ref) * 2,
        lambda: -k2_kl(logits.log_softmax(-1), log_ref),
    ):
        assert not torch.allclose(
            expected_gradient(lambda *_, wrong=wrong: wrong()), true, rtol=1e-3
        )


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_oracle_exact_kl_gradient_matches(kind, make_episodes):
    """Without advantages and value loss, the gradient is that of the mean KL over all states"""
    ppo, episodes = learner(kind, vf_coef=0.0, kl_coef=1.0), make_episodes(kind)
    oracle = Oracle(ppo)
    batch, reference = prepare_update(ppo, episodes)
    batch.advantages.zero_()
    perturb(ppo.policy.parameters(), 0.01, seed=3)
    ((gradients, model, _),), _ = record_steps(ppo, batch, reference)
    model = copy.deepcopy(model).double()
    model.zero_grad()
    total = 0
    for episode in episodes:
        for turn in episode.turns:
            ids = episode.segments[turn.segment].ids
            positions = slice(turn.start - 1, turn.start - 1 + len(turn.response_ids))
            p, q = (
                oracle.forward(model, ids)[0][positions].exp(),
                oracle.reference(ids)[0][positions].exp(),
            )
            total = total + (p * torch.log(p / q)).sum() / batch.num_tokens
    total.backward()
    assert (
        relative_distance(
            gradients[: len(ppo.policy.parameters())],
            [p.grad for p in model.parameters() if p.requires_grad],
        )
        < 2e-5
    )


# Parts of the loss


def test_oracle_losses_match_hand_computed_values():
    old, advantages = torch.zeros(6), torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    logprobs = torch.tensor([1.5, 1.0, 0.5, 1.5, 1.0, 0.5]).log().requires_grad_()
    loss, clipped = policy_loss(logprobs - old, advantages, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, -1.0, -0.5, 1.5, 1.0, 0.8])
    assert clipped.tolist() == [True, False, False, False, False, True]
    loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0, -1.0, -0.5, 1.5, 1.0, 0])
    values, old_values, returns = (
        torch.tensor([1.0, 1.0, 1.0]),
        torch.tensor([0.0, 0.0, 0.9]),
        torch.tensor([2.0, 0.0, 0.0]),
    )
    assert value_loss(values, old_values, returns).tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert value_loss(values, old_values, returns, 0.3).tolist() == pytest.approx(
        [0.5 * 1.7**2, 0.5, 0.5]
    )


# Early stopping and adaptive KL


def test_oracle_early_stop_ends_the_update_before_the_step(make_episodes):
    """`early_stop_kl` stops before the step of a mini-batch whose KL exceeds 1.5 times the limit

    The last step before is cut to the length at which the KL, quadratic in it, is 1.5 times the limit.
    """
    ppo, episodes = learner(epochs=6, learning_rate=1e-3), make_episodes("lora")
    kls = []
    batch, reference = prepare_update(ppo, episodes)

    def run_update(**options):
        other = learner(learning_rate=1e-3, **options)
        stats = other.train_on_batch(batch, reference)
        return stats, [p.detach().clone() for p in other.policy.parameters()]

    for epochs in (1, 2, 3, 4):
        kls.append(run_update(epochs=epochs)[0]["approx_kl"])
    assert kls == sorted(kls) and kls[0] < 1e-6 < kls[1]
    target = (kls[1] + kls[2]) / 2 / 1.5
    stopped, weights = run_update(epochs=6, early_stop_kl=target)
    assert stopped["epochs"] == 2 and stopped["approx_kl"] == pytest.approx(kls[2])
    # the KL was kls[1] before the last step and kls[2] after it: the step is cut to the limit
    start, end, limit = (kl**0.5 for kl in (kls[1], kls[2], 1.5 * target))
    share = (limit - start) / (end - start)
    assert 0 < share < 1
    for shortened, before, after in zip(weights, run_update(epochs=1)[1], run_update(epochs=2)[1]):
        torch.testing.assert_close(shortened, before + share * (after - before))
    assert run_update(epochs=3, early_stop_kl=1e9)[0]["epochs"] == 3
    mini_batches = dict(epochs=9, mini_batch_size=max(1, batch.num_turns // 3))
    partial, full = (
        run_update(early_stop_kl=target, **mini_batches)[0],
        run_update(**mini_batches)[0],
    )
    assert 0 < partial["epochs"] < 9 == full["epochs"] and partial["epochs"] % 1 > 0
    first_step = run_update(epochs=2, early_stop_kl=1e-12)[0]  # rounding exceeds this limit
    assert first_step["epochs"] <= 1 and np.isfinite(first_step["grad_norm"])


def test_oracle_adaptive_kl_coefficient_matches(make_episodes):
    assert adapt_kl_coef(0.5, kl=0.2, target=0.1, turns=100, horizon=1000) == pytest.approx(
        0.5 * (1 + 0.2 * 0.1)
    )
    assert adapt_kl_coef(0.5, kl=0.0, target=0.1, turns=100, horizon=1000) == pytest.approx(
        0.5 * (1 - 0.2 * 0.1)
    )
    assert adapt_kl_coef(0.5, kl=0.11, target=0.1, turns=100, horizon=1000) == pytest.approx(
        0.5 * (1 + 0.1 * 0.1)
    )
    # the change is limited to one horizon
    assert adapt_kl_coef(0.5, kl=9.0, target=0.1, turns=10**9, horizon=1000) == pytest.approx(0.6)
    ppo, episodes = learner(kl_adaptive_target=1e-6, kl_horizon=42, epochs=2), make_episodes("lora")
    used = []
    for _ in range(3):
        batch, reference = prepare_update(ppo, episodes)
        stats = ppo.train_on_batch(batch, reference)
        used.append(stats["kl_coef"])
        assert stats["ref_kl"] > 1.2e-6
    assert used == pytest.approx([0.3 * (1 + 0.2 * 21 / 42) ** k for k in range(3)])
    assert ppo.kl_coef == pytest.approx(0.3 * 1.1**3)


def test_oracle_loss_uses_the_adapted_kl_coefficient(make_episodes):
    """The loss uses the learner's adapted `kl_coef`, not the configured one"""
    gradients = []
    for configured, adapted in ((0.9, 0.9), (0.3, 0.9), (0.3, 0.3)):
        ppo, episodes = learner(kl_coef=configured), make_episodes("lora")
        ppo.kl_coef = adapted
        gradients.append(record_steps(ppo, *prepare_update(ppo, episodes))[0][0][0])
    assert (
        relative_distance(gradients[1], gradients[0]) < 1e-6
        and relative_distance(gradients[2], gradients[0]) > 1e-3
    )


# Non-finite values and interrupts


def snapshot(ppo):
    """Return all state that an update may change, for a bitwise comparison"""
    tensors = [
        p.detach().clone()
        for p in [*ppo.policy.model.parameters(), *ppo.policy.value_head.parameters()]
    ]
    moments = [v.clone() for s in ppo.optimizer.state_dict()["state"].values() for v in s.values()]
    return tensors, moments, ppo.generator.get_state(), ppo.kl_coef


def equal_snapshots(a, b) -> bool:
    (tensors, moments, order, coef), (tensors2, moments2, order2, coef2) = a, b
    pairs = [
        *zip(tensors, tensors2, strict=True),
        *zip(moments, moments2, strict=True),
        (order, order2),
    ]
    return coef == coef2 and all(torch.equal(x, y) for x, y in pairs)


def nan_reward(ppo, batch, monkeypatch):
    batch.returns[3] = batch.advantages[5] = float("nan")


def infinite_logprob(ppo, batch, monkeypatch):
    batch.logprobs[2] = -float("inf")


def nan_loss(ppo, batch, monkeypatch):
    """Make the loss NaN in the second micro-batch of the third step"""
    original, calls = passes_module.policy_loss, []

    def fail(*args):
        calls.append(1)
        loss, clipped = original(*args)
        return (loss * float("nan") if len(calls) == 12 else loss), clipped

    monkeypatch.setattr(passes_module, "policy_loss", fail)


def infinite_gradient(ppo, batch, monkeypatch):
    """Make a gradient infinite after two steps, while the loss is finite"""
    calls, parameter = [], ppo.policy.parameters()[1]

    def fail(gradient):
        calls.append(1)
        return gradient + float("inf") if len(calls) == 12 else gradient

    handle = parameter.register_hook(fail)
    monkeypatch.setattr(ppo, "remove", handle.remove, raising=False)


def interrupt(ppo, batch, monkeypatch):
    original, calls = passes_module.policy_loss, []

    def fail(*args):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(passes_module, "policy_loss", fail)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("lora", nan_reward),
        ("plain", infinite_logprob),
        ("plain", nan_loss),
        ("lora", nan_loss),
        ("plain", infinite_gradient),
        ("lora", interrupt),
    ],
)
def test_oracle_failed_update_changes_nothing(kind, fault, make_episodes, tmp_path, monkeypatch):
    """Weights, moments, random order and coefficient are equal bit for bit

    The next update is the same as without the failure.
    """
    options = dict(epochs=2, mini_batch_size=6, kl_adaptive_target=0.001, token_budget=1)
    ppo, other = learner(kind, **options), learner(kind, **options)
    ppo.failure_dir = tmp_path / "failed"
    for p in (ppo, other):
        p.update(make_episodes(kind))  # creates optimizer moments
    before = snapshot(ppo)
    assert len(before[1]) and equal_snapshots(before, snapshot(other))
    batch, reference = prepare_update(ppo, make_episodes(kind))
    with monkeypatch.context() as patch:
        fault(ppo, batch, patch)
        with pytest.raises(KeyboardInterrupt if fault is interrupt else NonFiniteLoss) as caught:
            ppo.train_on_batch(batch, reference)
        if fault is infinite_gradient:
            ppo.remove()
    assert equal_snapshots(before, snapshot(ppo))
    assert all(p.grad is None for p in ppo.policy.parameters())
    if fault is not interrupt:
        (path,) = (tmp_path / "failed").iterdir()
        message = str(caught.value)
        assert (
            repr(batch) in message and str(path) in message and "No weight was changed" in message
        )
        before_first_step = "before the first step"
        location = {
            nan_reward: before_first_step,
            infinite_logprob: before_first_step,
            nan_loss: "in epoch",
            infinite_gradient: "in the gradient of epoch",
        }
        assert location[fault] in message
        saved = Batch.load(path)
        assert repr(saved) == repr(batch) and all(
            np.array_equal(a, b) for a, b in zip(saved.rows, batch.rows)
        )
        for name in ("token_ids", "logprobs", "advantages", "returns", "values", "rewards"):
            assert torch.equal(
                getattr(saved, name).nan_to_num(7.0), getattr(batch, name).nan_to_num(7.0)
            )
    for p in (ppo, other):
        p.update(make_episodes(kind))
    assert equal_snapshots(snapshot(ppo), snapshot(other)) and not equal_snapshots(
        before, snapshot(ppo)
    )


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("rewards", [(math.nan, 0.0), (math.inf, 0.0), (math.inf, -math.inf)])
def test_oracle_non_finite_reward_stops_the_update(rewards, make_episodes, tmp_path):
    ppo, episodes = learner(), make_episodes("lora")
    ppo.failure_dir = tmp_path
    episodes[2].turns[1].reward, episodes[3].turns[0].reward = rewards
    before = snapshot(ppo)
    with pytest.raises(
        NonFiniteLoss,
        match="before the first step.*saved as .*Look for a reward that is not finite",
    ):
        ppo.update(episodes)
    assert equal_snapshots(before, snapshot(ppo))
    (path,) = tmp_path.iterdir()
    assert Batch.load(path).rewards.isfinite().tolist() == [
        math.isfinite(t.reward) for e in episodes for t in e.turns
    ]


def test_oracle_metrics_match_their_definitions(make_episodes):
    """Logged metrics match their definitions"""
    ppo, episodes = learner(epochs=3), make_episodes("lora")
    episodes[0].turns[0].valid = True
    stats = ppo.update(episodes)
    turns = [t for e in episodes for t in e.turns]
    values, returns = np.array([t.value for t in turns]), np.array([t.returns for t in turns])
    assert stats["mean_return"] == pytest.approx(
        np.mean([sum(t.reward for t in e.turns) for e in episodes])
    )
    assert stats["mean_episode_length"] == len(turns) / len(episodes) and stats["epochs"] == 3
    assert stats["invalid_rate"] == pytest.approx(np.mean([not t.valid for t in turns]))
    assert stats["tokens"] == sum(len(t.response_ids) for t in turns)
    assert stats["explained_variance"] == pytest.approx(
        1 - np.var(returns - values) / np.var(returns), rel=1e-4
    )
    assert stats["max_logprob_diff"] < 1e-4 and stats["tokens_per_second"] > 0
    assert set(stats) == set(metrics_module.METRICS)
