"""Evaluations: paired intervals, and returns that are computed where the task allows it."""

import dataclasses
import json
import math

import gymnasium as gym
import numpy as np
import pytest
from doubles import config, lake, lake_agent, make_policy, walk_task

from llamagym.agent import Agent
from llamagym.agents.exact import (
    BlackjackEstimator,
    blackjack_return,
    by_state,
    continuation_value,
    greedy_choices,
    greedy_return,
    is_deterministic,
)
from llamagym.agents.scored import ScoredAgent
from llamagym.chat.conversation import Window
from llamagym.envs.exact import blackjack_tree, first_observations
from llamagym.envs.toy_text import basic_strategy, blackjack, cliff_walking, frozen_lake, taxi
from llamagym.rollout import EvalStats, ReturnChange, collect, evaluate
from llamagym.trainer import Trainer
from llamagym.training.callbacks import Callback, Progress
from llamagym.widgets.plots import plot_run

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action")


def agent_of(task, kind="lora", scored=False, **options):
    cls = ScoredAgent if scored else Agent
    return cls.for_task(task, make_policy(kind), config=config(**options))


# paired changes


def test_evaluation_change_is_the_paired_interval():
    rng = np.random.default_rng(0)
    before = {str(i): float(r) for i, r in enumerate(rng.normal(size=50))}
    after = {str(i): before[str(i)] + float(rng.normal(0.3, 0.1)) for i in range(10, 50)}
    change = ReturnChange.between(before, after)
    differences = np.array([after[s] - before[s] for s in after])
    assert change.mean == pytest.approx(differences.mean())
    assert change.ci95 == pytest.approx(1.96 * differences.std(ddof=1) / math.sqrt(40))
    assert ReturnChange.between(before, {"1": 0.0}) is None
    assert ReturnChange.between(before, dict(estimate=0.0, ci95=0.0)) is None


def test_evaluation_change_of_estimates_adds_their_variances():
    change = ReturnChange.between(dict(estimate=-0.3, ci95=0.003), dict(estimate=-0.1, ci95=0.004))
    assert (change.mean, change.ci95) == (pytest.approx(0.2), pytest.approx(0.005))
    exact = ReturnChange.between(dict(estimate=-13.0, ci95=0.0), dict(estimate=-12.5, ci95=0.0))
    assert str(exact) == "+0.500" and str(change) == "+0.200 ± 0.005"


# Blackjack


POLICIES = {
    "optimal": basic_strategy,
    "hit below 17": lambda obs: int(obs[0] < 17),
    "always stick": lambda obs: 0,
    "by the suit": lambda obs: (obs[0] * 7 + obs[1] * 3) % 3 == 0,
}


@pytest.mark.parametrize("rules", [{}, dict(sab=True), dict(natural=True)])
def test_evaluation_continuation_value_equals_the_tree(rules):
    for name in ("always stick", "by the suit"):
        value = continuation_value(lambda obs, name=name: int(POLICIES[name](obs)), **rules)
        total = sum(p * value(obs, True) for obs, p in first_observations().items())
        assert total == pytest.approx(blackjack_return(by_state(POLICIES[name]), **rules), abs=1e-9)


def test_evaluation_blackjack_estimates_are_unbiased_and_their_intervals_hold():
    """Against the complete tree, for a policy of the whole history"""

    def choose(histories):
        return [int(h[-1][0] < 15 + (len(h) + h[0][0]) % 4) for h in histories]

    true = blackjack_return(choose)
    found = [BlackjackEstimator(choose, cutoff=3e-3, seed=seed).estimate() for seed in range(60)]
    errors = np.array([e.value - true for e in found])
    widths = np.array([e.ci95 for e in found])
    assert abs(errors.mean()) < 3 * errors.std(ddof=1) / math.sqrt(60)
    assert np.mean(widths) == pytest.approx(1.96 * errors.std(ddof=1), rel=0.35)
    assert np.mean(np.abs(errors) < widths) > 0.85 and widths.max() < 0.02
    assert np.mean([e.responses for e in found]) < 800
    complete = BlackjackEstimator(choose, cutoff=1e-12).estimate()
    assert complete.value == pytest.approx(true, abs=1e-9) and complete.ci95 < 1e-9


