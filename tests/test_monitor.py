"""The training monitor's state, commands and error handling, tested without a browser."""

import json
import math
import sys
import threading
import time
import types

import numpy as np
import pytest
from doubles import lake, lake_agent, make_policy

import llamagym.widgets.monitor as monitor_module
from llamagym.config import TrainerConfig
from llamagym.trainer import Trainer
from llamagym.training.callbacks import Anneal, Callback, in_notebook
from llamagym.widgets.monitor import (
    CommandQueue,
    EpisodePanel,
    MonitorSession,
    MonitorWidget,
    TrainingMonitor,
    curves,
    select_episodes,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:none of .* responses held an action", "ignore:.*env.*must be constant"
)


@pytest.fixture
def notebook(monkeypatch):
    """Pretend to run in a notebook and return the list of displayed objects"""
    displayed = []
    monkeypatch.setattr(monitor_module, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", displayed.append)
    return displayed


def make_trainer(folder, *callbacks, updates=3, **options) -> Trainer:
    agent = lake_agent(
        make_policy("lora"),
        max_steps=3,
        rollout__episodes=4,
        rollout__num_envs=4,
        ppo__epochs=1,
        **options,
    )
    return Trainer(
        agent,
        config=TrainerConfig(
            updates=updates,
            eval_every=2,
            eval_episodes=4,
            checkpoint_every=0,
            output_dir=str(folder),
            stop_if_invalid=1,
        ),
        callbacks=callbacks,
    )


class CallDuringUpdate(Callback):
    """A callback that calls a function after the episodes of an update are collected"""

    def __init__(self, update, function):
        self.update, self.function = update, function

    def on_collect_end(self, trainer, rollout):
        if trainer.update == self.update:
            self.function(trainer)


def test_monitor_shows_the_history(tmp_path, notebook):
    monitor = TrainingMonitor(min_interval=0.0, max_cpu_fraction=1.0)
    result = make_trainer(tmp_path, monitor).fit()
    (box,) = notebook
    state = json.loads(json.dumps(monitor.session.widget.state, allow_nan=False))
    assert box.children == (monitor.session.widget, monitor.session.panel.player.widget)
    assert (
        state["phase"],
        state["update"],
        state["updates"],
        state["connected"],
        state["title"],
    ) == (
        "finished",
        3,
        3,
        False,
        "FrozenLake-v1",
    )
    metric_names = dict(
        spread="std_return",
        kl="ref_kl",
        entropy="entropy",
        invalid="invalid_rate",
        value_loss="value_loss",
    )
    for name, metric in [("return", "mean_return"), *metric_names.items()]:
        assert state["curves"][name] == pytest.approx([m[metric] for m in result.history], rel=1e-5)
    assert state["curves"]["speed"] == pytest.approx(
        [m["tokens"] / m["collect_seconds"] for m in result.history], rel=1e-4
    )
    assert state["evaluations"] == [
        [2, result.history[1]["eval_return"], result.history[1]["eval_return_ci95"]],
        [3, result.history[2]["eval_return"], result.history[2]["eval_return_ci95"]],
    ]
    assert state["references"] == {
        name: lake().reference_returns[name] for name in ("random", "optimal")
    }
    assert (
        sum(state["time"].values()) == pytest.approx(state["seconds"], abs=0.01)
        and min(state["time"].values()) >= 0
    )
    findings = [(m["update"], name) for m in result.history for name in m.get("findings", {})]
    assert [(line[1], line[2]) for line in state["event_log"]] == findings[::-1] and findings
    listed = monitor.session.panel.player.episodes
    assert (
        listed[0]["label"] == "newest: episode 11"
        and len(listed) == 4
        and monitor.session.panel.player.widget.preloaded["key"] == listed[0]["key"]
    )
    turns = monitor.session.panel.player.widget.preloaded["data"]["turns"]
    # the frame is rendered after the rollout, the value is computed by the learner
    assert (
        turns[0]["frame"] in monitor.session.panel.player.widget.preloaded["frames"]
        and turns[0]["value"] is not None
    )


def test_monitor_stays_within_its_cpu_budget(tmp_path, notebook, monkeypatch):
    """The budget holds by the monitor's own count, except for the first and the last state

    `benchmarks/player.py` measures it on a page.
    """
    monitor, sent = TrainingMonitor(min_interval=0.0, max_cpu_fraction=0.2, frames=False), []
    send_state = MonitorSession.send_state

    def record_and_send(session, trainer, phase):
        sent.append((monitor.budget.spent, time.process_time() - monitor.budget.start))
        send_state(session, trainer, phase)

    monkeypatch.setattr(MonitorSession, "send_state", record_and_send)
    make_trainer(tmp_path, monitor, updates=12).fit()
    middle = sent[1:-1]
    assert middle and all(2 * spent <= 0.2 * elapsed for spent, elapsed in middle)
    assert 0 < monitor.budget.spent < time.process_time() - monitor.budget.start
    monitor.budget.spent, monitor.session.last_sent = 1e9, -math.inf
    assert not monitor.session.is_due
    monitor.budget.spent = 0.0
    assert monitor.session.is_due


def test_monitor_executes_commands_between_updates(tmp_path, notebook):
    """Commands from another thread are executed during the run and while it is paused"""
    monitor = TrainingMonitor()

    def start_page(trainer):
        def use_page():
            def click(**message):
                monitor.session.widget._on_message(monitor.session.widget, message, [])

            def wait_until(condition):
                deadline = time.monotonic() + 60
                while not condition(monitor.session.widget.state) and time.monotonic() < deadline:
                    time.sleep(0.01)

            click(type="connect")
            observed.append(monitor.session.widget.state["connected"])
            click(type="pause")
            observed.append(monitor.session.widget.state["phase"])
            wait_until(lambda state: state["phase"] == "paused")
            observed.append((trainer.update, monitor.session.widget.state["phase"]))
            click(type="set", name="learning_rate", value=3e-4)
            click(type="set", name="kl_coef", value=0)
            click(type="set", name="kl_coef", value=math.nan)
            click(type="save")
            click(type="dance")
            wait_until(lambda state: "dance" in state["note"])
            observed.append(monitor.session.widget.state["rejected"])
            click(type="resume")

        threads.append(threading.Thread(target=use_page))
        threads[0].start()

    observed, threads = [], []
    trainer = make_trainer(
        tmp_path,
        monitor,
        CallDuringUpdate(1, start_page),
        CallDuringUpdate(
            2, lambda trainer: monitor.session.widget._on_message(None, dict(type="stop"), [])
        ),
        updates=9,
    )
    result = trainer.fit()
    threads[0].join()
    assert observed == [True, "pausing", (2, "paused"), True]
    *events, paused = result.history[1]["events"]
    assert events == [
        "learning rate 0.0001 → 0.0003",
        "KL coefficient 0.1 → 0",
        f"saved to {tmp_path / 'checkpoint'}",
    ] and paused.startswith("paused for")
    assert (
        result.history[2]["events"] == ["stopped by hand"]
        and len(result.history) == 3
        and result.interrupted
    )
    assert trainer.agent.learner.kl_coef == 0 == result.history[2]["kl_coef"]
    assert [g["lr"] for g in trainer.agent.learner.optimizer.param_groups] == [3e-4] * 2
    assert (
        monitor.session.widget.state["phase"] == "stopped"
        and [line[2] for line in monitor.session.widget.state["event_log"]][0] == "stopped by hand"
    )
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("events") for line in written] == [m.get("events") for m in result.history]
    monitor.session.widget._on_message(None, dict(type="pause"), [])  # the run has ended
    assert not monitor.session.widget.commands


