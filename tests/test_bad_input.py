"""Invalid input to policy, engine, PPO, agent, rollouts, cloning and trainer raises a clear error and loses no episodes."""

import copy
import re
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from doubles import (
    RANK,
    Walk,
    config,
    lake,
    lake_agent,
    make_policy,
    tokenizer_of,
    users_model,
    walk_task,
)

from llamagym.agent import Agent, InvalidResponse
from llamagym.algorithms.forward import compute_values_and_ref_logprobs
from llamagym.algorithms.hidden_states import hidden_states
from llamagym.algorithms.optimization import NonFiniteLoss
from llamagym.chat.conversation import ContextOverflow
from llamagym.config import Config, GenerateConfig, LoRAConfig, PPOConfig, WarmstartConfig
from llamagym.envs.actions import shorten
from llamagym.envs.adapters import episode_seed
from llamagym.envs.baselines import RandomAgent, play
from llamagym.episodes.episode import Episode
from llamagym.inference.engine import Engine
from llamagym.models.policy import Policy
from llamagym.models.tiny import tiny_config, tiny_model, tiny_tokenizer
from llamagym.ppo import PPO
from llamagym.rollout import RolloutError, collect, evaluate
from llamagym.trainer import Trainer
from llamagym.training import cloning as warmstart
from llamagym.training.callbacks import Callback
from llamagym.training.cloning import as_transcripts, clone, encode, from_messages

pytestmark = pytest.mark.filterwarnings(
    "ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing"
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy("lora")


def agent_of(policy, task=None, **options) -> Agent:
    return Agent.for_task(task or walk_task(), policy, config=config(**options))


class Plain(Agent):
    """An agent with the three required methods only"""

    def get_system_prompt(self):
        return "Walk."

    def format_observation(self, observation):
        return f"Step {observation}."

    def extract_action(self, response):
        return 0


def plain_agent(policy, cls=Plain, **options) -> Agent:
    return cls(policy, config=config(**options))


# policy


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            dict(name="tiny:lama"),
            ValueError,
            r"unknown tiny family 'lama': did you mean 'tiny:llama'\? Expected one of llama, smollm, qwen2",
        ),
        (dict(quantize="int8", lora=RANK), ValueError, "quantize='int8': expected None or 'nf4'"),
        (
            dict(quantize="nf4"),
            ValueError,
            r"4-bit weights cannot be trained themselves: pass lora=LoRAConfig\(...\) with quantize='nf4'",
        ),
        (
            dict(dtype="float33"),
            ValueError,
            "dtype='float33': expected 'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        (
            dict(lora=3),
            TypeError,
            "lora=3: expected a llamagym.config.LoRAConfig or a peft.LoraConfig",
        ),
        (
            dict(lora=LoRAConfig(target_modules=["nope"])),
            ValueError,
            "Target modules .*nope.* not found in the base model",
        ),
        (
            dict(critic="none"),
            ValueError,
            "critic='none': expected one of reference, detached, shared",
        ),
        (
            dict(name="./no/such/folder"),
            FileNotFoundError,
            "./no/such/folder is not a folder; expected a checkpoint, a saved policy, a hub name or 'tiny'",
        ),
        (dict(name=3), TypeError, "3|int"),
    ],
    ids=str,
)
def test_bad_input_policy_load_raises(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Policy.load(**(dict(name="tiny", device="cpu") | arguments))


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (
            "llama",
            TypeError,
            "model is a str; expected a transformers causal LM, a peft model or a Policy",
        ),
        (None, TypeError, "model is a NoneType; expected"),
        (torch.nn.Linear(2, 2), TypeError, "model is a Linear; expected"),
        (
            lambda: transformers.AutoModel.from_config(tiny_config()),
            TypeError,
            "LlamaModel has no language-model head; load it with AutoModelForCausalLM",
        ),
    ],
    ids=["str", "None", "module", "headless"],
)
def test_bad_input_policy_raises(model, kind, message):
    with pytest.raises(kind, match=message):
        Policy(
            model() if callable(model) and not isinstance(model, torch.nn.Module) else model,
            tiny_tokenizer(),
        )


def test_bad_input_policy_without_a_tokenizer_raises():
    with pytest.raises(
        TypeError, match="tokenizer is a NoneType; expected a transformers tokenizer"
    ):
        Policy(tiny_model(), None)


