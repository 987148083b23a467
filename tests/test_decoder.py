"""FusedDecoder matches transformers' logits, with and without the KV cache."""

import numpy as np
import pytest
import torch
from doubles import KINDS, lake_agent, make_policy, perturb, windows
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import llamagym.inference.backend
import llamagym.inference.cuda_graphs
import llamagym.inference.fused_llama
import llamagym.inference.model_runner
from llamagym.config import GenerateConfig
from llamagym.inference.backend import ModuleBackend, make_backend
from llamagym.inference.cuda_graphs import CudaGraphDecoder
from llamagym.inference.engine import Engine
from llamagym.inference.fused_llama import DecodeAttention, FusedDecoder, FusedLinear, split_length
from llamagym.inference.kv_cache import SlotKVCache
from llamagym.models.policy import Policy
from llamagym.models.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokenizer
from llamagym.rollout import collect

FUSED_FAMILIES = [
    family
    for family in FAMILIES
    if tiny_config(family).model_type in llamagym.inference.backend.FUSED_FAMILIES
]


@torch.no_grad()
def max_logprob_difference(
    policy: Policy, decoder, shared: int = 20, lengths=(90, 61, 35), pieces: int = 3
) -> float:
    """Return the largest difference between log-probabilities of a backend (chunked prefill after a shared prefix, then decode steps) and of the learner

    1e-4 nats are allowed."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        torch.randint(3, policy.causal_lm.config.vocab_size, (n,), generator=generator)
        for n in lengths
    ]
    for row in rows:
        row[:shared] = rows[0][:shared]
    cache, starts, worst = (
        SlotKVCache(policy.causal_lm.config.num_hidden_layers),
        np.full(len(rows), shared),
        0.0,
    )
    decoder.forward(
        cache, rows[0][None, :shared], 0, np.zeros(1, dtype=np.int64), torch.tensor([shared - 1])
    )
    cache.reserve(len(rows) + 1, shared)
    cache.copy_prefix(0, [1, 2, 3], shared)
    ends = [
        np.array([shared + (len(row) - 3 - shared) * (i + 1) // pieces for row in rows])
        for i in range(pieces)
    ]
    for end in ends + [ends[-1] + i for i in (1, 2, 3)]:
        ids = torch.nn.utils.rnn.pad_sequence(
            [row[a:b] for row, a, b in zip(rows, starts, end)], batch_first=True
        )
        logits = decoder.logits(
            decoder.forward(cache, ids, 1, starts, torch.from_numpy(end - starts - 1), shared)
        ).log_softmax(-1)
        for row, b, ours in zip(rows, end, logits):
            theirs = (
                policy.model(input_ids=row[None, :b].to(policy.device), use_cache=False)
                .logits[0, -1]
                .float()
                .log_softmax(-1)
            )
            worst = max(worst, (ours - theirs).abs().max().item())
        starts = end
    return worst


@pytest.mark.parametrize(("family", "window"), windows(FUSED_FAMILIES))
def test_decoder_oracle_matches_each_family(family, window):
    """The decoder matches each supported family, with attention windows shorter and longer than the rows"""
    policy = Policy(
        tiny_model(family, **({} if window is None else dict(sliding_window=window))),
        tiny_tokenizer(),
    )
    perturb(policy.parameters())
    decoder = make_backend(policy.causal_lm)
    assert type(decoder) is FusedDecoder and max_logprob_difference(policy, decoder) < 5e-5


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_oracle_matches_adapters(kind):
    """Adapters are merged into a copy if that is exact, else called; the model's weights do not change"""
    policy = make_policy(kind)
    before = {
        name: p.clone()
        for name, p in policy.model.state_dict().items()
        if isinstance(p, torch.Tensor)
    }
    decoder = make_backend(policy.causal_lm)
    assert type(decoder) is FusedDecoder and (decoder.layers[0].qkv.weight is None) == (
        kind == "nf4"
    )
    assert max_logprob_difference(policy, decoder) < 1e-4
    assert all(torch.equal(p, policy.model.state_dict()[name]) for name, p in before.items())
    perturb(policy.parameters(), seed=3)  # other weights need another backend
    assert max_logprob_difference(policy, make_backend(policy.causal_lm)) < 1e-4


@pytest.mark.parametrize(
    "adapter",
    [
        dict(use_dora=True),
        dict(use_rslora=True),
        dict(modules_to_save=["lm_head"]),
    ],
    ids=str,
)
def test_decoder_oracle_matches_adapter_variants(adapter):
    """peft's variants are merged by peft"""
    policy = Policy.load(
        "tiny",
        lora=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **adapter),
        device="cpu",
    )
    perturb(policy.parameters())
    assert max_logprob_difference(policy, make_backend(policy.causal_lm)) < 5e-5


