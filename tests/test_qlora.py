"""Memory savings keep results unchanged

They are the 8-bit optimizer, offloaded activations, a bounded KV cache, chunked logits and float16.
"""

import gc
import weakref

import numpy as np
import pytest
import torch
from doubles import lake_agent, make_policy, perturb
from transformers import AutoModelForCausalLM, MambaConfig

import llamagym.algorithms.forward
import llamagym.algorithms.hidden_states
import llamagym.inference.candidates
import llamagym.inference.cuda_graphs
import llamagym.inference.fused_llama
import llamagym.inference.model_runner
import llamagym.inference.sampling
from llamagym.algorithms.batch import Batch
from llamagym.algorithms.forward import compute_loss_terms, compute_values_and_ref_logprobs
from llamagym.algorithms.hidden_states import (
    OffloadActivations,
    gradient_checkpointing,
    maybe_offload,
)
from llamagym.algorithms.optimization import (
    LossScaler,
    NonFiniteLoss,
    make_optimizer,
    optimizer_kind,
)
from llamagym.chat.conversation import Window
from llamagym.config import GenerateConfig, LoRAConfig, PPOConfig
from llamagym.inference.engine import Engine
from llamagym.inference.kv_cache import OutOfMemory, kv_bytes_per_sequence, round_up_capacity
from llamagym.models.loading import load_base
from llamagym.models.policy import Policy
from llamagym.models.reference import add_lora
from llamagym.models.tiny import tiny_config, tiny_model, tiny_tokenizer
from llamagym.ppo import PPO, PPOLoss
from llamagym.rollout import collect
from llamagym.training.checkpoints import load_learner, save_learner
from llamagym.training.memory_model import ForwardMemoryModel, optimizer_bytes
from llamagym.training.memory_tracking import MemoryTracker
from llamagym.training.planner import plan

pytestmark = pytest.mark.filterwarnings(
    "ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing"
)
bitsandbytes = pytest.importorskip("bitsandbytes")


def collect_with_random_rewards(agent, episodes=6, **options):
    """Collect episodes with a random reward for every turn"""
    collected, rng = (
        collect(agent, episodes=episodes, num_envs=4, **options),
        np.random.default_rng(0),
    )
    for turn in collected.turns:
        turn.reward = float(rng.normal())
    return collected


# 8-bit optimizer


def test_qlora_8bit_optimizer_approximates_the_32bit_one():
    """The same twenty gradients give nearly the same change, with a quarter of the memory"""
    changes = {}
    for kind in ("adamw", "adamw_8bit"):
        policy, generator = make_policy("lora"), torch.Generator().manual_seed(0)
        initial = [p.detach().clone() for p in policy.parameters()]
        optimizer = make_optimizer(policy, PPOConfig(learning_rate=1e-3, optimizer=kind))
        for _ in range(20):
            for p, start in zip(policy.parameters(), initial):
                p.grad = start.sign() + torch.randn(p.shape, generator=generator)
            optimizer.step()
        changes[kind] = torch.cat(
            [(p.detach() - b).flatten() for p, b in zip(policy.parameters(), initial)]
        )
        moments = [
            t
            for p in policy.parameters()
            for name, t in optimizer.state[p].items()
            if torch.is_tensor(t) and t.dim() and "qmap" not in name
        ]
        assert sum(t.nbytes for t in moments) == optimizer_bytes(
            [p.numel() for p in policy.parameters()], kind
        )
    full, low_bit = changes["adamw"], changes["adamw_8bit"]
    assert (
        torch.nn.functional.cosine_similarity(full, low_bit, dim=0) > 0.99
        and 0.9 < low_bit.norm() / full.norm() < 1.1
    )
    assert not torch.equal(full, low_bit)


def test_qlora_optimizer_depends_on_weights_and_device(monkeypatch):
    nf4, lora = make_policy("nf4"), make_policy("lora")
    # On a CPU, the default does not save memory.
    assert [optimizer_kind(p, PPOConfig()) for p in (nf4, lora)] == ["adamw", "adamw"]
    monkeypatch.setattr(Policy, "device", torch.device("cuda"))
    assert [optimizer_kind(p, PPOConfig()) for p in (nf4, lora)] == ["adamw_8bit", "adamw"]
    assert optimizer_kind(nf4, PPOConfig(optimizer="adamw")) == "adamw"
    assert isinstance(make_optimizer(nf4, PPOConfig()), bitsandbytes.optim.PagedAdamW8bit)


