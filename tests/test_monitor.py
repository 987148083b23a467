"""The training monitor without a browser: what is sent, what is obeyed, and what never ends a run."""

import json
import math
import sys
import threading
import time
import types

import numpy as np
import pytest
from doubles import lake, lake_agent, make_policy

import llamagym.monitor as monitor_module
from llamagym.config import TrainerConfig
from llamagym.monitor import Desk, MonitorWidget, TrainingMonitor, curves, pick
from llamagym.trainer import Anneal, Callback, Trainer, in_notebook

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action", "ignore:.*env.*must be constant")


@pytest.fixture
def notebook(monkeypatch):
    """As in a notebook; what was displayed"""
    displayed = []
    monkeypatch.setattr(monitor_module, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", displayed.append)
    return displayed


def trainer(folder, *callbacks, updates=3, **options) -> Trainer:
    agent = lake_agent(make_policy("lora"), max_steps=3, rollout__episodes=4, rollout__num_envs=4, ppo__epochs=1, **options)
    return Trainer(agent, config=TrainerConfig(updates=updates, eval_every=2, eval_episodes=4, checkpoint_every=0, output_dir=str(folder)), callbacks=callbacks)


class At(Callback):
    """Does something when an update's episodes are there"""

    def __init__(self, update, act):
        self.update, self.act = update, act

    def on_collect_end(self, trainer, rollout):
        if trainer.update == self.update:
            self.act(trainer)


def test_monitor_shows_what_the_history_holds(tmp_path, notebook):
    monitor = TrainingMonitor(every=0.0, share=1.0)
    run = trainer(tmp_path, monitor).fit()
    (box,) = notebook
    state = json.loads(json.dumps(monitor.widget.state, allow_nan=False))
    assert box.children == (monitor.widget, monitor.player)
    assert (state["phase"], state["update"], state["updates"], state["live"], state["title"]) == ("finished", 3, 3, False, "FrozenLake-v1")
    same = dict(spread="std_return", kl="ref_kl", entropy="entropy", invalid="invalid_rate", value_loss="value_loss")
    for name, metric in [("return", "mean_return"), *same.items()]:
        assert state["rows"][name] == pytest.approx([m[metric] for m in run.history], rel=1e-5)
    assert state["rows"]["speed"] == pytest.approx([m["tokens"] / m["collect_seconds"] for m in run.history], rel=1e-4)
    assert state["evals"] == [[2, run.history[1]["eval_return"]], [3, run.history[2]["eval_return"]]]
    assert state["references"] == {name: lake().reference_returns[name] for name in ("random", "optimal")}
    assert sum(state["time"].values()) == pytest.approx(state["seconds"], abs=0.01) and min(state["time"].values()) >= 0
    found = [(m["update"], name) for m in run.history for name in m.get("findings", {})]
    assert [(line[1], line[2]) for line in state["said"]] == found[::-1] and found
    shown = monitor.player.episodes
    assert shown[0]["label"] == "newest: episode 11" and len(shown) == 4 and monitor.player.given["key"] == shown[0]["key"]
    turns = monitor.player.given["data"]["turns"]
    assert turns[0]["frame"] in monitor.player.given["frames"] and turns[0]["value"] is not None     # drawn afterwards, annotated by the learner


def test_monitor_keeps_to_its_share_of_the_time(tmp_path, notebook):
    """By its own count, but for what is sent at the beginning and at the end; `benchmarks/player.py` measures it on a page"""
    monitor, sent = TrainingMonitor(every=0.0, share=0.2, frames=False), []
    monitor.send = lambda trainer, phase: (sent.append((monitor.spent, time.process_time() - monitor.cpu)), TrainingMonitor.send(monitor, trainer, phase))
    trainer(tmp_path, monitor, updates=12).fit()
    between = sent[1:-1]
    assert between and all(2 * spent <= 0.2 * run for spent, run in between)
    assert 0 < monitor.spent < time.process_time() - monitor.cpu
    monitor.spent, monitor.sent = 1e9, -math.inf
    assert not monitor.due
    monitor.spent = 0.0
    assert monitor.due


def test_monitor_obeys_between_updates(tmp_path, notebook):
    """From another thread, while the run goes on, and while it is paused"""
    monitor = TrainingMonitor()

    def press(trainer):
        def page():
            def click(**message):
                monitor.widget._heard(monitor.widget, message, [])

            def until(there):
                deadline = time.monotonic() + 60
                while not there(monitor.widget.state) and time.monotonic() < deadline:
                    time.sleep(0.01)

            click(type="hello")
            seen.append(monitor.widget.state["live"])
            click(type="pause")
            seen.append(monitor.widget.state["phase"])
            until(lambda state: state["phase"] == "paused")
            seen.append((trainer.update, monitor.widget.state["phase"]))
            click(type="set", name="learning_rate", value=3e-4)
            click(type="set", name="kl_coef", value=0)
            click(type="set", name="kl_coef", value=math.nan)
            click(type="save")
            click(type="dance")
            until(lambda state: "dance" in state["note"])
            seen.append(monitor.widget.state["refused"])
            click(type="resume")

        threads.append(threading.Thread(target=page))
        threads[0].start()

    seen, threads = [], []
    runs = trainer(tmp_path, monitor, At(1, press), At(2, lambda t: monitor.widget._heard(None, dict(type="stop"), [])), updates=9)
    run = runs.fit()
    threads[0].join()
    assert seen == [True, "pausing", (2, "paused"), True]
    *events, paused = run.history[1]["events"]
    assert events == ["learning rate 0.0001 → 0.0003", "KL coefficient 0.1 → 0", f"saved to {tmp_path / 'checkpoint'}"] and paused.startswith("paused for")
    assert run.history[2]["events"] == ["stopped by hand"] and len(run.history) == 3 and run.interrupted
    assert runs.agent.learner.kl_coef == 0 == run.history[2]["kl_coef"]
    assert [g["lr"] for g in runs.agent.learner.optimizer.param_groups] == [3e-4] * 2
    assert monitor.widget.state["phase"] == "stopped" and [line[2] for line in monitor.widget.state["said"]][0] == "stopped by hand"
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("events") for line in written] == [m.get("events") for m in run.history]
    monitor.widget._heard(None, dict(type="pause"), [])      # too late
    assert not monitor.widget.commands


