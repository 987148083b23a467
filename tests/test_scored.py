"""Scored candidates: sampler and learner match log-probabilities of each label computed alone in float64."""

import math

import numpy as np
import pytest
import torch
from doubles import config, make_policy, perturb, random_rows
from transformers import AutoModelForCausalLM, MambaConfig

from llamagym.agents.scored import ScoredAgent
from llamagym.algorithms.batch import Batch
from llamagym.algorithms.forward import learner_logprobs
from llamagym.buffer import EpisodeBuffer
from llamagym.chat.conversation import Window
from llamagym.config import GenerateConfig, PPOConfig
from llamagym.envs.task import Task
from llamagym.envs.toy_text import frozen_lake, taxi
from llamagym.inference.engine import Engine
from llamagym.models.policy import Policy
from llamagym.models.tiny import FAMILIES, tiny_tokenizer
from llamagym.ppo import PPOUpdate
from llamagym.rollout import collect, evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
LABELS = ["Action: 1", "Action: 10", "Action: 2", "go", "I will go left and then left again"]


def label_logprobs(model, prompt, ids) -> torch.Tensor:
    """Return log-probabilities [n] of a label's tokens, from one forward pass over the row"""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


def choice_logprobs(
    model, prompt, candidates, temperature=1.0, length_normalized=False
) -> torch.Tensor:
    """Return log-probabilities [k] of candidates, by their definition"""
    scores = [label_logprobs(model, prompt, ids) for ids in candidates]
    return (
        torch.stack([s.mean() if length_normalized else s.sum() for s in scores]) / temperature
    ).log_softmax(0)


def encode_labels(tokenizer, texts) -> list[list[int]]:
    return [
        tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        for text in texts
    ]


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scored_probabilities_match_each_label_computed_alone(family, length_normalized):
    """Prompts and candidates of a batch differ in length and number; labels share prefixes"""
    policy = Policy.load(f"tiny:{family}")
    perturb(policy.causal_lm.parameters(), 0.02)
    policy.bump_version()
    tokenizer, rng = policy.tokenizer, np.random.default_rng(0)
    engine = Engine(
        policy,
        {tokenizer.eos_token_id},
        GenerateConfig(temperature=0.7, length_normalized=length_normalized),
    )
    system = rng.integers(10, 200, 70).tolist()
    prompts = [[1, *system, *rng.integers(10, 200, n).tolist()] for n in (3, 9, 1, 5)]
    candidates = [
        encode_labels(tokenizer, texts) for texts in (LABELS, LABELS[:2], LABELS[4:], LABELS[::-1])
    ]
    streams = [np.random.default_rng(i) for i in range(4)]
    for _ in range(2):  # the second turn continues the conversations
        samples = engine.sample(
            prompts, streams, conversation_ids=list("abcd"), candidates=candidates
        )
        for prompt, options, sample in zip(prompts, candidates, samples):
            expected = choice_logprobs(policy.causal_lm, prompt, options, 0.7, length_normalized)
            assert sample.candidate_logprobs == pytest.approx(expected.numpy(), abs=2e-4)
            assert sample.logprobs == pytest.approx(
                [float(expected[options.index(sample.ids)])], abs=2e-4
            )
            assert (
                sample.entropy
                == pytest.approx([-float((expected.exp() * expected).sum())], abs=2e-4)
                and sample.stopped
            )
        prompts = [[*p, *s.ids, 5, 6, 7] for p, s in zip(prompts, samples)]
        candidates = candidates[1:] + candidates[:1]
    greedy, *_ = engine.sample(prompts, [None] * 4, greedy=True, candidates=candidates)
    assert candidates[0].index(greedy.ids) == int(
        choice_logprobs(
            policy.causal_lm, prompts[0], candidates[0], 0.7, length_normalized
        ).argmax()
    )


