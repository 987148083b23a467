"""`Trainer`: a run that is stopped and resumed is the run that was not; what is written; who is told, and when."""

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

import llamagym.passes as passes_module
import llamagym.ppo as ppo_module
import llamagym.trainer as trainer_module
from llamagym.batch import Batch
from llamagym.config import Config, LoRAConfig, TrainerConfig
from llamagym.policy import Policy
from llamagym.ppo import NonFiniteLoss
from llamagym.rollout import evaluate
from llamagym.task import episode_seed
from llamagym.trainer import CALLBACKS, Anneal, Callback, Trainer, register_callback

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing",
                                        "ignore:Could not find a config file")  # fmt: skip
OPTIONS = dict(rollout__episodes=4, rollout__num_envs=3, ppo__epochs=2, ppo__mini_batch_size=4, ppo__learning_rate=1e-3, generate__max_new_tokens=3,
               trainer__updates=4, trainer__eval_every=2, trainer__eval_episodes=2, trainer__checkpoint_every=0)  # fmt: skip


def trainer_of(folder, kind="lora", callbacks=(), task=None, **options) -> Trainer:
    model = {name: options.pop(name) for name in ("critic", "lora") if name in options}
    agent = lake_agent(make_policy(kind, **model), task=task or walk_task(2), **(OPTIONS | options | dict(trainer__output_dir=str(folder))))
    return Trainer(agent, callbacks=callbacks)


def everything(trainer) -> tuple[list[torch.Tensor], dict]:
    """All that decides how a run goes on"""
    learner, policy = trainer.agent.learner, trainer.agent.policy
    tensors = [p.detach().clone() for p in [*policy.model.parameters(), *policy.value_head.parameters()]]
    tensors += [] if policy._frozen is None else [p.detach().clone() for p in policy._frozen.parameters()]
    tensors += [v.clone() for _, s in sorted(learner.optimizer.state_dict()["state"].items()) for _, v in sorted(s.items())]
    numbers = dict(kl_coef=learner.kl_coef, rates=[g["lr"] for g in learner.optimizer.param_groups], update=trainer.update, episodes=trainer.episodes)
    return [*tensors, learner.generator.get_state()], numbers


def same(a, b) -> bool:
    return a[1] == b[1] and len(a[0]) == len(b[0]) and all(torch.equal(x, y) for x, y in zip(a[0], b[0]))


def timeless(history) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "collect_seconds", "tokens_per_second")} for line in history]


class StopsAt(Callback):
    """Presses the stop button at an event of an update"""

    def __init__(self, event, update, error=KeyboardInterrupt):
        self.update, self.error = update, error
        setattr(self, event, self.press)

    def press(self, trainer, *_):
        if len(trainer.history) == self.update and trainer.update == self.update:
            self.update = None
            raise self.error


SCHEDULE = dict(learning_rate=(1e-3, 1e-4), kl_coef=(0.2, 0.05))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs of four updates, by kind and options"""
    made = {}

    def run(kind, **options):
        key = (kind, *sorted(options.items()))
        if key not in made:
            schedule = options.pop("schedule", False)
            trainer = trainer_of(tmp_path_factory.mktemp("run"), kind, [Anneal(**SCHEDULE)] if schedule else [], **options)
            made[key] = everything(trainer), trainer.fit(), everything(trainer)
        return made[key]

    return run


# resuming


@pytest.mark.parametrize(
    ("kind", "options"),
    [("plain", dict(critic="shared")), ("lora", dict(ppo__kl_target=0.001)), ("lora", dict(schedule=True)), ("nf4", {})],
    ids=["plain", "lora-adaptive", "lora-annealed", "nf4"],
)
def test_a_resumed_run_is_the_uninterrupted_one(kind, options, tmp_path, uninterrupted):
    """Bit for bit: weights, reference, moments, random order, coefficient, rates and metrics, from a fresh process's objects"""
    begin, whole, end = uninterrupted(kind, **options)
    options = dict(options)
    schedule = [Anneal(**SCHEDULE)] if options.pop("schedule", False) else []
    stopped = trainer_of(tmp_path, kind, [*schedule, StopsAt("on_update_start", 2)], **options).fit()
    assert stopped.interrupted and len(stopped.history) == 2 and not whole.interrupted
    again = trainer_of(tmp_path, kind, schedule, **options)
    assert same(everything(again), begin)
    run = again.fit(resume=True)
    assert same(everything(again), end) and not same(begin, end)
    assert timeless(run.history) == timeless(whole.history) and [line["update"] for line in run.history] == [1, 2, 3, 4]
    assert repr(run.evaluation) == repr(whole.evaluation)


