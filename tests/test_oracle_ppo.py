"""PPO against an implementation of its own kind: in float64, from the formulas, one token at a time, with the whole model's logits."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from doubles import lake_agent, make_policy, shake

import llamagym.passes as passes_module
import llamagym.ppo as ppo_module
from llamagym.batch import Batch
from llamagym.config import CreditConfig, PPOConfig
from llamagym.credit import assign, normalize_advantages
from llamagym.losses import adapt_kl_coef, exact_kl, k2_kl, policy_loss, value_loss
from llamagym.passes import annotate
from llamagym.ppo import PPO, NonFiniteLoss
from llamagym.rollout import collect

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing")
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def played():
    """Episodes on the lake, two of seven cut by the time limit, with a reward for every turn: played once per kind of policy"""

    def play(kind):
        agent = lake_agent(make_policy(kind), max_steps=3, generate__temperature=TEMPERATURE, generate__max_new_tokens=3)
        episodes = collect(agent, episodes=7, num_envs=7)
        rng = np.random.default_rng(0)
        for i, episode in enumerate(episodes):
            for turn in episode.turns:
                turn.reward = float(rng.normal())
            if i > 1:
                episode.turns[-1].truncated, episode.turns[-1].terminated, episode.final_ids = False, True, None
        return episodes

    made = {}
    return lambda kind: copy.deepcopy(made.setdefault(kind, play(kind) if kind not in made else None))


def learner(kind="lora", critic="reference", gamma=0.9, gae_lambda=0.8, **options) -> PPO:
    """A learner whose critic has an opinion. Without further options: one step over the whole batch, gradients not clipped"""
    policy = make_policy(kind, critic=critic, value_hidden=4)
    shake(policy.value_head.parameters(), 0.2)
    settings = dict(epochs=1, mini_batch_size=1000, max_grad_norm=1e9, learning_rate=1e-3, kl_coef=0.3, vf_coef=0.7) | options
    return PPO(policy, PPOConfig(**settings), CreditConfig(gamma, gae_lambda), TEMPERATURE)


def prepared(ppo, episodes):
    """What `learn` does before the gradient steps"""
    reference = annotate(ppo.policy, episodes, TEMPERATURE)
    assign(episodes, ppo.credit.gamma, ppo.credit.gae_lambda)
    normalize_advantages(episodes)
    return Batch.from_episodes(episodes), reference


def steps_of(ppo, batch, reference):
    """An update. For each of its optimiser steps: the gradients of policy and critic, the model and the value head just before it; and its statistics"""
    found = []

    def look(optimizer, args, kwargs):
        gradients = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for group in optimizer.param_groups for p in group["params"]]
        found.append((gradients, copy.deepcopy(ppo.policy.model), copy.deepcopy(ppo.policy.value_head)))

    handle = ppo.optimizer.register_step_pre_hook(look)
    stats = ppo.update(batch, reference)
    handle.remove()
    return found, stats


# the oracle


def predicted(head, hidden):
    """A return, of what the value head says in its own units"""
    return head.center + head.scale * head.out(head.inner(hidden)).squeeze(-1)


class Oracle:
    """PPO's loss from the formulas. `first` is the policy the episodes were played with: a copy in float64"""

    def __init__(self, ppo: PPO):
        self.config, self.credit, self.critic, self.peft = ppo.config, ppo.credit, ppo.policy.critic, ppo.policy.is_peft
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
            hidden = self.reference(ids)[1] if self.critic == "reference" else self.forward(self.first, ids)[1]
            return predicted(self.first_head, hidden[position]).item()

    def targets(self, episodes):
        """Old value, advantage and return of every turn: GAE by its definition, a sum of discounted errors"""
        gamma, lam, values, advantages, returns = self.credit.gamma, self.credit.gae_lambda, [], [], []
        for episode in episodes:
            v = [self.old_value(episode.segments[t.segment].ids, t.start - 1) for t in episode.turns]
            v.append(self.old_value(episode.final_ids, len(episode.final_ids) - 1) if episode.turns[-1].truncated else 0.0)
            delta = [turn.reward + gamma * v[t + 1] - v[t] for t, turn in enumerate(episode.turns)]
            for t in range(len(delta)):
                advantages.append(sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])))
                returns.append(advantages[-1] + v[t])
                values.append(v[t])
        mean = sum(advantages) / len(advantages)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(advantages))
        return values, [(a - mean) / deviation for a in advantages], returns

    def loss(self, episodes, model, head, targets):
        """The whole batch's loss at the weights of `model` and `head`"""
        c, values, advantages, returns = self.config, *targets
        turns = [(e, t) for e in episodes for t in e.turns]
        now = {id(s): self.forward(model, s.ids) for e in episodes for s in e.segments}
        policy_terms, kl_terms, entropies, value_terms = [], [], [], []
        for (episode, turn), old, advantage, target in zip(turns, values, advantages, returns):
            (dist, hidden), (ref, ref_hidden) = now[id(episode.segments[turn.segment])], self.reference(episode.segments[turn.segment].ids)
            state = {"reference": ref_hidden, "detached": hidden.detach(), "shared": hidden}[self.critic][turn.start - 1]
            value = predicted(head, state)
            error = (value - target) ** 2
            if c.value_clip is not None:
                error = max(error, (old + max(min(value - old, value * 0 + c.value_clip), value * 0 - c.value_clip) - target) ** 2)
            value_terms.append(error / 2)
            for k, token in enumerate(turn.response_ids):
                at = turn.start + k - 1
                ratio = torch.exp(dist[at, token] - float(turn.logprobs[k]))
                limited = min(max(ratio, ratio * 0 + 1 - c.clip_range), ratio * 0 + 1 + c.clip_range)
                policy_terms.append(-min(ratio * advantage, limited * advantage))
                p = dist[at].exp()
                entropies.append(-(p * dist[at]).sum())
                kl_terms.append((p * (dist[at] - ref[at])).sum() if c.kl_loss == "exact" else (dist[at, token] - ref[at, token]) ** 2 / 2)
        mean = lambda terms: sum(terms) / len(terms)
        return mean(policy_terms) + c.kl_coef * mean(kl_terms) - c.entropy_coef * mean(entropies) + c.vf_coef * mean(value_terms) / head.scale**2

    def gradients(self, episodes, model, head, targets):
        model, head = copy.deepcopy(model).double(), copy.deepcopy(head).double()
        model.zero_grad(); head.zero_grad()
        loss = self.loss(episodes, model, head, targets)
        loss.backward()
        weights = [*(p for p in model.parameters() if p.requires_grad), *head.parameters()]
        return [p.grad if p.grad is not None else torch.zeros_like(p) for p in weights], loss.item()


