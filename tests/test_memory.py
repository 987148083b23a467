"""The memory planner's forecasts match measurements on the CPU, and its suggestions fit."""

import warnings

import httpx
import numpy as np
import pytest
import torch
from doubles import lake_agent
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig

from llamagym.algorithms.forward import FusedLogprobEntropyKL
from llamagym.algorithms.hidden_states import gradient_checkpointing
from llamagym.config import Config, LoRAConfig
from llamagym.inference.engine import Engine
from llamagym.inference.sampling import sample_tokens
from llamagym.models.policy import Policy
from llamagym.models.reference import add_lora
from llamagym.models.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokenizer
from llamagym.rollout import collect
from llamagym.training.memory_model import (
    ForwardMemoryModel,
    kv_cache_bytes,
    logits_bytes,
    weight_bytes,
)
from llamagym.training.memory_tracking import MemoryTracker, meta_model, parse_bytes
from llamagym.training.planner import CUDA_OVERHEAD_BYTES, plan

# Families with windowed attention; the forecast leaves out their masks.
WINDOWED = ("mistral", "gemma2", "gemma3")


def storage_bytes(tensors) -> int:
    """Return the bytes of tensors, shared storages counted once"""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def item_size(memory_plan, name: str) -> float:
    return next(item.size for item in memory_plan.items if item.name == name)


def lora_policy(family: str) -> Policy:
    return Policy(
        add_lora(tiny_model(family).requires_grad_(False), LoRAConfig(r=8)), tiny_tokenizer()
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_forecast_of_activations_matches_the_peak(family, checkpointing):
    """The forecast matches the peak of a forward and backward pass over two rows on the CPU"""
    policy, ids = lora_policy(family), torch.randint(100, (2, 200))
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    with gradient_checkpointing(policy, checkpointing), MemoryTracker() as tracker:
        hidden = policy.backbone(ids)
        hidden.backward(torch.ones_like(hidden))
    model = ForwardMemoryModel(tiny_config(family), torch.float32, LoRAConfig(r=8))
    forecast = model.forward(2, 200, True, checkpointing)
    assert forecast.peak == pytest.approx(tracker.peak, rel=0.12 if family in WINDOWED else 0.05)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "cohere"])
