"""Frames of an environment are rendered for each turn, stored once and saved."""

import gymnasium as gym
import numpy as np
import pytest
from doubles import config, lake, lake_agent, make_policy, walk_task
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
from gymnasium.error import DependencyNotInstalled

from llamagym.agent import Agent
from llamagym.buffer import EpisodeBuffer
from llamagym.envs.frames import FrameCache, as_png, from_png, render_frame, rendering_factory
from llamagym.envs.toy_text import blackjack
from llamagym.rollout import collect

pytest.importorskip("pygame")
pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action")


def render_again(episode, size=256) -> list[bytes]:
    """Return the frames that Gymnasium alone renders for the seed and the actions of an episode"""
    env = gym.make("FrozenLake-v1", is_slippery=False, render_mode="rgb_array")
    env.reset(seed=episode.seed)
    frames = [as_png(env.render(), size)]
    for turn in episode.turns:
        env.step(turn.action)
        frames.append(as_png(env.render(), size))
    env.close()
    return frames


@pytest.mark.parametrize(
    "options", [dict(), dict(workers=True), dict(frames=64)], ids=["here", "processes", "small"]
)
def test_frames_show_the_observations(options, cloned_policy):
    """Each turn has the frame of its observation, and equal frames are one object"""
    agent = lake_agent(cloned_policy("lora"), max_steps=5)
    episodes = collect(agent, episodes=6, num_envs=3, seed=2, **(dict(frames=True) | options))
    for episode in episodes:
        assert [*(turn.frame for turn in episode.turns), episode.final_frame] == render_again(
            episode, options.get("frames", 256)
        )
    frames = [turn.frame for turn in episodes.turns]
    assert len({id(p) for p in frames}) == len(set(frames)) < len(frames)
    assert max(from_png(frames[0]).shape) == options.get("frames", 256)


def test_frames_do_not_change_the_episodes(cloned_policy, tmp_path):
    plain, rendered = (
        collect(
            lake_agent(cloned_policy("lora"), max_steps=5), episodes=4, num_envs=2, frames=frames
        )
        for frames in (False, True)
    )
    assert all(turn.frame is None for turn in plain.turns)
    assert EpisodeBuffer.load(
        EpisodeBuffer(rendered).save(tmp_path / "episodes.parquet")
    ) == EpisodeBuffer(rendered)
    for episode in rendered:
        episode.final_frame = None
        for turn in episode.turns:
            turn.frame = None
    assert list(plain) == list(rendered)


def test_frames_without_pygame_are_text(monkeypatch):
    """A warning names the package to install"""

    def raise_not_installed(self, mode):
        raise DependencyNotInstalled(
            'pygame is not installed, run `pip install "gymnasium[toy-text]"`'
        )

    monkeypatch.setattr(FrozenLakeEnv, "_render_gui", raise_not_installed)
    with pytest.warns(
        UserWarning,
        match="FrozenLake-v1 is not rendered as pictures: pygame is not installed, run .pip install",
    ):
        episodes = collect(
            lake_agent(make_policy("plain"), max_steps=2), episodes=1, num_envs=1, frames=True
        )
    assert all(
        "SFFF" in turn.frame.replace("\x1b[41m", "").replace("\x1b[0m", "")
        for turn in episodes.turns
    )


def test_frames_without_a_render_mode_are_none():
    """A factory that sets its own render mode keeps it"""
    policy = make_policy("plain")
    assert all(
        t.frame is None
        for t in collect(
            Agent.for_task(walk_task(2), policy, config=config()),
            episodes=2,
            num_envs=2,
            frames=True,
        ).turns
    )
    task = lake(2)
    task.env = lambda: gym.make("FrozenLake-v1", is_slippery=False, render_mode="ansi")
    assert all(
        "F" in t.frame
        for t in collect(
            Agent.for_task(task, policy, config=config()), episodes=1, num_envs=1, frames=True
        ).turns
    )
    assert (
        rendering_factory(task.env) is None
        and rendering_factory(gym.make("FrozenLake-v1", render_mode="ansi")) is None
    )


def test_frames_factory_keeps_the_time_limit():
    env = rendering_factory("FrozenLake-v1", 7)()
    assert env.spec.max_episode_steps == 7 and isinstance(
        render_frame(env) if env.reset() else None, np.ndarray
    )


def test_frames_of_many_episodes_are_small():
    """Frames of Blackjack are stored once and compressed, far smaller than their arrays"""
    task, policy = blackjack(), make_policy("plain")
    episodes = collect(
        Agent.for_task(task, policy, config=config()), episodes=60, num_envs=30, frames=True
    )
    sizes = {id(p): len(p) for e in episodes for p in [*(t.frame for t in e.turns), e.final_frame]}
    assert sum(sizes.values()) < 60 * 2 * 376 * 384 * 3 / 50


@pytest.mark.parametrize(
    "frame, description",
    [
        (np.zeros((4, 4), np.uint8), r"uint8\[4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), r"uint8\[4, 4, 4\]"),
        (3, "int"),
    ],
)
def test_frames_bad_input_raises(frame, description):
    with pytest.raises(TypeError, match=f"a frame is {description}: expected a uint8 array"):
        FrameCache().encode(frame)


def test_frames_loaded_from_a_file_are_stored_once(tmp_path):
    agent = lake_agent(make_policy("lora"))
    episodes = collect(agent, episodes=3, num_envs=3, frames=True)
    episodes.save(tmp_path / "e.parquet")
    loaded = EpisodeBuffer.load(tmp_path / "e.parquet")
    frames = [turn.frame for episode in loaded for turn in episode.turns]
    assert list(loaded) == list(episodes) and len(set(map(id, frames))) == len(set(frames)) < len(
        frames
    )
