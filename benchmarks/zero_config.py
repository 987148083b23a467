"""Train on ten tasks without setting anything, beside Stable-Baselines3's PPO at the same number of episodes.

    pip install stable-baselines3==2.9.2       # the baseline; without it, its rows are left out
    python benchmarks/zero_config.py --seeds 5

A run is what a new user writes: `Agent.for_task(task, Policy.load("tiny"))`, `clone(agent)`, which plays at
random, and `Trainer(agent).fit(updates)`. Only the seed, the number of updates, and the folder are given (and a
`ScoredAgent` for Taxi). Scores are normalized: 0 is random play, 1 the optimum (see `unseen_tasks`).
The greedy policy is evaluated before and after training, on episodes that training never uses.

The baseline is an MLP with Stable-Baselines3's defaults (`sb3`), and with settings as rl-zoo uses for
small discrete problems (`sb3 tuned`): 8 environments, 256 steps each, 4 epochs, learning rate 1e-3 that
falls to 0, entropy bonus 0.01, gamma 0.99. It observes the environment's own numbers.

Rows are appended to the output folder as runs finish; rows in it are not run again.
"""

import argparse
import functools
import json
import math
import os
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
from resumable import run
from unseen_tasks import PROBLEMS

from llamagym import Agent, Config, Policy, ScoredAgent, Trainer, clone, evaluate
from llamagym.config import TrainerConfig

EPISODES_PER_UPDATE = 64
EVALUATED = 200  # episodes


def normalized(task, score: float) -> float:
    "Return a score between that of random play, 0, and the optimum, 1"
    known = task.reference_returns
    return (score - known["random"]) / (known["optimal"] - known["random"])


def episodes_to(returns: list[float], counts: list[int], level: float) -> int | None:
    "Return the episodes until the mean return of the newest 300 reached a level"
    for end in range(1, len(returns) + 1):
        begin = end
        while begin and sum(counts[begin:end]) < 300:
            begin -= 1
        n = sum(counts[begin:end])
        mean = sum(r * c for r, c in zip(returns[begin:end], counts[begin:end])) / max(n, 1)
        if n >= 300 and mean >= level:
            return sum(counts[:end])
    return None


def summary(task, start: float, end: float, returns: list[float], counts: list[int]) -> dict:
    "Return the results that all learners report, with normalized scores"
    scores = [normalized(task, r) for r in returns]
    return dict(
        start=normalized(task, start),
        score=normalized(task, end),
        episodes=sum(counts),
        near=episodes_to(scores, counts, 0.9),
        returns=[round(s, 4) for s in scores],
        counts=counts,
    )


def learn(name: str, seed: int, scale: float, settings: str, folder: Path) -> dict:
    "Train this project's agent with its defaults"
    warnings.simplefilter("ignore")
    problem, began = PROBLEMS[name], time.process_time()
    task = problem.task()
    chosen = json.loads(settings)
    model = {k.removeprefix("model."): chosen.pop(k) for k in list(chosen) if k[:6] == "model."}
    policy = Policy.load("tiny", seed=seed, **model)
    config = Config.for_model(policy).replace(chosen) if chosen else None
    agent = (ScoredAgent if problem.scored else Agent).for_task(task, policy, config=config)
    agent.config.trainer.seed = seed
    cloned = clone(agent, progress=False)
    clone_seconds = time.process_time() - began
    start = evaluate(agent, episodes=EVALUATED, greedy=True).greedy.mean_return
    updates = max(2, round(problem.updates * scale))
    length = TrainerConfig(
        updates=updates,
        eval_every=0,
        checkpoint_every=0,
        seed=seed,
        output_dir=str(folder / "runs" / f"{name}-{seed}-{abs(hash(settings)) % 10**8}"),
    )
    history = Trainer(agent, config=length).fit().history
    seconds = time.process_time() - began
    end = evaluate(agent, episodes=EVALUATED, greedy=True).greedy.mean_return
    counts = [agent.config.rollout.episodes - round(m["failed_episodes"]) for m in history]
    result = summary(task, start, end, [m["mean_return"] for m in history], counts)
    kept = ("invalid_rate", "explained_variance", "ref_kl", "clip_fraction", "grad_norm", "entropy")
    curves = {k: [float(f"{m[k]:.3g}") for m in history] for k in kept}
    steps = round(sum(m["mean_episode_length"] * n for m, n in zip(history, counts)))
    return dict(
        env=name,
        learner="llamagym",
        seed=seed,
        scale=scale,
        settings=settings,
        **result,
        steps=steps,
        clone_loss=cloned["loss"],
        clone_seconds=clone_seconds,
        seconds=seconds,
        curves=curves,
    )


def baseline(name: str, seed: int, scale: float, settings: str, episodes: int) -> dict | None:
    "Train Stable-Baselines3's PPO for a number of episodes; return None if it is not installed"
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.env_util import make_vec_env
    except ImportError:
        return None
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem, began = PROBLEMS[name], time.process_time()
    task = problem.task()
    options = {}
    returns: list[float] = []
    if settings == "tuned":
        options = dict(
            n_epochs=4,
            # The run's length is given in episodes, and not in steps as for SB3's own schedules.
            learning_rate=lambda _: 1e-3 * max(0.0, 1 - len(returns) / episodes),
            ent_coef=0.01,
            batch_size=64,
        )
    envs = make_vec_env(lambda: _numbered_actions(problem.env()), n_envs=8, seed=seed)
    model = PPO("MlpPolicy", envs, seed=seed, n_steps=256, device="cpu", **options)

    def watch(local: dict, _) -> bool:
        returns.extend(info["episode"]["r"] for info in local["infos"] if "episode" in info)
        return len(returns) < episodes

    model.learn(10_000_000, callback=watch)
    env = _numbered_actions(problem.env())

    def play_greedily(seed: int) -> float:
        obs, _ = env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            action = int(model.predict(obs, deterministic=True)[0])
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
        return total

    end = float(np.mean([play_greedily(10**6 + i) for i in range(EVALUATED)]))
    chunks = [returns[i : i + 64] for i in range(0, len(returns), 64)]
    result = summary(
        task,
        task.reference_returns["random"],
        end,
        [float(np.mean(chunk)) for chunk in chunks],
        [len(chunk) for chunk in chunks],
    )
    learner = "sb3 tuned" if options else "sb3"
    seconds = time.process_time() - began
    return dict(
        env=name, learner=learner, seed=seed, scale=scale, settings="{}", **result, seconds=seconds
    )


