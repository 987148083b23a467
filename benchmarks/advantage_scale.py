"""Compare three divisors of advantages: the deviation of the batch, with or without a floor from earlier batches.

    python benchmarks/advantage_scale.py                  # three tasks, three seeds, about 15 minutes on two cores
    python benchmarks/advantage_scale.py --env lake --seeds 1

The divisor is max(std of the batch, floor * running std), see `llamagym.algorithms.advantages`:

- floor 0: the batch's own deviation, as in PPO's reference implementations;
- floor 0.3: in between;
- floor 1: the larger of both, the default.

A run is that of `zero_config.py`, with the same tasks and settings. Rows in the output are not run again.
"""

import argparse
import functools
from pathlib import Path
from unittest.mock import patch

import numpy as np
from resumable import run
from zero_config import interquartile_mean, learn

from llamagym.algorithms.advantages import AdvantageScale

FLOORS = (0.0, 0.3, 1.0)


def work(folder: Path, floor: float, env: str, seed: int, scale: float) -> list[dict]:
    "Run one row"
    with patch.object(AdvantageScale, "min_std", property(lambda self: floor * self.std)):
        return [learn(env, seed, scale, "{}", folder) | dict(floor=floor)]


def job_of(row: dict) -> tuple:
    return row["floor"], row["env"], row["seed"], row["scale"]


def area(row: dict) -> float:
    "Return the mean normalized score over the run: the higher, the earlier it was learned"
    return float(np.average(row["returns"], weights=row["counts"]))


def lowest_after(row: dict, level: float = 0.95) -> float:
    "Return the lowest score of an update after the first that reached a level; NaN if none did"
    scores = np.array(row["returns"])
    reached = np.flatnonzero(scores >= level)
    return float(scores[reached[0] :].min()) if len(reached) else float("nan")


def describe(row: dict) -> str:
    return (
        f"{row['env']:9} floor {row['floor']:3} seed {row['seed']}: score {row['score']:.3f}, mean over the run "
        f"{area(row):.3f}, lowest after 0.95: {lowest_after(row):.2f}, {row['seconds']:.0f} s"
    )


def table(rows: list[dict]) -> str:
    "Return the comparison as a Markdown table"
    lines = [
        "| task | floor | score (IQM) | mean over the run | lowest after 0.95 | seeds |",
        "|---" * 6 + "|",
    ]
    for env in dict.fromkeys(row["env"] for row in rows):
        for floor in FLOORS:
            mine = [r for r in rows if (r["env"], r["floor"]) == (env, floor)]
            if mine:
                lowest = [f"{lowest_after(r):.2f}" for r in mine]
                lines.append(
                    f"| {env} | {floor} | {interquartile_mean([r['score'] for r in mine]):.3f} "
                    f"| {np.mean([area(r) for r in mine]):.3f} | {', '.join(lowest)} | {len(mine)} |"
                )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", default="lock,lake,sparse", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the updates to make")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/advantage_scale"))
    arguments = parser.parse_args()
    jobs = [
        (floor, env, seed, arguments.scale)
        for env in arguments.env.split(",")
        for seed in range(arguments.seeds)
        for floor in FLOORS
    ]
    work_in = functools.partial(work, arguments.output)
    rows = run(
        arguments.output / "results.jsonl", jobs, work_in, job_of, describe, arguments.processes
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
