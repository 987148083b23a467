"""Compare the planner's memory forecast with a measurement on a CUDA device; without one, print the forecast.

    python benchmarks/gpu_memory.py                       # the usual pairs of a model and a card
    python benchmarks/gpu_memory.py --pairs qwen2.5-7b:16GB llama-3.2-3b:12GB --turns 40

Models have real shapes, random 4-bit weights and a LoRA adapter of rank 16 on all linear layers. One
episode per environment is played in parallel and then trained on, with the settings that
`llamagym.training.planner.plan` suggests for the card. Totals of rollout and update include the
static part; GB are 10**9 bytes.

Each pair runs in its own process, whose allocator is limited to the card's memory once the model is
loaded (it is created in bfloat16 first). A small rollout and update run first, so that the
optimizer's moments exist. `allocated` and `reserved` are the allocator's peaks. It counts neither the
CUDA context nor the paged moments of an 8-bit optimizer, so `forecast` is the planner's without its
allowance for overhead; `loaded` is weights and adapters alone, `ratio` is allocated / forecast.
Tokens per second count sampled tokens in the rollout and all tokens of rows, prompts included, in the
update. `micro-batch` shows the size it was halved to, if memory ran out and the update went on.
"""

import argparse
import datetime
import functools
import gc
import multiprocessing
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from resumable import end_with_parent
from shapes import SHAPES, config_of_shape, model_of
from workloads import NEW_TOKENS, Corridor, any_response, table

from llamagym.agent import Agent
from llamagym.chat.conversation import Conversation
from llamagym.config import Config
from llamagym.envs.task import Task
from llamagym.inference.kv_cache import OutOfMemory
from llamagym.models.policy import Policy
from llamagym.models.tiny import tiny_tokenizer
from llamagym.rollout import collect
from llamagym.training.memory_tracking import gpu_memory_bytes, parse_bytes
from llamagym.training.planner import CUDA_OVERHEAD_BYTES, Plan, plan

PAIRS = [
    "qwen2.5-0.5b:8GB",
    "llama-3.2-1b:8GB",
    "qwen2.5-1.5b:8GB",
    "qwen2.5-3b:12GB",
    "llama-3.2-3b:16GB",
    "qwen2.5-7b:24GB",
    "llama-3.1-8b:24GB",
]
FORECAST = dict(
    model="",
    card="",
    weights=".2f",
    static=".2f",
    rollout=".2f",
    update=".2f",
    peak=".2f",
    fits="",
    settings="",
)
MEASURED = dict(
    model="",
    card="",
    phase="",
    allocated=".2f",
    reserved=".2f",
    forecast=".2f",
    ratio=".2f",
    context=",",
) | {"tokens/s": ",.0f"}
MEASURED |= {"micro-batch": "", "settings": "", "result": ""}


def base_config(envs: int) -> Config:
    "Return the settings that the planner starts from"
    options = {
        "model.quantize": "nf4",
        "model.lora": {"r": 16},
        "generate.max_new_tokens": NEW_TOKENS,
        "rollout.num_envs": envs,
    }
    return Config.from_dict(
        options | {"rollout.episodes": envs, "ppo.epochs": 1, "ppo.mini_batch_size": 64}
    )


def settings(found: Plan) -> str:
    "Describe the planner's suggestion"
    if found.suggestion is None:
        return "none helps"
    return (
        ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in found.suggestion.items())
        or "as given"
    )


def fitting(found: Plan) -> Plan:
    "Return the plan with its suggested settings, or as it is if there are none"
    return found.with_options(found.suggestion or {})


def task_of(turns: int, tokens: int) -> Task:
    "Return a task whose turns have a given number of tokens, response included, without a shared prefix"
    tokenizer = tiny_tokenizer()

    def text(obs, words: int) -> str:
        return f"{obs[1]} is your position at step {obs[0]}" + " wall" * words

    def taken(words: int) -> int:
        conversation = Conversation(tokenizer)
        before = len(conversation.add_user(text((10, 10), words)))
        conversation.add_response([tokenizer.pad_token_id] * NEW_TOKENS, False)
        return len(conversation.add_user(text((11, 10), words))) - before

    words = tokens - taken(0)
    if words < 0:
        raise ValueError(
            f"tokens={tokens}: expected at least {taken(0)}, of which {NEW_TOKENS} are the response's"
        )
    return Task(
        functools.partial(Corridor, turns),
        lambda obs, info: text(obs, words),
        any_response,
        lambda action: f"Action: {action}",
        name="corridor",
    )


def with_peaks(phase: str, step: Callable[[], object]) -> tuple[object, dict]:
    "Call a function; return its result (`None` if memory ran out), wall seconds and allocator peaks in GB"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    began = time.perf_counter()
    try:
        made, result = step(), "done"
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        print(f"while {phase}: {error}", file=sys.stderr, flush=True)
        made, result = None, "out of memory"
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    allocated, reserved = (
        torch.cuda.max_memory_allocated() / 10**9,
        torch.cuda.max_memory_reserved() / 10**9,
    )
    return made, dict(
        phase=phase, seconds=seconds, allocated=allocated, reserved=reserved, result=result
    )


