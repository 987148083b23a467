"""Measure the player and the training monitor: memory, first paint, frames per second, page size, share of a run.

    python benchmarks/player.py [--quick]

The figures taken in JupyterLab need Chromium and the dev extra, and are left out without them. Memory
is the growth of the process. The tiny model is untrained: its episodes are long, and its responses are
as varied as possible.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
from browser import CHROMIUM, FLAGS, jupyter_lab, open_notebook, watch_errors, write_notebook

from llamagym.agent import Agent
from llamagym.buffer import EpisodeBuffer
from llamagym.config import Config, LoRAConfig
from llamagym.envs.frames import from_png
from llamagym.envs.toy_text import blackjack, frozen_lake, taxi
from llamagym.episodes.episode import Episode
from llamagym.models.policy import Policy
from llamagym.rollout import collect
from llamagym.widgets.player import EpisodePlayer

SETUP = """
import warnings; warnings.simplefilter("ignore")
from llamagym.agent import Agent
from llamagym.buffer import EpisodeBuffer
from llamagym.config import Config, LoRAConfig
from llamagym.widgets.player import EpisodePlayer
from llamagym.models.policy import Policy
from llamagym.envs.baselines import RandomAgent, play
from llamagym.envs.toy_text import frozen_lake
from llamagym.trainer import Trainer
from llamagym.training.cloning import clone
episode = EpisodeBuffer.load({path!r})[0]
tokenizer = Policy.load("tiny").tokenizer
"""
RUN = """
task = frozen_lake(slippery=False)
task.max_steps = 20
config = Config.from_dict({{"generate.max_new_tokens": 6, "rollout": dict(episodes=32, num_envs=32), "ppo.epochs": 2,
                           "trainer": dict(updates={updates}, eval_every=10, eval_episodes=8, checkpoint_every=0, output_dir={folder!r}, stop_if_invalid=1)}})
