"""Keys and values that are kept from turn to turn: whatever is kept, moved, evicted or read again, the same comes out."""

import logging

import numpy as np
import pytest
import torch
from doubles import KINDS, lake_agent, make_policy, random_rows, shake, windows
from transformers import AutoModelForCausalLM, MambaConfig

import llamagym.cache
from llamagym.cache import SlotCache, attention_masks, forward, why_not_kept
from llamagym.config import GenerateConfig
from llamagym.engine import Engine
from llamagym.policy import Policy
from llamagym.rollout import collect
from llamagym.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokenizer

STOPS = {2}


def engine_of(policy: Policy, **options) -> Engine:
    return Engine(policy, STOPS, GenerateConfig(max_new_tokens=6, temperature=0.8), **options)


def policy_of(family: str, **overrides) -> Policy:
    return Policy(tiny_model(family, **overrides), tiny_tokenizer())


@pytest.mark.parametrize("layers", [None, 24])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "phi3", "gemma2"])
def test_cache_tells_rounding_from_a_mistake(family, layers, monkeypatch):
    """In bfloat16, of many layers too: what is kept is trusted, a single position out of sight is noticed"""

    def model():
        return tiny_model(family, **({} if layers is None else dict(num_hidden_layers=layers))).to(torch.bfloat16)

    def forgetful(*args):
        masks = attention_masks(*args)
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            mask[..., 2:3] = -torch.inf
        return masks

    assert why_not_kept(model()) is None
    monkeypatch.setattr(llamagym.cache, "attention_masks", forgetful)
    assert "lie apart" in why_not_kept(model())


class Talk:
    """A conversation of random observations; what it is told depends on its number alone"""

    def __init__(self, number: int, lengths: list[int], vocabulary: int):
        generator = torch.Generator().manual_seed(number)
        self.observations = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
        self.stream, self.ids, self.samples = np.random.default_rng(number), [1, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29], []

    @property
    def over(self) -> bool:
        return len(self.samples) == len(self.observations)

    def ask(self) -> list[int]:
        self.ids = self.ids + self.observations[len(self.samples)]
        return self.ids

    def answer(self, sample) -> None:
        self.samples.append(sample)
        self.ids = self.ids + sample.ids


def talks(count: int, vocabulary: int, turns: int = 4) -> list[Talk]:
    lengths = np.random.default_rng(0).integers(1, 30, (count, turns)).tolist()
    return [Talk(i, lengths[i], vocabulary) for i in range(count)]


def reread(policy: Policy, talk: Talk, greedy: bool) -> Talk:
    """The same conversation, each prompt read as a whole by an engine that keeps nothing"""
    again = Talk(0, [], policy.causal_lm.config.vocab_size)
    again.observations, again.stream = talk.observations, np.random.default_rng(int(talk.number))
    while not again.over:
        (sample,) = engine_of(policy).sample([again.ask()], [again.stream], greedy=greedy)
        again.answer(sample)
    return again


def same(kept: Talk, again: Talk) -> None:
    assert [s.ids for s in kept.samples] == [s.ids for s in again.samples]
    for a, b in zip(kept.samples, again.samples):
        assert np.abs(a.logprobs - b.logprobs).max() < 1e-4 and np.abs(a.entropy - b.entropy).max() < 1e-3 and a.stopped == b.stopped