def test_qlora_8bit_moments_are_saved_restored_and_rolled_back(tmp_path):
    """A restored learner makes the same update bit for bit; an interrupted update is rolled back"""
    large_rank = LoRAConfig(r=64)  # small matrices keep moments in 32 bits
    agents = [
        lake_agent(
            make_policy("nf4", lora=large_rank),
            max_steps=3,
            ppo__optimizer="adamw_8bit",
            ppo__learning_rate=1e-3,
        )
        for _ in range(2)
    ]
    first, second = agents
    first.learner.update(collect_with_random_rewards(first))
    first.policy.save(tmp_path / "policy")
    save_learner(first.learner, tmp_path)
    second.policy.restore(tmp_path / "policy")
    load_learner(second.learner, tmp_path)
    episodes = collect_with_random_rewards(first, seed=1)

    def state(agent):
        optimizer_state = agent.learner.optimizer.state
        return [
            (name, value)
            for p in agent.policy.parameters()
            for name, value in sorted(optimizer_state[p].items())
        ]

    def equal_states(a, b):
        return len(a) == len(b) and all(
            n == m and (torch.equal(x, y) if torch.is_tensor(x) else x == y)
            for (n, x), (m, y) in zip(a, b)
        )

    assert equal_states(state(first), state(second)) and any(
        torch.is_tensor(v) and v.dtype == torch.uint8 for _, v in state(first)
    )
    before = [(n, v.clone() if torch.is_tensor(v) else v) for n, v in state(second)]
    weights, original_step = (
        [p.detach().clone() for p in second.policy.parameters()],
        second.learner.optimizer.step,
    )

    def step_and_interrupt():
        original_step()
        raise KeyboardInterrupt

    second.learner.optimizer.step = step_and_interrupt
    with pytest.raises(KeyboardInterrupt):
        second.learner.update(episodes)
    del second.learner.optimizer.step
    assert equal_states(before, state(second)) and all(
        torch.equal(a, b) for a, b in zip(weights, second.policy.parameters())
    )
    for agent in agents:
        agent.learner.update(episodes)
    assert equal_states(state(first), state(second)) and not equal_states(before, state(first))
    assert all(
        torch.equal(a, b) for a, b in zip(first.policy.parameters(), second.policy.parameters())
    )


def test_qlora_moments_of_another_optimizer_are_rejected(tmp_path):
    agent, other = (
        lake_agent(make_policy("lora"), max_steps=3, ppo__optimizer=kind)
        for kind in ("adamw_8bit", "adamw")
    )
    agent.learner.update(collect_with_random_rewards(agent))
    save_learner(agent.learner, tmp_path)
    with pytest.raises(
        ValueError,
        match="moments of adamw_8bit, this learner has those of adamw; set ppo.optimizer='adamw_8bit' to go on",
    ):
        load_learner(other.learner, tmp_path)


# Offloaded activations


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "kind, family",
    [
        ("plain", "llama"),
        ("lora", "llama"),
        ("nf4", "qwen3"),
        ("lora", "gemma2"),
        ("lora", "mistral"),
        ("lora", "phi3"),
    ],
)
def test_qlora_offloaded_activations_change_nothing(kind, family, checkpointing, monkeypatch):
    """The gradients are equal bit for bit, and weights are not offloaded"""
    monkeypatch.setattr(llamagym.algorithms.hidden_states, "MIN_OFFLOAD_BYTES", 0)
    policy, gradients, offloaded = make_policy(kind, f"tiny:{family}"), [], []
    original_send = OffloadActivations.send
    monkeypatch.setattr(
        OffloadActivations, "send", lambda self, t: (offloaded.append(t), original_send(self, t))[1]
    )
    ids = torch.randint(20, 300, (3, 80), generator=torch.Generator().manual_seed(0))
    for offload in (False, True):
        for p in policy.parameters():
            p.grad = None
        with gradient_checkpointing(policy, checkpointing, offload=offload):
            with maybe_offload(policy, offload):
                hidden = policy.backbone(ids)
            hidden.square().sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) and all(
        torch.equal(a, b) for a, b in zip(*gradients)
    )
    weights = {
        t.untyped_storage().data_ptr()
        for t in [*policy.model.parameters(), *policy.model.buffers()]
    }
    assert offloaded and not any(t.untyped_storage().data_ptr() in weights for t in offloaded)


