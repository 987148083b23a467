"""Reasoning models: templates, split of reasoning and response, thinking budgets and truncation."""

import numpy as np
import pytest
import torch
from doubles import lake, perturb
from test_chat_templates import (
    REWRITES_REASONING,
    TEMPLATES,
    adapt_messages,
    chat_messages,
    encode,
    make_tokenizer,
)
from transformers import AutoModelForCausalLM, MambaConfig

import llamagym.inference.sampling
from llamagym.agent import Agent
from llamagym.agents.recorder import TRUNCATED_REASONING
from llamagym.algorithms.advantages import assign_turn_gae
from llamagym.algorithms.batch import Batch
from llamagym.algorithms.forward import compute_values_and_ref_logprobs
from llamagym.buffer import EpisodeBuffer
from llamagym.chat.conversation import Conversation
from llamagym.chat.reasoning import (
    encode_response_with_reasoning,
    reasoning_markers,
    split_reasoning,
)
from llamagym.chat.renderer import ChatRenderer
from llamagym.config import Config, GenerateConfig, LoRAConfig
from llamagym.episodes.episode import Episode, Turn
from llamagym.inference.engine import Engine
from llamagym.inference.sequence import Request, ResponseState, Sample, TokenRecord
from llamagym.models.policy import Policy
from llamagym.models.reference import add_lora
from llamagym.models.tiny import tiny_model, tiny_tokenizer
from llamagym.ppo import PPOUpdate
from llamagym.rollout import collect
from llamagym.training.cloning import encode as encode_transcript
from llamagym.training.cloning import from_messages

pytestmark = pytest.mark.filterwarnings(
    "ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nPROMPT{% endif %}"
)
MARKERS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")


def thinking_tokenizer(opened: bool, markers=MARKERS):
    return tiny_tokenizer(
        CHATML.replace("PROMPT", "<think>\\n" if opened else ""), special_tokens=markers
    )


def thinking_policy(opened: bool = True, family: str = "llama", markers=MARKERS) -> Policy:
    tokenizer = thinking_tokenizer(opened, markers)
    model = add_lora(
        tiny_model(family, vocab_size=len(tokenizer)).requires_grad_(False), LoRAConfig(r=4)
    )
    policy = Policy(model, tokenizer)
    perturb(policy.parameters())
    return policy


def thinking_agent(policy: Policy, max_steps: int = 3, **options) -> Agent:
    config = Config.from_dict(
        {"generate.max_new_tokens": 16}
        | {name.replace("__", "."): value for name, value in options.items()}
    )
    return Agent.for_task(lake(max_steps), policy, config=config)


