"""Model families: what a policy scores, samples, learns, saves and merges is what transformers computes."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamagym.algorithms.hidden_states import (
    gradient_checkpointing,
    hidden_states,
    tree_unsupported_reason,
)
from llamagym.config import GenerateConfig, LoRAConfig
from llamagym.inference.engine import Engine
from llamagym.inference.kv_cache import cache_unsupported_reason, require_length
from llamagym.models.families import MIXTURES_OF_EXPERTS, TESTED_FAMILIES, family_model
from llamagym.models.length_limits import (
    CHECK_BUDGET,
    batching_limit,
    length_limits,
    limits_to_check,
)
from llamagym.models.lm_head import find_split, score_tokens
from llamagym.models.policy import Policy
from llamagym.models.reference import add_lora, has_experts
from llamagym.models.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LENGTH_DEPENDENT = ("phi3 longrope", "llama dynamic")
# One of each kind: windows, chunks, experts, recurrent layers, learned positions, ALiBi, another split
KINDS = (
    "llama", "llama4_text", "qwen3_5_text", "qwen3_moe", "gpt_oss", "gemma2", "mistral",
    "phi3 longrope", "llama dynamic", "bloom", "gpt2", "gpt_neo", "opt", "mamba",
)  # fmt: skip
each_family = pytest.mark.parametrize(
    "family",
    [f if f in KINDS else pytest.param(f, marks=pytest.mark.slow) for f in TESTED_FAMILIES],
)


def random_rows(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(8, len(TOKENIZER), length) for length in lengths]


def own_logprobs(model, row) -> torch.Tensor:  # [T - 1] nats
    "Score a row with the model's own forward pass"
    ids = torch.as_tensor(row)[None]
    log_dist = model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return log_dist.gather(-1, ids[0, 1:, None]).squeeze(-1)


def row_logprobs(policy: Policy, rows, number: int) -> torch.Tensor:  # [T - 1] nats
    "Score one of several rows as the learner does"
    positions = torch.arange(len(rows[number]) - 1)
    index = torch.full_like(positions, number)
    hidden = hidden_states(policy, rows, index, positions)
    tokens = torch.as_tensor(rows[number][1:])
    return score_tokens(policy.logits(hidden), tokens, hidden).logprobs


@each_family
def test_family_scores_like_transformers_and_rows_alone(family):
    """Rows on both sides of every limit, alone and side by side, in the learner and in `score`"""
    policy = Policy(family_model(family), TOKENIZER)
    rows = random_rows(12, 45, 40)
    batch = torch.zeros(3, 45, dtype=torch.long)
    for number, row in enumerate(rows):
        batch[number, : len(row)] = torch.as_tensor(row)
    with torch.no_grad():
        for number, row in enumerate(rows):
            # Of a new model: dynamic frequencies stay at those of the longest row so far.
            expected = own_logprobs(family_model(family), row)
            positions = torch.arange(1, len(row))
            index = torch.full_like(positions, number)
            scored = policy.score(batch, index, positions).logprobs
            for values in (row_logprobs(policy, [row], 0), row_logprobs(policy, rows, number)):
                torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(scored, expected, atol=1e-4, rtol=0)


@each_family
def test_family_samples_what_transformers_computes(family):
    """Recorded log-probabilities of two turns, in kept caches, are those of the model's own pass"""
    model = family_model(family)
    model.generation_config.update(repetition_penalty=1.5, suppress_tokens=list(range(100, 300)))
    engine = Engine(Policy(model, TOKENIZER), [2], GenerateConfig(max_new_tokens=4))
    lengths = (5, 9) if family in LENGTH_DEPENDENT else (5, 23)
    texts = [row.tolist() for row in random_rows(*lengths)]
    rngs = [np.random.default_rng(seed) for seed in (1, 2)]
    for turn in range(2):
        samples = engine.sample(texts, rngs, conversation_ids=["a", "b"])
        with torch.no_grad():
            for number, sample in enumerate(samples):
                text = texts[number] + sample.ids
                expected = own_logprobs(model, text)[-len(sample.ids) :]
                np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
                texts[number] = text + [20 + turn, 30, 40]


