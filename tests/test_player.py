"""The episode player's data, messages and pages, tested without a browser."""

import base64
import dataclasses
import gc
import io
import json
import re
import weakref

import numpy as np
import pytest
from doubles import config, lake, lake_agent, make_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llamagym.agent import Agent
from llamagym.agents.scored import ScoredAgent
from llamagym.envs.toy_text import frozen_lake
from llamagym.episodes.episode import Episode, Turn
from llamagym.models.tiny import tiny_tokenizer
from llamagym.rollout import collect
from llamagym.widgets.animation import animation
from llamagym.widgets.episode_json import (
    FrameTable,
    episode_data,
    summary_data,
    token_data,
    token_texts,
)
from llamagym.widgets.player import (
    MAX_RETAINED_EPISODES,
    EpisodePlayer,
)

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action")
HOSTILE_TEXT = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&lt;<!--"


@pytest.fixture(scope="module")
def agent_and_episodes():
    agent = lake_agent(make_policy("lora"), max_steps=4)
    episodes = collect(agent, episodes=5, num_envs=5, top_logprobs=3, frames=True)
    agent.learner.compute_advantages(episodes)
    return agent, episodes


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_player_token_texts_join_to_the_text(text):
    """A character of several tokens is shown once, at its last token"""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
    assert all("\ufffd" not in t for t in texts) or "\ufffd" in text


def test_player_data_equals_the_episode(agent_and_episodes):
    agent, episodes = agent_and_episodes
    for episode in episodes:
        data = json.loads(
            json.dumps(episode_data(episode, agent.tokenizer, FrameTable()), allow_nan=False)
        )
        assert (data["return"], data["seed"], data["env"]) == (
            episode.total_reward,
            episode.seed,
            "FrozenLake-v1",
        )
        for turn, turn_data in zip(episode.turns, data["turns"]):
            tokens = turn_data["tokens"]
            assert "".join(tokens["text"]) == agent.tokenizer.decode(turn.response_ids)
            assert tokens["logprob"] == pytest.approx(turn.logprobs, abs=1e-5) and tokens[
                "entropy"
            ] == pytest.approx(turn.entropy, abs=1e-5)
            assert tokens["log_ratio"] == pytest.approx(turn.logprobs - turn.ref_logprobs, abs=1e-4)
            assert tokens["value"] == pytest.approx([turn.value] * len(turn.logprobs), abs=1e-5)
            assert turn_data["advantage"] == pytest.approx(turn.advantage, abs=1e-5)
            assert [len(alternatives) for alternatives in tokens["alternatives"]] == [3] * len(
                turn.response_ids
            )
            assert (
                json.loads(turn_data["action"]) == turn.action and turn_data["valid"] == turn.valid
            )
        logprobs = np.concatenate([t.logprobs for t in episode.turns])
        assert summary_data(episode)["surprisal"] == pytest.approx(-logprobs.mean(), abs=1e-5)


def test_player_forced_tokens_have_no_numbers():
    tokenizer = tiny_tokenizer()
    logprobs = np.array([-1, -2], np.float32)
    turn = Turn(
        "", "", [50, 51, 52, 53], forced_positions=[1, 2], logprobs=logprobs, value=float("nan")
    )
    data = token_data(turn, tokenizer)
    assert (
        data["logprob"] == [-1.0, None, None, -2.0]
        and data["forced_positions"] == [1, 2]
        and data["value"] == [None] * 4
        and data["log_ratio"] is None
    )


def test_player_shows_scored_candidates():
    task = lake(3)
    agent = ScoredAgent.for_task(task, make_policy("lora"), config=config())
    episode = collect(agent, episodes=1, num_envs=1)[0]
    for turn, turn_data in zip(episode.turns, episode_data(episode, agent.tokenizer)["turns"]):
        assert (
            turn_data["tokens"] is None
            and [text for text, *_ in turn_data["candidates"]] == turn.candidates
        )
        assert sum(np.exp(p) for _, p, _ in turn_data["candidates"]) == pytest.approx(1, abs=1e-4)
        assert [text for text, _, chosen in turn_data["candidates"] if chosen] == [turn.response]


def test_player_responds_to_requests(agent_and_episodes):
    """Episodes and frames are sent on request; an unknown request gets an error message"""
    agent, episodes = agent_and_episodes
    player, sent = (
        EpisodePlayer(episodes, agent.tokenizer, labels=["first", None, None, None, None]),
        [],
    )
    player.widget.send = lambda content, buffers=None: sent.append((content, buffers))
    assert (
        player.episodes[0]["label"] == "first"
        and len(player.episodes) == 5
        and not player.store.frames.pictures
    )
    player.widget._on_message(
        player.widget, dict(type="episode", episode=player.episodes[2]["key"], id=7), []
    )
    content, _ = sent.pop()
    assert content["id"] == 7 and content["data"] == episode_data(episodes[2], agent.tokenizer)
    key = content["data"]["turns"][0]["frame"]
    player.widget._on_message(player.widget, dict(type="frame", frame=key, id=8), [])
    assert sent.pop() == (dict(id=8), [episodes[2].turns[0].frame])
    for invalid in (
        dict(type="delete", id=9),
        dict(type="episode", episode=99, id=9),
        dict(type="frame", frame="none", id=9),
    ):
        player.widget._on_message(player.widget, invalid, [])
        content, _ = sent.pop()
        assert content["id"] == 9 and content["error"]


