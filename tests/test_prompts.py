"""Prompts by kind of model, guess_number against brute force, GGUF files, and misspelled names."""

import dataclasses
import importlib.util
import itertools
import pickle
from functools import lru_cache

import numpy as np
import pytest
import torch
from doubles import RANK, config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llamagym.models.loading
from llamagym.agent import Agent
from llamagym.agents.scored import ScoredAgent
from llamagym.envs.baselines import RandomAgent, ScriptedAgent, play
from llamagym.envs.check import check_env
from llamagym.envs.guess_number import (
    HINTS,
    Bisection,
    GuessNumber,
    format_guess,
    guess_number,
    guessing_returns,
)
from llamagym.envs.registry import TASKS, get_task
from llamagym.envs.toy_text import blackjack, cliff_walking, frozen_lake, taxi
from llamagym.models.loading import gguf_types
from llamagym.models.policy import Policy
from llamagym.models.tiny import tiny_config, tiny_tokenizer
from llamagym.rollout import collect
from llamagym.training.cloning import encode

READY = [blackjack, frozen_lake, cliff_walking, taxi, guess_number]


def other_policy(lora=None) -> Policy:
    """Return a policy of a model that is not the tiny one: any other checkpoint looks like this"""
    tokenizer = tiny_tokenizer()
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    return Policy(model, tokenizer)


# Prompts


@pytest.mark.parametrize("make", READY)
def test_prompts_of_ready_tasks(make):
    """The instruct prompt is longer than the terse one, and its examples are valid responses"""
    task = make()
    assert len(task.instruct_prompt) > len(task.system_prompt) > 0
    lines = [line for line in task.instruct_prompt.split("\n") if line.startswith("Action: ")]
    space = task.make().action_space
    actions = [task.extract_action(line) for line in lines]
    assert lines and all(space.contains(action) for action in actions)
    if make is not guess_number:  # each response is listed
        assert sorted(actions) == list(range(int(space.n)))
    assert "one line" in task.instruct_prompt
    assert pickle.loads(pickle.dumps(task)).instruct_prompt == task.instruct_prompt


@pytest.mark.parametrize("kind", [Agent, ScoredAgent])
def test_prompts_follow_the_policy(kind):
    task = blackjack()
    tiny, other = Policy.load("tiny", device="cpu"), other_policy()
    assert (tiny.pretrained, other.pretrained) == (False, True)
    for policy, instruct, expected in [
        (tiny, None, task.system_prompt),
        (other, None, task.instruct_prompt),
        (tiny, True, task.instruct_prompt),
        (other, False, task.system_prompt),
    ]:
        agent = kind.for_task(task, policy, config=config(), instruct=instruct)
        assert agent.get_system_prompt() == agent.bind().system_prompt == expected
        assert collect(agent, episodes=1)[0].system_prompt == expected
        own = dataclasses.replace(task, instruct_prompt=None)
        assert kind.for_task(own, policy, instruct=instruct).get_system_prompt() == (
            task.system_prompt
        )


@pytest.mark.parametrize(
    "options", [{}, dict(lora=RANK), dict(lora=RANK, quantize="nf4"), dict(dtype="bfloat16")]
)
def test_prompts_of_the_tiny_model_stay_after_saving(options, tmp_path):
    """A tiny policy stays one in every type, saved and loaded, and merged"""
    policy = Policy.load("tiny:qwen2", device="cpu", **options)
    assert not policy.pretrained
    assert not Policy.load(policy.save(tmp_path / "saved"), device="cpu").pretrained
    assert not Policy.load(policy.merge_and_save(tmp_path / "merged"), device="cpu").pretrained
    assert other_policy().save(tmp_path / "other")
    assert Policy.load(tmp_path / "other", device="cpu").pretrained


def test_prompts_of_transcripts_are_the_agents_own():
    """Transcripts of either prompt of the task are encoded with the one the agent acts with"""
    task, policy = blackjack(), other_policy()
    for instruct in (False, True):
        agent = Agent.for_task(task, policy, config=config(), instruct=instruct)
        for played in (task, agent.bind(), dataclasses.replace(task, system_prompt="Cards.")):
            transcript = play(played, RandomAgent(played), 1)[0]
            expected = agent.get_system_prompt()
            if played.system_prompt == "Cards.":  # a prompt of another task stays
                expected = "Cards."
            assert encode(agent, transcript).system_prompt == expected