class _FromZero(gym.ActionWrapper):
    "Count the actions of a `Discrete` space from 0, as Stable-Baselines3 needs them"

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.start = int(env.action_space.start)
        self.action_space = gym.spaces.Discrete(int(env.action_space.n))

    def action(self, action: int) -> int:
        return self.start + int(action)


def _numbered_actions(env: gym.Env) -> gym.Env:
    return _FromZero(env) if env.action_space.start else env


def work(folder: Path, learner: str, name: str, seed: int, scale: float, settings: str):
    "Run one row"
    if learner == "llamagym":
        return [learn(name, seed, scale, settings, folder)]
    updates = max(2, round(PROBLEMS[name].updates * scale))
    kind = "tuned" if learner == "sb3 tuned" else "default"
    row = baseline(name, seed, scale, kind, updates * EPISODES_PER_UPDATE)
    return [row] if row else []


def job_of(row: dict) -> tuple:
    return row["learner"], row["env"], row["seed"], row["scale"], row["settings"]


def describe(row: dict) -> str:
    near = row["near"] or "never"
    extra = ""
    if "curves" in row:
        c = row["curves"]
        extra = (
            f", invalid {c['invalid_rate'][0]:.3f} -> {c['invalid_rate'][-1]:.3f}, "
            f"EV {np.mean(c['explained_variance'][-10:]):.2f}, KL {c['ref_kl'][-1]:.2f}, "
            f"lowest of last ten {min(row['returns'][-10:]):.2f}"
        )
    return (
        f"{row['env']:10} {row['learner']:9} seed {row['seed']} {row['settings']}: "
        f"{row['start']:.3f} -> {row['score']:.3f}, sampled {np.mean(row['returns'][-3:]):.3f}, "
        f"90 % after {near} of {row['episodes']} episodes, {row['seconds']:.0f} s{extra}"
    )


def interquartile_mean(scores: list[float]) -> float:
    "Return the mean of the middle half of the scores (Agarwal et al. 2021)"
    ordered = np.sort(scores)
    cut = len(ordered) // 4
    return float(np.mean(ordered[cut : len(ordered) - cut]))


def interval(scores: list[float]) -> tuple[float, float]:
    "Return the 95 % bootstrap interval of the interquartile mean"
    rng = np.random.default_rng(0)
    draws = [interquartile_mean(rng.choice(scores, len(scores)).tolist()) for _ in range(2000)]
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def lowest_after_solved(returns: list[float], updates: int = 50) -> float:
    "Return the lowest score of the updates after the first of at least 0.95; NaN if there is none"
    solved = [i for i, score in enumerate(returns) if score >= 0.95]
    later = returns[solved[0] + 1 :][:updates] if solved else []
    return min(later, default=math.nan)


def table(rows: list[dict]) -> str:
    "Return the results as a Markdown table"
    lines = [
        "| task | learner | score (IQM) | 95 % interval | lowest seed | start | episodes to 90 % "
        "| lowest of 50 updates after 0.95 | episodes | CPU seconds | seeds |",
        "|---" * 11 + "|",
    ]
    for name in PROBLEMS:
        for learner in ("llamagym", "sb3", "sb3 tuned"):
            mine = [r for r in rows if (r["env"], r["learner"]) == (name, learner)]
            if not mine:
                continue
            scores = [r["score"] for r in mine]
            low, high = interval(scores)
            near = float(np.median([r["near"] or math.inf for r in mine]))
            lines.append(
                f"| {name} | {learner} | {interquartile_mean(scores):.3f} | {low:.3f} to {high:.3f} "
                f"| {min(scores):.3f} | {np.mean([r['start'] for r in mine]):.3f} "
                f"| {'never' if near == math.inf else round(near)} "
                f"| {min(lowest_after_solved(r['returns']) for r in mine):.2f} "
                f"| {mine[0]['episodes']} "
                f"| {np.mean([r['seconds'] for r in mine]):.0f} | {len(mine)} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", default=",".join(PROBLEMS), help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the updates to make")
    parser.add_argument(
        "--learners", default="llamagym,sb3,sb3 tuned", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--set",
        default="{}",
        help="options to try instead of the defaults, as JSON (default: none)",
    )
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/zero_config"))
    arguments = parser.parse_args()
    jobs = [
        (learner, name, seed, arguments.scale, arguments.set if learner == "llamagym" else "{}")
        for seed in range(arguments.seeds)  # whole tables first
        for name in arguments.env.split(",")
        for learner in arguments.learners.split(",")
    ]
    rows = run(
        arguments.output / "results.jsonl",
        jobs,
        functools.partial(work, arguments.output),
        job_of,
        describe,
        arguments.processes,
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