@pytest.mark.parametrize("event", ["on_update_start", "on_collect_end", "on_update_end", "on_evaluate", "on_log", "on_checkpoint"])
def test_an_interrupt_at_any_event_saves_and_resumes(event, tmp_path, uninterrupted):
    _, whole, end = uninterrupted("lora")
    options = dict(trainer__checkpoint_every=1)
    stopper = StopsAt(event, 2)
    run = trainer_of(tmp_path, callbacks=[stopper], **options).fit()
    assert stopper.update is None and run.interrupted and "interrupted after 2 updates" in repr(run)
    again = trainer_of(tmp_path, **options)
    run = again.fit(resume=True)
    assert same(everything(again), end) and not run.interrupted
    assert [line["update"] for line in run.history] == [1, 2, 3, 4]
    drop = lambda history: [{k: v for k, v in line.items() if k != "eval_return"} for line in timeless(history)]
    assert drop(run.history) == drop(whole.history)


def test_an_interrupt_in_the_midst_of_an_update_undoes_it(tmp_path, uninterrupted, monkeypatch):
    _, whole, end = uninterrupted("lora")
    trainer, calls, real = trainer_of(tmp_path), [], passes_module.policy_loss

    def pressed(*args):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(passes_module, "policy_loss", pressed)
        assert trainer.fit().interrupted
    assert 0 < trainer.update < 4
    again = trainer_of(tmp_path)
    run = again.fit(resume=True)
    assert same(everything(again), end) and timeless(run.history) == timeless(whole.history)


def test_an_interrupt_while_episodes_are_collected(tmp_path, uninterrupted):
    _, whole, end = uninterrupted("lora")
    trainer, calls = trainer_of(tmp_path), []
    step = trainer.agent.engine.step

    def pressed():
        calls.append(trainer.update)
        if calls.count(1) == 3:  # in the midst of the second update's episodes
            raise KeyboardInterrupt
        return step()

    trainer.agent.engine.step = pressed
    assert trainer.fit().interrupted and trainer.update == 1
    again = trainer_of(tmp_path)
    run = again.fit(resume=True)
    assert same(everything(again), end) and timeless(run.history) == timeless(whole.history)


def test_the_same_trainer_goes_on(tmp_path, uninterrupted):
    """`fit` again in the same notebook, without loading"""
    _, whole, end = uninterrupted("lora")
    trainer = trainer_of(tmp_path)
    assert len(trainer.fit(2).history) == 2
    assert timeless(trainer.fit(4).history) == timeless(whole.history) and same(everything(trainer), end)
    with pytest.warns(UserWarning, match="4 of 4 updates are made already; pass a larger updates= to go on"):
        assert len(trainer.fit(4).history) == 4


# what is on disk


def test_files_of_a_run(tmp_path):
    trainer = trainer_of(tmp_path / "deep" / "run")
    run = trainer.fit()
    assert run.output_dir == tmp_path / "deep" / "run" and {p.name for p in run.output_dir.iterdir()} == {"metrics.jsonl", "checkpoint"}
    assert {p.name for p in (run.output_dir / "checkpoint").iterdir()} == {"policy", "learner.safetensors", "learner.json", "trainer.json", "config.toml"}
    lines = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.history and ["eval_return" in line for line in lines] == [False, True, False, True]
    assert set(ppo_module.STATS) < set(lines[0]) and [line["episodes"] for line in lines] == [4, 8, 12, 16]
    assert Config.load(run.output_dir / "checkpoint" / "config.toml") == trainer.agent.config
    loaded = Policy.load(run.output_dir / "checkpoint" / "policy")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.agent.policy.parameters()))