def distance(ours, theirs) -> float:
    """Of two gradients, relative to the second"""
    ours, theirs = (torch.cat([x.double().flatten() for x in gradients]) for gradients in (ours, theirs))
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
def test_oracle_gradient(case, played):
    """Values, GAE, normalisation, loss and gradient, all anew in float64, at weights that have left those that sampled: ratios are clipped"""
    ppo, episodes = learner(**CASES[case]), played(CASES[case]["kind"])
    oracle = Oracle(ppo)
    targets = oracle.targets(episodes)
    batch, reference = prepared(ppo, episodes)
    for ours, theirs in zip((batch.values, [t.advantage for e in episodes for t in e.turns], batch.returns), targets):
        np.testing.assert_allclose(ours, theirs, atol=3e-6)
    shake(ppo.policy.parameters(), 0.02 if ppo.policy.is_peft else 0.004, seed=5)
    shake(ppo.policy.value_head.parameters(), 0.1, seed=5)
    ((gradients, model, head),), stats = steps_of(ppo, batch, reference)
    expected, loss = oracle.gradients(episodes, model, head, targets)
    assert 0.1 < stats["clip_fraction"] < 0.9  # clipped and free tokens are both there
    assert distance(gradients, expected) < 2e-5
    critic = len(list(head.parameters()))
    assert distance(gradients[:-critic], expected[:-critic]) < 2e-5 and distance(gradients[-critic:], expected[-critic:]) < 2e-5
    if ppo.config.kl_loss == "exact":
        c = ppo.config
        ours = stats["policy_loss"] + c.kl_coef * stats["ref_kl"] - c.entropy_coef * stats["entropy"] + c.vf_coef * stats["value_loss"] / head.scale.item() ** 2
        assert ours == pytest.approx(loss, rel=1e-4, abs=1e-6)


