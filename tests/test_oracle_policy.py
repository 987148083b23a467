"""Policy and engine match the whole model: scores, samples, reference models and saved files."""

import copy
import os

import numpy as np
import peft
import pytest
import torch
import transformers
from doubles import KINDS, config, lake, lake_agent, make_policy, perturb, random_rows, users_model

import llamagym.models.policy as policy_module
from llamagym.agent import Agent
from llamagym.chat.conversation import Window
from llamagym.config import GenerateConfig, LoRAConfig, WarmstartConfig
from llamagym.envs.baselines import RandomAgent, play
from llamagym.inference.engine import Engine
from llamagym.inference.sampling import sample_inverse_cdf
from llamagym.models.policy import Policy
from llamagym.models.tiny import FAMILIES, tiny_model, tiny_tokenizer
from llamagym.rollout import collect
from llamagym.training.cloning import clone

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing", "ignore:.*save_embedding_layers",
                                        "ignore:Could not find a config file")  # fmt: skip
# config options for post-processing of logits
LOGIT_OPTIONS = {
    "gemma2": "final_logit_softcapping",
    "cohere": "logit_scale",
    "granite": "logits_scaling",
}


def full_log_dists(model, rows, temperature=1.0) -> list[torch.Tensor]:
    """Return the model's own log-distributions [T, V] of each row, computed alone"""
    with torch.no_grad():
        return [
            (model(input_ids=torch.tensor([row])).logits[0].double() / temperature).log_softmax(-1)
            for row in rows
        ]


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *(("plain", family) for family in FAMILIES),
        ("lora", "smollm"),
        ("lora", "gemma2"),
        ("nf4", "llama"),
    ],
)
def test_oracle_score_equals_the_full_forward(kind, family):
    policy = make_policy(kind, f"tiny:{family}")
    # longer than the sliding windows of 64
    rows = random_rows(policy.causal_lm.config.vocab_size, (90, 7, 70, 2))
    positions = [(r, t) for r, row in enumerate(rows) for t in range(1, len(row), 3)] + [
        (3, 1),
        (0, 89),
    ]
    padded = torch.full((4, 90), policy.pad_id)
    for row, ids in zip(padded, rows):
        row[: len(ids)] = torch.tensor(ids)
    index, position = (torch.tensor(c) for c in zip(*positions))
    for temperature in (1.0, 0.7):
        expected = full_log_dists(policy.model, rows, temperature)
        with torch.no_grad():
            score = policy.score(padded, index, position, temperature)
        for i, (r, t) in enumerate(positions):
            dist = expected[r][t - 1]
            assert abs(score.logprobs[i].item() - dist[rows[r][t]].item()) < 5e-5
            assert abs(score.entropy[i].item() + (dist.exp() * dist).sum().item()) < 5e-5
            assert (score.log_dist[i] - dist).abs().max() < 1e-4
    # the oracle applies the option: without it, the distribution differs
    if family in LOGIT_OPTIONS:
        assert getattr(policy.causal_lm.config, LOGIT_OPTIONS[family])
        without_option = policy.causal_lm.get_output_embeddings()(score.hidden).log_softmax(-1)
        assert (
            without_option
            - torch.stack([full_log_dists(policy.model, [rows[r]])[0][t - 1] for r, t in positions])
        ).abs().max() > 0.1


def test_oracle_score_is_close_to_float64():
    """The float32 error is transformers' own, and far below the allowed difference of 1e-4"""
    policy = make_policy("lora")
    rows = random_rows(policy.causal_lm.config.vocab_size, (40,))
    (expected,) = full_log_dists(copy.deepcopy(policy.model).double(), rows)
    (float32,) = full_log_dists(policy.model, rows)
    sampled = torch.arange(39), rows[0][1:]
    with torch.no_grad():
        score = policy.score(
            torch.tensor(rows), torch.zeros(39, dtype=torch.long), torch.arange(1, 40)
        )
    error = (score.logprobs - expected[sampled]).abs().max()
    assert error < 2 * (float32[sampled] - expected[sampled]).abs().max() < 5e-5