agent = Agent.for_task(task, Policy.load("tiny", lora=LoRAConfig(r=8)), config=config)
trainer = Trainer(agent)
run = trainer.fit()
monitor = trainer.callbacks[0]
import json, time
print("SHARE", json.dumps(dict(kind=type(monitor).__name__, spent=monitor.budget.spent, run=time.process_time() - monitor.budget.start, updates=len(run.history))))
"""
SCRUB = """async (player) => {
    const slider = player.querySelector('input[type=range]'), last = +slider.max, frame = () => new Promise(requestAnimationFrame);
    const times = [];
    await frame();
    let before = performance.now();
    for (let s = 0; s <= last; s += 1) {
        slider.value = s; slider.dispatchEvent(new Event('input'));
        await frame();
        const now = performance.now(); times.push(now - before); before = now;
    }
    times.sort((a, b) => a - b);
    return { mean: times.reduce((sum, x) => sum + x, 0) / times.length, p95: times[Math.floor(0.95 * times.length)] };
}"""


def megabytes() -> float:
    "Return the resident memory of this process, without what the allocator keeps free"
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def tiny_agent(task, max_steps: int) -> Agent:
    task.max_steps = max_steps
    return Agent.for_task(
        task,
        Policy.load("tiny", lora=LoRAConfig(r=8)),
        config=Config.from_dict({"generate.max_new_tokens": 6}),
    )


def long_episode(turns: int) -> tuple[Agent, Episode]:
    "Return an episode of FrozenLake with pictures, alternatives and all per-token numbers"
    agent = tiny_agent(frozen_lake(slippery=True), 30)
    episodes = collect(agent, episodes=2 * turns, num_envs=32, top_logprobs=4, frames=True)
    agent.learner.compute_advantages(episodes)
    together = [turn for episode in episodes for turn in episode.turns][:turns]
    for turn in together:
        turn.terminated = turn.truncated = False
    return agent, Episode(
        together, env_id="FrozenLake-v1", seed=1, final_frame=episodes[0].final_frame
    )


def memory_of(name: str, task, episodes: int, folder: Path) -> None:
    "Measure a player of many episodes, some of which have been opened"
    random, moves = np.random.default_rng(0), task.make().action_space.n
    task.fallback = lambda obs, info: int(random.integers(moves))
    agent = tiny_agent(task, 20)
    collect(agent, episodes=2, num_envs=2, frames=True)  # what is loaded once
    before = megabytes()
    played = collect(agent, episodes=episodes, num_envs=64, top_logprobs=2, frames=True)
    player = EpisodePlayer(played, agent=agent)
    collected = megabytes()
    for line in player.episodes[:100]:
        json.dumps(player.store.data(line["key"]))
    opened = megabytes()
    turns = sum(map(len, played))
    pictures = {id(turn.frame): len(turn.frame) for episode in played for turn in episode.turns}
    raw = from_png(played[0].turns[0].frame).nbytes
    print(
        f"| {name}: {episodes:,} episodes, {turns:,} turns, {len(pictures):,} different pictures of {sum(pictures.values()) / 1e6:.1f} MB "
        f"(as arrays {turns * raw / 1e6:,.0f} MB) | {collected - before:.0f} MB, {opened - before:.0f} MB after 100 were opened | 200 MB |",
        flush=True,
    )
    path = folder / f"{name}.parquet"
    played.save(path)
    del played, player
    before = megabytes()
    loaded = EpisodeBuffer.load(path)
    print(
        f"| the same, loaded from a file of {path.stat().st_size / 1e6:.1f} MB | {megabytes() - before:.0f} MB | 200 MB |",
        flush=True,
    )
    assert len(loaded) == episodes


def sizes(folder: Path) -> None:
    "Measure pages of fifty turns"
    agent, lake = long_episode(50)
    cards = tiny_agent(blackjack(), 30)
    games = collect(cards, episodes=50, num_envs=50, top_logprobs=4, frames=True)
    cards.learner.compute_values_and_ref_logprobs(games)
    hands = Episode([turn for game in games for turn in game.turns][:50], env_id="Blackjack-v1")
    for name, episode, tokenizer in (
        ("FrozenLake", lake, agent.tokenizer),
        ("Blackjack", hands, cards.tokenizer),
    ):
        page = EpisodePlayer(episode, tokenizer).save(folder / f"{name}.html")
        print(
            f"| page of {len(episode)} turns of {name}, with pictures and alternatives | {page.stat().st_size / 1e6:.2f} MB | 2 MB |"
        )


def in_browser(folder: Path, updates: int) -> None:
    "Measure first paint, scrubbing, requests of a page, and the monitor's share of a run"
    from playwright.sync_api import sync_playwright

    agent, episode = long_episode(200)
    path = folder / "episode.parquet"
    EpisodeBuffer([episode]).save(path)
    write_notebook(
        folder / "player.ipynb",
        SETUP.format(path=str(path)),
        "print('ready')",
        "EpisodePlayer(episode, tokenizer)",
    )
    write_notebook(
        folder / "run.ipynb",
        SETUP.format(path=str(path)),
        RUN.format(updates=updates, folder=str(folder / "run")),
    )
    with jupyter_lab(folder) as address, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True)
        page = browser.new_page(viewport=dict(width=1200, height=900))
        errors = watch_errors(page)
        open_notebook(page, address, "player.ipynb", run=False)
        command = "async (name) => { await window.jupyterapp.commands.execute(name) }"
        for _ in range(2):
            page.evaluate(command, "notebook:run-cell-and-select-next")
        page.locator(".jp-OutputArea-output pre", has_text="ready").wait_for(timeout=120_000)
        began = time.perf_counter()
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-cell') }")
        page.locator(".turn .token").first.wait_for()
        page.locator(".frame img").wait_for()
        first = time.perf_counter() - began
        print(
            f"| first paint of {len(episode)} turns in JupyterLab, from running the cell to tokens and picture | {first:.2f} s | 1 s |"
        )
        rate = page.get_by_role("region", name="Episode player").evaluate(SCRUB)
        print(
            f"| scrubbing through {len(episode)} turns, a step at each frame of the screen | {1000 / rate['mean']:.0f} frames/s "
            f"(95 % within {rate['p95']:.0f} ms) | 30 frames/s |"
        )
        page.close()
        page, requests = browser.new_page(), []
        page.context.set_offline(True)
        page.on(
            "request",
            lambda request: (
                requests.append(request.url)
                if not request.url.startswith(("file:", "blob:", "data:"))
                else None
            ),
        )
        for name in ("FrozenLake", "Blackjack"):
            page.goto(f"file://{folder / name}.html")
            page.locator(".frame img").wait_for()
        print(f"| requests of the two pages, with the network off | {len(requests)} | 0 |")
        page.close()
        page = browser.new_page(viewport=dict(width=1200, height=900))
        open_notebook(page, address, "run.ipynb")
        output = page.locator(".jp-OutputArea-output pre", has_text="SHARE")
        output.wait_for(timeout=900_000)
        seen = json.loads(output.text_content().split("SHARE", 1)[1])
        assert seen["kind"] == "TrainingMonitor", seen
        print(
            f"| monitor of a run of {seen['updates']} updates, page open: {seen['spent']:.2f} of {seen['run']:.0f} s of processor time | "
            f"{seen['spent'] / seen['run']:.2%} | 2 % |"
        )
        if errors:
            print(f"errors in the browser: {errors}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer episodes and updates")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    print("| | measured | to reach |\n|---|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, task in (("FrozenLake", frozen_lake(slippery=True)), ("Taxi", taxi())):
            memory_of(name, task, 100 if quick else 1000, Path(folder))
        sizes(Path(folder))
        if CHROMIUM is None:
            print(
                "Chromium is not installed (Debian: apt-get install chromium): first paint, scrubbing and the monitor were not measured"
            )
        else:
            in_browser(Path(folder), 10 if quick else 40)
