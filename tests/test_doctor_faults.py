"""Silent faults are named and healthy runs are not; the measures behind the checks agree with independent computations."""

import copy
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import config, lake, make_policy, perturb

from llamagym.agent import Agent
from llamagym.agents.scored import ScoredAgent
from llamagym.algorithms.advantages import turn_gae
from llamagym.algorithms.registry import ALGORITHMS
from llamagym.config import Config
from llamagym.episodes.episode import Episode, Turn
from llamagym.rollout import collect
from llamagym.training.dependence import (
    alignment,
    dependence,
    effects_of,
    predictability,
    reward_dependences,
    turn_records,
)
from llamagym.training.doctor import CHECKS, diagnose
from llamagym.training.findings import RunState, adjust, either
from llamagym.training.rescoring import (
    Decision,
    Rescoring,
    UpdateObserver,
    choose_turns,
    rescore,
    score_decisions,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import doctor as benchmark  # noqa: E402

# The benchmark: a small version here, the whole one in the slow test


@pytest.mark.parametrize(
    "kind,name", [(k, n) for k, names in benchmark.QUICK.items() for n in names]
)
def test_faults_are_named_and_healthy_runs_are_not(kind, name):
    (row,) = benchmark.train(kind, name, seed=3, updates=2)
    assert row["named"] if kind == "fault" else row["findings"] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fault", "healthy"])
def test_whole_benchmark(kind):
    names = benchmark.FAULTS if kind == "fault" else benchmark.HEALTHY
    rows = [benchmark.train(kind, name, seed=5)[0] for name in names]
    if kind == "fault":
        assert len(rows) >= 20 and sum(not row["named"] for row in rows) <= 2
    else:
        assert len(rows) == 20 and [row["name"] for row in rows if row["findings"]] == []


# Rescoring


def agent_of(kind: str, scored: bool = False, **options) -> Agent:
    maker = ScoredAgent if scored else Agent
    return maker.for_task(lake(max_steps=4), make_policy(kind), config=config(**options))


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_rescoring_agrees_with_the_full_model(kind, scored):
    agent = agent_of(kind, scored, generate__temperature=1.3)
    episodes = collect(agent, episodes=32, num_envs=16)
    chosen = choose_turns(episodes)
    decisions = iter(score_decisions(agent, chosen))
    assert 0 < len(chosen) <= 2
    for episode, turns in chosen:
        for turn in turns:
            ids = episode.segments[turn.segment].ids
            options = turn.candidate_ids or [turn.response_ids]
            scores = []
            for option in options:
                row = torch.tensor([[*ids[: turn.start], *option]])
                with torch.no_grad():
                    logits = agent.policy.model(row).logits[0, turn.start - 1 : -1]
                scores.append(logits)
            if scored:
                sums = torch.stack([
                    s.log_softmax(-1)[torch.arange(len(o)), torch.tensor(o)].sum() for s, o in zip(scores, options)
                ])  # fmt: skip
                expected = [(sums / 1.3).log_softmax(-1)[options.index(turn.response_ids)]]
            else:
                logprobs = (scores[0] / 1.3).log_softmax(-1)
                expected = [logprobs[i, token] for i, token in enumerate(turn.response_ids)]
            for value, recorded in zip(expected, turn.logprobs, strict=True):
                decision = next(decisions)
                assert decision.logprob(1.3) == pytest.approx(float(value), abs=1e-4)
                assert decision.recorded == pytest.approx(float(recorded))
    assert next(decisions, None) is None
    assert rescore(agent, chosen).agrees


def altered(agent: Agent, cause: str):
    "Collect episodes and then change the agent, so that the episodes come from another sampler"
    policy = agent.policy
    if cause == "temperature":
        agent.learner.temperature = 0.7
        return collect(agent, episodes=16, num_envs=16)
    if cause == "base":
        with torch.no_grad():
            kept = [p.clone() for p in policy.parameters()]
            for p in policy.parameters():
                p.zero_()
        episodes = collect(agent, episodes=16, num_envs=16)
        with torch.no_grad():
            for p, old in zip(policy.parameters(), kept):
                p.copy_(old)
        return episodes
    if cause == "reference":
        policy.set_reference()
    episodes = collect(agent, episodes=16, num_envs=16)
    if cause in ("reference", "unknown"):
        perturb(policy.parameters(), scale=0.05, seed=1)
    if cause == "shift":
        for episode in episodes:
            for turn in episode.turns:
                turn.logprobs = np.roll(turn.logprobs, 1)
    return episodes


@pytest.mark.parametrize("cause", ["temperature", "base", "reference", "shift", "unknown"])
def test_rescoring_explains_a_difference(cause):
    agent = agent_of("lora")
    episodes = altered(agent, cause)
    agent.policy.parameters()[0].requires_grad_(False)
    version = agent.policy.version
    required = [p.requires_grad for p in agent.policy.model.parameters()]
    found = rescore(agent, choose_turns(episodes))
    assert not found.agrees and found.explanation == cause
    if cause == "temperature":
        assert found.fitted_temperature == pytest.approx(1.0, rel=0.01)
    assert agent.policy.version == version  # nothing that caches depend on has changed
    assert [p.requires_grad for p in agent.policy.model.parameters()] == required


@pytest.mark.parametrize(
    "distinct,explanation", [(1, "unknown"), (2, "unknown"), (3, "temperature")]
)
def test_temperature_explains_only_what_a_single_decision_could_not(distinct, explanation):
    "Of 20 decisions 16 are certain, the others are scored at temperature 0.7"
    rng = np.random.default_rng(0)
    uncertain = torch.tensor(rng.normal(size=(distinct, 5)), dtype=torch.float32)
    decisions = [Decision(torch.tensor([50.0, 0, 0, 0, 0]), 0, 0.0, i) for i in range(16)]
    for i in range(4):
        scores = uncertain[i % distinct]
        recorded = float((scores / 0.7).log_softmax(-1)[1])
        decisions.append(Decision(scores, 1, recorded, 16 + i))
    found = Rescoring(decisions, temperature=1.0, tolerance=1e-3)
    assert found.fitted_temperature == pytest.approx(0.7, rel=0.01)
    assert (found.num_different, found.explanation) == (distinct, explanation)


def test_observer_sees_which_weights_an_update_changes():
    agent = agent_of("lora")
    episodes = collect(agent, episodes=8, num_envs=8)
    unchanged = UpdateObserver(agent, episodes).finish(dict(approx_kl=0.0))
    observer = UpdateObserver(agent, episodes)
    metrics = agent.learner.update(episodes)
    changed = observer.finish(metrics | dict(approx_kl=0.0))
    assert unchanged.weight_change == unchanged.update_kl == 0
    assert 0 < changed.weight_change < 1 and 0 < changed.update_kl < 1
    assert changed.num_optimized == changed.num_trainable > 0
    agent.policy.parameters()[0].requires_grad_(False)
    later = UpdateObserver(agent, episodes, with_rescoring=False).finish(metrics)
    assert later.rescoring is None and later.update_kl == metrics["approx_kl"]
    assert later.num_trainable == changed.num_trainable - 1


# Dependence


@pytest.mark.parametrize("categorical", [False, True])
def test_dependence_is_what_exceeds_permutations(categorical):
    rng = np.random.default_rng(0)
    groups, factor = rng.integers(3, size=120), rng.integers(3, size=120)
    numbers = np.where(rng.random(120) < 0.5, factor, rng.integers(3, size=120)) + groups

    def between(numbers: np.ndarray, factor: np.ndarray) -> float:
        columns = np.eye(6)[numbers] if categorical else numbers[:, None].astype(float)
        total = 0.0
        for g in range(3):
            part = columns[groups == g]
            for f in range(3):
                own = columns[(groups == g) & (factor == f)]
                total += len(own) * np.square(own.mean(0) - part.mean(0)).sum()
        return total

    def permuted() -> np.ndarray:
        shuffled = factor.copy()
        for g in range(3):
            shuffled[groups == g] = rng.permutation(factor[groups == g])
        return shuffled

    chance = np.array([between(numbers, permuted()) for _ in range(2000)])
    expected = (between(numbers, factor) - chance.mean()) / chance.std()
    outcome = [f"state {n}" for n in numbers] if categorical else numbers.tolist()
    found = dependence(outcome, groups.tolist(), factor.tolist())
    assert found.z == pytest.approx(expected, rel=0.1)


def episodes_of(rng, num=64, length=6, advantage_lag=0, reward_lag=0) -> list[Episode]:
    "Play an environment whose reward is 1 if the action is the parity of the number that is shown"
    episodes = []
    for index in range(num):
        shown, actions = rng.integers(4, size=length), rng.integers(2, size=length)
        rewards = np.roll((shown % 2 == actions).astype(float), -reward_lag)
        advantages = np.roll(turn_gae(rewards, np.full(length, 2.0), 1.0, 0.9)[0], -advantage_lag)
        turns = [
            Turn(f"Number {n}.", str(a), [int(a)], action=int(a), reward=r, advantage=g, value=2.0)
            for n, a, r, g in zip(shown, actions, rewards.tolist(), advantages.tolist())
        ]
        turns[-1].terminated = True
        episodes.append(Episode(turns, seed=index, index=index))
    return episodes


METRICS = dict(
    mean_return=3.0, mean_episode_length=6.0, entropy=0.7, invalid_rate=0.0, ref_kl=0.1, approx_kl=0.01, explained_variance=0.4,
    grad_norm=0.3, max_logprob_diff=1e-6, tokens=384.0, failed_episodes=0)  # fmt: skip


def issues(episodes, history=1, **fields) -> list[str]:
    state = RunState([METRICS] * history, episodes, Config(), **fields)
    return [finding.issue for finding in diagnose(state)]


@pytest.mark.parametrize("seed", range(5))
def test_rewards_and_advantages_are_found_on_the_turn_they_belong_to(seed):
    rng = np.random.default_rng(seed)
    assert issues(episodes_of(rng)) == []
    assert issues(episodes_of(rng, reward_lag=1)) == ["rewards on the wrong turn"]
    for lag in (1, -1):
        assert issues(episodes_of(rng, advantage_lag=lag)) == ["advantages on the wrong turn"]


def test_a_noisy_reward_that_depends_on_the_next_state_is_on_its_own_turn():
    rng = np.random.default_rng(0)
    episodes = episodes_of(rng)
    for episode in episodes:
        for turn, following in zip(episode.turns, episode.turns[1:]):
            turn.reward = float("3" in following.observation)
    own, next_ = reward_dependences(turn_records(episodes))
    assert abs(own.z) < 3 and abs(next_.z) < 3


@pytest.mark.parametrize("seed", range(5))
def test_expected_number_of_equal_episodes_is_an_upper_bound(seed):
    """Episodes of a policy that is rather sure of itself repeat, and are no duplicates"""
    rng = np.random.default_rng(seed)
    episodes = episodes_of(rng, length=2)
    for episode in episodes:
        for turn in episode.turns:
            turn.observation, p = "Same.", 0.8
            turn.response_ids = [int(rng.random() < p)]
            turn.logprobs = np.log([p if turn.response_ids[0] else 1 - p])
    assert "duplicate episodes" not in issues(episodes)
    uncertain = copy.deepcopy(episodes)
    for episode in uncertain:
        for turn in episode.turns:
            turn.response_ids, turn.logprobs = [1, 1, 1], np.log([0.1, 0.1, 0.1])
    assert "duplicate episodes" in issues(uncertain)


def test_seeds_are_compared_with_groups_and_earlier_updates():
    episodes = episodes_of(np.random.default_rng(0))
    assert issues(episodes, earlier_seeds=frozenset(range(64))) == ["repeated seeds"]
    grouped = [replace(episode, seed=index // 8) for index, episode in enumerate(episodes)]
    assert issues(grouped) == ["repeated seeds"]
    assert issues(grouped, algorithm=ALGORITHMS["rloo"]) == []


def test_predictability_is_that_of_the_best_guess_in_other_episodes():
    rng = np.random.default_rng(0)

    def games(noise: float) -> list[Episode]:
        secrets = rng.integers(4, size=2000)
        values = secrets + noise * rng.normal(size=2000)
        return [
            Episode([Turn(f"{s}", "", reward=v, terminated=True)]) for s, v in zip(secrets, values)
        ]

    assert predictability(games(0.0), 1.0) > 0.99
    # the variance of four numbers is 1.25
    assert predictability(games(1.25**0.5), 1.0) == pytest.approx(0.5, abs=0.05)
    lucky = [Episode([Turn(f"{i}", "", reward=float(rng.normal()))]) for i in range(500)]
    assert predictability(lucky, 1.0) < 0.02


def test_actions_have_an_effect_if_only_the_text_of_a_response_does():
    rng = np.random.default_rng(0)
    episodes = episodes_of(rng, length=1, num=400)
    for episode in episodes:
        turn = episode.turns[0]
        turn.response = f"Action: {turn.action}" if rng.integers(2) else f"{turn.action}"
        turn.reward = float(turn.response.startswith("Action"))
    effects = dict(effects_of(turn_records(episodes), "action"))
    assert max(effect.z for effect in effects.values()) < 3
    assert "actions without effect" not in issues(episodes)


def test_actions_have_an_effect_if_it_depends_on_what_was_shown_before():
    rng = np.random.default_rng(0)
    episodes = []
    for index in range(400):
        color, answer = rng.integers(2, size=2).tolist()
        shown = Turn(f"Color {color}.", "stay", candidate_ids=[[5]], action=2)
        asked = Turn("Answer.", str(answer), action=answer, reward=float(answer == color))
        episodes.append(Episode([shown, replace(asked, terminated=True)], seed=index))
    records = turn_records(episodes)
    assert dict(effects_of(records, given="observation"))["reward"].z < 3
    assert dict(effects_of(records, given="history"))["reward"].is_clear
    assert "actions without effect" not in issues(episodes)


def test_alignment_needs_episodes_of_some_turns():
    assert alignment([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]])[0] == (0.0, 0)


# Advice


def states_with_every_issue(**fields) -> list[RunState]:
    "Return states in which checks of the metrics and of the batch find something, under one configuration"
    rng = np.random.default_rng(0)
    bad = METRICS | dict(
        mean_return=1.0, entropy=0.01, invalid_rate=0.9, ref_kl=9.0, approx_kl=2.0, explained_variance=-1.0, grad_norm=0.0, tokens=9.0,
        max_logprob_diff=1.0, failed_episodes=9)  # fmt: skip
    known = episodes_of(rng)
    for episode in known:
        for turn in episode.turns:
            turn.reward = float(turn.observation[-2]) if turn is episode.turns[-1] else 0.0
            turn.observation, turn.stopped = episode.turns[-1].observation, False
        episode.segments = [None, None]
    equal = episodes_of(rng)
    for episode in equal:
        for turn in episode.turns:
            turn.reward, turn.advantage, turn.action = 0.0, 0.0, 1
    history = [METRICS, *[bad] * 12]
    return [RunState(history, episodes, **fields) for episodes in (known, equal)]


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_no_advice_names_the_algorithm_that_runs(name):
    for state in states_with_every_issue(config=Config(), algorithm=ALGORITHMS[name]):
        for finding in diagnose(state):
            named = f"such as {name}" in finding.advice
            assert not named and not (
                "a critic" in finding.advice and ALGORITHMS[name].needs_critic
            )


def test_advice_knows_what_is_set_and_what_is_at_its_limit():
    options = Config.from_dict({
        "ppo.early_stop_kl": 0.1, "ppo.kl_adaptive_target": 0.2, "ppo.epochs": 1, "context.max_length": 2048, "ppo.critic_learning_rate": 0.01,
        "rollout.invalid_reward": -1.0})  # fmt: skip
    found = {
        finding.issue: finding.advice
        for state in states_with_every_issue(
            config=options, critic="shared", model_length_limit=2048
        )
        for finding in diagnose(state)
    }
    assert "lower ppo.early_stop_kl from 0.1" in found["KL too large"]
    assert "kl_adaptive_target" not in found["KL too large"]
    assert "ppo.epochs" not in found["entropy collapsed"]
    assert "raise context.max_length" not in found["truncated context"].lower()
    assert "limit of 2048 tokens is reached" in found["truncated context"]
    assert "shared" not in found["uninformative critic"]
    assert "aise ppo.critic_learning_rate from 0.01" in found["uninformative critic"]
    assert "lower rollout.invalid_reward from -1" in found["invalid responses"]
    shorter = options.replace({"context.max_length": 512})
    state = replace(states_with_every_issue(config=shorter, model_length_limit=2048)[0])
    advice = {f.issue: f.advice for f in diagnose(state)}["truncated context"]
    assert "Raise context.max_length from 512, up to the model's limit of 2048" in advice


def test_words_of_an_adjustment():
    state = RunState([METRICS], [], Config())
    assert adjust(state, "raise", "ppo.kl_coef") == "raise ppo.kl_coef from 0.1"
    assert adjust(state, "lower", "ppo.early_stop_kl") == "set ppo.early_stop_kl"
    assert adjust(state, "lower", "ppo.epochs", limit=4) is None
    assert either("a", None, "b", "c") == "A, b, or c"


def test_an_uninformative_critic_is_a_finding_only_where_returns_can_be_predicted():
    rng = np.random.default_rng(0)
    useless = [METRICS | dict(explained_variance=0.0)] * 10
    lucky, known = episodes_of(rng, num=256, length=2), episodes_of(rng, num=256, length=2)
    for episode in known:
        for turn in episode.turns:
            turn.observation = f"{episode.total_reward}"
    for episodes, expected in ((lucky, False), (known, True)):
        found = [f.issue for f in diagnose(RunState(useless, episodes, Config()))]
        assert ("uninformative critic" in found) == expected
    no_critic = RunState(useless, known, Config(), ALGORITHMS["reinforce"])
    assert "uninformative critic" not in [f.issue for f in diagnose(no_critic)]


def test_kl_to_the_reference_is_a_finding_only_if_something_got_worse():
    episodes = episodes_of(np.random.default_rng(0))
    far = METRICS | dict(ref_kl=2.0)

    def found(**changes) -> bool:
        state = RunState([METRICS, far | changes], episodes, Config())
        return "KL too large" in [finding.issue for finding in diagnose(state)]

    assert not found() and not found(mean_return=3.5)
    assert found(mean_return=1.0) and found(invalid_rate=0.2)


def test_an_update_may_move_a_policy_as_far_as_it_was_uncertain():
    episodes = episodes_of(np.random.default_rng(0))
    moved = [METRICS | dict(approx_kl=1.7)]

    def found() -> bool:
        found = diagnose(RunState(moved, episodes, Config()))
        return "KL too large" in [finding.issue for finding in found]

    for entropy, expected in ((0.2, True), (np.log(4), False)):
        for episode in episodes:
            for turn in episode.turns:
                turn.entropy = np.array([entropy], dtype=np.float32)
        assert found() == expected


def test_all_checks_have_an_issue_that_reads_as_a_noun():
    assert len(CHECKS) >= 29
    assert all(issue == issue.strip() and not issue.endswith(".") for issue in CHECKS)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")
        warnings.filterwarnings("ignore", "none of .* responses held an action")
        yield