def test_oracle_every_step_of_several_epochs(played):
    """Two epochs of three mini-batches: the steps of an epoch, averaged, are the batch's gradient as long as nothing moves"""
    ppo, episodes = learner(epochs=2, mini_batch_size=7, learning_rate=1e-12), played("lora")
    batch, reference = prepared(ppo, episodes)
    steps, _ = steps_of(ppo, batch, reference)
    ((gradients, *_),), _ = steps_of(learner(), batch, reference)
    assert len(steps) == 6 and batch.num_turns == 21
    for epoch in (steps[:3], steps[3:]):
        assert distance([sum(g) / 3 for g in zip(*(s[0] for s in epoch))], gradients) < 1e-5
        assert distance(epoch[0][0], gradients) > 0.05  # a single one is not
    assert distance(steps[0][0], steps[3][0]) > 0.05  # and each epoch has an order of its own


def test_oracle_weights_after_an_update(played):
    """Clipping of each group's norm, and AdamW, on the oracle's gradients. Clipping below Adam's epsilon makes its step linear in the gradient"""
    ppo, episodes = learner(max_grad_norm=1e-9, learning_rate=0.1, critic_learning_rate=0.2, epochs=2, normalize_returns=False), played("lora")
    oracle = Oracle(ppo)
    targets = oracle.targets(episodes)
    batch, reference = prepared(ppo, episodes)
    trained = [p for group in ppo.optimizer.param_groups for p in group["params"]]
    before = [p.detach().double() for p in trained]
    ppo.update(batch, reference)
    changes = [p.detach().double() - old for p, old in zip(trained, before)]
    model, head = copy.deepcopy(oracle.first), copy.deepcopy(oracle.first_head)
    groups = [[p for p in model.parameters() if p.requires_grad], list(head.parameters())]
    optimizer = torch.optim.AdamW([dict(params=groups[0], lr=0.1), dict(params=groups[1], lr=0.2)], weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        oracle.loss(episodes, model, head, targets).backward()
        for group in groups:
            norm = math.sqrt(sum(p.grad.square().sum().item() for p in group))
            for p in group:
                p.grad *= 1e-9 / norm
        optimizer.step()
    expected = [p.detach() - old for p, old in zip([*groups[0], *groups[1]], before)]
    count = len(groups[0])
    assert all(any(x.any() for x in c) for c in (changes[:count], changes[count:]))
    assert distance(changes[:count], expected[:count]) < 1e-3 and distance(changes[count:], expected[count:]) < 1e-3


@pytest.mark.parametrize("critic", ["reference", "shared"])
def test_oracle_micro_batches_change_nothing(critic, played):
    """From one row at a time to all at once: the same gradients, weights and statistics"""
    results = []
    for budget in (1, 250, 400, 10**6):
        ppo, episodes = learner(critic=critic, token_budget=budget, epochs=2, mini_batch_size=11, max_grad_norm=0.5), played("lora")
        batch, reference = prepared(ppo, episodes)
        steps, stats = steps_of(ppo, batch, reference)
        results.append((len(batch.micro_batches(budget)), steps[0][0], [p.detach() for p in ppo.policy.parameters()], stats))
    assert [n for n, *_ in results] == sorted({n for n, *_ in results}, reverse=True) and results[0][0] == batch.num_rows and results[-1][0] == 1
    for _, gradients, weights, stats in results[1:]:
        assert distance(gradients, results[0][1]) < 1e-5
        assert max((a - b).abs().max().item() for a, b in zip(weights, results[0][2])) < 2e-4  # Adam divides by the gradient's own size
        for name, value in stats.items():
            if name not in ("tokens_per_second", "logprob_gap"):
                assert value == pytest.approx(results[0][3][name], rel=1e-3, abs=1e-5), name


def test_oracle_order_of_episodes_changes_nothing(played):
    gradients = []
    for order in (slice(None), slice(None, None, -1)):
        ppo, episodes = learner(), played("lora")[order]
        gradients.append(steps_of(ppo, *prepared(ppo, episodes))[0][0][0])
    assert distance(*gradients) < 1e-5


# KL


def test_oracle_gradients_of_kl_losses():
    """Expectations over the vocabulary, token by token, in float64. k2's gradient is the KL's, k3's is not"""
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(5, 13, generator=generator, dtype=torch.float64, requires_grad=True), torch.randn(5, 13, generator=generator, dtype=torch.float64)
    log_ref = ref.log_softmax(-1)

    def gradient(loss):
        return torch.autograd.grad(loss, logits)[0]

    def expected_gradient(estimator):
        """Of an estimator of single samples, when tokens are drawn from the policy and not differentiated through"""
        dist = logits.log_softmax(-1)
        return gradient((dist.exp().detach() * estimator(dist, log_ref)).sum())

    p, q = logits.softmax(-1), ref.softmax(-1)
    true = gradient(sum(p[i, v] * torch.log(p[i, v] / q[i, v]) for i in range(5) for v in range(13)))
    assert torch.allclose(gradient(exact_kl(logits.log_softmax(-1), log_ref).sum()), true, rtol=1e-10, atol=1e-12)
    assert torch.allclose(expected_gradient(k2_kl), true, rtol=1e-10, atol=1e-12)
    k3 = expected_gradient(lambda logp, logq: (logq - logp).exp() - 1 - (logq - logp))
    assert (k3 - true).abs().max() > 0.1 * true.abs().max()
    assert torch.allclose(k3, gradient((q * (log_ref - logits.log_softmax(-1))).sum()), rtol=1e-10, atol=1e-12)  # it is that of the reverse one
    for wrong in (lambda: k2_kl(logits.log_softmax(-1), log_ref) * 2, lambda: -k2_kl(logits.log_softmax(-1), log_ref)):
        assert not torch.allclose(expected_gradient(lambda *_, wrong=wrong: wrong()), true, rtol=1e-3)


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_oracle_exact_kl_through_the_model(kind, played):
    """Without advantages and value loss, the update's gradient is that of the mean true KL, state by state"""
    ppo, episodes = learner(kind, vf_coef=0.0, kl_coef=1.0), played(kind)
    oracle = Oracle(ppo)
    batch, reference = prepared(ppo, episodes)
    batch.advantages.zero_()
    shake(ppo.policy.parameters(), 0.01, seed=3)
    ((gradients, model, _),), _ = steps_of(ppo, batch, reference)
    model = copy.deepcopy(model).double()
    model.zero_grad()
    total = 0
    for episode in episodes:
        for turn in episode.turns:
            ids = episode.segments[turn.segment].ids
            where = slice(turn.start - 1, turn.start - 1 + len(turn.response_ids))
            p, q = oracle.forward(model, ids)[0][where].exp(), oracle.reference(ids)[0][where].exp()
            total = total + (p * torch.log(p / q)).sum() / batch.num_tokens
    total.backward()
    assert distance(gradients[: len(ppo.policy.parameters())], [p.grad for p in model.parameters() if p.requires_grad]) < 2e-5


# the pieces


def test_oracle_losses_by_hand():
    old, advantages = torch.zeros(6), torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    logprobs = torch.tensor([1.5, 1.0, 0.5, 1.5, 1.0, 0.5]).log().requires_grad_()
    loss, clipped = policy_loss(logprobs - old, advantages, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, -1.0, -0.5, 1.5, 1.0, 0.8])
    assert clipped.tolist() == [True, False, False, False, False, True]
    loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0, -1.0, -0.5, 1.5, 1.0, 0])
    values, old_values, returns = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.9]), torch.tensor([2.0, 0.0, 0.0])
    assert value_loss(values, old_values, returns).tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert value_loss(values, old_values, returns, 0.3).tolist() == pytest.approx([0.5 * 1.7**2, 0.5, 0.5])