# Templates with reasoning


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("name", TEMPLATES or ["none"])
def test_reasoning_markers_of_every_template_are_found(name):
    """Markers match transformers' rendering of the end of a prompt"""
    tokenizer = make_tokenizer("bytelevel", name)
    prompt = tokenizer.apply_chat_template(
        adapt_messages(name, chat_messages(None, "u")), tokenize=False, add_generation_prompt=True
    )
    markers = reasoning_markers(ChatRenderer.for_tokenizer(tokenizer))
    end = (
        prompt.rsplit("u", 1)[-1] if "<think>" not in prompt else prompt[prompt.rindex("<think>") :]
    )
    if (
        "</think>" not in TEMPLATES[name]
        and "[/THINK]" not in TEMPLATES[name]
        or "<think>" in end
        and "</think>" in end
    ):
        assert markers is None
        return
    assert markers is not None and markers.opened_in_prompt == prompt.rstrip().endswith("<think>")
    assert name in REWRITES_REASONING or not markers.opened_in_prompt
    renderer = ChatRenderer.for_tokenizer(tokenizer)
    with_reasoning = encode(
        tokenizer,
        ("" if markers.opened_in_prompt else "<think>\n")
        + "Action: 9 loses.\n</think>\n\nAction: 1",
    )
    assert split_reasoning(renderer, with_reasoning, markers) == ("Action: 9 loses.", "Action: 1")
    assert split_reasoning(
        renderer,
        encode(tokenizer, ("" if markers.opened_in_prompt else "<think>\n") + "Action: 9"),
        markers,
    ) == ("Action: 9", "")
    without_reasoning, stopped = encode_response_with_reasoning(renderer, "Action: 1")
    assert (
        split_reasoning(renderer, without_reasoning[: len(without_reasoning) - stopped], markers)[
            1
        ].strip()
        == "Action: 1"
    )


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("special", [True, False], ids=["tokens", "spelled"])
def test_reasoning_and_response_are_split(opened, special):
    """Markers may be special tokens or ordinary text"""
    renderer = ChatRenderer.for_tokenizer(
        thinking_tokenizer(opened, MARKERS if special else MARKERS[:2])
    )
    markers, prefix = reasoning_markers(renderer), "" if opened else "<think>\n"
    for output, expected in [
        ("17. Hit?\n</think>\n\nAction: 0", ("17. Hit?", "Action: 0")),
        ("</think>Action: 0", ("", "Action: 0")),
        # the last marker is used, as in templates
        ("one</think>Action: 1\n</think>\n\nAction: 0", (None, "Action: 0")),
        ("17. Action: 1", ("17. Action: 1", "")),
        ("", ("", "")),
    ]:
        reasoning, response = split_reasoning(
            renderer, encode(renderer.tokenizer, prefix + output), markers
        )
        assert response == expected[1] and (expected[0] is None or reasoning == expected[0])
    if not opened:
        assert split_reasoning(renderer, encode(renderer.tokenizer, "Action: 0"), markers) == (
            None,
            "Action: 0",
        )
        assert split_reasoning(renderer, [], markers) == (None, "")


# Thinking budgets


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_reasoning_ends_when_its_budget_is_spent(opened, family):
    """The end is forced after the budget; the other tokens have the learner's log-probabilities"""
    policy = thinking_policy(opened, family)
    markers, budget = reasoning_markers(ChatRenderer.for_tokenizer(policy.tokenizer)), 5
    prompts = [[1, *range(50 + 7 * i, 56 + 8 * i)] for i in range(12)]
    if not opened:  # a bias of the head, with which some responses have reasoning and some do not
        bias = torch.zeros(len(policy.tokenizer)).index_fill(
            0, torch.tensor(markers.open_ids), 14.0
        )
        policy.causal_lm.get_output_embeddings().bias = torch.nn.Parameter(
            bias, requires_grad=False
        )

    def sample_prompts(indices):
        engine = Engine(
            policy,
            (),
            GenerateConfig(max_new_tokens=16, thinking_budget=budget),
            reasoning=markers,
        )
        return engine.sample(
            [prompts[i] for i in indices],
            [np.random.default_rng(i) for i in indices],
            top_logprobs=2,
        )

    samples = sample_prompts(range(12))
    with_reasoning = [s for s in samples if opened or s.ids[0] == markers.open_ids[0]]
    assert 0 < len(with_reasoning) and (opened or len(with_reasoning) < 12)
    for i, sample in enumerate(samples):
        sampled_positions = [k for k in range(16) if k not in sample.forced_positions]
        assert (
            len(sample.logprobs)
            == len(sample.entropy)
            == len(sample.top_logprobs)
            == len(sampled_positions)
        )
        row = torch.tensor([prompts[i] + sample.ids])
        positions = torch.tensor([len(prompts[i]) + k for k in sampled_positions])
        with torch.no_grad():
            score = policy.score(row, torch.zeros_like(positions), positions)
        assert np.abs(score.logprobs.numpy() - sample.logprobs).max() < 1e-4
        if sample in with_reasoning and markers.close_ids[0] not in sample.ids[:budget]:
            assert sample.forced_positions == list(
                range(budget, budget + len(markers.force_close_ids))
            )
            assert tuple(sample.ids[k] for k in sample.forced_positions) == markers.force_close_ids
        else:
            assert sample.forced_positions == []
        (single,) = sample_prompts([i])
        assert single.ids == sample.ids and single.forced_positions == sample.forced_positions