def loop(policy: Policy, config: Config, turns: int, tokens: int) -> list[dict]:
    "Run a rollout and an update, a row each, as far as memory reaches"
    agent = Agent.for_task(task_of(turns, tokens), policy, config=config)

    def play(count: int):
        return collect(agent, episodes=count, num_envs=min(count, config.rollout.num_envs))

    stats, begun = with_peaks("setting up", lambda: agent.learner.update(play(2)))
    if stats is None:
        return [begun]
    episodes, playing = with_peaks("rollout", lambda: play(config.rollout.episodes))
    if episodes is None:
        return [playing]
    rows = [len(segment.ids) for episode in episodes for segment in episode.segments]
    sampled = sum(len(turn.response_ids) for episode in episodes for turn in episode.turns)
    playing |= {"context": max(rows), "tokens/s": sampled / playing["seconds"]}
    stats, learning = with_peaks("update", lambda: agent.learner.update(episodes))
    if stats is not None:
        learning["tokens/s"] = config.ppo.epochs * sum(rows) / learning["seconds"]
    asked, left = config.ppo.token_budget, agent.learner.token_budget.tokens
    learning["micro-batch"] = f"{asked:,}" if left == asked else f"{asked:,} halved to {left:,}"
    return [playing, learning]


def measure_pair(name: str, card: str, config: Config, turns: int, tokens: int) -> list[dict]:
    "Measure a model on a card, in this process"
    warnings.simplefilter("ignore")
    policy = Policy(model_of(name, "nf4"), tiny_tokenizer())
    policy.set_reference()
    gc.collect()
    torch.cuda.empty_cache()
    allocated, reserved = (
        torch.cuda.memory_allocated() / 10**9,
        torch.cuda.memory_reserved() / 10**9,
    )
    torch.cuda.set_per_process_memory_fraction(parse_bytes(card) / gpu_memory_bytes())
    return [
        dict(phase="loaded", allocated=allocated, reserved=reserved, result="done"),
        *loop(policy, config, turns, tokens),
    ]


def measure_pair_in_subprocess(*job) -> list[dict]:
    "Run `measure_pair` in a child process; a failure is its result"
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent
    ) as pool:
        try:
            return pool.submit(measure_pair, *job).result()
        except Exception as error:
            traceback.print_exception(error)
            return [dict(result=type(error).__name__)]


def beside_forecast(row: dict, planned: Plan) -> dict:
    "Return a row beside the planner's forecast, in GB"
    if row.get("phase") in ("rollout", "update"):
        forecast = planned.size(row["phase"]) - CUDA_OVERHEAD_BYTES
    elif row.get("phase") == "loaded":
        forecast = sum(item.size for item in planned.items if item.name in ("weights", "adapters"))
    else:
        return row
    return row | dict(forecast=forecast / 10**9, ratio=row["allocated"] * 10**9 / forecast)


def forecast_of(found: Plan, settings: str) -> dict:
    "Return the planner's forecast in GB"
    weights = next(item.size for item in found.items if item.name == "weights")
    sizes = dict(weights=weights, peak=found.peak) | {
        phase: found.size(phase) for phase in ("static", "rollout", "update")
    }
    return {name: size / 10**9 for name, size in sizes.items()} | dict(
        fits="yes" if found.fits else "no", settings=settings
    )


def forecasts(plans: dict[tuple[str, str], Plan]) -> list[dict]:
    "Print the forecast of each pair, with the initial and with the suggested settings"
    rows = []
    for (name, card), found in plans.items():
        rows.append(
            dict(model=name, card=card)
            | forecast_of(
                found, "as given, and none helps" if found.suggestion is None else "as given"
            )
        )
        if found.suggestion:
            rows.append(forecast_of(fitting(found), settings(found)))
    return rows


def measurements(plans: dict[tuple[str, str], Plan], turns: int, tokens: int) -> list[dict]:
    "Measure each pair and print it as soon as it is done"
    rows = []
    for (name, card), found in plans.items():
        planned = fitting(found)
        found_rows = [
            dict(model=name, card=card) | beside_forecast(row, planned)
            for row in measure_pair_in_subprocess(name, card, planned.config, turns, tokens)
        ]
        found_rows[0]["settings"] = settings(found)
        print(f"{table(found_rows, MEASURED)}\n", flush=True)
        rows += found_rows
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs",
        nargs="+",
        metavar="MODEL:MEMORY",
        default=PAIRS,
        help=f"of {', '.join(SHAPES)} (default: {' '.join(PAIRS)})",
    )
    parser.add_argument(
        "--turns", type=int, default=20, help="of an episode (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=200,
        help="of a turn, the response included (default: %(default)s)",
    )
    parser.add_argument(
        "--envs",
        type=int,
        default=16,
        help="side by side, and episodes of an update (default: %(default)s)",
    )
    args = parser.parse_args()
    plans: dict[tuple[str, str], Plan] = {}
    for pair in args.pairs:
        name, _, card = pair.partition(":")
        if name not in SHAPES:
            parser.error(
                f"--pairs {pair}: expected a model of {', '.join(SHAPES)}, a colon and the memory of a card"
            )
        try:
            plans[name, card] = plan(
                config_of_shape(name), card, args.turns, args.tokens, base_config(args.envs)
            )
        except ValueError as error:
            parser.error(f"--pairs {pair}: {error}")
    about = f"{args.envs} environments and episodes, {args.turns} turns of {args.tokens} tokens, responses of {NEW_TOKENS}; 4-bit weights, LoRA of rank 16"
    if not torch.cuda.is_available():
        print(
            f"FORECASTS of the memory planner: there is no CUDA device here, nothing was measured.\n{about}; in GB\n"
        )
        print(table(forecasts(plans), FORECAST))
        return 0
    if larger := [card for _, card in plans if parse_bytes(card) > gpu_memory_bytes()]:
        parser.error(
            f"the device has {gpu_memory_bytes() / 10**9:.1f} GB, less than {', '.join(larger)}"
        )
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {datetime.date.today()}\n{about}; in GB\n",
        flush=True,
    )
    print(table(measurements(plans, args.turns, args.tokens), MEASURED))
    return 0


if __name__ == "__main__":
    sys.exit(main())
