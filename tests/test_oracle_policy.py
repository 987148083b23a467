"""`llamagym.policy` and `llamagym.engine` against the whole model: scores, samples, references, files."""

import copy
import os

import numpy as np
import peft
import pytest
import torch
import transformers
from doubles import KINDS, config, lake, lake_agent, make_policy, random_rows, shake, users_model

import llamagym.policy as policy_module
from llamagym.agent import Agent
from llamagym.chat import window
from llamagym.config import GenerateConfig, LoRAConfig, WarmstartConfig
from llamagym.engine import Engine, draw
from llamagym.policy import Policy
from llamagym.rollout import collect
from llamagym.task import RandomAgent, play
from llamagym.tiny import FAMILIES, tiny_model, tiny_tokenizer
from llamagym.warmstart import clone

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing", "ignore:.*save_embedding_layers",
                                        "ignore:Could not find a config file")  # fmt: skip
# what a whole model does of its own after the head, that a scorer of single hidden states could forget
TAIL = {"gemma2": "final_logit_softcapping", "cohere": "logit_scale", "granite": "logits_scaling"}


def whole_model(model, rows, temperature=1.0) -> list[torch.Tensor]:
    """The oracle: log-distributions [T, V] of each row alone, unpadded, by the model's own forward"""
    with torch.no_grad():
        return [(model(input_ids=torch.tensor([row])).logits[0].double() / temperature).log_softmax(-1) for row in rows]


@pytest.mark.parametrize(("kind", "family"), [*(("plain", family) for family in FAMILIES), ("lora", "smollm"), ("lora", "gemma2"), ("nf4", "llama")])
def test_oracle_score_is_the_whole_models(kind, family):
    policy = make_policy(kind, f"tiny:{family}")
    rows = random_rows(policy.causal_lm.config.vocab_size, (90, 7, 70, 2))  # longer than the sliding windows of 64
    where = [(r, t) for r, row in enumerate(rows) for t in range(1, len(row), 3)] + [(3, 1), (0, 89)]
    padded = torch.full((4, 90), policy.pad_id)
    for row, ids in zip(padded, rows):
        row[: len(ids)] = torch.tensor(ids)
    index, position = (torch.tensor(c) for c in zip(*where))
    for temperature in (1.0, 0.7):
        expected = whole_model(policy.model, rows, temperature)
        with torch.no_grad():
            score = policy.score(padded, index, position, temperature)
        for i, (r, t) in enumerate(where):
            dist = expected[r][t - 1]
            assert abs(score.logprobs[i].item() - dist[rows[r][t]].item()) < 5e-5
            assert abs(score.entropy[i].item() + (dist.exp() * dist).sum().item()) < 5e-5
            assert (score.log_dist[i] - dist).abs().max() < 1e-4
    if family in TAIL:  # the oracle sees what it is there to see: without it the distribution is another
        assert getattr(policy.causal_lm.config, TAIL[family])
        bare = policy.causal_lm.get_output_embeddings()(score.hidden).log_softmax(-1)
        assert (bare - torch.stack([whole_model(policy.model, [rows[r]])[0][t - 1] for r, t in where])).abs().max() > 0.1


def test_oracle_score_in_float64():
    """The whole model once more, in float64: what float32 costs is far below the 1e-4 that sampler and trainer may differ by"""
    policy = make_policy("lora")
    rows = random_rows(policy.causal_lm.config.vocab_size, (40,))
    (exact,) = whole_model(copy.deepcopy(policy.model).double(), rows)
    with torch.no_grad():
        score = policy.score(torch.tensor(rows), torch.zeros(39, dtype=torch.long), torch.arange(1, 40))
    assert (score.logprobs - exact[torch.arange(39), rows[0][1:]]).abs().max() < 1e-5


def test_oracle_score_has_the_whole_models_gradient():
    policy = make_policy("lora")
    rows = torch.tensor(random_rows(policy.causal_lm.config.vocab_size, (12, 12)))
    weights = torch.linspace(-1, 1, 10)
    policy.score(rows, torch.tensor([0, 1] * 5), torch.tensor([2, 3, 4, 5, 6, 7, 8, 9, 10, 11]), 0.8).logprobs.mul(weights).sum().backward()
    ours = [p.grad.clone() for p in policy.parameters()]
    policy.model.zero_grad()
    double = copy.deepcopy(policy.model).double()
    dist = (double(input_ids=rows).logits / 0.8).log_softmax(-1)
    sum(w * dist[i % 2, t - 1, rows[i % 2, t]] for i, (w, t) in enumerate(zip(weights.double(), range(2, 12)))).backward()
    for mine, p in zip(ours, (p for p in double.parameters() if p.requires_grad)):
        assert (mine - p.grad).norm() <= 1e-5 * p.grad.norm()