SENSELESS = [("learning_rate", 0, "above 0"), ("learning_rate", math.inf, "above 0"), ("kl_coef", -1, "at least 0"), ("kl_coef", "much", "at least 0"),
             ("kl_coef", True, "at least 0"), ("gamma", 0.9, "not among what can be set")]  # fmt: skip


@pytest.mark.parametrize("name, value, why", SENSELESS)
def test_monitor_refuses_what_makes_no_sense(tmp_path, name, value, why):
    desk, runs, metrics = Desk(MonitorWidget()), trainer(tmp_path), {}
    desk.carry_out(dict(type="set", name=name, value=value), runs, metrics)
    assert why in desk.widget.state["note"] and desk.widget.state["refused"] and not metrics


def test_monitor_leaves_schedules_alone(tmp_path):
    desk, runs, metrics = Desk(MonitorWidget()), trainer(tmp_path, Anneal(kl_coef=(0.2, 0.0))), {}
    desk.carry_out(dict(type="set", name="kl_coef", value=0.5), runs, metrics)
    assert "Anneal" in desk.widget.state["note"] and not metrics
    desk.carry_out(dict(type="set", name="learning_rate", value=0.5), runs, metrics)
    assert metrics["events"] == ["learning rate 0.0001 → 0.5"]


@pytest.mark.parametrize("error, phase", [(KeyboardInterrupt, "stopped"), (OSError("the disk is full"), "failed")])
def test_monitor_says_how_a_run_ended(tmp_path, notebook, error, phase):
    def stop(trainer):
        raise error

    monitor = TrainingMonitor()
    runs = trainer(tmp_path, monitor, At(1, stop))
    if phase == "failed":
        with pytest.raises(OSError, match="disk is full"):
            runs.fit()
    else:
        runs.fit()
    assert monitor.widget.state["phase"] == phase and monitor.widget.state["update"] == 1


@pytest.mark.parametrize("where", ["_open", "send", "_show_episodes"])
def test_monitor_that_breaks_ends_no_run(tmp_path, notebook, monkeypatch, where):
    """A bar takes its place, and says so"""

    def broken(*args):
        raise RuntimeError("no page")

    monitor = TrainingMonitor(every=0.0, share=1.0)
    monkeypatch.setattr(monitor, where, broken)
    with pytest.warns(UserWarning, match="monitor is gone .RuntimeError: no page"):
        run = trainer(tmp_path, monitor).fit()
    assert len(run.history) == 3 and not run.interrupted and monitor.widget is None and monitor.bar.n == 3