def test_qlora_updates_with_memory_savings_equal_the_plain_update():
    """The same episodes give the same metrics and weights"""
    results = []
    for options in (
        {},
        dict(ppo__gradient_checkpointing=True, ppo__offload_activations=True),
        dict(ppo__offload_activations=True, ppo__token_budget=300),
    ):
        agent = lake_agent(make_policy("lora"), max_steps=4, **options)
        stats = agent.learner.update(collect_with_random_rewards(agent))
        stats.pop("tokens_per_second")
        results.append((stats, [p.detach() for p in agent.policy.parameters()]))
    for stats, weights in results[1:]:
        assert stats == pytest.approx(results[0][0], rel=1e-3, abs=1e-5)
        for a, b in zip(weights, results[0][1]):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_qlora_plan_counts_offloaded_activations():
    """Offloading moves bytes from GPU to host; with checkpointing, few are left to offload"""
    config = tiny_config("qwen2", hidden_size=256, num_hidden_layers=8)
    model = ForwardMemoryModel(config, torch.bfloat16, LoRAConfig())
    plain, offloaded, recomputed, both = (
        model.forward(2, 1000, True, *settings)
        for settings in ((False, False), (False, True), (True, False), (True, True))
    )
    assert (
        offloaded.kept < 0.1 * plain.kept
        and both.kept < 0.5 * recomputed.kept
        and offloaded.peak < 0.4 * plain.peak
        and both.peak < recomputed.peak < 0.5 * plain.peak
    )
    assert (
        (plain.host, recomputed.host) == (0, 0)
        and both.host < 0.2 * offloaded.host
        and offloaded.host < 1.05 * plain.kept
    )
    memory_plan = plan(tiny_config("qwen2"), "2GB", ppo__offload_activations=True)
    assert "on the host" in str(memory_plan) and "on the host" not in str(
        memory_plan.with_options({"ppo.offload_activations": False})
    )


def test_qlora_expanded_tensor_is_offloaded_once(monkeypatch):
    """Its storage is offloaded, not its expanded shape"""
    monkeypatch.setattr(llamagym.algorithms.hidden_states, "MIN_OFFLOAD_BYTES", 0)
    a, b = torch.randn(3, 1, 5).requires_grad_(), torch.randn(3, 4, 5).requires_grad_()
    offloaded_bytes, gradients = [], []
    for offload in (False, True):
        a.grad = b.grad = None
        context = OffloadActivations(torch.nn.Identity())
        context.send = lambda t, context=context: (
            offloaded_bytes.append(t.nbytes),
            OffloadActivations.send(context, t),
        )[1]
        expanded = a.detach().expand(3, 4, 5)
        if offload:
            with context:
                loss = (b * expanded).sum()
        else:
            loss = (b * expanded).sum()
        loss.backward()
        gradients.append(b.grad.clone())
    assert torch.equal(*gradients) and sum(offloaded_bytes) == 4 * 15


def test_qlora_checkpointing_keeps_importance_weights():
    """Rows may share a prefix, whose KV cache is not available in checkpointed layers"""
    results = []
    for save_memory in (False, True):
        agent = lake_agent(
            make_policy("lora"),
            max_steps=3,
            ppo__tis_cap=2.0,
            ppo__gradient_checkpointing=save_memory,
            ppo__offload_activations=save_memory,
        )
        stats = agent.learner.update(collect_with_random_rewards(agent))
        stats.pop("tokens_per_second")
        results.append(stats)
    assert results[0]["max_logprob_diff"] < 1e-4 and results[1] == pytest.approx(
        results[0], rel=1e-3, abs=1e-5
    )


# Chunked logits