def test_memory_forecast_of_logits_matches_the_peak(family):
    policy = lora_policy(family)
    hidden, ref_hidden = torch.randn(2, 300, policy.hidden_size).unbind()
    hidden.requires_grad_()
    with MemoryTracker() as tracker:
        with torch.no_grad():
            reference = policy.logits(ref_hidden).log_softmax(-1)
        sum(
            FusedLogprobEntropyKL.apply(
                policy.logits(hidden), torch.zeros(300, dtype=torch.long), reference, 1.0
            )
        ).sum().backward()
    assert logits_bytes(
        ForwardMemoryModel(tiny_config(family), torch.float32, LoRAConfig(r=8)).policy(), 300
    ) == pytest.approx(tracker.peak, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_forecast_of_weights_is_exact(family):
    """The forecast is exact in float32, and in 4 bits with quantization tables"""
    config = tiny_config(family)
    meta = meta_model(config, torch.float32)
    model = tiny_model(family)
    assert weight_bytes(meta, None) == storage_bytes([*model.parameters(), *model.buffers()])
    pytest.importorskip("bitsandbytes")
    model = Policy.load(
        f"tiny:{family}", quantize="nf4", lora=LoRAConfig(r=8), device="cpu"
    ).causal_lm
    tensors = [
        t for name, t in [*model.named_parameters(), *model.named_buffers()] if "lora" not in name
    ]
    for state in [t.quant_state for t in tensors if getattr(t, "quant_state", None) is not None]:
        tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert weight_bytes(meta, "nf4") == storage_bytes(tensors)


@pytest.mark.parametrize("family", ["llama", "smollm", "qwen3", "mistral", "phi3", "cohere"])
def test_memory_forecast_of_the_kv_cache_matches_the_engine(family):
    """The forecast matches six conversations of 700 tokens, without headroom for reallocation"""
    policy = Policy(tiny_model(family), tiny_tokenizer())
    engine, prompts = (
        Engine(policy, {2}, Config().generate),
        [list(range(50 + i, 250 + i)) for i in range(6)],
    )
    for length in (200, 400, 668):
        engine.sample(
            [(p * 4)[:length] for p in prompts],
            [np.random.default_rng(i) for i in range(6)],
            conversation_ids=list(range(6)),
        )
    config = tiny_config(family)
    forecast = (
        kv_cache_bytes(config, torch.float32, 6, 700, cuda_graphs=False)
        * config.num_hidden_layers
        / (config.num_hidden_layers + 1)
    )
    assert forecast == pytest.approx(engine.nbytes, rel=0.1)


def test_memory_forecast_of_sampling_matches_the_peak():
    """The forecast counts distributions over the vocabulary, temporaries and 16-bit logits"""
    logits = torch.randn(16, 5000)
    with MemoryTracker() as tracker:
        sample_tokens(logits / 1.0, np.random.default_rng(0).random(16), np.zeros(16, dtype=bool))
    config = tiny_config("qwen2", vocab_size=5000)
    assert item_size(plan(config, "1GB", rollout__num_envs=16), "sampling") == pytest.approx(
        tracker.peak + 2 * logits.numel(), rel=0.15
    )


def test_memory_forecast_of_training_state_is_exact():
    """The forecast matches adapters, moments and gradients after an update"""
    agent = lake_agent(lora_policy("llama"), generate__max_new_tokens=4)
    agent.policy.set_reference()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent.learner.update(collect(agent, episodes=4, num_envs=4))
    adapters = [p for name, p in agent.policy.model.named_parameters() if "lora" in name]
    moments = [
        t
        for p in agent.policy.parameters()
        for t in agent.learner.optimizer.state[p].values()
        if t.dim()
    ]
    memory_plan = plan(
        "tiny",
        "1GB",
        model__quantize=None,
        model__lora=LoRAConfig(r=8).to_dict(),
        model__dtype="float32",
    )
    assert item_size(memory_plan, "adapters") == storage_bytes(adapters)
    assert item_size(memory_plan, "optimizer") == storage_bytes(moments)
    assert item_size(memory_plan, "gradients") == sum(p.nbytes for p in agent.policy.parameters())


def test_memory_plan_depends_on_its_options():
    """Environments count in the rollout and tokens in the update; suggestions fit and are needed"""
    model_config, options = (
        tiny_config("qwen2", hidden_size=256, num_hidden_layers=4),
        dict(turns=40, tokens=100, ppo__mini_batch_size=640),
    )
    memory_plan = plan(model_config, "2GB", **options)
    more_envs = memory_plan.with_options({"rollout.num_envs": 64})
    assert more_envs.size("rollout") > memory_plan.size("rollout") and more_envs.size(
        "update"
    ) == memory_plan.size("update")
    more_tokens = memory_plan.with_options({"ppo.token_budget": 64_000})
    assert more_tokens.size("update") > memory_plan.size("update") and more_tokens.size(
        "rollout"
    ) == memory_plan.size("rollout")
    # A step on a single episode has only one row in a micro-batch.
    assert memory_plan.with_options({"ppo.mini_batch_size": 40}).size("update") < memory_plan.size(
        "update"
    )
    assert memory_plan.with_options({"ppo.gradient_checkpointing": True}).size(
        "update"
    ) < memory_plan.size("update")
    changed = {"model.lora": None, "model.quantize": None}
    new_plan = plan(model_config, "2GB", model__lora=None, model__quantize=None, **options)
    assert memory_plan.with_options(changed).items == new_plan.items and item_size(
        new_plan, "gradients"
    ) == pytest.approx(item_size(new_plan, "weights"), rel=0.01)
    for gpu_bytes in np.linspace(CUDA_OVERHEAD_BYTES * 1.3, 3e9, 5):
        gpu_plan = plan(
            tiny_config("qwen2", hidden_size=256, num_hidden_layers=4),
            float(gpu_bytes),
            turns=40,
            tokens=100,
        )
        assert gpu_plan.fits == (gpu_plan.peak <= gpu_bytes) and gpu_plan.fits == (
            gpu_plan.suggestion == {}
        )
        if gpu_plan.suggestion is not None:
            assert gpu_plan.with_options(gpu_plan.suggestion).fits
        if gpu_plan.fits:
            assert gpu_plan.with_options({"rollout.num_envs": gpu_plan.max_envs}).fits
            assert (
                gpu_plan.max_envs == 1024
                or not gpu_plan.with_options({"rollout.num_envs": 2 * gpu_plan.max_envs}).fits
            )


def test_memory_plan_reads_a_config_folder(tmp_path):
    """A config file is sufficient"""
    tiny_config("gemma3").save_pretrained(tmp_path)
    assert plan(tmp_path, "8GB").items == plan(tiny_config("gemma3"), "8GB").items


@pytest.mark.parametrize("size", ["24", "GB", "-1GB", "0 GB", "nan", None, True, float("inf")])
def test_memory_bad_sizes_raise(size):
    with pytest.raises(ValueError, match="expected a"):
        parse_bytes(size)


def test_memory_bad_plan_arguments_raise(tmp_path):
    with pytest.raises(ValueError, match="turns=0: expected a whole number of at least 1"):
        plan("tiny", "1GB", turns=0)
    with pytest.raises(TypeError, match="model is a int; expected a hub name, a folder"):
        plan(7, "1GB")
    with pytest.raises(FileNotFoundError, match="nothing is not a folder; expected a checkpoint"):
        plan(tmp_path / "nothing", "1GB")
    with pytest.raises(
        ValueError, match="the configuration has no causal language-modeling head .vit."
    ):
        plan(AutoConfig.for_model("vit"), "1GB")
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match="is an encoder-decoder .t5.: expected a decoder-only causal language model",
    ):
        plan(tmp_path, "1GB")