def test_prompts_that_are_no_text_raise():
    with pytest.raises(TypeError, match="instruct_prompt=3: expected text or None"):
        dataclasses.replace(blackjack(), instruct_prompt=3)


# guess_number


def brute_force(size: int, turns: int, allowed) -> float:
    """Return the success rate of uniform guesses among `allowed(untried, low, high)`

    Every number and every sequence of guesses is followed.
    """

    def rate(number: int, tried: frozenset, low: int, high: int, left: int) -> float:
        if left == 0:
            return 0.0
        guesses = allowed([n for n in range(size) if n not in tried], low, high)
        total = 0.0
        for guess in guesses:
            if guess == number:
                total += 1
            else:
                bounds = (max(low, guess + 1), high) if guess < number else (low, guess - 1)
                total += rate(number, tried | {guess}, *bounds, left - 1)
        return total / len(guesses) if guesses else 0.0

    return sum(rate(n, frozenset(), 0, size - 1, turns) for n in range(size)) / size


@lru_cache(None)
def best_count(low: int, high: int, turns: int) -> int:
    """Return how many numbers from `low` to `high` the best strategy finds"""
    if low > high or turns == 0:
        return 0
    return 1 + max(
        best_count(low, guess - 1, turns - 1) + best_count(guess + 1, high, turns - 1)
        for guess in range(low, high + 1)
    )


@pytest.mark.parametrize("size, turns", [(1, 1), (2, 1), (3, 2), (5, 3), (6, 4), (4, 6)])
def test_guess_number_returns_equal_brute_force(size, turns):
    returns = guessing_returns(size, turns)
    assert returns["random"] == pytest.approx(
        brute_force(size, turns, lambda untried, low, high: untried)
    )
    assert returns["random within the hints"] == pytest.approx(
        brute_force(size, turns, lambda untried, low, high: range(low, high + 1))
    )
    assert returns["optimal"] == pytest.approx(best_count(1, size, turns) / size)


@pytest.mark.parametrize("size, turns", [(15, 4), (15, 3), (50, 6), (50, 4), (100, 7)])
def test_guess_number_returns_of_larger_ranges(size, turns):
    returns = guessing_returns(size, turns)
    assert returns["random"] == pytest.approx(turns / size)
    assert returns["optimal"] == pytest.approx(min(1.0, (2**turns - 1) / size))
    assert returns["optimal"] == pytest.approx(best_count(1, size, turns) / size)
    assert returns["random"] < returns["random within the hints"] <= returns["optimal"]


def test_guess_number_bisection_is_optimal_for_every_number():
    for low, high, turns in [(1, 15, 4), (-3, 9, 3), (1, 50, 6)]:
        env, policy, found = GuessNumber(low, high, turns), Bisection(low, high), 0
        for number in range(low, high + 1):
            obs, _ = env.reset(seed=0)
            env.number, done = number, False
            while not done:
                obs, reward, done, _, _ = env.step(policy(obs))
            found += reward
        optimal = guess_number(low, high, turns).reference_returns["optimal"]
        assert found / (high - low + 1) == pytest.approx(optimal)


def test_guess_number_random_play():
    task = guess_number(1, 15, 4)
    games = play(task, RandomAgent(task), episodes=1500)
    success = np.mean([task.success(game) for game in games])
    error = np.sqrt(success * (1 - success) / len(games))
    assert task.reference_returns["random"] == pytest.approx(4 / 15)
    assert abs(success - 4 / 15) < 4 * error
    assert success == np.mean([game.total_reward for game in games])


def test_guess_number_hints_and_legal_actions():
    env = GuessNumber(1, 15, 4)
    for seed, guesses in itertools.product(range(5), ([3, 9, 12, 1], [8, 4, 2, 6])):
        env.reset(seed=seed)
        legal = set(range(1, 16))
        for guess in guesses:
            obs, reward, terminated, truncated, info = env.step(guess)
            legal -= {guess}
            assert env.observation_space.contains(obs) and not truncated
            assert set((np.flatnonzero(info["action_mask"]) + 1).tolist()) == legal
            assert reward == (guess == env.number)
            assert HINTS[obs[1]] == (
                "right" if guess == env.number else "higher" if env.number > guess else "lower"
            )
            if terminated:
                break
        assert terminated and (env.left == 0 or guess == env.number)
    assert format_guess((0, 0, 4)) == "Guess the number. 4 turns left."
    assert format_guess((8, 1, 1)) == "The number is higher than 8. 1 turn left."
    assert format_guess((8, 2, 3)) == "The number is lower than 8. 3 turns left."