def test_metrics_of_updates_that_no_checkpoint_kept_are_dropped(tmp_path):
    """Killed after update 3, the last checkpoint of update 2: the file has each update once"""

    class Keeps(Callback):
        def on_checkpoint(self, trainer, path):
            if trainer.update == 2:
                shutil.copytree(path, tmp_path / "killed" / "checkpoint")

        def on_log(self, trainer, metrics):
            if trainer.update == 3:
                shutil.copy(trainer.output_dir / "metrics.jsonl", tmp_path / "killed")

    trainer_of(tmp_path / "run", callbacks=[Keeps()], trainer__checkpoint_every=2).fit(3)
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [1, 2, 3]
    run = trainer_of(tmp_path / "killed").fit(resume=True)
    lines = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4] and lines == run.history


def test_what_callbacks_add_to_the_metrics_is_written(tmp_path):
    class Counts(Callback):
        def on_update_end(self, trainer, metrics):
            metrics["squared"] = trainer.update**2

    run = trainer_of(tmp_path, callbacks=[Counts()], trainer__updates=2).fit()
    assert [json.loads(line)["squared"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 4]
    assert [line["squared"] for line in run.history] == [1, 4]


def saves_until(trainer, operation: int) -> bool:
    """In a process of its own that is killed at its nth operation on files: save. Whether it got to its end"""
    child = os.fork()
    if not child:
        signal.alarm(20)
        seen = 0

        def watch(event, args):
            nonlocal seen
            writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wxa+")
            if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"):
                seen += 1
                if seen > operation:
                    os._exit(9)

        try:
            sys.addaudithook(watch)
            trainer.save_checkpoint()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), f"the saving process ended with {code}"
    return code == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_kill_between_files_leaves_a_whole_checkpoint(tmp_path):
    """Wherever the process is killed: what is loaded is the old checkpoint or the new one, and the next save works"""
    folder, pristine, small = tmp_path / "run", tmp_path / "pristine", dict(lora=LoRAConfig(r=1, target_modules=["q_proj"]))
    trainer = trainer_of(folder, **small)
    trainer.fit(1)
    shutil.copytree(folder, pristine)
    old = everything(trainer)
    trainer.step()
    new = everything(trainer)
    fresh, outcomes = trainer_of(folder, **small), []
    for operation in itertools.count(0, 2):
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)
        finished = saves_until(trainer, operation)
        fresh.load_checkpoint()
        assert same(everything(fresh), (old, new)[fresh.update - 1])
        outcomes.append((finished, fresh.update))
        if finished:
            break
        assert operation < 100
    assert outcomes[0] == (False, 1) and outcomes[-1] == (True, 2) and len(outcomes) > 5
    trainer.save_checkpoint()
    fresh.load_checkpoint()
    assert same(everything(fresh), new)


def test_a_failing_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    trainer.fit(1)
    old = everything(trainer)
    trainer.step()
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "save_learner", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            trainer.save_checkpoint()
    fresh = trainer_of(tmp_path)
    fresh.load_checkpoint()
    assert same(everything(fresh), old) and {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "checkpoint"}


def test_a_loss_that_is_not_finite_ends_the_run_and_not_the_checkpoint(tmp_path):
    told = []

    class Ends(Callback):
        def on_collect_end(self, trainer, rollout):
            if trainer.update == 2:
                rollout[1].turns[1].reward = float("nan")

        def on_fit_end(self, trainer):
            told.append(trainer.update)

    trainer = trainer_of(tmp_path, callbacks=[Ends()], trainer__checkpoint_every=1)
    with pytest.raises(NonFiniteLoss):
        trainer.fit()
    (saved,) = (tmp_path / "failed").iterdir()
    assert told == [2] and torch.isnan(Batch.load(saved).rewards).sum() == 1
    fresh = trainer_of(tmp_path)
    fresh.load_checkpoint()
    assert fresh.update == 2 and same(everything(fresh), everything(trainer))


# who is told


class Recorder(Callback):
    def __init__(self):
        self.events = []
        for event in (name for name in dir(Callback) if name.startswith("on_")):
            setattr(self, event, lambda trainer, *args, event=event: self.events.append((event.removeprefix("on_"), trainer.update)))


def test_the_order_of_events(tmp_path):
    recorder = Recorder()
    trainer_of(tmp_path, callbacks=[recorder], trainer__checkpoint_every=2, trainer__updates=3).fit()
    update = lambda n: [("update_start", n - 1), ("collect_end", n - 1), ("update_end", n)]
    assert recorder.events == [
        ("fit_start", 0), *update(1), ("log", 1), *update(2), ("evaluate", 2), ("log", 2), ("checkpoint", 2),
        *update(3), ("evaluate", 3), ("log", 3), ("checkpoint", 3), ("fit_end", 3)]  # fmt: skip


