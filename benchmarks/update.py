"""Measure update speed against the update of 2024, and the whole loop against TRL's, side by side in one run.

    python benchmarks/update.py --quick

Models have Llama shapes, random weights and a LoRA adapter, on one thread; four epochs, optimizer steps
of about sixteen turns. The naive update trains one row per turn with the whole history, and logits at
every position. Turns trained per CPU second of that thread; a ratio is the median over rounds, with the
lowest and the highest. Then episodes per second of rollouts and updates together, against TRL's
`GRPOTrainer` with a `rollout_func`; and the memory that an update needs.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings

import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from trl_loop import trl_loop
from workloads import Clock, Meter, NaiveUpdate, agent_of, model_of, naive_rows, table, task_of

import llamagym.ppo
from llamagym.rollout import collect

warnings.filterwarnings("ignore")
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--quick", action="store_true", help="the 1M model alone: under three minutes")
parser.add_argument(
    "--sizes",
    nargs="+",
    choices=["1M", "14M"],
    default=["1M", "14M"],
    help="models (default: both)",
)
parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
arguments = parser.parse_args()
if arguments.quick:
    arguments.sizes, arguments.rounds = ["1M"], 2
torch.set_num_threads(1)
EPISODES = dict(blackjack=48, corridor=4)  # of an update


def peak_memory(who: str, count: int) -> None:
    "Print this process's memory in MB: with a model, and the peak in an epoch of some 20-turn episodes"
    agent, naive = (
        agent_of("1M", task_of("corridor"), ppo__epochs=1),
        NaiveUpdate(model_of("1M"), epochs=1),
    )
    before = psutil.Process().memory_info().rss
    episodes = collect(agent, episodes=count, num_envs=count)
    if who == "this":
        agent.learner.update(episodes)
    else:
        naive.step(naive_rows(episodes))
    print(before / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def memory() -> list[dict]:
    "Measure the memory of both updates, each in its own process"
    jobs, command = [("naive", 1), ("this", 1), ("this", 4)], [sys.executable, __file__, "--memory"]
    running = [
        subprocess.Popen([*command, who, str(count)], stdout=subprocess.PIPE, text=True)
        for who, count in jobs
    ]
    lines = []
    for (who, count), process in zip(jobs, running):
        before, peak = map(float, process.communicate()[0].split())
        lines.append(
            dict(update=who, episodes=count, model=before, peak=peak, beyond=peak - before)
        )
    return lines


def where(agent, episodes) -> str:
    "Print how the time of an update is divided"
    parts = dict(
        reference=[(llamagym.ppo, "compute_values_and_ref_logprobs")],
        backward=[(torch.Tensor, "backward")],
        optimiser=[(torch.optim.AdamW, "step")],
    )
    with Meter(**parts, forward=[(llamagym.ppo, "compute_loss_terms")]) as meter:
        agent.learner.update(episodes)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        agent.learner.update(episodes)
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    products = sum(
        t for key, t in spent.items() if key in ("aten::mm", "aten::addmm", "aten::bmm")
    ) / sum(spent.values())
    attention = sum(t for key, t in spent.items() if "attention" in key) / sum(spent.values())
    return f"{meter.shares('bookkeeping')}; of all that, matrix products {products:.0%} and attention {attention:.0%}"


def measure(size: str, name: str, rounds: int) -> dict:
    "Return one row of the table"
    agent = agent_of(size, task_of(name), ppo__epochs=4, ppo__mini_batch_size=16)
    naive, rates = NaiveUpdate(model_of(size)), {"this": [], "naive": []}
    for r in range(rounds):
        episodes = collect(agent, episodes=EPISODES[name], num_envs=EPISODES[name], seed=r)
        turns = sum(map(len, episodes))
        # all are padded to the last
        rows = naive_rows(episodes) if name == "blackjack" else naive_rows(episodes[:1])[5::7]
        steps = [rows[i : i + 16] for i in range(0, len(rows), 16)]
        for who, count, learn in (
            ("this", turns, lambda e=episodes: agent.learner.update(e)),
            ("naive", len(rows), lambda s=steps: [naive.step(r) for r in s]),
        ):
            with Clock() as clock:
                learn()
            rates[who].append(count / clock.cpu)
    print(f"  {size} {name}: {where(agent, episodes[:48:2])}", flush=True)
    ratios = sorted(a / b for a, b in zip(rates["this"], rates["naive"]))
    return dict(model=size, environment=name, naive=statistics.median(rates["naive"]), this=statistics.median(rates["this"]), ratio=statistics.median(ratios),
                low=ratios[0], high=ratios[-1])  # fmt: skip


def whole_loop(size: str, name: str, iterations: int, episodes: int = 16) -> dict:
    "Return episodes per second of rollouts and updates together"
    episodes = episodes if name == "blackjack" else 4  # of an iteration
    # one optimiser step an epoch, as TRL's
    agent = agent_of(size, task_of(name), ppo__epochs=4, ppo__mini_batch_size=1000)
    with Clock() as clock:
        for i in range(iterations):
            agent.learner.update(
                collect(agent, episodes=episodes, num_envs=episodes, first=i * episodes)
            )
    other = trl_loop(size, name, iterations, episodes, num_generations=min(8, episodes))
    ours, theirs = iterations * episodes / clock.cpu, other["episodes"] / other["cpu"]
    return dict(
        model=size,
        environment=name,
        iterations=iterations,
        episodes=iterations * episodes,
        trl=theirs,
        this=ours,
        ratio=ours / theirs,
    )


if arguments.memory:
    sys.exit(peak_memory(arguments.memory[0], int(arguments.memory[1])))
began = time.perf_counter()
# first: a process starts with its parent's peak
print(
    "Memory of a process that trains on 20 turns (MB): with the model, at its highest, and the difference"
)
print(
    table(memory(), dict(update="", episodes="", model=".0f", peak=".0f", beyond=".0f")), flush=True
)
print("\nWhere the time goes:")
lines = [
    measure(size, name, arguments.rounds if size == "1M" else 1)
    for size in arguments.sizes
    for name in EPISODES
]
print("\nTurns trained per CPU second, and ratios:")
print(
    table(
        lines,
        dict(model="", environment="", naive=".2f", this=".1f", ratio=".1f", low=".1f", high=".1f"),
    ),
    flush=True,
)
iterations = dict(blackjack=2, corridor=1) if arguments.quick else dict(blackjack=4, corridor=4)
print("\nRollouts and updates together, episodes per CPU second:")
print(table([whole_loop("1M", *job) for job in iterations.items()],
            dict(model="", environment="", iterations="", episodes="", trl=".2f", this=".2f", ratio=".1f")))  # fmt: skip
print(
    f"\n{time.perf_counter() - began:.0f} s in all, torch {torch.__version__}, Python {sys.version.split()[0]}"
)
