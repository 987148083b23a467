"""Plant silent faults in healthy runs, and see whether the doctor names them and is silent otherwise.

    python benchmarks/doctor.py                 # 25 faults and 20 healthy runs
    python benchmarks/doctor.py --quick         # 3 faults, 2 healthy runs
    python benchmarks/doctor.py --seeds 3       # each run with three seeds

A fault is a small patch of a healthy run of the tiny model: none raises an error, and losses stay
finite. The doctor gets what it gets in any run. A fault counts as named if a finding that was decided
on beforehand (`Fault.accepted`) is reported within three updates. A healthy run must have no finding at
all. Rows are appended to `--output` as runs finish; rows in it are not run again.
"""

import argparse
import dataclasses
import functools
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import torch
from resumable import run
from torch import nn

import llamagym.agents.episode_runner
from llamagym.agent import Agent
from llamagym.agents.recorder import EpisodeRecorder
from llamagym.agents.scored import ScoredAgent
from llamagym.algorithms.batch import Batch
from llamagym.chat.conversation import Window
from llamagym.chat.renderer import ChatRenderer
from llamagym.config import Config, LoRAConfig
from llamagym.envs.baselines import Baseline, RandomAgent, play
from llamagym.envs.probes import PROBES
from llamagym.envs.task import Task
from llamagym.envs.text_env import TextEnv
from llamagym.envs.toy_text import (
    blackjack,
    cliff_walking,
    frozen_lake,
    optimal_policy,
    taxi,
)
from llamagym.inference.engine import Engine, EngineCore
from llamagym.inference.model_runner import BatchRunner
from llamagym.inference.sequence import ResponseState, Sample
from llamagym.models.policy import Policy
from llamagym.models.reference import add_lora
from llamagym.ppo import PPO, PPOUpdate
from llamagym.trainer import Trainer
from llamagym.training.callbacks import Callback, Doctor
from llamagym.training.cloning import clone
from llamagym.training.dependence import END, effects_of, reward_dependences
from llamagym.training.fault_checks import equal_pairs
from llamagym.training.findings import RunState

UPDATES = 3  # within which a fault has to be named
HEALTHY_UPDATES = 4
OPTIONS = {
    "generate.max_new_tokens": 6, "rollout.episodes": 64, "rollout.num_envs": 64, "ppo.learning_rate": 3e-4, "ppo.epochs": 2,
    "ppo.mini_batch_size": 64, "ppo.token_budget": 32768, "warmstart.epochs": 2, "warmstart.batch_size": 16, "warmstart.probe_responses": 0, "warmstart.probe_episodes": 0, "warmstart.learning_rate": 3e-3,
    "trainer.eval_every": 0, "trainer.checkpoint_every": 0,
}  # fmt: skip


class NoisyExpert:
    "A baseline that plays optimally in 70 % of the turns, and at random in the others"

    def __init__(self, task: Task, seed: int = 0) -> None:
        self.task, self.optimal, self.seed = task, optimal_policy(task), seed

    def start(self, episode: int) -> None:
        self.rng = np.random.default_rng([self.seed, episode])

    def respond(self, env: TextEnv) -> str:
        legal = env.legal_actions()
        action = legal[self.rng.integers(len(legal))]
        if self.rng.random() < 0.7:
            action = self.optimal(env.obs, env.info)
        return self.task.format_action(action)


@dataclass(frozen=True)
class Setup:
    "A run: task, model, algorithm and settings"

    task: Callable[[], Task]
    options: dict = field(default_factory=dict)
    algorithm: str = "ppo"
    scored: bool = False
    lora: LoRAConfig | None = field(default_factory=lambda: LoRAConfig(r=8))
    critic: str = "reference"
    pretrained: bool = False  # the base itself was cloned, and the adapter is new
    games: int = 200  # imitated
    baseline: type[Baseline] = RandomAgent

    def with_options(self, **options) -> "Setup":
        return dataclasses.replace(
            self,
            options=self.options | {k.replace("__", "."): v for k, v in options.items()},
        )


def changed(make: Callable[[], Task], **changes) -> Callable[[], Task]:
    "Return a factory of a task with some fields replaced"
    return functools.partial(_changed, make, changes)


def _changed(make: Callable[[], Task], changes: dict) -> Task:
    return dataclasses.replace(make(), **changes)