def test_decoder_oracle_matches_architecture_options():
    """Biases, other head dimensions, another activation and RoPE scaling are supported"""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=200, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=12,
                         attention_bias=True, mlp_bias=True, hidden_act="gelu",
                         rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4))  # fmt: skip
    policy = Policy(LlamaForCausalLM(config).eval(), tiny_tokenizer())
    perturb(policy.parameters(), 0.1)
    decoder = make_backend(policy.causal_lm)
    assert type(decoder) is FusedDecoder and max_logprob_difference(policy, decoder) < 5e-5


def test_decoder_in_half_precision_does_not_merge_adapters(monkeypatch):
    """Adapters are not merged if that would round, or if the copy would be large"""
    policy = make_policy("lora", dtype="bfloat16")
    decoder = make_backend(policy.causal_lm)
    assert type(decoder) is FusedDecoder and decoder.layers[0].qkv.weight is None
    assert (
        max_logprob_difference(policy, decoder)
        <= 1.05 * max_logprob_difference(policy, ModuleBackend(policy.causal_lm))
        < 0.2
    )
    monkeypatch.setattr(llamagym.inference.fused_llama, "MERGE_BYTES", 1000)
    policy = make_policy("lora")
    decoder = make_backend(policy.causal_lm)
    assert (
        type(decoder) is FusedDecoder
        and decoder.layers[0].qkv.weight is None
        and max_logprob_difference(policy, decoder) < 5e-5
    )


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in FUSED_FAMILIES])
def test_decoder_is_not_used_for_other_families(family, monkeypatch):
    """Other families are recognized by their model type, and also by their logits"""
    policy = Policy(tiny_model(family), tiny_tokenizer())
    assert (
        type(make_backend(policy.causal_lm)) is ModuleBackend
        and max_logprob_difference(policy, make_backend(policy.causal_lm)) < 5e-5
    )
    monkeypatch.setattr(
        llamagym.inference.backend,
        "FUSED_FAMILIES",
        (*llamagym.inference.backend.FUSED_FAMILIES, policy.causal_lm.config.model_type),
    )
    assert type(make_backend(tiny_model(family))) is ModuleBackend


def test_decoder_check_detects_a_modified_layer():
    for change in (lambda m: setattr(m.base_model.layers[1].self_attn, "o_proj", torch.nn.Sequential(m.base_model.layers[1].self_attn.o_proj, torch.nn.Tanh())),
                   lambda m: m.base_model.layers[0].register_forward_hook(lambda module, args, out: 1.01 * out),
                   lambda m: m.base_model.norm.register_forward_hook(lambda module, args, out: out + 0.01)):  # fmt: skip
        model = tiny_model("llama")
        change(model)
        policy = Policy(model, tiny_tokenizer())
        assert max_logprob_difference(policy, make_backend(model)) < 5e-5
    assert FusedLinear([torch.nn.Tanh()], merge=True).weight is None


@pytest.mark.parametrize("shared", [0, 8])
def test_decoder_oracle_ragged_attention_matches_single_rows(shared):
    """Attention of a ragged batch equals that of each row alone, for any lengths and any split of the batch"""
    generator, (kv, group, dim) = np.random.default_rng(0), (2, 3, 4)
    for _ in range(50):
        lengths = shared + np.ceil(
            generator.exponential(30, size=generator.integers(1, 12))
        ).astype(int)
        n, longest = len(lengths), int(lengths.max())
        query, keys, values = (torch.randn(n, kv, k, dim) for k in (group, longest, longest))
        keys[:, :, :shared], values[:, :, :shared] = keys[0, :, :shared], values[0, :, :shared]
        mask = torch.zeros(n, 1, 1, longest).masked_fill(
            torch.arange(longest) >= torch.tensor(lengths)[:, None, None, None], -torch.inf
        )
        got = DecodeAttention(mask, lengths, shared)(
            query, keys, values, keys[0, :, :shared], values[0, :, :shared]
        )
        for i, length in enumerate(lengths):
            scores = torch.einsum("hgd,hkd->hgk", query[i].double(), keys[i, :, :length].double())
            assert (
                got[i]
                - torch.einsum("hgk,hkd->hgd", scores.softmax(-1), values[i, :, :length].double())
            ).abs().max() < 1e-5