# sampler and trainer


def check_gap(policy, episodes, temperature=1.0) -> int:
    """The sampler's numbers against the whole model's, row by row; how many there were"""
    count = 0
    for episode in episodes:
        dists = whole_model(policy.model, [s.ids for s in episode.segments], temperature)
        for turn in episode.turns:
            for i, token in enumerate(turn.response_ids):
                dist = dists[turn.segment][turn.start + i - 1]
                assert abs(turn.logprobs[i] - dist[token].item()) < 1e-4
                assert abs(turn.entropy[i] + (dist.exp() * dist).sum().item()) < 1e-4
                count += 1
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_sampler_and_trainer_agree(kind, taught):
    agent = lake_agent(taught(kind), generate__temperature=0.8, ppo__epochs=1, ppo__learning_rate=3e-4)
    for _ in range(2):  # the second time after an update
        episodes = collect(agent, episodes=4, num_envs=3)
        assert check_gap(agent.policy, episodes, 0.8) > 30 and max(map(len, episodes)) == 6
        before = [p.detach().clone() for p in agent.policy.parameters()]
        assert 0 < agent.learner.learn(episodes)["logprob_gap"] < 1e-4
        assert any((p != old).any() for p, old in zip(agent.policy.parameters(), before))


@pytest.mark.parametrize("task", [lake(5, history="template"), lake(5, context=window(2))], ids=["template", "window"])
def test_oracle_sampler_and_trainer_agree_in_every_context(task, taught):
    agent = lake_agent(taught("lora"), task=task)
    episodes = collect(agent, episodes=4, num_envs=4)
    assert check_gap(agent.policy, episodes) > 40
    assert agent.learner.learn(episodes)["logprob_gap"] < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_sampler_of_every_family(family):
    """Prompts of different lengths side by side, beyond the sliding window, and responses that cross it"""
    policy = make_policy("plain", f"tiny:{family}")
    prompts = random_rows(policy.causal_lm.config.vocab_size, (80, 3, 60))
    samples = Engine(policy, {2}, GenerateConfig(max_new_tokens=8, temperature=0.9)).sample(prompts, [np.random.default_rng(i) for i in range(3)])
    for prompt, sample in zip(prompts, samples):
        (dist,) = whole_model(policy.model, [prompt + sample.ids], 0.9)
        dist = dist[len(prompt) - 1 : -1]
        assert np.abs(sample.logprobs - dist[torch.arange(len(sample.ids)), sample.ids].numpy()).max() < 1e-4
        assert np.abs(sample.entropy + (dist.exp() * dist).sum(-1).numpy()).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_number_of_slots_changes_nothing(kind, taught):
    agent = lake_agent(taught(kind), max_steps=6)
    slots = (1, 16) if kind == "nf4" else (1, 4, 16)
    played = {n: collect(agent, episodes=17, num_envs=n, seed=3) for n in slots}
    assert len({len(e) for e in played[1]}) > 1  # episodes of different lengths: slots are refilled out of step
    assert len({tuple(t.response_ids) for e in played[1] for t in e.turns}) > 5
    for n in slots[1:]:
        assert [e.index for e in played[n]] == list(range(17))
        for one, many in zip(played[1], played[n]):
            assert [s.ids for s in one.segments] == [s.ids for s in many.segments]
            assert [(t.action, t.reward, t.valid, t.terminated, t.truncated) for t in one.turns] == [
                (t.action, t.reward, t.valid, t.terminated, t.truncated) for t in many.turns]  # fmt: skip
            assert one.final_ids == many.final_ids
            for a, b in zip(one.turns, many.turns):
                assert np.abs(a.logprobs - b.logprobs).max() < 1e-4


# what is drawn


