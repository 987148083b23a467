"""Sampling with the KV cache equals sampling without it, also after eviction, moves and interrupts."""

import logging

import numpy as np
import pytest
import torch
from doubles import KINDS, lake_agent, make_policy, perturb, random_rows, windows
from transformers import AutoModelForCausalLM, MambaConfig

import llamagym.inference.kv_cache
from llamagym.config import GenerateConfig
from llamagym.inference.engine import Engine
from llamagym.inference.kv_cache import (
    SlotKVCache,
    cache_unsupported_reason,
    causal_masks,
    forward_with_cache,
)
from llamagym.models.policy import Policy
from llamagym.models.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokenizer
from llamagym.rollout import collect

STOPS = {2}


def engine_of(policy: Policy, **options) -> Engine:
    return Engine(policy, STOPS, GenerateConfig(max_new_tokens=6, temperature=0.8), **options)


def policy_of(family: str, **overrides) -> Policy:
    return Policy(tiny_model(family, **overrides), tiny_tokenizer())


@pytest.mark.parametrize("layers", [None, 24])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "phi3", "gemma2"])
def test_cache_check_accepts_rounding_and_detects_a_wrong_mask(family, layers, monkeypatch):
    """The check of the cache accepts bfloat16 rounding and detects a mask that hides one position"""

    def model():
        return tiny_model(family, **({} if layers is None else dict(num_hidden_layers=layers))).to(
            torch.bfloat16
        )

    def masks_hiding_a_position(*args):
        masks = causal_masks(*args)
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            mask[..., 2:3] = -torch.inf
        return masks

    assert cache_unsupported_reason(model()) is None
    monkeypatch.setattr(llamagym.inference.kv_cache, "causal_masks", masks_hiding_a_position)
    assert "with and without the cache differ by" in cache_unsupported_reason(model())


class Conversation:
    """A conversation of random observations that depend only on its number"""

    def __init__(self, number: int, lengths: list[int], vocabulary: int):
        generator = torch.Generator().manual_seed(number)
        self.observations = [
            torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths
        ]
        self.stream, self.ids, self.samples = (
            np.random.default_rng(number),
            [1, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29],
            [],
        )

    @property
    def over(self) -> bool:
        return len(self.samples) == len(self.observations)

    def next_prompt(self) -> list[int]:
        self.ids = self.ids + self.observations[len(self.samples)]
        return self.ids

    def add_response(self, sample) -> None:
        self.samples.append(sample)
        self.ids = self.ids + sample.ids


def make_conversations(count: int, vocabulary: int, turns: int = 4) -> list[Conversation]:
    lengths = np.random.default_rng(0).integers(1, 30, (count, turns)).tolist()
    return [Conversation(i, lengths[i], vocabulary) for i in range(count)]


def replay_without_cache(policy: Policy, conversation: Conversation, greedy: bool) -> Conversation:
    """Replay a conversation with a new engine, hence an empty cache, for each prompt"""
    replayed = Conversation(0, [], policy.causal_lm.config.vocab_size)
    replayed.observations, replayed.stream = (
        conversation.observations,
        np.random.default_rng(int(conversation.number)),
    )
    while not replayed.over:
        (sample,) = engine_of(policy).sample(
            [replayed.next_prompt()], [replayed.stream], greedy=greedy
        )
        replayed.add_response(sample)
    return replayed


def check_same_samples(cached: Conversation, replayed: Conversation) -> None:
    assert [s.ids for s in cached.samples] == [s.ids for s in replayed.samples]
    for a, b in zip(cached.samples, replayed.samples):
        assert (
            np.abs(a.logprobs - b.logprobs).max() < 1e-4
            and np.abs(a.entropy - b.entropy).max() < 1e-3
            and a.stopped == b.stopped
        )