def test_load_of_a_gated_model_suggests_the_login(monkeypatch):
    def raise_gated(**kwargs):
        response = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
        raise OSError("You are trying to access a gated repo.") from GatedRepoError(
            "403", response=response
        )

    monkeypatch.setattr(AutoConfig, "from_pretrained", raise_gated)
    for load in (lambda: Policy.load("somebody/gated"), lambda: plan("somebody/gated", "8GB")):
        with pytest.raises(
            OSError, match="somebody/gated is a gated model: ask for access .* `hf auth login`"
        ):
            load()


@pytest.mark.parametrize("name, bound", [("qwen2.5-0.5b", 0.25), ("qwen2.5-7b", 0.2)])
def test_qlora_base_weights_are_a_quarter_of_float32(name, bound):
    """Weights in 4 bits and embeddings in bfloat16, with the shapes of real models"""
    sizes = {
        "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
        "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
    }[name]
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size tie_word_embeddings".split()
    config = AutoConfig.for_model("qwen2", **dict(zip(names, sizes)))
    assert weight_bytes(meta_model(config, torch.bfloat16), "nf4") < bound * weight_bytes(
        meta_model(config, torch.float32), None
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_load_from_a_folder_works_like_a_hub_name(family, tmp_path):
    """A checkpoint written by transformers loads in float32 and in 4 bits, and can be planned

    Padding adds no embedding.
    """
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for quantize in (None, "nf4"):
        policy = Policy.load(tmp_path, quantize=quantize, lora=LoRAConfig(r=4), device="cpu")
        assert (
            policy.causal_lm.get_input_embeddings().num_embeddings == len(tokenizer)
            and policy.tokenizer.pad_token_id is not None
        )
        tied = (
            policy.causal_lm.get_output_embeddings().weight
            is policy.causal_lm.get_input_embeddings().weight
        )
        assert tied == policy.causal_lm.config.tie_word_embeddings
        memory_plan = plan(
            tmp_path,
            "8GB",
            model__quantize=quantize,
            model__dtype="float32",
            model__lora=LoRAConfig(r=4).to_dict(),
        )
        assert item_size(memory_plan, "adapters") == 2 * sum(p.nbytes for p in policy.parameters())