def build(setup: Setup, seed: int, folder: str, task: Task | None = None) -> Agent:
    "Make the agent of a run, after its warm start"
    task = setup.task() if task is None else task
    config = Config.from_dict(
        OPTIONS
        | setup.options
        # Faults of the format are planted, and the doctor is to find them.
        | {
            "trainer.stop_if_invalid": 1,
            "credit.algorithm": setup.algorithm,
            "trainer.seed": seed,
            "trainer.output_dir": folder,
        }
    )
    kind = ScoredAgent if setup.scored else Agent
    lora = None if setup.pretrained else setup.lora
    policy = Policy.load("tiny", lora=lora, critic=setup.critic, seed=seed)
    agent = kind.for_task(task, policy, config=config)
    healthy_task = setup.task()
    baseline = setup.baseline(healthy_task, seed=1000 + seed)
    games = play(healthy_task, baseline, setup.games, seed=1000 + seed)
    clone(agent, games, progress=False)
    if setup.pretrained:
        model = add_lora(policy.causal_lm, setup.lora, seed)
        agent = kind.for_task(task, Policy(model, policy.tokenizer, seed=seed), config=config)
    return agent


DRY = functools.partial(frozen_lake, slippery=False)
RULES = "Walk over the frozen lake from S to G, past the holes H."
LAKE = Setup(changed(DRY, system_prompt=RULES, max_steps=12), baseline=NoisyExpert)
CARDS = Setup(changed(blackjack, system_prompt="Play blackjack."))
CLIFF = Setup(
    changed(cliff_walking, system_prompt="Walk.", max_steps=20, reference_returns={}),
    scored=True,
    games=60,
)
CAB = Setup(changed(taxi, max_steps=20, legal_actions="all", system_prompt="Drive.", reference_returns={}, context=Window(1)), scored=True, games=40)  # fmt: skip


def probe(name: str) -> Setup:
    "Return the setup of a diagnostic environment"
    found = PROBES[name]
    keep = {k: v for k, v in found.options.items() if k.startswith("credit")}
    games = 200 if found.scored else 600  # of a single turn
    return Setup(
        lambda: found.task, keep, scored=found.scored, games=games, baseline=found.baseline
    )


HEALTHY: dict[str, Setup] = {
    "blackjack, ppo, all defaults": dataclasses.replace(CARDS, task=blackjack).with_options(
        ppo__learning_rate=1e-4, ppo__epochs=4, ppo__mini_batch_size=16, rollout__num_envs=16, generate__max_new_tokens=32,
        warmstart__epochs=3, warmstart__learning_rate=1e-3),
    "blackjack, ppo, whole model": dataclasses.replace(CARDS, lora=None).with_options(ppo__learning_rate=1e-4),
    "blackjack, reinforce": dataclasses.replace(CARDS, algorithm="reinforce"),
    "blackjack, retries": CARDS.with_options(rollout__on_invalid="retry:2", rollout__invalid_reward=-0.1),
    "blackjack, adapter on a pretrained model": dataclasses.replace(CARDS, pretrained=True),
    "lake, ppo": LAKE,
    "lake, ppo, slippery, window": dataclasses.replace(LAKE, task=changed(frozen_lake, system_prompt=RULES, max_steps=20, reference_returns={}, context=Window(1))),
    "lake, grpo": dataclasses.replace(LAKE, algorithm="grpo"),
    "lake, gigpo": dataclasses.replace(LAKE, algorithm="gigpo"),
    "lake, ppo per token, ends when invalid": dataclasses.replace(LAKE, algorithm="ppo_token").with_options(
        rollout__on_invalid="terminate", rollout__invalid_reward=-1.0),
    "lake, hot, adaptive KL, importance weights": LAKE.with_options(generate__temperature=1.3, ppo__kl_adaptive_target=0.1, ppo__tis_cap=2.0),
    "cliff, scored, detached critic": dataclasses.replace(CLIFF, critic="detached").with_options(ppo__critic_learning_rate=3e-3),
    "cliff, sampled, template history": dataclasses.replace(CLIFF, scored=False, games=100).with_options(context__history="template", context__turns=3),
    "taxi, scored, ppo": CAB,
    "taxi, scored, rloo": dataclasses.replace(CAB, algorithm="rloo"),
    "bandit, bilevel": dataclasses.replace(probe("bandit"), algorithm="ppo_bilevel"),
    "match, drgrpo": dataclasses.replace(probe("match"), algorithm="drgrpo"),
    "format, critic warmup": probe("format").with_options(ppo__critic_warmup=1),
    "delayed, KL in the reward": probe("delayed").with_options(ppo__kl_placement="reward"),
    "copy, whole model, shared critic": dataclasses.replace(probe("copy"), lora=None, critic="shared").with_options(ppo__learning_rate=1e-4),
}  # fmt: skip