# how far an update goes


def test_oracle_early_stop(played):
    """`target_kl` ends an update before the step of a mini-batch that passes it half as far again; what was done until then is what so many steps do"""
    ppo, episodes = learner(epochs=6, learning_rate=3e-3), played("lora")
    kls = []
    batch, reference = prepared(ppo, episodes)

    def run(**options):
        other = learner(learning_rate=3e-3, **options)
        stats = other.update(batch, reference)
        return stats, [p.detach().clone() for p in other.policy.parameters()]

    for epochs in (1, 2, 3, 4):
        kls.append(run(epochs=epochs)[0]["approx_kl"])
    assert kls == sorted(kls) and kls[0] < 1e-6 < kls[1]
    target = (kls[1] + kls[2]) / 2 / 1.5
    stopped, weights = run(epochs=6, target_kl=target)
    assert stopped["epochs"] == 2 and stopped["approx_kl"] == pytest.approx(kls[2])
    assert all(torch.equal(a, b) for a, b in zip(weights, run(epochs=2)[1]))
    assert run(epochs=3, target_kl=1e9)[0]["epochs"] == 3
    few = dict(epochs=9, mini_batch_size=max(1, batch.num_turns // 3))
    part, whole = run(target_kl=target, **few)[0], run(**few)[0]
    assert 0 < part["epochs"] < 9 == whole["epochs"] and part["epochs"] % 1 > 0
    none = run(epochs=2, target_kl=1e-12)[0]  # rounding is enough
    assert none["epochs"] <= 1 and np.isfinite(none["grad_norm"])


def test_oracle_adaptive_coefficient(played):
    assert adapt_kl_coef(0.5, kl=0.2, target=0.1, turns=100, horizon=1000) == pytest.approx(0.5 * (1 + 0.2 * 0.1))
    assert adapt_kl_coef(0.5, kl=0.0, target=0.1, turns=100, horizon=1000) == pytest.approx(0.5 * (1 - 0.2 * 0.1))
    assert adapt_kl_coef(0.5, kl=0.11, target=0.1, turns=100, horizon=1000) == pytest.approx(0.5 * (1 + 0.1 * 0.1))
    assert adapt_kl_coef(0.5, kl=9.0, target=0.1, turns=10**9, horizon=1000) == pytest.approx(0.6)  # a horizon at most, never below 0
    ppo, episodes = learner(kl_target=1e-6, kl_horizon=42, epochs=2), played("lora")
    used = []
    for _ in range(3):
        batch, reference = prepared(ppo, episodes)
        stats = ppo.update(batch, reference)
        used.append(stats["kl_coef"])
        assert stats["ref_kl"] > 1.2e-6
    assert used == pytest.approx([0.3 * (1 + 0.2 * 21 / 42) ** k for k in range(3)])
    assert ppo.kl_coef == pytest.approx(0.3 * 1.1**3)


def test_oracle_the_coefficient_in_use_is_the_one_in_the_loss(played):
    """`kl_coef` of the learner, which is steered, and not the configured one"""
    gradients = []
    for configured, steered in ((0.9, 0.9), (0.3, 0.9), (0.3, 0.3)):
        ppo, episodes = learner(kl_coef=configured), played("lora")
        ppo.kl_coef = steered
        gradients.append(steps_of(ppo, *prepared(ppo, episodes))[0][0][0])
    assert distance(gradients[1], gradients[0]) < 1e-6 and distance(gradients[2], gradients[0]) > 1e-3


# what is not finite


def snapshot(ppo):
    """Everything an update may change, bit for bit"""
    tensors = [p.detach().clone() for p in [*ppo.policy.model.parameters(), *ppo.policy.value_head.parameters()]]
    moments = [v.clone() for s in ppo.optimizer.state_dict()["state"].values() for v in s.values()]
    return tensors, moments, ppo.generator.get_state(), ppo.kl_coef


def same(a, b) -> bool:
    (tensors, moments, order, coef), (tensors2, moments2, order2, coef2) = a, b
    pairs = [*zip(tensors, tensors2, strict=True), *zip(moments, moments2, strict=True), (order, order2)]
    return coef == coef2 and all(torch.equal(x, y) for x, y in pairs)


def nan_reward(ppo, batch, monkeypatch):
    batch.returns[3] = batch.advantages[5] = float("nan")


def infinite_logprob(ppo, batch, monkeypatch):
    batch.logprobs[2] = -float("inf")


def nan_loss(ppo, batch, monkeypatch):
    """In the second micro-batch of the third step"""
    real, calls = passes_module.policy_loss, []

    def broken(*args):
        calls.append(1)
        loss, clipped = real(*args)
        return (loss * float("nan") if len(calls) == 12 else loss), clipped

    monkeypatch.setattr(passes_module, "policy_loss", broken)


def infinite_gradient(ppo, batch, monkeypatch):
    """Of a finite loss, after two steps were made"""
    calls, parameter = [], ppo.policy.parameters()[1]

    def broken(gradient):
        calls.append(1)
        return gradient + float("inf") if len(calls) == 12 else gradient

    handle = parameter.register_hook(broken)
    monkeypatch.setattr(ppo, "remove", handle.remove, raising=False)


def interrupt(ppo, batch, monkeypatch):
    real, calls = passes_module.policy_loss, []

    def broken(*args):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(passes_module, "policy_loss", broken)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("lora", nan_reward), ("plain", infinite_logprob), ("plain", nan_loss), ("lora", nan_loss), ("plain", infinite_gradient), ("lora", interrupt)],
)
def test_oracle_what_is_not_finite_changes_nothing(kind, fault, played, tmp_path, monkeypatch):
    """Weights, moments, random order and coefficient are bit-identical after it, and the next update is the one there would have been"""
    options = dict(epochs=2, mini_batch_size=6, kl_target=0.001, token_budget=1)
    ppo, other = learner(kind, **options), learner(kind, **options)
    ppo.failure_dir = tmp_path / "failed"
    for p in (ppo, other):
        p.learn(played(kind))  # there are moments
    before = snapshot(ppo)
    assert len(before[1]) and same(before, snapshot(other))
    batch, reference = prepared(ppo, played(kind))
    with monkeypatch.context() as patch:
        fault(ppo, batch, patch)
        with pytest.raises(KeyboardInterrupt if fault is interrupt else NonFiniteLoss) as caught:
            ppo.update(batch, reference)
        if fault is infinite_gradient:
            ppo.remove()
    assert same(before, snapshot(ppo))
    assert all(p.grad is None for p in ppo.policy.parameters())
    if fault is not interrupt:
        (path,) = (tmp_path / "failed").iterdir()
        message = str(caught.value)
        assert repr(batch) in message and str(path) in message and "No weight was changed" in message
        before_any = "before the first step"
        where = {nan_reward: before_any, infinite_logprob: before_any, nan_loss: "in epoch", infinite_gradient: "in the gradient of epoch"}
        assert where[fault] in message
        saved = Batch.load(path)
        assert repr(saved) == repr(batch) and all(np.array_equal(a, b) for a, b in zip(saved.rows, batch.rows))
        for name in ("token_ids", "logprobs", "advantages", "returns", "values", "rewards"):
            assert torch.equal(getattr(saved, name).nan_to_num(7.0), getattr(batch, name).nan_to_num(7.0))
    for p in (ppo, other):
        p.learn(played(kind))
    assert same(snapshot(ppo), snapshot(other)) and not same(before, snapshot(ppo))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("rewards", [(math.nan, 0.0), (math.inf, 0.0), (math.inf, -math.inf)])
