"""Train a real pretrained model on a CPU: SmolLM2-135M-Instruct with LoRA, against the clock.

    make pretrained                                             # fetches the model
    python benchmarks/pretrained.py --task guess,blackjack,frozenlake --seeds 3
    python benchmarks/pretrained.py --task guess --seeds 1 --minutes 3    # a look

A run is `Agent.for_task(task, policy)`, `clone(agent)`, which imitates random play and nothing else, and
`Trainer(agent).fit(...)`, with the defaults for pretrained models and the options in `LEARN`. Loading and
the warm start are part of its time; the evaluation at the end is not. The number of updates follows from
how long updates take, and learning rates fall over that number.

The adapters are in the upper half of the layers, so that the backward pass ends there; weights are bfloat16,
which newer CPUs compute faster (float32 with --dtype float32).

Rows are appended to the output as runs finish; rows in it are not run again. A row has the curve: minutes,
episodes, mean return of the sampled episodes, share of invalid responses.
"""

import argparse
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from resumable import run

from llamagym import (
    Agent,
    Config,
    Policy,
    Trainer,
    blackjack,
    clone,
    evaluate,
    frozen_lake,
)
from llamagym.config import TrainerConfig
from llamagym.envs.adapters import episode_seed
from llamagym.envs.guess_number import guess_number
from llamagym.envs.task import Task
from llamagym.models.smollm2 import fetch_smollm2
from llamagym.training.callbacks import Callback


def exact_return(agent: Agent) -> float:
    "Compute the greedy policy's return, or its estimate for Blackjack with the whole conversation"
    return evaluate(agent, episodes=1, greedy=True, exact=True).greedy.mean_return


def guess_return(agent: Agent) -> float:
    "Play each number of the task once, greedily: the greedy policy's exact success"
    env, seeds = agent.task.make(), {}
    for seed in range(10_000):
        env.reset(seed=episode_seed(seed, 0))
        seeds.setdefault(env.unwrapped.number, seed)
    assert len(seeds) == env.unwrapped.size
    return evaluate(agent, episodes=1, seeds=list(seeds.values()), greedy=True).greedy.mean_return


@dataclass(frozen=True)
class Problem:
    "A task, the time for a run, and what it should come to"

    task: Callable[[], Task]
    minutes: float
    bar: float  # greedy return that is asked for
    greedy_return: Callable[[Agent], float] = exact_return