def test_player_pages_escape_text(agent_and_episodes, tmp_path):
    """Texts cannot end the page's script or start another, and the page fetches nothing"""
    turn = Turn(
        HOSTILE_TEXT,
        HOSTILE_TEXT,
        reasoning=HOSTILE_TEXT,
        invalid_reason=HOSTILE_TEXT,
        valid=False,
        action=HOSTILE_TEXT,
        terminated=True,
        frame=HOSTILE_TEXT,
    )
    episode = Episode(
        [turn],
        env_id=HOSTILE_TEXT,
        system_prompt=HOSTILE_TEXT,
        demonstrations=[(HOSTILE_TEXT, HOSTILE_TEXT)],
        final_observation=HOSTILE_TEXT,
    )
    page = (
        EpisodePlayer([episode], labels=[HOSTILE_TEXT])
        .save(tmp_path / "deep" / "page.html")
        .read_text()
    )
    assert (
        page.count("<script") == 1 == page.count("</script>")
        and page.count("<img") == 0
        and "<!--" not in page
    )
    assert "default-src 'none'" in page and not re.search(r"""(src|href)=["']?https?:""", page)
    state = re.search(r"const state = (\{.*\});", page)[1]
    assert json.loads(state)["data"]["1"]["turns"][0]["observation"] == HOSTILE_TEXT


def test_player_pages_are_small_and_reproducible(agent_and_episodes, tmp_path):
    """Fifty turns with frames, alternatives and all numbers take less than 2 MB"""
    agent, episodes = agent_and_episodes
    turns = [turn for episode in episodes for turn in episode.turns]
    long = Episode([turns[i % len(turns)] for i in range(50)], env_id="FrozenLake-v1")
    first, second = (
        EpisodePlayer(long, agent.tokenizer).save(tmp_path / name).read_bytes()
        for name in ("a.html", "b.html")
    )
    assert first == second and len(first) < 2_000_000


def test_player_is_displayed_as_widget_page_picture_or_text(agent_and_episodes, monkeypatch):
    """A widget in a notebook, a page in the docs, a picture or text in a committed notebook"""
    agent, episodes = agent_and_episodes
    player = EpisodePlayer(episodes, agent.tokenizer)
    for name in ("IN_TEST", "LLAMAGYM_DOCS"):
        monkeypatch.delenv(name, raising=False)
    assert "application/vnd.jupyter.widget-view+json" in str(player._repr_mimebundle_())
    monkeypatch.setenv("IN_TEST", "1")
    assert base64.b64decode(player._repr_mimebundle_()["image/png"]) == animation(episodes[0])
    without_frames = EpisodePlayer(
        dataclasses.replace(
            episodes[0], turns=[dataclasses.replace(turn, frame=None) for turn in episodes[0].turns]
        )
    )
    assert (
        set(without_frames._repr_mimebundle_()) == {"text/plain"}
        and "turn 0" in without_frames._repr_mimebundle_()["text/plain"]
    )
    monkeypatch.setenv("LLAMAGYM_DOCS", "1")
    assert "<script" in player._repr_mimebundle_()["text/html"]
    assert (
        repr(player) == "EpisodePlayer(5 episodes of FrozenLake-v1)"
        and repr(EpisodePlayer([])) == "EpisodePlayer(0 episodes)"
    )


def test_player_animation_shows_each_step(agent_and_episodes):
    """Frames are shown in the colors of a shared palette; without frames there is no animation"""
    _, episodes = agent_and_episodes
    picture = Image.open(io.BytesIO(animation(episodes[0])))
    # equal steps are merged
    assert picture.n_frames <= len(episodes[0]) + 1 and picture.info["loop"] == 0
    expected = Image.open(io.BytesIO(episodes[0].turns[0].frame)).convert("RGB")
    expected.thumbnail((196, 196))
    left, top = 8 + (196 - expected.width) // 2, 8 + (196 - expected.height) // 2
    pixels = np.asarray(picture.convert("RGB"), dtype=int)[
        top : top + expected.height, left : left + expected.width
    ]
    assert np.abs(pixels - np.asarray(expected, dtype=int)).mean() < 4
    hostile = Turn(
        HOSTILE_TEXT * 9 + "\x1b[31m\u202e\0", HOSTILE_TEXT * 9, frame=np.zeros((8, 8, 3), np.uint8)
    )
    assert Image.open(io.BytesIO(animation(Episode([hostile])))).size == (640, 212)
    assert animation(Episode([Turn("a", "b", frame="text")])) is None is animation(Episode())


