"""Pictures of an environment: what is drawn at each turn, kept once, saved, and what happens where nothing can be drawn."""

import gymnasium as gym
import numpy as np
import pytest
from doubles import config, lake, lake_agent, make_policy, walk_task
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
from gymnasium.error import DependencyNotInstalled

from llamagym.agent import Agent
from llamagym.buffer import EpisodeBuffer
from llamagym.frames import Frames, as_png, draw, drawing, from_png
from llamagym.rollout import collect
from llamagym.task import blackjack

pytest.importorskip("pygame")
pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action")


def replayed(episode, size=256) -> list[bytes]:
    """The pictures of an episode, drawn again by Gymnasium alone: reset with its seed, its actions taken"""
    env = gym.make("FrozenLake-v1", is_slippery=False, render_mode="rgb_array")
    env.reset(seed=episode.seed)
    pictures = [as_png(env.render(), size)]
    for turn in episode.turns:
        env.step(turn.action)
        pictures.append(as_png(env.render(), size))
    env.close()
    return pictures


@pytest.mark.parametrize("how", [dict(), dict(workers=True), dict(frames=64)], ids=["here", "processes", "small"])
def test_frames_are_what_was_asked_about(how, taught):
    """Each turn has the picture of its observation, the episode that of its end; they are kept once"""
    agent = lake_agent(taught("lora"), max_steps=5)
    episodes = collect(agent, episodes=6, num_envs=3, seed=2, **(dict(frames=True) | how))
    for episode in episodes:
        assert [*(turn.frame for turn in episode.turns), episode.final_frame] == replayed(episode, how.get("frames", 256))
    pictures = [turn.frame for turn in episodes.turns]
    assert len({id(p) for p in pictures}) == len(set(pictures)) < len(pictures)
    assert max(from_png(pictures[0]).shape) == how.get("frames", 256)


def test_frames_change_nothing_else(taught, tmp_path):
    plain, drawn = (collect(lake_agent(taught("lora"), max_steps=5), episodes=4, num_envs=2, frames=frames) for frames in (False, True))
    assert all(turn.frame is None for turn in plain.turns)
    assert EpisodeBuffer.load(EpisodeBuffer(drawn).save(tmp_path / "episodes.parquet")) == EpisodeBuffer(drawn)
    for episode in drawn:
        episode.final_frame = None
        for turn in episode.turns:
            turn.frame = None
    assert list(plain) == list(drawn)


def test_frames_without_pygame_are_text(monkeypatch):
    """Said once an environment, with what to install"""

    def missing(self, mode):
        raise DependencyNotInstalled('pygame is not installed, run `pip install "gymnasium[toy-text]"`')

    monkeypatch.setattr(FrozenLakeEnv, "_render_gui", missing)
    with pytest.warns(UserWarning, match="FrozenLake-v1 is not drawn: pygame is not installed, run .pip install"):
        episodes = collect(lake_agent(make_policy("plain"), max_steps=2), episodes=1, num_envs=1, frames=True)
    assert all("SFFF" in turn.frame.replace("\x1b[41m", "").replace("\x1b[0m", "") for turn in episodes.turns)


def test_frames_of_what_cannot_be_drawn_are_none():
    """A factory's environment that was not told to draw; one that draws decided for itself"""
    policy = make_policy("plain")
    assert all(t.frame is None for t in collect(Agent.for_task(walk_task(2), policy, config=config()), episodes=2, num_envs=2, frames=True).turns)
    task = lake(2)
    task.env = lambda: gym.make("FrozenLake-v1", is_slippery=False, render_mode="ansi")
    assert all("F" in t.frame for t in collect(Agent.for_task(task, policy, config=config()), episodes=1, num_envs=1, frames=True).turns)
    assert drawing(task.env) is None and drawing(gym.make("FrozenLake-v1", render_mode="ansi")) is None


def test_frames_keep_the_time_limit():
    env = drawing("FrozenLake-v1", 7)()
    assert env.spec.max_episode_steps == 7 and isinstance(draw(env) if env.reset() else None, np.ndarray)


def test_frames_of_many_games_are_small():
    """Pictures of Blackjack's tables, kept once and compressed: far less than the arrays would be"""
    task, policy = blackjack(), make_policy("plain")
    episodes = collect(Agent.for_task(task, policy, config=config()), episodes=60, num_envs=30, frames=True)
    pictures = {id(p): len(p) for e in episodes for p in [*(t.frame for t in e.turns), e.final_frame]}
    assert sum(pictures.values()) < 60 * 2 * 376 * 384 * 3 / 50


@pytest.mark.parametrize("frame, what", [(np.zeros((4, 4), np.uint8), r"uint8\[4, 4\]"), (np.zeros((4, 4, 4), np.uint8), r"uint8\[4, 4, 4\]"), (3, "int")])
def test_frames_bad_input(frame, what):
    with pytest.raises(TypeError, match=f"a frame is {what}: expected a uint8 array"):
        Frames().keep(frame)


def test_frames_of_a_file_are_kept_once(tmp_path):
    agent = lake_agent(make_policy("lora"))
    episodes = collect(agent, episodes=3, num_envs=3, frames=True)
    episodes.save(tmp_path / "e.parquet")
    loaded = EpisodeBuffer.load(tmp_path / "e.parquet")
    pictures = [turn.frame for episode in loaded for turn in episode.turns]
    assert list(loaded) == list(episodes) and len(set(map(id, pictures))) == len(set(pictures)) < len(pictures)
