"""Invalid input to buffer, credit and config raises errors that name the value given, the value expected and the fix."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llamagym.algorithms.advantages import (
    assign_turn_gae,
    normalize_advantages,
    return_to_go,
    turn_gae,
)
from llamagym.algorithms.batch import Batch
from llamagym.buffer import EpisodeBuffer
from llamagym.chat.conversation import Segment
from llamagym.config import (
    Config,
    ContextConfig,
    GenerateConfig,
    LoRAConfig,
    ModelConfig,
    PPOConfig,
    RolloutConfig,
    TrainerConfig,
)
from llamagym.episodes.episode import Episode, Turn
from llamagym.models.packing import pack_by_length


def one_turn(**changes):
    turn = Turn(
        "o",
        "r",
        [5, 6],
        start=2,
        logprobs=np.zeros(2, np.float32),
        value=0.0,
        advantage=1.0,
        returns=1.0,
        terminated=True,
    )
    return replace(turn, **changes)


def one_episode(*turns, mask=(0, 0, 1, 1)):
    return Episode(list(turns) or [one_turn()], [Segment([1, 2, 5, 6], list(mask))], index=4)


# buffer


@pytest.mark.parametrize("thing", [None, 3, "text", Turn("", "")])
def test_buffer_rejects_other_objects_than_episodes(thing):
    buffer = EpisodeBuffer([one_episode()])
    for call in (lambda: buffer.append(thing), lambda: buffer.extend([one_episode(), thing])):
        with pytest.raises(
            TypeError, match=f"an EpisodeBuffer holds episodes, got {type(thing).__name__}"
        ):
            call()
    assert len(buffer) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(action=object()),
            r"episode 1 can't be saved, Episode\(index=4.*action=.*expected numbers, texts, lists and dictionaries",
        ),
        (dict(flags={"a": {1}}), "flags=.*JSON has no set"),
        (dict(frame=[[1]]), r"frame is \[\[1\]\]: expected a uint8 array \[H, W, 3\]"),
        (dict(frame=np.zeros((1, 1, 3))), r"frame is float64\[1, 1, 3\]: expected a uint8 array"),
        (dict(reward="much"), "could not convert string to float: 'much'"),
        (dict(observation=3), "Expected bytes, got a 'int' object"),
        (dict(response_ids=[2**70]), "can't be saved"),
        (dict(response_ids=["a"]), "can't be saved"),
    ],
)
def test_failed_save_names_the_episode_and_keeps_the_old_file(tmp_path, changes, message):
    buffer = EpisodeBuffer([one_episode(), Episode([replace(Turn("", ""), **changes)], index=4)])
    with pytest.raises((TypeError, ValueError), match=message):
        buffer.save(tmp_path / "e.parquet")
    assert len(buffer) == 2 and not list(tmp_path.iterdir())


def test_load_of_files_without_episodes_raises(tmp_path):
    (tmp_path / "text.parquet").write_text("not a table")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "foreign.parquet")
    for name, kind, message in (
        ("missing.parquet", FileNotFoundError, "there is no file '.*missing.parquet'"),
        (".", FileNotFoundError, "there is no file"),
        ("text.parquet", ValueError, "text.parquet is not a Parquet file, or is damaged"),
        ("foreign.parquet", ValueError, "foreign.parquet holds no episodes"),
    ):
        with pytest.raises(kind, match=message):
            EpisodeBuffer.load(tmp_path / name)


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        (
            one_episode(one_turn(entropy=np.zeros(3, np.float32))),
            "turn 0 of .*: 3 entropy for 2 response_ids",
        ),
        (one_episode(one_turn(top_alternatives=[])), "0 top_alternatives for 2 response_ids"),
        (
            one_episode(one_turn(candidates=["a"], candidate_logprobs=np.zeros(2))),
            "2 candidate_logprobs for 1 candidates",
        ),
        (one_episode(one_turn(reward=float("nan"))), "its reward is nan"),
        (
            one_episode(one_turn(), one_turn()),
            "turn 0 of .*: the episode ended here, but has 2 turns",
        ),
        (one_episode(one_turn(segment=1)), "it lies in segment 1, of 1"),
        (
            one_episode(one_turn(start=0)),
            "it starts at position 0: there is no prompt token before it",
        ),
        (
            one_episode(one_turn(start=1)),
            "response_ids are not what segment 0 holds from position 1 on",
        ),
        (one_episode(mask=(0, 0, 0, 1)), "doesn't mark all of positions 2 to 3 as sampled"),
        (one_episode(mask=(0, 1, 1, 1)), "its segments mark 3 tokens as sampled, its turns hold 2"),
        (one_episode(mask=(0, 0, 1)), "segment 0 has 4 ids, but a mask of 3"),
    ],
)
def test_inconsistent_episode_raises(episode, message):
    with pytest.raises(ValueError, match=message):
        episode.validate()


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        (
            one_episode(one_turn(logprobs=None)),
            "episode 1, turn 0: it has no logprobs: record them while sampling .Episode.index=4",
        ),
        (
            one_episode(one_turn(advantage=None)),
            "it has no advantage: call llamagym.algorithms.advantages.assign_turn_gae first",
        ),
        (
            one_episode(one_turn(returns=None)),
            "it has no returns: call llamagym.algorithms.advantages.assign_turn_gae first",
        ),
        (one_episode(one_turn(logprobs=np.zeros(1))), "1 logprobs for 2 response_ids"),
        (
            one_episode(one_turn(token_advantages=np.zeros(3))),
            "3 token_advantages for 2 response_ids",
        ),
        (one_episode(one_turn(segment=-1)), "it lies in segment -1, of 1"),
        (
            one_episode(one_turn(start=0)),
            "2 response_ids from position 0 on are not in its segment of 4 ids",
        ),
        (
            one_episode(one_turn(start=3)),
            "2 response_ids from position 3 on are not in its segment of 4 ids",
        ),
        (one_episode(one_turn(start=1)), "response_ids are not the ids in its segment"),
        (one_episode(mask=(0, 0, 1, 0)), "doesn't mark all of positions 2 to 3 as sampled"),
        (one_episode(mask=(1, 0, 1, 1)), "its segments mark 3 tokens as sampled, its turns hold 2"),
        (one_episode(mask=(0, 0, 1)), "segment 0 has 4 ids, but a mask of 3"),
        (Episode([Turn("", "", advantage=0.0, returns=0.0)]), "it lies in segment 0, of 0"),
    ],
)
def test_batch_error_names_the_missing_data(episode, message):
    with pytest.raises(ValueError, match=message):
        Batch.from_episodes([one_episode(), episode])


def test_batch_requires_a_list_of_episodes():
    with pytest.raises(TypeError, match="got one episode: expected a list"):
        Batch.from_episodes(one_episode())
    with pytest.raises(TypeError, match="item 1 is a str: expected episodes"):
        Batch.from_episodes([one_episode(), "episode"])
    for empty in ([], [Episode()]):
        with pytest.raises(
            ValueError, match=f"a batch needs at least one turn, got {len(empty)} episodes"
        ):
            Batch.from_episodes(empty)


def test_select_of_missing_rows_raises(tmp_path):
    batch = Batch.from_episodes([one_episode()])
    for rows in ([1], [-1]):
        with pytest.raises(IndexError, match="of a batch of 1 rows"):
            batch.select(rows)
    with pytest.raises(ValueError, match="each may be taken once"):
        batch.select([0, 0])
    for budget in (0, -5):
        with pytest.raises(ValueError, match=f"token_budget={budget}: expected at least 1"):
            batch.micro_batches(budget)
        with pytest.raises(ValueError, match=f"token_budget={budget}"):
            pack_by_length(np.array([1]), budget)
    (tmp_path / "batch.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", x=np.zeros(1))
    np.save(tmp_path / "array.npy", np.zeros(1))
    for name in ("batch.npz", "other.npz", "array.npy"):
        with pytest.raises(ValueError, match=f"{name} holds no batch"):
            Batch.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Batch.load(tmp_path / "missing.npz")


# credit


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: return_to_go([1.0], 1.5),
            ValueError,
            r"gamma=1.5: expected a discount in \[0, 1\]",
        ),
        (lambda: turn_gae([1.0], [0.0], -0.1, 1), ValueError, "gamma=-0.1"),
        (
            lambda: turn_gae([1.0], [0.0], 1, 2),
            ValueError,
            r"gae_lambda=2: expected a factor in \[0, 1\]",
        ),
        (
            lambda: turn_gae([1.0], [0.0, 1.0], 1, 1),
            ValueError,
            "1 rewards and 2 values: expected one of each per turn",
        ),
        (
            lambda: turn_gae([[1.0]], [0.0], 1, 1),
            ValueError,
            r"rewards has shape \[1, 1\]: expected \[T\]",
        ),
        (
            lambda: turn_gae([1.0], [None], 1, 1),
            TypeError,
            r"values=\[None\]: expected a number per turn",
        ),
        (
            lambda: turn_gae(["1"], [0.0], 1, 1),
            TypeError,
            r"rewards=\['1'\]: expected a number per turn",
        ),
        (
            lambda: assign_turn_gae(["episode"], 1, 1),
            TypeError,
            "item 0 is a str: expected episodes",
        ),
        (
            lambda: normalize_advantages([]),
            ValueError,
            "there is no turn to normalize in 0 episodes",
        ),
        (
            lambda: normalize_advantages([one_episode(one_turn(advantage=None))]),
            ValueError,
            "a turn has no advantage: call assign_turn_gae first",
        ),
    ],
)
def test_credit_arguments_raise(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        (
            one_episode(one_turn(value=None)),
            "episode 1, turn 0 has no value: run the critic over the episodes first",
        ),
        (
            one_episode(one_turn(terminated=False)),
            "episode 1 is not over: its last turn is neither terminated nor truncated",
        ),
        (
            one_episode(one_turn(terminated=False, truncated=True)),
            "episode 1 was truncated, but has no final_value: run the critic on its final_ids",
        ),
        (one_episode(one_turn(), one_turn()), "episode 1 ended in turn 0, but goes on"),
    ],
)
def test_credit_of_unfinished_episodes_raises_and_changes_nothing(episode, message):
    good = one_episode(one_turn(reward=5.0, advantage=None, returns=None))
    with pytest.raises(ValueError, match=message):
        assign_turn_gae([good, episode], 1, 1)
    assert good.turns[0].advantage is None and good.turns[0].returns is None


# config


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"ppo.clip_range": -1}, ValueError, "ppo.clip_range=-1: expected > 0"),
        (
            {"ppo": {"learning_rate": float("nan")}},
            ValueError,
            "ppo.learning_rate=nan: expected > 0",
        ),
        (
            {"rollout.invalid_reward": float("inf")},
            ValueError,
            "rollout.invalid_reward=inf: expected a finite number",
        ),
        ({"credit.gamma": 1.1}, ValueError, "credit.gamma=1.1: expected >= 0 and <= 1"),
        ({"ppo.betas": [0.9, 1.0]}, ValueError, r"ppo.betas=\[0.9, 1.0\]: expected >= 0 and < 1"),
        ({"ppo.betas": [0.9]}, TypeError, r"ppo.betas=\[0.9\]: expected tuple\[float, float\]"),
        ({"ppo.epochs": "4"}, TypeError, "ppo.epochs='4': expected int"),
        ({"ppo.epochs": True}, TypeError, "ppo.epochs=True: expected int"),
        ({"ppo.epochs": 2.0}, TypeError, "ppo.epochs=2.0: expected int"),
        ({"ppo.clip_range": False}, TypeError, "ppo.clip_range=False: expected float"),
        ({"ppo.epochs": None}, TypeError, "ppo.epochs=None: expected int"),
        ({"credit.normalize": 1}, TypeError, "credit.normalize=1: expected bool"),
        ({"ppo.kl_loss": "k3"}, ValueError, 'ppo.kl_loss=\'k3\': expected "exact" or "k2"'),
        ({"model.quantize": "int8"}, ValueError, "model.quantize='int8': expected \"nf4\" or None"),
        ({"model.lora.r": 0}, ValueError, "model.lora.r=0: expected >= 1"),
        (
            {"model.lora.target_modules": []},
            ValueError,
            r"model.lora.target_modules=\[\]: expected not empty",
        ),
        ({"model.name": ""}, ValueError, "model.name='': expected not empty"),
        (
            {"rollout.on_invalid": "retry:0"},
            ValueError,
            "rollout.on_invalid='retry:0': expected a match of fallback",
        ),
        ({"context.turns": 0}, ValueError, "context.turns=0: expected >= 1"),
        ({"ppo": 3}, TypeError, "ppo=3: expected PPOConfig"),
        ({"ppo": None}, TypeError, "ppo=None: expected PPOConfig"),
        (
            {"ppo.cliprange": 0.1},
            ValueError,
            "unknown name 'ppo.cliprange'; did you mean 'ppo.clip_range'?",
        ),
        (
            {"clip_range": 0.1},
            ValueError,
            "unknown name 'clip_range'; did you mean 'ppo.clip_range'?",
        ),
        (
            {"ppo": {"gamma": 0.1}},
            ValueError,
            "unknown name 'ppo.gamma'; did you mean 'credit.gamma'?",
        ),
        ({"traner": {"seed": 1}}, ValueError, "unknown name 'traner'; did you mean 'trainer'?"),
        ({"model": {"lora": {"rank_of": 1}}}, ValueError, "unknown name 'model.lora.rank_of'"),
        (
            {"xyzzy": 1},
            ValueError,
            "unknown name 'xyzzy'; expected one of: model, generate, context",
        ),
        ({"ppo.epochs.more": 1}, TypeError, r"ppo.epochs=\{'more': 1\}: expected int"),
        (
            {"ppo": {"epochs": 1}, "ppo.epochs": 1},
            ValueError,
            "ppo.epochs is given twice; keep one of them",
        ),
        ({"ppo": 3, "ppo.epochs": 1}, ValueError, "ppo is given twice"),
        ({"ppo.epochs": 1, "ppo": 3}, ValueError, "ppo is given twice"),
        ({"model.lora.r": 1, "model": {"lora.r": 2}}, ValueError, "model.lora.r is given twice"),
        ({3: 1}, TypeError, "the name 3 in a config: expected a string"),
        ([1], TypeError, "Config.from_dict got list: expected a mapping of names to values"),
        (None, TypeError, "Config.from_dict got NoneType"),
    ],
)
def test_config_values_raise(values, kind, message):
    with pytest.raises(kind, match=message):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GenerateConfig(temperature=0), "generate.temperature=0: expected > 0"),
        (lambda: LoRAConfig(dropout=1), "model.lora.dropout=1: expected >= 0 and < 1"),
        (lambda: ModelConfig(critic="none"), "model.critic='none': expected"),
        (lambda: ContextConfig(max_length=1), "context.max_length=1: expected >= 2"),
        (lambda: RolloutConfig(num_envs=0), "rollout.num_envs=0: expected >= 1"),
        (lambda: TrainerConfig(seed=-1), "trainer.seed=-1: expected >= 0"),
        (
            lambda: PPOConfig.from_2024({"cliprang": 0.1}),
            "unknown name 'ppo.cliprang'; did you mean 'ppo.clip_range'?",
        ),
        (
            lambda: GenerateConfig.from_2024({"generate/temprature": 1}),
            "unknown name 'generate.temprature'; did you mean 'generate.temperature'?",
        ),
        (lambda: PPOConfig.from_2024({"ppo_epochs": 0}), "ppo.epochs=0: expected >= 1"),
        (lambda: PPOConfig(learning_rate=10**400), "ppo.learning_rate=1000*: expected > 0"),
    ],
)
def test_config_sections_validate_their_values(call, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        call()


def test_config_assignments_are_validated():
    config = Config()
    with pytest.raises(
        TypeError, match="Config.replace got list: expected a mapping of names to values"
    ):
        config.replace([1])
    with pytest.raises(ValueError, match="ppo.epochs=0: expected >= 1"):
        config.ppo.epochs = 0
    with pytest.raises(AttributeError, match="unknown name 'ppo.epoch'; did you mean 'ppo.epochs'"):
        config.ppo.epoch = 2
    with pytest.raises(TypeError, match="ppo=GenerateConfig.*: expected PPOConfig"):
        config.ppo = GenerateConfig()
    assert config == Config()


@pytest.mark.parametrize("argument", ["generate_config_dict", "ppo_config_dict"])
def test_config_from_2024_requires_dictionaries(argument):
    with pytest.raises(
        TypeError, match=f"{argument} is a list: expected a dictionary of names to values"
    ):
        Config.from_2024(**{argument: [1]})


def test_config_load_of_invalid_files_raises(tmp_path):
    for name, text, message in (
        ("a.toml", "ppo = ", "a.toml: this is not TOML"),
        ("a.json", "{", "a.json: this is not JSON"),
        ("b.json", "[]", "b.json: Config.from_dict got list"),
        (
            "b.toml",
            "[ppo]\nepoch = 1",
            "b.toml: unknown name 'ppo.epoch'; did you mean 'ppo.epochs'?",
        ),
        ("c.toml", "[ppo]\nepochs = 'x'", "c.toml: ppo.epochs='x': expected int"),
        ("a.yaml", "", "'.*a.yaml' ends in '.yaml': expected .toml or .json"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises((ValueError, TypeError), match=message.replace("?", r"\?")):
            Config.load(tmp_path / name)
    (tmp_path / "d.toml").write_bytes('[model]\nname = "läufe"'.encode("latin-1"))
    with pytest.raises(ValueError, match="d.toml: 'utf-8' codec can't decode"):
        Config.load(tmp_path / "d.toml")
    with pytest.raises(ValueError, match="expected .toml or .json"):
        Config().save(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError):
        Config.load(tmp_path / "missing.toml")