def test_memory_of_an_update_is_below_the_size_of_all_logits(monkeypatch):
    """The vocabulary has 20,000 tokens, and over 1,000 tokens are sampled"""
    for name in ("LOGIT_CHUNK", "MAX_CACHED_LOGITS"):
        monkeypatch.setattr(llamagym.algorithms.forward, name, 2**20)
    policy = Policy(
        add_lora(tiny_model("qwen2", vocab_size=20_000).requires_grad_(False), LoRAConfig(r=4)),
        tiny_tokenizer(),
    )
    agent = lake_agent(policy, max_steps=16, generate__max_new_tokens=32)
    episodes = collect(agent, episodes=8, num_envs=8)
    with MemoryTracker() as tracker:
        reference = compute_values_and_ref_logprobs(agent.policy, episodes, token_budget=512)
        for turn in episodes.turns:
            turn.advantage, turn.returns = 1.0, 0.0
        batch = Batch.from_episodes(episodes)
        for micro in batch.micro_batches(512):
            micro_reference = reference.select(
                micro.token_index, micro.turn_index, micro.candidate_index
            )
            compute_loss_terms(
                agent.policy, micro, micro_reference, PPOConfig(), 1.0
            ).surrogate.sum().backward()
    assert batch.num_tokens > 1000 and 2**20 < tracker.peak < 4 * batch.num_tokens * 20_000 / 2


# KV cache limits


def sample_conversations(engine: Engine, count: int = 9, turns: int = 4, candidates=None) -> list:
    """Return the samples of conversations of several turns, and the peak bytes of the KV cache"""
    prompts = [[1, *range(30, 40 + i)] for i in range(count)]
    samples, peak_bytes = [[] for _ in prompts], 0
    for turn in range(turns):
        requests = [
            engine.submit(
                p, np.random.default_rng([i, turn]), conversation_id=i, candidates=candidates
            )
            for i, p in enumerate(prompts)
        ]
        while engine.busy:
            engine.step()
            peak_bytes = max(peak_bytes, engine.nbytes)
        for i, request in enumerate(requests):
            samples[i].append(request.sample)
            prompts[i] = prompts[i] + request.sample.ids + [60 + turn, 61, 62]
    return samples, peak_bytes


def assert_same_samples(one, other) -> None:
    for a, b in zip(one, other):
        for x, y in zip(a, b):
            assert x.ids == y.ids and x.stopped == y.stopped
            assert np.abs(x.logprobs - y.logprobs).max() < 1e-4


CANDIDATES = [[70, 71, 2], [70, 72, 73, 2], [75, 2]]


@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["free", "scored"])
@pytest.mark.parametrize("num_slots", [1, 3, 5])
def test_memory_limit_of_the_cache_changes_nothing(num_slots, candidates, cloned_policy):
    """With fewer slots than conversations, the responses are the same, within the memory limit"""
    policy, config = cloned_policy("lora"), GenerateConfig(max_new_tokens=24)
    model = policy.causal_lm
    plain, unlimited_peak = sample_conversations(Engine(policy, {2}, config), candidates=candidates)
    limit = (num_slots + 1) * kv_bytes_per_sequence(model.config, torch.float32, 128) * 3 // 2
    engine = Engine(policy, {2}, config, cache_bytes=limit)
    limited, limited_peak = sample_conversations(engine, candidates=candidates)
    assert_same_samples(plain, limited)
    assert (
        limited_peak
        <= max(
            limit, 2 * kv_bytes_per_sequence(model.config, torch.float32, round_up_capacity(130))
        )
        and limited_peak < unlimited_peak
        and not engine.busy
    )


@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["free", "scored"])
@pytest.mark.parametrize("method", ["forward", "sample_tokens"])
def test_memory_out_of_memory_while_sampling_changes_nothing(
    method, candidates, cloned_policy, monkeypatch, caplog
):
    """The engine continues with fewer concurrent conversations and samples the same responses"""
    policy, config = cloned_policy("lora"), GenerateConfig(max_new_tokens=12)
    plain, _ = sample_conversations(Engine(policy, {2}, config), candidates=candidates)
    owners = [llamagym.inference.sampling, llamagym.inference.candidates]
    if method == "forward":
        owners = [llamagym.inference.model_runner.BatchRunner]
    original = getattr(owners[0], method)

    def fail_for_large_batches(*args, **kwargs):
        result = original(*args, **kwargs)
        if len(args[method == "forward"]) > 2:
            raise torch.OutOfMemoryError("no room")
        return result

    for owner in owners:
        monkeypatch.setattr(owner, method, fail_for_large_batches)
    engine = Engine(policy, {2}, config)
    assert_same_samples(plain, sample_conversations(engine, candidates=candidates)[0])
    assert engine.scheduler.max_active == 2
    assert "instead of 9 concurrent sequences" in caplog.text


