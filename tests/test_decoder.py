"""The short way through a model's layers says what transformers says, in the cache of the rollouts too."""

import numpy as np
import pytest
import torch
from doubles import KINDS, lake_agent, make_policy, shake, windows
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import llamagym.decoder
import llamagym.engine
from llamagym.cache import SlotCache
from llamagym.config import GenerateConfig
from llamagym.decoder import Decoder, GraphDecoder, Joined, ModelReader, OneQuery, cut_length, reader_of
from llamagym.engine import Engine
from llamagym.policy import Policy
from llamagym.rollout import collect
from llamagym.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokenizer

DECODED = [family for family in FAMILIES if tiny_config(family).model_type in llamagym.decoder.DECODED]


@torch.no_grad()
def gap(policy: Policy, reader, shared: int = 20, lengths=(90, 61, 35), pieces: int = 3) -> float:
    """Largest difference of log-probabilities between a reader, whose rows begin alike and are read in pieces and then by single tokens, and the learner"""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, policy.causal_lm.config.vocab_size, (n,), generator=generator) for n in lengths]
    for row in rows:
        row[:shared] = rows[0][:shared]
    cache, starts, worst = SlotCache(policy.causal_lm.config.num_hidden_layers), np.full(len(rows), shared), 0.0
    reader.read(cache, rows[0][None, :shared], 0, np.zeros(1, dtype=np.int64), torch.tensor([shared - 1]))
    cache.reserve(len(rows) + 1, shared)
    cache.copy_prefix(0, [1, 2, 3], shared)
    ends = [np.array([shared + (len(row) - 3 - shared) * (i + 1) // pieces for row in rows]) for i in range(pieces)]
    for end in ends + [ends[-1] + i for i in (1, 2, 3)]:
        ids = torch.nn.utils.rnn.pad_sequence([row[a:b] for row, a, b in zip(rows, starts, end)], batch_first=True)
        logits = reader.logits(reader.read(cache, ids, 1, starts, torch.from_numpy(end - starts - 1), shared)).log_softmax(-1)
        for row, b, ours in zip(rows, end, logits):
            theirs = policy.model(input_ids=row[None, :b].to(policy.device), use_cache=False).logits[0, -1].float().log_softmax(-1)
            worst = max(worst, (ours - theirs).abs().max().item())
        starts = end
    return worst


@pytest.mark.parametrize(("family", "window"), windows(DECODED))
def test_decoder_oracle(family, window):
    """Each family that is decoded: with an attention window short of the rows and beyond them, trained whole"""
    policy = Policy(tiny_model(family, **({} if window is None else dict(sliding_window=window))), tiny_tokenizer())
    shake(policy.parameters())
    reader = reader_of(policy.causal_lm)
    assert type(reader) is Decoder and gap(policy, reader) < 5e-5


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_oracle_of_adapters(kind):
    """Merged into a copy where that is exact, called one by one where not; the weights stay as they are"""
    policy = make_policy(kind)
    before = {name: p.clone() for name, p in policy.model.state_dict().items() if isinstance(p, torch.Tensor)}
    reader = reader_of(policy.causal_lm)
    assert type(reader) is Decoder and (reader.layers[0].qkv.weight is None) == (kind == "nf4")
    assert gap(policy, reader) < 5e-5
    assert all(torch.equal(p, policy.model.state_dict()[name]) for name, p in before.items())
    shake(policy.parameters(), seed=3)  # with other weights, another reader
    assert gap(policy, reader_of(policy.causal_lm)) < 5e-5


@pytest.mark.parametrize("adapter", [dict(use_dora=True), dict(use_rslora=True), dict(bias="lora_only"), dict(modules_to_save=["lm_head"])], ids=str)
def test_decoder_oracle_of_other_adapters(adapter):
    """peft's variants are merged by peft"""
    policy = Policy.load("tiny", lora=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **adapter), device="cpu")
    shake(policy.parameters())
    assert gap(policy, reader_of(policy.causal_lm)) < 5e-5


def test_decoder_oracle_of_options():
    """Biases, heads of a width of their own, another activation, stretched positions"""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=200, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=12,
                         attention_bias=True, mlp_bias=True, hidden_act="gelu",
                         rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4))  # fmt: skip
    policy = Policy(LlamaForCausalLM(config).eval(), tiny_tokenizer())
    shake(policy.parameters(), 0.1)
    reader = reader_of(policy.causal_lm)
    assert type(reader) is Decoder and gap(policy, reader) < 5e-5


