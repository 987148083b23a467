"""Learn Blackjack with 4-bit and with float32 base weights on the CPU: QLoRA's cost in return, loss and time.

    python benchmarks/qlora_cpu.py             # three seeds, the quickstart's length
    python benchmarks/qlora_cpu.py --quick     # one seed, a few updates

Same model, same games to imitate, same settings. One has its linear layers in 4-bit NormalFloat with
double quantization (bitsandbytes) and computes in float32, like the other. Returns are the greedy
policy's exact ones; optimal is -0.0466. Losses are those of the warm start, in nats per token. Rows are
appended to the output file as runs finish; rows in the file are not run again.
"""

import argparse
import functools
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from learning import judge, problems
from resumable import run

from llamagym.trainer import Trainer
from llamagym.training.callbacks import Anneal

WEIGHTS = {"float32": None, "nf4": "nf4"}


def run_one(folder: str, weights: str, seed: int, updates: int) -> list[dict]:
    "Run one seed, and return its row"
    warnings.simplefilter("ignore")
    problem, began = problems()["blackjack"], time.perf_counter()
    options = {
        "model.quantize": WEIGHTS[weights],
        "trainer.updates": updates,
        "trainer.output_dir": f"{folder}/{weights}-{seed}",
    }
    agent, warm = problem.imitator(seed, **options)
    history = (
        Trainer(agent, callbacks=[Anneal(kl_coef=(0.5, 0.03), learning_rate=problem.learning_rate)])
        .fit()
        .history
    )
    return [dict(weights=weights, seed=seed, updates=updates, score=judge("blackjack", agent), loss=warm["loss"], seconds=time.perf_counter() - began,
                 gap=max(m["max_logprob_diff"] for m in history), returns=[m["mean_return"] for m in history])]  # fmt: skip


def job_of(row: dict) -> tuple:
    "Return the arguments of `run_one`, except the folder, that made a row"
    return row["weights"], row["seed"], row["updates"]


def describe(row: dict) -> str:
    "Describe a row in one line"
    return f"{row['weights']:8} seed {row['seed']}: return {row['score']:.4f}, imitation {row['loss']:.4f} nats, {row['seconds']:.0f} s"


def table(rows: list[dict]) -> str:
    "Return the results as a Markdown table"
    lines = [
        "| weights | exact return, median and range | imitation, nats | sampler to learner, nats at most | seconds | seeds |",
        "|---" * 6 + "|",
    ]
    for weights in WEIGHTS:
        mine = [row for row in rows if row["weights"] == weights]
        if mine:
            scores = [row["score"] for row in mine]
            shown = f"{statistics.median(scores):.4f} [{min(scores):.4f}, {max(scores):.4f}]"
            loss, seconds = (
                statistics.median(row[name] for row in mine) for name in ("loss", "seconds")
            )
            lines.append(
                f"| {weights} | {shown} | {loss:.4f} | {max(row['gap'] for row in mine):.1e} | {seconds:.0f} | {len(mine)} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument(
        "--updates", type=int, default=70, help="of each run (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, five updates")
    parser.add_argument(
        "--processes", type=int, default=2, help="runs side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/qlora_cpu"),
        help="folder of rows and runs (default: %(default)s)",
    )
    args = parser.parse_args()
    seeds, updates = (1, 5) if args.quick else (args.seeds, args.updates)
    jobs = [(weights, seed, updates) for seed in range(seeds) for weights in WEIGHTS]
    rows = run(
        args.output / "results.jsonl",
        jobs,
        functools.partial(run_one, str(args.output)),
        job_of,
        describe,
        args.processes,
    )
    print(f"\n{table(rows)}")
    scores = {
        weights: statistics.median(row["score"] for row in rows if row["weights"] == weights)
        for weights in WEIGHTS
    }
    print(f"\n4 bits cost {scores['float32'] - scores['nf4']:+.4f} of return")
    return 0


if __name__ == "__main__":
    sys.exit(main())