def test_callbacks_are_told_in_their_order_and_see_the_episodes(tmp_path):
    seen = []

    class Looks(Callback):
        def __init__(self, name):
            self.name = name

        def on_collect_end(self, trainer, rollout):
            seen.append((self.name, [e.index for e in rollout], rollout[0].turns[0].advantage))

        def on_evaluate(self, trainer, evaluation):
            seen.append((self.name, evaluation.sampled, len(evaluation.greedy.episodes)))

    trainer_of(tmp_path, callbacks=[Looks("a"), Looks("b")], trainer__updates=2).fit()
    assert seen == [("a", [0, 1, 2, 3], None), ("b", [0, 1, 2, 3], None), ("a", [4, 5, 6, 7], None), ("b", [4, 5, 6, 7], None), ("a", None, 2), ("b", None, 2)]


def test_registered_callbacks(tmp_path):
    @register_callback("test-recorder")
    class Named(Recorder):
        pass

    try:
        trainer = trainer_of(tmp_path, callbacks=["test-recorder"], trainer__updates=1)
        trainer.fit()
        assert isinstance(trainer.callbacks[-1], Named) and trainer.callbacks[-1].events
        with pytest.raises(ValueError, match="a callback named 'test-recorder' is registered already"):
            register_callback("test-recorder")(Recorder)
    finally:
        del CALLBACKS["test-recorder"]


def test_annealing(tmp_path):
    """Linear from first to last; the critic's rate keeps its ratio"""
    seen = []

    class Looks(Callback):
        def on_collect_end(self, trainer, rollout):
            learner = trainer.agent.learner
            seen.append([learner.kl_coef, *(g["lr"] for g in learner.optimizer.param_groups)])

    run = trainer_of(tmp_path, callbacks=[Anneal((1e-3, 4e-4), (0.3, 0.0)), Looks()], ppo__critic_learning_rate=5e-3).fit()
    np.testing.assert_allclose(seen, [[0.3, 1e-3, 5e-3], [0.2, 8e-4, 4e-3], [0.1, 6e-4, 3e-3], [0.0, 4e-4, 2e-3]], atol=1e-12)
    assert [line["kl_coef"] for line in run.history] == pytest.approx([0.3, 0.2, 0.1, 0.0])
    seen.clear()
    trainer_of(tmp_path, callbacks=[Anneal(kl_coef=(0.5, 0.1)), Looks()], trainer__updates=1).fit()
    assert seen == [[0.5, 1e-3, 1e-3]]


def test_evaluations_and_checkpoints_come_when_due(tmp_path):
    for every, updates, expected in ((0, 3, []), (1, 3, [1, 2, 3]), (2, 3, [2, 3]), (5, 3, [3])):
        recorder = Recorder()
        run = trainer_of(tmp_path, callbacks=[recorder], trainer__eval_every=every, trainer__updates=updates, rollout__episodes=1, ppo__epochs=1).fit()
        assert [n for event, n in recorder.events if event == "evaluate"] == expected
        assert (run.evaluation is None) == (not expected)


def test_training_episodes_and_evaluation_episodes_are_apart(tmp_path):
    seen = dict(train=[], evaluation=[])

    class Looks(Callback):
        def on_collect_end(self, trainer, rollout):
            seen["train"] += [e.seed for e in rollout]

        def on_evaluate(self, trainer, evaluation):
            seen["evaluation"] += [e.seed for e in evaluation.greedy.episodes]

    trainer = trainer_of(tmp_path, callbacks=[Looks()], trainer__seed=3)
    trainer.fit()
    assert seen["train"] == [episode_seed(3, i) for i in range(16)] and not set(seen["train"]) & set(seen["evaluation"])
    assert repr(evaluate(trainer.agent, episodes=2, greedy=True)) == repr(trainer.evaluation)


def test_a_configuration_of_its_own(tmp_path):
    agent = trainer_of(tmp_path).agent
    trainer = Trainer(agent, config=TrainerConfig(updates=1, output_dir=str(tmp_path / "other"), eval_every=0))
    assert len(trainer.fit().history) == 1 and (tmp_path / "other" / "metrics.jsonl").exists() and not (tmp_path / "metrics.jsonl").exists()