def test_evaluation_of_blackjack_with_one_turn_is_exact():
    agent = agent_of(dataclasses.replace(blackjack(), context=Window(1)), scored=True)
    found = greedy_return(agent)
    table = {o: a for o, a in zip(STATES, greedy_choices(agent)([(o,) for o in STATES]))}
    assert 0 < sum(table.values()) < len(table)
    assert found.exact and found.value == pytest.approx(blackjack_return(by_state(table.get)))
    sampled = evaluate(agent, episodes=300, num_envs=100, greedy=True).greedy
    assert abs(sampled.mean_return - found.value) < 2 * sampled.ci95


STATES = [(t, d, ace) for t in range(4, 22) for d in range(1, 11) for ace in (0, 1)]


def test_evaluation_of_blackjack_with_the_whole_conversation_agrees_with_the_tree():
    agent = agent_of(blackjack(), scored=True)
    found = greedy_return(agent, cutoff=3e-3)
    tree = blackjack_tree(greedy_choices(agent), min_probability=1e-4)
    assert not found.exact and tree.low - 0.02 < found.value < tree.high + 0.02
    stats = evaluate(agent, episodes=8, greedy=True, exact=True).greedy
    assert stats.ci95 < 1.96 / math.sqrt(1000)  # as narrow as a thousand games, or more
    assert len(stats.episodes) == 8 and "±" in repr(stats)


# other tasks


@pytest.mark.parametrize("slippery", [True, False])
def test_evaluation_of_a_table_is_exact(slippery):
    task = dataclasses.replace(frozen_lake(slippery=slippery), context=Window(1))
    agent = agent_of(task, scored=True)
    sampled = evaluate(agent, episodes=150 if slippery else 2, num_envs=50, greedy=True).greedy
    exact = evaluate(agent, episodes=4, greedy=True, exact=True)
    assert "exact" in repr(exact) and "exact" in exact._repr_markdown_()
    assert abs(exact.greedy.mean_return - sampled.mean_return) <= 2 * sampled.ci95 + 1e-9


def test_evaluation_without_chance_plays_one_game():
    task = cliff_walking(max_steps=7)
    agent = agent_of(task, rollout__invalid_reward=-0.5)
    stats = evaluate(agent, episodes=5, greedy=True, exact=True).greedy
    five = evaluate(agent, episodes=5, greedy=True).greedy
    assert len(stats.episodes) == 1 and stats.ci95 == 0 and "exact" in repr(stats)
    assert {e.total_reward for e in five.episodes} == {stats.mean_return}
    assert not is_deterministic(agent_of(taxi())) and not is_deterministic(agent_of(blackjack()))
    assert not is_deterministic(agent_of(frozen_lake(slippery=True)))


class HalfReward(gym.RewardWrapper):
    def reward(self, reward):
        return reward / 2


class OtherAgent(type(Agent.for_task(lake(), make_policy("plain")))):
    """An agent with methods of its own"""


@pytest.mark.parametrize(
    "task",
    [
        # what it does may depend on the states before
        dataclasses.replace(frozen_lake(slippery=True), context="full"),
        blackjack(env=lambda: HalfReward(gym.make("Blackjack-v1"))),
        dataclasses.replace(blackjack(), format_reward=lambda response: 0.1),
        dataclasses.replace(blackjack(), on_invalid="terminate"),
        dataclasses.replace(blackjack(), max_steps=1),
        walk_task(2),
    ],
)
def test_evaluation_claims_nothing_that_it_cannot_compute(task):
    agent = agent_of(task)
    assert greedy_return(agent) is None
    stats = evaluate(agent, episodes=3, greedy=True, exact=True).greedy
    assert stats.estimate is None and len(stats.episodes) == 3 and "exact" not in repr(stats)
    assert stats.mean_return == np.mean([e.total_reward for e in stats.episodes])


def test_evaluation_of_an_agent_with_own_methods_is_sampled():
    agent = OtherAgent(blackjack(), make_policy("plain"), config=config())
    assert greedy_return(agent) is None
    other = lambda: HalfReward(gym.make("Blackjack-v1"))  # noqa: E731
    stats = evaluate(agent_of(blackjack()), other, episodes=3, greedy=True, exact=True).greedy
    assert stats.estimate is None


# in a run


def trainer_of(folder, task, callbacks=(), **options) -> Trainer:
    options = dict(rollout__episodes=4, ppo__epochs=1, trainer__updates=3, trainer__eval_every=1,
                   trainer__eval_episodes=6, trainer__checkpoint_every=1) | options  # fmt: skip
    return Trainer(agent_of(task, trainer__output_dir=str(folder), **options), callbacks=callbacks)