# Faults in a task


class ConstantReward(gym.RewardWrapper):
    "Compares the reward's text with a number"

    def reward(self, reward: float) -> float:
        return float(str(reward) == 1)


class Deaf(gym.ActionWrapper):
    "Ignores the action and takes a random one"

    def action(self, action: int) -> int:
        return int(self.unwrapped.np_random.integers(self.action_space.n))


class Fragile(gym.ActionWrapper):
    "Raises an error in one of a hundred steps"

    def action(self, action: int) -> int:
        if self.unwrapped.np_random.random() < 0.01:
            raise KeyError("inventory")
        return action


def wrapped(wrapper: type[gym.Wrapper], task: Task) -> Task:
    return dataclasses.replace(task, env=lambda: wrapper(task.make()))


def wrong_label(text: str) -> int | None:
    "Parse what follows a label that the system prompt does not ask for"
    match = re.search(r"<action>(\w+)</action>", text)
    return int(match[1]) if match else None


def forbidden_actions(obs, info: dict) -> list[int]:
    "List what the mask forbids"
    mask = info["action_mask"]
    return [a for a in range(len(mask)) if not mask[a]] or list(range(len(mask)))


# Faults in a run. Each is a context in which the run is made.


@contextmanager
def base_sampler(agent: Agent) -> Iterator[None]:
    "Load the sampler's weights without the adapter"
    load_backend = BatchRunner.load_backend

    def load(self: BatchRunner) -> None:
        load_backend(self)
        with agent.policy.model.disable_adapter():
            load_backend(self)

    with patch.object(BatchRunner, "load_backend", load):
        yield


@contextmanager
def kept_cache(agent: Agent) -> Iterator[None]:
    "Load new weights, but keep the keys and values that the old ones computed"

    def load(self: EngineCore) -> None:
        if self.runner.is_stale:
            self.runner.load_backend()

    with (
        patch.object(EngineCore, "_load_weights", load),
        patch.object(Engine, "evict", lambda self, *args: None),
    ):
        yield


def sampler_temperature(agent: Agent) -> nullcontext:
    "Sample at another temperature than the learner assumes"
    agent.engine.sampler.config = agent.engine.config.replace({"temperature": 1.5})
    return nullcontext()


@contextmanager
def shifted_logprobs(agent: Agent) -> Iterator[None]:
    "Record for each token the log-probability of the one before"
    to_sample = ResponseState.to_sample

    def shifted(self: ResponseState, stopped: bool) -> Sample:
        sample = to_sample(self, stopped)
        return dataclasses.replace(sample, logprobs=np.roll(sample.logprobs, 1))

    with patch.object(ResponseState, "to_sample", shifted):
        yield


@contextmanager
def shifted_mask(agent: Agent) -> Iterator[None]:
    "Train on the tokens one position after those that were sampled"
    train = PPO.train_on_batch

    def shifted(self: PPO, batch: Batch, reference) -> dict:
        lengths = torch.tensor([len(row) for row in batch.rows])[batch.row_of_token]
        position = torch.minimum(batch.token_position + 1, lengths - 1)
        ids = [int(batch.rows[r][p]) for r, p in zip(batch.row_of_token, position)]
        batch = dataclasses.replace(batch, token_position=position, token_ids=torch.tensor(ids))
        return train(self, batch, reference)

    with patch.object(PPO, "train_on_batch", shifted):
        yield


@contextmanager
def dropout(agent: Agent) -> Iterator[None]:
    "Leave the model in training mode during the update"
    update = PPOUpdate.run

    def train_mode(self: PPOUpdate) -> dict:
        agent.policy.model.train()
        return update(self)

    with patch.object(PPOUpdate, "run", train_mode):
        yield


