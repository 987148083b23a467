"""What makes a run fit: moments in 8 bits, activations on the host, a bounded table, memory that runs out, no distribution held whole."""

import gc
import weakref

import numpy as np
import pytest
import torch
from doubles import lake_agent, make_policy, shake
from transformers import AutoModelForCausalLM, MambaConfig

import llamagym.decoder
import llamagym.engine
import llamagym.passes
import llamagym.rows
from llamagym.batch import Batch
from llamagym.cache import OutOfMemory, grown, row_bytes
from llamagym.chat import window
from llamagym.config import GenerateConfig, LoRAConfig, PPOConfig
from llamagym.engine import Engine
from llamagym.memory import LiveBytes, Passes, optimizer_bytes, plan
from llamagym.passes import annotate, loss_terms
from llamagym.policy import Policy, add_lora
from llamagym.ppo import PPO, LossScale, NonFiniteLoss, make_optimizer, optimizer_kind
from llamagym.rollout import collect
from llamagym.rows import OnHost, gradient_checkpointing, kept_on_host
from llamagym.tiny import tiny_config, tiny_model, tiny_tokenizer
from llamagym.trainer import load_learner, save_learner

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing")
bitsandbytes = pytest.importorskip("bitsandbytes")


def rewarded(agent, episodes=6, **how):
    """Episodes with a reward for every turn"""
    collected, rng = collect(agent, episodes=episodes, num_envs=4, **how), np.random.default_rng(0)
    for turn in collected.turns:
        turn.reward = float(rng.normal())
    return collected


# moments in 8 bits


def test_qlora_moments_in_8_bits_follow_those_in_32():
    """The same twenty gradients: nearly the same way, a quarter of the memory"""
    moved = {}
    for kind in ("adamw", "adamw_8bit"):
        policy, generator = make_policy("lora"), torch.Generator().manual_seed(0)
        begin = [p.detach().clone() for p in policy.parameters()]
        optimizer = make_optimizer(policy, PPOConfig(learning_rate=1e-3, optimizer=kind))
        for _ in range(20):
            for p, first in zip(policy.parameters(), begin):
                p.grad = first.sign() + torch.randn(p.shape, generator=generator)
            optimizer.step()
        moved[kind] = torch.cat([(p.detach() - b).flatten() for p, b in zip(policy.parameters(), begin)])
        moments = [t for p in policy.parameters() for name, t in optimizer.state[p].items() if torch.is_tensor(t) and t.dim() and "qmap" not in name]
        assert sum(t.nbytes for t in moments) == optimizer_bytes([p.numel() for p in policy.parameters()], kind)
    full, small = moved["adamw"], moved["adamw_8bit"]
    assert torch.nn.functional.cosine_similarity(full, small, dim=0) > 0.99 and 0.9 < small.norm() / full.norm() < 1.1
    assert not torch.equal(full, small)


def test_qlora_optimizer_is_chosen_by_weights_and_device(monkeypatch):
    nf4, lora = make_policy("nf4"), make_policy("lora")
    assert [optimizer_kind(p, PPOConfig()) for p in (nf4, lora)] == ["adamw", "adamw"]  # on a CPU nothing is short
    monkeypatch.setattr(Policy, "device", torch.device("cuda"))
    assert [optimizer_kind(p, PPOConfig()) for p in (nf4, lora)] == ["adamw_8bit", "adamw"]
    assert optimizer_kind(nf4, PPOConfig(optimizer="adamw")) == "adamw"
    assert isinstance(make_optimizer(nf4, PPOConfig()), bitsandbytes.optim.PagedAdamW8bit)


