"""Measure rollout speed against the loop of 2024 and batched `generate`, side by side in one run.

    python benchmarks/rollout.py --quick

Models have Llama shapes, random weights and a LoRA adapter, on one thread. Environment steps per CPU
second of that thread, as ratios to the naive loop (one environment, the whole conversation prefilled at
each turn). A round measures each once; the ratio is the median over rounds, with the lowest and the
highest. Then: how this engine's time is divided, its cache, and the cost of a turn in a growing
conversation.
"""

import argparse
import statistics
import sys
import time
import warnings

import numpy as np
import torch
from workloads import (
    NEW_TOKENS,
    SIZES,
    Clock,
    Meter,
    Naive,
    agent_of,
    model_of,
    table,
    task_of,
    tokenizer_of,
)

from llamagym.config import GenerateConfig
from llamagym.envs.text_env import TextEnv
from llamagym.inference.backend import make_backend
from llamagym.inference.engine import Engine
from llamagym.inference.kv_cache import SlotKVCache
from llamagym.rollout import collect

warnings.filterwarnings("ignore")
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--quick", action="store_true", help="the 1M model alone, two rounds: under three minutes"
)
parser.add_argument(
    "--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models (default: all)"
)
parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
arguments = parser.parse_args()
if arguments.quick:
    arguments.sizes, arguments.rounds = ["1M"], 2
torch.set_num_threads(1)


def measure(size: str, name: str, envs: int, rounds: int) -> dict:
    "Return one row of the table"
    task = task_of(name)
    agent, naive = agent_of(size, task), Naive(model_of(size), tokenizer_of(size), task)
    episodes = dict(blackjack=4 * envs if size == "135M" else 8 * envs, corridor=envs)[name]
    played_by = {
        "engine": lambda r: sum(map(len, collect(agent, episodes=episodes, num_envs=envs, seed=r))),
        "naive": lambda r: sum(
            naive.episode(1000 * r + i)
            for i in range(dict(blackjack=16 if size == "1M" else 6, corridor=1)[name])
        ),
        "generate": lambda r: naive.batch(2000 * r, 16),
    }
    for warm_up in (
        lambda: collect(agent, episodes=2, num_envs=2),
        lambda: naive.episode(0),
        lambda: naive.batch(0, 2),
    ):
        warm_up()  # each model is looked at once
    rates: dict[str, list[float]] = {who: [] for who in played_by}
    for r in range(rounds):
        for who, play in played_by.items():
            if who == "generate" and r and arguments.quick:
                continue  # it takes the longest, and the ratio is to `naive`
            with Clock() as clock:
                turns = play(r)
            rates[who].append(turns / clock.cpu)
    ratios = sorted(a / b for a, b in zip(rates["engine"], rates["naive"]))
    before = agent.engine.stats.copy()
    with Meter(
        environments=[(TextEnv, name) for name in ("send_reset", "send", "receive")]
    ) as meter:
        collect(agent, episodes=episodes, num_envs=envs, seed=rounds)
    stats = agent.engine.stats - before
    shares = meter.shares("bookkeeping", **stats.seconds)
    padding = stats.prefill_padding / (stats.prefill_tokens + stats.prefill_padding)
    shared = stats.prefix_hit_tokens / (stats.prefix_hit_tokens + stats.prefill_tokens)
    decoding = stats.sampled_tokens / (stats.steps * envs)
    print(f"  {size} {name} x{envs}, {episodes} episodes: {shares}; {padding:.0%} of what was read was padding; {shared:.0%} of new tokens came from the "
          f"shared prefix; {decoding:.0%} of the slots were decoding", flush=True)  # fmt: skip
    return dict(model=size, environment=name, envs=envs, naive=statistics.median(rates["naive"]), generate=statistics.median(rates["generate"]),
                engine=statistics.median(rates["engine"]), ratio=statistics.median(ratios), low=ratios[0], high=ratios[-1],
                over=statistics.median(rates["engine"]) / statistics.median(rates["generate"]))  # fmt: skip