def test_oracle_score_has_the_gradient_of_the_full_forward():
    policy = make_policy("lora")
    rows = torch.tensor(random_rows(policy.causal_lm.config.vocab_size, (12, 12)))
    weights = torch.linspace(-1, 1, 10)
    policy.score(
        rows, torch.tensor([0, 1] * 5), torch.tensor([2, 3, 4, 5, 6, 7, 8, 9, 10, 11]), 0.8
    ).logprobs.mul(weights).sum().backward()
    gradients = [p.grad.clone() for p in policy.parameters()]
    policy.model.zero_grad()
    double = copy.deepcopy(policy.model).double()
    dist = (double(input_ids=rows).logits / 0.8).log_softmax(-1)
    sum(
        w * dist[i % 2, t - 1, rows[i % 2, t]]
        for i, (w, t) in enumerate(zip(weights.double(), range(2, 12)))
    ).backward()
    for gradient, p in zip(gradients, (p for p in double.parameters() if p.requires_grad)):
        assert (gradient - p.grad).norm() <= 1e-5 * p.grad.norm()


# Sampler and learner


def check_logprobs(policy, episodes, temperature=1.0) -> int:
    """Compare recorded log-probabilities with the full forward pass; return the number of tokens"""
    count = 0
    for episode in episodes:
        dists = full_log_dists(policy.model, [s.ids for s in episode.segments], temperature)
        for turn in episode.turns:
            for i, token in enumerate(turn.response_ids):
                dist = dists[turn.segment][turn.start + i - 1]
                assert abs(turn.logprobs[i] - dist[token].item()) < 1e-4
                assert abs(turn.entropy[i] + (dist.exp() * dist).sum().item()) < 1e-4
                count += 1
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_sampler_and_learner_agree(kind, cloned_policy):
    agent = lake_agent(
        cloned_policy(kind), generate__temperature=0.8, ppo__epochs=1, ppo__learning_rate=3e-4
    )
    for _ in range(2):  # once before and once after an update
        episodes = collect(agent, episodes=4, num_envs=3)
        assert check_logprobs(agent.policy, episodes, 0.8) > 30 and max(map(len, episodes)) == 6
        before = [p.detach().clone() for p in agent.policy.parameters()]
        assert 0 < agent.learner.update(episodes)["max_logprob_diff"] < 1e-4
        assert any((p != old).any() for p, old in zip(agent.policy.parameters(), before))


@pytest.mark.parametrize(
    "task", [lake(5, history="template"), lake(5, context=Window(2))], ids=["template", "window"]
)
def test_oracle_sampler_and_learner_agree_in_every_context(task, cloned_policy):
    agent = lake_agent(cloned_policy("lora"), task=task)
    episodes = collect(agent, episodes=4, num_envs=4)
    assert check_logprobs(agent.policy, episodes) > 40
    assert agent.learner.update(episodes)["max_logprob_diff"] < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_sampler_matches_every_family(family):
    """Prompts of one batch differ in length, and responses cross the sliding window"""
    policy = make_policy("plain", f"tiny:{family}")
    prompts = random_rows(policy.causal_lm.config.vocab_size, (80, 3, 60))
    samples = Engine(policy, {2}, GenerateConfig(max_new_tokens=8, temperature=0.9)).sample(
        prompts, [np.random.default_rng(i) for i in range(3)]
    )
    for prompt, sample in zip(prompts, samples):
        (dist,) = full_log_dists(policy.model, [prompt + sample.ids], 0.9)
        dist = dist[len(prompt) - 1 : -1]
        assert (
            np.abs(sample.logprobs - dist[torch.arange(len(sample.ids)), sample.ids].numpy()).max()
            < 1e-4
        )
        assert np.abs(sample.entropy + (dist.exp() * dist).sum(-1).numpy()).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_number_of_environments_changes_nothing(kind, cloned_policy):
    agent = lake_agent(cloned_policy(kind), max_steps=12)
    env_counts = (1, 16) if kind == "nf4" else (1, 4, 16)
    episodes = {n: collect(agent, episodes=17, num_envs=n, seed=3) for n in env_counts}
    # episodes differ in length, so environments are reset at different steps
    assert len({len(e) for e in episodes[1]}) > 1
    assert len({tuple(t.response_ids) for e in episodes[1] for t in e.turns}) > 5
    for n in env_counts[1:]:
        assert [e.index for e in episodes[n]] == list(range(17))
        for single, parallel in zip(episodes[1], episodes[n]):
            assert [s.ids for s in single.segments] == [s.ids for s in parallel.segments]
            assert [(t.action, t.reward, t.valid, t.terminated, t.truncated) for t in single.turns] == [
                (t.action, t.reward, t.valid, t.terminated, t.truncated) for t in parallel.turns]  # fmt: skip
            assert single.final_ids == parallel.final_ids
            for a, b in zip(single.turns, parallel.turns):
                assert np.abs(a.logprobs - b.logprobs).max() < 1e-4