def test_memory_out_of_memory_without_a_cache_changes_nothing(monkeypatch):
    torch.manual_seed(0)
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(
            vocab_size=len(tiny_tokenizer()),
            hidden_size=16,
            num_hidden_layers=1,
            pad_token_id=0,
            eos_token_id=2,
        )
    )
    policy = Policy(mamba, tiny_tokenizer())
    arguments = [[1, 30, 31 + i] for i in range(5)], [np.random.default_rng(i) for i in range(5)]
    plain = Engine(policy, {2}, GenerateConfig(max_new_tokens=6)).sample(*arguments)
    original = llamagym.inference.sampling.sample_tokens

    def fail_for_large_batches(logits, *args):
        if len(logits) > 2:
            raise torch.OutOfMemoryError("no room")
        return original(logits, *args)

    monkeypatch.setattr(llamagym.inference.sampling, "sample_tokens", fail_for_large_batches)
    limited = Engine(policy, {2}, GenerateConfig(max_new_tokens=6)).sample(
        arguments[0], [np.random.default_rng(i) for i in range(5)]
    )
    assert_same_samples([plain], [limited])


def test_memory_too_small_for_one_conversation_raises(monkeypatch):
    policy = make_policy("lora")
    engine = Engine(policy, {2}, GenerateConfig(max_new_tokens=4))

    def raise_out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(llamagym.inference.model_runner.BatchRunner, "forward", raise_out_of_memory)
        with pytest.raises(
            OutOfMemory,
            match="not even one conversation fits into memory .no room.. Quantize the model",
        ):
            engine.sample([[1, 30], [1, 31]], [np.random.default_rng(i) for i in range(2)])
    assert not engine.busy and engine.nbytes == 0
    assert len(engine.sample([[1, 30]], [np.random.default_rng(0)])) == 1


def test_memory_limit_of_rollouts_changes_no_episode(cloned_policy):
    """`rollout.kv_cache_gb` changes no episode, also with a context window"""
    for context in ("full", 2):
        agents = [
            lake_agent(cloned_policy("lora"), max_steps=6, context__turns=context, **options)
            for options in ({}, dict(rollout__kv_cache_gb=1e-6))
        ]
        assert agents[1].conversation().context == ("full" if context == "full" else Window(2))
        plain, limited = (collect(agent, episodes=9, num_envs=6, seed=3) for agent in agents)
        assert [[s.ids for s in e.segments] for e in plain] == [
            [s.ids for s in e.segments] for e in limited
        ]


def test_memory_limit_of_the_cache_is_the_free_gpu_memory(monkeypatch):
    """Free memory is read whenever the cache is allocated, and only then"""
    policy, queries = make_policy("lora"), []
    sequence_bytes = kv_bytes_per_sequence(policy.causal_lm.config, torch.float32, 128)
    monkeypatch.setattr(
        llamagym.inference.model_runner,
        "free_gpu_bytes",
        lambda device: queries.append(device) or 10 * sequence_bytes,
    )
    engine = Engine(policy, {2}, GenerateConfig(max_new_tokens=4))
    assert not queries
    engine.sample([[1, 30 + i] for i in range(12)], [np.random.default_rng(i) for i in range(12)])
    layers = policy.causal_lm.config.num_hidden_layers
    assert (
        queries == [policy.device]
        and len(engine.scheduler.slots.sequences) == int(0.8 * 10 * layers / (layers + 1)) - 1
    )
    engine.evict()
    engine.sample([[1, 30]], [np.random.default_rng(0)])
    assert len(queries) == 2


