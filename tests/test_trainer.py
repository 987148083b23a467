"""`Trainer`: resumed runs equal uninterrupted ones, checkpoints survive kills, and hooks run in order."""

import itertools
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from doubles import lake_agent, make_policy, walk_task

import llamagym.algorithms.forward as passes_module
import llamagym.algorithms.metrics as metrics_module
import llamagym.training.checkpoints as checkpoints_module
from llamagym.algorithms.batch import Batch
from llamagym.algorithms.optimization import NonFiniteLoss
from llamagym.config import Config, LoRAConfig, TrainerConfig
from llamagym.envs.adapters import episode_seed
from llamagym.models.policy import Policy
from llamagym.rollout import evaluate
from llamagym.trainer import Trainer
from llamagym.training.callbacks import CALLBACKS, Anneal, Callback, register_callback

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing",
                                        "ignore:Could not find a config file")  # fmt: skip
OPTIONS = dict(rollout__episodes=4, rollout__num_envs=3, ppo__epochs=2, ppo__mini_batch_size=4, ppo__learning_rate=1e-3, generate__max_new_tokens=3,
               trainer__updates=4, trainer__eval_every=2, trainer__eval_episodes=2, trainer__checkpoint_every=0)  # fmt: skip


def make_trainer(folder, kind="lora", callbacks=(), task=None, **options) -> Trainer:
    model = {name: options.pop(name) for name in ("critic", "lora") if name in options}
    agent = lake_agent(
        make_policy(kind, **model),
        task=task or walk_task(2),
        **(OPTIONS | options | dict(trainer__output_dir=str(folder))),
    )
    return Trainer(agent, callbacks=callbacks)


def full_state(trainer) -> tuple[list[torch.Tensor], dict]:
    """Return all state that determines how a run continues"""
    learner, policy = trainer.agent.learner, trainer.agent.policy
    tensors = [
        p.detach().clone() for p in [*policy.model.parameters(), *policy.value_head.parameters()]
    ]
    tensors += (
        []
        if policy.reference.frozen_copy is None
        else [p.detach().clone() for p in policy.reference.frozen_copy.parameters()]
    )
    tensors += [
        v.clone()
        for _, s in sorted(learner.optimizer.state_dict()["state"].items())
        for _, v in sorted(s.items())
    ]
    numbers = dict(
        kl_coef=learner.kl_coef,
        rates=[g["lr"] for g in learner.optimizer.param_groups],
        update=trainer.update,
        episodes=trainer.episodes,
    )
    return [*tensors, learner.generator.get_state()], numbers


def equal_states(a, b) -> bool:
    return (
        a[1] == b[1]
        and len(a[0]) == len(b[0])
        and all(torch.equal(x, y) for x, y in zip(a[0], b[0]))
    )


def without_times(history) -> list[dict]:
    return [
        {
            k: v
            for k, v in line.items()
            if k not in ("seconds", "collect_seconds", "tokens_per_second")
        }
        for line in history
    ]


class InterruptAt(Callback):
    """A callback that interrupts the run in a hook of an update"""

    def __init__(self, event, update, error=KeyboardInterrupt):
        self.update, self.error = update, error
        setattr(self, event, self.interrupt)

    def interrupt(self, trainer, *_):
        if len(trainer.history) == self.update and trainer.update == self.update:
            self.update = None
            raise self.error


SCHEDULE = dict(learning_rate=(1e-3, 1e-4), kl_coef=(0.2, 0.05))


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory):
    """Return a function that makes or reuses a run of four updates"""
    runs = {}

    def make_run(kind, **options):
        key = (kind, *sorted(options.items()))
        if key not in runs:
            schedule = options.pop("schedule", False)
            trainer = make_trainer(
                tmp_path_factory.mktemp("run"),
                kind,
                [Anneal(**SCHEDULE)] if schedule else [],
                **options,
            )
            runs[key] = full_state(trainer), trainer.fit(), full_state(trainer)
        return runs[key]

    return make_run