INVALID_SETTINGS = [("learning_rate", 0, "above 0"), ("learning_rate", math.inf, "above 0"), ("kl_coef", -1, "at least 0"), ("kl_coef", "much", "at least 0"),
             ("kl_coef", True, "at least 0"), ("gamma", 0.9, "not among what can be set")]  # fmt: skip


@pytest.mark.parametrize("name, value, reason", INVALID_SETTINGS)
def test_monitor_rejects_invalid_settings(tmp_path, name, value, reason):
    queue, trainer, metrics = CommandQueue(MonitorWidget()), make_trainer(tmp_path), {}
    queue.execute(dict(type="set", name=name, value=value), trainer, metrics)
    assert reason in queue.widget.state["note"] and queue.widget.state["rejected"] and not metrics


def test_monitor_does_not_override_schedules(tmp_path):
    queue, trainer, metrics = (
        CommandQueue(MonitorWidget()),
        make_trainer(tmp_path, Anneal(kl_coef=(0.2, 0.0))),
        {},
    )
    queue.execute(dict(type="set", name="kl_coef", value=0.5), trainer, metrics)
    assert "Anneal" in queue.widget.state["note"] and not metrics
    queue.execute(dict(type="set", name="learning_rate", value=0.5), trainer, metrics)
    assert metrics["events"] == ["learning rate 0.0001 → 0.5"]