def test_memory_of_an_evicted_cache_is_freed_at_once():
    """Captured steps and grown caches hold no old tensors, so no garbage collection is needed"""
    policy = make_policy("lora")
    engine = Engine(policy, {2}, GenerateConfig(max_new_tokens=40))
    engine.runner.load_backend()
    backend = engine.runner.backend = llamagym.inference.cuda_graphs.CudaGraphDecoder(
        policy.causal_lm, capture=lambda step, pool: step
    )
    gc.collect()
    gc.disable()
    try:
        engine.sample(
            [[1, 30 + i] for i in range(4)],
            [np.random.default_rng(i) for i in range(4)],
            conversation_ids=list(range(4)),
        )
        assert backend.steps
        old_tensors = [weakref.ref(t) for t in engine.runner.cache.kv_tensors()]
        engine.sample([[1, *range(30, 330)]], [np.random.default_rng(9)], conversation_ids=[0])
        assert not any(t() is not None for t in old_tensors)
        new_tensors = [weakref.ref(t) for t in engine.runner.cache.kv_tensors()]
        assert len(new_tensors) == len(old_tensors) and all(t() is not None for t in new_tensors)
        engine.evict()
        assert not any(t() is not None for t in new_tensors) and engine.nbytes == 0
    finally:
        gc.enable()


def test_memory_limit_preempts_once_per_growth_of_the_cache(monkeypatch):
    """Growing conversations are preempted once per growth of the cache"""
    policy, evictions = make_policy("lora"), []
    sequence_bytes = kv_bytes_per_sequence(policy.causal_lm.config, torch.float32, 128)
    engine = Engine(policy, (), GenerateConfig(max_new_tokens=300))
    monkeypatch.setattr(
        llamagym.inference.model_runner,
        "free_gpu_bytes",
        lambda device: 60 * sequence_bytes - engine.nbytes,
    )
    original_evict = engine.core.evict
    engine.core.evict = lambda max_active: (
        evictions.append(max_active),
        original_evict(max_active),
    )[1]
    requests = [engine.submit([1, 30 + i], np.random.default_rng(i)) for i in range(40)]
    num_active = []
    while engine.busy:
        engine.step()
        num_active.append(engine.scheduler.slots.num_active)
    assert all(len(r.sample.ids) == 300 for r in requests)
    sizes = {round_up_capacity(n + 2) for n in range(2, 303)}
    assert len(evictions) <= 2 * len(sizes) and evictions == sorted(evictions, reverse=True)
    layers = policy.causal_lm.config.num_hidden_layers
    assert (
        max(num_active) == int(0.8 * 60 * layers / (layers + 1)) - 1
        and min(evictions) >= int(0.8 * 60 * 128 / max(sizes) * layers / (layers + 1)) - 1
    )


def test_qlora_trains_only_adapters_and_critic():
    """Embeddings and head keep their dtype and stay tied"""
    policy = make_policy("nf4")
    perturb(policy.value_head.parameters(), 0.2)
    assert not any(
        p.requires_grad for name, p in policy.causal_lm.named_parameters() if "lora" not in name
    )
    ppo = PPO(policy, PPOConfig())
    trained = {id(p) for group in ppo.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in [*policy.parameters(), *policy.value_head.parameters()]}
    embeddings, head = (
        policy.causal_lm.get_input_embeddings().weight,
        policy.causal_lm.get_output_embeddings().weight,
    )
    assert (
        embeddings.dtype == policy.causal_lm.dtype
        and (head is embeddings) == policy.causal_lm.config.tie_word_embeddings
    )


# float16