@pytest.mark.parametrize("end_call", [1, 4, 5])
def test_reasoning_that_ends_within_its_budget_is_not_changed(end_call, monkeypatch):
    """An end marker is sampled up to the last token of the budget, and forced one token later"""
    policy = thinking_policy()
    markers, original, calls = (
        reasoning_markers(ChatRenderer.for_tokenizer(policy.tokenizer)),
        llamagym.inference.sampling.sample_tokens,
        [],
    )

    def sample_tokens(logits, *args):
        calls.append(1)
        return original(
            logits.index_fill(
                -1, torch.tensor(markers.close_ids), 1e4 if len(calls) == end_call else -1e4
            ),
            *args,
        )

    monkeypatch.setattr(llamagym.inference.sampling, "sample_tokens", sample_tokens)
    (sample,) = Engine(
        policy, (), GenerateConfig(max_new_tokens=12, thinking_budget=4), reasoning=markers
    ).sample([[5, 6, 7]], [np.random.default_rng(0)])
    assert sample.ids.count(markers.close_ids[0]) == 1
    assert (sample.ids.index(markers.close_ids[0]), sample.forced_positions) == (
        (end_call - 1, []) if end_call < 5 else (5, [4, 5, 6, 7])
    )


@pytest.mark.parametrize("opened", [False, True])
def test_thinking_budget_of_zero_forces_an_empty_block(opened):
    agent = thinking_agent(thinking_policy(opened), generate__thinking_budget=0)
    markers = agent.engine.reasoning
    for turn in collect(agent, episodes=4, num_envs=4).turns:
        assert tuple(
            turn.response_ids[: len(markers.empty_block_ids)]
        ) == markers.empty_block_ids and turn.forced_positions == list(
            range(len(markers.empty_block_ids))
        )
        assert turn.reasoning == "" and len(turn.logprobs) == len(turn.response_ids) - len(
            markers.empty_block_ids
        )


def test_thinking_budget_works_without_a_kv_cache():
    """A model without a KV cache samples with transformers' `generate`"""
    tokenizer = thinking_tokenizer(True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MambaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            pad_token_id=0,
            eos_token_id=2,
        )
    )
    markers = reasoning_markers(ChatRenderer.for_tokenizer(tokenizer))
    engine = Engine(
        Policy(model, tokenizer),
        (),
        GenerateConfig(max_new_tokens=12, thinking_budget=3),
        reasoning=markers,
    )
    for sample in engine.sample(
        [[5, 6, 7], [5, 6, 8]], [np.random.default_rng(i) for i in range(2)]
    ):
        assert tuple(
            sample.ids[3 : 3 + len(markers.force_close_ids)]
        ) == markers.force_close_ids and len(sample.logprobs) == 12 - len(markers.force_close_ids)


# Training and parsing


