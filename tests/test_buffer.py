"""Saved episodes load unchanged, and a batch holds the values that plain loops over tokens and turns compute."""

import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from llamagym.algorithms.batch import Batch
from llamagym.buffer import EpisodeBuffer
from llamagym.chat.conversation import Segment
from llamagym.episodes.episode import Episode, Turn
from llamagym.models.packing import pack_by_length

fast = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

# Strategies for episodes with any contents

text = st.text(max_size=12)
integers = st.integers(-(2**63), 2**63 - 1)
number = st.floats(width=64)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


def arrays(n):
    return st.none() | st.lists(st.floats(width=32), min_size=n, max_size=n).map(
        lambda x: np.array(x, dtype=np.float32)
    )


@st.composite
def frames(draw):
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.just(3)))
    size = int(np.prod(shape))
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(shape)


@st.composite
def turns(draw):
    n, k = draw(st.integers(0, 4)), draw(st.integers(0, 2))
    per_token = (
        "logprobs",
        "entropy",
        "ref_logprobs",
        "values",
        "token_advantages",
        "token_returns",
    )
    alternatives = st.lists(
        st.lists(st.tuples(integers, number), max_size=2), min_size=n, max_size=n
    )
    return Turn(
        draw(text), draw(text), draw(st.lists(integers, min_size=n, max_size=n)), draw(st.integers(0, 9)), draw(st.integers(0, 99)),
        stopped=draw(st.booleans()), action=draw(json_values), reward=draw(number), terminated=draw(st.booleans()),
        truncated=draw(st.booleans()), valid=draw(st.booleans()), invalid_reason=draw(st.none() | text),
        **{name: draw(arrays(n)) for name in per_token},
        **{name: draw(st.none() | number) for name in ("value", "advantage", "returns")},
        top_alternatives=draw(st.none() | alternatives), candidates=draw(st.none() | st.lists(text, min_size=k, max_size=k)),
        candidate_logprobs=draw(arrays(k)), flags=draw(st.dictionaries(text, json_values, max_size=2)), frame=draw(st.none() | frames()),
    )  # fmt: skip


segments = st.builds(
    Segment, st.lists(integers, max_size=4), st.lists(st.integers(0, 1), max_size=4)
)
episodes = st.builds(
    Episode, st.lists(turns(), max_size=3), st.lists(segments, max_size=2), st.none() | text, st.none() | text, st.none() | integers,
    st.none() | st.integers(0, 2**130), st.none() | st.lists(integers, max_size=3), st.none() | text, st.none() | number,
    st.dictionaries(text, json_values, max_size=2),
)  # fmt: skip