@pytest.mark.parametrize(("family", "window"), windows(FAMILIES))
def test_cache_gives_what_reading_again_gives(family, window):
    """Greedy, for each architecture, in contexts beyond the attention window and within it"""
    config = tiny_config(family)
    policy = policy_of(family, **({} if window is None else dict(sliding_window=window)))
    assert why_not_kept(policy.causal_lm) is None
    conversations, engine = talks(5, config.vocab_size), engine_of(policy)
    for _ in range(4):
        for talk, sample in zip(conversations, engine.sample([t.ask() for t in conversations], [None] * 5, greedy=True, keys=conversations)):
            talk.answer(sample)
    assert max(len(t.ids) for t in conversations) > 64
    for number, talk in enumerate(conversations):
        talk.number = number
        same(talk, reread(policy, talk, greedy=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most_idle", [1, 64])
def test_cache_in_any_order(kind, most_idle):
    """Conversations that come and go at random, some kept, some evicted in between: sampled as each would be alone"""
    policy = make_policy(kind)
    order, conversations = np.random.default_rng(1), talks(9, policy.causal_lm.config.vocab_size)
    engine, asked = engine_of(policy, most_idle=most_idle), {}
    for number, talk in enumerate(conversations):
        talk.number = number
    while any(not t.over for t in conversations):
        for talk in conversations:
            if talk not in asked and not talk.over and order.random() < 0.3:
                asked[talk] = engine.submit(talk.ask(), talk.stream, key=talk if order.random() < 0.8 else None)
        engine.step()
        for talk in [t for t, request in asked.items() if request.sample is not None]:
            talk.answer(asked.pop(talk).sample)
    assert not engine.busy and len(engine.table.rows.rows) <= 9 + most_idle
    for talk in conversations:
        same(talk, reread(policy, talk, greedy=False))


def test_cache_reads_what_is_new_and_nothing_else():
    """Forty turns: each reads its observation, the token that the last response ended with, and its own response"""
    policy, engine = policy_of("llama", max_position_embeddings=4096), None
    engine = Engine(policy, (), GenerateConfig(max_new_tokens=5))
    talk, costs = Talk(0, [12] * 40, 800), []
    while not talk.over:
        before = engine.stats.copy()
        (sample,) = engine.sample([talk.ask()], [talk.stream], keys=[talk])
        talk.answer(sample)
        costs.append(engine.stats - before)
    assert {c.read_tokens for c in costs[1:]} == {13} and {c.spoken_tokens for c in costs} == {5}
    assert costs[0].read_tokens == 11 + 12 and len(talk.ids) == 11 + 40 * 17


def test_cache_of_a_conversation_that_was_rewritten():
    """What differs is read again, what is the same is not"""
    policy = policy_of("llama")
    engine, prompt = engine_of(policy), list(range(1, 60))
    engine.sample([prompt], [None], greedy=True, keys=["a"])
    changed = prompt[:40] + [7] + prompt[41:] + [8, 9]
    before = engine.stats.read_tokens
    (kept,) = engine.sample([changed], [None], greedy=True, keys=["a"])
    assert engine.stats.read_tokens - before == len(changed) - 40
    (again,) = engine_of(policy).sample([changed], [None], greedy=True)
    assert kept.ids == again.ids


def test_cache_shares_how_conversations_begin():
    policy = policy_of("llama")
    engine, system = engine_of(policy), list(range(30, 70))
    prompts = [system + [i, i + 1, i + 2] for i in range(100, 108)]
    together = engine.sample(prompts, [None] * 8, greedy=True)
    assert engine.stats.read_tokens == 40 + 8 * 3 and engine.stats.shared_tokens == 8 * 40
    for prompt, sample in zip(prompts, together):
        assert sample.ids == engine_of(policy).sample([prompt], [None], greedy=True)[0].ids
    before = engine.stats.read_tokens
    engine.sample([system + [200, 201]], [None], greedy=True)  # later ones find it there
    assert engine.stats.read_tokens - before == 2


@pytest.mark.parametrize("change", ["learn", "noise", "restore", "touch", "drop"])
def test_cache_does_not_outlive_its_weights(change, tmp_path):
    agent = lake_agent(make_policy("lora"))
    policy = agent.policy
    policy.save(tmp_path / "before")
    episodes = collect(agent, episodes=3, num_envs=3)
    shake(policy.parameters(), 0.1, seed=1)
    engine, talk = engine_of(policy), talks(1, policy.causal_lm.config.vocab_size)[0]
    talk.number = 0
    for _ in range(2):
        talk.answer(engine.sample([talk.ask()], [talk.stream], keys=[talk])[0])
    before = engine.stats.read_tokens
    {"learn": lambda: agent.learner.learn(episodes), "noise": lambda: shake(policy.parameters(), 0.1, seed=2), "touch": policy.touch,
     "restore": lambda: policy.restore(tmp_path / "before"), "drop": engine.drop}[change]()  # fmt: skip
    stream = np.random.default_rng(5)
    prompt = talk.ask()
    (sample,) = engine.sample([prompt], [stream], keys=[talk])
    assert engine.stats.read_tokens - before == len(prompt)
    (again,) = engine_of(policy).sample([prompt], [np.random.default_rng(5)])
    assert sample.ids == again.ids and np.abs(sample.logprobs - again.logprobs).max() < 1e-4


def test_cache_survives_an_interrupt():
    policy = policy_of("llama")
    engine, prompt = engine_of(policy), [1, 20, 21, 22]
    (expected,) = engine.sample([prompt], [None], greedy=True)
    embeddings = policy.causal_lm.get_input_embeddings()
    embeddings.forward = lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.sample([prompt + [30]], [None], greedy=True, keys=["a"])
    del embeddings.forward
    assert not engine.busy and engine.sample([prompt], [None], greedy=True)[0].ids == expected.ids


def test_cache_gives_its_memory_back():
    policy = policy_of("llama")
    engine = engine_of(policy)
    engine.sample([[1, 20, 30]] * 3, [None] * 3, greedy=True)
    assert engine.nbytes >= 3 * 9 * policy.causal_lm.config.num_hidden_layers * 2 * 64 * 4
    engine.drop()
    assert engine.nbytes == 0


def test_cache_one_turn_at_a_time():
    engine = engine_of(policy_of("llama"))
    engine.submit([1, 20], None, greedy=True, key="a")
    engine.step()
    with pytest.raises(ValueError, match="'a' is being answered already; a conversation has one turn at a time"):
        engine.submit([1, 20], None, greedy=True, key="a")


def test_cache_masks_are_those_of_the_model():
    """Against transformers' own, for rows that are as long as each other"""
    for family in ("mistral", "gemma3"):
        model = tiny_model(family, sliding_window=5)
        (ids,) = random_rows(model.config.vocab_size, [12])
        whole = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        cache = SlotCache(model.config.num_hidden_layers)
        forward(model, cache, torch.tensor([ids[:7]]), 0, np.array([0]))
        rest = forward(model, cache, torch.tensor([ids[7:]]), 0, np.array([7]))
        assert (rest - whole[:, 7:]).abs().max() < 1e-5
    masks = attention_masks(tiny_model("gemma3", sliding_window=5).config, torch.arange(12)[None], 12, torch.float32)
    seen = {name: (mask[0, 0] == 0).sum(-1).tolist() for name, mask in masks.items()}
    assert seen == dict(full_attention=list(range(1, 13)), sliding_attention=[1, 2, 3, 4] + [5] * 8)


def test_cache_is_refused_where_it_would_be_wrong(caplog):
    """A recurrent state, and frequencies that change with the length: said once, and answered from the whole prompt"""
    tokenizer = tiny_tokenizer()
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, pad_token_id=0, eos_token_id=2))
    stretched = tiny_model("llama", rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4))
    for model, why in ((mamba, "linear_attention"), (stretched, "rotary frequencies change")):
        policy = Policy(model.eval(), tokenizer)
        prompts = random_rows(len(tokenizer), (9, 5, 9))
        with caplog.at_level(logging.WARNING, logger="llamagym.cache"):
            caplog.clear()
            engine = engine_of(policy)
            samples = engine.sample(prompts, [np.random.default_rng(i) for i in range(3)], keys=["a", "b", "c"])
            engine.sample(prompts, [None] * 3, greedy=True)
        said = [r.message for r in caplog.records if r.name == "llamagym.cache"]
        assert said == [f"{type(model).__name__} reads the whole conversation again at each turn: {why_not_kept(model)}"]
        assert why in caplog.text
        for prompt, sample in zip(prompts, samples):
            with torch.no_grad():
                dist = (model(input_ids=torch.tensor([prompt + sample.ids]), use_cache=False).logits[0] / 0.8).log_softmax(-1)[len(prompt) - 1 : -1]
            assert np.abs(sample.logprobs - dist[torch.arange(len(sample.ids)), sample.ids].numpy()).max() < 1e-4
            assert sample.stopped == (sample.ids[-1] in STOPS) and (len(sample.ids) == 6 or sample.stopped)
