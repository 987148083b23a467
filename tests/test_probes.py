"""Probe environments: their best and random returns by going through all that can be done, and what solves them."""

import numpy as np
import pytest
import torch

from llamagym.algorithms import as_algorithm
from llamagym.env import episode_seed
from llamagym.probes import LEAVE_GAMMA, PROBES, SOLVED, leaving_value, own_reward, probe_agent, solve
from llamagym.rollout import collect
from llamagym.task import RandomAgent, ScriptedAgent, TextEnv, play

pytestmark = pytest.mark.filterwarnings("ignore")


def seeds_of(probe) -> list[int]:
    """One environment seed for each hidden number"""
    found = {}
    for i in range(100):
        env = probe.task.env()
        env.reset(seed=episode_seed(0, i))
        found.setdefault(env.secret, episode_seed(0, i))
    assert len(found) == probe.task.env.secrets
    return list(found.values())


def walk(env: TextEnv, seed: int, replies: list[str]) -> float | None:
    """The return of some replies; None when the episode goes on"""
    env.reset(seed)
    outs = [env.step(reply) for reply in replies]
    return sum(out.reward for out in outs) if outs and outs[-1].done else None


def all_returns(probe, seed: int) -> list[tuple[float, float]]:
    """Probability under random play, and return, of each way an episode can go"""
    env, open_, ended = TextEnv(probe.task), [(1.0, [])], []
    while open_:
        p, replies = open_.pop()
        total = walk(env, seed, replies)
        if total is not None:
            ended.append((p, total))
            continue
        legal = env.legal_actions()
        options = [probe.task.action_text(action) for action in legal]
        if probe.task.format_reward is not None:
            options += [text.split()[-1] for text in options]
        open_ += [(p / len(options), [*replies, text]) for text in options]
    return ended


@pytest.mark.parametrize("name", [name for name in PROBES if name != "leave"])
def test_probe_returns_by_brute_force(name):
    """The optimum and random play, over all hidden numbers and all that can be said"""
    probe = PROBES[name]
    per_secret = [all_returns(probe, seed) for seed in seeds_of(probe)]
    assert all(sum(p for p, _ in ways) == pytest.approx(1) for ways in per_secret)
    assert probe.optimal == pytest.approx(np.mean([max(r for _, r in ways) for ways in per_secret]))
    assert probe.random == pytest.approx(np.mean([sum(p * r for p, r in ways) for ways in per_secret]))


def test_probe_leave_by_value_iteration():
    """The unlimited problem is what counts, and what a learner that bootstraps sees; the one turn that is played says the opposite"""
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
    assert [sorted(r for _, r in all_returns(probe, seed)) for seed in seeds_of(probe)] == [[-0.8, -0.4]]


@pytest.mark.parametrize("name", PROBES)
def test_probe_scores(name):
    """An optimal script scores 1, random play 0; but for `match`, the last observation says nothing of what pays"""
    probe = PROBES[name]
    best = dict(bandit=lambda obs, info: 2, match=lambda obs, info: obs[1], format=lambda obs, info: 0, leave=lambda obs, info: 1,
                delayed=lambda obs, info: 4 if obs[0] else 2, copy=lambda obs, info: obs[1] if obs[0] == 10 else 2)[name]  # fmt: skip
    assert probe.score(play(probe.task, ScriptedAgent(probe.task, best), episodes=50)) == pytest.approx(1)
    assert probe.score(play(probe.task, probe.player(probe.task), episodes=2000)) == pytest.approx(0, abs=0.15)
    seen = [{turn.observation for turn in e.turns[-1:]} for e in play(probe.task, RandomAgent(probe.task), episodes=30)]
    assert (len(set().union(*seen)) == 1) == (name != "match")


@pytest.mark.parametrize("name", PROBES)
def test_probe_is_solved_by_ppo(name):
    """To at least 95 % of the way from random play to the optimum"""
    attempt = solve(name, "ppo", seed=0, updates=60)
    assert attempt.solved and attempt.score >= SOLVED == 0.95, attempt
    assert abs(attempt.curve[0]) < 0.8 and attempt.episodes > 0  # it was not there from the start


@pytest.mark.parametrize("algorithm", ["ppo_token", "ppo_bilevel", "reinforce", "rloo", "grpo", "drgrpo", "gigpo"])
def test_probe_of_a_later_reward_by_every_algorithm(algorithm):
    assert solve("delayed", algorithm, seed=1, updates=40).solved


def test_probe_fails_who_lacks_what_it_asks_for():
    """Own rewards alone tell a first turn nothing; without a critic a time limit is the end"""
    assert solve("bandit", own_reward).solved and abs(solve("delayed", own_reward, updates=6, ppo__kl_coef=0.0).score) < 0.2
    stays = solve("leave", "reinforce", updates=12)
    assert stays.score < -1 and stays.curve[-1] < stays.curve[0]
    agent = probe_agent(PROBES["delayed"], ppo__kl_coef=0.0)
    agent.learner.algorithm = as_algorithm(own_reward)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learner.learn(collect(agent, episodes=64, num_envs=32))
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters()))  # not by chance


def test_probe_bad_input():
    with pytest.raises(ValueError, match="unknown probe 'bandid'; expected one of bandit, match"):
        solve("bandid")