ADAPTERS = LoraConfig(
    r=16,
    lora_alpha=32,
    task_type="CAUSAL_LM",
    layers_to_transform=list(range(15, 30)),  # of 30
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
LEARN = {
    "generate.max_new_tokens": 8,
    "rollout.num_envs": 64,
    "credit.observation_baseline": 4.0,
    "ppo.epochs": 1,  # an epoch takes longer than new episodes
    "ppo.mini_batch_size": 32,
    "ppo.learning_rate": 5e-4,
    "ppo.critic_learning_rate": 5e-3,
    "ppo.final_learning_rate": 0.2,
    "ppo.kl_coef": 0.02,
}
TASKS = {
    "guess": Problem(lambda: guess_number(1, 15, 4), 45, 0.90, guess_return),
    "blackjack": Problem(blackjack, 90, -0.0793),
    "frozenlake": Problem(lambda: frozen_lake(slippery=False), 60, 0.95),
}


class Deadline(Callback):
    "Plans as many updates as fit into the time, and records the curve"

    def __init__(self, began: float, minutes: float) -> None:
        self.began, self.end = began, began + 60 * minutes
        self.updates_began: float | None = None
        self.curve: list[list[float]] = []

    def on_update_start(self, trainer: Trainer) -> None:
        self.updates_began = self.updates_began or time.monotonic()

    def on_update_end(self, trainer: Trainer, metrics: dict) -> None:
        now = time.monotonic()
        each = (now - self.updates_began) / trainer.update
        trainer.updates = trainer.update + max(0, int((self.end - now) / each))
        minutes = (now - self.began) / 60
        row = [metrics[key] for key in ("episodes", "mean_return", "invalid_rate", "ref_kl")]
        self.curve.append([round(value, 4) for value in (minutes, *row)])


def train(
    output: Path, name: str, seed: int, quantize: str, dtype: str, minutes: float, options: str
) -> list[dict]:
    "Run one seed, and return its row"
    warnings.simplefilter("ignore")
    problem, began = TASKS[name], time.monotonic()
    policy = Policy.load(
        fetch_smollm2(),
        quantize=quantize or None,
        lora=ADAPTERS,
        device="cpu",
        dtype=dtype,
        seed=seed,
    )
    config = Config.for_model(policy).replace(LEARN | json.loads(options))
    agent = Agent.for_task(problem.task(), policy, config=config)
    agent.config.trainer.seed = seed
    warm = clone(agent)
    warm_minutes = (time.monotonic() - began) / 60
    deadline = Deadline(began, minutes or problem.minutes)
    length = TrainerConfig(
        updates=1000,
        eval_every=0,
        checkpoint_every=0,
        seed=seed,
        stop_if_invalid=1,
        output_dir=str(output / "runs" / f"{name}-{seed}-{quantize or dtype}"),
    )
    Trainer(agent, callbacks=[deadline], config=length).fit()
    spent = (time.monotonic() - began) / 60
    final = evaluate(agent, episodes=200, greedy=False).sampled
    return [
        dict(
            task=name,
            seed=seed,
            quantize=quantize,
            dtype=dtype,
            threads=torch.get_num_threads(),
            limit=minutes,
            options=options,
            warm_minutes=round(warm_minutes, 2),
            minutes=round(spent, 2),
            warm_valid=warm.valid.share,
            greedy=problem.greedy_return(agent),
            sampled=final.mean_return,
            invalid=final.invalid_rate,
            curve=deadline.curve,
        )
    ]


def job_of(row: dict) -> tuple:
    return tuple(row[key] for key in ("task", "seed", "quantize", "dtype", "limit", "options"))


def describe(row: dict) -> str:
    curve = row["curve"]
    return (
        f"{row['task']:10} seed {row['seed']} {row['quantize'] or row['dtype']}: greedy {row['greedy']:.4f}, "
        f"sampled {row['sampled']:.4f}, invalid {row['invalid']:.3f} after {row['minutes']:.1f} min "
        f"(warm start {row['warm_minutes']:.1f} min, {row['warm_valid']:.0%} valid), {len(curve)} updates, "
        f"{curve[-1][1]:.0f} episodes"
    )


def table(rows: list[dict]) -> str:
    "Return the results as a Markdown table"
    lines = [
        "| task | weights | greedy, median and range | bar | sampled | invalid | minutes | episodes | seeds |",
        "|---" * 9 + "|",
    ]
    for name in TASKS:
        for weights in ("bfloat16", "float32", "nf4"):
            mine = [r for r in rows if (r["task"], r["quantize"] or r["dtype"]) == (name, weights)]
            if not mine:
                continue
            greedy = [r["greedy"] for r in mine]
            middle = {
                key: statistics.median(r[key] for r in mine)
                for key in ("sampled", "invalid", "minutes")
            }
            lines.append(
                f"| {name} | {weights} | {statistics.median(greedy):.4f} "
                f"[{min(greedy):.4f}, {max(greedy):.4f}] | {TASKS[name].bar} | {middle['sampled']:.4f} "
                f"| {middle['invalid']:.3f} | {middle['minutes']:.1f} "
                f"| {statistics.median(r['curve'][-1][1] for r in mine):.0f} | {len(mine)} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default=",".join(TASKS), help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--quantize", default="", help="nf4 for 4-bit weights (default: none)")
    parser.add_argument(
        "--dtype", default="bfloat16", help="of weights, or of what is computed with 4-bit weights"
    )
    parser.add_argument("--minutes", type=float, default=0, help="of a run (default: the task's)")
    parser.add_argument("--set", default="{}", help="options to try, as JSON (default: none)")
    parser.add_argument("--output", type=Path, default=Path("runs/pretrained"))
    arguments = parser.parse_args()
    names = arguments.task.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        parser.error(f"unknown tasks {', '.join(unknown)}: expected some of {', '.join(TASKS)}")
    jobs = [
        (name, seed, arguments.quantize, arguments.dtype, arguments.minutes, arguments.set)
        for seed in range(arguments.seeds)
        for name in names
    ]
    rows = run(
        arguments.output / "results.jsonl",
        jobs,
        functools.partial(train, arguments.output),
        job_of,
        describe,
        processes=1,  # which uses all cores
    )
    print("\n" + table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