def test_decoder_in_half_precision_calls_the_adapters(monkeypatch):
    """Nothing is merged where that would round, nor where the copy would be large"""
    policy = make_policy("lora", dtype="bfloat16")
    reader = reader_of(policy.causal_lm)
    assert type(reader) is Decoder and reader.layers[0].qkv.weight is None
    assert gap(policy, reader) <= 1.05 * gap(policy, ModelReader(policy.causal_lm)) < 0.2
    monkeypatch.setattr(llamagym.decoder, "MERGE_BYTES", 1000)
    policy = make_policy("lora")
    reader = reader_of(policy.causal_lm)
    assert type(reader) is Decoder and reader.layers[0].qkv.weight is None and gap(policy, reader) < 5e-5


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in DECODED])
def test_decoder_leaves_other_families_alone(family, monkeypatch):
    """... which are told by their name; what they say would tell them as well"""
    policy = Policy(tiny_model(family), tiny_tokenizer())
    assert type(reader_of(policy.causal_lm)) is ModelReader and gap(policy, reader_of(policy.causal_lm)) < 1e-4
    monkeypatch.setattr(llamagym.decoder, "DECODED", (*llamagym.decoder.DECODED, policy.causal_lm.config.model_type))
    assert type(reader_of(tiny_model(family))) is ModelReader


def test_decoder_notices_a_layer_that_does_something_else():
    for change in (lambda m: setattr(m.base_model.layers[1].self_attn, "o_proj", torch.nn.Sequential(m.base_model.layers[1].self_attn.o_proj, torch.nn.Tanh())),
                   lambda m: m.base_model.layers[0].register_forward_hook(lambda module, args, out: 1.01 * out),
                   lambda m: m.base_model.norm.register_forward_hook(lambda module, args, out: out + 0.01)):  # fmt: skip
        model = tiny_model("llama")
        change(model)
        policy = Policy(model, tiny_tokenizer())
        assert gap(policy, reader_of(model)) < 5e-5
    assert Joined([torch.nn.Tanh()], merge=True).weight is None


@pytest.mark.parametrize("shared", [0, 8])
def test_decoder_oracle_of_ragged_attention(shared):
    """Whatever the lengths, and wherever the batch is cut: attention of each row alone"""
    generator, (kv, group, dim) = np.random.default_rng(0), (2, 3, 4)
    for _ in range(50):
        lengths = shared + np.ceil(generator.exponential(30, size=generator.integers(1, 12))).astype(int)
        n, longest = len(lengths), int(lengths.max())
        query, keys, values = (torch.randn(n, kv, k, dim) for k in (group, longest, longest))
        keys[:, :, :shared], values[:, :, :shared] = keys[0, :, :shared], values[0, :, :shared]
        mask = torch.zeros(n, 1, 1, longest).masked_fill(torch.arange(longest) >= torch.tensor(lengths)[:, None, None, None], -torch.inf)
        got = OneQuery(mask, lengths, shared)(query, keys, values, keys[0, :, :shared], values[0, :, :shared])
        for i, length in enumerate(lengths):
            scores = torch.einsum("hgd,hkd->hgk", query[i].double(), keys[i, :, :length].double())
            assert (got[i] - torch.einsum("hgk,hkd->hgd", scores.softmax(-1), values[i, :, :length].double())).abs().max() < 1e-5