@torch.no_grad()
def with_padding(policy: Policy, batch: Batch, reference, temperature: float):
    "Add the padding of each row to the trained tokens, with the advantage of the row's last turn"
    longest = max(len(row) for row in batch.rows)
    pad = [(r, p) for r, row in enumerate(batch.rows) for p in range(len(row), longest)]
    row, position = (torch.tensor(column) for column in zip(*pad))
    rows = [
        np.pad(ids, (0, longest - len(ids)), constant_values=policy.pad_id) for ids in batch.rows
    ]
    last_turn = {int(r): m for m, r in enumerate(batch.row_of_turn)}
    last_token = {int(r): n for n, r in enumerate(batch.row_of_token)}
    tokens = torch.tensor([last_token[int(r)] for r in row])
    hidden = policy.backbone(torch.tensor(np.stack(rows)))[row, position - 1]
    logprobs = (policy.logits(hidden) / temperature).log_softmax(-1)[:, policy.pad_id]
    with policy.as_reference():
        ref_hidden = policy.backbone(torch.tensor(np.stack(rows)))[row, position - 1]
        log_dist = (policy.logits(ref_hidden) / temperature).log_softmax(-1)
    added = dict(
        row_of_token=row,
        token_position=position,
        token_ids=torch.full_like(row, policy.pad_id),
        turn_of_token=torch.tensor([last_turn[int(r)] for r in row]),
        token_index=torch.arange(batch.num_tokens, batch.num_tokens + len(row)),
        logprobs=logprobs,
        advantages=batch.advantages[tokens],
        token_values=batch.token_values[tokens],
        token_returns=batch.token_returns[tokens],
    )
    joined = {name: torch.cat([getattr(batch, name), new]) for name, new in added.items()}
    reference.token_hidden = torch.cat([reference.token_hidden, ref_hidden])
    reference.log_dist = torch.cat([reference.log_dist, log_dist])
    return dataclasses.replace(batch, rows=rows, **joined), reference


@contextmanager
def trained_padding(agent: Agent) -> Iterator[None]:
    "Train on padding tokens"
    train = PPO.train_on_batch

    def padded(self: PPO, batch: Batch, reference) -> dict:
        return train(self, *with_padding(self.policy, batch, reference, self.temperature))

    with patch.object(PPO, "train_on_batch", padded):
        yield


@contextmanager
def rolled_advantages(agent: Agent) -> Iterator[None]:
    "Give each turn the advantage of the next"
    assign = PPO.assign_advantages

    def rolled(self: PPO, episodes) -> None:
        assign(self, episodes)
        for episode in episodes:
            advantages = np.roll([turn.advantage for turn in episode.turns], -1)
            for turn, advantage in zip(episode.turns, advantages.tolist()):
                turn.advantage = advantage

    with patch.object(PPO, "assign_advantages", rolled):
        yield


@contextmanager
def early_rewards(agent: Agent) -> Iterator[None]:
    "Give each reward to the turn before"

    def add_reward(self: EpisodeRecorder, reward: float) -> None:
        self.turns[-2 if len(self.turns) > 1 else -1].reward += float(reward)
        self.awaiting_reward = False

    with patch.object(EpisodeRecorder, "add_reward", add_reward):
        yield


@contextmanager
def frozen_adapter(agent: Agent) -> Iterator[None]:
    "Switch the gradients of the adapter off"
    update = PPOUpdate.run

    def frozen(self: PPOUpdate) -> dict:
        for parameter in agent.policy.parameters():
            parameter.requires_grad_(False)
        return update(self)

    with patch.object(PPOUpdate, "run", frozen):
        yield


def replaced_parameters(agent: Agent) -> nullcontext:
    "Replace the adapter's tensors after the optimizer was made"
    for module in agent.policy.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
    return nullcontext()


def base_reference(agent: Agent) -> nullcontext:
    "Compare the policy with the base model, not with itself after the warm start"
    agent.policy.reference.drop()
    return nullcontext()


@contextmanager
def same_seed(agent: Agent) -> Iterator[None]:
    "Reset every environment with the same seed"
    with patch.object(llamagym.agents.episode_runner, "episode_seed", lambda seed, index: 1234):
        yield


@contextmanager
def same_random_stream(agent: Agent) -> Iterator[None]:
    "Seed the sampler of each episode by the run alone"
    start = Agent.start_episode

    def start_episode(self: Agent, rng, *args, **fields):
        return start(self, np.random.default_rng(0), *args, **fields)

    with patch.object(Agent, "start_episode", start_episode):
        yield


