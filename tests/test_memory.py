"""The planner's forecasts against what runs on the CPU really take; sizes; settings that fit."""

import warnings

import httpx
import numpy as np
import pytest
import torch
from doubles import lake_agent
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig

from llamagym.config import Config, LoRAConfig
from llamagym.engine import Engine, draw_from
from llamagym.memory import OVERHEAD, LiveBytes, Passes, as_bytes, cache_bytes, logits_bytes, plan, skeleton, weight_bytes
from llamagym.passes import TokenTerms
from llamagym.policy import Policy, add_lora
from llamagym.rollout import collect
from llamagym.rows import gradient_checkpointing
from llamagym.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokenizer

WINDOWED = ("mistral", "gemma2", "gemma3")  # their layers get masks, which the forecast leaves out


def storage_bytes(tensors) -> int:
    """What tensors take, shared storages counted once"""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def part(found, name: str) -> float:
    return next(p.size for p in found.parts if p.name == name)


def lora_policy(family: str) -> Policy:
    return Policy(add_lora(tiny_model(family).requires_grad_(False), LoRAConfig(r=8)), tiny_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_activations(family, checkpointing):
    """Two rows forward and back, counted on the CPU"""
    policy, ids = lora_policy(family), torch.randint(100, (2, 200))
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    with gradient_checkpointing(policy, checkpointing), LiveBytes() as live:
        hidden = policy.trunk(ids)
        hidden.backward(torch.ones_like(hidden))
    forecast = Passes(tiny_config(family), torch.float32, LoRAConfig(r=8))(2, 200, True, checkpointing)
    assert forecast.peak == pytest.approx(live.peak, rel=0.12 if family in WINDOWED else 0.05)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "cohere"])
def test_memory_of_logits(family):
    policy = lora_policy(family)
    hidden, seen = torch.randn(2, 300, policy.hidden_size).unbind()
    hidden.requires_grad_()
    with LiveBytes() as live:
        with torch.no_grad():
            reference = policy.logits(seen).log_softmax(-1)
        sum(TokenTerms.apply(policy.logits(hidden), torch.zeros(300, dtype=torch.long), reference, 1.0)).sum().backward()
    assert logits_bytes(Passes(tiny_config(family), torch.float32, LoRAConfig(r=8)).policy(), 300) == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_of_weights(family):
    """Exactly: in float32, and in 4 bits with their tables"""
    config = tiny_config(family)
    bare = skeleton(config, torch.float32)
    model = tiny_model(family)
    assert weight_bytes(bare, None) == storage_bytes([*model.parameters(), *model.buffers()])
    pytest.importorskip("bitsandbytes")
    model = Policy.load(f"tiny:{family}", quantize="nf4", lora=LoRAConfig(r=8), device="cpu").causal_lm
    tensors = [t for name, t in [*model.named_parameters(), *model.named_buffers()] if "lora" not in name]
    for state in [t.quant_state for t in tensors if getattr(t, "quant_state", None) is not None]:
        tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert weight_bytes(bare, "nf4") == storage_bytes(tensors)


@pytest.mark.parametrize("family", ["llama", "smollm", "qwen3", "mistral", "phi3", "cohere"])
def test_memory_of_the_cache(family):
    """Conversations of 700 tokens, six side by side; without the share for moving into a larger table"""
    policy = Policy(tiny_model(family), tiny_tokenizer())
    engine, prompts = Engine(policy, {2}, Config().generate), [list(range(50 + i, 250 + i)) for i in range(6)]
    for length in (200, 400, 668):
        engine.sample([(p * 4)[:length] for p in prompts], [np.random.default_rng(i) for i in range(6)], keys=list(range(6)))
    config = tiny_config(family)
    forecast = cache_bytes(config, torch.float32, 6, 700, recorded=False) * config.num_hidden_layers / (config.num_hidden_layers + 1)
    assert forecast == pytest.approx(engine.nbytes, rel=0.1)


def test_memory_of_drawing():
    """A distribution over the vocabulary for each reply, and what is made of it; the head's own numbers, in 16 bits, come on top"""
    logits = torch.randn(16, 5000)
    with LiveBytes() as live:
        draw_from(logits / 1.0, np.random.default_rng(0).random(16), np.zeros(16, dtype=bool))
    config = tiny_config("qwen2", vocab_size=5000)
    assert part(plan(config, "1GB", rollout__num_envs=16), "drawing") == pytest.approx(live.peak + 2 * logits.numel(), rel=0.15)


def test_memory_of_training():
    """Adapters, moments and gradients after an update"""
    agent = lake_agent(lora_policy("llama"), generate__max_new_tokens=4)
    agent.policy.set_reference()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent.learner.learn(collect(agent, episodes=4, num_envs=4))
    adapters = [p for name, p in agent.policy.model.named_parameters() if "lora" in name]
    moments = [t for p in agent.policy.parameters() for t in agent.learner.optimizer.state[p].values() if t.dim()]
    found = plan("tiny", "1GB", model__quantize=None, model__lora=LoRAConfig(r=8).to_dict(), model__dtype="float32")
    assert part(found, "adapters") == storage_bytes(adapters)
    assert part(found, "optimiser") == storage_bytes(moments)
    assert part(found, "gradients") == sum(p.nbytes for p in agent.policy.parameters())