def test_scored_choices_are_sampled_with_their_probabilities():
    """The chi-square statistic of 4,000 samples of one distribution is small"""
    policy = Policy.load("tiny")
    options = encode_labels(policy.tokenizer, LABELS)
    engine = Engine(policy, {policy.tokenizer.eos_token_id}, GenerateConfig(temperature=4.0))
    samples = engine.sample(
        [[1, 20, 30]] * 4000,
        [np.random.default_rng([3, i]) for i in range(4000)],
        candidates=[options] * 4000,
    )
    expected = 4000 * np.exp(samples[0].candidate_logprobs)
    counts = np.bincount([options.index(s.ids) for s in samples], minlength=len(options))
    assert ((counts - expected) ** 2 / expected).sum() < 23.5  # 4 degrees of freedom, p = 1e-4


def test_scored_labels_are_computed_once_until_the_weights_change():
    """A repeated prompt needs no forward pass in any batch; new weights invalidate cached scores"""
    policy = Policy.load("tiny")
    options = encode_labels(policy.tokenizer, LABELS)
    engine, prompts = (
        Engine(policy, {policy.tokenizer.eos_token_id}, GenerateConfig()),
        random_rows(300, (40, 30, 40)),
    )

    def sample_prompts(*indices):
        return engine.sample(
            [prompts[i] for i in indices],
            [np.random.default_rng(i) for i in indices],
            candidates=[options] * len(indices),
        )

    first = sample_prompts(0, 1)
    num_prefilled = engine.stats.prefill_tokens
    repeated = sample_prompts(1, 0, 1, 2)
    assert engine.stats.prefill_tokens - num_prefilled <= len(prompts[2])
    for before, after in (
        (first[0], repeated[1]),
        (first[1], repeated[0]),
        (first[1], repeated[2]),
    ):
        assert (
            np.array_equal(before.candidate_logprobs, after.candidate_logprobs)
            and before.ids == after.ids
        )
    perturb(policy.parameters(), 0.05)
    policy.bump_version()
    assert sample_prompts(0)[0].candidate_logprobs == pytest.approx(
        choice_logprobs(policy.causal_lm, prompts[0], options, 1.0, False).detach().numpy(),
        abs=2e-4,
    )
    assert not np.allclose(
        sample_prompts(0)[0].candidate_logprobs, first[0].candidate_logprobs, atol=1e-3
    )


def scored_agent(kind="lora", task=None, **options) -> ScoredAgent:
    policy = make_policy(kind)
    if kind == "plain":
        perturb(policy.parameters(), 0.02)
    return ScoredAgent.for_task(
        task or make_lake(), policy, config=config(generate__temperature=0.8, **options)
    )


def make_lake(**changes) -> Task:
    task = frozen_lake(slippery=False)
    for name, value in (
        dict(max_steps=5, legal_actions=lambda obs, info: [0, 1, 2, 3][: 2 + obs % 3]) | changes
    ).items():
        setattr(task, name, value)
    return task


