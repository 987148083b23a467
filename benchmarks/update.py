"""How fast an update is, next to the update of 2024, and the whole loop next to TRL's, in one run and in turns.

    python benchmarks/update.py --quick

Models are Llama shapes with random weights and a LoRA adapter, on one thread; four epochs, optimiser steps of about sixteen turns. The naive update
trains a row per turn with the whole history in front, logits at every position. Turns trained per CPU second of that thread; a ratio is the median
over rounds, with the lowest and the highest. Then episodes per second of rollouts and updates together, four iterations, against TRL's
`GRPOTrainer` with a `rollout_func`, and the memory that each update needs.
"""

import argparse
import statistics
import sys
import threading
import time
import warnings

import psutil
import torch
from trl_loop import trl_loop
from workloads import Clock, NaiveUpdate, agent_of, model_of, naive_rows, table, task_of

from llamagym.rollout import collect

warnings.filterwarnings("ignore")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="the 1M model alone: under three minutes")
parser.add_argument("--sizes", nargs="+", choices=["1M", "14M"], default=["1M", "14M"], help="models (default: both)")
parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
arguments = parser.parse_args()
if arguments.quick:
    arguments.sizes, arguments.rounds = ["1M"], 2
torch.set_num_threads(1)
EPISODES = dict(blackjack=48, corridor=4)  # of an update


class Peak(threading.Thread):
    """The most memory that a block needs beyond what was there before it, in MB"""

    def __init__(self):
        super().__init__(daemon=True)
        self.process, self.going, self.mb = psutil.Process(), True, 0.0

    def run(self):
        while self.going:
            self.mb = max(self.mb, (self.process.memory_info().rss - self.before) / 2**20)
            time.sleep(0.01)

    def __enter__(self):
        self.before = self.process.memory_info().rss
        self.start()
        return self

    def __exit__(self, *_):
        self.going = False
        self.join()


def measure(size: str, name: str, rounds: int) -> dict:
    """One line of the table"""
    agent = agent_of(size, task_of(name), ppo__epochs=4, ppo__mini_batch_size=16)
    naive, rates, peaks = NaiveUpdate(model_of(size)), {"this": [], "naive": []}, {}
    for r in range(rounds):
        episodes = collect(agent, episodes=EPISODES[name], num_envs=EPISODES[name], seed=r)
        turns = sum(map(len, episodes))
        rows = naive_rows(episodes) if name == "blackjack" else naive_rows(episodes[:1])[1::2]  # every other turn of an episode: it takes its time
        steps = [rows[i : i + 16] for i in range(0, len(rows), 16)]
        for who, count, learn in (("this", turns, lambda e=episodes: agent.learner.learn(e)), ("naive", len(rows), lambda s=steps: [naive.step(r) for r in s])):
            with Peak() as peak, Clock() as clock:
                learn()
            rates[who].append(count / clock.cpu)
            peaks[who] = max(peaks.get(who, 0.0), peak.mb)
    ratios = sorted(a / b for a, b in zip(rates["this"], rates["naive"]))
    return dict(model=size, environment=name, naive=statistics.median(rates["naive"]), this=statistics.median(rates["this"]), ratio=statistics.median(ratios),
                low=ratios[0], high=ratios[-1], naive_mb=peaks["naive"], this_mb=peaks["this"])  # fmt: skip


def whole_loop(size: str, name: str, iterations: int = 4, episodes: int = 16) -> dict:
    """Episodes per second of rollouts and updates together"""
    episodes = episodes if name == "blackjack" else 2 if arguments.quick else 4
    agent = agent_of(size, task_of(name), ppo__epochs=4, ppo__mini_batch_size=1000)  # one optimiser step an epoch, as TRL's
    with Clock() as clock:
        for i in range(iterations):
            agent.learner.learn(collect(agent, episodes=episodes, num_envs=episodes, first=i * episodes))
    other = trl_loop(size, name, iterations, episodes, num_generations=min(8, episodes))
    ours, theirs = iterations * episodes / clock.cpu, other["episodes"] / other["cpu"]
    return dict(model=size, environment=name, episodes=iterations * episodes, trl=theirs, this=ours, ratio=ours / theirs)


began = time.perf_counter()
lines = [measure(size, name, arguments.rounds if size == "1M" else 1) for size in arguments.sizes for name in EPISODES]
print("Turns trained per CPU second, ratios, and the most memory an update needs beyond what was there (MB):")
print(table(lines, dict(model="", environment="", naive=".2f", this=".1f", ratio=".1f", low=".1f", high=".1f", naive_mb=".0f", this_mb=".0f")), flush=True)
print("\nRollouts and updates together, episodes per CPU second, four iterations:")
print(table([whole_loop("1M", name) for name in EPISODES], dict(model="", environment="", episodes="", trl=".2f", this=".2f", ratio=".1f")))
print(f"\n{time.perf_counter() - began:.0f} s in all, torch {torch.__version__}, Python {sys.version.split()[0]}")