def typed_contents(thing):
    """Return an object's contents with types, so that 1 differs from 1.0, None from [], -0.0 from 0.0, and nan equals nan"""
    if isinstance(thing, Turn | Episode | Segment):
        return type(thing), {name: typed_contents(value) for name, value in vars(thing).items()}
    if isinstance(thing, np.ndarray):
        return (
            str(thing.dtype),
            thing.shape,
            np.where(np.isnan(thing), 0, thing).tobytes(),
            np.isnan(thing).tolist(),
        )
    if isinstance(thing, dict):
        return {key: typed_contents(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing), [typed_contents(item) for item in thing]
    return type(thing), repr(thing)


@fast
@given(st.lists(episodes, max_size=3))
def test_parquet_round_trip_loses_nothing(tmp_path_factory, played):
    path = tmp_path_factory.mktemp("buffer") / "episodes.parquet"
    buffer = EpisodeBuffer(played)
    again = EpisodeBuffer.load(buffer.save(path))
    assert [typed_contents(e) for e in again] == [typed_contents(e) for e in played]
    assert again == buffer
    assert os.listdir(path.parent) == [path.name]


def test_equality_compares_every_field():
    one = Turn("a", "b", [1], logprobs=np.array([np.nan], np.float32))
    assert one == Turn("a", "b", [1], logprobs=np.array([np.nan], np.float32))
    for change in (dict(observation="x"), dict(response_ids=[2]), dict(logprobs=None), dict(logprobs=np.zeros(1, np.float32)), dict(reward=1.0),
                   dict(frame=np.zeros((1, 1, 3), np.uint8)), dict(flags={"a": 1}), dict(candidates=[])):  # fmt: skip
        assert one != Turn(**{**vars(one), **change})
    assert Episode([one]) != Episode([one], info={"a": 1})
    assert one != "a turn" and Episode() != 3 and EpisodeBuffer() != []


def test_numpy_values_in_json_fields_are_converted(tmp_path):
    step = Turn(
        "",
        "",
        action=np.array([1, 2]),
        reward=np.float32(0.5),
        flags={"mask": (np.int8(1), np.bool_(True))},
    )
    again = EpisodeBuffer.load(
        EpisodeBuffer([Episode([step], info={"p": np.float64(0.25)})]).save(tmp_path / "e.parquet")
    )
    assert again[0].turns[0].action == [1, 2] and again[0].turns[0].flags == {"mask": [1, True]}
    assert again[0].info == {"p": 0.25} and again[0].turns[0].reward == 0.5


def test_saved_file_is_readable_with_pyarrow_alone(tmp_path):
    path = EpisodeBuffer([Episode([Turn("see", "say", reward=2.0)], env_id="E", index=3)]).save(
        tmp_path / "e.parquet"
    )
    row = pq.read_table(path).to_pylist()[0]
    assert (
        row["env_id"],
        row["index"],
        row["turns"][0]["observation"],
        row["turns"][0]["reward"],
    ) == ("E", 3, "see", 2.0)


def test_failed_save_keeps_the_old_file(tmp_path):
    path = EpisodeBuffer([Episode(index=1)]).save(tmp_path / "e.parquet")
    with pytest.raises(TypeError, match="episode 1 can't be saved"):
        EpisodeBuffer([Episode(), Episode([Turn("", "", action=object())])]).save(path)
    assert EpisodeBuffer.load(path)[0].index == 1
    assert os.listdir(tmp_path) == ["e.parquet"]


def test_damaged_file_raises_or_loads_unchanged(tmp_path):
    """A flipped byte in a data page fails its checksum; a truncated file has no footer"""
    path = EpisodeBuffer(
        [Episode([Turn("a" * 50, "b" * 50, list(range(50)))], index=i) for i in range(20)]
    ).save(tmp_path / "e.parquet")
    whole, buffer, draw = path.read_bytes(), EpisodeBuffer.load(path), random.Random(0)
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    num_rejected = 0
    for position in draw.sample(range(4, len(whole) - footer), 60):
        path.write_bytes(
            whole[:position]
            + bytes([whole[position] ^ (1 << draw.randrange(8))])
            + whole[position + 1 :]
        )
        try:
            assert EpisodeBuffer.load(path) == buffer
        except ValueError as e:
            num_rejected += 1
            assert "e.parquet is not a Parquet file, or is damaged" in str(e)
    assert num_rejected > 30
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a Parquet file, or is damaged"):
            EpisodeBuffer.load(path)


def test_newer_file_format_raises(tmp_path):
    pq.write_table(
        pa.table({"x": [1]}).replace_schema_metadata({"llamagym.episodes": "99"}),
        tmp_path / "new.parquet",
    )
    with pytest.raises(
        ValueError,
        match="is of format 99, this version reads 1 to 3: install the version of llamagym",
    ):
        EpisodeBuffer.load(tmp_path / "new.parquet")


def test_older_file_format_loads_with_its_old_names(tmp_path):
    """Format 1 named the reasoning of a turn `thought` and its forced positions `given`"""
    turn = Turn("You: 17.", "Action: 0", [50, 51, 52], start=3, reasoning="17. Hold.")
    turn.forced_positions = [1]
    buffer = EpisodeBuffer([Episode([turn], [Segment([1, 2, 3, 50, 51, 52], [0, 0, 0, 1, 0, 1])])])
    path = buffer.save(tmp_path / "e.parquet")
    old_names = {"reasoning": "thought", "forced_positions": "given"}

    def rename(fields):
        return pa.struct([f.with_name(old_names.get(f.name, f.name)) for f in fields])

    schema, rows = pq.read_schema(path), pq.read_table(path).to_pylist()
    turns_type = pa.list_(rename(schema.field("turns").type.value_type))
    schema = schema.set(schema.get_field_index("turns"), pa.field("turns", turns_type))
    for row in rows:
        row["turns"] = [{old_names.get(k, k): v for k, v in t.items()} for t in row["turns"]]
    old = pa.Table.from_pylist(rows, schema.with_metadata({"llamagym.episodes": "1"}))
    pq.write_table(old, tmp_path / "old.parquet")
    assert pq.read_table(tmp_path / "old.parquet").to_pylist()[0]["turns"][0]["given"] == [1]
    again = EpisodeBuffer.load(tmp_path / "old.parquet")
    assert again == buffer and again[0].turns[0].reasoning == "17. Hold."


# The list


def test_buffer_behaves_like_a_list():
    first, second, third = (Episode([Turn("", "", reward=float(i))], index=i) for i in range(3))
    buffer = EpisodeBuffer([first])
    buffer.append(second)
    buffer.extend([third])
    assert len(buffer) == 3 and buffer[-1] is third and list(buffer) == [first, second, third]
    assert isinstance(buffer[1:], EpisodeBuffer) and list(buffer[1:]) == [second, third]
    assert buffer.returns.tolist() == [0, 1, 2] and len(buffer.turns) == 3
    drained = buffer.drain()
    assert len(drained) == 3 and len(buffer) == 0
    drained.clear()
    assert len(drained) == 0


def test_summary_counts_episodes_and_turns():
    won, lost = (
        Turn("", "", [1, 2], reward=1.0, terminated=True),
        Turn("", "", [1], reward=-1.0, valid=False),
    )
    summary = EpisodeBuffer(
        [Episode([won]), Episode([lost, Turn("", "", truncated=True)])]
    ).summary()
    assert summary == dict(
        episodes=2,
        turns=3,
        tokens=3,
        mean_return=0.0,
        mean_episode_length=1.5,
        invalid_rate=1 / 3,
        truncated_rate=0.5,
    )
    assert np.isnan(EpisodeBuffer().summary()["mean_return"])


def test_messages_lists_system_prompt_observations_and_responses():
    episode = Episode([Turn("a", "b"), Turn("c", "d")], system_prompt="s", final_observation="e")
    assert [(m["role"][0], m["content"]) for m in episode.messages] == [
        ("s", "s"),
        ("u", "a"),
        ("a", "b"),
        ("u", "c"),
        ("a", "d"),
    ]
    assert [m["role"] for m in Episode([Turn("a", "b")]).messages] == ["user", "assistant"]


# Display

NASTY = ["</pre><script>alert(1)</script>", "```\n# title\n```", "````` \n| a | b |\n|---|---|", "~~~\n<b>x", "$x$ \\(y\\) **b** [l](http://x)",
         "\n\n  turn 7  You won", "a\x1b[2J\rb\u202ec", "\ud800", "  - item\n    code", ""]  # fmt: skip


@pytest.mark.parametrize("nasty", NASTY)
def test_untrusted_text_is_escaped_in_displays(nasty):
    episode = Episode(
        [Turn(nasty, nasty, action=nasty, valid=False, invalid_reason=nasty)],
        system_prompt=nasty,
        env_id=nasty,
        final_observation=nasty,
    )
    tokens = MarkdownIt().enable("table").parse(episode._repr_markdown_())
    assert [t.type for t in tokens] == ["fence"]
    assert not any(c in tokens[0].content for c in "\x1b\r\u202e\ud800")
    names = [line[:9].strip() for line in tokens[0].content.splitlines()[1:] if line[:9].strip()]
    assert names == ["system", "turn 0", "response", "then"]


def test_table_is_short_and_shows_the_ends():
    table = EpisodeBuffer(
        Episode([Turn("", "", reward=1.0)], index=i, seed=i) for i in range(100)
    )._repr_markdown_()
    lines = table.splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 12
    assert (
        "| 0 | 0 | 1 | 1 | 0 | 0 |" in lines
        and "| 99 | 99 | 1 | 1 | 0 | 0 |" in lines
        and "100 episodes: mean return 1" in lines[-1]
    )
    assert "An empty buffer" in EpisodeBuffer()._repr_markdown_()


def test_reprs_are_short_and_never_fail():
    step = Turn("a", "b", list(range(3)), action=object(), logprobs=np.zeros(3, np.float32))
    assert "logprobs=float32[3]" in repr(step) and "entropy" not in repr(step)
    assert "return 0, 3 tokens, not over" in repr(Episode([step]))
    assert "object object" in str(Episode([step]))
    assert repr(EpisodeBuffer([Episode([step])])).startswith("EpisodeBuffer(1 episode, 1 turn")
    batch = Batch.from_episodes([random_episode(random.Random(0), 1, tokens=(3, 3))])
    assert (
        repr(batch) == f"Batch(1 row of up to {len(batch.rows[0])} ids, 1 turn, 3 sampled tokens)"
    )


# Batches


def random_episode(rng, num_turns, rows="one", tokens=(1, 5)):
    """Return an episode of random ids, with its turns in one segment, two segments or one segment each"""
    segments, played = [], []
    for t in range(num_turns):
        if not segments or rows == "each" or (rows == "two" and t == num_turns // 2):
            segments.append(Segment([1], [0]))
        segment, n = segments[-1], rng.randint(*tokens)
        prompt, ids = (
            [rng.randrange(9) for _ in range(rng.randint(0, 4))],
            [rng.randrange(9) for _ in range(n)],
        )
        start = len(segment.ids) + len(prompt)
        segment.ids += prompt + ids
        segment.mask += [0] * len(prompt) + [1] * n
        turn = Turn(
            "",
            "",
            ids,
            len(segments) - 1,
            start,
            reward=rng.random(),
            value=rng.random(),
            advantage=rng.random(),
            returns=rng.random(),
        )
        turn.logprobs = np.array([-rng.random() for _ in ids], dtype=np.float32)
        if rng.random() < 0.3:
            turn.token_advantages = np.array([rng.random() for _ in ids], dtype=np.float32)
        played.append(turn)
    return Episode(played, segments)


def some_episodes(seed, least=1):
    rng = random.Random(seed)
    return [
        random_episode(rng, rng.randint(1, 4), rng.choice(["one", "two", "each"]), (least, 5))
        for _ in range(rng.randint(1, 8))
    ]


@fast
@given(st.integers(0, 10**6), st.integers(0, 1))
def test_batch_equals_plain_loops(seed, least):
    played = some_episodes(seed, least)
    batch = Batch.from_episodes(played)
    rows, tokens, per_turn = [], [], []
    for e, episode in enumerate(played):
        row_of = {}
        for turn in episode.turns:
            if turn.segment not in row_of:
                row_of[turn.segment] = len(rows)
                rows.append(episode.segments[turn.segment].ids)
            row = row_of[turn.segment]
            for i, id in enumerate(turn.response_ids):
                advantage = (
                    turn.advantage if turn.token_advantages is None else turn.token_advantages[i]
                )
                tokens.append(
                    (
                        row,
                        turn.start + i,
                        id,
                        len(per_turn),
                        np.float32(turn.logprobs[i]),
                        np.float32(advantage),
                    )
                )
            per_turn.append(
                (row, turn.start - 1, e, *map(np.float32, (turn.reward, turn.value, turn.returns)))
            )
    assert [row.tolist() for row in batch.rows] == rows
    columns = (
        batch.row_of_token,
        batch.token_position,
        batch.token_ids,
        batch.turn_of_token,
        batch.logprobs,
        batch.advantages,
    )
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == tokens
    columns = (
        batch.row_of_turn,
        batch.turn_position,
        batch.episode_of_turn,
        batch.rewards,
        batch.values,
        batch.returns,
    )
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == per_turn
    assert (batch.num_rows, batch.num_tokens, batch.num_turns) == (
        len(rows),
        len(tokens),
        len(per_turn),
    )
    assert batch.token_index.tolist() == list(
        range(len(tokens))
    ) and batch.turn_index.tolist() == list(range(len(per_turn)))


def check_selected(part, batch, rows):
    """Assert that a selection holds the same values for the same tokens as the batch"""
    assert [row.tolist() for row in part.rows] == [batch.rows[r].tolist() for r in rows]
    rows = torch.tensor(rows, dtype=torch.long)
    for name in ("token_position", "token_ids", "logprobs", "advantages"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[part.token_index])
    for name in ("turn_position", "episode_of_turn", "rewards", "values", "returns"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[part.turn_index])
    assert torch.equal(rows[part.row_of_token], batch.row_of_token[part.token_index])
    assert torch.equal(rows[part.row_of_turn], batch.row_of_turn[part.turn_index])
    assert torch.equal(part.turn_index[part.turn_of_token], batch.turn_of_token[part.token_index])
    assert set(part.token_index.tolist()) == {
        i for i, r in enumerate(batch.row_of_token.tolist()) if r in rows.tolist()
    }
    assert set(part.turn_index.tolist()) == {
        i for i, r in enumerate(batch.row_of_turn.tolist()) if r in rows.tolist()
    }


@fast
@given(st.integers(0, 10**6), st.data())
def test_select_renumbers(seed, data):
    batch = Batch.from_episodes(some_episodes(seed))
    rows = data.draw(st.lists(st.integers(0, batch.num_rows - 1), unique=True))
    part = batch.select(rows)
    check_selected(part, batch, rows)
    if rows:
        check_selected(part.select([len(rows) - 1]), part, [len(rows) - 1])


@fast
@given(st.integers(0, 10**6), st.integers(1, 60), st.booleans())
def test_micro_batches_partition_the_rows(seed, budget, shuffled):
    batch = Batch.from_episodes(some_episodes(seed))
    parts = batch.micro_batches(budget, torch.Generator().manual_seed(seed) if shuffled else None)
    assert sorted(i for p in parts for i in p.token_index.tolist()) == list(range(batch.num_tokens))
    assert sorted(i for p in parts for i in p.turn_index.tolist()) == list(range(batch.num_turns))
    assert sum(p.num_rows for p in parts) == batch.num_rows
    for part in parts:
        rows = len({row.tobytes() for row in part.rows})  # duplicate rows are computed once
        assert rows == 1 or rows * max(part.row_lengths) <= budget


def test_micro_batch_order_depends_only_on_the_generator():
    batch = Batch.from_episodes(some_episodes(3))
    order = [
        [p.token_index.tolist() for p in batch.micro_batches(9, torch.Generator().manual_seed(s))]
        for s in (1, 1, 2)
    ]
    assert order[0] == order[1] != order[2]
    assert sorted(order[0]) == sorted(order[2])


@fast
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 200))
def test_pack_by_length_respects_the_budget(lengths, budget):
    groups = pack_by_length(np.array(lengths), budget)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= budget for g in groups)


