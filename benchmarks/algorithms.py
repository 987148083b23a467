"""Train every algorithm on every diagnostic environment, whose optimum is known.

    python benchmarks/algorithms.py            # three seeds
    python benchmarks/algorithms.py --quick    # one seed

A score is 0 for random play and 1 for the optimum; `llamagym.envs.probes` describes the environments.
The table shows the median over the seeds, the range, and the number of training episodes.
`immediate_reward` credits each turn with its own reward alone. "cannot" marks algorithms that fail by
construction: without a critic, a time limit looks like a termination (`leave`); `immediate_reward`
fails on `leave` for the same reason, and on `delayed` because later rewards are never credited. Rows
are appended to the output file as runs finish; rows in the file are not run again.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from resumable import run

from llamagym.algorithms.registry import ALGORITHMS, as_algorithm
from llamagym.envs.probes import PROBES
from llamagym.training.probe_runs import SOLVED, immediate_reward, run_probe

CREDITS = {**dict.fromkeys(ALGORITHMS), "immediate_reward": immediate_reward}


def cannot(algorithm: str, probe: str) -> bool:
    "Return whether an algorithm fails by construction"
    if algorithm == "immediate_reward":
        return probe in ("delayed", "leave")
    return probe == "leave" and not as_algorithm(algorithm).needs_critic


def run_one(probe: str, algorithm: str, seed: int, updates: int) -> list[dict]:
    "Run one algorithm on one environment with one seed, and return its row"
    warnings.simplefilter("ignore")
    # but for rounding in that of the KL, which Adam would follow
    no_gradient = (algorithm, probe) == ("immediate_reward", "delayed")
    options = {"ppo__kl_coef": 0.0} if no_gradient else {}
    result = run_probe(
        probe,
        CREDITS[algorithm] or algorithm,
        seed,
        10 if cannot(algorithm, probe) else updates,
        **options,
    )
    found = dict(
        score=result.score, episodes=result.episodes, seconds=result.seconds, curve=result.curve
    )
    return [dict(probe=probe, algorithm=algorithm, seed=seed, updates=updates) | found]


def job_of(row: dict) -> tuple:
    "Return the arguments of `run_one` that made a row"
    return row["probe"], row["algorithm"], row["seed"], row["updates"]


def describe(row: dict) -> str:
    "Describe a row in one line"
    name = f"{row['probe']:8} {row['algorithm']:12} seed {row['seed']}"
    return f"{name}: score {row['score']:6.2f} after {row['episodes']:5} episodes, {row['seconds']:.1f} s"


def cell(rows: list[dict], failing: bool) -> str:
    "Summarize several seeds of one algorithm on one environment"
    if not rows:
        return "-"
    scores = sorted(row["score"] for row in rows)
    shown = f"{statistics.median(scores):.2f}" + (
        f" [{scores[0]:.2f}, {scores[-1]:.2f}]" if len(scores) > 1 else ""
    )
    return (
        f"cannot ({shown})"
        if failing
        else f"{shown} {statistics.median(row['episodes'] for row in rows):.0f}"
    )


def table(rows: list[dict]) -> str:
    "Return algorithms by environments as a Markdown table"
    lines = ["| | " + " | ".join(PROBES) + " |", "|---" * (len(PROBES) + 1) + "|"]
    for algorithm in [name for name in CREDITS if any(row["algorithm"] == name for row in rows)]:
        cells = [
            cell(
                [r for r in rows if (r["algorithm"], r["probe"]) == (algorithm, probe)],
                cannot(algorithm, probe),
            )
            for probe in PROBES
        ]
        lines.append(f"| {algorithm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument(
        "--updates", type=int, default=60, help="at most, of each run (default: %(default)s)"
    )
    parser.add_argument(
        "--algorithms",
        default=",".join(CREDITS),
        help="which, with commas between them (default: all)",
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="runs side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/algorithms.jsonl"),
        help="rows are appended here (default: %(default)s)",
    )
    args = parser.parse_args()
    names = args.algorithms.split(",")
    if unknown := [name for name in names if name not in CREDITS]:
        parser.error(
            f"unknown algorithms {', '.join(unknown)}: expected some of {', '.join(CREDITS)}"
        )
    jobs = [
        (probe, name, seed, args.updates)
        for seed in range(1 if args.quick else args.seeds)
        for name in names
        for probe in PROBES
    ]
    began = time.perf_counter()
    rows = run(args.output, jobs, run_one, job_of, describe, args.processes)
    print(
        f"\n{table(rows)}\n\n{len(rows)} runs, {time.perf_counter() - began:.0f} s for those that were not there"
    )
    failed = [row for row in rows if row["algorithm"] == "ppo" and row["score"] < SOLVED]
    for row in failed:
        print(
            f"ppo did not solve {row['probe']} with seed {row['seed']}: {row['score']:.2f}, expected at least {SOLVED}"
        )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