# Resuming


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("plain", dict(critic="shared")),
        ("lora", dict(ppo__kl_adaptive_target=0.001)),
        ("lora", dict(schedule=True)),
        ("lora", dict(ppo__final_learning_rate=0.1, ppo__final_kl_coef=0.1)),
        ("nf4", {}),
    ],
    ids=["plain", "lora-adaptive", "lora-annealed", "lora-decayed", "nf4"],
)
def test_resumed_run_equals_the_uninterrupted_one(kind, options, tmp_path, uninterrupted_run):
    """State and metrics are equal bit for bit, starting from new objects"""
    initial, expected, final = uninterrupted_run(kind, **options)
    options = dict(options)
    schedule = [Anneal(**SCHEDULE)] if options.pop("schedule", False) else []
    interrupted = make_trainer(
        tmp_path, kind, [*schedule, InterruptAt("on_update_start", 2)], **options
    ).fit()
    assert interrupted.interrupted and len(interrupted.history) == 2 and not expected.interrupted
    resumed = make_trainer(tmp_path, kind, schedule, **options)
    assert equal_states(full_state(resumed), initial)
    run = resumed.fit(resume=True)
    assert equal_states(full_state(resumed), final) and not equal_states(initial, final)
    assert without_times(run.history) == without_times(expected.history) and [
        line["update"] for line in run.history
    ] == [1, 2, 3, 4]
    assert repr(run.evaluation) == repr(expected.evaluation)


@pytest.mark.parametrize(
    "event",
    [
        "on_update_start",
        "on_collect_end",
        "on_update_end",
        "on_evaluate",
        "on_log",
        "on_checkpoint",
    ],
)
def test_interrupted_run_can_be_resumed_after_any_event(event, tmp_path, uninterrupted_run):
    _, expected, final = uninterrupted_run("lora")
    options = dict(trainer__checkpoint_every=1)
    callback = InterruptAt(event, 2)
    run = make_trainer(tmp_path, callbacks=[callback], **options).fit()
    assert (
        callback.update is None and run.interrupted and "interrupted after 2 updates" in repr(run)
    )
    resumed = make_trainer(tmp_path, **options)
    run = resumed.fit(resume=True)
    assert equal_states(full_state(resumed), final) and not run.interrupted
    assert [line["update"] for line in run.history] == [1, 2, 3, 4]
    without_evaluations = lambda history: [
        {k: v for k, v in line.items() if not k.startswith("eval_return")}
        for line in without_times(history)
    ]
    assert without_evaluations(run.history) == without_evaluations(expected.history)


def test_interrupt_during_an_update_rolls_it_back(tmp_path, uninterrupted_run, monkeypatch):
    _, expected, final = uninterrupted_run("lora")
    trainer, calls, original = make_trainer(tmp_path), [], passes_module.policy_loss

    def interrupting_loss(*args):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(passes_module, "policy_loss", interrupting_loss)
        assert trainer.fit().interrupted
    assert 0 < trainer.update < 4
    resumed = make_trainer(tmp_path)
    run = resumed.fit(resume=True)
    assert equal_states(full_state(resumed), final) and without_times(run.history) == without_times(
        expected.history
    )


def test_interrupt_during_a_rollout_discards_it(tmp_path, uninterrupted_run):
    _, expected, final = uninterrupted_run("lora")
    trainer, calls = make_trainer(tmp_path), []
    original_step = trainer.agent.engine.step

    def interrupting_step():
        calls.append(trainer.update)
        if calls.count(1) == 3:  # during the rollout of the second update
            raise KeyboardInterrupt
        return original_step()

    trainer.agent.engine.step = interrupting_step
    assert trainer.fit().interrupted and trainer.update == 1
    resumed = make_trainer(tmp_path)
    run = resumed.fit(resume=True)
    assert equal_states(full_state(resumed), final) and without_times(run.history) == without_times(
        expected.history
    )


def test_fit_continues_with_the_same_trainer(tmp_path, uninterrupted_run):
    """`fit` can be called again without loading a checkpoint"""
    _, expected, final = uninterrupted_run("lora")
    trainer = make_trainer(tmp_path)
    assert len(trainer.fit(2).history) == 2
    assert without_times(trainer.fit(4).history) == without_times(
        expected.history
    ) and equal_states(full_state(trainer), final)
    with pytest.warns(
        UserWarning, match="4 of 4 updates are done already; pass a larger updates= to go on"
    ):
        assert len(trainer.fit(4).history) == 4


# Saved files


