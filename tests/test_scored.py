"""Choosing among candidates: the sampler and the learner against each label read on its own, behind the whole prompt, in float64."""

import math

import numpy as np
import pytest
import torch
from doubles import config, make_policy, random_rows, shake
from transformers import AutoModelForCausalLM, MambaConfig

from llamagym.batch import Batch
from llamagym.buffer import EpisodeBuffer
from llamagym.chat import window
from llamagym.config import GenerateConfig, PPOConfig
from llamagym.engine import Engine
from llamagym.passes import learner_logprobs
from llamagym.policy import Policy
from llamagym.ppo import StatLog
from llamagym.rollout import collect, evaluate
from llamagym.scored import ScoredAgent
from llamagym.task import Task, frozen_lake, masked_actions, taxi
from llamagym.tiny import FAMILIES, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
NUMBERS = ["Action: 1", "Action: 10", "Action: 2", "go", "I will go left and then left again"]


def label_logprobs(model, prompt, ids) -> torch.Tensor:
    """Log-probabilities [n] of a label's tokens, the whole row read at once"""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


def choice_logprobs(model, prompt, candidates, temperature=1.0, length_normalized=False) -> torch.Tensor:
    """The definition: log-probabilities [k] of candidates"""
    scores = [label_logprobs(model, prompt, ids) for ids in candidates]
    return (torch.stack([s.mean() if length_normalized else s.sum() for s in scores]) / temperature).log_softmax(0)


def labels(tokenizer, texts) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] for text in texts]


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scored_probabilities_are_those_of_each_label_on_its_own(family, length_normalized):
    """Prompts and candidates of different lengths and numbers side by side; labels that begin alike; a label that is the beginning of another"""
    policy = Policy.load(f"tiny:{family}")
    shake(policy.causal_lm.parameters(), 0.02)
    policy.touch()
    tokenizer, rng = policy.tokenizer, np.random.default_rng(0)
    engine = Engine(policy, {tokenizer.eos_token_id}, GenerateConfig(temperature=0.7, length_normalized=length_normalized))
    system = rng.integers(10, 200, 70).tolist()
    prompts = [[1, *system, *rng.integers(10, 200, n).tolist()] for n in (3, 9, 1, 5)]
    candidates = [labels(tokenizer, texts) for texts in (NUMBERS, NUMBERS[:2], NUMBERS[4:], NUMBERS[::-1])]
    streams = [np.random.default_rng(i) for i in range(4)]
    for _ in range(2):  # the second turn goes on where the first left off
        samples = engine.sample(prompts, streams, keys=list("abcd"), candidates=candidates)
        for prompt, options, sample in zip(prompts, candidates, samples):
            expected = choice_logprobs(policy.causal_lm, prompt, options, 0.7, length_normalized)
            assert sample.candidate_logprobs == pytest.approx(expected.numpy(), abs=2e-4)
            assert sample.logprobs == pytest.approx([float(expected[options.index(sample.ids)])], abs=2e-4)
            assert sample.entropy == pytest.approx([-float((expected.exp() * expected).sum())], abs=2e-4) and sample.stopped
        prompts = [[*p, *s.ids, 5, 6, 7] for p, s in zip(prompts, samples)]
        candidates = candidates[1:] + candidates[:1]
    greedy, *_ = engine.sample(prompts, [None] * 4, greedy=True, candidates=candidates)
    assert candidates[0].index(greedy.ids) == int(choice_logprobs(policy.causal_lm, prompts[0], candidates[0], 0.7, length_normalized).argmax())


def test_scored_choices_are_drawn_with_their_probabilities():
    """4,000 draws from one distribution, by the chi-square statistic"""
    policy = Policy.load("tiny")
    options = labels(policy.tokenizer, NUMBERS)
    engine = Engine(policy, {policy.tokenizer.eos_token_id}, GenerateConfig(temperature=4.0))
    samples = engine.sample([[1, 20, 30]] * 4000, [np.random.default_rng([3, i]) for i in range(4000)], candidates=[options] * 4000)
    expected = 4000 * np.exp(samples[0].candidate_logprobs)
    counts = np.bincount([options.index(s.ids) for s in samples], minlength=len(options))
    assert ((counts - expected) ** 2 / expected).sum() < 23.5  # 4 degrees of freedom: one in 10,000


def test_scored_labels_are_read_once_until_the_weights_change():
    """The same question again costs no reading, in whatever batch it comes; with other weights nothing old is used"""
    policy = Policy.load("tiny")
    options = labels(policy.tokenizer, NUMBERS)
    engine, prompts = Engine(policy, {policy.tokenizer.eos_token_id}, GenerateConfig()), random_rows(300, (40, 30, 40))

    def ask(*which):
        return engine.sample([prompts[i] for i in which], [np.random.default_rng(i) for i in which], candidates=[options] * len(which))

    first = ask(0, 1)
    read = engine.stats.read_tokens
    again = ask(1, 0, 1, 2)
    assert engine.stats.read_tokens - read <= len(prompts[2])
    for one, two in ((first[0], again[1]), (first[1], again[0]), (first[1], again[2])):
        assert np.array_equal(one.candidate_logprobs, two.candidate_logprobs) and one.ids == two.ids
    shake(policy.parameters(), 0.05)
    policy.touch()
    assert ask(0)[0].candidate_logprobs == pytest.approx(choice_logprobs(policy.causal_lm, prompts[0], options, 1.0, False).detach().numpy(), abs=2e-4)
    assert not np.allclose(ask(0)[0].candidate_logprobs, first[0].candidate_logprobs, atol=1e-3)