def test_guess_number_is_a_ready_task():
    report = check_env(guess_number(1, 15, 4), episodes=10)
    assert report.ok, str(report)
    assert "GuessNumber-v1" in TASKS
    task = get_task("GuessNumber-v1")
    assert task.reference_returns == guess_number().reference_returns
    small = get_task(task.make().spec.id) if task.make().spec else guess_number()
    assert small.success is task.success
    env = GuessNumber(3, 9, 2)
    assert guess_number(env=env).reference_returns == guessing_returns(7, 2)
    assert pickle.loads(pickle.dumps(guess_number(1, 9))).system_prompt
    games = play(task, ScriptedAgent(task, Bisection()), episodes=20)
    assert all(map(task.success, games))  # 50 < 2⁶


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(low=5, high=4), ValueError, "low=5 and high=4"),
        (dict(turns=0), ValueError, "turns=0"),
        (dict(high=7.5), TypeError, "high=7.5"),
    ],
)
def test_guess_number_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        guess_number(**arguments)


# Names


@pytest.fixture
def offline(monkeypatch):
    """Fail if anything is read with transformers"""

    def read(*args, **kwargs):
        raise AssertionError("the network was tried")

    monkeypatch.setattr(llamagym.models.loading.AutoConfig, "from_pretrained", read)


@pytest.mark.parametrize(
    "name, suggestion",
    [
        ("tinny", "tiny"),
        ("Tiny", "tiny"),
        ("tin", "tiny"),
        ("tiny:lama", "tiny:llama"),
        ("tinny:qwen", "tiny:qwen[23]"),
        ("TINY:llama", "tiny:llama"),
    ],
)
def test_names_near_tiny_are_suggested(name, suggestion, offline):
    with pytest.raises(ValueError, match=rf"did you mean '{suggestion}'\?"):
        Policy.load(name)


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2", "org/tinny", "tiny-llama", "TinyLlama"])
def test_names_of_other_models_reach_the_hub(name, offline):
    with pytest.raises(AssertionError, match="the network was tried"):
        Policy.load(name)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("blackjack", "Blackjack-v1"),
        ("blackjak", "Blackjack-v1"),
        ("Blackjak-v1", "Blackjack-v1"),
        ("frozen_lake", "FrozenLake-v1"),
        ("frozenlake", "FrozenLake-v1"),
        ("FrozenLake8x8", "FrozenLake8x8-v1"),
        ("guess_number", "GuessNumber-v1"),
        ("GuessNumber-v0", "GuessNumber-v1"),
        ("guess_nunber", "GuessNumber-v1"),
        ("cliff_walking", "CliffWalking-v1"),
        ("taxi", "Taxi-v4"),
    ],
)
def test_names_of_tasks_are_suggested(name, expected):
    with pytest.raises(ValueError, match=f"did you mean '{expected}'"):
        get_task(name)