def test_run_writes_metrics_and_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path / "deep" / "run")
    run = trainer.fit()
    assert run.output_dir == tmp_path / "deep" / "run" and {
        p.name for p in run.output_dir.iterdir()
    } == {"metrics.jsonl", "checkpoint"}
    assert {p.name for p in (run.output_dir / "checkpoint").iterdir()} == {
        "policy",
        "learner.safetensors",
        "learner.json",
        "trainer.json",
        "config.toml",
    }
    lines = [
        json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == run.history and ["eval_return" in line for line in lines] == [
        False,
        True,
        False,
        True,
    ]
    assert set(metrics_module.METRICS) < set(lines[0]) and [line["episodes"] for line in lines] == [
        4,
        8,
        12,
        16,
    ]
    assert Config.load(run.output_dir / "checkpoint" / "config.toml") == trainer.agent.config
    loaded = Policy.load(run.output_dir / "checkpoint" / "policy")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.agent.policy.parameters())
    )


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    """After a kill between two checkpoints, the metrics file has each update once"""

    class CopyFiles(Callback):
        def on_checkpoint(self, trainer, path):
            if trainer.update == 2:
                shutil.copytree(path, tmp_path / "killed" / "checkpoint")

        def on_log(self, trainer, metrics):
            if trainer.update == 3:
                shutil.copy(trainer.output_dir / "metrics.jsonl", tmp_path / "killed")

    make_trainer(tmp_path / "run", callbacks=[CopyFiles()], trainer__checkpoint_every=2).fit(3)
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [1, 2, 3]
    run = make_trainer(tmp_path / "killed").fit(resume=True)
    lines = [
        json.loads(line)
        for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["update"] for line in lines] == [1, 2, 3, 4] and lines == run.history


def test_metrics_added_by_callbacks_are_written(tmp_path):
    class AddMetric(Callback):
        def on_update_end(self, trainer, metrics):
            metrics["squared"] = trainer.update**2

    run = make_trainer(tmp_path, callbacks=[AddMetric()], trainer__updates=2).fit()
    assert [
        json.loads(line)["squared"]
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 4]
    assert [line["squared"] for line in run.history] == [1, 4]


def save_until(trainer, operation: int) -> bool:
    """Save in a child process that exits at its nth file operation; return whether it finished"""
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        num_operations = 0

        def count_operation(event, args):
            nonlocal num_operations
            is_write = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wxa+")
            if is_write or event in (
                "os.rename",
                "os.remove",
                "os.rmdir",
                "os.mkdir",
                "os.chmod",
                "shutil.rmtree",
            ):
                num_operations += 1
                if num_operations > operation:
                    os._exit(9)

        try:
            sys.addaudithook(count_operation)
            trainer.save_checkpoint()
        except BaseException:
            os._exit(1)
        os._exit(0)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert exit_code in (0, 9), f"the saving process ended with {exit_code}"
    return exit_code == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_kill_during_a_save_leaves_a_complete_checkpoint(tmp_path):
    """After a kill at any time, the old or the new checkpoint loads, and the next save works"""
    folder, backup, options = (
        tmp_path / "run",
        tmp_path / "pristine",
        dict(lora=LoRAConfig(r=1, target_modules=["q_proj"])),
    )
    trainer = make_trainer(folder, **options)
    trainer.fit(1)
    shutil.copytree(folder, backup)
    old = full_state(trainer)
    trainer.step()
    new = full_state(trainer)
    loaded, outcomes = make_trainer(folder, **options), []
    for operation in itertools.count(0, 2):
        shutil.rmtree(folder)
        shutil.copytree(backup, folder)
        finished = save_until(trainer, operation)
        loaded.load_checkpoint()
        assert equal_states(full_state(loaded), (old, new)[loaded.update - 1])
        outcomes.append((finished, loaded.update))
        if finished:
            break
        assert operation < 100
    assert outcomes[0] == (False, 1) and outcomes[-1] == (True, 2) and len(outcomes) > 5
    trainer.save_checkpoint()
    loaded.load_checkpoint()
    assert equal_states(full_state(loaded), new)


def test_failed_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.fit(1)
    old = full_state(trainer)
    trainer.step()
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoints_module,
            "save_learner",
            lambda *_: (_ for _ in ()).throw(OSError("disk full")),
        )
        with pytest.raises(OSError, match="disk full"):
            trainer.save_checkpoint()
    loaded = make_trainer(tmp_path)
    loaded.load_checkpoint()
    assert equal_states(full_state(loaded), old) and {p.name for p in tmp_path.iterdir()} == {
        "metrics.jsonl",
        "checkpoint",
    }