def test_player_branches_from_a_turn(agent_and_episodes):
    """A request sends only the changed texts; the branch is listed with all its numbers"""
    agent, episodes = agent_and_episodes
    player, sent = EpisodePlayer(episodes, agent=agent), []
    player.widget.send = lambda content, buffers=None: sent.append((content, buffers))
    assert (
        player.widget.can_branch and not EpisodePlayer(episodes, agent.tokenizer).widget.can_branch
    )
    player.widget._on_message(
        player.widget,
        dict(
            type="branch",
            episode=player.episodes[3]["key"],
            turn=1,
            changes=dict(response_prefix="I", observation="Row 4."),
            id=1,
        ),
        [],
    )
    content, _ = sent.pop()
    assert (
        content == dict(id=1, branch_key=player.episodes[-1]["key"]) and len(player.episodes) == 6
    )
    data = player.store.data(content["branch_key"])
    assert (
        data["turns"][1]["observation"] == "Row 4."
        and data["turns"][1]["tokens"]["forced_positions"] == [0]
        and data["seed"] == episodes[3].seed
    )
    assert (
        data["turns"][0]["frame"]
        == player.store.data(player.episodes[3]["key"])["turns"][0]["frame"]
    )
    assert (
        all(turn["value"] is not None for turn in data["turns"])
        and data["turns"][-1]["tokens"]["log_ratio"][-1] is not None
    )
    assert [player.episodes[i]["key"] for i in range(5)] == list(range(1, 6))
    player.widget._on_message(
        player.widget,
        dict(type="branch", episode=content["branch_key"], turn=0, changes={}, id=2),
        [],
    )
    assert sent.pop()[0]["branch_key"] == player.episodes[-1]["key"]
    player.widget._on_message(
        player.widget,
        dict(type="branch", episode=1, turn=0, changes=dict(response_prefix="word " * 20), id=3),
        [],
    )
    assert "leaves nothing to sample" in sent.pop()[0]["error"] and len(player.episodes) == 7
    assert not agent.buffer


def test_player_show_replaces_the_listed_episodes(agent_and_episodes):
    """Listed episodes keep their keys, removed ones are retained, duplicates are listed twice"""
    agent, episodes = agent_and_episodes
    player = EpisodePlayer(episodes[:3], agent.tokenizer)
    frame_key = player.store.data(1)["turns"][0]["frame"]
    player.show([episodes[4], episodes[1], episodes[1]], ["new", None, "again"])
    assert [(e["key"], e["label"]) for e in player.episodes] == [
        (4, "new"),
        (2, None),
        (5, "again"),
    ]
    player.show(episodes[3:])
    assert [e["key"] for e in player.episodes] == [6, 4]
    assert player.store.data(1)["seed"] == episodes[0].seed
    assert player.store.picture(frame_key) == episodes[0].turns[0].frame
    for i in range(MAX_RETAINED_EPISODES + 1):
        player.show([Episode([Turn("", str(i))])])
    with pytest.raises(KeyError, match="no longer stored"):
        player.store.data(1)
    assert len(player.store.retained) == MAX_RETAINED_EPISODES


def test_player_branches_from_a_retained_episode(agent_and_episodes):
    """The original is listed again, and the player does not keep the agent alive"""
    policy = make_policy("lora")
    agent = lake_agent(policy, max_steps=4)
    episodes = collect(agent, episodes=2, num_envs=2)
    player = EpisodePlayer(episodes, agent=agent)
    player.show([])
    branch_key = player.branch(1, 1)
    assert [e["seed"] for e in player.episodes] == [episodes[0].seed] * 2 and player.episodes[-1][
        "key"
    ] == branch_key
    assert (
        player.branches[0] == (episodes[0], None)
        and player.branches[1][0].info["branch"]["turn"] == 1
    )
    agent_ref = weakref.ref(agent)
    del agent
    gc.collect()
    assert agent_ref() is None
    with pytest.raises(RuntimeError, match="the agent that played is gone"):
        player.branch(1, 1)


def test_player_restores_the_snapshots_of_the_episode():
    """Snapshots of another episode with the same index are not used"""
    agent = Agent.for_task(frozen_lake(slippery=True), make_policy("lora"), config=config())
    agent.task.max_steps = 5
    agent.task.fallback = lambda obs, info: 2
    first, second = (
        collect(agent, episodes=3, num_envs=3, seed=seed, snapshots=True, frames=True)
        for seed in (0, 7)
    )
    player = EpisodePlayer(first, agent=agent)
    player.show(second)
    for rollout, keys in ((second, (4, 5, 6)), (first, (1, 2, 3))):
        for key, episode in zip(keys, rollout):
            last = len(episode) - 1
            data = player.store.data(player.branch(key, last))
            assert [turn["observation"] for turn in data["turns"][: last + 1]] == [
                turn.observation for turn in episode.turns
            ]


def test_player_data_of_scripted_episodes():
    """Episodes of a scripted agent have texts and rewards, but no tokens"""
    data = episode_data(Episode([Turn("a", "b", action=np.int64(2), reward=1.0)]))
    assert (
        data["turns"][0]["tokens"] is None
        and data["turns"][0]["action"] == "2"
        and data["end"] == "not over"
    )
