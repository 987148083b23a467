"""Measure tokens per second of rollouts and updates on a CUDA GPU, and their memory, against full re-prefill.

    python benchmarks/gpu_speed.py --models qwen2.5-1.5b --quantize none nf4

Models have real shapes and random weights, made on the device, and a LoRA adapter on all linear
layers. The environment has twenty turns. Wall seconds with the device synchronized. `engine` is this
project's, with decode steps captured as CUDA graphs; `uncaptured` is the same without graphs;
`generate` prefills the whole conversation at each turn, all environments in a batch; `naive` plays one
environment that way.
"""

import argparse
import gc
import sys
import time
import warnings

import torch
from shapes import SHAPES, model_of
from workloads import NEW_TOKENS, Naive, table, task_of

import llamagym.inference.cuda_graphs
from llamagym.agent import Agent
from llamagym.config import Config
from llamagym.models.policy import Policy
from llamagym.models.tiny import tiny_tokenizer
from llamagym.rollout import collect

warnings.filterwarnings("ignore")


def timed(run) -> tuple[float, object]:
    "Return the wall seconds of a function, and its result"
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return time.perf_counter() - began, result


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30


def measure(name: str, quantize: str, envs: int, turns: int, epochs: int) -> dict:
    "Return one row of the table"
    free()
    task, model = task_of("corridor", turns), model_of(name, quantize)
    options = dict(
        epochs=epochs, mini_batch_size=64, token_budget=8192, gradient_checkpointing=True
    )
    config = Config.from_dict(
        {"generate.max_new_tokens": NEW_TOKENS}
        | {f"ppo.{option}": value for option, value in options.items()}
    )
    agent = Agent.for_task(task, Policy(model, tiny_tokenizer()), config=config)
    line = dict(model=name, weights=quantize, load=torch.cuda.memory_allocated() / 2**30)

    def play(record: int, count: int = envs) -> tuple[float, list]:
        "Return environment steps per second, and the episodes"
        llamagym.inference.cuda_graphs.CAPTURE_AFTER_STEPS = record
        seconds, episodes = timed(lambda: collect(agent, episodes=count, num_envs=count))
        return sum(map(len, episodes)) / seconds, episodes

    play(10**9, 2)
    line["uncaptured"], _ = play(10**9)
    free()
    line["engine"], episodes = play(16)
    line["rollout"] = peak()
    naive = Naive(model, tiny_tokenizer(), task)
    naive.batch(0, 2)
    for who, run in (
        ("generate", lambda: naive.batch(0, envs)),
        ("naive", lambda: naive.episode(0)),
    ):
        seconds, played = timed(run)
        line[who] = played / seconds
    agent.learner.update(collect(agent, episodes=2, num_envs=2))
    free()
    seconds, _ = timed(lambda: agent.learner.update(episodes))
    line |= dict(
        trained=sum(map(len, episodes)) / seconds,
        tokens=sum(len(s.ids) for e in episodes for s in e.segments) / seconds,
        update=peak(),
    )
    return line | {
        "over generate": line["engine"] / line["generate"],
        "over naive": line["engine"] / line["naive"],
    }


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--models",
    nargs="+",
    choices=SHAPES,
    default=["qwen2.5-1.5b", "qwen2.5-7b"],
    help="(default: %(default)s)",
)
parser.add_argument(
    "--quantize",
    nargs="+",
    choices=["none", "nf4"],
    default=["none", "nf4"],
    help="(default: both)",
)
parser.add_argument("--envs", type=int, default=32, help="side by side (default: %(default)s)")
parser.add_argument("--turns", type=int, default=20, help="of an episode (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=1, help="of an update (default: %(default)s)")
arguments = parser.parse_args()
if not torch.cuda.is_available():
    sys.exit(
        "no CUDA device: this benchmark needs one; benchmarks/rollout.py and benchmarks/update.py run on a CPU"
    )
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, {arguments.envs} environments of {arguments.turns} turns, "
      f"responses of {NEW_TOKENS} tokens\nEnvironment steps per second; turns and tokens trained per second ({arguments.epochs} epochs); "
      "GiB allocated after loading, and at the peak of a rollout and of an update", flush=True)  # fmt: skip
formats = dict(
    model="", weights="", naive=".2f", generate=".1f", uncaptured=".1f", engine=".1f"
) | {"over generate": ".1f", "over naive": ".1f"}
formats |= dict(trained=".1f", tokens=".0f", load=".1f", rollout=".1f", update=".1f")
for name in arguments.models:
    for quantize in arguments.quantize:
        print(
            table(
                [measure(name, quantize, arguments.envs, arguments.turns, arguments.epochs)],
                formats,
            ),
            flush=True,
        )