def test_oracle_draw_inverts_the_distribution():
    dist = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64).expand(7, 6)
    uniform = torch.tensor([0.0, 0.1999, 0.2, 0.6999, 0.7001, 0.9999, 1 - 2**-53], dtype=torch.float64)
    assert draw(dist, uniform).tolist() == [1, 1, 3, 3, 4, 4, 4]
    for mass in (1 - 1e-7, 1.0, 1 + 1e-7):  # a float32 softmax adds up to about 1: never an id without mass, at either end
        assert draw(dist[:2].float() * mass, uniform[[0, -1]]).tolist() == [1, 4]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_oracle_sampled_frequencies(temperature):
    policy = make_policy("plain")
    n, prompt = 4000, [1, 20, 300]
    samples = Engine(policy, (), GenerateConfig(max_new_tokens=1, temperature=temperature)).sample([prompt] * n, [np.random.default_rng(i) for i in range(n)])
    expected = whole_model(policy.model, [prompt], temperature)[0][-1].exp().numpy()
    likely = np.flatnonzero(expected > 0.002)
    observed = np.bincount([s.ids[0] for s in samples], minlength=len(expected))
    assert len(likely) > 10
    error = (observed[likely] - n * expected[likely]) / np.sqrt(n * expected[likely] * (1 - expected[likely]))
    assert np.abs(error).max() < 4.5 and 0.7 < np.sqrt((error**2).mean()) < 1.3


def test_oracle_greedy_and_alternatives():
    policy = make_policy("plain")
    prompts = random_rows(policy.causal_lm.config.vocab_size, (5, 9))
    for sample, prompt in zip(Engine(policy, (), GenerateConfig(max_new_tokens=5, temperature=0.6)).sample(prompts, [None, None], greedy=True, top=3), prompts):
        dist = whole_model(policy.model, [prompt + sample.ids], 0.6)[0][len(prompt) - 1 : -1]
        assert sample.ids == dist.argmax(-1).tolist()
        values, ids = dist.topk(3)
        assert [[i for i, _ in token] for token in sample.top] == ids.tolist()
        assert np.abs(np.array([[v for _, v in token] for token in sample.top]) - values.numpy()).max() < 1e-4


@pytest.mark.parametrize("options", [dict(top_p=0.3), dict(top_k=5), dict(top_p=0.5, top_k=7, temperature=2.0)], ids=str)
def test_oracle_truncation_is_for_evaluation(options):
    policy, n, prompt = make_policy("plain"), 300, [1, 20, 300]
    settings = GenerateConfig(max_new_tokens=1, **options)
    dist = whole_model(policy.model, [prompt], settings.temperature)[0][-1]
    order = dist.argsort(descending=True)
    kept = order[: settings.top_k] if settings.top_k else order
    mass = dist[kept].exp() / dist[kept].exp().sum()
    kept = kept[: int((mass.cumsum(0) - mass < settings.top_p).sum())]
    renormalised = dist - dist[kept].logsumexp(-1)
    streams = [np.random.default_rng(i) for i in range(n)]
    cut = Engine(policy, (), settings, truncate=True).sample([prompt] * n, streams)
    assert {s.ids[0] for s in cut} == set(kept.tolist())
    assert max(abs(s.logprobs[0] - renormalised[s.ids[0]].item()) for s in cut) < 1e-4
    assert all(np.isfinite(s.entropy).all() for s in cut)
    free = Engine(policy, (), settings).sample([prompt] * n, streams)  # training samples from all of it
    assert {s.ids[0] for s in free} - set(kept.tolist())
    assert max(abs(s.logprobs[0] - dist[s.ids[0]].item()) for s in free) < 1e-4


def test_oracle_a_response_ends_at_its_first_stop_id():
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
        replay.random(len(sample.ids))  # a stream gives one number per sampled token and no more
        assert streams[i].random() == replay.random()


# references


