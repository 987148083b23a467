"""The episode player, as far as it goes without a browser: its data against the episodes, its messages, its pages."""

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
from llamagym.buffer import Episode, Turn
from llamagym.player import PAST, EpisodePlayer, FrameTable, animation, episode_data, summary_data, token_data, token_texts
from llamagym.rollout import collect
from llamagym.scored import ScoredAgent
from llamagym.task import frozen_lake
from llamagym.tiny import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action")
RUDE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&lt;<!--"


@pytest.fixture(scope="module")
def played():
    agent = lake_agent(make_policy("lora"), max_steps=4)
    episodes = collect(agent, episodes=5, num_envs=5, top=3, frames=True)
    agent.learner.annotate(episodes)
    agent.learner.assign_credit(episodes)
    return agent, episodes


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_player_texts_of_tokens_are_the_text(text):
    """Whatever it is made of; a letter in pieces is shown once, where it ends"""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
    assert all("\ufffd" not in t for t in texts) or "\ufffd" in text


def test_player_numbers_are_the_episodes(played):
    agent, episodes = played
    for episode in episodes:
        data = json.loads(json.dumps(episode_data(episode, agent.tokenizer, FrameTable()), allow_nan=False))
        assert (data["return"], data["seed"], data["env"]) == (episode.total_reward, episode.seed, "FrozenLake-v1")
        for turn, shown in zip(episode.turns, data["turns"]):
            tokens = shown["tokens"]
            assert "".join(tokens["text"]) == agent.tokenizer.decode(turn.response_ids)
            assert tokens["logprob"] == pytest.approx(turn.logprobs, abs=1e-5) and tokens["entropy"] == pytest.approx(turn.entropy, abs=1e-5)
            assert tokens["kl"] == pytest.approx(turn.logprobs - turn.ref_logprobs, abs=1e-4)
            assert tokens["value"] == pytest.approx([turn.value] * len(turn.logprobs), abs=1e-5)
            assert shown["advantage"] == pytest.approx(turn.advantage, abs=1e-5)
            assert [len(others) for others in tokens["alternatives"]] == [3] * len(turn.response_ids)
            assert json.loads(shown["action"]) == turn.action and shown["valid"] == turn.valid
        logprobs = np.concatenate([t.logprobs for t in episode.turns])
        assert summary_data(episode)["surprise"] == pytest.approx(-logprobs.mean(), abs=1e-5)


def test_player_tokens_that_were_given_have_no_numbers():
    tokenizer = tiny_tokenizer()
    logprobs = np.array([-1, -2], np.float32)
    turn = Turn("", "", [50, 51, 52, 53], given=[1, 2], logprobs=logprobs, value=float("nan"))
    data = token_data(turn, tokenizer)
    assert data["logprob"] == [-1.0, None, None, -2.0] and data["given"] == [1, 2] and data["value"] == [None] * 4 and data["kl"] is None


def test_player_of_choices_shows_what_was_weighed():
    task = lake(3)
    agent = ScoredAgent.for_task(task, make_policy("lora"), config=config())
    episode = collect(agent, episodes=1, num_envs=1)[0]
    for turn, shown in zip(episode.turns, episode_data(episode, agent.tokenizer)["turns"]):
        assert shown["tokens"] is None and [text for text, *_ in shown["choices"]] == turn.candidates
        assert sum(np.exp(p) for _, p, _ in shown["choices"]) == pytest.approx(1, abs=1e-4)
        assert [text for text, _, chosen in shown["choices"] if chosen] == [turn.response]


def test_player_answers_what_is_asked(played):
    """An episode when it is opened, a picture once; a question it does not know is answered with an error, not with silence"""
    agent, episodes = played
    player, sent = EpisodePlayer(episodes, agent.tokenizer, labels=["first", None, None, None, None]), []
    player.send = lambda content, buffers=None: sent.append((content, buffers))
    assert player.episodes[0]["label"] == "first" and len(player.episodes) == 5 and not player._frames.pictures
    player._heard(player, dict(type="episode", episode=player.episodes[2]["key"], id=7), [])
    content, _ = sent.pop()
    assert content["id"] == 7 and content["data"] == episode_data(episodes[2], agent.tokenizer)
    key = content["data"]["turns"][0]["frame"]
    player._heard(player, dict(type="frame", frame=key, id=8), [])
    assert sent.pop() == (dict(id=8), [episodes[2].turns[0].frame])
    for bad in (dict(type="delete", id=9), dict(type="episode", episode=99, id=9), dict(type="frame", frame="none", id=9)):
        player._heard(player, bad, [])
        content, _ = sent.pop()
        assert content["id"] == 9 and content["error"]