@pytest.mark.parametrize(
    "error, phase", [(KeyboardInterrupt, "stopped"), (OSError("the disk is full"), "failed")]
)
def test_monitor_shows_how_a_run_ended(tmp_path, notebook, error, phase):
    def raise_error(trainer):
        raise error

    monitor = TrainingMonitor()
    trainer = make_trainer(tmp_path, monitor, CallDuringUpdate(1, raise_error))
    if phase == "failed":
        with pytest.raises(OSError, match="disk is full"):
            trainer.fit()
    else:
        trainer.fit()
    assert (
        monitor.session.widget.state["phase"] == phase
        and monitor.session.widget.state["update"] == 1
    )


@pytest.mark.parametrize(
    "owner, method",
    [(MonitorSession, "__init__"), (MonitorSession, "send_state"), (EpisodePanel, "show")],
)
def test_monitor_error_does_not_end_the_run(tmp_path, notebook, monkeypatch, owner, method):
    """A progress bar replaces the monitor, with a warning"""

    def fail(*args):
        raise RuntimeError("no page")

    monitor = TrainingMonitor(min_interval=0.0, max_cpu_fraction=1.0)
    monkeypatch.setattr(owner, method, fail)
    with pytest.warns(UserWarning, match="monitor failed .RuntimeError: no page"):
        result = make_trainer(tmp_path, monitor).fit()
    assert (
        len(result.history) == 3
        and not result.interrupted
        and monitor.session is None
        and monitor.progress.bar.n == 3
    )


def test_monitor_is_the_default_inside_a_notebook_only(tmp_path, monkeypatch):
    """The default is the monitor in a notebook, and a progress bar outside or without widgets"""

    def callback_names(*callbacks):
        return [type(c).__name__ for c in make_trainer(tmp_path, *callbacks).callbacks]

    assert not in_notebook() and callback_names() == ["Progress", "Metrics", "Doctor", "Decay"]
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr("IPython.get_ipython", lambda: types.SimpleNamespace(kernel=object()))
    monkeypatch.delenv("IN_TEST", raising=False)
    assert in_notebook() and callback_names() == ["TrainingMonitor", "Metrics", "Doctor", "Decay"]
    assert callback_names("progress", "doctor") == ["Progress", "Metrics", "Doctor", "Decay"]
    monkeypatch.setenv("IN_TEST", "1")
    assert not in_notebook()
    monkeypatch.delenv("IN_TEST")
    monkeypatch.setitem(sys.modules, "llamagym.widgets.monitor", None)  # importing it fails
    assert callback_names() == ["Progress", "Metrics", "Doctor", "Decay"]