# Sampling


def test_oracle_sampling_inverts_the_distribution():
    dist = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64).expand(7, 6)
    uniform = torch.tensor(
        [0.0, 0.1999, 0.2, 0.6999, 0.7001, 0.9999, 1 - 2**-53], dtype=torch.float64
    )
    assert sample_inverse_cdf(dist, uniform).tolist() == [1, 1, 3, 3, 4, 4, 4]
    # a float32 softmax sums to about 1; ids of probability 0 are never sampled
    for mass in (1 - 1e-7, 1.0, 1 + 1e-7):
        assert sample_inverse_cdf(dist[:2].float() * mass, uniform[[0, -1]]).tolist() == [1, 4]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_oracle_sampled_frequencies_match_the_distribution(temperature):
    policy = make_policy("plain")
    n, prompt = 4000, [1, 20, 300]
    samples = Engine(policy, (), GenerateConfig(max_new_tokens=1, temperature=temperature)).sample(
        [prompt] * n, [np.random.default_rng(i) for i in range(n)]
    )
    expected = full_log_dists(policy.model, [prompt], temperature)[0][-1].exp().numpy()
    likely = np.flatnonzero(expected > 0.002)
    observed = np.bincount([s.ids[0] for s in samples], minlength=len(expected))
    assert len(likely) > 10
    error = (observed[likely] - n * expected[likely]) / np.sqrt(
        n * expected[likely] * (1 - expected[likely])
    )
    assert np.abs(error).max() < 4.5 and 0.7 < np.sqrt((error**2).mean()) < 1.3


def test_oracle_greedy_samples_and_top_logprobs_match():
    policy = make_policy("plain")
    prompts = random_rows(policy.causal_lm.config.vocab_size, (5, 9))
    for sample, prompt in zip(
        Engine(policy, (), GenerateConfig(max_new_tokens=5, temperature=0.6)).sample(
            prompts, [None, None], greedy=True, top_logprobs=3
        ),
        prompts,
    ):
        dist = full_log_dists(policy.model, [prompt + sample.ids], 0.6)[0][len(prompt) - 1 : -1]
        assert sample.ids == dist.argmax(-1).tolist()
        values, ids = dist.topk(3)
        assert [[i for i, _ in token] for token in sample.top_logprobs] == ids.tolist()
        assert (
            np.abs(
                np.array([[v for _, v in token] for token in sample.top_logprobs]) - values.numpy()
            ).max()
            < 1e-4
        )


@pytest.mark.parametrize(
    "options", [dict(top_p=0.3), dict(top_k=5), dict(top_p=0.5, top_k=7, temperature=2.0)], ids=str
)
def test_oracle_top_k_and_top_p_apply_to_evaluation_only(options):
    policy, n, prompt = make_policy("plain"), 300, [1, 20, 300]
    settings = GenerateConfig(max_new_tokens=1, **options)
    dist = full_log_dists(policy.model, [prompt], settings.temperature)[0][-1]
    order = dist.argsort(descending=True)
    allowed = order[: settings.top_k] if settings.top_k else order
    mass = dist[allowed].exp() / dist[allowed].exp().sum()
    allowed = allowed[: int((mass.cumsum(0) - mass < settings.top_p).sum())]
    renormalized = dist - dist[allowed].logsumexp(-1)
    streams = [np.random.default_rng(i) for i in range(n)]
    truncated = Engine(policy, (), settings, apply_top_k_top_p=True).sample([prompt] * n, streams)
    assert {s.ids[0] for s in truncated} == set(allowed.tolist())
    assert max(abs(s.logprobs[0] - renormalized[s.ids[0]].item()) for s in truncated) < 1e-4
    assert all(np.isfinite(s.entropy).all() for s in truncated)
    # training samples from the full distribution
    full = Engine(policy, (), settings).sample([prompt] * n, streams)
    assert {s.ids[0] for s in full} - set(allowed.tolist())
    assert max(abs(s.logprobs[0] - dist[s.ids[0]].item()) for s in full) < 1e-4