@contextmanager
def batch_deviation(agent: Agent) -> Iterator[None]:
    "Divide advantages by their standard deviation in the batch, however small it is"

    def standardized(self: PPO, episodes) -> None:
        self.algorithm.assign_advantages(episodes, self.credit)
        turns = [turn for episode in episodes for turn in episode.turns]
        advantages = np.array([turn.advantage for turn in turns])
        scaled = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        for turn, advantage in zip(turns, scaled.tolist()):
            turn.advantage = advantage

    with patch.object(PPO, "assign_advantages", standardized):
        yield


@contextmanager
def template_without_system(agent: Agent) -> Iterator[None]:
    "Render conversations without the system prompt"
    first_turn = ChatRenderer.encode_first_turn

    def without_system(self: ChatRenderer, system: str | None, text: str):
        return first_turn(self, None, text)

    with patch.object(ChatRenderer, "encode_first_turn", without_system):
        yield


@dataclass(frozen=True)
class Fault:
    "A silent fault, and the findings that name it"

    accepted: tuple[str, ...]  # decided on before the first run
    setup: Setup
    why: str  # it is silent elsewhere
    plant: Callable[[Agent], object] = lambda agent: nullcontext()
    change_task: Callable[[Task], Task] = lambda task: task


FAULTS: dict[str, Fault] = {
    "reward is always 0": Fault(
        ("constant returns",), CARDS, "A comparison that is never true is a valid reward function; the loss is finite, with advantages of 0 or of noise.",
        change_task=functools.partial(wrapped, ConstantReward)),
    "parser expects another format": Fault(
        ("invalid responses",), CARDS, "The parser's default action is played and rewarded, so returns look like those of a weak policy.",
        change_task=lambda task: dataclasses.replace(task, extract_action=wrong_label)),
    "template without the rules": Fault(
        ("incomplete prompt",), LAKE, "A template that does not know the system role renders the rest without a word.", template_without_system),
    "observation without the state": Fault(
        ("constant observations",), dataclasses.replace(LAKE, task=changed(LAKE.task, format_observation=lambda obs, info: "Where do you go?")),
        "Any text is a valid prompt; the policy learns the best single action and plateaus."),
    "rollouts from the base": Fault(
        ("sampler with other weights",), dataclasses.replace(CARDS, pretrained=True).with_options(ppo__learning_rate=1e-3),
        "A server that does not load the adapter samples well-formed text from the base; ratios drift away from 1 and are clipped.", base_sampler),
    "stale KV cache": Fault(
        ("stale sampler",), LAKE.with_options(ppo__learning_rate=1e-3), "Prefix caches survive a weight update unless they are reset; responses still make sense.", kept_cache),
    "sampler at another temperature": Fault(
        ("sampler temperature",), CARDS, "The sampler divides the logits, the learner does not; ratios are off by a factor that clipping hides.", sampler_temperature),
    "log-probabilities off by one": Fault(
        ("shifted log-probabilities",), CARDS, "Ids and logits are shifted against each other twice, or not at all; every number is a log-probability.", shifted_logprobs),
    "response mask off by one": Fault(
        ("log-probability gap",), CARDS, "Shapes agree, and the loss of the wrong tokens is as finite as that of the right ones.", shifted_mask),
    "dropout in the update": Fault(
        ("active dropout",), dataclasses.replace(CARDS, lora=LoRAConfig(r=8, dropout=0.1)), "Trainers call model.train(); the noise looks like off-policy data.", dropout),
    "padding is trained": Fault(
        ("wrong token count",), CARDS, "If the padding token is the end token, a mask by token id cannot tell them apart; the loss goes down nicely.", trained_padding),
    "responses are cut": Fault(
        ("truncated responses",), CARDS.with_options(generate__max_new_tokens=2), "A response at its limit is parsed like any other and counts as a wrong answer."),
    "advantage of the next turn": Fault(
        ("advantages on the wrong turn",), CLIFF, "Advantages and turns are arrays of one length; an index that is off by one fits.", rolled_advantages),
    "reward of the turn before": Fault(
        ("rewards on the wrong turn",), CLIFF, "Returns of episodes stay the same, only the credit moves.", early_rewards),
    "frozen adapter": Fault(
        ("unchanged weights", "zero gradient"), CARDS, "The critic still learns, so there is a loss, a gradient and a learning curve of noise.", frozen_adapter),
    "optimizer holds old tensors": Fault(
        ("unchanged weights",), CARDS, "Gradients are computed and clipped as always; the optimizer steps on tensors that nobody reads.", replaced_parameters),
    "learning rate 100 times too high": Fault(
        ("KL too large",), CARDS.with_options(ppo__learning_rate=3e-2), "Clipping bounds the loss, not the step; the return falls as it does on a bad batch."),
    "learning rate 100 times too low": Fault(
        ("updates too small",), CARDS.with_options(ppo__learning_rate=3e-6), "Nothing is wrong with any number; the curve is flat for as long as one watches."),
    "KL to the wrong reference": Fault(
        ("wrong reference",), CARDS, "The base is the default reference of an adapter; the penalty undoes the warm start.", base_reference),
    "seeds all alike": Fault(
        ("repeated seeds",), CARDS, "One deal, played over and over, is learned quickly; the training curve looks excellent.", same_seed),
    "duplicate episodes": Fault(
        ("duplicate episodes",), dataclasses.replace(LAKE, algorithm="rloo"), "Workers that share a random seed return the same episodes; groups have no differences.", same_random_stream),
    "legal mask inverted": Fault(
        ("actions without effect",), CAB, "Forbidden actions are accepted and do nothing.",
        change_task=lambda task: dataclasses.replace(task, legal_actions=forbidden_actions)),
    "environment ignores the action": Fault(
        ("actions without effect",), LAKE, "Episodes end, rewards vary, and nothing that is learned pays.", change_task=functools.partial(wrapped, Deaf)),
    "episodes fail": Fault(
        ("failed episodes",), LAKE, "A worker that crashes is restarted, and its episode is dropped; the statistics are those of the survivors.",
        change_task=functools.partial(wrapped, Fragile)),
    "advantages divided by nearly 0": Fault(
        ("amplified noise",), CARDS, "Normalization brings the critic's noise to a standard deviation of 1: the loss looks as always.",
        batch_deviation, change_task=functools.partial(wrapped, ConstantReward)),
}  # fmt: skip
QUICK = {
    "fault": ("sampler at another temperature", "padding is trained", "seeds all alike"),
    "healthy": ("blackjack, reinforce", "bandit, bilevel"),
}  # fmt: skip