@pytest.mark.parametrize("context", ["full", 1, 2])
@pytest.mark.parametrize("kind", ["plain", "lora", "nf4"])
def test_scored_gradient_matches_the_formula(kind, context):
    """The loss is clipped surrogate, entropy and KL over the candidates, for any micro-batches

    It is a mean over turns with several candidates; each label is computed alone.
    """
    legal = lambda obs, info: [2] if obs % 4 == 1 else [1, 2, 3][: 2 + obs % 2]
    task = make_lake(context=context if context == "full" else Window(context), legal_actions=legal)
    agent = scored_agent(kind, task, generate__length_normalized=kind == "lora")
    if kind == "plain":  # sums over a random model's labels would make one of them certain
        agent.policy.causal_lm.lm_head.weight.data *= 0.25
        agent.policy.bump_version()
        agent.policy.set_reference()
    agent.learner.config = PPOConfig(
        epochs=1,
        mini_batch_size=1000,
        max_grad_norm=1e9,
        kl_coef=0.3,
        entropy_coef=0.2,
        vf_coef=0.0,
    )
    agent.learner.kl_coef = 0.3
    episodes = collect(agent, episodes=3, num_envs=3)
    for i, turn in enumerate(episodes.turns):
        turn.reward = math.sin(i)
    learner, policy, normalized = (
        agent.learner,
        agent.policy,
        agent.config.generate.length_normalized,
    )
    reference = learner.compute_advantages(episodes)
    choices = [turn for turn in episodes.turns if not turn.has_single_candidate]
    assert 0 < len(choices) < len(episodes.turns) and all(
        (len(turn.candidate_ids) == 1) == turn.has_single_candidate for turn in episodes.turns
    )
    assert np.mean([t.advantage for t in choices]) == pytest.approx(0, abs=1e-9) and np.std(
        [t.advantage for t in choices]
    ) == pytest.approx(1)
    perturb(policy.parameters(), 0.01, seed=3)  # ratios differ from 1
    policy.bump_version()
    batch, gradients = Batch.from_episodes(episodes), []
    for budget in (10_000, 64):
        learner.config.token_budget = budget
        learner.optimizer.zero_grad()
        update = PPOUpdate(learner, batch, reference)
        update.metrics.start_epoch()
        for micro in batch.micro_batches(budget):
            update.loss.micro_batch_loss(micro, batch, 1).backward()
        gradients.append(
            torch.cat(
                [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
            ).double()
        )
    learner.optimizer.zero_grad()
    terms, parts = [], []
    for episode in episodes:
        for turn in episode.turns:
            prompt = episode.segments[turn.segment].ids[: turn.start]
            options = dict(temperature=0.8, length_normalized=normalized)
            with torch.no_grad(), policy.as_reference():
                ref = choice_logprobs(policy.active_model, prompt, turn.candidate_ids, **options)
            logprobs = choice_logprobs(policy.active_model, prompt, turn.candidate_ids, **options)
            chosen = turn.candidate_ids.index(turn.response_ids)
            assert turn.ref_logprobs == pytest.approx([float(ref[chosen])], abs=1e-4)
            ratio = (logprobs[chosen] - float(turn.logprobs[0])).exp()
            surrogate = torch.minimum(
                ratio * turn.advantage, ratio.clamp(0.8, 1.2) * turn.advantage
            )
            p = logprobs.exp()
            kl, entropy = (p * (logprobs - ref)).sum(), -(p * logprobs).sum()
            parts.append((kl.detach(), entropy.detach()))
            terms.append(-surrogate + 0.3 * kl - 0.2 * entropy)
    (sum(terms) / len(choices)).backward()  # terms of single candidates are constant
    expected = torch.cat(
        [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    ).double()
    tolerance = 0.02 if kind == "nf4" else 2e-3
    for gradient in gradients:
        assert (
            torch.linalg.norm(gradient - expected) / torch.linalg.norm(expected)
        ).item() < tolerance
    if kind == "plain":  # metrics are means over the same turns
        kl, entropy = (float(sum(t)) / len(choices) for t in zip(*parts))
        assert update.metrics.mean("ref_kl") == pytest.approx(kl, abs=1e-4) and update.metrics.mean(
            "entropy"
        ) == pytest.approx(entropy, abs=1e-4)


@pytest.mark.parametrize("context", ["full", 1])
def test_scored_episodes_do_not_depend_on_the_batch_and_can_be_saved(context, tmp_path):
    """Each turn is one valid decision, and learner and sampler have the same log-probabilities"""
    agent = scored_agent(task=make_lake(context=context if context == "full" else Window(context)))
    batched, single = (collect(agent, episodes=6, num_envs=n) for n in (6, 1))
    assert [[t.response_ids for t in e.turns] for e in batched] == [
        [t.response_ids for t in e.turns] for e in single
    ]
    for episode in batched:
        episode.validate()
        assert all(
            t.valid and t.response in t.candidates and t.num_decisions == len(t.logprobs) == 1
            for t in episode.turns
        )
    assert {len(t.candidates) for t in batched.turns} > {2}
    assert EpisodeBuffer.load(batched.save(tmp_path / "episodes.parquet")).episodes == list(batched)
    batch = Batch.from_episodes(batched, require_advantages=False)
    assert batch.num_tokens == batch.num_turns
    gap = (learner_logprobs(agent.policy, batch, 0.8, False, 8192) - batch.logprobs).abs().max()
    assert gap < 1e-4
    stats = agent.learner.update(batched)
    assert stats["max_logprob_diff"] < 1e-4 and stats["invalid_rate"] == 0


def test_scored_batches_can_be_selected_and_saved(tmp_path):
    """Selected rows keep each candidate with its decision and its tokens"""
    agent = scored_agent(task=make_lake(context="full"))
    episodes = collect(agent, episodes=4, num_envs=4)
    batch = Batch.from_episodes(episodes, require_advantages=False)
    loaded = Batch.load(batch.save(tmp_path / "batch.npz"))
    for rows in ([2, 0], [3], [1, 2, 3]):
        selected = loaded.select(rows)
        turns = [t for r in rows for t in episodes[r].turns]
        ids = [[] for _ in selected.decision_of_candidate]
        for candidate, token in zip(
            selected.candidate_token_owner.tolist(), selected.candidate_token_ids.tolist()
        ):
            ids[candidate].append(token)
        ids_of_turn = [[] for _ in turns]
        for token, candidate in zip(selected.decision_of_candidate.tolist(), ids):
            ids_of_turn[token].append(candidate)
        assert ids_of_turn == [t.candidate_ids for t in turns]
        chosen = {
            int(selected.decision_of_candidate[c]): ids[c]
            for c in selected.candidate_chosen.nonzero().squeeze(1).tolist()
        }
        assert [chosen[i] for i in range(len(turns))] == [t.response_ids for t in turns]
        assert torch.equal(
            batch.decision_of_candidate[selected.candidate_index],
            selected.token_index[selected.decision_of_candidate],
        )


def test_scored_taxi_takes_only_legal_actions():
    task = taxi()
    task.context, task.max_steps = Window(1), 10
    episodes = collect(scored_agent(task=task), episodes=3, num_envs=2)
    assert len({tuple(t.candidates) for t in episodes.turns}) > 1 and all(
        t.valid for t in episodes.turns
    )


class UserAgent(ScoredAgent):
    """An agent with the three methods and the legal actions of each state"""

    def get_system_prompt(self):
        return "Go."

    def format_observation(self, observation):
        return f"Cell {observation}."

    def extract_action(self, response):
        return int(response.split()[-1])

    def format_action(self, action):
        return f"Go {action}"

    def legal_actions(self, observation):
        return [0, 1] if observation == 0 else [1, 2, 3]


def test_scored_agent_of_a_user_can_be_trained_and_evaluated(tmp_path):
    agent = UserAgent(make_policy("lora"), ppo_config_dict=dict(batch_size=8))
    env = make_lake().make()
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
    assert stats["max_logprob_diff"] < 1e-4
    episodes = collect(agent, env=lambda: make_lake().make(), episodes=3, num_envs=3)
    assert all(t.action in agent.legal_actions(int(t.observation[5:-1])) for t in episodes.turns)
    assert evaluate(agent, env=lambda: make_lake().make(), episodes=3).greedy.invalid_rate == 0


def test_scored_bad_input_raises():
    agent = scored_agent(task=make_lake(format_action=lambda action: "Action: left"))
    with pytest.raises(RuntimeError, match="two of the candidates .* are the same"):
        collect(agent, episodes=2, num_envs=2)
    user_agent = UserAgent(make_policy("lora"))
    user_agent.legal_actions = lambda observation: []
    with pytest.raises(ValueError, match="UserAgent: legal_actions gave no action for 0"):
        user_agent.act(0)
    user_agent.legal_actions = lambda observation: None
    with pytest.raises(ValueError, match="can't be listed: write legal_actions"):
        user_agent.act(0)
    tokenizer = tiny_tokenizer()
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            pad_token_id=0,
            eos_token_id=2,
        )
    )
    with pytest.raises(
        ValueError, match="cannot score candidates, because .*Let it respond freely"
    ):
        UserAgent(mamba.eval(), tokenizer).act(0)
    engine = agent.engine
    for invalid, message in (
        ([], "candidates is empty"),
        ([[5], [5]], "same ids"),
        ([[]], "at least one"),
        ([[10**6]], "expected ids from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit([1, 5], None, greedy=True, candidates=invalid)
