"""Probe environments: optimal and random returns match brute force, and the expected algorithms solve them."""

import numpy as np
import pytest
import torch
from doubles import some

from llamagym.algorithms.registry import ALGORITHMS, as_algorithm
from llamagym.envs.adapters import episode_seed
from llamagym.envs.baselines import RandomAgent, ScriptedAgent, play
from llamagym.envs.probes import LEAVE_GAMMA, PROBES, leaving_value
from llamagym.envs.text_env import TextEnv
from llamagym.rollout import collect
from llamagym.training.probe_runs import SOLVED, immediate_reward, probe_agent, run_probe

pytestmark = pytest.mark.filterwarnings("ignore")


def seeds_of(probe) -> list[int]:
    """Return one environment seed for each hidden number"""
    found = {}
    for i in range(100):
        env = probe.task.env()
        env.reset(seed=episode_seed(0, i))
        found.setdefault(env.secret, episode_seed(0, i))
    assert len(found) == probe.task.env.num_secrets
    return list(found.values())


def walk(env: TextEnv, seed: int, responses: list[str]) -> float | None:
    """Return the episode's return for a list of responses, or None if it is not over"""
    env.reset(seed)
    outs = [env.step(response) for response in responses]
    return sum(out.reward for out in outs) if outs and outs[-1].done else None


def all_returns(probe, seed: int) -> list[tuple[float, float]]:
    """Return (probability under random play, return) of every possible episode"""
    env, open_, ended = TextEnv(probe.task), [(1.0, [])], []
    while open_:
        p, responses = open_.pop()
        total = walk(env, seed, responses)
        if total is not None:
            ended.append((p, total))
            continue
        legal = env.legal_actions()
        options = [probe.task.format_action(action) for action in legal]
        if probe.task.format_reward is not None:
            options += [text.split()[-1] for text in options]
        open_ += [(p / len(options), [*responses, text]) for text in options]
    return ended


@pytest.mark.parametrize("name", [name for name in PROBES if name not in ("leave", "fallback")])
def test_probe_returns_equal_brute_force(name):
    """Optimal and random returns equal enumeration over all hidden numbers and responses"""
    probe = PROBES[name]
    per_secret = [all_returns(probe, seed) for seed in seeds_of(probe)]
    assert all(sum(p for p, _ in ways) == pytest.approx(1) for ways in per_secret)
    assert probe.optimal == pytest.approx(np.mean([max(r for _, r in ways) for ways in per_secret]))
    assert probe.random == pytest.approx(
        np.mean([sum(p * r for p, r in ways) for ways in per_secret])
    )


def test_probe_leave_returns_equal_value_iteration():
    """Returns equal value iteration on the unlimited problem, which a bootstrapping learner optimizes; the single turn played suggests the opposite"""
    probe, value = PROBES["leave"], 0.0
    for _ in range(500):
        value = max(-0.8, -0.4 + LEAVE_GAMMA * value)
    assert probe.optimal == pytest.approx(value)
    for p in (0.0, 0.3, 0.5, 1.0):
        v = 0.0
        for _ in range(500):
            v = p * -0.8 + (1 - p) * (-0.4 + LEAVE_GAMMA * v)
        assert leaving_value(p) == pytest.approx(v)
    assert probe.random == leaving_value(0.5)
    assert [sorted(r for _, r in all_returns(probe, seed)) for seed in seeds_of(probe)] == [
        [-0.8, -0.4]
    ]


@pytest.mark.parametrize("name", PROBES)
def test_probe_score_is_0_for_random_play_and_1_for_the_optimum(name):
    """An optimal script scores 1 and random play 0; except in `match`, the last observation does not reveal the rewarded action"""
    probe = PROBES[name]
    best = dict(bandit=lambda obs, info: 2, fallback=lambda obs, info: 0, match=lambda obs, info: obs[1], format=lambda obs, info: 0, leave=lambda obs, info: 1,
                delayed=lambda obs, info: 4 if obs[0] else 2, copy=lambda obs, info: obs[1] if obs[0] == 10 else 2)[name]  # fmt: skip
    assert probe.score(
        play(probe.task, ScriptedAgent(probe.task, best), episodes=50)
    ) == pytest.approx(1)
    assert probe.score(
        play(probe.task, probe.baseline(probe.task), episodes=2000)
    ) == pytest.approx(0, abs=0.15)
    seen = [
        {turn.observation for turn in e.turns[-1:]}
        for e in play(probe.task, RandomAgent(probe.task), episodes=30)
    ]
    assert (len(set().union(*seen)) == 1) == (name != "match")


@pytest.mark.parametrize("name", some(PROBES, ["bandit", "delayed", "format", "leave"]))
def test_probe_is_solved_by_ppo(name):
    """PPO reaches a score of at least 0.95 (0 is random play, 1 the optimum)"""
    attempt = run_probe(name, "ppo", seed=0, updates=60)
    assert attempt.solved and attempt.score >= SOLVED == 0.95, attempt
    assert attempt.curve[0] < 0.8 and attempt.episodes > 0  # the initial policy was not optimal


OTHERS = [name for name in ALGORITHMS if name != "ppo"]


@pytest.mark.parametrize("algorithm", some(OTHERS, ["ppo_token", "grpo", "reinforce"]))
def test_delayed_probe_is_solved_by_every_algorithm(algorithm):
    assert run_probe("delayed", algorithm, seed=1, updates=40).solved


@pytest.mark.parametrize("algorithm", some(sorted(ALGORITHMS), ["ppo", "grpo", "reinforce"]))
def test_invalid_pays_in_no_algorithm(algorithm):
    """The fallback is the best action, and yet the share of invalid responses falls to 0"""
    assert run_probe("fallback", algorithm, seed=1, updates=40).score >= 0.98


def test_probe_fails_without_the_ability_it_tests():
    "A turn's own reward does not credit the first turn"
    assert abs(run_probe("delayed", immediate_reward, updates=6, ppo__kl_coef=0.0).score) < 0.2
    agent = probe_agent(PROBES["delayed"], ppo__kl_coef=0.0)
    agent.learner.algorithm = as_algorithm(immediate_reward)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learner.update(collect(agent, episodes=64, num_envs=32))
    # with zero advantages no weight changes
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters()))


@pytest.mark.slow
def test_probe_separates_estimators():
    "Where a turn's own reward is enough, it suffices; without a critic, truncation is the end"
    assert run_probe("bandit", immediate_reward).solved
    stays = run_probe("leave", "reinforce", updates=12)
    assert stays.score < -1 and stays.curve[-1] < stays.curve[0]


def test_probe_bad_input_raises():
    with pytest.raises(ValueError, match="unknown probe 'bandid'; expected one of bandit, match"):
        run_probe("bandid")