def floor_of(size: str, rows: int = 32, context: int = 200) -> dict:
    "Compare a decode step of `rows` conversations with its bare matrix products and with reading the cache once"
    model = model_of(size).get_base_model()
    cache, starts, reader = (
        SlotKVCache(model.config.num_hidden_layers),
        np.full(rows, context),
        make_backend(model),
    )
    weights = [
        p
        for name, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in name and "lora" not in name
    ]
    inputs = {
        w.shape[1]: torch.randn(rows, w.shape[1])
        for w in weights + [model.get_output_embeddings().weight]
    }

    def step():
        last = torch.zeros(rows, dtype=torch.long)
        reader.logits(
            reader.forward(cache, torch.zeros(rows, 1, dtype=torch.long), 1, starts, last)
        )

    def products():
        for w in [*weights, model.get_output_embeddings().weight]:
            torch.nn.functional.linear(inputs[w.shape[1]], w)

    def read():
        for states in cache.kv_tensors():
            states[1 : rows + 1, :, : context + 1].sum()

    times = {}
    with torch.no_grad():
        for name, run in (("step", step), ("products", products), ("read", read)):
            run()
            times[name] = min(timed(run) for _ in range(7))
    floor = times["products"] + times["read"]
    return dict(
        model=size,
        step=1e3 * times["step"],
        products=1e3 * times["products"],
        read=1e3 * times["read"],
        ratio=times["step"] / floor,
    )


def timed(run, *args) -> float:
    with Clock() as clock:
        run(*args)
    return clock.cpu


def attend(query: torch.Tensor, tables: list[torch.Tensor], context: int, times: int) -> None:
    "Time attention alone, of one query per row, over the rows of a cache"
    for _ in range(times):
        for keys, values in zip(tables[::2], tables[1::2]):
            torch.nn.functional.scaled_dot_product_attention(
                query,
                keys[1 : len(query) + 1, :, :context],
                values[1 : len(query) + 1, :, :context],
            )


def growth(turns: int = 40, rows: int = 16) -> None:
    "Return the tokens prefilled and the time taken by each of forty turns, and the slope relative to attention alone"
    task = task_of("corridor", turns)
    agent = agent_of("1M", task)
    engine = Engine(agent.policy, (), GenerateConfig(max_new_tokens=NEW_TOKENS))
    prompt, generator = [[1, 20, 30] for _ in range(rows)], np.random.default_rng(0)
    contexts, times, reads = [], [], []
    for _ in range(turns):
        prompt = [ids + generator.integers(20, 800, 30).tolist() for ids in prompt]
        before = engine.stats.copy()
        with Clock() as clock:
            samples = engine.sample(
                prompt,
                [np.random.default_rng(i) for i in range(rows)],
                conversation_ids=list(range(rows)),
            )
        prompt = [ids + sample.ids for ids, sample in zip(prompt, samples)]
        contexts.append(len(prompt[0]))
        times.append(clock.cpu)
        reads.append((engine.stats - before).prefill_tokens / rows)
    slope, offset = np.polyfit(contexts, times, 1)
    config = agent.policy.causal_lm.config
    query = torch.randn(
        rows, config.num_attention_heads, 1, config.hidden_size // config.num_attention_heads
    )
    bare = []
    for context in contexts[:: turns // 8]:
        bare.append(
            min(
                timed(attend, query, engine.runner.cache.kv_tensors(), context, NEW_TOKENS)
                for _ in range(3)
            )
        )
    bare_slope, _ = np.polyfit(contexts[:: turns // 8], bare, 1)
    print(f"\n{turns} turns of {rows} conversations side by side: {min(reads[1:]):.0f} to {max(reads[1:]):.0f} tokens read in each; seconds of a turn = "
          f"{offset:.3f} + {slope * 1e3:.3f} per thousand tokens of context; attention alone over the same cache {bare_slope * 1e3:.3f}, so "
          f"{slope / bare_slope:.2f} times as steep; cache of {engine.nbytes / 2**20:.0f} MB at {contexts[-1]} tokens a conversation")  # fmt: skip


began = time.perf_counter()
print("Where the time goes:")
jobs = [
    ("1M", "blackjack", 32),
    ("1M", "blackjack", 128),
    ("1M", "corridor", 32),
    ("14M", "blackjack", 32),
    ("14M", "corridor", 32),
    ("135M", "blackjack", 32),
]
lines = [
    measure(size, name, envs, arguments.rounds if size == "1M" else 1)
    for size, name, envs in jobs
    if size in arguments.sizes
]
print("\nEnvironment steps per CPU second, and ratios:")
print(
    table(
        lines,
        dict(
            model="",
            environment="",
            envs="",
            naive=".2f",
            generate=".2f",
            engine=".1f",
            ratio=".1f",
            low=".1f",
            high=".1f",
            over=".1f",
        ),
    )
)
print(
    "\nMilliseconds of a decode step of 32 conversations of 200 tokens, and of its floor (the bare matrix products, reading the same cache once):"
)
print(
    table(
        [floor_of(size) for size in arguments.sizes],
        dict(model="", step=".1f", products=".1f", read=".1f", ratio=".2f"),
    )
)
growth()
print(
    f"\n{time.perf_counter() - began:.0f} s in all, torch {torch.__version__}, Python {sys.version.split()[0]}"
)