def test_player_pages_hold_text_as_text(played, tmp_path):
    """What a model or an environment says can't end the script it is data of, nor begin another; nothing may be fetched"""
    turn = Turn(RUDE, RUDE, thought=RUDE, invalid_reason=RUDE, valid=False, action=RUDE, terminated=True, frame=RUDE)
    episode = Episode([turn], env_id=RUDE, system_prompt=RUDE, final_observation=RUDE)
    page = EpisodePlayer([episode], labels=[RUDE]).save(tmp_path / "deep" / "page.html").read_text()
    assert page.count("<script") == 1 == page.count("</script>") and page.count("<img") == 0 and "<!--" not in page
    assert "default-src 'none'" in page and not re.search(r"""(src|href)=["']?https?:""", page)
    state = re.search(r"state = (\{.*\}), heard = \[\];", page)[1]
    assert json.loads(state)["data"]["1"]["turns"][0]["observation"] == RUDE


def test_player_pages_are_small_and_the_same_again(played, tmp_path):
    """Fifty turns with pictures, alternatives and all numbers: under 2 MB"""
    agent, episodes = played
    turns = [turn for episode in episodes for turn in episode.turns]
    long = Episode([turns[i % len(turns)] for i in range(50)], env_id="FrozenLake-v1")
    first, second = (EpisodePlayer(long, agent.tokenizer).save(tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second and len(first) < 2_000_000


def test_player_shapes(played, monkeypatch):
    """A widget in a notebook, a page in the docs, a picture or text where a notebook is committed"""
    agent, episodes = played
    player = EpisodePlayer(episodes, agent.tokenizer)
    for name in ("IN_TEST", "LLAMAGYM_DOCS"):
        monkeypatch.delenv(name, raising=False)
    assert "application/vnd.jupyter.widget-view+json" in str(player._repr_mimebundle_())
    monkeypatch.setenv("IN_TEST", "1")
    assert base64.b64decode(player._repr_mimebundle_()["image/png"]) == animation(episodes[0])
    bare = EpisodePlayer(dataclasses.replace(episodes[0], turns=[dataclasses.replace(turn, frame=None) for turn in episodes[0].turns]))
    assert set(bare._repr_mimebundle_()) == {"text/plain"} and "turn 0" in bare._repr_mimebundle_()["text/plain"]
    monkeypatch.setenv("LLAMAGYM_DOCS", "1")
    assert "<script" in player._repr_mimebundle_()["text/html"]
    assert repr(player) == "EpisodePlayer(5 episodes of FrozenLake-v1)" and repr(EpisodePlayer([])) == "EpisodePlayer(0 episodes)"


def test_player_animation_shows_each_step(played):
    """The environment's picture as it was drawn, but for the colours of a common palette; nothing where there are none"""
    _, episodes = played
    picture = Image.open(io.BytesIO(animation(episodes[0])))
    assert picture.n_frames <= len(episodes[0]) + 1 and picture.info["loop"] == 0     # steps that look alike are one
    drawn = Image.open(io.BytesIO(episodes[0].turns[0].frame)).convert("RGB")
    drawn.thumbnail((196, 196))
    left, top = 8 + (196 - drawn.width) // 2, 8 + (196 - drawn.height) // 2
    shown = np.asarray(picture.convert("RGB"), dtype=int)[top : top + drawn.height, left : left + drawn.width]
    assert np.abs(shown - np.asarray(drawn, dtype=int)).mean() < 4
    rude = Turn(RUDE * 9 + "\x1b[31m\u202e\0", RUDE * 9, frame=np.zeros((8, 8, 3), np.uint8))
    assert Image.open(io.BytesIO(animation(Episode([rude])))).size == (640, 212)
    assert animation(Episode([Turn("a", "b", frame="text")])) is None is animation(Episode())


def test_player_branches_from_a_turn(played):
    """As the page asks: what has changed, and nothing else; what comes of it is in the list, with all its numbers"""
    agent, episodes = played
    player, sent = EpisodePlayer(episodes, agent=agent), []
    player.send = lambda content, buffers=None: sent.append((content, buffers))
    assert player.can_branch and not EpisodePlayer(episodes, agent.tokenizer).can_branch
    player._heard(player, dict(type="branch", episode=player.episodes[3]["key"], turn=1, changes=dict(begin="I", observation="Row 4."), id=1), [])
    content, _ = sent.pop()
    assert content == dict(id=1, made=player.episodes[-1]["key"]) and len(player.episodes) == 6
    data = player._data(content["made"])
    assert data["turns"][1]["observation"] == "Row 4." and data["turns"][1]["tokens"]["given"] == [0] and data["seed"] == episodes[3].seed
    assert data["turns"][0]["frame"] == player._data(player.episodes[3]["key"])["turns"][0]["frame"]
    assert all(turn["value"] is not None for turn in data["turns"]) and data["turns"][-1]["tokens"]["kl"][-1] is not None
    assert [player.episodes[i]["key"] for i in range(5)] == list(range(1, 6))
    player._heard(player, dict(type="branch", episode=content["made"], turn=0, changes={}, id=2), [])
    assert sent.pop()[0]["made"] == player.episodes[-1]["key"]
    player._heard(player, dict(type="branch", episode=1, turn=0, changes=dict(begin="word " * 20), id=3), [])
    assert "leaves nothing to sample" in sent.pop()[0]["error"] and len(player.episodes) == 7
    assert not agent.buffer


def test_player_shows_other_episodes(played):
    """Those that stay keep their keys, those that have gone can be looked at for a while; one that is listed twice is there twice"""
    agent, episodes = played
    player = EpisodePlayer(episodes[:3], agent.tokenizer)
    picture = player._data(1)["turns"][0]["frame"]
    player.show([episodes[4], episodes[1], episodes[1]], ["new", None, "again"])
    assert [(e["key"], e["label"]) for e in player.episodes] == [(4, "new"), (2, None), (5, "again")]
    player.show(episodes[3:])
    assert [e["key"] for e in player.episodes] == [6, 4]
    assert player._data(1)["seed"] == episodes[0].seed
    assert player._answer(dict(type="frame", frame=picture)) == ({}, [episodes[0].turns[0].frame])
    for i in range(PAST + 1):
        player.show([Episode([Turn("", str(i))])])
    with pytest.raises(KeyError, match="no longer kept"):
        player._data(1)
    assert len(player._past) == PAST


def test_player_branches_of_what_has_gone_from_its_list(played):
    """... come with what they are branches of; and a player keeps no agent alive"""
    policy = make_policy("lora")
    agent = lake_agent(policy, max_steps=4)
    episodes = collect(agent, episodes=2, num_envs=2)
    player = EpisodePlayer(episodes, agent=agent)
    player.show([])
    made = player.branch(1, 1)
    assert [e["seed"] for e in player.episodes] == [episodes[0].seed] * 2 and player.episodes[-1]["key"] == made
    assert player.branches[0] == (episodes[0], None) and player.branches[1][0].info["branch"]["turn"] == 1
    kept = weakref.ref(agent)
    del agent
    gc.collect()
    assert kept() is None
    with pytest.raises(RuntimeError, match="the agent that played is gone"):
        player.branch(1, 1)


def test_player_goes_back_to_an_episodes_own_snapshots():
    """Not to those of another one with the same number"""
    agent = Agent.for_task(frozen_lake(slippery=True), make_policy("lora"), config=config())
    agent.words.max_steps = 5
    agent.words.fallback = lambda obs, info: 2
    first, second = (collect(agent, episodes=3, num_envs=3, seed=seed, snapshots=True, frames=True) for seed in (0, 7))
    player = EpisodePlayer(first, agent=agent)
    player.show(second)
    for rollout, keys in ((second, (4, 5, 6)), (first, (1, 2, 3))):
        for key, episode in zip(keys, rollout):
            last = len(episode) - 1
            data = player._data(player.branch(key, last))
            assert [turn["observation"] for turn in data["turns"][: last + 1]] == [turn.observation for turn in episode.turns]


def test_player_of_episodes_without_a_model():
    """A player's that never saw a token: text and rewards"""
    shown = episode_data(Episode([Turn("a", "b", action=np.int64(2), reward=1.0)]))
    assert shown["turns"][0]["tokens"] is None and shown["turns"][0]["action"] == "2" and shown["end"] == "not over"
