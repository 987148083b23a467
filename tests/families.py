"""Small configs of the model families that users bring, with short windows and limits"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llamagym.models.tiny import tiny_tokenizer

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
GPT = dict(n_embd=64, n_layer=2, n_head=4, n_positions=512)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LOCAL_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
SLIDING = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16
)

# model type: config fields
FAMILIES: dict[str, dict] = {
    "llama": SIZES,
    "llama4_text": SIZES
    | LOCAL_EXPERTS
    | dict(
        head_dim=16,
        intermediate_size_mlp=96,
        attention_chunk_size=16,
        interleave_moe_layer_step=1,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    "qwen2": SIZES,
    "qwen3": SIZES | dict(head_dim=16),
    "qwen2_moe": SIZES | EXPERTS | dict(shared_expert_intermediate_size=32),
    "qwen3_moe": SIZES | EXPERTS | dict(head_dim=16),
    "qwen3_next": SIZES
    | EXPERTS
    | dict(
        head_dim=16,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "qwen3_5_text": SIZES
    | dict(
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "mixtral": SIZES | LOCAL_EXPERTS,
    "gpt_oss": SIZES | LOCAL_EXPERTS | dict(head_dim=16) | SLIDING,
    "olmoe": SIZES | EXPERTS,
    "granitemoe": SIZES | LOCAL_EXPERTS,
    "deepseek_v3": SIZES
    | LATENT
    | dict(
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
    ),
    "glm4_moe": SIZES
    | dict(
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "ernie4_5_moe": SIZES
    | dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_layer_start_index=1),
    "phimoe": SIZES | LOCAL_EXPERTS,
    "jetmoe": SIZES | LOCAL_EXPERTS | dict(kv_channels=16),
    "gemma": SIZES | dict(head_dim=16),
    "gemma2": SIZES | dict(head_dim=16, query_pre_attn_scalar=16) | SLIDING,
    "gemma3_text": SIZES | dict(head_dim=16, query_pre_attn_scalar=16) | SLIDING,
    "gemma3n_text": SIZES
    | SLIDING
    | dict(
        head_dim=16,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=None,
    ),
    "gemma4_text": SIZES
    | SLIDING
    | dict(head_dim=16, global_head_dim=16, hidden_size_per_layer_input=16),
    "mistral": SIZES | dict(sliding_window=16),
    "ministral": SIZES | SLIDING | dict(head_dim=16),
    "phi": SIZES,
    "phi3": SIZES,
    "phi3 longrope": SIZES
    | dict(
        original_max_position_embeddings=32,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=10000.0,
            factor=16.0,
            short_factor=[1.0] * 8,
            long_factor=[4.0] * 8,
            original_max_position_embeddings=32,
        ),
    ),
    "llama dynamic": SIZES
    | dict(
        max_position_embeddings=32,
        rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0),
    ),
    "smollm3": SIZES | dict(no_rope_layers=[1, 0]),
    "olmo": SIZES,
    "olmo2": SIZES,
    "olmo3": SIZES | SLIDING,
    "cohere": SIZES,
    "cohere2": SIZES | SLIDING | dict(head_dim=16),
    "glm": SIZES | dict(head_dim=16),
    "glm4": SIZES | dict(head_dim=16),
    "granite": SIZES,
    "stablelm": SIZES,
    "starcoder2": SIZES | dict(sliding_window=16),
    "nemotron": SIZES,
    "falcon": dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    "falcon alibi": dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=False
    ),
    "mpt": dict(d_model=64, n_layers=2, n_heads=4, max_seq_len=512),
    "bloom": dict(hidden_size=64, n_layer=2, n_head=4),
    "gptj": GPT | dict(rotary_dim=8),
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": dict(
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=512,
    ),
    "gpt_neox": SIZES,
    "opt": dict(
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
        max_position_embeddings=512,
    ),
    "xglm": dict(
        d_model=64, num_layers=2, attention_heads=4, ffn_dim=96, max_position_embeddings=512
    ),
    "mamba": dict(hidden_size=64, num_hidden_layers=2, state_size=8),
    "mamba2": dict(
        hidden_size=64,
        num_hidden_layers=2,
        state_size=8,
        head_dim=16,
        num_heads=8,
        expand=2,
        n_groups=1,
        chunk_size=8,
    ),
    "lfm2": SIZES | dict(layer_types=["conv", "full_attention"], block_multiple_of=16),
}


def family_config(name: str):
    "Return the small config of a family"
    tokenizer = tiny_tokenizer()
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return AutoConfig.for_model(name.split()[0], vocab_size=len(tokenizer), **ids, **FAMILIES[name])


def family_model(name: str, seed: int = 0) -> PreTrainedModel:
    "Build a small model of a family, with random weights large enough to tell positions apart"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(family_config(name), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.125)
    return model.eval()