def test_decoder_cuts_where_least_is_read():
    """Against every cut there is"""
    generator = np.random.default_rng(0)
    for _ in range(200):
        lengths = np.ceil(generator.exponential(30, size=generator.integers(1, 12))).astype(int)
        cost = {cut: len(lengths) * cut + 3 * int((lengths > cut).sum()) * (lengths.max() - cut) for cut in lengths.tolist()}
        cut, longer = cut_length(lengths)
        assert longer.tolist() == [i for i, n in enumerate(lengths) if n > cut]
        assert cost[cut] == min(cost.values()) or (cut == lengths.max() and min(cost.values()) >= 0.9 * cost[cut])


@pytest.mark.parametrize("family", DECODED)
def test_decoder_rounds_up_the_sizes_of_recorded_steps(family, monkeypatch):
    """What a GPU would record, taken as it is: rows that make up a size change nothing, not even in a table that is full"""
    policy = Policy(tiny_model(family), tiny_tokenizer())
    plain = collect(lake_agent(policy, generate__max_new_tokens=9), episodes=24, num_envs=10, seed=3)
    monkeypatch.setattr(llamagym.decoder, "RECORD_AFTER", 1)
    monkeypatch.setattr(llamagym.decoder, "RECORD_LENGTH", 16)
    sizes = set()

    class Watched(GraphDecoder):
        def forget(self):
            sizes.update(getattr(self, "steps", ()))
            super().forget()

    monkeypatch.setattr(llamagym.engine, "reader_of", lambda model: Watched(model, record=lambda step, pool: step))
    agent = lake_agent(policy, generate__max_new_tokens=9)
    for a, b in zip(plain, collect(agent, episodes=24, num_envs=10, seed=3)):
        assert [t.response_ids for t in a.turns] == [t.response_ids for t in b.turns]
        assert max(np.abs(t.logprobs - u.logprobs).max() for t, u in zip(a.turns, b.turns)) < 1e-4
    assert {rows for _, rows, _ in sizes} > {16}


def test_decoder_goes_on_without_recording(caplog):
    """A function that can't be recorded"""

    def record(step, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, cache, starts = tiny_model("llama"), SlotCache(2), np.array([5, 9])
    reader, ids = GraphDecoder(model, record), torch.randint(3, 200, (2, 9))
    with torch.no_grad():
        reader.read(cache, ids, 1, np.zeros(2, dtype=np.int64), torch.from_numpy(starts - 1))
        for t in range(llamagym.decoder.RECORD_AFTER + 3):
            hidden = reader.read(cache, ids[:, :1], 1, starts + t, None)
    assert reader.record is None and [r.message for r in caplog.records if "not recorded" in r.message] == [
        "the steps of LlamaForCausalLM are not recorded: operation not permitted when stream is capturing"]  # fmt: skip
    rows = [torch.cat([ids[i, :n], ids[i, :1].repeat(llamagym.decoder.RECORD_AFTER + 3)]) for i, n in enumerate(starts)]
    for row, state in zip(rows, hidden):
        with torch.no_grad():
            assert (model.base_model(input_ids=row[None]).last_hidden_state[0, -1] - state).abs().max() < 1e-4


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_decoder_of_the_reference(kind, known):
    """Inside of `as_reference` the engine samples from the reference, and from the policy again afterwards"""
    policy, prompt = make_policy(kind), [1, 20, 21, 22, 23]
    if known or kind == "plain":
        policy.set_reference()
    shake(policy.parameters(), 0.1, seed=5)
    engine = Engine(policy, {2}, GenerateConfig(max_new_tokens=6))

    def checked() -> list[int]:
        (sample,) = engine.sample([prompt], [np.random.default_rng(0)], keys=["a"])
        ids = torch.tensor([prompt + sample.ids], device=policy.device)
        positions = torch.arange(len(prompt), ids.shape[1], device=policy.device)
        with torch.no_grad():
            assert (policy.score(ids, torch.zeros_like(positions), positions).logprobs.cpu() - torch.from_numpy(sample.logprobs)).abs().max() < 1e-4
        return sample.ids

    first = checked()
    with policy.as_reference():
        assert checked() != first
    assert checked() == first