def test_non_finite_loss_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    ended = []

    class SetNaNReward(Callback):
        def on_collect_end(self, trainer, rollout):
            if trainer.update == 2:
                rollout[1].turns[1].reward = float("nan")

        def on_fit_end(self, trainer):
            ended.append(trainer.update)

    trainer = make_trainer(tmp_path, callbacks=[SetNaNReward()], trainer__checkpoint_every=1)
    with pytest.raises(NonFiniteLoss):
        trainer.fit()
    (batch_file,) = (tmp_path / "failed").iterdir()
    assert ended == [2] and torch.isnan(Batch.load(batch_file).rewards).sum() == 1
    loaded = make_trainer(tmp_path)
    loaded.load_checkpoint()
    assert loaded.update == 2 and equal_states(full_state(loaded), full_state(trainer))


# Hooks


class Recorder(Callback):
    def __init__(self):
        self.events = []
        for event in (name for name in dir(Callback) if name.startswith("on_")):
            setattr(
                self,
                event,
                lambda trainer, *args, event=event: self.events.append(
                    (event.removeprefix("on_"), trainer.update)
                ),
            )


def test_hooks_are_called_in_order(tmp_path):
    recorder = Recorder()
    make_trainer(
        tmp_path, callbacks=[recorder], trainer__checkpoint_every=2, trainer__updates=3
    ).fit()
    update = lambda n: [("update_start", n - 1), ("collect_end", n - 1), ("update_end", n)]
    assert recorder.events == [
        ("fit_start", 0), *update(1), ("log", 1), *update(2), ("evaluate", 2), ("log", 2), ("checkpoint", 2),
        *update(3), ("evaluate", 3), ("log", 3), ("checkpoint", 3), ("fit_end", 3)]  # fmt: skip


def test_callbacks_are_called_in_order_with_the_episodes(tmp_path):
    calls = []

    class RecordCalls(Callback):
        def __init__(self, name):
            self.name = name

        def on_collect_end(self, trainer, rollout):
            calls.append((self.name, [e.index for e in rollout], rollout[0].turns[0].advantage))

        def on_evaluate(self, trainer, evaluation):
            calls.append((self.name, evaluation.sampled, len(evaluation.greedy.episodes)))

    make_trainer(tmp_path, callbacks=[RecordCalls("a"), RecordCalls("b")], trainer__updates=2).fit()
    assert calls == [
        ("a", [0, 1, 2, 3], None),
        ("b", [0, 1, 2, 3], None),
        ("a", [4, 5, 6, 7], None),
        ("b", [4, 5, 6, 7], None),
        ("a", None, 2),
        ("b", None, 2),
    ]


def test_registered_callback_is_created_by_name(tmp_path):
    @register_callback("test-recorder")
    class Named(Recorder):
        pass

    try:
        trainer = make_trainer(tmp_path, callbacks=["test-recorder"], trainer__updates=1)
        trainer.fit()
        assert isinstance(trainer.callbacks[-1], Named) and trainer.callbacks[-1].events
        with pytest.raises(
            ValueError, match="a callback named 'test-recorder' is registered already"
        ):
            register_callback("test-recorder")(Recorder)
    finally:
        del CALLBACKS["test-recorder"]


def test_anneal_interpolates_coefficients_and_learning_rates(tmp_path):
    """Values are interpolated linearly; the critic's learning rate keeps its ratio"""
    rates = []

    class RecordRates(Callback):
        def on_collect_end(self, trainer, rollout):
            learner = trainer.agent.learner
            rates.append([learner.kl_coef, *(g["lr"] for g in learner.optimizer.param_groups)])

    run = make_trainer(
        tmp_path,
        callbacks=[Anneal((1e-3, 4e-4), (0.3, 0.0)), RecordRates()],
        ppo__critic_learning_rate=5e-3,
    ).fit()
    np.testing.assert_allclose(
        rates,
        [[0.3, 1e-3, 5e-3], [0.2, 8e-4, 4e-3], [0.1, 6e-4, 3e-3], [0.0, 4e-4, 2e-3]],
        atol=1e-12,
    )
    assert [line["kl_coef"] for line in run.history] == pytest.approx([0.3, 0.2, 0.1, 0.0])
    rates.clear()
    make_trainer(
        tmp_path, callbacks=[Anneal(kl_coef=(0.5, 0.1)), RecordRates()], trainer__updates=1
    ).fit()
    assert rates == [[0.5, 1e-3, 1e-3]]