@each_family
def test_family_learns_like_transformers(family):
    """The gradient of a loss of the learner is that of the model's own forward pass"""
    policy = Policy(family_model(family), TOKENIZER)
    rows = random_rows(12, 20)
    row_logprobs(policy, rows, 1).sum().backward()
    gradients = {
        n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None
    }
    policy.model.zero_grad(set_to_none=True)
    own_logprobs(policy.model, rows[1]).sum().backward()
    expected = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    moved = {name for name, gradient in expected.items() if gradient.abs().max() > 0}
    assert moved and moved <= gradients.keys()
    total = torch.cat([expected[name].flatten() for name in moved])
    error = torch.cat([(gradients[name] - expected[name]).flatten() for name in moved])
    assert error.norm() <= 1e-4 * total.norm()


SAVED = ("llama", "qwen3_moe", "gpt2", "opt")


def check_saved_and_merged(family, folder):
    base = folder / "base"
    family_model(family).save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    policy = Policy.load(base, lora=LoRAConfig(r=2), device="cpu")
    row = random_rows(12)[0]
    with torch.no_grad():
        for number, weight in enumerate(policy.parameters()):
            generator = torch.Generator().manual_seed(number)
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        expected = own_logprobs(policy.model, row)
        assert (expected - own_logprobs(family_model(family), row)).abs().max() > 1e-3
        loaded = Policy.load(policy.save(folder / "policy"), device="cpu")
        torch.testing.assert_close(row_logprobs(loaded, [row], 0), expected, atol=1e-5, rtol=0)
        merged = policy.merge_and_save(folder / "merged")
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        torch.testing.assert_close(own_logprobs(model, row), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", SAVED)
def test_family_is_saved_and_merged(family, tmp_path):
    check_saved_and_merged(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in TESTED_FAMILIES if family not in SAVED])
def test_every_family_is_saved_and_merged(family, tmp_path):
    check_saved_and_merged(family, tmp_path)


def test_families_take_the_paths_that_they_should():
    """At least 45 families; the plain path exactly where a family needs it"""
    assert len(TESTED_FAMILIES) >= 45
    reasons = {f: cache_unsupported_reason(family_model(f)) for f in ("gpt2", "gpt_neo", "bloom")}
    assert reasons["gpt2"] is None
    assert "differ by" in reasons["gpt_neo"], "its local window counts from the end of the batch"
    assert reasons["bloom"]
    assert find_split(family_model("opt")).name == "head"
    assert find_split(family_model("opt")).hidden_size == 32
    assert find_split(family_model("llama")).name == "backbone"


def test_families_with_candidates_side_by_side_are_checked():
    """What a family computes for candidates in one row is compared with rows of their own"""
    assert tree_unsupported_reason(family_model("llama")) is None
    assert tree_unsupported_reason(family_model("mpt")) is not None, "it counts keys, not positions"


def test_family_that_cannot_be_split_is_refused():
    model = tiny_model("llama")
    forward = model.forward

    def with_prior(input_ids, **kwargs):
        "Add logits that depend on the tokens, and on no hidden state"
        output = forward(input_ids=input_ids, **kwargs)
        prior = torch.arange(output.logits.shape[-1]) == input_ids[0, -1]
        output.logits = output.logits + 100 * prior
        return output

    model.forward = with_prior
    with pytest.raises(ValueError, match="cannot be separated into a backbone and a head"):
        Policy(model, TOKENIZER)


def test_pad_id_outside_the_embedding_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|another pad|>"})
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        Policy(tiny_model("llama"), tokenizer)


@pytest.mark.parametrize("family", LENGTH_DEPENDENT)
def test_family_whose_positions_follow_the_length_stays_below_it(family):
    model = family_model(family)
    assert batching_limit(model) == 32
    engine = Engine(Policy(model, TOKENIZER), [2], GenerateConfig(max_new_tokens=4))
    with pytest.raises(ValueError, match="context.max_length=32"):
        engine.sample([list(range(8, 40))], [np.random.default_rng(0)])