def margins(state: RunState) -> dict[str, float]:
    "Return the numbers that the checks compare with their thresholds"
    evidence, records = state.evidence, state.records
    own, next_ = reward_dependences(records)
    going_on = [r for r in records if r.next_observation != END]
    same = [r.observation == r.next_observation for r in going_on]
    pairs, allowed = equal_pairs(state.episodes)
    found = {
        "sampler difference, nats (max)": evidence.rescoring.difference
        if evidence.rescoring
        else 0.0,
        "learner gap, nats (max)": state.history[-1]["max_logprob_diff"],
        "KL of an update, nats (min)": evidence.update_kl,
        "change of weights, relative (min)": evidence.weight_change,
        "observation unchanged (max)": float(np.mean(same)) if len(same) > 63 else 0.0,
        "next action's share of rewards, beyond the own (max)": next_.share - own.share,
        "equal pairs beyond twice the expected (max)": pairs - 2 * allowed,
        "largest z of an action's effect (min)": max(e.z for _, e in effects_of(records)),
    }
    if len(state.history) == 1:
        ratios = [np.abs(t.logprobs - t.ref_logprobs).mean() for t in state.turns]
        found["distance to the reference at the start, nats (max)"] = float(np.mean(ratios))
    return found


class TimedDoctor(Doctor):
    "The doctor, the processor time that it takes, and the numbers that it compares"

    def __init__(self) -> None:
        self.seconds = 0.0
        self.margins: dict[str, float] = {}

    def run_state(self, trainer: Trainer) -> RunState:
        state, began = super().run_state(trainer), time.process_time()
        for name, value in margins(state).items():
            worst = max if "(max)" in name else min
            self.margins[name] = worst(value, self.margins.get(name, value))
        self.seconds -= time.process_time() - began
        return state

    def on_collect_end(self, *args) -> None:
        began = time.process_time()
        super().on_collect_end(*args)
        self.seconds += time.process_time() - began

    def on_update_end(self, *args) -> None:
        began = time.process_time()
        super().on_update_end(*args)
        self.seconds += time.process_time() - began


class Clock(Callback):
    "Measures the processor time of the updates"

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_update_start(self, trainer: Trainer) -> None:
        self.began = time.process_time()

    def on_log(self, trainer: Trainer, metrics: dict) -> None:
        self.seconds += time.process_time() - self.began