def scored_agent(kind="lora", task=None, **options) -> ScoredAgent:
    policy = make_policy(kind)
    if kind == "plain":
        shake(policy.parameters(), 0.02)
    return ScoredAgent.for_task(task or lake_of(), policy, config=config(generate__temperature=0.8, **options))


def lake_of(**changes) -> Task:
    task = frozen_lake(slippery=False)
    for name, value in (dict(max_steps=5, legal_actions=lambda obs, info: [0, 1, 2, 3][: 2 + obs % 3]) | changes).items():
        setattr(task, name, value)
    return task


@pytest.mark.parametrize("context", ["full", 1, 2])
@pytest.mark.parametrize("kind", ["plain", "lora", "nf4"])
def test_scored_gradient_is_that_of_the_written_formula(kind, context):
    """Clipped surrogate, entropy and KL over the candidates, each label read on its own; whatever the micro-batches. A mean over real choices"""
    legal = lambda obs, info: [2] if obs % 4 == 1 else [1, 2, 3][: 2 + obs % 2]
    task = lake_of(context=context if context == "full" else window(context), legal_actions=legal)
    agent = scored_agent(kind, task, generate__length_normalized=kind == "lora")
    agent.learner.config = PPOConfig(epochs=1, mini_batch_size=1000, max_grad_norm=1e9, kl_coef=0.3, entropy_coef=0.2, vf_coef=0.0)
    agent.learner.kl_coef = 0.3
    episodes = collect(agent, episodes=3, num_envs=3)
    for i, turn in enumerate(episodes.turns):
        turn.reward = math.sin(i)
    learner, policy, normalized = agent.learner, agent.policy, agent.config.generate.length_normalized
    reference = learner.annotate(episodes)
    learner.assign_credit(episodes)
    free = [turn for turn in episodes.turns if not turn.forced]
    assert 0 < len(free) < len(episodes.turns) and all((len(turn.candidate_ids) == 1) == turn.forced for turn in episodes.turns)
    assert np.mean([t.advantage for t in free]) == pytest.approx(0, abs=1e-9) and np.std([t.advantage for t in free]) == pytest.approx(1)
    shake(policy.parameters(), 0.01, seed=3)  # the ratio is not 1
    policy.touch()
    batch, gradients = Batch.from_episodes(episodes), []
    for budget in (10_000, 64):
        learner.config.token_budget = budget
        learner.optimizer.zero_grad()
        log = StatLog(batch)
        log.start_epoch()
        for micro in batch.micro_batches(budget):
            learner.loss(micro, batch, batch, reference, 1, log).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).double())
    learner.optimizer.zero_grad()
    terms, parts = [], []
    for episode in episodes:
        for turn in episode.turns:
            prompt = episode.segments[turn.segment].ids[: turn.start]
            how = dict(temperature=0.8, length_normalized=normalized)
            with torch.no_grad(), policy.as_reference():
                ref = choice_logprobs(policy.answering, prompt, turn.candidate_ids, **how)
            logprobs = choice_logprobs(policy.answering, prompt, turn.candidate_ids, **how)
            chosen = turn.candidate_ids.index(turn.response_ids)
            assert turn.ref_logprobs == pytest.approx([float(ref[chosen])], abs=1e-4)
            ratio = (logprobs[chosen] - float(turn.logprobs[0])).exp()
            surrogate = torch.minimum(ratio * turn.advantage, ratio.clamp(0.8, 1.2) * turn.advantage)
            p = logprobs.exp()
            kl, entropy = (p * (logprobs - ref)).sum(), -(p * logprobs).sum()
            parts.append((kl.detach(), entropy.detach()))
            terms.append(-surrogate + 0.3 * kl - 0.2 * entropy)
    (sum(terms) / len(free)).backward()  # those of the others are constants
    written = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).double()
    tolerance = 0.02 if kind == "nf4" else 2e-3
    for ours in gradients:
        assert (torch.linalg.norm(ours - written) / torch.linalg.norm(written)).item() < tolerance
    if kind == "plain":  # what is logged is a mean over the same
        kl, entropy = (float(sum(t)) / len(free) for t in zip(*parts))
        assert log.mean("ref_kl") == pytest.approx(kl, abs=1e-4) and log.mean("entropy") == pytest.approx(entropy, abs=1e-4)


