"""Run the Blackjack tutorial once per seed, and compute the greedy policy's exact return.

    python benchmarks/blackjack_learning.py --seeds 3

Prints one line per seed as it finishes, then the median and the spread. Optimal is -0.0466, hit below
17 is -0.0793, always stick -0.1864. `at least` is a lower bound: unvisited states count as
losses; a full run has none.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from llamagym.cli import quickstart

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--seeds",
    type=int,
    default=3,
    help="how many seeds, counted from --first (default: %(default)s)",
)
parser.add_argument("--first", type=int, default=0, help="first seed (default: %(default)s)")
parser.add_argument(
    "--output",
    type=Path,
    default=Path("runs/blackjack_learning"),
    help="a folder per seed goes here (default: %(default)s)",
)
parser.add_argument(
    "--fast", action="store_true", help="seconds per seed, to see that all parts work"
)
arguments = parser.parse_args()

print(
    f"{'seed':>4}  {'training s':>10}  {'whole run s':>11}  {'episodes':>8}  {'before':>8}  {'exact return':>12}  {'at least':>8}  {'peak MB':>7}"
)
returns = []
for seed in range(arguments.first, arguments.first + arguments.seeds):
    began = time.perf_counter()
    summary = quickstart(arguments.output / f"seed-{seed}", seed=seed, fast=arguments.fast)
    whole = time.perf_counter() - began
    print(
        f"{seed:>4}  {summary['seconds']:>10.0f}  {whole:>11.0f}  {summary['episodes']:>8}  {summary['before']:>8.4f}  "
        f"{summary['after']:>12.4f}  {summary['after_at_least']:>8.4f}  {summary['peak_mb'] or float('nan'):>7.0f}",
        flush=True,
    )
    returns.append(summary["after"])
    row = {k: v for k, v in summary.items() if k != "artifacts"} | dict(
        seed=seed, whole_seconds=whole
    )
    with (arguments.output / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
print(
    f"median {statistics.median(returns):.4f}, from {min(returns):.4f} to {max(returns):.4f}, over {len(returns)} seeds"
)