@fast
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 200), st.integers(0, 60)
)
def test_pack_by_length_is_optimal(lengths, budget, group_cost):
    """No other contiguous split of the rows costs less"""

    def cost(groups):
        over = any(len(g) > 1 and len(g) * max(g) > budget for g in groups)
        return np.inf if over else sum(len(g) * max(g) + group_cost for g in groups)

    ordered, found = (
        sorted(lengths, reverse=True),
        pack_by_length(np.array(lengths), budget, group_cost),
    )
    cuts = [
        [i + 1 for i in range(len(lengths) - 1) if bits >> i & 1]
        for bits in range(2 ** (len(lengths) - 1))
    ]
    best = min(
        cost([ordered[a:b] for a, b in zip([0, *cut], [*cut, len(lengths)])]) for cut in cuts
    )
    assert cost([[lengths[i] for i in g] for g in found]) == best


@fast
@given(st.integers(0, 10**6))
def test_pad_fills_rows_with_the_pad_id(seed):
    batch = Batch.from_episodes(some_episodes(seed))
    ids, mask = batch.pad(pad_id=99, device="cpu")
    longest = max(map(len, batch.rows))
    assert ids.tolist() == [row.tolist() + [99] * (longest - len(row)) for row in batch.rows]
    assert mask.tolist() == [[1] * len(row) + [0] * (longest - len(row)) for row in batch.rows]
    assert torch.equal(ids[batch.row_of_token, batch.token_position], batch.token_ids)


