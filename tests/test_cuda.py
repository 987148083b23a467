"""GPU results match the CPU's, with and without CUDA graphs (skipped without a GPU)."""

import copy

import pytest
import torch
from doubles import KINDS, lake_agent, make_policy
from test_cache import check_same_samples, make_conversations

import llamagym.inference.cuda_graphs
import llamagym.inference.model_runner
from llamagym.config import GenerateConfig
from llamagym.inference.backend import make_backend
from llamagym.inference.cuda_graphs import CudaGraphDecoder
from llamagym.inference.engine import Engine
from llamagym.models.policy import Policy
from llamagym.models.tiny import FAMILIES, tiny_model, tiny_tokenizer
from llamagym.rollout import collect

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def capture_early(monkeypatch):
    monkeypatch.setattr(llamagym.inference.cuda_graphs, "CAPTURE_AFTER_STEPS", 2)
    monkeypatch.setattr(llamagym.inference.cuda_graphs, "LENGTH_BUCKET", 32)


def sample_conversations(policy: Policy, count: int = 5, use_cache: bool = True) -> list:
    """Return greedily sampled conversations, with a KV cache or a new engine per prompt"""
    conversations, settings = (
        make_conversations(count, policy.causal_lm.config.vocab_size),
        GenerateConfig(max_new_tokens=12),
    )
    engine = Engine(policy, {2}, settings)
    for _ in range(4):
        if not use_cache:
            engine = Engine(policy, {2}, settings)
        samples = engine.sample(
            [t.next_prompt() for t in conversations],
            [None] * count,
            greedy=True,
            conversation_ids=conversations if use_cache else None,
        )
        for conversation, sample in zip(conversations, samples):
            conversation.add_response(sample)
    return conversations


@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_rollouts_match_the_cpu(family, capture_early):
    """Float32 samples with cache and CUDA graphs equal those of the CPU without cache"""
    policy = Policy(tiny_model(family), tiny_tokenizer())
    expected = sample_conversations(policy, use_cache=False)
    for on_gpu, on_cpu in zip(sample_conversations(policy.to("cuda")), expected):
        check_same_samples(on_gpu, on_cpu)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_graph_logprobs_match_eager_and_learner(kind, dtype, capture_early, monkeypatch):
    """Log-probabilities equal those without CUDA graphs and the learner's"""
    policy = make_policy(kind, device="cuda", dtype=dtype)
    agent = lake_agent(policy, generate__max_new_tokens=12)
    backends = []
    monkeypatch.setattr(
        llamagym.inference.model_runner,
        "make_backend",
        lambda model: backends.append(make_backend(model)) or backends[-1],
    )
    episodes = collect(agent, episodes=24, num_envs=10, seed=3)
    assert (
        type(backends[-1]) is CudaGraphDecoder
        and max(backends[-1].num_steps.values()) > 2
        and backends[-1].capture
    )
    gap = agent.learner.update(copy.deepcopy(episodes))["max_logprob_diff"]
    assert gap < (1e-4 if dtype == "float32" else 0.3)
    if dtype == "float32":
        monkeypatch.setattr(llamagym.inference.cuda_graphs, "CAPTURE_AFTER_STEPS", 10**9)
        agent = lake_agent(
            make_policy(kind, device="cuda", dtype=dtype), generate__max_new_tokens=12
        )
        for a, b in zip(episodes, collect(agent, episodes=24, num_envs=10, seed=3)):
            assert [t.response_ids for t in a.turns] == [t.response_ids for t in b.turns]


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_cuda_update_matches_the_cpu(kind):
    """One update on the same episodes gives the same metrics and weights"""
    policies = [make_policy(kind, device=device, dtype="float32") for device in ("cpu", "cuda")]
    # Adam amplifies rounding differences of small gradients
    agents = [lake_agent(policy, ppo__epochs=1, ppo__mini_batch_size=1000) for policy in policies]
    episodes, before = (
        collect(agents[0], episodes=6, num_envs=3),
        [p.detach().clone() for p in policies[0].parameters()],
    )
    cpu, gpu = (agent.learner.update(copy.deepcopy(episodes)) for agent in agents)
    for name in ("policy_loss", "value_loss", "entropy", "ref_kl", "max_logprob_diff"):
        assert gpu[name] == pytest.approx(cpu[name], rel=1e-3, abs=1e-4), name
    changes = [
        torch.cat([(p.detach().cpu() - q).flatten() for p, q in zip(policy.parameters(), before)])
        for policy in policies
    ]
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_cuda_checkpoint_round_trip(kind, tmp_path):
    policy = make_policy(kind, device="cuda", dtype="float32")
    policy.set_reference()
    policy.save(tmp_path / "saved")
    ids = torch.arange(3, 40, device="cuda")[None]
    with torch.no_grad():
        for device in ("cuda", "cpu"):
            loaded = Policy.load(tmp_path / "saved", device=device)
            assert (
                policy.backbone(ids).cpu() - loaded.backbone(ids.to(device)).cpu()
            ).abs().max() < (1e-6 if device == "cuda" else 1e-3)
