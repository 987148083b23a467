"""What each algorithm can learn: all of them on all probes, whose best return is known.

    python benchmarks/algorithms.py            # three seeds, about ten minutes on 2 cores
    python benchmarks/algorithms.py --quick    # one seed

A score is 0 for random play and 1 for the optimum, `llamagym.probes` says what each probe asks. Shown is the median over the seeds, its
range where there are several, and the episodes that were learned from. `own_reward` credits each turn with its own reward alone.
"cannot" is written where an algorithm fails by construction: who has no critic takes a time limit for the end (`leave`), as does who credits
a turn with its own reward, who knows nothing of a later one either (`delayed`); and `ppo_token` discounts from token to token, so that
what is far costs less, and `leave` should be stayed in. Rows are appended to the output file as they finish; what it holds is not run again.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from llamagym.algorithms import ALGORITHMS, as_algorithm
from llamagym.probes import PROBES, SOLVED, own_reward, solve

CREDITS = {**dict.fromkeys(ALGORITHMS), "own_reward": own_reward}


def cannot(algorithm: str, probe: str) -> bool:
    """Whether an algorithm fails by construction"""
    if algorithm == "own_reward":
        return probe in ("delayed", "leave")
    return probe == "leave" and (algorithm == "ppo_token" or not as_algorithm(algorithm).needs_critic)


def attempt(probe: str, algorithm: str, seed: int, updates: int) -> dict:
    """One run, as a row"""
    warnings.simplefilter("ignore")
    no_gradient = (algorithm, probe) == ("own_reward", "delayed")  # but for rounding in that of the KL, which Adam would follow
    options = {"ppo__kl_coef": 0.0} if no_gradient else {}
    result = solve(probe, CREDITS[algorithm] or algorithm, seed, 10 if cannot(algorithm, probe) else updates, **options)
    found = dict(score=result.score, episodes=result.episodes, seconds=result.seconds, curve=result.curve)
    return dict(probe=probe, algorithm=algorithm, seed=seed, updates=updates) | found


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
    for algorithm in CREDITS:
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
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    rows = [row for row in rows if (row["probe"], row["algorithm"], row["seed"], row["updates"]) in jobs]
    done = {(row["probe"], row["algorithm"], row["seed"], row["updates"]) for row in rows}
    began = time.perf_counter()
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(attempt, *job) for job in jobs if job not in done]):
            row = future.result()
            rows.append(row)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            name = f"{row['probe']:8} {row['algorithm']:12} seed {row['seed']}"
            print(f"{name}: score {row['score']:6.2f} after {row['episodes']:5} episodes, {row['seconds']:.1f} s", flush=True)
    print(f"\n{table(rows)}\n\n{len(rows) - len(done)} runs in {time.perf_counter() - began:.0f} s")
    failed = [row for row in rows if row["algorithm"] == "ppo" and row["score"] < SOLVED]
    for row in failed:
        print(f"ppo did not solve {row['probe']} with seed {row['seed']}: {row['score']:.2f}, expected at least {SOLVED}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
