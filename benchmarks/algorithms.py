"""What each algorithm can learn: all of them on all probes, whose best return is known.

    python benchmarks/algorithms.py            # three seeds
    python benchmarks/algorithms.py --quick    # one seed

A score is 0 for random play and 1 for the optimum, `llamagym.probes` says what each probe asks. Shown is the median over the seeds, its
range where there are several, and the episodes that were learned from. `own_reward` credits each turn with its own reward alone.
"cannot" is written where an algorithm fails by construction: who has no critic takes a time limit for the end (`leave`), as does who credits
a turn with its own reward, who knows nothing of a later one either (`delayed`). Rows are appended to the output file as they finish; what it
holds is not run again.
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

from llamagym.algorithms import ALGORITHMS, as_algorithm
from llamagym.probes import PROBES, SOLVED, own_reward, solve

CREDITS = {**dict.fromkeys(ALGORITHMS), "own_reward": own_reward}


def cannot(algorithm: str, probe: str) -> bool:
    """Whether an algorithm fails by construction"""
    if algorithm == "own_reward":
        return probe in ("delayed", "leave")
    return probe == "leave" and not as_algorithm(algorithm).needs_critic


def attempt(probe: str, algorithm: str, seed: int, updates: int) -> list[dict]:
    """One run, which is one row"""
    warnings.simplefilter("ignore")
    no_gradient = (algorithm, probe) == ("own_reward", "delayed")  # but for rounding in that of the KL, which Adam would follow
    options = {"ppo__kl_coef": 0.0} if no_gradient else {}
    result = solve(probe, CREDITS[algorithm] or algorithm, seed, 10 if cannot(algorithm, probe) else updates, **options)
    found = dict(score=result.score, episodes=result.episodes, seconds=result.seconds, curve=result.curve)
    return [dict(probe=probe, algorithm=algorithm, seed=seed, updates=updates) | found]


def job_of(row: dict) -> tuple:
    """The arguments of `attempt` that a row is of"""
    return row["probe"], row["algorithm"], row["seed"], row["updates"]


def say(row: dict) -> str:
    """A row in words"""
    name = f"{row['probe']:8} {row['algorithm']:12} seed {row['seed']}"
    return f"{name}: score {row['score']:6.2f} after {row['episodes']:5} episodes, {row['seconds']:.1f} s"


def cell(rows: list[dict], failing: bool) -> str:
    """What several seeds of one algorithm on one probe are shown as"""
    if not rows:
        return "-"
    scores = sorted(row["score"] for row in rows)
    shown = f"{statistics.median(scores):.2f}" + (f" [{scores[0]:.2f}, {scores[-1]:.2f}]" if len(scores) > 1 else "")
    return f"cannot ({shown})" if failing else f"{shown} {statistics.median(row['episodes'] for row in rows):.0f}"


def table(rows: list[dict]) -> str:
    """Algorithms by probes, as Markdown"""
    lines = ["| | " + " | ".join(PROBES) + " |", "|---" * (len(PROBES) + 1) + "|"]
    for algorithm in [name for name in CREDITS if any(row["algorithm"] == name for row in rows)]:
        cells = [cell([r for r in rows if (r["algorithm"], r["probe"]) == (algorithm, probe)], cannot(algorithm, probe)) for probe in PROBES]
        lines.append(f"| {algorithm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=60, help="at most, of each run (default: %(default)s)")
    parser.add_argument("--algorithms", default=",".join(CREDITS), help="which, with commas between them (default: all)")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/algorithms.jsonl"), help="rows are appended here (default: %(default)s)")
    args = parser.parse_args()
    names = args.algorithms.split(",")
    if unknown := [name for name in names if name not in CREDITS]:
        parser.error(f"unknown algorithms {', '.join(unknown)}: expected some of {', '.join(CREDITS)}")
    jobs = [(probe, name, seed, args.updates) for seed in range(1 if args.quick else args.seeds) for name in names for probe in PROBES]
    began = time.perf_counter()
    rows = run(args.output, jobs, attempt, job_of, say, args.processes)
    print(f"\n{table(rows)}\n\n{len(rows)} runs, {time.perf_counter() - began:.0f} s for those that were not there")
    failed = [row for row in rows if row["algorithm"] == "ppo" and row["score"] < SOLVED]
    for row in failed:
        print(f"ppo did not solve {row['probe']} with seed {row['seed']}: {row['score']:.2f}, expected at least {SOLVED}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