def train(
    kind: str,  # "fault" or "healthy"
    name: str,  # a key of `FAULTS` or `HEALTHY`
    seed: int,
    updates: int | None = None,  # default: `UPDATES` or `HEALTHY_UPDATES`
    games: int | None = None,  # that are imitated; default: the setup's
) -> list[dict]:
    "Run a fault or a healthy setup, and return its row"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began = time.perf_counter()
    fault = FAULTS[name] if kind == "fault" else Fault((), HEALTHY[name], "")
    setup = dataclasses.replace(fault.setup, games=games or fault.setup.games)
    updates = updates or (UPDATES if kind == "fault" else HEALTHY_UPDATES)
    with tempfile.TemporaryDirectory() as folder:
        agent = build(setup, seed, folder, fault.change_task(setup.task()))
        doctor, clock = TimedDoctor(), Clock()
        with fault.plant(agent):
            history = Trainer(agent, callbacks=[doctor, clock]).fit(updates).history
    findings = [
        dict(update=metrics["update"], issue=issue, text=text)
        for metrics in history
        for issue, text in metrics.get("findings", {}).items()
    ]
    kept = ("mean_return", "invalid_rate", "approx_kl", "ref_kl", "grad_norm", "max_logprob_diff")
    return [
        dict(
            kind=kind,
            name=name,
            seed=seed,
            named=any(finding["issue"] in fault.accepted for finding in findings),
            findings=findings,
            margins=doctor.margins,
            doctor_share=doctor.seconds / clock.seconds,
            seconds=time.perf_counter() - began,
            **{key: [metrics[key] for metrics in history] for key in kept},
        )
    ]


def job_of(row: dict) -> tuple:
    return row["kind"], row["name"], row["seed"]


def describe(row: dict) -> str:
    found = ", ".join(f"{f['issue']} ({f['update']})" for f in row["findings"]) or "no finding"
    is_right = row["named"] if row["kind"] == "fault" else not row["findings"]
    return f"{'ok  ' if is_right else 'FAIL'} {row['kind']:7} {row['name']:42} seed {row['seed']}: {found}"


def table(rows: list[dict]) -> str:
    "Return Markdown tables of faults and healthy runs, and the totals"
    rows = sorted(rows, key=lambda row: (row["kind"], row["name"], row["seed"]))
    lines = ["| fault | silent elsewhere because | named by | seeds |", "|---|---|---|---|"]
    for name in FAULTS:
        own = [row for row in rows if row["kind"] == "fault" and row["name"] == name]
        names = {f["issue"] for row in own for f in row["findings"]}
        named = ", ".join(sorted(names & set(FAULTS[name].accepted))) or "—"
        if own:
            count = f"{sum(row['named'] for row in own)} of {len(own)}"
            lines.append(f"| {name} | {FAULTS[name].why} | {named} | {count} |")
    faults = [row for row in rows if row["kind"] == "fault"]
    healthy = [row for row in rows if row["kind"] == "healthy"]
    alarms = [row for row in healthy if row["findings"]]
    lines += ["", f"{sum(row['named'] for row in faults)} of {len(faults)} faults named; "
              f"findings in {len(alarms)} of {len(healthy)} healthy runs"]  # fmt: skip
    lines += [describe(row) for row in alarms]
    if healthy:
        shares = [row["doctor_share"] for row in healthy]
        lines.append(f"the doctor takes {np.median(shares):.1%} of an update (median; largest {max(shares):.1%})")  # fmt: skip
    lines += ["", "| compared number | worst in healthy runs | worst in runs with a fault |", "|---|--:|--:|"]  # fmt: skip
    for name in rows[0]["margins"] if rows else ():
        worst = max if "(max)" in name else min
        cells = [f"{worst(row['margins'][name] for row in own):.2g}" if own else "" for own in (healthy, faults)]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 faults and 2 healthy runs")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each run")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", default="", help="text that a run's name contains")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("runs/doctor/runs.jsonl"))
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    names = QUICK if args.quick else {"fault": tuple(FAULTS), "healthy": tuple(HEALTHY)}
    jobs = [
        (kind, name, seed)
        for seed in seeds
        for kind in names
        for name in names[kind]
        if args.only in name
    ]
    rows = run(args.output, jobs, train, job_of, describe, args.processes)
    print("\n" + table(rows))
    args.output.with_suffix(".md").write_text(table(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