def test_qlora_moments_in_8_bits_are_saved_restored_and_undone(tmp_path):
    """A learner that goes on from a file makes the same update, bit for bit; one that is stopped halfway has moments as they were"""
    wide = LoRAConfig(r=64)    # small matrices keep moments in 32 bits
    agents = [lake_agent(make_policy("nf4", lora=wide), max_steps=3, ppo__optimizer="adamw_8bit", ppo__learning_rate=1e-3) for _ in range(2)]
    first, second = agents
    first.learner.learn(rewarded(first))
    first.policy.save(tmp_path / "policy")
    save_learner(first.learner, tmp_path)
    second.policy.restore(tmp_path / "policy")
    load_learner(second.learner, tmp_path)
    episodes = rewarded(first, seed=1)

    def state(agent):
        own = agent.learner.optimizer.state
        return [(name, value) for p in agent.policy.parameters() for name, value in sorted(own[p].items())]

    def same(a, b):
        return len(a) == len(b) and all(n == m and (torch.equal(x, y) if torch.is_tensor(x) else x == y) for (n, x), (m, y) in zip(a, b))

    assert same(state(first), state(second)) and any(torch.is_tensor(v) and v.dtype == torch.uint8 for _, v in state(first))
    before = [(n, v.clone() if torch.is_tensor(v) else v) for n, v in state(second)]
    weights, real = [p.detach().clone() for p in second.policy.parameters()], second.learner.optimizer.step

    def stopped():
        real()
        raise KeyboardInterrupt

    second.learner.optimizer.step = stopped
    with pytest.raises(KeyboardInterrupt):
        second.learner.learn(episodes)
    del second.learner.optimizer.step
    assert same(before, state(second)) and all(torch.equal(a, b) for a, b in zip(weights, second.policy.parameters()))
    for agent in agents:
        agent.learner.learn(episodes)
    assert same(state(first), state(second)) and not same(before, state(first))
    assert all(torch.equal(a, b) for a, b in zip(first.policy.parameters(), second.policy.parameters()))


def test_qlora_moments_of_another_kind_are_refused(tmp_path):
    agent, other = (lake_agent(make_policy("lora"), max_steps=3, ppo__optimizer=kind) for kind in ("adamw_8bit", "adamw"))
    agent.learner.learn(rewarded(agent))
    save_learner(agent.learner, tmp_path)
    with pytest.raises(ValueError, match="moments of adamw_8bit, this learner has those of adamw; set ppo.optimizer='adamw_8bit' to go on"):
        load_learner(other.learner, tmp_path)


# what the backward pass needs, on the host


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("kind, family", [("plain", "llama"), ("lora", "llama"), ("nf4", "qwen3"), ("lora", "gemma2"), ("lora", "mistral"), ("lora", "phi3")])
def test_qlora_activations_on_the_host_change_nothing(kind, family, again, monkeypatch):
    """The gradient of an update, bit for bit, with everything sent that may be; nothing of the weights is"""
    monkeypatch.setattr(llamagym.rows, "SENT_BYTES", 0)
    policy, found, sent = make_policy(kind, f"tiny:{family}"), [], []
    real = OnHost.send
    monkeypatch.setattr(OnHost, "send", lambda self, t: (sent.append(t), real(self, t))[1])
    ids = torch.randint(20, 300, (3, 80), generator=torch.Generator().manual_seed(0))
    for host in (False, True):
        for p in policy.parameters():
            p.grad = None
        with gradient_checkpointing(policy, again, offload=host):
            with kept_on_host(policy, host):
                hidden = policy.trunk(ids)
            hidden.square().sum().backward()
        found.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found))
    weights = {t.untyped_storage().data_ptr() for t in [*policy.model.parameters(), *policy.model.buffers()]}
    assert sent and not any(t.untyped_storage().data_ptr() in weights for t in sent)


def test_qlora_updates_with_all_that_saves_memory_are_the_plain_ones():
    """From the same episodes: statistics and weights"""
    results = []
    for options in ({}, dict(ppo__gradient_checkpointing=True, ppo__offload_activations=True), dict(ppo__offload_activations=True, ppo__token_budget=300)):
        agent = lake_agent(make_policy("lora"), max_steps=4, **options)
        stats = agent.learner.learn(rewarded(agent))
        stats.pop("tokens_per_second")
        results.append((stats, [p.detach() for p in agent.policy.parameters()]))
    for stats, weights in results[1:]:
        assert stats == pytest.approx(results[0][0], rel=1e-3, abs=1e-5)
        for a, b in zip(weights, results[0][1]):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_qlora_plan_knows_what_the_host_takes():
    """The host takes from the card what it gets, and checkpointing leaves little to take"""
    passes = Passes(tiny_config("qwen2", hidden_size=256, num_hidden_layers=8), torch.bfloat16, LoRAConfig())
    plain, host, again, both = (passes(2, 1000, True, *how) for how in ((False, False), (False, True), (True, False), (True, True)))
    assert host.kept < 0.1 * plain.kept and both.kept < 0.5 * again.kept and host.peak < 0.4 * plain.peak and both.peak < again.peak < 0.5 * plain.peak
    assert (plain.host, again.host) == (0, 0) and both.host < 0.2 * host.host and host.host < 1.05 * plain.kept
    found = plan(tiny_config("qwen2"), "2GB", ppo__offload_activations=True)
    assert "on the host" in str(found) and "on the host" not in str(found.with_options({"ppo.offload_activations": False}))