def test_memory_plan_follows_its_settings():
    """More environments only play, more tokens only learn; what is suggested fits, and nothing that is needed was left"""
    shape, options = tiny_config("qwen2", hidden_size=256, num_hidden_layers=4), dict(turns=40, tokens=100, ppo__mini_batch_size=640)
    found = plan(shape, "2GB", **options)
    wide = found.with_options({"rollout.num_envs": 64})
    assert wide.size("playing") > found.size("playing") and wide.size("learning") == found.size("learning")
    deep = found.with_options({"ppo.token_budget": 64_000})
    assert deep.size("learning") > found.size("learning") and deep.size("playing") == found.size("playing")
    assert found.with_options({"ppo.mini_batch_size": 40}).size("learning") < found.size("learning")  # a step of one episode has no two to run together
    assert found.with_options({"ppo.gradient_checkpointing": True}).size("learning") < found.size("learning")
    changed = {"model.lora": None, "model.quantize": None}
    afresh = plan(shape, "2GB", model__lora=None, model__quantize=None, **options)
    assert found.with_options(changed).parts == afresh.parts and part(afresh, "gradients") == pytest.approx(part(afresh, "weights"), rel=0.01)
    for card in np.linspace(OVERHEAD * 1.3, 3e9, 5):
        one = plan(tiny_config("qwen2", hidden_size=256, num_hidden_layers=4), float(card), turns=40, tokens=100)
        assert one.fits == (one.peak <= card) and one.fits == (one.suggestion == {})
        if one.suggestion is not None:
            assert one.with_options(one.suggestion).fits
        if one.fits:
            assert one.with_options({"rollout.num_envs": one.most_envs}).fits
            assert one.most_envs == 1024 or not one.with_options({"rollout.num_envs": 2 * one.most_envs}).fits


def test_memory_plan_of_a_folder(tmp_path):
    """A configuration on disk is enough"""
    tiny_config("gemma3").save_pretrained(tmp_path)
    assert plan(tmp_path, "8GB").parts == plan(tiny_config("gemma3"), "8GB").parts


@pytest.mark.parametrize("size", ["24", "GB", "-1GB", "0 GB", "nan", None, True, float("inf")])
def test_memory_bad_sizes(size):
    with pytest.raises(ValueError, match="expected a"):
        as_bytes(size)


def test_memory_bad_plans(tmp_path):
    with pytest.raises(ValueError, match="turns=0: expected a whole number of at least 1"):
        plan("tiny", "1GB", turns=0)
    with pytest.raises(TypeError, match="model is a int; expected a hub name, a folder"):
        plan(7, "1GB")
    with pytest.raises(FileNotFoundError, match="nothing is not a folder; expected a checkpoint"):
        plan(tmp_path / "nothing", "1GB")
    with pytest.raises(ValueError, match="the configuration is no language model that speaks .vit."):
        plan(AutoConfig.for_model("vit"), "1GB")
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an encoder-decoder .t5.: expected a decoder-only causal language model"):
        plan(tmp_path, "1GB")


def test_load_of_a_gated_model_says_how_to_get_in(monkeypatch):
    def refused(name):
        answer = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
        raise OSError("You are trying to access a gated repo.") from GatedRepoError("403", response=answer)

    monkeypatch.setattr(AutoConfig, "from_pretrained", refused)
    for load in (lambda: Policy.load("somebody/gated"), lambda: plan("somebody/gated", "8GB")):
        with pytest.raises(OSError, match="somebody/gated is a gated model: ask for access .* `hf auth login`"):
            load()


@pytest.mark.parametrize("name, bound", [("qwen2.5-0.5b", 0.25), ("qwen2.5-7b", 0.2)])
def test_qlora_base_weights_are_a_quarter_of_float32(name, bound):
    """In 4 bits, embeddings in bfloat16, at shapes of real models"""
    sizes = {"qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True), "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False)}[name]
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size tie_word_embeddings".split()
    config = AutoConfig.for_model("qwen2", **dict(zip(names, sizes)))
    assert weight_bytes(skeleton(config, torch.bfloat16), "nf4") < bound * weight_bytes(skeleton(config, torch.float32), None)


@pytest.mark.parametrize("family", FAMILIES)
def test_load_from_disk_takes_the_path_of_a_hub_name(family, tmp_path):
    """A checkpoint written by transformers alone: loaded by name, in float32 and in 4 bits; padding needs no new embedding; a planner sees the same"""
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for quantize in (None, "nf4"):
        policy = Policy.load(tmp_path, quantize=quantize, lora=LoRAConfig(r=4), device="cpu")
        assert policy.causal_lm.get_input_embeddings().num_embeddings == len(tokenizer) and policy.tokenizer.pad_token_id is not None
        tied = policy.causal_lm.get_output_embeddings().weight is policy.causal_lm.get_input_embeddings().weight
        assert tied == policy.causal_lm.config.tie_word_embeddings
        found = plan(tmp_path, "8GB", model__quantize=quantize, model__dtype="float32", model__lora=LoRAConfig(r=4).to_dict())
        assert part(found, "adapters") == 2 * sum(p.nbytes for p in policy.parameters())