@fast
@given(st.integers(0, 10**6))
def test_batch_file_round_trip(tmp_path_factory, seed):
    batch = Batch.from_episodes(some_episodes(seed))
    batch.advantages[0] = float("nan")
    again = Batch.load(batch.save(tmp_path_factory.mktemp("batch") / "batch.npz"))
    assert [r.tolist() for r in again.rows] == [r.tolist() for r in batch.rows]
    assert [b.tolist() for b in again.branches] == [b.tolist() for b in batch.branches]
    for name in vars(batch).keys() - {"rows", "branches"}:
        assert getattr(again, name).dtype == getattr(batch, name).dtype
        assert torch.equal(getattr(again, name).nan_to_num(7), getattr(batch, name).nan_to_num(7))


def test_batch_to_moves_all_tensors():
    batch = Batch.from_episodes(some_episodes(1))
    moved = batch.to("meta")
    assert {
        getattr(moved, name).device.type for name in vars(batch).keys() - {"rows", "branches"}
    } == {"meta"} and moved.rows is batch.rows
    check_selected(batch.to("cpu").select([0]), batch, [0])


def test_batch_skips_unused_segments_and_marks_missing_values_nan():
    episode = random_episode(random.Random(0), 1)
    episode.segments.insert(0, Segment([1, 2], [0, 0]))
    episode.turns[0].segment, episode.turns[0].value = 1, None
    batch = Batch.from_episodes([episode])
    assert batch.num_rows == 1 and batch.values.isnan().all()


def test_incomplete_batch_has_nan_for_values_not_computed_yet():
    episode = random_episode(random.Random(0), 2)
    for turn in episode.turns:
        turn.advantage = turn.returns = turn.token_advantages = None
    batch = Batch.from_episodes([episode], require_advantages=False)
    assert batch.advantages.isnan().all() and batch.returns.isnan().all()


def test_large_batch_is_built_quickly():
    from timeit import repeat

    played = [random_episode(random.Random(i), 2, tokens=(24, 26)) for i in range(1024)]
    assert min(repeat(lambda: Batch.from_episodes(played), number=1, repeat=3)) < 1
    batch = Batch.from_episodes(played)
    assert min(repeat(lambda: batch.micro_batches(8192), number=1, repeat=3)) < 1
    assert min(repeat(lambda: batch.pad(0), number=1, repeat=3)) < 0.1
