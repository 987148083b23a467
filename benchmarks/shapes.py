"Models with the shapes of published checkpoints and random weights, for benchmarks on a GPU."

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from llamagym.config import LoRAConfig
from llamagym.models.reference import add_lora
from llamagym.models.tiny import tiny_tokenizer

QWEN = dict(
    vocab_size=151936,
    max_position_embeddings=32768,
    rope_parameters=dict(rope_type="default", rope_theta=1e6),
)
LLAMA = dict(
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_parameters=dict(rope_type="default", rope_theta=5e5),
)
# as in the configurations of the published checkpoints: width, of the feed-forward layers, layers, heads, key heads, tied embeddings
SHAPES = {
    "qwen2.5-0.5b": (Qwen2Config, QWEN, 896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": (Qwen2Config, QWEN, 1536, 8960, 28, 12, 2, True),
    "qwen2.5-3b": (Qwen2Config, QWEN, 2048, 11008, 36, 16, 2, True),
    "qwen2.5-7b": (Qwen2Config, QWEN | dict(vocab_size=152064), 3584, 18944, 28, 28, 4, False),
    "llama-3.2-1b": (LlamaConfig, LLAMA | dict(head_dim=64), 2048, 8192, 16, 32, 8, True),
    "llama-3.2-3b": (LlamaConfig, LLAMA | dict(head_dim=128), 3072, 8192, 28, 24, 8, True),
    "llama-3.1-8b": (LlamaConfig, LLAMA, 4096, 14336, 32, 32, 8, False),
}


def config_of_shape(name: str) -> PretrainedConfig:
    "Return the configuration of a model with a real shape and the tiny tokenizer's special ids"
    kind, options, width, inner, layers, heads, key_heads, tied = SHAPES[name]
    tokenizer = tiny_tokenizer()
    return kind(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
                tie_word_embeddings=tied, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, **options)  # fmt: skip


def quantized(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    "Return the model with its linear layers in 4 bits, as loading a checkpoint makes them; the head is unchanged"
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is model.get_output_embeddings():
            continue
        parent, _, child = name.rpartition(".")
        small = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            module.bias is not None,
            dtype,
            compress_statistics=True,
            quant_type="nf4",
        )
        small.weight = bnb.nn.Params4bit(
            module.weight.data.cpu(),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=small,
        )
        small.bias = module.bias
        setattr(model.get_submodule(parent), child, small.to(model.device))
    model.is_quantized = model.is_loaded_in_4bit = True
    return model


def model_of(
    name: str, quantize: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> PeftModel:
    "Return a model with a real shape and random weights, on the GPU"
    config = config_of_shape(name)
    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.requires_grad_(False)
    if quantize == "nf4":
        model = quantized(model, dtype)
    return add_lora(model, LoRAConfig(r=16), seed)