def test_qlora_what_is_seen_often_is_sent_once(monkeypatch):
    """An expanded tensor: its numbers, not its shape"""
    monkeypatch.setattr(llamagym.rows, "SENT_BYTES", 0)
    a, b = torch.randn(3, 1, 5).requires_grad_(), torch.randn(3, 4, 5).requires_grad_()
    sent, found = [], []
    for host in (False, True):
        a.grad = b.grad = None
        context = OnHost(torch.nn.Identity())
        context.send = lambda t, context=context: (sent.append(t.nbytes), OnHost.send(context, t))[1]
        wide = a.detach().expand(3, 4, 5)
        if host:
            with context:
                out = (b * wide).sum()
        else:
            out = (b * wide).sum()
        out.backward()
        found.append(b.grad.clone())
    assert torch.equal(*found) and sum(sent) == 4 * 15


def test_qlora_importance_weights_are_read_as_without_checkpointing():
    """... where rows share a beginning, which checkpointed layers would not see"""
    results = []
    for again in (False, True):
        agent = lake_agent(make_policy("lora"), max_steps=3, ppo__importance_cap=2.0, ppo__gradient_checkpointing=again, ppo__offload_activations=again)
        stats = agent.learner.learn(rewarded(agent))
        stats.pop("tokens_per_second")
        results.append(stats)
    assert results[0]["logprob_gap"] < 1e-4 and results[1] == pytest.approx(results[0], rel=1e-3, abs=1e-5)


# no distribution is held whole


def test_memory_of_an_update_holds_no_distribution_for_each_token(monkeypatch):
    """A vocabulary of 20,000, more than a thousand sampled tokens: what is alive at most, from annotation to gradient, is not a number for each pair"""
    for name in ("AT_ONCE", "KEPT_NUMBERS"):
        monkeypatch.setattr(llamagym.passes, name, 2**20)
    policy = Policy(add_lora(tiny_model("qwen2", vocab_size=20_000).requires_grad_(False), LoRAConfig(r=4)), tiny_tokenizer())
    agent = lake_agent(policy, max_steps=16, generate__max_new_tokens=32)
    episodes = collect(agent, episodes=8, num_envs=8)
    with LiveBytes() as live:
        reference = annotate(agent.policy, episodes, token_budget=512)
        for turn in episodes.turns:
            turn.advantage, turn.returns = 1.0, 0.0
        batch = Batch.from_episodes(episodes)
        for micro in batch.micro_batches(512):
            seen = reference.select(micro.token_index, micro.turn_index, micro.candidate_index)
            loss_terms(agent.policy, micro, seen, PPOConfig(), 1.0).surrogate.sum().backward()
    assert batch.num_tokens > 1000 and 2**20 < live.peak < 4 * batch.num_tokens * 20_000 / 2


# the table of keys and values


def dialogues(engine: Engine, count: int = 9, turns: int = 4, candidates=None) -> list:
    """Conversations that go on for some turns; the most memory that the table took"""
    prompts = [[1, *range(30, 40 + i)] for i in range(count)]
    said, most = [[] for _ in prompts], 0
    for turn in range(turns):
        requests = [engine.submit(p, np.random.default_rng([i, turn]), key=i, candidates=candidates) for i, p in enumerate(prompts)]
        while engine.busy:
            engine.step()
            most = max(most, engine.nbytes)
        for i, request in enumerate(requests):
            said[i].append(request.sample)
            prompts[i] = prompts[i] + request.sample.ids + [60 + turn, 61, 62]
    return said, most