def test_oracle_response_ends_at_its_first_stop_id():
    policy = make_policy("plain")
    vocab = policy.causal_lm.config.vocab_size
    prompts, limit, stops = random_rows(vocab, [6] * 40), 12, set(range(0, vocab, 8))
    streams = [np.random.default_rng(i) for i in range(40)]
    samples = Engine(policy, stops, GenerateConfig(max_new_tokens=limit)).sample(prompts, streams)
    assert {s.stopped for s in samples} == {True, False}
    for i, sample in enumerate(samples):
        assert not stops & set(sample.ids[:-1]) and sample.stopped == (sample.ids[-1] in stops)
        assert len(sample.ids) == limit or sample.stopped
        assert len(sample.logprobs) == len(sample.entropy) == len(sample.ids)
        replay = np.random.default_rng(i)
        replay.random(len(sample.ids))  # each sampled token uses one random number
        assert streams[i].random() == replay.random()


# Reference models


def backbone(policy, ids=((1, 20, 300, 7, 41),)):
    with torch.no_grad():
        return policy.backbone(torch.tensor(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_reference_is_the_policy_after_cloning(kind, cloned_policy):
    policy = cloned_policy(kind)
    hidden, logits = backbone(policy), policy.logits(backbone(policy)[0])
    with policy.as_reference():
        assert torch.equal(backbone(policy), hidden)
    assert torch.equal(policy.reference.logits(hidden[0]), logits)
    agent = lake_agent(policy, ppo__learning_rate=1e-3)
    episodes = collect(agent, episodes=4, num_envs=4)
    assert (
        agent.learner.update(episodes)["ref_kl"] > 0
    )  # mean over the last epoch, in which the policy differs
    for turn in (t for e in episodes for t in e.turns):
        assert np.abs(turn.ref_logprobs - turn.logprobs).max() < 1e-4
    assert not torch.equal(backbone(policy), hidden)
    with policy.as_reference():
        assert torch.equal(backbone(policy), hidden)  # the reference has not changed
    name = policy.reference.copy_name
    frozen = [p for n, p in policy.model.named_parameters() if f".{name}." in n]
    assert len(frozen) == (0 if kind == "plain" else len(policy.parameters()))
    assert not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize("kind", ["lora", "nf4"])
def test_oracle_reference_without_cloning_is_the_base(kind):
    policy, base = make_policy(kind), make_policy(kind, perturbed=False)
    hidden = backbone(policy)
    with policy.model.disable_adapter():
        base_hidden = backbone(policy)
    with policy.as_reference():
        assert torch.equal(backbone(policy), base_hidden)
    assert torch.equal(base_hidden, backbone(base)) and not torch.equal(base_hidden, hidden)
    assert torch.equal(backbone(policy), hidden)
    assert all(p.requires_grad for p in policy.parameters()) and len(policy.parameters()) == len(
        base.parameters()
    )


def test_oracle_reference_of_a_plain_model_is_its_initial_state():
    policy = make_policy("plain")
    initial = backbone(policy)
    agent = lake_agent(policy, 2, ppo__learning_rate=1e-3)
    agent.learner.update(collect(agent, episodes=2, num_envs=2))
    with policy.as_reference():
        assert torch.equal(backbone(policy), initial)
    assert not torch.equal(backbone(policy), initial)


@pytest.mark.parametrize(
    "lora",
    [LoRAConfig(r=4, target_modules=["q_proj", "lm_head"]), LoRAConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
     peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")],
    ids=["head", "embeddings", "whole-head"],
)  # fmt: skip
def test_oracle_adapters_on_head_and_embeddings_match(lora, tmp_path):
    policy = make_policy("lora", lora=lora)
    perturb(policy.parameters(), 0.1)
    rows = random_rows(policy.causal_lm.config.vocab_size, (20,))
    (expected,) = full_log_dists(policy.model, rows)
    with torch.no_grad():
        score = policy.score(
            torch.tensor(rows), torch.zeros(19, dtype=torch.long), torch.arange(1, 20)
        )
    assert (score.log_dist - expected[:-1]).abs().max() < 1e-4
    with policy.model.disable_adapter():
        (base,) = full_log_dists(policy.model, rows)

    def reference_logprobs():
        with policy.as_reference():
            hidden = policy.backbone(torch.tensor(rows))[0]
        return policy.reference.logits(hidden).log_softmax(-1)

    assert (reference_logprobs() - base).abs().max() < 1e-4 and (base - expected).abs().max() > 0.1
    policy.set_reference()
    assert (reference_logprobs() - expected).abs().max() < 1e-4
    policy.save(tmp_path / "p")
    loaded = Policy.load(tmp_path / "p", device="cpu")
    assert torch.equal(backbone(loaded), backbone(policy)) and torch.equal(
        loaded.logits(score.hidden), policy.logits(score.hidden)
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(policy.merge_and_save(tmp_path / "m"))
    assert (full_log_dists(plain, rows)[0] - expected).abs().max() < 1e-4


# Cloning (warm start)


def test_oracle_clone_trains_the_critic_on_each_batch_alone():
    """Each step uses the gradient of its own batch, and none is left for the first update"""
    policy = make_policy("lora", perturbed=False)
    batch_gradients, step_gradients = [], []
    weight = policy.value_head.out.weight
    weight.register_hook(lambda grad: batch_gradients.append(grad.clone()))
    weight.register_post_accumulate_grad_hook(lambda p: step_gradients.append(p.grad.clone()))
    task = lake(4)
    episodes = play(task, RandomAgent(task), 16)
    for i, episode in enumerate(episodes):
        episode.turns[-1].reward = 1.0 + i
    clone(
        Agent.for_task(task, policy, config=config()),
        episodes,
        WarmstartConfig(epochs=2, batch_size=8),
        progress=False,
    )
    assert len(batch_gradients) == 4 and batch_gradients[0].norm() > 0
    assert all(torch.equal(a, b) for a, b in zip(batch_gradients, step_gradients))
    assert all(
        p.grad is None or not p.grad.any()
        for p in [*policy.parameters(), *policy.value_head.parameters()]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_clone_leaves_no_trainer_state_on_the_model(kind):
    """The trainer leaves no hooks or settings on the model, which copies would share"""
    policy, task = make_policy(kind), lake(2)
    policy.set_reference()
    describe = lambda m: (
        "forward" in m.__dict__,
        m.training,
        len(m._forward_hooks),
        len(m._forward_pre_hooks),
    )
    module_state = lambda: {name: describe(m) for name, m in policy.model.named_modules()}
    before, settings = module_state(), policy.causal_lm.config.to_dict()
    trainable = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    dtypes_and_devices = {n: (p.dtype, p.device) for n, p in policy.model.named_parameters()}
    clone(
        Agent.for_task(task, policy, config=config()),
        play(task, RandomAgent(task), 2),
        WarmstartConfig(epochs=1),
        progress=False,
    )
    assert module_state() == before and policy.causal_lm.config.to_dict() == settings
    assert [n for n, p in policy.model.named_parameters() if p.requires_grad] == trainable
    assert {
        n: (p.dtype, p.device) for n, p in policy.model.named_parameters()
    } == dtypes_and_devices
    policy_copy = copy.deepcopy(policy)
    hidden = torch.randn(5, policy.hidden_size)
    for p in (policy, policy_copy):
        assert (
            torch.equal(p.reference.logits(hidden), p.logits(hidden)) and len(p.logits(hidden)) == 5
        )


def test_oracle_clone_imitates_responses_and_learns_returns():
    """The initial losses match loops over the tokens in float64, and training reduces both"""
    task = lake(4)
    episodes = play(task, RandomAgent(task), 8)
    for episode in episodes:
        for t, turn in enumerate(episode.turns):
            turn.reward = 2.0 * t - 5.0
    policy = make_policy("lora")
    agent = Agent.for_task(task, policy, config=config(credit__gamma=0.5))
    double = copy.deepcopy(policy.model).double()
    nll, returns = [], []
    for episode in episodes:
        conversation = agent.conversation(episode.system_prompt)
        for t, turn in enumerate(episode.turns):
            prompt = conversation.add_user(turn.observation)
            ids, stopped = conversation.renderer.encode_response(turn.response)
            assert stopped and policy.tokenizer.decode(ids[:-1]) == turn.response
            (dist,) = full_log_dists(double, [prompt + ids])
            nll += [-dist[len(prompt) - 1 + k, token].item() for k, token in enumerate(ids)]
            returns.append(sum(0.5**k * later.reward for k, later in enumerate(episode.turns[t:])))
            conversation.add_response(ids, stopped)
    first = clone(
        agent, episodes, WarmstartConfig(epochs=1, batch_size=8, learning_rate=1e-3), progress=False
    )
    assert first["loss"] == pytest.approx(np.mean(nll), rel=1e-4)
    # loss of a value head that predicts the mean return
    assert first["value_loss"] == pytest.approx(0.5 * np.var(returns), rel=1e-4)
    last = clone(
        agent,
        episodes,
        WarmstartConfig(epochs=15, batch_size=4, learning_rate=3e-3),
        progress=False,
    )
    assert last["loss"] < 0.3 * first["loss"] and last["value_loss"] < 0.8 * first["value_loss"]


# Saved files


def all_outputs(policy) -> list[torch.Tensor]:
    """Return hidden states and logits of policy and reference, and the values"""
    hidden = backbone(policy)
    with policy.as_reference():
        reference = backbone(policy)
    with torch.no_grad():
        return [
            hidden,
            policy.logits(hidden[0]),
            reference,
            policy.reference.logits(reference[0]),
            policy.value_head(hidden),
        ]


def perturb_all(policy: Policy) -> Policy:
    """Change adapter, reference and value head of a policy, and return it"""
    policy.set_reference()
    perturb(policy.parameters(), 0.02, seed=1)
    perturb(policy.value_head.parameters(), 0.5)
    return policy


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_saved_policy_equals_loaded_and_restored(kind, reference, tmp_path):
    policy = perturb_all(make_policy(kind, value_head_width=8, critic="detached"))
    if not reference:
        policy = make_policy(kind, value_head_width=8, critic="detached")
        perturb(policy.value_head.parameters(), 0.5)
    assert policy.save(tmp_path / "p") == tmp_path / "p"
    loaded = Policy.load(tmp_path / "p", device="cpu")
    restored = make_policy(kind, value_head_width=8, critic="detached", perturbed=False)
    if kind != "plain":
        perturb(restored.parameters(), 0.05, seed=9)
    restored.restore(tmp_path / "p")
    expected = all_outputs(policy)
    for each in (loaded, restored):
        assert all(torch.equal(a, b) for a, b in zip(all_outputs(each), expected))
        assert (
            each.critic == "detached"
            and each.value_head.width == 8
            and (each.adapter is not None) == (policy.adapter is not None)
        )
        assert len(each.parameters()) == len(policy.parameters())
    loaded.save(tmp_path / "q")  # save the loaded policy again
    assert all(
        torch.equal(a, b)
        for a, b in zip(all_outputs(Policy.load(tmp_path / "q", device="cpu")), expected)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_restore_removes_a_later_reference(kind, tmp_path):
    """Restoring a policy that was saved without a reference removes a later one"""
    policy = make_policy(kind)
    initial = backbone(policy)
    expected = all_outputs(make_policy(kind))
    policy.save(tmp_path / "p")
    perturb_all(policy).restore(tmp_path / "p")
    assert torch.equal(backbone(policy), initial)
    with policy.as_reference():
        assert torch.equal(backbone(policy), expected[2])


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_in_memory_models_are_saved_with_their_base(kind, tmp_path):
    """A model without a hub name is loaded from the saved folder alone"""
    model = users_model(kind)
    perturb([p for p in model.parameters() if p.requires_grad], 0.02)
    policy = perturb_all(Policy(model, tiny_tokenizer()))
    policy.save(tmp_path / "p")
    loaded = Policy.load(tmp_path / "p", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(all_outputs(loaded), all_outputs(policy)))
    assert policy.tokenizer.chat_template == loaded.tokenizer.chat_template


@pytest.mark.parametrize("name", ["tiny", "tiny:smollm", "tiny:gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_merged_checkpoints_load_without_llamagym(kind, name, tmp_path):
    policy = perturb_all(make_policy(kind, name))
    before = all_outputs(policy)
    policy.merge_and_save(tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    rows = random_rows(len(tokenizer), (30,))
    assert not isinstance(model, peft.PeftModel) and not getattr(model, "is_quantized", False)
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert (
        full_log_dists(model, rows)[0] - full_log_dists(policy.model, rows)[0]
    ).abs().max() < 2e-4
    # the policy does not change
    assert all(torch.equal(a, b) for a, b in zip(all_outputs(policy), before))


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_oracle_bfloat16_policy_trains_and_loads(kind, tmp_path):
    """Adapters of a bfloat16 base are float32, and saved weights load bit for bit"""
    policy = perturb_all(make_policy(kind, dtype="bfloat16"))
    assert policy.causal_lm.dtype == torch.bfloat16 and {p.dtype for p in policy.parameters()} == {
        torch.float32 if kind == "lora" else torch.bfloat16
    }
    agent = lake_agent(policy, 3, ppo__epochs=1)
    before = [p.detach().clone() for p in policy.parameters()]
    stats = agent.learner.update(collect(agent, episodes=2, num_envs=2))
    # larger than with float32
    assert 1e-4 < stats["max_logprob_diff"] < 0.5 and np.isfinite(stats["ref_kl"])
    # 1 + 1e-4 rounds to 1 in bfloat16
    assert (all if kind == "lora" else any)(
        (p != old).any() for p, old in zip(policy.parameters(), before)
    )
    policy.save(tmp_path / "p")
    loaded = Policy.load(tmp_path / "p", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(all_outputs(loaded), all_outputs(policy)))
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in policy.parameters()]


def test_oracle_only_the_active_adapter_is_trained(tmp_path):
    """A model of the user may have several adapters"""
    model = users_model("lora")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    policy = Policy(model, tiny_tokenizer())
    assert policy.adapter == "other" and all(
        p.shape[0] == 2 or p.shape[1] == 2 for p in policy.parameters()
    )
    perturb(policy.parameters(), 0.1)
    perturb_all(policy).save(tmp_path / "p")
    assert all(
        torch.equal(a, b)
        for a, b in zip(all_outputs(Policy.load(tmp_path / "p", device="cpu")), all_outputs(policy))
    )


def file_contents(folder) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize("failing", ["save_file", "json.dumps", "os.replace"])
def test_oracle_failed_save_keeps_the_old_files(failing, tmp_path, monkeypatch):
    policy = make_policy("lora")
    policy.save(tmp_path / "p")
    old, calls = file_contents(tmp_path), []
    perturb(policy.parameters())
    name, _, attribute = failing.rpartition(".")
    owner = getattr(policy_module, name) if name else policy_module
    original = getattr(owner, attribute)

    def fail(*args, **kwargs):
        calls.append(args)
        if failing == "os.replace" and len(calls) != 2:  # moving the new folder to its place fails
            return original(*args, **kwargs)
        raise OSError("disk full")

    monkeypatch.setattr(owner, attribute, fail)
    with pytest.raises(OSError, match="disk full"):
        policy.save(tmp_path / "p")
    monkeypatch.undo()
    assert file_contents(tmp_path) == old and os.listdir(tmp_path) == ["p"]
    policy.save(tmp_path / "p")
    assert file_contents(tmp_path) != old and os.listdir(tmp_path) == ["p"]


def test_oracle_lora_does_not_copy_the_base():
    base = tiny_model()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    policy = Policy(model, tiny_tokenizer())
    policy.set_reference()
    large_weights = [
        n for n, p in policy.model.named_parameters() if p.numel() > 4096 and "lora_" not in n
    ]
    assert (
        len(large_weights) == len([p for p in tiny_model().parameters() if p.numel() > 4096])
        and policy.causal_lm is base
    )