def test_bad_input_missing_or_mismatched_saved_policy_raises(policy, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"no policy saved at {tmp_path}: .*policy.json is missing"
    ):
        policy.restore(tmp_path)
    policy.save(tmp_path / "p")
    with pytest.raises(
        ValueError, match="is a saved policy, which brings its own lora and critic; leave that out"
    ):
        Policy.load(tmp_path / "p", lora=RANK, critic="shared")
    for other, message in (
        (
            make_policy("plain"),
            r"was saved with adapter='default', this policy has adapter=None; load it with Policy.load",
        ),
        (
            make_policy("lora", critic="shared"),
            r"was saved with critic='detached', this policy has critic='shared'",
        ),
        (
            make_policy("lora", value_head_width=4),
            r"was saved with value_head_width=64, this policy has value_head_width=4",
        ),
    ):
        weights = [p.clone() for p in other.parameters()]
        with pytest.raises(ValueError, match=message):
            other.restore(tmp_path / "p")
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), weights))
    meta = tmp_path / "p" / "policy.json"
    meta.write_text(meta.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(ValueError, match="has policy format 99; this version reads format 2"):
        Policy.load(tmp_path / "p")


def test_bad_input_nested_as_reference_raises(policy):
    with (
        policy.as_reference(),
        pytest.raises(RuntimeError, match=r"as_reference\(\) is already active"),
        policy.as_reference(),
    ):
        pass
    with pytest.raises(ZeroDivisionError), policy.as_reference():
        1 / 0  # noqa: B018
    assert not policy.reference.is_active and all(p.requires_grad for p in policy.parameters())


def test_bad_input_frozen_adapter_is_unfrozen_and_frozen_model_raises(policy, tmp_path):
    """peft loads adapters frozen by default; without unfreezing them, a run would train nothing"""
    policy.model.save_pretrained(tmp_path)
    frozen = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())
    unfrozen = Policy(frozen, tiny_tokenizer())
    assert [p.shape for p in unfrozen.parameters()] == [p.shape for p in policy.parameters()]
    with pytest.raises(ValueError, match="(?i)no .*trainable|nothing .*train|requires_grad"):
        Policy(tiny_model().requires_grad_(False), tiny_tokenizer())


# engine


@pytest.mark.parametrize(
    ("prompts", "streams", "kind", "message"),
    [
        ([[1], [2]], 1, ValueError, "2 prompts but 1 random generators; each prompt needs its own"),
        ([[1], []], 2, ValueError, "prompt 1 is empty; a prompt needs at least one id"),
        ([[1, 10**6]], 1, ValueError, "1000000"),
        ([[-1]], 1, ValueError, "-1"),
        (["text"], 1, TypeError, "str.*ids"),
        ([[1]], [0], TypeError, "int.*Generator"),
    ],
    ids=["streams", "empty", "unknown-id", "negative-id", "text", "no-stream"],
)
def test_bad_input_engine_sample_raises(policy, prompts, streams, kind, message):
    streams = (
        [np.random.default_rng(i) for i in range(streams)] if isinstance(streams, int) else streams
    )
    with pytest.raises(kind, match=message):
        Engine(policy, (), GenerateConfig(max_new_tokens=2)).sample(prompts, streams)


def test_bad_input_engine_sample_of_no_prompts_returns_an_empty_list(policy):
    assert Engine(policy, (), GenerateConfig()).sample([], []) == []


# ppo


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("policy",), "policy is a str; expected a Policy"),
        ((None, {"clip_range": 0.1}), "config is a dict; expected a PPOConfig"),
        ((None, PPOConfig(), {"gamma": 1}), "credit is a dict; expected a CreditConfig"),
    ],
)
def test_bad_input_ppo_arguments_raise(policy, arguments, message):
    with pytest.raises(TypeError, match=message):
        PPO(arguments[0] or policy, *arguments[1:])


@pytest.mark.parametrize(
    ("episodes", "kind", "message"),
    [
        (lambda rollout: [], ValueError, "no episodes to learn from"),
        (lambda rollout: None, TypeError, "episodes is a NoneType; expected a sequence of Episode"),
        (
            lambda rollout: rollout[0],
            TypeError,
            "episodes is a Episode; expected a sequence of Episode",
        ),
        (lambda rollout: [*rollout, "text"], TypeError, "str"),
        (
            lambda rollout: [Episode()],
            ValueError,
            "a batch needs at least one turn, got 1 episodes without any",
        ),
        (
            lambda rollout: play(walk_task(), RandomAgent(walk_task()), 2),
            ValueError,
            "episode 0, turn 0: it lies in segment 0, of 0",
        ),
        (
            lambda rollout: with_invalid_turn(rollout, "logprobs", None),
            ValueError,
            "episode 1, turn 0: it has no logprobs: record them while sampling",
        ),
        (
            lambda rollout: with_invalid_turn(rollout, "response_ids", [1, 2]),
            ValueError,
            "episode 1, turn 0: .*logprobs for 2 response_ids",
        ),
        (
            lambda rollout: with_invalid_turn(rollout, "terminated", False, -1),
            ValueError,
            "episode 1 is not over: its last turn is neither terminated nor truncated",
        ),
        (
            lambda rollout: with_invalid_turn(
                with_invalid_turn(rollout, "truncated", True, -1), "terminated", False, -1
            ),
            ValueError,
            "is truncated but has no final_ids",
        ),
    ],
    ids=[
        "none",
        "None",
        "one",
        "texts",
        "empty",
        "transcripts",
        "no-logprobs",
        "drifted",
        "unfinished",
        "cut",
    ],
)
def test_bad_input_ppo_update_raises_and_changes_nothing(policy, episodes, kind, message):
    agent = agent_of(policy)
    rollout = collect(agent, episodes=2, num_envs=2)
    before = [p.detach().clone() for p in policy.parameters()]
    with pytest.raises(kind, match=message):
        agent.learner.update(episodes(rollout))
    assert (
        all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))
        and not policy.reference.is_active
    )