def test_oracle_a_reward_that_is_not_a_finite_number_stops_learning(rewards, played, tmp_path):
    ppo, episodes = learner(), played("lora")
    ppo.failure_dir = tmp_path
    episodes[2].turns[1].reward, episodes[3].turns[0].reward = rewards
    before = snapshot(ppo)
    with pytest.raises(NonFiniteLoss, match="before the first step.*saved as .*Look for a reward that is not finite"):
        ppo.learn(episodes)
    assert same(before, snapshot(ppo))
    (path,) = tmp_path.iterdir()
    assert Batch.load(path).rewards.isfinite().tolist() == [math.isfinite(t.reward) for e in episodes for t in e.turns]


def test_oracle_statistics(played):
    """The numbers that are logged, from their definitions"""
    ppo, episodes = learner(epochs=3), played("lora")
    episodes[0].turns[0].valid = True
    stats = ppo.learn(episodes)
    turns = [t for e in episodes for t in e.turns]
    values, returns = np.array([t.value for t in turns]), np.array([t.returns for t in turns])
    assert stats["mean_return"] == pytest.approx(np.mean([sum(t.reward for t in e.turns) for e in episodes]))
    assert stats["mean_length"] == len(turns) / len(episodes) and stats["epochs"] == 3
    assert stats["invalid_rate"] == pytest.approx(np.mean([not t.valid for t in turns]))
    assert stats["tokens"] == sum(len(t.response_ids) for t in turns)
    assert stats["explained_variance"] == pytest.approx(1 - np.var(returns - values) / np.var(returns), rel=1e-4)
    assert stats["logprob_gap"] < 1e-4 and stats["tokens_per_second"] > 0
    assert set(stats) == set(ppo_module.STATS)