@pytest.mark.parametrize("ratio", ["token", "turn", "sequence"])
def test_forced_end_of_reasoning_is_not_trained_on(ratio, tmp_path):
    """Masks, batches, files and gradients contain sampled tokens only; initial ratios are 1"""
    agent = thinking_agent(thinking_policy(), generate__thinking_budget=4, ppo__epochs=1, ppo__mini_batch_size=10**6, ppo__kl_coef=0.0, ppo__ratio=ratio,
                           ppo__max_grad_norm=1e9, credit__normalize=False, credit__gamma=0.9)  # fmt: skip
    episodes = collect(agent, episodes=5, num_envs=3, top_logprobs=1)
    rng = np.random.default_rng(0)
    for episode in episodes:
        episode.validate()
        for turn in episode.turns:
            turn.reward = float(rng.normal())
            assert turn.forced_positions and turn.num_decisions == len(turn.logprobs) == len(
                turn.response_ids
            ) - len(turn.forced_positions)
            assert [
                k
                for k, m in enumerate(
                    episode.segments[turn.segment].mask[
                        turn.start : turn.start + len(turn.response_ids)
                    ]
                )
                if not m
            ] == turn.forced_positions
    assert EpisodeBuffer.load(
        EpisodeBuffer(episodes).save(tmp_path / "episodes.parquet")
    ) == EpisodeBuffer(episodes)
    reference = agent.learner.compute_values_and_ref_logprobs(episodes)
    assign_turn_gae(episodes, 0.9, agent.config.credit.gae_lambda)
    batch = Batch.from_episodes(episodes)
    assert (
        batch.num_tokens
        == sum(map(len, (t.logprobs for t in episodes.turns)))
        == episodes.summary()["tokens"]
    )
    stats = agent.learner.train_on_batch(batch, reference)
    assert stats["max_logprob_diff"] < 1e-4 and stats["clip_fraction"] == 0.0
    if ratio != "token":
        return
    policy, expected = thinking_policy(), torch.zeros(())
    for episode in episodes:
        logits = (
            policy.model(input_ids=torch.tensor([episode.segments[0].ids]))
            .logits[0]
            .log_softmax(-1)
        )
        for turn in episode.turns:
            for k in set(range(len(turn.response_ids))) - set(turn.forced_positions):
                expected = (
                    expected
                    - turn.advantage
                    * logits[turn.start + k - 1, turn.response_ids[k]]
                    / batch.num_tokens
                )
    expected.backward()
    trained = thinking_agent(thinking_policy(), generate__thinking_budget=4)
    trained_reference = compute_values_and_ref_logprobs(trained.policy, episodes)
    trained.learner.config.kl_coef = trained.learner.kl_coef = 0.0
    update = PPOUpdate(trained.learner, batch, trained_reference)
    update.metrics.start_epoch()
    loss = update.loss.micro_batch_loss(batch, batch, 1)
    (loss - 0.5 * _value_loss(trained, batch, trained_reference)).backward()
    a, b = (
        torch.cat([p.grad.flatten() for p in each.parameters()])
        for each in (policy, trained.policy)
    )
    assert (a - b).norm() < 1e-4 * a.norm()


def _value_loss(agent, batch, reference):
    values = agent.policy.value_head(reference.turn_hidden)
    return 0.5 * (values - batch.returns).square().sum() / batch.num_turns


def test_truncated_reasoning_is_an_invalid_response():
    """An action in the reasoning does not count, and the reason gives advice"""
    agent = thinking_agent(thinking_policy(), generate__max_new_tokens=4)
    episodes = collect(agent, episodes=4, num_envs=2)
    truncated = [t for t in episodes.turns if t.reasoning_truncated]
    assert truncated and all(
        not t.valid
        and t.invalid_reason == TRUNCATED_REASONING
        and t.response == ""
        and t.reasoning is not None
        for t in truncated
    )


def test_reasoning_is_not_passed_to_the_parser():
    """The methods of a user get the response only; an action in the reasoning does not count"""
    parsed = []

    class UserAgent(Agent):
        def get_system_prompt(self):
            return "Play."

        def format_observation(self, observation):
            return f"Step {observation}."

        def extract_action(self, response):
            return parsed.append(response) or int(response.removeprefix("Action: "))

        def format_reward(self, response):
            return 0.5 if response == "Action: 2" else -1.0

    policy = thinking_policy(opened=False)
    agent = UserAgent(policy)
    ids = encode(policy.tokenizer, "<think>\nAction: 1 drowns.\n</think>\n\nAction: 2<|im_end|>")
    logprobs = np.zeros(len(ids), dtype=np.float32)
    agent.shared.engine = _ScriptedEngine(ids, logprobs, policy)
    assert agent.act(0) == 2 and parsed == ["Action: 2"]
    agent.assign_reward(1.0)
    agent.terminate_episode()
    turn = agent.buffer[0].turns[0]
    assert (turn.reasoning, turn.response, turn.reward) == ("Action: 1 drowns.", "Action: 2", 1.5)
    assert "reasoning  Action: 1 drowns." in str(agent.buffer[0]) and "response  Action: 2" in str(
        agent.buffer[0]
    )


class _ScriptedEngine(Engine):
    """An engine that always returns the same response"""

    def __init__(self, ids, logprobs, policy):
        super().__init__(
            policy, ChatRenderer.for_tokenizer(policy.tokenizer).stop_ids, GenerateConfig()
        )
        self.ids, self.logprobs = ids, logprobs

    def sample(self, prompts, streams, **_):
        return [Sample(list(self.ids), self.logprobs, self.logprobs, True) for _ in prompts]