def test_rows_alone_after_a_longer_row():
    """Dynamic frequencies do not stay at those of the longest row so far"""
    policy = Policy(family_model("llama dynamic"), TOKENIZER)
    short, long = random_rows(45, 200)
    with torch.no_grad():
        expected = row_logprobs(policy, [short], 0)
        row_logprobs(policy, [long], 0)
        torch.testing.assert_close(row_logprobs(policy, [short], 0), expected)


def test_long_limit_is_checked_when_a_conversation_gets_there(monkeypatch):
    monkeypatch.setitem(CHECK_BUDGET, "cpu", 1e6)  # no limit is affordable in advance
    right, wrong = tiny_model("mistral"), tiny_model("mistral")
    assert limits_to_check(right) == [] and length_limits(right.config) == [64]
    for layer in wrong.model.layers:
        layer.register_forward_pre_hook(forget_all_but_64)
    for model in (right, wrong):
        assert cache_unsupported_reason(model) is None
        require_length(model, 64)
    require_length(right, 65)
    with pytest.raises(ValueError, match="up to 64 tokens.*context.max_length=64"):
        require_length(wrong, 65)


def forget_all_but_64(module, args):
    "Zero the hidden states of all but the newest 64 tokens of a pass, a window that caches break"
    hidden = args[0].clone()
    hidden[:, :-64] = 0
    return hidden, *args[1:]


@pytest.mark.parametrize("family", ("opt", "bloom", "falcon", "gpt2", "llama"))
def test_family_has_no_dropout_under_gradient_checkpointing(family):
    model = family_model(family)
    for module in model.modules():
        for name in ("dropout", "hidden_dropout", "attention_dropout", "resid_pdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
            elif isinstance(getattr(module, name, None), torch.nn.Dropout):
                getattr(module, name).p = 0.5
    policy = Policy(model, TOKENIZER)
    row = random_rows(12)[0]
    with torch.no_grad():
        expected = row_logprobs(policy, [row], 0)
    with gradient_checkpointing(policy):
        values = row_logprobs(policy, [row], 0)
        torch.testing.assert_close(values.detach(), expected, atol=1e-5, rtol=0)
        values.sum().backward()
    assert not any(module.training for module in model.modules())


def test_nf4_of_stacked_experts_is_refused(tmp_path):
    family_model("qwen3_moe").save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="stacked experts"):
        Policy.load(tmp_path, quantize="nf4", lora=LoRAConfig(r=2), device="cpu")


@pytest.mark.parametrize("family", MIXTURES_OF_EXPERTS)
def test_adapters_leave_experts_of_families_alone(family):
    """By default; the adapted layers are those of the attention, or stand in its place"""
    assert has_experts(family_model(family)) and len(MIXTURES_OF_EXPERTS) >= 10
    model = add_lora(family_model(family), LoRAConfig(r=2))
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapted
    assert all("attn" in name or "attention" in name for name in adapted)


def test_adapters_of_experts_where_they_are_asked_for():
    targets = ("q_proj", "gate_proj", "up_proj", "down_proj")
    model = add_lora(family_model("qwen3_moe"), LoRAConfig(r=2, target_modules=targets))
    assert [name for name, p in model.named_parameters() if p.requires_grad and "experts" in name]


def test_generation_config_eos_list_ends_responses():
    """All end-of-sequence ids of the checkpoint stop a response, its other settings change nothing"""
    from llamagym.agent import Agent
    from llamagym.envs.toy_text import blackjack

    policy = Policy(tiny_model("llama"), TOKENIZER)
    assert policy.tokenizer.eos_token_id == 2
    policy.causal_lm.generation_config.eos_token_id = [2, 3, 400]  # 400 is a word
    assert policy.eos_ids == (2, 3)
    agent = Agent.for_task(blackjack(), policy)
    assert agent.engine.sampler.stop_ids == {2, 3}
    conversation = agent.conversation("Play.")
    conversation.add_user("You: 12.")
    conversation.add_response([30, 3], stopped=True)
    ids = conversation.add_user("You: 15.")
    text = TOKENIZER.decode(ids)
    assert text.count("You: 12.") == 1 and text.endswith("You: 15.<|end|><|assistant|>")
