"""Episodes that raise are counted beside every mean, and grouped in one warning."""

import warnings

import matplotlib
import pytest
from doubles import config, make_policy
from walks import Walk

from llamagym.agent import Agent
from llamagym.envs.registry import for_env
from llamagym.rollout import EvalStats, collect, evaluate
from llamagym.trainer import Trainer
from llamagym.training.callbacks import Progress
from llamagym.widgets.plots import plot_run, plot_runs

matplotlib.use("agg")


@pytest.fixture(scope="module")
def policy():
    return make_policy("lora")


class Storm(RuntimeError):
    pass


def trouble(where, seed, t):
    """Walks 1, 3 and 4 fail, in three ways"""
    if where == "step" and seed % 8 == 1 and t == 1:
        raise Storm("a storm")
    if where == "reset" and seed % 8 == 3:
        raise Storm("a calm")
    if where == "step" and seed % 8 == 4:
        raise KeyError("map")


def walk_agent(policy, trouble=trouble, **options):
    task = for_env(lambda: Walk(2, trouble), name="walk")
    task.extract_action = lambda text: 0
    return Agent.for_task(task, policy, config=config(**options))


def collected(policy, episodes=8, num_envs=3):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rollout = collect(walk_agent(policy), episodes=episodes, num_envs=num_envs)
    return rollout, [str(w.message) for w in caught if "episode" in str(w.message)]


@pytest.mark.parametrize("num_envs", [1, 3, 8])
def test_failed_episodes_are_grouped_in_one_warning(policy, num_envs):
    rollout, (message,) = collected(policy, num_envs=num_envs)
    first, *trace = message.splitlines()
    assert first.startswith("3 of 8 episodes failed (Storm: 2, KeyError: 1). The first: episode 1 (seed ")  # fmt: skip
    assert first.endswith("failed after 2 turns: Storm: a storm. The other 5 episodes are kept, and all statistics are theirs alone")  # fmt: skip
    assert trace[0] == "Traceback (most recent call last):" and trace[-1].endswith("Storm: a storm")
    assert message.count("Traceback") == 1
    assert [failure.index for failure in rollout.failures] == [1, 3, 4]


def test_failed_episodes_are_shown_with_the_means_of_a_rollout(policy):
    rollout, _ = collected(policy)
    assert repr(rollout).startswith("Rollout(5 episodes, 10 turns, mean return ")
    assert repr(rollout).endswith("invalid 0.0%; 3 of 8 episodes failed)")
    assert rollout._repr_markdown_().endswith("; **3 of 8 episodes failed**, the means are of the others")  # fmt: skip
    fine = collect(walk_agent(policy, None), episodes=2, num_envs=1)
    assert "failed" not in repr(fine) + fine._repr_markdown_()


@pytest.mark.filterwarnings("ignore:.* failed")
def test_failed_episodes_are_shown_with_an_evaluation(policy):
    evaluation = evaluate(walk_agent(policy), episodes=8, seeds=[0, 8], greedy=True)
    stats = evaluation.greedy
    assert stats.failures == 6 and len(stats.episodes) == 10
    assert repr(stats).endswith(", 10 episodes, 6 of 16 episodes failed")
    assert "| 10 (**6 of 16 episodes failed**) |" in evaluation._repr_markdown_()
    fine = EvalStats.from_episodes(stats.episodes)
    assert fine.failures == 0 and "failed" not in repr(fine)


@pytest.mark.filterwarnings("ignore:.* failed")
def test_failed_episodes_are_shown_by_bar_summary_and_plots(policy, tmp_path, monkeypatch):
    agent = walk_agent(
        policy, rollout__episodes=8, rollout__num_envs=4, trainer__updates=2,
        trainer__output_dir=str(tmp_path), trainer__eval_episodes=8, trainer__eval_every=0,
    )  # fmt: skip
    shown = []
    progress = Progress()
    monkeypatch.setattr("llamagym.training.callbacks.tqdm.set_postfix", lambda bar, values: shown.append(dict(values)))  # fmt: skip
    trainer = Trainer(agent, callbacks=[progress])
    run = trainer.fit()
    assert [metrics["failed_episodes"] for metrics in run.history] == [3, 3]
    assert shown[-1]["failed"] == "3 of 8 episodes"
    assert "6 of 16 episodes failed" in repr(run)
    assert plot_run(run).axes[0].get_title() == "return\n6 of 16 episodes failed"
    (label, *_) = plot_runs([run]).axes[0].get_legend_handles_labels()[1]
    assert label == "mean of 1 run, 6 episodes failed"
    from llamagym.widgets.monitor import _run_view

    assert _run_view(trainer)["title"] == "walk (6 of 16 episodes failed)"