def with_invalid_turn(rollout, name, value, turn=0):
    "Set an attribute of one turn of the second episode"
    setattr(rollout[1].turns[turn], name, value)
    return rollout


def test_bad_input_compute_values_error_names_the_episode(policy):
    rollout = collect(agent_of(policy), episodes=2, num_envs=2)
    rollout[1].turns[-1].truncated, rollout[1].turns[-1].terminated = True, False
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"{rollout[1]!r} is truncated but has no final_ids, the prompt of its final state, "
            "to compute the last value from"
        ),
    ):
        compute_values_and_ref_logprobs(policy, rollout)


# agent


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            lambda: ("llama", tiny_tokenizer()),
            TypeError,
            "model is a str; expected a transformers causal LM, a peft model or a Policy",
        ),
        (
            lambda: (tiny_model(),),
            TypeError,
            "a tokenizer is needed with a LlamaForCausalLM; only a Policy brings its own",
        ),
        (
            lambda: (tiny_model(), "tokenizer"),
            TypeError,
            "tokenizer is a str; expected a transformers tokenizer",
        ),
        (
            lambda: (tiny_model(), tiny_tokenizer(), "cpu", 3),
            TypeError,
            "generate_config_dict is a int: expected a dictionary of names to values",
        ),
        (
            lambda: (tiny_model(), tiny_tokenizer(), "cpu", {}, [1]),
            TypeError,
            "ppo_config_dict is a list: expected a dictionary",
        ),
        (
            lambda: (tiny_model(), tiny_tokenizer(), "cpu", {"generate/max_nw_tokens": 3}),
            ValueError,
            "'generate.max_nw_tokens'; did you mean .*max_new_tokens",
        ),
        (
            lambda: (tiny_model(), tiny_tokenizer(), "cpu", {}, {"batchsize": 3}),
            ValueError,
            "unknown name 'ppo.batchsize'; did you mean 'ppo.turns_per_update'",
        ),
        (
            lambda: (tiny_model(), tiny_tokenizer(), "cpu", {"max_new_tokens": 0}),
            ValueError,
            "generate.max_new_tokens=0: expected >= 1",
        ),
        (
            lambda: (tiny_model(), tiny_tokenizer(), "cpu", {"temperature": 0}),
            ValueError,
            "generate.temperature=0: expected > 0",
        ),
        (
            lambda: (tiny_model(), tiny_tokenizer(), "cpu", None, None, {"ppo.epochs": 1}),
            TypeError,
            r"config is a dict; expected a Config \(Config.from_dict",
        ),
        (
            lambda: (tiny_model(), tiny_tokenizer(), "cpu", {"top_k": 1}, None, Config()),
            ValueError,
            r"pass either config or the legacy dictionaries \(2024\), not both",
        ),
        (lambda: (tiny_model(), tiny_tokenizer(), "nowhere"), RuntimeError, "nowhere"),
    ],
    ids=[
        "model",
        "no-tokenizer",
        "tokenizer",
        "generate",
        "ppo",
        "unknown-generate",
        "unknown-ppo",
        "range",
        "temperature",
        "config",
        "both",
        "device",
    ],
)
def test_bad_input_agent_arguments_raise(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Plain(*arguments())


def test_bad_input_quantized_model_without_adapters_raises():
    with pytest.raises(
        TypeError,
        match="a quantized model cannot be trained itself: add an adapter to it with peft.get_peft_model",
    ):
        Plain(users_model("nf4").unload(), tiny_tokenizer())


def test_bad_input_agent_without_its_three_methods_raises(policy):
    class Half(Agent):
        def get_system_prompt(self):
            return ""

    with pytest.raises(
        TypeError, match="abstract methods '?extract_action'?, '?format_observation'?"
    ):
        Half(policy)


@pytest.mark.parametrize("task", ["Blackjack-v1", None, 3])
def test_bad_input_agent_for_task_rejects_other_types(policy, task):
    with pytest.raises(
        TypeError,
        match=rf"task is a {type(task).__name__}; expected a Task, such as llamagym.envs.toy_text.blackjack\(\)",
    ):
        Agent.for_task(task, policy)


@pytest.mark.parametrize("text", [None, 3, b"Step", ["Step"]])
def test_bad_input_observation_text_must_be_a_str(policy, text):
    agent = plain_agent(policy)
    agent.act(1)
    agent.format_observation = lambda observation: text
    with pytest.raises(
        TypeError,
        match=f"format_observation gave {re.escape(repr(text))}: expected text, got {type(text).__name__}",
    ):
        agent.act(2)
    del agent.format_observation
    agent.act(2)  # the episode continues
    assert [m["content"] for m in agent.current_episode_messages if m["role"] == "user"] == [
        "Step 1.",
        "Step 2.",
    ]


def test_bad_input_system_prompt_must_be_a_str(policy):
    class Numbers(Plain):
        def get_system_prompt(self):
            return 42

    with pytest.raises(TypeError, match="system_prompt: expected a text or None, got int"):
        plain_agent(policy, Numbers).act(1)


def test_bad_input_calls_out_of_order_raise(policy):
    agent = plain_agent(policy)
    with pytest.raises(
        RuntimeError, match=r"assign_reward\(\) before act\(\): there is no action to reward yet"
    ):
        agent.assign_reward(1.0)
    assert agent.terminate_episode() == {} and agent.terminate_episode(train=False) == {}
    agent.act(1)
    with pytest.raises(
        ValueError,
        match="truncated=True needs next_observation=, the observation that the last env.step returned",
    ):
        agent.terminate_episode(truncated=True)
    agent.assign_reward(2.0)
    agent.terminate_episode()
    (episode,) = agent.buffer
    assert episode.total_reward == 2.0 and episode.terminated
    with pytest.raises(RuntimeError, match=r"before act\(\)"):
        agent.assign_reward(1.0)


@pytest.mark.parametrize(
    ("reward", "kind", "message"),
    [
        (None, TypeError, "reward None: expected a number, got NoneType"),
        ("1", TypeError, "reward '1': expected a number, got str"),
        ([1.0], TypeError, r"reward \[1.0\]: expected a number, got list"),
        (float("nan"), ValueError, "reward nan: expected a finite number"),
        (np.float32("inf"), ValueError, "reward .*inf.*: expected a finite number"),
    ],
    ids=str,
)
def test_bad_input_rewards_raise(policy, reward, kind, message):
    agent = plain_agent(policy)
    agent.act(1)
    agent.assign_reward(0.5)
    with pytest.raises(kind, match=message):
        agent.assign_reward(reward)
    assert agent.current_episode_rewards == [0.5]
    agent.assign_reward(np.float64(0.25))
    agent.terminate_episode()
    assert agent.buffer[0].total_reward == 0.75


def test_bad_input_observation_longer_than_the_context_raises(policy):
    """The error shows the observation, keeps earlier turns, and the episode can be ended or continued"""
    agent = plain_agent(policy, context__max_length=120)
    agent.act(1)
    agent.assign_reward(1.0)
    message = r"an observation of \d+ tokens makes a prompt of \d+, but max_length=120 with max_new_tokens=4 leaves room for 116: 'Step xyz xyz"
    with pytest.raises(ContextOverflow, match=message):
        agent.act("xyz " * 60)
    assert agent.current_episode_rewards == [1.0] and len(agent.current_episode_messages) == 3
    agent.act(2)
    agent.terminate_episode()
    assert [t.observation for t in agent.buffer[0].turns] == ["Step 1.", "Step 2."]
    with pytest.raises(ContextOverflow, match="an observation of"):
        agent.act("xyz " * 60)  # an interrupt at the episode's first response
    assert agent.terminate_episode() == {}
    agent.act(3)
    assert agent.current_episode_messages[1]["content"] == "Step 3."


@pytest.mark.parametrize("before", [0, 1])
def test_bad_input_interrupt_while_sampling_leaves_the_agent_usable(policy, before):
    """After an interrupt, the loop can be run again, with or without terminating the episode"""
    for terminates in (True, False):
        agent = plain_agent(policy)
        for i in range(before):
            agent.act(i)
            agent.assign_reward(float(i))
        sample = agent.engine.sample
        agent.engine.sample = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            agent.act(7)
        agent.engine.sample = sample
        if terminates:
            agent.terminate_episode()
        agent.act(8)
        agent.assign_reward(5.0)
        agent.terminate_episode()
        assert len(agent.buffer) == (2 if before and terminates else 1)
        assert [t.observation for t in agent.buffer[-1].turns] == ["Step 0."] * (
            before and not terminates
        ) + ["Step 8."]
        for episode in agent.buffer:
            episode.validate()


@pytest.mark.parametrize("error", [KeyboardInterrupt, NonFiniteLoss], ids=lambda e: e.__name__)
def test_bad_input_failed_update_loses_no_episode(policy, error, tmp_path):
    agent = plain_agent(copy.deepcopy(policy), ppo__turns_per_update=3)
    agent.learner.failure_dir = tmp_path
    update = agent.learner.update
    agent.learner.update = lambda episodes: (_ for _ in ()).throw(error("stop"))
    for i in range(3):
        agent.act(i)
        agent.assign_reward(1.0)
        if i < 2:
            assert agent.terminate_episode() == {}
    with pytest.raises(error):
        agent.terminate_episode()
    assert [e.turns[0].observation for e in agent.buffer] == ["Step 0.", "Step 1.", "Step 2."]
    agent.learner.update = update
    agent.act(3)
    # the next update trains on the kept episodes
    assert agent.terminate_episode()["mean_episode_length"] == 1.0 and len(agent.buffer) == 0


def test_bad_input_response_without_an_action(policy):
    class Strict(Plain):
        def extract_action(self, response):
            raise ValueError("not a word of it")

    agent = plain_agent(policy, Strict, rollout__on_invalid="terminate")
    with pytest.raises(InvalidResponse, match="ValueError: not a word of it"):
        agent.act(1)
    agent.terminate_episode()
    assert (
        len(agent.buffer) == 1
        and agent.buffer[0].turns[0].action is None
        and not agent.buffer[0].turns[0].valid
    )
    agent = plain_agent(policy, Strict)
    with pytest.raises(
        InvalidResponse,
        match=r"action_space=env.action_space, or write fallback_action\(observation\)",
    ):
        agent.act(1)
    agent = Strict(policy, config=config(), action_space=Walk.action_space)
    assert agent.act(1) == 0


def test_bad_input_action_outside_the_space(policy):
    class Wild(Plain):
        def extract_action(self, response):
            return 7

    agent = Wild(policy, config=config(), action_space=Walk.action_space)
    assert agent.act(1) == 0
    agent.terminate_episode()
    turn = agent.buffer[0].turns[0]
    assert (
        turn.invalid_reason
        == f"the action 7 (int) in {shorten(turn.response)} is not in Discrete(2)"
    )
    # tasks whose environments list their actions
    (episode,) = collect(Wild(policy, config=config()), Walk, episodes=1, num_envs=1)
    assert "7 (int)" in episode.turns[0].invalid_reason and [t.action for t in episode.turns] == [
        0,
        0,
        0,
    ]


@pytest.mark.filterwarnings("default:none of .* responses held an action")
def test_bad_input_warns_about_the_parser_if_no_response_is_valid(policy):
    class Buggy(Plain):
        def extract_action(self, response):
            return undefined_name  # noqa: F821

    message = r"(?s)none of \d+ responses held an action. If the last one should have, extract_action is at fault.\nresponse: .*NameError.*undefined_name"
    with pytest.warns(UserWarning, match=message):
        collect(plain_agent(policy, Buggy), Walk, episodes=4, num_envs=4)
    agent = Buggy(policy, config=config(), action_space=Walk.action_space)
    with pytest.warns(UserWarning, match="(?s)none of 64 responses .*undefined_name"):
        for i in range(64):
            agent.act(i)
            agent.terminate_episode(train=False)


def test_bad_input_agent_that_cannot_be_copied(policy):
    agent = plain_agent(policy)
    agent.lock = (i for i in ())
    with pytest.raises(
        TypeError,
        match=r"Plain holds something that cannot be copied for a further environment \(.*generator.*\); override spawn\(\)",
    ):
        agent.spawn()


# rollout


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            dict(agent=3),
            TypeError,
            r"agent is a int; expected a llamagym Agent \(Agent.for_task\(task, model\) makes one\)",
        ),
        (
            dict(env=walk_task()),
            TypeError,
            r"env is a Task, whose text interface must be the agent's: make the agent with Agent.for_task\(task, model\) and leave env out",
        ),
        (
            dict(env=None),
            ValueError,
            "env is needed: only an agent made by Agent.for_task has one of its own",
        ),
        (dict(env=3), TypeError, "env=3: expected an id, a factory or a gymnasium.Env, got int"),
        (
            dict(env=Walk(2), num_envs=2),
            ValueError,
            "num_envs=2 but env is one instance that Gymnasium cannot make again; pass a factory, or num_envs=1",
        ),
        (dict(episodes=0), ValueError, "episodes=0: expected a whole number of at least 1"),
        (dict(episodes=1.5), ValueError, "episodes=1.5: expected a whole number of at least 1"),
        (dict(num_envs=0), ValueError, "num_envs=0: expected a whole number of at least 1"),
        (dict(num_envs="4"), ValueError, "num_envs='4': expected a whole number of at least 1"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_bad_input_collect_and_evaluate_arguments_raise(policy, arguments, kind, message):
    arguments = dict(agent=plain_agent(policy), env=Walk, episodes=2) | arguments
    for call in (collect, evaluate):
        with pytest.raises(kind, match=message):
            call(**arguments)


@pytest.mark.parametrize(
    ("name", "value"), [("seed", "x"), ("seed", -1), ("seed", 1.5), ("first", -1)]
)
def test_bad_input_collect_seed_raises(policy, name, value):
    with pytest.raises(
        ValueError, match=f"{name}={value!r}: expected a whole number of at least 0"
    ):
        collect(agent_of(policy), episodes=1, **{name: value})


def test_bad_input_evaluate_seed_raises(policy):
    with pytest.raises(ValueError, match=r"seeds=\[\]: expected at least one"):
        evaluate(agent_of(policy), episodes=1, seeds=[])
    with pytest.raises(ValueError, match="seed='a': expected a whole number"):
        evaluate(agent_of(policy), episodes=1, seeds="ab")


class EnvironmentFailure(Exception):
    """An error that the test environment raises"""


def trouble_at(where, number, step=1):
    def trouble(here, seed, t):
        if here == where and seed == number and (here == "reset" or t == step):
            raise EnvironmentFailure(f"a storm at {here} {t} of {seed}")

    return trouble


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("where", ["reset", "step"])
def test_bad_input_environment_error_fails_only_its_episode(policy, where, num_envs):
    expected = collect(agent_of(policy), episodes=6, num_envs=num_envs)
    turns = 0 if where == "reset" else 2
    message = rf"episode 2 \(seed {episode_seed(0, 2)}\) failed after {turns} turns: EnvironmentFailure: a storm at {where} . of 2. The other 5 episodes are kept"
    with pytest.warns(UserWarning, match=message):
        rollout = collect(
            agent_of(policy, walk_task(trouble=trouble_at(where, 2))), episodes=6, num_envs=num_envs
        )
    assert [e.index for e in rollout] == [0, 1, 3, 4, 5]
    (failure,) = rollout.failures
    assert (failure.index, failure.seed, failure.turns, type(failure.error)) == (
        2,
        episode_seed(0, 2),
        turns,
        EnvironmentFailure,
    )
    for episode in rollout:  # the other episodes are unchanged
        other = expected[episode.index]
        assert [(t.response_ids, t.reward) for t in episode.turns] == [
            (t.response_ids, t.reward) for t in other.turns
        ]
        episode.validate()


def test_bad_input_failed_environment_is_replaced(policy):
    created = []

    def factory():
        created.append(Walk(3, trouble_at("step", 1)))
        return created[-1]

    with pytest.warns(UserWarning, match="episode 1 "):
        rollout = collect(plain_agent(policy), factory, episodes=4, num_envs=1)
    assert (
        len(rollout) == 3
        and len(created) == 2
        and created[0].number == 1
        and created[1].number == 3
    )


@pytest.mark.parametrize(
    "method", ["format_observation", "format_reward", "fallback", "legal_actions"]
)
def test_bad_input_task_method_error_fails_only_its_episode(policy, method):
    def raises(*arguments):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise EnvironmentFailure("lost for words")
        return {
            "format_observation": lambda: f"Step {arguments[0][1]}.",
            "format_reward": lambda: 0.0,
            "fallback": lambda: 0,
            "legal_actions": lambda: [1],
        }[method]()

    calls = 0
    task = walk_task(
        2,
        **(
            {method: raises}
            | (
                {}
                if method in ("format_observation", "format_reward")
                else dict(extract_action=lambda text: None)
            )
        ),
    )
    with pytest.warns(
        UserWarning,
        match=r"episode \d \(seed \d+\) failed after \d turns: EnvironmentFailure: lost for words. The other 4 episodes are kept",
    ):
        rollout = collect(agent_of(policy, task), episodes=5, num_envs=2)
    assert len(rollout) == 4 and all(len(e) == 2 for e in rollout)


def test_bad_input_environment_error_on_close(policy):
    def trouble(where, seed, t):
        if where == "close" or (where, seed) == ("step", 1):
            raise EnvironmentFailure(f"a storm at {where}")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rollout = collect(agent_of(policy, walk_task(trouble=trouble)), episodes=4, num_envs=2)
    assert [e.index for e in rollout] == [0, 2, 3] and any(
        "episode 1 (seed" in str(w.message) for w in caught
    )


def test_bad_input_collect_raises_if_all_episodes_fail(policy):
    def trouble(where, seed, t):
        if where == "step" and t == 1:
            raise EnvironmentFailure(f"a storm over {seed}")

    first = rf"episode 0 \(seed {episode_seed(5, 0)}\) failed after 2 turns: EnvironmentFailure: a storm over 5"
    message = (
        rf"(?s)all 3 episodes failed; the first:\n{first}\nTraceback.*raise EnvironmentFailure"
    )
    with pytest.raises(RolloutError, match=message) as caught:
        collect(agent_of(policy, walk_task(trouble=trouble)), episodes=3, num_envs=2, seed=5)
    assert [f.index for f in caught.value.failures] == [0, 1, 2]


def test_bad_input_environment_that_cannot_be_created_raises(policy):
    with pytest.raises(
        RolloutError, match="(?s)all 2 episodes failed.*Blackjck.*Did you mean: `Blackjack`"
    ):
        collect(plain_agent(policy), "Blackjck-v1", episodes=2)
    with pytest.raises(
        RolloutError, match="(?s)all 2 episodes failed.*made a str: expected a gymnasium.Env"
    ):
        collect(plain_agent(policy), lambda: "an environment", episodes=2)


@pytest.mark.parametrize("when", [0, 1])
def test_bad_input_too_long_observation_fails_only_its_episode(policy, when):
    task = walk_task(
        3,
        format_observation=lambda obs, info: (
            "xyz " * 80 if tuple(obs) == (1, when) else f"Step {obs[1]}."
        ),
    )
    agent = agent_of(policy, task, context__max_length=200)
    failure = rf"episode 1 \(seed {episode_seed(0, 1)}\) failed after {when} turns: ContextOverflow: an observation of \d+ tokens .* 'xyz xyz"
    message = rf"(?s){failure}.*The other 3 episodes are kept"
    with pytest.warns(UserWarning, match=message):
        rollout = collect(agent, episodes=4, num_envs=2)
    assert [e.index for e in rollout] == [0, 2, 3] and all(len(e) == 3 for e in rollout)


def test_bad_input_long_episode_continues_in_a_new_row(policy):
    """A conversation longer than the context continues in a new row, which is trained and valued like any other"""
    task = walk_task(9, format_observation=lambda obs, info: f"Step {obs[1]} " + "xyz " * 12)
    agent = agent_of(copy.deepcopy(policy), task, context__max_length=200, ppo__epochs=1)
    rollout = collect(agent, episodes=2, num_envs=2)
    assert not rollout.failures and all(len(e.segments) > 1 and len(e) == 9 for e in rollout)
    for episode in rollout:
        episode.validate()
    assert agent.learner.update(rollout)["max_logprob_diff"] < 1e-4


def test_bad_input_nan_reward_fails_its_episode_or_stops_the_update(policy, tmp_path):
    """A NaN reward from the environment fails its episode; in a batch it stops the update, which changes nothing and keeps the episodes"""
    task = walk_task(
        2, reward_function=lambda seed, t: float("nan") if (seed, t) == (1, 1) else 1.0
    )
    agent = agent_of(copy.deepcopy(policy), task)
    agent.learner.failure_dir = tmp_path
    with pytest.warns(
        UserWarning,
        match=r"episode 1 \(seed \d+\) failed after 2 turns: ValueError: reward nan: expected a finite number. The other 2",
    ):
        rollout = collect(agent, episodes=3, num_envs=3)
    assert [e.index for e in rollout] == [0, 2]
    rollout[0].turns[1].reward = float("nan")
    weights = [p.detach().clone() for p in agent.policy.parameters()]
    with pytest.raises(
        NonFiniteLoss,
        match="before the first step, in Batch.*saved as .*No weight was changed. Look for a reward",
    ):
        agent.learner.update(rollout)
    assert all(torch.equal(a, b) for a, b in zip(agent.policy.parameters(), weights))
    assert np.isfinite(
        agent.learner.update([e for e in rollout if np.isfinite(e.total_reward)])["policy_loss"]
    )


# warm start


@pytest.mark.parametrize(
    ("messages", "rewards", "kind", "message"),
    [
        (
            [],
            None,
            ValueError,
            r"roles \[\]: expected user and assistant in turn, ending with the assistant",
        ),
        (
            [dict(role="user", content="a")],
            None,
            ValueError,
            r"roles \['user'\]: expected user and assistant in turn",
        ),
        (
            [dict(role="assistant", content="a"), dict(role="user", content="b")],
            None,
            ValueError,
            r"roles \['assistant', 'user'\]: expected",
        ),
        (
            [dict(role="user", text="a")],
            None,
            ValueError,
            r"message \{'role': 'user', 'text': 'a'\}: expected a mapping with role and content",
        ),
        (["hello"], None, ValueError, "message 'hello': expected a mapping with role and content"),
        (
            [dict(role="user", content="a"), dict(role="assistant", content="b")],
            [1, 2],
            ValueError,
            "2 rewards for 1 responses: expected one each, or",
        ),
    ],
)
def test_bad_input_messages_raise(messages, rewards, kind, message):
    with pytest.raises(kind, match=message):
        from_messages(messages, rewards)


@pytest.mark.parametrize(
    ("trajectories", "kind", "message"),
    [
        (
            [],
            ValueError,
            "no trajectories: clone needs at least one episode with a turn; llamagym.envs.baselines.play makes some",
        ),
        ([Episode()], ValueError, "no trajectories"),
        (
            [3],
            TypeError,
            "a trajectory is a int; expected an Episode, a list of messages, or a mapping with messages and rewards",
        ),
        (["user: hello"], TypeError, "a trajectory is a str; expected an Episode"),
        ([dict(message=[])], TypeError, "a trajectory is a dict; expected"),
    ],
)
def test_bad_input_clone_arguments_raise(policy, trajectories, kind, message):
    with pytest.raises(kind, match=message):
        as_transcripts(trajectories)
    with pytest.raises(kind, match=message):
        clone(agent_of(policy), trajectories, progress=False)


def test_bad_input_clone_without_an_agent_raises(policy):
    with pytest.raises(TypeError, match="agent is a Policy; expected a llamagym Agent"):
        clone(policy, play(walk_task(), RandomAgent(walk_task()), 1), progress=False)


def test_bad_input_clone_with_an_invalid_transcript_changes_nothing(policy):
    valid = play(walk_task(), RandomAgent(walk_task()), 2)
    invalid = [
        dict(role="user", content="xyz " * 3000),
        dict(role="assistant", content="Action: 1"),
    ]
    own = copy.deepcopy(policy)
    before = [p.detach().clone() for p in own.parameters()]
    with pytest.raises(ContextOverflow, match="an observation of .* tokens makes a prompt of"):
        clone(agent_of(own), [*valid, invalid], progress=False)
    with pytest.raises(TypeError, match="int"):
        encode(
            agent_of(own),
            from_messages(
                [dict(role="user", content=3), dict(role="assistant", content="Action: 1")]
            ),
        )
    assert (
        all(torch.equal(a, b) for a, b in zip(own.parameters(), before))
        and not own.reference.is_set
    )


def test_bad_input_policy_plays_after_an_interrupted_clone(policy, monkeypatch):
    own = make_policy("lora", lora=LoRAConfig(r=4, dropout=0.5))
    agent, calls = agent_of(own), []

    def interrupt(*args):
        calls.append(own.model.training)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return hidden_states(*args)

    monkeypatch.setattr(warmstart, "hidden_states", interrupt)
    with pytest.raises(KeyboardInterrupt):
        clone(
            agent,
            play(walk_task(), RandomAgent(walk_task()), 8),
            WarmstartConfig(batch_size=2),
            progress=False,
        )
    monkeypatch.undo()
    assert (
        calls == [True, True]
        and not own.model.training
        and all(p.grad is None for p in [*own.parameters(), *own.value_head.parameters()])
    )
    assert agent.learner.update(collect(agent, episodes=2, num_envs=2))["max_logprob_diff"] < 1e-4


# trainer


def trainer_of(policy, folder, task=None, callbacks=(), **options) -> Trainer:
    options = (
        dict(
            trainer__output_dir=str(folder),
            trainer__updates=2,
            trainer__eval_every=0,
            rollout__episodes=2,
            ppo__epochs=1,
        )
        | options
    )
    return Trainer(agent_of(copy.deepcopy(policy), task, **options), callbacks=callbacks)


def test_bad_input_trainer_arguments_raise(policy, tmp_path):
    with pytest.raises(TypeError, match="agent is a Policy; expected a llamagym Agent"):
        Trainer(policy)
    with pytest.raises(
        ValueError,
        match="unknown callback 'progres'; expected a Callback, or one of .*metrics.*progress",
    ):
        trainer_of(policy, tmp_path, callbacks=["progres"])
    for callback in (3, Callback):
        with pytest.raises(
            ValueError, match=f"unknown callback {re.escape(repr(callback))}; expected a Callback"
        ):
            trainer_of(policy, tmp_path, callbacks=[callback])
    with pytest.raises(TypeError, match="config is a dict; expected a TrainerConfig"):
        Trainer(agent_of(policy), config={"updates": 3})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("updates", [-1, 1.5, "3"])
def test_bad_input_number_of_updates_raises(policy, tmp_path, updates):
    with pytest.raises((TypeError, ValueError), match=f"updates={updates!r}: expected"):
        trainer_of(policy, tmp_path).fit(updates)


def test_bad_input_resume_without_a_checkpoint_raises(policy, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"no checkpoint at .*checkpoint: fit\(\) without resume=True starts afresh",
    ):
        trainer_of(policy, tmp_path).fit(resume=True)
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {tmp_path}"):
        trainer_of(policy, tmp_path).load_checkpoint(tmp_path)


def test_bad_input_resume_of_a_mismatched_policy_raises(policy, tmp_path):
    trainer_of(policy, tmp_path).fit(1)
    with pytest.raises(
        ValueError,
        match="was saved with adapter='default', this policy has adapter=None; load it with Policy.load",
    ):
        trainer_of(make_policy("plain"), tmp_path).fit(resume=True)
    assert (tmp_path / "checkpoint" / "trainer.json").exists()


def test_bad_input_training_counts_failed_episodes_and_ends_if_all_fail(policy, tmp_path):
    """One failed episode is counted in the metrics; if all fail, the run ends and the last checkpoint stays valid"""
    trainer = trainer_of(policy, tmp_path / "one", walk_task(2, trouble_at("step", 1)))
    with pytest.warns(
        UserWarning, match="episode 1 .seed .* failed after 2 turns: EnvironmentFailure"
    ):
        run = trainer.fit()
    assert [line["failed_episodes"] for line in run.history] == [1, 0] and [
        line["episodes"] for line in run.history
    ] == [2, 4]

    def trouble(where, seed, t):
        if where == "reset" and seed in (2, 3):
            raise EnvironmentFailure("all is lost")

    trainer = trainer_of(
        policy, tmp_path / "all", walk_task(2, trouble), trainer__checkpoint_every=1
    )
    with pytest.raises(
        RolloutError, match="(?s)all 2 episodes failed; the first:\nepisode 2 .*all is lost"
    ):
        trainer.fit()
    resumed = trainer_of(policy, tmp_path / "all", trainer__checkpoint_every=1)
    assert len(resumed.fit(resume=True).history) == 2  # after the environment has been repaired


def test_bad_input_callback_error_ends_the_run(policy, tmp_path):
    class Breaks(Callback):
        def on_update_end(self, trainer, metrics):
            raise EnvironmentFailure("in the plot")

    with pytest.raises(EnvironmentFailure, match="in the plot"):
        trainer_of(policy, tmp_path, callbacks=[Breaks()]).fit()


def test_bad_input_unknown_environment_error_suggests_the_closest_id(policy, tmp_path):
    agent = Plain(copy.deepcopy(policy), config=config(trainer__output_dir=str(tmp_path)))
    with pytest.raises(RolloutError, match="(?s)FrozenLke.*Did you mean: `FrozenLake`"):
        Trainer(agent, "FrozenLke-v1").fit(1)


def test_bad_input_tokenizer_without_a_chat_template(policy):
    with pytest.warns(
        UserWarning, match="has no chat template: llamagym.chat.template.PLAIN_TEMPLATE is used"
    ):
        tokenizer = copy.deepcopy(tokenizer_of("none"))
        Plain(tiny_model(tokenizer=tokenizer), tokenizer)


def test_bad_input_response_without_a_stop_token_is_truncated(policy):
    """A response without a stop token ends at the configured length, and no stop token is added"""
    (episode,) = collect(
        lake_agent(policy, task=lake(2), generate__max_new_tokens=1), episodes=1, num_envs=1
    )
    assert all(len(t.response_ids) == 1 for t in episode.turns)