def alike(one, other) -> None:
    for a, b in zip(one, other):
        for x, y in zip(a, b):
            assert x.ids == y.ids and x.stopped == y.stopped
            assert np.abs(x.logprobs - y.logprobs).max() < 1e-4


CANDIDATES = [[70, 71, 2], [70, 72, 73, 2], [75, 2]]


@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["free", "scored"])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_memory_bound_of_the_table_changes_nothing(rows, candidates, taught):
    """Fewer rows than conversations, that grow past a step of the table: the same responses, and never more memory than allowed"""
    policy, config = taught("lora"), GenerateConfig(max_new_tokens=24)
    model = policy.causal_lm
    plain, free = dialogues(Engine(policy, {2}, config), candidates=candidates)
    limit = (rows + 1) * row_bytes(model.config, torch.float32, 128) * 3 // 2
    engine = Engine(policy, {2}, config, cache_bytes=limit)
    bounded, most = dialogues(engine, candidates=candidates)
    alike(plain, bounded)
    assert most <= max(limit, 2 * row_bytes(model.config, torch.float32, grown(130))) and most < free and not engine.busy


@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["free", "scored"])
@pytest.mark.parametrize("where", ["forward", "draw_from"])
def test_memory_that_runs_out_while_sampling_changes_nothing(where, candidates, taught, monkeypatch, caplog):
    """Wherever it does: the same responses, from fewer conversations at once"""
    policy, config = taught("lora"), GenerateConfig(max_new_tokens=12)
    plain, _ = dialogues(Engine(policy, {2}, config), candidates=candidates)
    owner = llamagym.engine._Table if where == "forward" else llamagym.engine
    real = getattr(owner, where)

    def scarce(*args, **kwargs):
        result = real(*args, **kwargs)
        if len(args[where == "forward"]) > 2:
            raise torch.OutOfMemoryError("no room")
        return result

    monkeypatch.setattr(owner, where, scarce)
    engine = Engine(policy, {2}, config)
    alike(plain, dialogues(engine, candidates=candidates)[0])
    assert engine.most == 2 and "instead of 9 conversations are answered at once" in caplog.text


def test_memory_that_runs_out_of_a_model_that_keeps_nothing(monkeypatch):
    torch.manual_seed(0)
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=len(tiny_tokenizer()), hidden_size=16, num_hidden_layers=1, pad_token_id=0, eos_token_id=2))
    policy = Policy(mamba, tiny_tokenizer())
    ask = [[1, 30, 31 + i] for i in range(5)], [np.random.default_rng(i) for i in range(5)]
    plain = Engine(policy, {2}, GenerateConfig(max_new_tokens=6)).sample(*ask)
    real = llamagym.engine.draw_from

    def scarce(logits, *args):
        if len(logits) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(logits, *args)

    monkeypatch.setattr(llamagym.engine, "draw_from", scarce)
    again = Engine(policy, {2}, GenerateConfig(max_new_tokens=6)).sample(ask[0], [np.random.default_rng(i) for i in range(5)])
    alike([plain], [again])


