"""With a real pretrained model: the engine says what transformers says, a first look tells what is wrong, an update learns.

`make pretrained` fetches the model; without it these tests are skipped."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from llamagym import Agent, Config, LoRAConfig, Policy, ScoredAgent, Trainer, blackjack, collect
from llamagym.envs.baselines import random_demonstrations
from llamagym.envs.guess_number import guess_number
from llamagym.models.smollm2 import smollm2_path
from llamagym.trainer import TooManyInvalidResponses

pytestmark = [
    pytest.mark.pretrained,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not smollm2_path().is_dir(), reason="SmolLM2 is missing: make pretrained"),
]
GUESS = guess_number(1, 15, 4)


@pytest.fixture(scope="module")
def loaded():
    return Policy.load(smollm2_path(), lora=LoRAConfig(r=8))


@pytest.fixture
def policy(loaded):
    "The policy as it was loaded"
    before = [weight.detach().clone() for weight in loaded.parameters()]
    yield loaded
    loaded.reference.drop()
    with torch.no_grad():
        for weight, value in zip(loaded.parameters(), before):
            weight.copy_(value)


def share_of_valid(rollout) -> float:
    return float(np.mean([turn.valid for episode in rollout for turn in episode.turns]))


def test_pretrained_model_is_the_one_that_answers(policy):
    "Greedy decoding: transformers' `generate` and the engine say the same, and it is true"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = policy.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = policy.causal_lm.generate(**inputs, max_new_tokens=12, do_sample=False)
    said = out[0, inputs["input_ids"].shape[1] :]
    agent = Agent.for_task(GUESS, policy)
    (sample,) = agent.engine.sample([inputs["input_ids"][0].tolist()], [None], greedy=True)
    assert sample.ids[: len(said)] == said.tolist()[: len(sample.ids)]
    assert "Paris" in policy.tokenizer.decode(sample.ids)
    assert policy.pretrained and policy.causal_lm.num_parameters() > 130e6


def test_pretrained_samples_have_the_probabilities_of_the_full_model(policy):
    agent = Agent.for_task(GUESS, policy)
    rollout = collect(agent, episodes=4, num_envs=4)
    for episode in rollout:
        (segment,) = episode.segments
        with torch.no_grad():
            log_dist = policy.causal_lm(torch.tensor([segment.ids])).logits[0].log_softmax(-1)
        for turn in episode.turns:
            places = torch.arange(turn.start, turn.start + len(turn.response_ids))
            expected = log_dist[places - 1, torch.tensor(turn.response_ids)]
            np.testing.assert_allclose(turn.logprobs, expected.numpy(), atol=2e-4)


@pytest.mark.slow
def test_pretrained_model_needs_demonstrations_and_a_run_says_so(policy, tmp_path):
    config = Config.for_model(policy).replace(
        {"rollout.episodes": 12, "trainer.output_dir": str(tmp_path), "generate.max_new_tokens": 12}
    )
    agent = Agent.for_task(blackjack(), policy, config=config)
    before = copy.deepcopy([p.detach() for p in policy.parameters()])
    with pytest.raises(TooManyInvalidResponses, match="demonstrations"):
        Trainer(agent).fit(updates=1)
    assert all(map(torch.equal, before, policy.parameters()))
    task = dataclasses.replace(blackjack(), demonstrations=random_demonstrations(blackjack(), 8))
    shown = Agent.for_task(task, policy, config=config)
    assert share_of_valid(collect(shown, episodes=12, num_envs=12)) > 0.5
    scored = ScoredAgent.for_task(blackjack(), policy, config=config)
    assert share_of_valid(collect(scored, episodes=2, num_envs=2)) == 1


@torch.no_grad()
def logprobs_of(policy, rollout) -> np.ndarray:
    "The log-probability of the response to each episode's first turn"
    found = []
    for episode in rollout:
        turn = episode.turns[0]
        positions = torch.arange(turn.start, turn.start + len(turn.response_ids))
        ids = torch.tensor([episode.segments[0].ids])
        scores = policy.score(ids, torch.zeros_like(positions), positions)
        found.append(float(scores.logprobs.sum()))
    return np.array(found)


def test_pretrained_update_makes_rewarded_responses_likelier(policy):
    options = {"ppo.epochs": 1, "ppo.learning_rate": 1e-3, "ppo.kl_coef": 0.0}
    config = Config.for_model(policy).replace(options)
    agent = Agent.for_task(guess_number(1, 15, 1), policy, config=config)
    rollout = collect(agent, episodes=4, num_envs=4)
    rewards = np.arange(4) % 2
    for episode, reward in zip(rollout, rewards):
        episode.turns[0].reward = float(reward)
    before = logprobs_of(policy, rollout)
    metrics = agent.learner.update(rollout)
    change = logprobs_of(policy, rollout) - before
    assert metrics["max_logprob_diff"] < 1e-3 and metrics["approx_kl"] < 1
    assert change[rewards == 1].mean() > change[rewards == 0].mean() + 0.01


def test_pretrained_policy_saves_its_adapter_and_loads_it(policy, tmp_path):
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.01)
    ids = torch.tensor([[1, 100, 1000, 10_000]])
    with torch.no_grad():
        expected = policy.backbone(ids)
    policy.save(tmp_path / "policy")
    size = sum(file.stat().st_size for file in (tmp_path / "policy").rglob("*"))
    assert size < 30e6  # no copy of the base
    loaded = Policy.load(tmp_path / "policy")
    with torch.no_grad():
        torch.testing.assert_close(loaded.backbone(ids), expected, rtol=0, atol=1e-5)