def test_qlora_loss_scaling_keeps_small_float16_gradients():
    """With loss scaling, a float16 gradient matches float32; without, small gradients vanish"""
    gradients, rollouts = {}, []
    for dtype in ("float32", "float16"):
        for scaled in (True, False):
            policy = Policy.load("tiny", lora=LoRAConfig(r=8), dtype=dtype, device="cpu")
            perturb(policy.parameters())
            agent = lake_agent(
                policy,
                max_steps=4,
                ppo__vf_coef=0.0,
                ppo__kl_coef=0.0,
                ppo__epochs=1,
                ppo__mini_batch_size=1000,
                ppo__max_grad_norm=1e9,
            )
            learner = agent.learner
            if not scaled:
                learner.loss_scaler.scale = 1.0
            if not rollouts:
                rollouts.append(collect_with_random_rewards(agent))
            (episodes,) = rollouts
            reference = learner.compute_values_and_ref_logprobs(episodes)
            for turn in episodes.turns:
                turn.advantage, turn.returns = 1e-5 * turn.reward, 0.0
            learner.optimizer.step = lambda: None
            learner.optimizer.zero_grad = lambda set_to_none=True: None
            for p in policy.parameters():
                p.grad = None
            learner.train_on_batch(Batch.from_episodes(episodes), reference)
            gradients[dtype, scaled] = torch.cat(
                [p.grad.flatten().float() for p in policy.parameters()]
            )
    expected = gradients["float32", True]
    assert torch.equal(expected, gradients["float32", False])  # float32 is not scaled

    def relative_error(a):
        return ((a - expected).norm() / expected.norm()).item()

    assert relative_error(gradients["float16", True]) < 0.1 and relative_error(
        gradients["float16", False]
    ) > 3 * relative_error(gradients["float16", True])


def test_qlora_overflow_halves_the_scale_and_changes_nothing():
    """With a scale that is far too large, the step is repeated until it is finite"""
    results = []
    for initial_scale in (2.0**10, 2.0**40):
        policy = Policy.load("tiny", lora=LoRAConfig(r=8), dtype="float16", device="cpu")
        perturb(policy.parameters())
        agent = lake_agent(policy, max_steps=4, ppo__epochs=1)
        agent.learner.loss_scaler.max_scale = agent.learner.loss_scaler.scale = initial_scale
        stats = agent.learner.update(collect_with_random_rewards(agent))
        stats.pop("tokens_per_second")
        results.append(
            (
                agent.learner.loss_scaler.scale,
                stats,
                torch.cat([p.detach().flatten() for p in policy.parameters()]),
            )
        )
    (small_scale, stats, weights), (large_scale, large_stats, large_weights) = results
    assert small_scale == 2.0**10 < large_scale < 2.0**40
    assert large_stats == pytest.approx(stats, rel=2e-2, abs=1e-3)
    assert (weights - large_weights).norm() < 1e-2 * weights.norm()


def test_qlora_non_finite_gradient_does_not_change_the_scale(tmp_path, monkeypatch):
    """The update is rejected and rolled back; a checkpoint saves the scale"""
    policy = Policy.load("tiny", lora=LoRAConfig(r=8), dtype="float16", device="cpu")
    perturb(policy.parameters())
    agent = lake_agent(policy, max_steps=3, ppo__epochs=1)
    learner, episodes = agent.learner, collect_with_random_rewards(agent)
    learner.loss_scaler.scale, original_loss = 2.0**12, PPOLoss.micro_batch_loss
    monkeypatch.setattr(
        PPOLoss,
        "micro_batch_loss",
        lambda *args: original_loss(*args) + _NaNGradient.apply(policy.parameters()[0]).sum(),
    )
    with pytest.raises(NonFiniteLoss, match="in the gradient of epoch 0"):
        learner.failure_dir = tmp_path / "failed"
        learner.update(episodes)
    assert learner.loss_scaler.scale == 2.0**12
    save_learner(learner, tmp_path)
    learner.loss_scaler.scale = 1.0
    load_learner(learner, tmp_path)
    assert learner.loss_scaler.scale == 2.0**12
    # The loss is not scaled if all float16 weights are trained.
    assert LossScaler.for_policy(Policy.load("tiny", dtype="float16", device="cpu")).scale == 1.0


class _NaNGradient(torch.autograd.Function):
    """A function whose gradient is NaN"""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, torch.nan)


def test_4_bit_weights_that_a_forward_pass_has_packed_are_unpacked():
    pytest.importorskip("bitsandbytes")
    model, tokenizer = load_base("tiny:llama", quantize="nf4", device="cpu")
    ids = torch.tensor([[1, 20, 30, 40]])
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            assert module.out_features % 32 == 0  # bitsandbytes packs no others
    with torch.no_grad():
        model(ids)  # in bfloat16, if the CPU has such instructions
        Policy(model, tokenizer)
        computed = model(ids).logits
    with_gradient = model(inputs_embeds=model.get_input_embeddings()(ids).requires_grad_()).logits
    torch.testing.assert_close(computed, with_gradient, rtol=0, atol=1e-6)