def test_memory_for_not_even_one_conversation_is_said_and_forgets_all(monkeypatch):
    policy = make_policy("lora")
    engine = Engine(policy, {2}, GenerateConfig(max_new_tokens=4))

    def none(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(llamagym.engine._Table, "forward", none)
        with pytest.raises(OutOfMemory, match="not even one conversation fits into memory .no room.. Quantize the model"):
            engine.sample([[1, 30], [1, 31]], [np.random.default_rng(i) for i in range(2)])
    assert not engine.busy and engine.nbytes == 0
    assert len(engine.sample([[1, 30]], [np.random.default_rng(0)])) == 1


def test_memory_bound_of_rollouts_by_configuration(taught):
    """`rollout.cache_gb`: the same episodes, in a windowed context too"""
    for context in ("full", 2):
        agents = [lake_agent(taught("lora"), max_steps=6, context__context=context, **options) for options in ({}, dict(rollout__cache_gb=1e-6))]
        assert agents[1].conversation().context == ("full" if context == "full" else window(2))
        plain, bounded = (collect(agent, episodes=9, num_envs=6, seed=3) for agent in agents)
        assert [[s.ids for s in e.segments] for e in plain] == [[s.ids for s in e.segments] for e in bounded]


def test_memory_that_a_gpu_has_free_bounds_the_table(monkeypatch):
    """Looked up when a table is made, not before and not again"""
    policy, asked = make_policy("lora"), []
    one = row_bytes(policy.causal_lm.config, torch.float32, 128)
    monkeypatch.setattr(llamagym.engine, "free_bytes", lambda device: asked.append(device) or 10 * one)
    engine = Engine(policy, {2}, GenerateConfig(max_new_tokens=4))
    assert not asked
    engine.sample([[1, 30 + i] for i in range(12)], [np.random.default_rng(i) for i in range(12)])
    layers = policy.causal_lm.config.num_hidden_layers
    assert asked == [policy.device] and len(engine.table.rows.rows) == int(0.8 * 10 * layers / (layers + 1)) - 1
    engine.drop()
    engine.sample([[1, 30]], [np.random.default_rng(0)])
    assert len(asked) == 2


def test_memory_of_a_dropped_table_is_free_at_once():
    """Without waiting for the collector of cycles; what a recorded step held is gone too, and so is the old table when it grows"""
    policy = make_policy("lora")
    engine = Engine(policy, {2}, GenerateConfig(max_new_tokens=40))
    engine.table.keep_up()
    reader = engine.table.reader = llamagym.decoder.GraphDecoder(policy.causal_lm, record=lambda step, pool: step)
    gc.collect()
    gc.disable()
    try:
        engine.sample([[1, 30 + i] for i in range(4)], [np.random.default_rng(i) for i in range(4)], keys=list(range(4)))
        assert reader.steps
        small = [weakref.ref(t) for t in engine.table.cache.tables()]
        engine.sample([[1, *range(30, 330)]], [np.random.default_rng(9)], keys=[0])
        assert not any(t() is not None for t in small)
        tables = [weakref.ref(t) for t in engine.table.cache.tables()]
        assert len(tables) == len(small) and all(t() is not None for t in tables)
        engine.drop()
        assert not any(t() is not None for t in tables) and engine.nbytes == 0
    finally:
        gc.enable()


def test_memory_bound_settles_while_conversations_grow(monkeypatch):
    """A GPU whose free memory is what the table leaves: conversations that grow are set aside once a growth, not again and again"""
    policy, drops = make_policy("lora"), []
    one = row_bytes(policy.causal_lm.config, torch.float32, 128)
    engine = Engine(policy, (), GenerateConfig(max_new_tokens=300))
    monkeypatch.setattr(llamagym.engine, "free_bytes", lambda device: 60 * one - engine.nbytes)
    real = engine.table.drop
    engine.table.drop = lambda most=10**9: (drops.append(most), real(most))[1]
    requests = [engine.submit([1, 30 + i], np.random.default_rng(i)) for i in range(40)]
    live = []
    while engine.busy:
        engine.step()
        live.append(engine.table.rows.live)
    assert all(len(r.sample.ids) == 300 for r in requests)
    sizes = {grown(n + 2) for n in range(2, 303)}
    assert len(drops) <= 2 * len(sizes) and drops == sorted(drops, reverse=True)
    layers = policy.causal_lm.config.num_hidden_layers
    assert max(live) == int(0.8 * 60 * layers / (layers + 1)) - 1 and min(drops) >= int(0.8 * 60 * 128 / max(sizes) * layers / (layers + 1)) - 1


def test_qlora_trains_adapters_and_critic_alone():
    """Embeddings and head stay in the type of the rest, tied where they were"""
    policy = make_policy("nf4")
    shake(policy.value_head.parameters(), 0.2)
    assert not any(p.requires_grad for name, p in policy.causal_lm.named_parameters() if "lora" not in name)
    ppo = PPO(policy, PPOConfig())
    trained = {id(p) for group in ppo.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in [*policy.parameters(), *policy.value_head.parameters()]}
    embeddings, head = policy.causal_lm.get_input_embeddings().weight, policy.causal_lm.get_output_embeddings().weight
    assert embeddings.dtype == policy.causal_lm.dtype and (head is embeddings) == policy.causal_lm.config.tie_word_embeddings


# float16


def test_qlora_gradients_in_half_precision_are_not_lost():
    """The update of a policy in float16 against the same one in float32: with scaled losses they go the same way; without, a gradient this small is gone"""
    found, kept = {}, []
    for dtype in ("float32", "float16"):
        for scaled in (True, False):
            policy = Policy.load("tiny", lora=LoRAConfig(r=8), dtype=dtype, device="cpu")
            shake(policy.parameters())
            agent = lake_agent(policy, max_steps=4, ppo__vf_coef=0.0, ppo__kl_coef=0.0, ppo__epochs=1, ppo__mini_batch_size=1000, ppo__max_grad_norm=1e9)
            learner = agent.learner
            if not scaled:
                learner.loss_scale.factor = 1.0
            if not kept:
                kept.append(rewarded(agent))
            episodes, = kept
            reference = learner.annotate(episodes)
            for turn in episodes.turns:
                turn.advantage, turn.returns = 1e-5 * turn.reward, 0.0
            learner.optimizer.step = lambda: None
            learner.optimizer.zero_grad = lambda set_to_none=True: None
            for p in policy.parameters():
                p.grad = None
            learner.update(Batch.from_episodes(episodes), reference)
            found[dtype, scaled] = torch.cat([p.grad.flatten().float() for p in policy.parameters()])
    exact = found["float32", True]
    assert torch.equal(exact, found["float32", False])  # nothing is scaled there

    def off(a):
        return ((a - exact).norm() / exact.norm()).item()

    assert off(found["float16", True]) < 0.1 and off(found["float16", False]) > 3 * off(found["float16", True])


def test_qlora_an_overflow_halves_the_scale_and_changes_nothing():
    """A scale that is far too large: the step is begun again until it fits, and the update is that of a scale that fits"""
    results = []
    for begin in (2.0**10, 2.0**40):
        policy = Policy.load("tiny", lora=LoRAConfig(r=8), dtype="float16", device="cpu")
        shake(policy.parameters())
        agent = lake_agent(policy, max_steps=4, ppo__epochs=1)
        agent.learner.loss_scale.most = agent.learner.loss_scale.factor = begin
        stats = agent.learner.learn(rewarded(agent))
        stats.pop("tokens_per_second")
        results.append((agent.learner.loss_scale.factor, stats, torch.cat([p.detach().flatten() for p in policy.parameters()])))
    (small, stats, weights), (large, again, theirs) = results
    assert small == 2.0**10 < large < 2.0**40
    assert again == pytest.approx(stats, rel=2e-2, abs=1e-3)
    assert (weights - theirs).norm() < 1e-2 * weights.norm()


def test_qlora_a_gradient_that_fits_no_scale_leaves_the_scale(tmp_path):
    """It is refused, and the next update begins where this one did; a checkpoint knows the scale"""
    policy = Policy.load("tiny", lora=LoRAConfig(r=8), dtype="float16", device="cpu")
    shake(policy.parameters())
    agent = lake_agent(policy, max_steps=3, ppo__epochs=1)
    learner, episodes = agent.learner, rewarded(agent)
    learner.loss_scale.factor, real = 2.0**12, learner.loss
    learner.loss = lambda *args: real(*args) + _Poison.apply(policy.parameters()[0]).sum()
    with pytest.raises(NonFiniteLoss, match="in the gradient of epoch 0"):
        learner.failure_dir = tmp_path / "failed"
        learner.learn(episodes)
    assert learner.loss_scale.factor == 2.0**12
    save_learner(learner, tmp_path)
    learner.loss_scale.factor = 1.0
    load_learner(learner, tmp_path)
    assert learner.loss_scale.factor == 2.0**12
    assert LossScale.of(Policy.load("tiny", dtype="float16", device="cpu")).factor == 1.0  # trained whole, in that type


class _Poison(torch.autograd.Function):
    """A gradient that is not a number"""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, torch.nan)