@pytest.mark.parametrize("opened", [False, True])
def test_reasoning_of_a_transcript_is_encoded_between_markers(opened):
    """Reasoning in the text or in its own field is encoded between the markers

    The fields of other token ids are cleared.
    """
    agent = thinking_agent(thinking_policy(opened))
    prefix = "" if opened else "<think>\n"
    expected = encode(agent.tokenizer, f"{prefix}The left is wet.\n</think>\n\nAction: 2<|im_end|>")
    messages = [
        dict(role="user", content="Step 0."),
        dict(role="assistant", content="<think>\nThe left is wet.\n</think>\n\nAction: 2"),
    ]
    in_text = from_messages(messages)
    in_field = Episode(
        [
            Turn(
                "Step 0.",
                "Action: 2",
                reasoning="The left is wet.",
                forced_positions=[1],
                logprobs=np.zeros(3, np.float32),
                terminated=True,
            )
        ]
    )
    for episode in (in_text, in_field):
        turn = encode_transcript(agent, episode).turns[0]
        assert (
            turn.response_ids == expected
            and turn.forced_positions is None
            and turn.logprobs is None
        )
    with_marker = Episode([Turn("Step 0.", "Action: 2", reasoning="a </think> b", terminated=True)])
    ids = encode_transcript(agent, with_marker).turns[0].response_ids
    assert (
        ids.count(reasoning_markers(ChatRenderer.for_tokenizer(agent.tokenizer)).close_ids[0]) == 1
    )


def test_reasoning_with_a_merged_end_marker_has_ended():
    """No end is forced if the last token of the marker also contains the following text"""
    policy = thinking_policy(True, markers=MARKERS[:2])
    markers = reasoning_markers(ChatRenderer.for_tokenizer(policy.tokenizer))
    for text, is_forced in (("so </think>\n\nAction", False), ("so on and on", True)):
        ids = encode(policy.tokenizer, text)
        response = ResponseState(Request([1, 2], None, greedy=True))
        for i in ids:
            response.append(i, TokenRecord(0.0, 0.0, None))
        response.enforce_thinking_budget(markers, len(ids), policy.tokenizer.decode)
        assert bool(response.forced_tokens) == is_forced


# Bad input


def test_reasoning_bad_input_raises():
    policy = thinking_policy()
    markers = reasoning_markers(ChatRenderer.for_tokenizer(policy.tokenizer))
    with pytest.raises(
        ValueError,
        match="thinking_budget=3, but the chat template has no reasoning markers; leave it out",
    ):
        Engine(policy, (), GenerateConfig(thinking_budget=3))
    with pytest.raises(
        ValueError,
        match="thinking_budget=30 of max_new_tokens=32 leaves no room for an answer; raise generate.max_new_tokens",
    ):
        Engine(policy, (), GenerateConfig(thinking_budget=30), reasoning=markers)
    with pytest.raises(ValueError, match="expected >= 0"):
        GenerateConfig(thinking_budget=-1)
    conversation = Conversation(policy.tokenizer)
    conversation.add_user("Step 0.")
    with pytest.raises(ValueError, match=r"forced_positions=\[7\]; expected positions in 2 ids"):
        conversation.add_response([70, 71], False, forced_positions=[7])
    conversation.add_response([70, 71], False, forced_positions=[1])
    assert conversation.segments[0].mask[-2:] == [1, 0]


def test_inconsistent_forced_positions_raise():
    """Forced positions and masks of a turn must agree"""
    episodes = collect(
        thinking_agent(thinking_policy(), generate__thinking_budget=4), episodes=1, num_envs=1
    )
    turn, episode = episodes[0].turns[0], episodes[0]
    original = turn.forced_positions
    for inconsistent, message in (
        ([*original, 0], "logprobs for"),
        (original[:-1], "logprobs for"),
        ([position - 1 for position in original], "doesn't mark all of positions"),
    ):
        turn.forced_positions = inconsistent
        with pytest.raises(ValueError, match=message):
            episode.validate()
    turn.forced_positions = original
    Episode(episode.turns, episode.segments).validate()
