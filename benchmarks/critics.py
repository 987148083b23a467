"""Compare the hidden states that the critic reads: the frozen reference's, the policy's without gradient, or with.

    python benchmarks/critics.py --seeds 2

Uses the Blackjack tutorial's settings for half as many updates. `explained variance` compares returns
with the values that advantages were computed from, over the last ten updates; `exact return` is the
greedy policy's (optimal -0.0466). CPU seconds cover the whole run.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

from llamagym.agent import Agent
from llamagym.agents.exact import greedy_choices
from llamagym.config import Config, LoRAConfig
from llamagym.envs.baselines import RandomAgent, play
from llamagym.envs.exact import blackjack_tree
from llamagym.envs.toy_text import blackjack
from llamagym.models.policy import CRITICS, Policy
from llamagym.trainer import Trainer
from llamagym.training.callbacks import Anneal
from llamagym.training.cloning import clone

warnings.filterwarnings("ignore", message=".*(gradient_checkpointing|kernels).*")


def train(critic: str, seed: int, updates: int, output: Path) -> dict:
    task = blackjack()
    task.system_prompt = "Play blackjack."
    policy = Policy.load("tiny", lora=LoRAConfig(r=16), critic=critic, seed=seed)
    config = Config.from_dict(
        {
            "generate.max_new_tokens": 6,
            "rollout": dict(episodes=1024, num_envs=256),
            "ppo": dict(
                mini_batch_size=384,
                epochs=2,
                learning_rate=1e-3,
                critic_learning_rate=1e-2,
                token_budget=16384,
            ),
            "warmstart": dict(epochs=2, batch_size=64, learning_rate=2e-3),
            "trainer": dict(
                updates=updates,
                eval_every=0,
                checkpoint_every=0,
                output_dir=str(output / f"{critic}-{seed}"),
                seed=seed,
            ),
        }
    )
    agent = Agent.for_task(task, policy, config=config)
    clone(agent, play(task, RandomAgent(task), episodes=2000, seed=100 + seed), progress=False)
    began = time.process_time()
    run = Trainer(agent, callbacks=[Anneal(kl_coef=(0.5, 0.03), learning_rate=(1e-3, 1e-4))]).fit()
    seconds = time.process_time() - began
    last = run.history[-10:]
    return dict(
        critic=critic,
        seed=seed,
        updates=updates,
        cpu_seconds=seconds,
        explained_variance=statistics.fmean(m["explained_variance"] for m in last),
        sampled_return=statistics.fmean(m["mean_return"] for m in last),
        exact_return=blackjack_tree(greedy_choices(agent), min_probability=1e-5).value,
    )


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--seeds",
    type=int,
    default=2,
    help="how many seeds, counted from --first (default: %(default)s)",
)
parser.add_argument("--first", type=int, default=0, help="first seed (default: %(default)s)")
parser.add_argument(
    "--updates", type=int, default=35, help="of 1,024 games each (default: %(default)s)"
)
parser.add_argument(
    "--output",
    type=Path,
    default=Path("runs/critics"),
    help="metrics and results.jsonl go here (default: %(default)s)",
)
arguments = parser.parse_args()

print(
    f"{'critic':>9}  {'seed':>4}  {'CPU s':>6}  {'explained variance':>18}  {'sampled return':>14}  {'exact return':>12}"
)
rows = []
for seed in range(arguments.first, arguments.first + arguments.seeds):
    for critic in CRITICS:
        row = train(critic, seed, arguments.updates, arguments.output)
        rows.append(row)
        print(
            f"{critic:>9}  {seed:>4}  {row['cpu_seconds']:>6.0f}  {row['explained_variance']:>18.3f}  {row['sampled_return']:>14.3f}  "
            f"{row['exact_return']:>12.4f}",
            flush=True,
        )
        with (arguments.output / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
for critic in CRITICS:
    returns = [row["exact_return"] for row in rows if row["critic"] == critic]
    print(
        f"{critic:>9}: median exact return {statistics.median(returns):.4f}, from {min(returns):.4f} to {max(returns):.4f}"
    )