def test_monitor_curves_are_thinned():
    rng = np.random.default_rng(0)
    history = [
        dict(update=i + 1, mean_return=x, tokens=10, collect_seconds=0.0)
        for i, x in enumerate(rng.normal(size=1234))
    ]
    history[5]["mean_return"] = math.inf
    thinned = curves(history, 100)
    chunks = np.array_split([m["mean_return"] for m in history], 100)
    assert thinned["return"] == [None, *(pytest.approx(p.mean(), rel=1e-5) for p in chunks[1:])]
    assert len(json.dumps(curves(history))) < 40_000
    assert curves([])["update"] == []


def test_monitor_selects_best_and_worst_episodes(tmp_path):
    from llamagym.episodes.episode import Episode, Turn

    episodes = [
        Episode([Turn("", "", reward=r)], index=i)
        for i, r in enumerate((3.0, 1.0, 2.0, 5.0, 4.0, 0.0))
    ]
    selected, labels = select_episodes(episodes, 2)
    assert [e.total_reward for e in selected] == [0.0, 5.0, 4.0, 1.0, 2.0] and labels[
        0
    ] == "newest: episode 5"
    assert select_episodes(episodes[:1]) == (episodes[:1], ["newest: episode 0"])
    assert [e.index for e in select_episodes(episodes[:2])[0]] == [1, 0]


def test_monitor_saves_again_after_a_setting_changed(tmp_path, notebook):
    """A setting changed after a save is in the final checkpoint, with its event"""
    monitor = TrainingMonitor()

    def send_commands(trainer):
        for message in (
            dict(type="save"),
            dict(type="set", name="learning_rate", value=7e-4),
            dict(type="stop"),
        ):
            monitor.session.widget._on_message(None, message, [])

    make_trainer(tmp_path, monitor, CallDuringUpdate(0, send_commands)).fit()
    resumed = make_trainer(tmp_path)
    resumed.load_checkpoint()
    assert resumed.agent.learner.optimizer.param_groups[0]["lr"] == 7e-4
    assert [event.split()[0] for event in resumed.history[0]["events"]] == [
        "saved",
        "learning",
        "stopped",
    ]


def test_monitor_of_a_run_in_an_except_block_shows_no_failure(tmp_path, notebook):
    """A run inside an `except` block has not failed"""
    monitor = TrainingMonitor()
    try:
        raise OSError("earlier")
    except OSError:
        make_trainer(tmp_path, monitor, updates=1).fit()
    assert monitor.session.widget.state["phase"] == "finished"


def test_monitor_that_failed_ignores_messages(tmp_path, notebook, monkeypatch):
    """The page shows the failure, its buttons have no effect, and the progress bar is closed"""
    monitor, widgets = TrainingMonitor(min_interval=0.0, max_cpu_fraction=1.0), []

    def fail(panel, *args):
        widgets.append(monitor.session.widget)
        raise RuntimeError("no player")

    monkeypatch.setattr(EpisodePanel, "show", fail)
    with pytest.warns(UserWarning, match="no player"):
        make_trainer(tmp_path, monitor, updates=2).fit()
    widgets[0]._on_message(None, dict(type="pause"), [])
    assert (
        widgets[0].state["phase"] == "unavailable"
        and not widgets[0].commands
        and monitor.progress.bar.disable
    )


def test_monitor_keeps_branches_in_its_list(tmp_path, notebook):
    """A branch created during the run stays listed after its original"""
    monitor = TrainingMonitor(min_interval=0.0, max_cpu_fraction=1.0)

    def add_branch(trainer):
        monitor.session.panel.player.branch(monitor.session.panel.player.episodes[0]["key"], 1)

    class BranchAfterFirstUpdate(Callback):
        def on_log(self, trainer, metrics):
            if trainer.update == 1:
                add_branch(trainer)

    make_trainer(tmp_path, monitor, BranchAfterFirstUpdate()).fit()
    labels = [e["label"] for e in monitor.session.panel.player.episodes]
    assert labels[0] == "newest: episode 11" and labels[-2:] == [
        "newest: episode 3",
        "branch of newest: episode 3 at turn 1",
    ]