def test_decoder_splits_the_cache_at_the_lowest_cost():
    """The split is the cheapest of all possible splits"""
    generator = np.random.default_rng(0)
    for _ in range(200):
        lengths = np.ceil(generator.exponential(30, size=generator.integers(1, 12))).astype(int)
        cost = {
            cut: len(lengths) * cut + 3 * int((lengths > cut).sum()) * (lengths.max() - cut)
            for cut in lengths.tolist()
        }
        cut, longer = split_length(lengths)
        assert longer.tolist() == [i for i, n in enumerate(lengths) if n > cut]
        assert cost[cut] == min(cost.values()) or (
            cut == lengths.max() and min(cost.values()) >= 0.9 * cost[cut]
        )


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_decoder_padding_rows_of_captured_steps_change_nothing(family, monkeypatch):
    """Padding rows of captured steps, run here without capture, change nothing, also if all slots are in use"""
    policy = Policy(tiny_model(family), tiny_tokenizer())
    plain = collect(
        lake_agent(policy, generate__max_new_tokens=9), episodes=24, num_envs=10, seed=3
    )
    monkeypatch.setattr(llamagym.inference.cuda_graphs, "CAPTURE_AFTER_STEPS", 1)
    monkeypatch.setattr(llamagym.inference.cuda_graphs, "LENGTH_BUCKET", 16)
    sizes = set()

    class RecordingDecoder(CudaGraphDecoder):
        def reset(self):
            sizes.update(getattr(self, "steps", ()))
            super().reset()

    monkeypatch.setattr(
        llamagym.inference.model_runner,
        "make_backend",
        lambda model: RecordingDecoder(model, capture=lambda step, pool: step),
    )
    agent = lake_agent(policy, generate__max_new_tokens=9)
    for a, b in zip(plain, collect(agent, episodes=24, num_envs=10, seed=3)):
        assert [t.response_ids for t in a.turns] == [t.response_ids for t in b.turns]
        assert max(np.abs(t.logprobs - u.logprobs).max() for t, u in zip(a.turns, b.turns)) < 1e-4
    assert {rows for _, rows, _ in sizes} > {16}


def test_decoder_continues_without_cuda_graphs_if_capture_fails(caplog):
    """A step that cannot be captured runs without CUDA graphs"""

    def record(step, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, cache, starts = tiny_model("llama"), SlotKVCache(2), np.array([5, 9])
    decoder, ids = CudaGraphDecoder(model, record), torch.randint(3, 200, (2, 9))
    with torch.no_grad():
        decoder.forward(cache, ids, 1, np.zeros(2, dtype=np.int64), torch.from_numpy(starts - 1))
        for t in range(llamagym.inference.cuda_graphs.CAPTURE_AFTER_STEPS + 3):
            hidden = decoder.forward(cache, ids[:, :1], 1, starts + t, None)
    assert decoder.capture is None and [r.message for r in caplog.records if "not captured" in r.message] == [
        "decode steps of LlamaForCausalLM are not captured: operation not permitted when stream is capturing"]  # fmt: skip
    rows = [
        torch.cat(
            [ids[i, :n], ids[i, :1].repeat(llamagym.inference.cuda_graphs.CAPTURE_AFTER_STEPS + 3)]
        )
        for i, n in enumerate(starts)
    ]
    for row, state in zip(rows, hidden):
        with torch.no_grad():
            assert (
                model.base_model(input_ids=row[None]).last_hidden_state[0, -1] - state
            ).abs().max() < 1e-4


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_decoder_samples_from_the_reference_within_as_reference(kind, known):
    """Within `as_reference` the engine samples from the reference, afterwards from the policy"""
    policy, prompt = make_policy(kind), [1, 20, 21, 22, 23]
    if known or kind == "plain":
        policy.set_reference()
    perturb(policy.parameters(), 0.1, seed=5)
    engine = Engine(policy, {2}, GenerateConfig(max_new_tokens=6))

    def checked() -> list[int]:
        (sample,) = engine.sample([prompt], [np.random.default_rng(0)], conversation_ids=["a"])
        ids = torch.tensor([prompt + sample.ids], device=policy.device)
        positions = torch.arange(len(prompt), ids.shape[1], device=policy.device)
        with torch.no_grad():
            assert (
                policy.score(ids, torch.zeros_like(positions), positions).logprobs.cpu()
                - torch.from_numpy(sample.logprobs)
            ).abs().max() < 1e-4
        return sample.ids

    first = checked()
    with policy.as_reference():
        assert checked() != first
    assert checked() == first