@pytest.mark.parametrize(("family", "window"), windows(FAMILIES))
def test_cache_greedy_samples_equal_those_without_cache(family, window):
    """Greedy samples equal those without a cache, for each family, within and beyond the attention window"""
    config = tiny_config(family)
    policy = policy_of(family, **({} if window is None else dict(sliding_window=window)))
    assert cache_unsupported_reason(policy.causal_lm) is None
    conversations, engine = make_conversations(5, config.vocab_size), engine_of(policy)
    for _ in range(4):
        for conversation, sample in zip(
            conversations,
            engine.sample(
                [t.next_prompt() for t in conversations],
                [None] * 5,
                greedy=True,
                conversation_ids=conversations,
            ),
        ):
            conversation.add_response(sample)
    assert max(len(t.ids) for t in conversations) > 64
    for number, conversation in enumerate(conversations):
        conversation.number = number
        check_same_samples(conversation, replay_without_cache(policy, conversation, greedy=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_idle", [1, 64])
def test_cache_samples_do_not_depend_on_order_or_eviction(kind, max_idle):
    """Conversations submitted in random order, some evicted in between, are sampled as each would be alone"""
    policy = make_policy(kind)
    order, conversations = (
        np.random.default_rng(1),
        make_conversations(9, policy.causal_lm.config.vocab_size),
    )
    engine, pending = engine_of(policy, max_idle=max_idle), {}
    for number, conversation in enumerate(conversations):
        conversation.number = number
    while any(not t.over for t in conversations):
        for conversation in conversations:
            if conversation not in pending and not conversation.over and order.random() < 0.3:
                pending[conversation] = engine.submit(
                    conversation.next_prompt(),
                    conversation.stream,
                    conversation_id=conversation if order.random() < 0.8 else None,
                )
        engine.step()
        for conversation in [t for t, request in pending.items() if request.sample is not None]:
            conversation.add_response(pending.pop(conversation).sample)
    assert not engine.busy and len(engine.scheduler.slots.sequences) <= 9 + max_idle
    for conversation in conversations:
        check_same_samples(conversation, replay_without_cache(policy, conversation, greedy=False))


def test_cache_prefills_new_tokens_only():
    """Each of 40 turns prefills its observation and the last sampled token only"""
    policy, engine = policy_of("llama", max_position_embeddings=4096), None
    engine = Engine(policy, (), GenerateConfig(max_new_tokens=5))
    conversation, step_stats = Conversation(0, [12] * 40, 800), []
    while not conversation.over:
        before = engine.stats.copy()
        (sample,) = engine.sample(
            [conversation.next_prompt()], [conversation.stream], conversation_ids=[conversation]
        )
        conversation.add_response(sample)
        step_stats.append(engine.stats - before)
    assert {c.prefill_tokens for c in step_stats[1:]} == {13} and {
        c.sampled_tokens for c in step_stats
    } == {5}
    assert step_stats[0].prefill_tokens == 11 + 12 and len(conversation.ids) == 11 + 40 * 17


def test_cache_prefills_from_the_first_changed_token():
    """A changed prompt is prefilled from its first changed token"""
    policy = policy_of("llama")
    engine, prompt = engine_of(policy), list(range(1, 60))
    engine.sample([prompt], [None], greedy=True, conversation_ids=["a"])
    changed = prompt[:40] + [7] + prompt[41:] + [8, 9]
    before = engine.stats.prefill_tokens
    (cached,) = engine.sample([changed], [None], greedy=True, conversation_ids=["a"])
    assert engine.stats.prefill_tokens - before == len(changed) - 40
    (replayed,) = engine_of(policy).sample([changed], [None], greedy=True)
    assert cached.ids == replayed.ids


def test_cache_prefills_a_shared_prefix_once():
    policy = policy_of("llama")
    engine, system = engine_of(policy), list(range(30, 70))
    prompts = [system + [i, i + 1, i + 2] for i in range(100, 108)]
    together = engine.sample(prompts, [None] * 8, greedy=True)
    assert engine.stats.prefill_tokens == 40 + 8 * 3 and engine.stats.prefix_hit_tokens == 8 * 40
    for prompt, sample in zip(prompts, together):
        assert sample.ids == engine_of(policy).sample([prompt], [None], greedy=True)[0].ids
    before = engine.stats.prefill_tokens
    engine.sample([system + [200, 201]], [None], greedy=True)  # a later prompt reuses the prefix
    assert engine.stats.prefill_tokens - before == 2


@pytest.mark.parametrize("change", ["learn", "noise", "restore", "bump_version", "evict"])
def test_cache_is_invalidated_when_the_weights_change(change, tmp_path):
    agent = lake_agent(make_policy("lora"))
    policy = agent.policy
    policy.save(tmp_path / "before")
    episodes = collect(agent, episodes=3, num_envs=3)
    perturb(policy.parameters(), 0.1, seed=1)
    engine, conversation = (
        engine_of(policy),
        make_conversations(1, policy.causal_lm.config.vocab_size)[0],
    )
    conversation.number = 0
    for _ in range(2):
        conversation.add_response(
            engine.sample(
                [conversation.next_prompt()], [conversation.stream], conversation_ids=[conversation]
            )[0]
        )
    before = engine.stats.prefill_tokens
    {"learn": lambda: agent.learner.update(episodes), "noise": lambda: perturb(policy.parameters(), 0.1, seed=2), "bump_version": policy.bump_version,
     "restore": lambda: policy.restore(tmp_path / "before"), "evict": engine.evict}[change]()  # fmt: skip
    stream = np.random.default_rng(5)
    prompt = conversation.next_prompt()
    (sample,) = engine.sample([prompt], [stream], conversation_ids=[conversation])
    assert engine.stats.prefill_tokens - before == len(prompt)
    (replayed,) = engine_of(policy).sample([prompt], [np.random.default_rng(5)])
    assert sample.ids == replayed.ids and np.abs(sample.logprobs - replayed.logprobs).max() < 1e-4


def test_cache_is_usable_after_an_interrupt():
    policy = policy_of("llama")
    engine, prompt = engine_of(policy), [1, 20, 21, 22]
    (expected,) = engine.sample([prompt], [None], greedy=True)
    embeddings = policy.causal_lm.get_input_embeddings()
    embeddings.forward = lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.sample([prompt + [30]], [None], greedy=True, conversation_ids=["a"])
    del embeddings.forward
    assert not engine.busy and engine.sample([prompt], [None], greedy=True)[0].ids == expected.ids


def test_cache_evict_frees_its_memory():
    policy = policy_of("llama")
    engine = engine_of(policy)
    engine.sample([[1, 20, 30]] * 3, [None] * 3, greedy=True)
    assert engine.nbytes >= 3 * 9 * policy.causal_lm.config.num_hidden_layers * 2 * 64 * 4
    engine.evict()
    assert engine.nbytes == 0


def test_cache_second_request_of_a_conversation_in_progress_raises():
    engine = engine_of(policy_of("llama"))
    engine.submit([1, 20], None, greedy=True, conversation_id="a")
    engine.step()
    with pytest.raises(
        ValueError,
        match="a response of conversation 'a' is in progress already; a conversation has one turn at a time",
    ):
        engine.submit([1, 20], None, greedy=True, conversation_id="a")


def test_cache_masks_match_transformers():
    """Hidden states with our masks equal those with transformers' masks, for rows of equal length"""
    for family in ("mistral", "gemma3"):
        model = tiny_model(family, sliding_window=5)
        (ids,) = random_rows(model.config.vocab_size, [12])
        whole = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        cache = SlotKVCache(model.config.num_hidden_layers)
        forward_with_cache(model, cache, torch.tensor([ids[:7]]), 0, np.array([0]))
        rest = forward_with_cache(model, cache, torch.tensor([ids[7:]]), 0, np.array([7]))
        assert (rest - whole[:, 7:]).abs().max() < 1e-5
    masks = causal_masks(
        tiny_model("gemma3", sliding_window=5).config, torch.arange(12)[None], 12, torch.float32
    )
    seen = {name: (mask[0, 0] == 0).sum(-1).tolist() for name, mask in masks.items()}
    assert seen == dict(full_attention=list(range(1, 13)), sliding_attention=[1, 2, 3, 4] + [5] * 8)


def test_cache_is_disabled_for_unsupported_models(caplog):
    """Recurrent models and dynamic RoPE warn once and sample from the whole prompt"""
    tokenizer = tiny_tokenizer()
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            pad_token_id=0,
            eos_token_id=2,
        )
    )
    stretched = tiny_model(
        "llama", rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    )
    for model, why in ((mamba, "linear_attention"), (stretched, "rotary frequencies change")):
        policy = Policy(model.eval(), tokenizer)
        prompts = random_rows(len(tokenizer), (9, 5, 9))
        with caplog.at_level(logging.WARNING, logger="llamagym.inference.kv_cache"):
            caplog.clear()
            engine = engine_of(policy)
            samples = engine.sample(
                prompts,
                [np.random.default_rng(i) for i in range(3)],
                conversation_ids=["a", "b", "c"],
            )
            engine.sample(prompts, [None] * 3, greedy=True)
        messages = [r.message for r in caplog.records if r.name == "llamagym.inference.kv_cache"]
        assert messages == [
            f"{type(model).__name__} recomputes the whole conversation at each turn: {cache_unsupported_reason(model)}"
        ]
        assert why in caplog.text
        for prompt, sample in zip(prompts, samples):
            with torch.no_grad():
                dist = (
                    model(input_ids=torch.tensor([prompt + sample.ids]), use_cache=False).logits[0]
                    / 0.8
                ).log_softmax(-1)[len(prompt) - 1 : -1]
            assert (
                np.abs(
                    sample.logprobs - dist[torch.arange(len(sample.ids)), sample.ids].numpy()
                ).max()
                < 1e-4
            )
            assert sample.stopped == (sample.ids[-1] in STOPS) and (
                len(sample.ids) == 6 or sample.stopped
            )
