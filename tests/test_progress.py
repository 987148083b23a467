"""Long calls show how far they are; short ones show nothing."""

import dataclasses
import io
import re
import time
from types import SimpleNamespace

import pytest
import tqdm.std
from doubles import lake, lake_agent, make_policy

import llamagym.progress
from llamagym.agents.exact import greedy_table
from llamagym.chat.conversation import Window
from llamagym.progress import ProgressBar
from llamagym.rollout import collect, evaluate
from llamagym.trainer import Trainer
from llamagym.training.callbacks import Progress, next_due


def agent_of_lake():
    task = dataclasses.replace(lake(max_steps=6), context=Window(1))
    return lake_agent(make_policy("plain"), task=task)


@pytest.fixture
def screen(monkeypatch):
    "What bars show on a terminal, redrawn at every update"
    file = io.StringIO()

    def bar(**options):
        return tqdm.std.tqdm(file=file, mininterval=0, miniters=1, ncols=200, **options)

    monkeypatch.setattr(llamagym.progress, "tqdm", bar)
    return file


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(llamagym.progress, "REDRAW_EVERY", 0)
    defaults = (True, 0.0)  # show, patience
    monkeypatch.setattr(ProgressBar.__init__, "__defaults__", defaults)


def test_a_short_call_shows_nothing(screen):
    collect(agent_of_lake(), episodes=4, num_envs=2)
    assert screen.getvalue() == ""


@pytest.mark.parametrize(
    "call,name,unit,total",
    [
        (lambda a: collect(a, episodes=5, num_envs=2), "collect", "episode", 5),
        (lambda a: evaluate(a, episodes=3, num_envs=2, greedy=False), "evaluate", "episode", 3),
        (greedy_table, "exact evaluation", "state", 16),
        (
            lambda a: a.learner.update(collect(a, episodes=4, progress=False)),
            "update",
            "step",
            None,
        ),
    ],
    ids=["collect", "evaluate", "exact", "update"],
)
def test_a_long_call_counts_to_its_end_and_is_removed(call, name, unit, total, screen, impatient):
    call(agent_of_lake())
    lines = screen.getvalue().split("\r")
    shown = [re.match(rf"{name}: .*\| (\d+)/(\d+) \[\S+<(\S+),", line) for line in lines]
    shown = [match for match in shown if match]
    counts = [(int(m[1]), int(m[2])) for m in shown]
    done, expected = counts[-1]
    assert 0 < done == expected == total if total else 0 < done <= expected  # stopped early
    assert [n for n, _ in counts] == sorted(n for n, _ in counts)
    assert "?" not in shown[-1][3]  # the time that is left
    assert lines[-1].strip() == "" and f"{unit}/s" in screen.getvalue()


def test_bar_is_silent_if_it_is_not_wanted(screen, impatient):
    agent = agent_of_lake()
    collect(agent, episodes=2, num_envs=2, progress=False)
    evaluate(agent, episodes=2, num_envs=2, progress=False)
    greedy_table(agent, progress=False)
    assert screen.getvalue() == ""


def test_failed_episodes_are_counted(screen, impatient):
    agent = agent_of_lake()

    def fail(obs, info):
        raise KeyError("state")

    agent.task.format_observation = fail
    with pytest.raises(RuntimeError):
        collect(agent, episodes=3, num_envs=2)
    assert "3/3" in screen.getvalue() and screen.getvalue().split("\r")[-1].strip() == ""


def test_notes_are_redrawn_once_a_second(screen):
    with ProgressBar(2, "collect", "episode", patience=0) as bar:
        bar.note("1 turn")
        bar.note("2 turns")
        bar.next_redraw = time.monotonic()
        bar.note("3 turns")
    shown = screen.getvalue()
    assert "1 turn]" in shown and "2 turns" not in shown and "3 turns" in shown


@pytest.mark.parametrize("every,last", [(0, 7), (1, 7), (3, 7), (7, 7), (10, 7)])
def test_next_due_update_is_the_one_at_which_a_run_evaluates(every, last):
    due = [u for u in range(1, last + 1) if every and (u % every == 0 or u == last)]
    for update in range(last + 1):
        expected = min((u for u in due if u > update), default=None)
        assert next_due(every, update, last) == expected


def test_bar_of_a_run_shows_the_time_to_the_next_evaluation(tmp_path):
    agent = agent_of_lake()
    agent.config.trainer.output_dir = str(tmp_path)
    trainer = Trainer(agent)
    trainer.config.eval_every, trainer.updates = 4, 8
    progress = Progress()
    progress.on_fit_start(trainer)
    progress.bar = SimpleNamespace(
        update=lambda: None, set_postfix=lambda values: None, format_dict=dict(rate=0.1)
    )
    metrics = dict(mean_return=0.5, ref_kl=0.0, failed_episodes=0)
    shown = []
    for trainer.update in range(1, 9):
        progress.on_update_end(trainer, metrics)
        shown.append(progress.values.get("next eval"))
    assert shown == ["00:30", "00:20", "00:10", "00:40", "00:30", "00:20", "00:10", None]