def test_evaluation_in_a_run_is_paired(tmp_path):
    seen = []

    class Looks(Callback):
        def on_evaluate(self, trainer, evaluation):
            seen.append(evaluation)

    run = trainer_of(tmp_path, walk_task(3), [Looks()]).fit()
    first, *_, last = seen
    assert [[e.seed for e in evaluation.greedy.episodes] for evaluation in seen] == 3 * [
        [e.seed for e in first.greedy.episodes]
    ]
    returns = [np.array([e.total_reward for e in one.greedy.episodes]) for one in (first, last)]
    difference = returns[1] - returns[0]
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["eval_return"] == last.greedy.mean_return
    assert line["eval_return_ci95"] == pytest.approx(1.96 * returns[1].std(ddof=1) / math.sqrt(6))
    assert line["eval_return_change"] == pytest.approx(difference.mean())
    error = 1.96 * difference.std(ddof=1) / math.sqrt(6)
    assert line["eval_return_change_ci95"] == pytest.approx(error)
    assert first.change is None and "since the first evaluation" in repr(run)
    assert "eval_return_change" not in run.history[0]
    (bars,) = plot_run(run).axes[0].containers
    assert np.ptp(bars.lines[2][0].get_segments()[2][:, 1]) == pytest.approx(
        2 * line["eval_return_ci95"]
    )


def test_evaluation_of_a_resumed_run_compares_with_the_first(tmp_path):
    whole = trainer_of(tmp_path / "whole", walk_task(3)).fit()
    trainer_of(tmp_path / "parts", walk_task(3)).fit(updates=1)
    parts = trainer_of(tmp_path / "parts", walk_task(3)).fit(resume=True)
    names = ("eval_return", "eval_return_change", "eval_return_change_ci95")
    assert [[m.get(n) for n in names] for m in parts.history] == [
        [m.get(n) for n in names] for m in whole.history
    ]
    assert repr(parts.evaluation) == repr(whole.evaluation)


def test_evaluation_of_one_episode_has_no_interval_in_the_metrics(tmp_path):
    run = trainer_of(tmp_path, walk_task(2), trainer__eval_episodes=1, trainer__updates=1).fit()
    assert "eval_return_ci95" not in run.history[0] and "eval_return" in run.history[0]


def test_evaluation_shows_its_interval_in_the_bar(tmp_path, capsys):
    trainer_of(tmp_path / "sampled", walk_task(2), [Progress()], trainer__updates=2).fit()
    assert "greedy=" in (shown := capsys.readouterr().err) and "±" in shown
    assert "since first=" in shown
    trainer_of(tmp_path / "exact", lake(max_steps=4), [Progress()], trainer__updates=1).fit()
    assert "exact" in capsys.readouterr().err


def test_evaluation_statistics_of_episodes_have_no_estimate():
    episodes = collect(agent_of(walk_task(2)), episodes=3)
    stats = EvalStats.from_episodes(episodes)
    assert stats.returns == {str(e.seed): e.total_reward for e in episodes}


def test_evaluation_before_a_run_is_what_changes_are_measured_from(tmp_path):
    trainer = trainer_of(tmp_path, walk_task(3), [Progress()], trainer__updates=1)
    start = trainer.evaluate()
    run = trainer.fit()
    before, after = start.greedy.returns, run.evaluation.greedy.returns
    mean = np.mean([after[seed] - before[seed] for seed in before])
    assert run.history[0]["eval_return_change"] == pytest.approx(mean)


def test_evaluation_takes_sampling_options_of_its_own():
    "With top_k=1, sampling is greedy; the agent's own options stay, also for training"
    agent = lake_agent(make_policy("plain"))
    before = agent.config.to_dict()
    greedy = evaluate(agent, episodes=6, greedy=True).greedy
    narrow = evaluate(agent, episodes=6, greedy=False, generate={"top_k": 1}).sampled
    wide = evaluate(agent, episodes=6, greedy=False).sampled

    def responses(stats):
        return [turn.response for episode in stats.episodes for turn in episode.turns]

    assert responses(narrow) == responses(greedy) != responses(wide)
    assert agent.config.to_dict() == before
    agent.policy.causal_lm.generation_config.update(do_sample=True, top_k=1)
    chosen = evaluate(agent, episodes=6, greedy=False, generate=agent.policy.sampling_settings)
    assert responses(chosen.sampled) == responses(greedy)
    assert responses(evaluate(agent, episodes=6, greedy=False).sampled) == responses(wide)
    with pytest.raises(ValueError, match="min_p"):
        evaluate(agent, episodes=1, generate={"min_p": 0.1})