def test_monitor_where_it_is_not_looked_at(tmp_path, monkeypatch):
    """Outside a notebook the trainer shows a bar; in one the monitor; where widgets are missing, a bar again"""

    def kinds(*callbacks):
        return [type(c).__name__ for c in trainer(tmp_path, *callbacks).callbacks]

    assert not in_notebook() and kinds() == ["Progress", "Metrics", "Doctor"]
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr("IPython.get_ipython", lambda: types.SimpleNamespace(kernel=object()))
    monkeypatch.delenv("IN_TEST", raising=False)
    assert in_notebook() and kinds() == ["TrainingMonitor", "Metrics", "Doctor"]
    assert kinds("progress", "doctor") == ["Progress", "Metrics", "Doctor"]
    monkeypatch.setenv("IN_TEST", "1")
    assert not in_notebook()
    monkeypatch.delenv("IN_TEST")
    monkeypatch.setitem(sys.modules, "llamagym.monitor", None)       # an import of it fails
    assert kinds() == ["Progress", "Metrics", "Doctor"]


def test_monitor_curves_are_thinned_and_whole():
    random = np.random.default_rng(0)
    history = [dict(update=i + 1, mean_return=x, tokens=10, collect_seconds=0.0) for i, x in enumerate(random.normal(size=1234))]
    history[5]["mean_return"] = math.inf
    thin = curves(history, 100)
    parts = np.array_split([m["mean_return"] for m in history], 100)
    assert thin["return"] == [None, *(pytest.approx(p.mean(), rel=1e-5) for p in parts[1:])]
    assert len(json.dumps(curves(history))) < 40_000
    assert curves([])["update"] == []


def test_monitor_picks_the_best_and_the_worst(tmp_path):
    from llamagym.buffer import Episode, Turn

    episodes = [Episode([Turn("", "", reward=r)], index=i) for i, r in enumerate((3.0, 1.0, 2.0, 5.0, 4.0, 0.0))]
    shown, labels = pick(episodes, 2)
    assert [e.total_reward for e in shown] == [0.0, 5.0, 4.0, 1.0, 2.0] and labels[0] == "newest: episode 5"
    assert pick(episodes[:1]) == (episodes[:1], ["newest: episode 0"])
    assert [e.index for e in pick(episodes[:2])[0]] == [1, 0]


def test_monitor_saves_what_was_set_after_it_had_saved(tmp_path, notebook):
    """Save, change, stop, all in one pause: the checkpoint at the end has the change, and says so"""
    monitor = TrainingMonitor()

    def press(trainer):
        for message in (dict(type="save"), dict(type="set", name="learning_rate", value=7e-4), dict(type="stop")):
            monitor.widget._heard(None, message, [])

    trainer(tmp_path, monitor, At(0, press)).fit()
    resumed = trainer(tmp_path)
    resumed.load_checkpoint()
    assert resumed.agent.learner.optimizer.param_groups[0]["lr"] == 7e-4
    assert [event.split()[0] for event in resumed.history[0]["events"]] == ["saved", "learning", "stopped"]


def test_monitor_of_a_fit_that_mends_something(tmp_path, notebook):
    """A run within an `except` has not failed"""
    monitor = TrainingMonitor()
    try:
        raise OSError("earlier")
    except OSError:
        trainer(tmp_path, monitor, updates=1).fit()
    assert monitor.widget.state["phase"] == "finished"


def test_monitor_that_is_gone_hears_nothing(tmp_path, notebook, monkeypatch):
    """Its page says so, and its buttons are not believed; the bar is closed"""
    monitor, page = TrainingMonitor(every=0.0, share=1.0), []

    def broken(trainer):
        page.append(monitor.widget)
        raise RuntimeError("no player")

    monkeypatch.setattr(monitor, "_show_episodes", broken)
    with pytest.warns(UserWarning, match="no player"):
        trainer(tmp_path, monitor, updates=2).fit()
    page[0]._heard(None, dict(type="pause"), [])
    assert page[0].state["phase"] == "gone" and not page[0].commands and monitor.bar.disable


def test_monitor_keeps_branches_in_its_list(tmp_path, notebook):
    """One that was made while the run was paused is there afterwards, beside what it is a branch of"""
    monitor = TrainingMonitor(every=0.0, share=1.0)

    def fork(trainer):
        monitor.player.branch(monitor.player.episodes[0]["key"], 1)

    class Forks(Callback):
        def on_log(self, trainer, metrics):
            if trainer.update == 1:
                fork(trainer)

    trainer(tmp_path, monitor, Forks()).fit()
    labels = [e["label"] for e in monitor.player.episodes]
    assert labels[0] == "newest: episode 11" and labels[-2:] == ["newest: episode 3", "branch of newest: episode 3 at turn 1"]
