"""Train on environments with a known optimum: turn-level PPO with the tiny model beside Stable-Baselines3's PPO.

    pip install stable-baselines3==2.9.2       # the baseline; without it, its rows are left out
    python benchmarks/learning.py --env frozenlake,cliffwalking,taxi,blackjack --seeds 3

Each row is one seed of one learner: the greedy policy's exact return, and the number of training
episodes until the mean return of the last 500 covered 90 % of the gap from random play to the optimum.
The baseline, an MLP with default settings, takes as many environment steps as the agent. Rows are
appended to the output folder as runs finish; rows in it are not run again. A figure shows the curves.

The tasks are the package's own with two changes: a context of one turn, because in these environments
the newest observation is the state, and no system prompt. A system prompt is the same in all states; in
a model with random weights, whose attention is still uniform, a state of ten tokens is drowned by a
prompt of fifty (hidden states of different cells have a cosine similarity of 0.99 with it, 0.8
without). For the same reason FrozenLake's warm start is slow: imitating random play, which ignores the
state, teaches the model to ignore it. After ten steps at a learning rate of 2e-3, the gradients of two
cells (of the log-probability of one move minus another) had a cosine similarity of 0.99, after eighty
at 2e-4 of 0.91; before any they have 0.7.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import FlattenObservation
from matplotlib.figure import Figure
from resumable import run

from llamagym.agent import Agent
from llamagym.agents.exact import blackjack_return, by_state, greedy_choices, greedy_table
from llamagym.agents.scored import ScoredAgent
from llamagym.chat.conversation import Window
from llamagym.config import Config, LoRAConfig
from llamagym.envs.baselines import RandomAgent, play
from llamagym.envs.exact import policy_value
from llamagym.envs.task import Task
from llamagym.envs.toy_text import blackjack, cliff_walking, frozen_lake, taxi
from llamagym.models.policy import Policy
from llamagym.trainer import Trainer
from llamagym.training.callbacks import Anneal
from llamagym.training.cloning import clone

COMMON = {
    "generate.max_new_tokens": 6, "rollout.num_envs": 64, "rollout.episodes": 64, "ppo.learning_rate": 1.5e-4, "ppo.critic_learning_rate": 1e-3,
    "ppo.epochs": 4, "ppo.mini_batch_size": 512, "ppo.early_stop_kl": 0.1, "ppo.token_budget": 32768, "credit.gamma": 0.99,
    "model.critic": "detached", "model.value_head_width": 64,
    "warmstart.epochs": 1, "warmstart.learning_rate": 2e-3, "trainer.eval_every": 0, "trainer.checkpoint_every": 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Problem:
    "An environment, the settings to learn it with, and the result to reach"

    task: Task
    gym_id: str  # for the baseline
    bar: float  # greedy return that is asked for
    updates: int
    # weight of the KL to the reference, from the first update to the last
    kl_coef: tuple[float, float]
    scored: bool = False
    gym_options: dict = dataclasses.field(default_factory=dict)
    max_steps: int | None = None
    warmup: int = 300  # episodes of random play that are imitated first
    lora: LoRAConfig | None = None  # else the whole model learns
    # from the first update to the last, where it falls
    learning_rate: tuple[float, float] | None = None
    options: dict = dataclasses.field(default_factory=dict)

    @property
    def random(self) -> float:
        return self.task.reference_returns["random"]

    @property
    def optimal(self) -> float:
        return self.task.reference_returns["optimal"]

    @property
    def near(self) -> float:
        "Return the level at 90 % of the gap from random play to the optimum"
        return self.random + 0.9 * (self.optimal - self.random)

    def env(self) -> gym.Env:
        env = gym.make(self.gym_id, max_episode_steps=self.max_steps, **self.gym_options)
        return (
            FlattenObservation(env) if isinstance(env.observation_space, gym.spaces.Tuple) else env
        )

    def imitator(self, seed: int, **options) -> tuple[Agent, dict]:
        "Return the tiny model after imitating random play, and its loss"
        config = Config.from_dict(COMMON | self.options | {"trainer.seed": seed} | options)
        model = config.model
        policy = Policy.load(
            "tiny",
            model.quantize,
            self.lora,
            device="cpu",
            critic=model.critic,
            value_head_width=model.value_head_width,
            seed=seed,
        )
        agent = (ScoredAgent if self.scored else Agent).for_task(self.task, policy, config=config)
        # what is seldom legal would be seldom seen, and hardly ever chosen where it is
        free = dataclasses.replace(self.task, legal_actions="all")
        return agent, clone(
            agent,
            play(free, RandomAgent(free, seed=seed), episodes=self.warmup, seed=1000 + seed),
            progress=False,
        )


def problems() -> dict[str, Problem]:
    "Return all problems by name"
    few = {"context": Window(1), "system_prompt": None}
    ice = {
        "rollout.episodes": 128,
        "ppo.mini_batch_size": 256,
        "ppo.learning_rate": 2e-4,
        "ppo.critic_learning_rate": 5e-3,
        "ppo.epochs": 6,
        "ppo.early_stop_kl": 0.05,
        "credit.gae_lambda": 0.8,
        "warmstart.learning_rate": 2e-4,
        "warmstart.epochs": 8,
    }
    cab = {"rollout.episodes": 48, "rollout.num_envs": 48, "ppo.learning_rate": 3e-4}
    # of random play over all six actions, as the baseline plays; the task's own is over legal ones
    all_actions = {"random": -771.1, "optimal": 7.93}
    cards = {
        "rollout.episodes": 1024,
        "rollout.num_envs": 256,
        "ppo.learning_rate": 1e-3,
        "ppo.critic_learning_rate": 1e-2,
        "ppo.epochs": 2,
        "ppo.mini_batch_size": 384,
        "model.critic": "reference",
        "model.value_head_width": 0,
        "warmstart.epochs": 2,
        "warmstart.batch_size": 64,
    }
    return {
        "frozenlake": Problem(dataclasses.replace(frozen_lake(slippery=True), **few), "FrozenLake-v1", 0.65, 90, (0.1, 0.02),
                              gym_options={"is_slippery": True}, options=ice),
        "frozenlake_dry": Problem(dataclasses.replace(frozen_lake(slippery=False), **few), "FrozenLake-v1", 0.95, 40, (0.1, 0.01),
                                  gym_options={"is_slippery": False}, options=ice),
        "cliffwalking": Problem(dataclasses.replace(cliff_walking(), **few), "CliffWalking-v1", -20.0, 50, (0.5, 0.02), scored=True, max_steps=100,
                                warmup=60),
        "taxi": Problem(dataclasses.replace(taxi(), reference_returns=all_actions, **few), "Taxi-v4", 5.0, 140, (0.3, 0.003), scored=True, warmup=20,
                        learning_rate=(3e-4, 1e-4), options=cab),
        "blackjack": Problem(dataclasses.replace(blackjack(), **few), "Blackjack-v1", -0.06, 180, (0.5, 0.01), warmup=2000, lora=LoRAConfig(r=16),
                             learning_rate=(1e-3, 1e-4), options=cards),
    }  # fmt: skip


def reached(returns: list[float], counts: list[int], level: float) -> int | None:
    "Return the episodes until the mean return of the last 500 reached `level`; `returns` are means over `counts` episodes"
    for end in range(1, len(returns) + 1):
        begin = end
        while begin and sum(counts[begin:end]) < 500:
            begin -= 1
        n = sum(counts[begin:end])
        if (
            n >= 500
            and sum(r * c for r, c in zip(returns[begin:end], counts[begin:end])) / n >= level
        ):
            return sum(counts[:end])
    return None


def value_of(name: str, choose: Callable[[list], Sequence[int]]) -> float:
    "Compute a policy's exact expected return from its actions in all states and the transition tables"
    if name != "blackjack":
        task = problems()[name].task
        return policy_value(
            task, list(map(int, choose(list(range(task.make().observation_space.n))))).__getitem__
        )
    states = [
        (total, dealer, ace) for total in range(4, 22) for dealer in range(1, 11) for ace in (0, 1)
    ]
    chosen = dict(zip(states, choose(states)))
    return blackjack_return(by_state(lambda observation: int(chosen[tuple(observation)])))


def judge(name: str, agent: Agent) -> float:
    "Return the expected return of an agent's greedy policy"
    if name == "blackjack":
        return value_of(name, lambda states: greedy_choices(agent)([(state,) for state in states]))
    table = greedy_table(agent)
    return value_of(name, lambda states: [table(state) for state in states])


def learn(name: str, seed: int, scale: float, folder: Path) -> dict:
    "Train one seed of this project's learner"
    warnings.simplefilter("ignore")
    problem, began = problems()[name], time.perf_counter()
    updates = max(2, round(problem.updates * scale))
    agent, _ = problem.imitator(
        seed, **{"trainer.updates": updates, "trainer.output_dir": str(folder / f"{name}-{seed}")}
    )
    falling = {} if problem.learning_rate is None else {"learning_rate": problem.learning_rate}
    history = Trainer(agent, callbacks=[Anneal(kl_coef=problem.kl_coef, **falling)]).fit().history
    counts, returns = (
        [agent.config.rollout.episodes] * len(history),
        [m["mean_return"] for m in history],
    )
    steps = round(sum(m["mean_episode_length"] * n for m, n in zip(history, counts)))
    score = judge(name, agent)
    return dict(env=name, learner="llamagym", seed=seed, scale=scale, score=score, episodes=sum(counts), steps=steps,
                near=reached(returns, counts, problem.near), seconds=time.perf_counter() - began, returns=returns, counts=counts)  # fmt: skip


def baseline(name: str, seed: int, scale: float, steps: int) -> dict | None:
    "Train Stable-Baselines3's PPO for the same number of steps; return None if it is not installed"
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.env_util import make_vec_env
    except ImportError:
        return None
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem, began = problems()[name], time.perf_counter()
    envs = make_vec_env(problem.env, n_envs=8, seed=seed)
    model = PPO("MlpPolicy", envs, seed=seed, n_steps=256, device="cpu")
    found: list[float] = []

    def watch(local: dict, _) -> bool:
        found.extend(info["episode"]["r"] for info in local["infos"] if "episode" in info)
        return True

    model.learn(steps, callback=watch)
    space = gym.make(problem.gym_id).observation_space
    seen = (
        (lambda states: np.array([gym.spaces.flatten(space, state) for state in states]))
        if name == "blackjack"
        else np.array
    )
    score = value_of(name, lambda states: model.predict(seen(states), deterministic=True)[0])
    parts = [found[i : i + 100] for i in range(0, len(found), 100)]
    returns, counts = [float(np.mean(part)) for part in parts], [len(part) for part in parts]
    return dict(env=name, learner="stable-baselines3", seed=seed, scale=scale, score=float(score), episodes=len(found), steps=steps,
                near=reached(returns, counts, problem.near), seconds=time.perf_counter() - began, returns=returns, counts=counts)  # fmt: skip


def both(folder: Path, name: str, seed: int, scale: float) -> list[dict]:
    "Train one seed of each learner for the same number of steps"
    ours = learn(name, seed, scale, folder)
    theirs = baseline(name, seed, scale, ours["steps"])
    return [ours, theirs] if theirs else [ours]


def job_of(row: dict) -> tuple:
    "Return the arguments of `both`, except the folder, that made a row"
    return row["env"], row["seed"], row["scale"]


def thinned(row: dict, points: int = 70) -> dict:
    "Return a row with fewer points in its curve, each the mean of the points it replaces"
    size = math.ceil(len(row["returns"]) / points)
    parts = [
        range(i, min(i + size, len(row["returns"]))) for i in range(0, len(row["returns"]), size)
    ]
    counts = [sum(row["counts"][i] for i in part) for part in parts]
    returns = [
        sum(row["returns"][i] * row["counts"][i] for i in part) / n
        for part, n in zip(parts, counts)
    ]
    return row | dict(
        score=round(row["score"], 4),
        seconds=round(row["seconds"]),
        returns=[float(f"{r:.4g}") for r in returns],
        counts=counts,
    )


def describe(row: dict) -> str:
    "Describe a row in one line"
    return f"{row['env']:14} {row['learner']:17} seed {row['seed']}: return {row['score']:.3f} after {row['episodes']} episodes, {row['seconds']:.0f} s"


def spread(numbers: list[float], digits: int) -> str:
    "Return the median and the range of several numbers as text"
    shown = [f"{n:.{digits}f}" for n in (statistics.median(numbers), min(numbers), max(numbers))]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if len(numbers) > 1 else shown[0]


def table(rows: list[dict]) -> str:
    "Return the results as a Markdown table"
    lines = [
        "| environment | learner | return, greedy | asked for | random | optimal | episodes to 90 % | episodes | seconds | seeds |",
        "|---" * 10 + "|",
    ]
    for name, problem in problems().items():
        for learner in ("llamagym", "stable-baselines3"):
            mine = [r for r in rows if (r["env"], r["learner"]) == (name, learner)]
            if not mine:
                continue
            digits = 3 if abs(problem.optimal) <= 1 else 1
            near = [math.inf if r["near"] is None else r["near"] for r in mine]
            asked = f"{problem.bar:g}" if learner == "llamagym" else ""
            score, episodes, seconds = (
                spread([r[key] for r in mine], d)
                for key, d in (("score", digits), ("episodes", 0), ("seconds", 0))
            )
            known = [f"{problem.random:g}", f"{problem.optimal:g}"]
            cells = [
                name,
                learner,
                score,
                asked,
                *known,
                spread(near, 0).replace("inf", "never"),
                episodes,
                seconds,
                str(len(mine)),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(rows: list[dict]) -> Figure:
    "Plot return over training episodes, one panel per environment"
    names = [name for name in problems() if any(r["env"] == name for r in rows)]
    fig = Figure(figsize=(5 * len(names), 3.6), layout="constrained")
    colors = {"llamagym": "tab:blue", "stable-baselines3": "tab:orange"}
    for name, axes in zip(names, np.atleast_1d(fig.subplots(1, len(names)))):
        problem, labels = problems()[name], set()
        for r in [r for r in rows if r["env"] == name]:
            label = None if r["learner"] in labels else r["learner"]
            labels.add(r["learner"])
            axes.plot(
                np.cumsum(r["counts"]),
                r["returns"],
                color=colors[r["learner"]],
                alpha=0.6,
                linewidth=1,
                label=label,
            )
        for level, text in (
            (problem.random, "random"),
            (problem.optimal, "optimal"),
            (problem.bar, "asked for"),
        ):
            axes.axhline(
                level,
                color="black",
                linewidth=0.8,
                linestyle=":" if text != "asked for" else "--",
                label=None,
            )
            axes.annotate(
                text,
                (1, level),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
            )
        if min(min(r["returns"]) for r in rows if r["env"] == name) < -100:
            axes.set_yscale("symlog", linthresh=10)
        axes.set(title=name, xlabel="training episodes", ylabel="mean return, sampled")
        axes.legend(fontsize=8)
    return fig


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--env",
        default="frozenlake_dry,frozenlake,cliffwalking,taxi,blackjack",
        help="which, with commas between them (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="share of the updates to make (default: %(default)s)",
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="runs side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/learning"),
        help="folder of rows, figure and runs (default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        help="a file to write the rows to, with fewer points: nbs/tutorials/03_learning.jsonl is read by a tutorial",
    )
    args = parser.parse_args()
    names = args.env.split(",")
    if unknown := [name for name in names if name not in problems()]:
        parser.error(
            f"unknown environments {', '.join(unknown)}: expected some of {', '.join(problems())}"
        )
    jobs = [(name, seed, args.scale) for name in names for seed in range(args.seeds)]
    rows = run(
        args.output / "results.jsonl",
        jobs,
        functools.partial(both, args.output),
        job_of,
        describe,
        args.processes,
    )
    if args.keep:
        kept = sorted(rows, key=lambda row: (row["env"], row["learner"], row["seed"]))
        args.keep.write_text(
            "".join(json.dumps(thinned(row)) + "\n" for row in kept), encoding="utf-8"
        )
    figure([thinned(row) for row in rows]).savefig(args.output / "learning.png", dpi=120)
    print(f"\n{table(rows)}\n\ncurves: {args.output / 'learning.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