def test_decay_lowers_rates_from_where_they_are(tmp_path):
    """Linear to the configured fraction; a change by hand stays, and `Anneal` goes first"""
    rates = []

    class RecordRates(Callback):
        def on_collect_end(self, trainer, rollout):
            learner = trainer.agent.learner
            rates.append([learner.kl_coef, *(g["lr"] for g in learner.optimizer.param_groups)])

        def on_update_end(self, trainer, metrics):
            if self.by_hand and trainer.update == 2:  # after it was lowered for the third update
                trainer.agent.learner.kl_coef = 1.0

    options = dict(
        ppo__kl_coef=0.2,
        ppo__learning_rate=1e-3,
        ppo__critic_learning_rate=5e-3,
        ppo__final_learning_rate=0.1,
        ppo__final_kl_coef=0.4,
    )

    def run_updates(by_hand=False, callbacks=(), **more):
        rates.clear()
        recorder = RecordRates()
        recorder.by_hand = by_hand
        make_trainer(tmp_path, callbacks=[recorder, *callbacks], **options | more).fit()
        return np.array(rates)

    expected = [[0.2, 1e-3, 5e-3], [0.16, 7e-4, 3.5e-3], [0.12, 4e-4, 2e-3], [0.08, 1e-4, 5e-4]]
    np.testing.assert_allclose(run_updates(), expected)
    by_hand = run_updates(by_hand=True)
    np.testing.assert_allclose(by_hand[:, 1:], np.array(expected)[:, 1:])
    np.testing.assert_allclose(by_hand[:, 0], [0.2, 0.16, 1.0, 0.08 / 0.12])
    annealed = run_updates(callbacks=[Anneal(kl_coef=(0.5, 0.5))])
    np.testing.assert_allclose(annealed[:, 0], 0.5)
    np.testing.assert_allclose(annealed[:, 1:], np.array(expected)[:, 1:])
    np.testing.assert_allclose(run_updates(ppo__final_learning_rate=0.0)[-1, 1:], 0, atol=1e-12)
    adaptive = run_updates(ppo__kl_adaptive_target=1.0)[:, 0]
    learned = run_updates(ppo__kl_adaptive_target=1.0, ppo__final_kl_coef=1.0)[:, 0]
    np.testing.assert_array_equal(adaptive, learned)


def test_evaluations_run_when_due(tmp_path):
    for every, updates, expected in ((0, 3, []), (1, 3, [1, 2, 3]), (2, 3, [2, 3]), (5, 3, [3])):
        recorder = Recorder()
        run = make_trainer(
            tmp_path,
            callbacks=[recorder],
            trainer__eval_every=every,
            trainer__updates=updates,
            rollout__episodes=1,
            ppo__epochs=1,
        ).fit()
        assert [n for event, n in recorder.events if event == "evaluate"] == expected
        assert (run.evaluation is None) == (not expected)


def test_training_and_evaluation_use_different_episodes(tmp_path):
    seeds = dict(train=[], evaluation=[])

    class RecordSeeds(Callback):
        def on_collect_end(self, trainer, rollout):
            seeds["train"] += [e.seed for e in rollout]

        def on_evaluate(self, trainer, evaluation):
            seeds["evaluation"] += [e.seed for e in evaluation.greedy.episodes]

    trainer = make_trainer(tmp_path, callbacks=[RecordSeeds()], trainer__seed=3)
    trainer.fit()
    assert seeds["train"] == [episode_seed(3, i) for i in range(16)] and not set(
        seeds["train"]
    ) & set(seeds["evaluation"])
    again = evaluate(trainer.agent, episodes=2, greedy=True)
    assert repr(again.greedy) == repr(trainer.evaluation.greedy)


def test_trainer_config_replaces_the_config_of_the_agent(tmp_path):
    agent = make_trainer(tmp_path).agent
    trainer = Trainer(
        agent,
        config=TrainerConfig(
            updates=1, output_dir=str(tmp_path / "other"), eval_every=0, stop_if_invalid=1
        ),
    )
    assert (
        len(trainer.fit().history) == 1
        and (tmp_path / "other" / "metrics.jsonl").exists()
        and not (tmp_path / "metrics.jsonl").exists()
    )