@pytest.mark.parametrize("context", ["full", 1])
def test_scored_episodes_are_the_same_whoever_is_beside_them_and_saved_whole(context, tmp_path):
    """One decision a turn, all of them valid and legal; slots change nothing; a file holds everything; the learner finds the sampler's numbers"""
    agent = scored_agent(task=lake_of(context=context if context == "full" else window(context)))
    many, alone = (collect(agent, episodes=6, num_envs=n) for n in (6, 1))
    assert [[t.response_ids for t in e.turns] for e in many] == [[t.response_ids for t in e.turns] for e in alone]
    for episode in many:
        episode.validate()
        assert all(t.valid and t.response in t.candidates and t.num_decisions == len(t.logprobs) == 1 for t in episode.turns)
    assert {len(t.candidates) for t in many.turns} > {2}
    assert EpisodeBuffer.load(many.save(tmp_path / "episodes.parquet")).episodes == list(many)
    batch = Batch.from_episodes(many, complete=False)
    assert batch.num_tokens == batch.num_turns
    gap = (learner_logprobs(agent.policy, batch, 0.8, False, 8192) - batch.logprobs).abs().max()
    assert gap < 1e-4
    stats = agent.learner.learn(many)
    assert stats["logprob_gap"] < 1e-4 and stats["invalid_rate"] == 0


def test_scored_batches_are_cut_and_saved(tmp_path):
    """Selecting rows keeps each candidate with its decision and its tokens"""
    agent = scored_agent()
    episodes = collect(agent, episodes=4, num_envs=4)
    batch = Batch.from_episodes(episodes, complete=False)
    again = Batch.load(batch.save(tmp_path / "batch.npz"))
    for rows in ([2, 0], [3], [1, 2, 3]):
        part = again.select(rows)
        turns = [t for r in rows for t in episodes[r].turns]
        ids = [[] for _ in part.candidate_token]
        for candidate, token in zip(part.option_candidate.tolist(), part.option_ids.tolist()):
            ids[candidate].append(token)
        of_turn = [[] for _ in turns]
        for token, candidate in zip(part.candidate_token.tolist(), ids):
            of_turn[token].append(candidate)
        assert of_turn == [t.candidate_ids for t in turns]
        chosen = {int(part.candidate_token[c]): ids[c] for c in part.candidate_chosen.nonzero().squeeze(1).tolist()}
        assert [chosen[i] for i in range(len(turns))] == [t.response_ids for t in turns]
        assert torch.equal(batch.candidate_token[part.candidate_index], part.token_index[part.candidate_token])


def test_scored_taxi_does_only_what_is_legal():
    task = taxi()
    task.legal_actions, task.context, task.max_steps = masked_actions, window(1), 10
    episodes = collect(scored_agent(task=task), episodes=3, num_envs=2)
    assert len({tuple(t.candidates) for t in episodes.turns}) > 1 and all(t.valid for t in episodes.turns)


class Own(ScoredAgent):
    """Written as a user writes one: the three methods, and the actions of each state"""

    def get_system_prompt(self):
        return "Go."

    def format_observation(self, observation):
        return f"Cell {observation}."

    def extract_action(self, response):
        return int(response.split()[-1])

    def action_text(self, action):
        return f"Go {action}"

    def legal_actions(self, observation):
        return [0, 1] if observation == 0 else [1, 2, 3]


def test_scored_agents_of_ones_own(tmp_path):
    agent = Own(make_policy("lora"), ppo_config_dict=dict(batch_size=8))
    env = lake_of().make()
    stats = {}
    while not stats:
        obs, _ = env.reset()
        done = False
        while not done:
            action = agent.act(obs)
            assert action in agent.legal_actions(obs)
            obs, reward, terminated, truncated, _ = env.step(action)
            agent.assign_reward(reward)
            done = terminated or truncated
        stats = agent.terminate_episode(truncated=truncated, next_observation=obs)
    assert stats["logprob_gap"] < 1e-4
    episodes = collect(agent, env=lambda: lake_of().make(), episodes=3, num_envs=3)
    assert all(t.action in agent.legal_actions(int(t.observation[5:-1])) for t in episodes.turns)
    assert evaluate(agent, env=lambda: lake_of().make(), episodes=3).greedy.invalid_rate == 0


def test_scored_bad_input():
    agent = scored_agent(task=lake_of(action_text=lambda action: "Action: left"))
    with pytest.raises(RuntimeError, match="two are the same"):
        collect(agent, episodes=2, num_envs=2)
    own = Own(make_policy("lora"))
    own.legal_actions = lambda observation: []
    with pytest.raises(ValueError, match="no candidate to choose"):
        own.act(0)
    with pytest.raises(ValueError, match="can't be listed: pass action_space"):
        super(Own, Own(make_policy("lora"))).legal_actions(0)
    tokenizer = tiny_tokenizer()
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, pad_token_id=0, eos_token_id=2))
    with pytest.raises(ValueError, match="can't weigh candidates, since .*Let it answer freely"):
        Own(mamba.eval(), tokenizer).act(0)
    engine = agent.engine
    for bad, message in (([], "candidates is empty"), ([[5], [5]], "same ids"), ([[]], "one at least"), ([[10**6]], "expected ids from 0")):
        with pytest.raises(ValueError, match=message):
            engine.submit([1, 5], None, greedy=True, candidates=bad)
