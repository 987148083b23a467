"""On a GPU: the same numbers as on the CPU, recorded steps or not. Skipped where there is none."""

import copy

import pytest
import torch
from doubles import KINDS, lake_agent, make_policy
from test_cache import same, talks

import llamagym.decoder
import llamagym.engine
from llamagym.config import GenerateConfig
from llamagym.decoder import GraphDecoder, reader_of
from llamagym.engine import Engine
from llamagym.policy import Policy
from llamagym.rollout import collect
from llamagym.tiny import FAMILIES, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def record(monkeypatch):
    monkeypatch.setattr(llamagym.decoder, "RECORD_AFTER", 2)
    monkeypatch.setattr(llamagym.decoder, "RECORD_LENGTH", 32)


def played(policy: Policy, count: int = 5, kept: bool = True) -> list:
    """Greedy conversations side by side, whose keys and values are kept, or each prompt read by an engine of its own"""
    conversations, settings = talks(count, policy.causal_lm.config.vocab_size), GenerateConfig(max_new_tokens=12)
    engine = Engine(policy, {2}, settings)
    for _ in range(4):
        if not kept:
            engine = Engine(policy, {2}, settings)
        samples = engine.sample([t.ask() for t in conversations], [None] * count, greedy=True, keys=conversations if kept else None)
        for talk, sample in zip(conversations, samples):
            talk.answer(sample)
    return conversations


@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_rollouts_are_those_of_the_cpu(family, record):
    """Float32, each architecture: kept and recorded on the GPU against read again on the CPU"""
    policy = Policy(tiny_model(family), tiny_tokenizer())
    here = played(policy, kept=False)
    for there, again in zip(played(policy.to("cuda")), here):
        same(there, again)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_recorded_steps_say_what_the_others_say(kind, dtype, record, monkeypatch):
    """... and what the learner says of them, adapters and 4-bit weights included"""
    policy = make_policy(kind, device="cuda", dtype=dtype)
    agent = lake_agent(policy, generate__max_new_tokens=12)
    readers = []
    monkeypatch.setattr(llamagym.engine, "reader_of", lambda model: readers.append(reader_of(model)) or readers[-1])
    recorded = collect(agent, episodes=24, num_envs=10, seed=3)
    assert type(readers[-1]) is GraphDecoder and max(readers[-1].seen.values()) > 2 and readers[-1].record
    gap = agent.learner.learn(copy.deepcopy(recorded))["logprob_gap"]
    assert gap < (1e-4 if dtype == "float32" else 0.3)
    if dtype == "float32":
        monkeypatch.setattr(llamagym.decoder, "RECORD_AFTER", 10**9)
        agent = lake_agent(make_policy(kind, device="cuda", dtype=dtype), generate__max_new_tokens=12)
        for a, b in zip(recorded, collect(agent, episodes=24, num_envs=10, seed=3)):
            assert [t.response_ids for t in a.turns] == [t.response_ids for t in b.turns]


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_cuda_learns_what_the_cpu_learns(kind):
    """One update of the same episodes: what it logs, and where it takes the weights"""
    policies = [make_policy(kind, device=device, dtype="float32") for device in ("cpu", "cuda")]
    agents = [lake_agent(policy, ppo__epochs=1, ppo__mini_batch_size=1000) for policy in policies]  # Adam makes much of how small gradients are rounded
    episodes, before = collect(agents[0], episodes=6, num_envs=3), [p.detach().clone() for p in policies[0].parameters()]
    here, there = (agent.learner.learn(copy.deepcopy(episodes)) for agent in agents)
    for name in ("policy_loss", "value_loss", "entropy", "ref_kl", "logprob_gap"):
        assert there[name] == pytest.approx(here[name], rel=1e-3, abs=1e-4), name
    moved = [torch.cat([(p.detach().cpu() - q).flatten() for p, q in zip(policy.parameters(), before)]) for policy in policies]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_cuda_saves_and_loads(kind, tmp_path):
    policy = make_policy(kind, device="cuda", dtype="float32")
    policy.set_reference()
    policy.save(tmp_path / "saved")
    ids = torch.arange(3, 40, device="cuda")[None]
    with torch.no_grad():
        for device in ("cuda", "cpu"):
            again = Policy.load(tmp_path / "saved", device=device)
            assert (policy.trunk(ids).cpu() - again.trunk(ids.to(device)).cpu()).abs().max() < (1e-6 if device == "cuda" else 1e-3)