def trunk(policy, ids=((1, 20, 300, 7, 41),)):
    with torch.no_grad():
        return policy.trunk(torch.tensor(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_the_reference_is_the_policy_after_the_warm_start(kind, taught):
    policy = taught(kind)
    now, head = trunk(policy), policy.logits(trunk(policy)[0])
    with policy.as_reference():
        assert torch.equal(trunk(policy), now)
    assert torch.equal(policy.reference_logits(now[0]), head)
    agent = lake_agent(policy, ppo__learning_rate=1e-3)
    first = collect(agent, episodes=4, num_envs=4)
    assert agent.learner.learn(first)["ref_kl"] > 0  # the last epoch's: the policy has left it
    for turn in (t for e in first for t in e.turns):
        assert np.abs(turn.ref_logprobs - turn.logprobs).max() < 1e-4
    assert not torch.equal(trunk(policy), now)
    with policy.as_reference():
        assert torch.equal(trunk(policy), now)  # and the reference has not moved
    assert not any(p.requires_grad for n, p in policy.model.named_parameters() if ".reference." in n)


@pytest.mark.parametrize("kind", ["lora", "nf4"])
def test_oracle_without_a_warm_start_the_reference_is_the_base(kind):
    policy, bare = make_policy(kind), make_policy(kind, shaken=False)
    now = trunk(policy)
    with policy.model.disable_adapter():
        off = trunk(policy)
    with policy.as_reference():
        assert torch.equal(trunk(policy), off)
    assert torch.equal(off, trunk(bare)) and not torch.equal(off, now)
    assert torch.equal(trunk(policy), now)
    assert all(p.requires_grad for p in policy.parameters()) and len(policy.parameters()) == len(bare.parameters())


def test_oracle_a_plain_models_reference_is_what_it_was_when_learning_began():
    policy = make_policy("plain")
    then = trunk(policy)
    agent = lake_agent(policy, 2, ppo__learning_rate=1e-3)
    agent.learner.learn(collect(agent, episodes=2, num_envs=2))
    with policy.as_reference():
        assert torch.equal(trunk(policy), then)
    assert not torch.equal(trunk(policy), then)


@pytest.mark.parametrize(
    "lora",
    [LoRAConfig(r=4, target_modules=["q_proj", "lm_head"]), LoRAConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
     peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")],
    ids=["head", "embeddings", "whole-head"],
)  # fmt: skip
def test_oracle_adapters_on_head_and_embeddings(lora, tmp_path):
    policy = make_policy("lora", lora=lora)
    shake(policy.parameters(), 0.1)
    rows = random_rows(policy.causal_lm.config.vocab_size, (20,))
    (expected,) = whole_model(policy.model, rows)
    with torch.no_grad():
        score = policy.score(torch.tensor(rows), torch.zeros(19, dtype=torch.long), torch.arange(1, 20))
    assert (score.log_dist - expected[:-1]).abs().max() < 1e-4
    with policy.model.disable_adapter():
        (base,) = whole_model(policy.model, rows)

    def reference():
        with policy.as_reference():
            hidden = policy.trunk(torch.tensor(rows))[0]
        return policy.reference_logits(hidden).log_softmax(-1)

    assert (reference() - base).abs().max() < 1e-4 and (base - expected).abs().max() > 0.1
    policy.set_reference()
    assert (reference() - expected).abs().max() < 1e-4
    policy.save(tmp_path / "p")
    again = Policy.load(tmp_path / "p", device="cpu")
    assert torch.equal(trunk(again), trunk(policy)) and torch.equal(again.logits(score.hidden), policy.logits(score.hidden))
    plain = transformers.AutoModelForCausalLM.from_pretrained(policy.merge_and_save(tmp_path / "m"))
    assert (whole_model(plain, rows)[0] - expected).abs().max() < 1e-4


# the warm start


def test_oracle_clone_steps_the_critic_by_this_batch_alone():
    """Each step's gradient is that of its own batch; none is left for the first update to find"""
    policy = make_policy("lora", shaken=False)
    fresh, whole = [], []
    weight = policy.value_head.out.weight
    weight.register_hook(lambda grad: fresh.append(grad.clone()))
    weight.register_post_accumulate_grad_hook(lambda p: whole.append(p.grad.clone()))
    task = lake(4)
    episodes = play(task, RandomAgent(task), 16)
    for i, episode in enumerate(episodes):
        episode.turns[-1].reward = 1.0 + i
    clone(Agent.for_task(task, policy, config=config()), episodes, WarmstartConfig(epochs=2, batch_size=8), progress=False)
    assert len(fresh) == 4 and fresh[0].norm() > 0
    assert all(torch.equal(a, b) for a, b in zip(fresh, whole))
    assert all(p.grad is None or not p.grad.any() for p in [*policy.parameters(), *policy.value_head.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_clone_leaves_no_trace_of_its_trainer(kind):
    """Nothing of the trainer's own stays on the model, whose copies and references would carry it along"""
    policy, task = make_policy(kind), lake(2)
    policy.set_reference()
    about = lambda m: ("forward" in m.__dict__, m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
    module_state = lambda: {name: about(m) for name, m in policy.model.named_modules()}
    before, settings = module_state(), policy.causal_lm.config.to_dict()
    trained = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    kinds = {n: (p.dtype, p.device) for n, p in policy.model.named_parameters()}
    clone(Agent.for_task(task, policy, config=config()), play(task, RandomAgent(task), 2), WarmstartConfig(epochs=1), progress=False)
    assert module_state() == before and policy.causal_lm.config.to_dict() == settings
    assert [n for n, p in policy.model.named_parameters() if p.requires_grad] == trained
    assert {n: (p.dtype, p.device) for n, p in policy.model.named_parameters()} == kinds
    other = copy.deepcopy(policy)
    hidden = torch.randn(5, policy.hidden_size)
    for p in (policy, other):
        assert torch.equal(p.reference_logits(hidden), p.logits(hidden)) and len(p.logits(hidden)) == 5


def test_oracle_clone_imitates_responses_and_learns_returns():
    """The first batch's losses, against loops over the transcripts' tokens in float64; then both fall"""
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
            ids, stopped = conversation.format.response(turn.response)
            assert stopped and policy.tokenizer.decode(ids[:-1]) == turn.response
            (dist,) = whole_model(double, [prompt + ids])
            nll += [-dist[len(prompt) - 1 + k, token].item() for k, token in enumerate(ids)]
            returns.append(sum(0.5**k * later.reward for k, later in enumerate(episode.turns[t:])))
            conversation.add_response(ids, stopped)
    first = clone(agent, episodes, WarmstartConfig(epochs=1, batch_size=8, learning_rate=1e-3), progress=False)
    assert first["loss"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert first["value_loss"] == pytest.approx(0.5 * np.var(returns), rel=1e-4)  # of a head that predicts their mean
    last = clone(agent, episodes, WarmstartConfig(epochs=15, batch_size=4, learning_rate=3e-3), progress=False)
    assert last["loss"] < 0.3 * first["loss"] and last["value_loss"] < 0.8 * first["value_loss"]


# files


def states(policy) -> list[torch.Tensor]:
    """What a policy does: as itself, as its reference, as its critic"""
    hidden = trunk(policy)
    with policy.as_reference():
        reference = trunk(policy)
    with torch.no_grad():
        return [hidden, policy.logits(hidden[0]), reference, policy.reference_logits(reference[0]), policy.value_head(hidden)]


def moved(policy: Policy) -> Policy:
    """A policy whose adapter, reference and value head are all different from fresh ones"""
    policy.set_reference()
    shake(policy.parameters(), 0.02, seed=1)
    shake(policy.value_head.parameters(), 0.5)
    return policy


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_save_load_restore(kind, reference, tmp_path):
    policy = moved(make_policy(kind, value_hidden=8, critic="detached"))
    if not reference:
        policy = make_policy(kind, value_hidden=8, critic="detached")
        shake(policy.value_head.parameters(), 0.5)
    assert policy.save(tmp_path / "p") == tmp_path / "p"
    loaded = Policy.load(tmp_path / "p", device="cpu")
    other = make_policy(kind, value_hidden=8, critic="detached", shaken=False)
    if kind != "plain":
        shake(other.parameters(), 0.05, seed=9)
    other.restore(tmp_path / "p")
    expected = states(policy)
    for again in (loaded, other):
        assert all(torch.equal(a, b) for a, b in zip(states(again), expected))
        assert again.critic == "detached" and again.value_head.width == 8 and again.is_peft == policy.is_peft
        assert len(again.parameters()) == len(policy.parameters())
    loaded.save(tmp_path / "q")  # and again, from what was loaded
    assert all(torch.equal(a, b) for a, b in zip(states(Policy.load(tmp_path / "q", device="cpu")), expected))


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_restore_leaves_no_later_reference(kind, tmp_path):
    """A policy saved before it had a reference is compared to its base, also when it is put back into one that has got another since"""
    policy = make_policy(kind)
    then = trunk(policy)
    expected = states(make_policy(kind))
    policy.save(tmp_path / "p")
    moved(policy).restore(tmp_path / "p")
    assert torch.equal(trunk(policy), then)
    with policy.as_reference():
        assert torch.equal(trunk(policy), expected[2])


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_in_memory_models_bring_their_base_along(kind, tmp_path):
    """A model without a name: what is saved is enough to make it again"""
    model = users_model(kind)
    shake([p for p in model.parameters() if p.requires_grad], 0.02)
    policy = moved(Policy(model, tiny_tokenizer()))
    policy.save(tmp_path / "p")
    loaded = Policy.load(tmp_path / "p", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(states(loaded), states(policy)))
    assert policy.tokenizer.chat_template == loaded.tokenizer.chat_template


@pytest.mark.parametrize("name", ["tiny", "tiny:smollm", "tiny:gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_merged_checkpoints_need_nothing_of_ours(kind, name, tmp_path):
    policy = moved(make_policy(kind, name))
    before = states(policy)
    policy.merge_and_save(tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    rows = random_rows(len(tokenizer), (30,))
    assert not isinstance(model, peft.PeftModel) and not getattr(model, "is_quantized", False)
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert (whole_model(model, rows)[0] - whole_model(policy.model, rows)[0]).abs().max() < 2e-4
    assert all(torch.equal(a, b) for a, b in zip(states(policy), before))  # the policy is left as it was


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_oracle_bfloat16(kind, tmp_path):
    """A base in half precision: its adapter is trained in float32, and what was saved is what is loaded, bit for bit"""
    policy = moved(make_policy(kind, dtype="bfloat16"))
    assert policy.causal_lm.dtype == torch.bfloat16 and {p.dtype for p in policy.parameters()} == {torch.float32 if kind == "lora" else torch.bfloat16}
    agent = lake_agent(policy, 3, ppo__epochs=1)
    before = [p.detach().clone() for p in policy.parameters()]
    stats = agent.learner.learn(collect(agent, episodes=2, num_envs=2))
    assert 1e-4 < stats["logprob_gap"] < 0.5 and np.isfinite(stats["ref_kl"])  # which float32 does not have
    assert (all if kind == "lora" else any)((p != old).any() for p, old in zip(policy.parameters(), before))  # 1 + 1e-4 is 1 in bfloat16
    policy.save(tmp_path / "p")
    loaded = Policy.load(tmp_path / "p", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(states(loaded), states(policy)))
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in policy.parameters()]


def test_oracle_several_adapters_of_a_users_own(tmp_path):
    """The active one is trained; what else is on the model stays as it is"""
    model = users_model("lora")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    policy = Policy(model, tiny_tokenizer())
    assert policy.adapter == "other" and all(p.shape[0] == 2 or p.shape[1] == 2 for p in policy.parameters())
    shake(policy.parameters(), 0.1)
    moved(policy).save(tmp_path / "p")
    assert all(torch.equal(a, b) for a, b in zip(states(Policy.load(tmp_path / "p", device="cpu")), states(policy)))


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("failing", ["save_file", "json.dumps", "os.replace"])
def test_oracle_a_save_that_fails_leaves_the_old_one(failing, tmp_path, monkeypatch):
    policy = make_policy("lora")
    policy.save(tmp_path / "p")
    old, calls = contents(tmp_path), []
    shake(policy.parameters())
    name, _, attribute = failing.rpartition(".")
    owner = getattr(policy_module, name) if name else policy_module
    real = getattr(owner, attribute)

    def fails(*args, **kwargs):
        calls.append(args)
        if failing == "os.replace" and len(calls) != 2:  # the new folder can't take its place
            return real(*args, **kwargs)
        raise OSError("disk full")

    monkeypatch.setattr(owner, attribute, fails)
    with pytest.raises(OSError, match="disk full"):
        policy.save(tmp_path / "p")
    monkeypatch.undo()
    assert contents(tmp_path) == old and os.listdir(tmp_path) == ["p"]
    policy.save(tmp_path / "p")
    assert contents(tmp_path) != old and os.listdir(tmp_path) == ["p"]


def test_oracle_no_copy_of_the_base_is_made_for_lora():
    base = tiny_model()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    policy = Policy(model, tiny_tokenizer())
    policy.set_reference()
    names = [n for n, p in policy.model.named_parameters() if p.numel() > 4096 and "lora_" not in n]
    assert len(names) == len([p for p in tiny_model().parameters() if p.numel() > 4096]) and policy.causal_lm is base