# GGUF

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="gguf is not installed (extra 'gguf')"
)
NAMES = {  # of a layer's weights, here and in llama.cpp
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return query or key rows in llama.cpp's order, which interleaves the halves of a head"""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, model: LlamaForCausalLM, quantization: str = "F32") -> None:
    """Write a Llama model and a byte-level tokenizer as llama.cpp would"""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", "hi", "Ac", *map(chr, range(33, 127))]
    tokens += [chr(256 + i) for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h i", "A c"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.role + m.content }}</s>{% endfor %}")
    state = model.state_dict()
    written = {
        "token_embd": state["model.embed_tokens.weight"],
        "output_norm": state["model.norm.weight"],
        "output": state["lm_head.weight"],
    }
    for layer, (ours, theirs) in itertools.product(range(config.num_hidden_layers), NAMES.items()):
        weight = state[f"model.layers.{layer}.{ours}.weight"]
        if ours.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads
            weight = permuted(weight, heads if "q_proj" in ours else config.num_key_value_heads)
        written[f"blk.{layer}.{theirs}"] = weight
    for name, weight in written.items():
        array = weight.detach().numpy().astype(np.float32)
        if quantization != "F32" and array.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantization]
            writer.add_tensor(f"{name}.weight", gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.tensor([[1, 7, 20, 33, 64, 5, 90, 11]])


@torch.no_grad()
def logits_of(policy: Policy) -> torch.Tensor:
    return policy.logits(policy.backbone(IDS.to(policy.device))[0])


@needs_gguf
@torch.no_grad()
def test_gguf_file_computes_what_its_weights_do(llama, tmp_path):
    """In float32 the logits equal the model's own; saved, loaded and merged, they stay"""
    write_gguf(tmp_path / "model.gguf", llama)
    assert set(gguf_types(tmp_path / "model.gguf")) == {"F32"}
    policy = Policy.load(tmp_path / "model.gguf", device="cpu", lora=RANK)
    assert policy.pretrained and "of model.gguf" in repr(policy)
    expected = llama(IDS).logits[0]
    assert torch.allclose(logits_of(policy), expected, atol=1e-4)
    assert policy.tokenizer.chat_template and policy.tokenizer.eos_token_id == 2
    with torch.no_grad():
        for number, p in enumerate(policy.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    changed = logits_of(policy)
    assert not torch.allclose(changed, expected, atol=1e-2)
    loaded = Policy.load(policy.save(tmp_path / "saved"), device="cpu")
    assert torch.equal(logits_of(loaded), changed)
    merged = AutoModelForCausalLM.from_pretrained(policy.merge_and_save(tmp_path / "merged"))
    assert torch.allclose(merged(IDS).logits[0], changed, atol=1e-4)


@needs_gguf
@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_0"])
@torch.no_grad()
def test_gguf_file_of_quantized_weights_is_dequantized(llama, quantization, tmp_path):
    """Logits equal those of a model with the weights that gguf itself dequantizes"""
    import gguf

    write_gguf(tmp_path / "model.gguf", llama, quantization)
    assert list(gguf_types(tmp_path / "model.gguf")) == [quantization, "F32"]
    rounded = LlamaForCausalLM(llama.config).eval()
    kind = gguf.GGMLQuantizationType[quantization]
    state = {
        name: torch.tensor(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
        if weight.ndim == 2
        else weight
        for name, weight in llama.state_dict().items()
    }
    rounded.load_state_dict(state)
    policy = Policy.load(str(tmp_path / "model.gguf"), device="cpu")
    assert torch.allclose(logits_of(policy), rounded(IDS).logits[0], atol=1e-4)
    half = Policy.load(
        str(tmp_path / "model.gguf"), device="cpu", dtype="bfloat16", lora=RANK
    ).causal_lm
    weight = half.model.layers[1].mlp.down_proj.base_layer.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, state["model.layers.1.mlp.down_proj.weight"].bfloat16())


@needs_gguf
def test_gguf_file_in_nf4(llama, tmp_path):
    """Quantized again, it is what the same weights are when they come from a folder"""
    pytest.importorskip("bitsandbytes")
    write_gguf(tmp_path / "model.gguf", llama)
    options = dict(quantize="nf4", lora=RANK, device="cpu")
    policy = Policy.load(tmp_path / "model.gguf", **options)
    llama.save_pretrained(tmp_path / "folder")
    policy.tokenizer.save_pretrained(tmp_path / "folder")
    assert torch.equal(logits_of(policy), logits_of(Policy.load(tmp_path / "folder", **options)))
    loaded = Policy.load(policy.save(tmp_path / "saved"), device="cpu")
    assert torch.equal(logits_of(loaded), logits_of(policy))


def test_gguf_file_that_is_missing_or_something_else_raises(tmp_path, offline):
    with pytest.raises(FileNotFoundError, match="expected a GGUF file on this machine"):
        Policy.load(tmp_path / "model.gguf")
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(ValueError, match="is no GGUF file: it starts with b'<htm'"):
        Policy.load(tmp_path / "page.gguf")


@pytest.mark.skipif(importlib.util.find_spec("gguf") is not None, reason="gguf is installed")
def test_gguf_file_without_the_extra_raises(tmp_path, offline):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ImportError, match="the extra 'gguf'"):
        Policy.load(tmp_path / "model.gguf")


@needs_gguf
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_gguf_file_that_is_cut_raises(llama, kept, tmp_path):
    write_gguf(tmp_path / "model.gguf", llama)
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="cut.gguf is damaged or incomplete"):
        Policy.load(tmp_path / "cut.gguf")


def test_tiny_config_is_marked():
    assert tiny_config().llamagym_tiny
