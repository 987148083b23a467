"""Models that think before they answer: which do, what is thought and what is said, budgets, responses cut in the midst of a thought."""

import numpy as np
import pytest
import torch
from doubles import lake, shake
from test_chat_templates import REWRITES, TEMPLATES, chat_messages, encode, make, shaped
from transformers import AutoModelForCausalLM, MambaConfig

import llamagym.engine
from llamagym.agent import CUT_THOUGHT, Agent
from llamagym.batch import Batch
from llamagym.buffer import Episode, EpisodeBuffer, Turn
from llamagym.chat import ChatFormat, Conversation
from llamagym.config import Config, GenerateConfig, LoRAConfig
from llamagym.credit import assign
from llamagym.engine import Engine, Sample
from llamagym.passes import annotate
from llamagym.policy import Policy, add_lora
from llamagym.rollout import collect
from llamagym.thought import answer_ids, divide, thought_of
from llamagym.tiny import tiny_model, tiny_tokenizer
from llamagym.warmstart import encode as encode_transcript
from llamagym.warmstart import from_messages

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nPROMPT{% endif %}"
)
MARKERS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")


def thinking_tokenizer(opened: bool, markers=MARKERS):
    return tiny_tokenizer(CHATML.replace("PROMPT", "<think>\\n" if opened else ""), special_tokens=markers)


def thinking_policy(opened: bool = True, family: str = "llama", markers=MARKERS) -> Policy:
    tokenizer = thinking_tokenizer(opened, markers)
    model = add_lora(tiny_model(family, vocab_size=len(tokenizer)).requires_grad_(False), LoRAConfig(r=4))
    policy = Policy(model, tokenizer)
    shake(policy.parameters())
    return policy


def thinking_agent(policy: Policy, max_steps: int = 3, **options) -> Agent:
    config = Config.from_dict({"generate.max_new_tokens": 16} | {name.replace("__", "."): value for name, value in options.items()})
    return Agent.for_task(lake(max_steps), policy, config=config)


# which models think


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("name", TEMPLATES or ["none"])
def test_thought_by_every_template(name):
    """The oracle: what transformers renders at the end of a prompt"""
    tokenizer = make("bytelevel", name)
    prompt = tokenizer.apply_chat_template(shaped(name, chat_messages(None, "u")), tokenize=False, add_generation_prompt=True)
    thought = thought_of(ChatFormat.of(tokenizer))
    end = prompt.rsplit("u", 1)[-1] if "<think>" not in prompt else prompt[prompt.rindex("<think>") :]
    if "</think>" not in TEMPLATES[name] and "[/THINK]" not in TEMPLATES[name] or "<think>" in end and "</think>" in end:
        assert thought is None
        return
    assert thought is not None and thought.opened == prompt.rstrip().endswith("<think>")
    assert name in REWRITES or not thought.opened
    format = ChatFormat.of(tokenizer)
    aloud = encode(tokenizer, ("" if thought.opened else "<think>\n") + "Action: 9 loses.\n</think>\n\nAction: 1")
    assert divide(format, aloud, thought) == ("Action: 9 loses.", "Action: 1")
    assert divide(format, encode(tokenizer, ("" if thought.opened else "<think>\n") + "Action: 9"), thought) == ("Action: 9", "")
    silent, stopped = answer_ids(format, "Action: 1")
    assert divide(format, silent[: len(silent) - stopped], thought)[1].strip() == "Action: 1"


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("special", [True, False], ids=["tokens", "spelled"])
def test_thought_and_answer(opened, special):
    """Markers that are tokens, and markers that are spelled"""
    format = ChatFormat.of(thinking_tokenizer(opened, MARKERS if special else MARKERS[:2]))
    thought, begin = thought_of(format), "" if opened else "<think>\n"
    for said, expected in [
        ("17. Hit?\n</think>\n\nAction: 0", ("17. Hit?", "Action: 0")),
        ("</think>Action: 0", ("", "Action: 0")),
        ("one</think>Action: 1\n</think>\n\nAction: 0", (None, "Action: 0")),  # the last marker counts, as in templates
        ("17. Action: 1", ("17. Action: 1", "")),
        ("", ("", "")),
    ]:
        text, answer = divide(format, encode(format.tokenizer, begin + said), thought)
        assert answer == expected[1] and (expected[0] is None or text == expected[0])
    if not opened:
        assert divide(format, encode(format.tokenizer, "Action: 0"), thought) == (None, "Action: 0")
        assert divide(format, [], thought) == (None, "")


# budgets


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_thought_ends_where_its_budget_is_spent(opened, family):
    """What is put there is the end of a thought, at its place; what is sampled behind it has the learner's log-probabilities, whatever the company"""
    policy = thinking_policy(opened, family)
    thought, budget = thought_of(ChatFormat.of(policy.tokenizer)), 5
    prompts = [[1, *range(50 + 7 * i, 56 + 8 * i)] for i in range(12)]
    if not opened:  # a head that likes to begin a thought, so that some think and some do not
        bias = torch.zeros(len(policy.tokenizer)).index_fill(0, torch.tensor(thought.open_ids), 14.0)
        policy.causal_lm.get_output_embeddings().bias = torch.nn.Parameter(bias, requires_grad=False)

    def ask(some):
        engine = Engine(policy, (), GenerateConfig(max_new_tokens=16, thinking_budget=budget), thought=thought)
        return engine.sample([prompts[i] for i in some], [np.random.default_rng(i) for i in some], top=2)

    together = ask(range(12))
    thinkers = [s for s in together if opened or s.ids[0] == thought.open_ids[0]]
    assert 0 < len(thinkers) and (opened or len(thinkers) < 12)
    for i, sample in enumerate(together):
        own = [k for k in range(16) if k not in sample.given]
        assert len(sample.logprobs) == len(sample.entropy) == len(sample.top) == len(own)
        row = torch.tensor([prompts[i] + sample.ids])
        positions = torch.tensor([len(prompts[i]) + k for k in own])
        with torch.no_grad():
            score = policy.score(row, torch.zeros_like(positions), positions)
        assert np.abs(score.logprobs.numpy() - sample.logprobs).max() < 1e-4
        if sample in thinkers and thought.close_ids[0] not in sample.ids[:budget]:
            assert sample.given == list(range(budget, budget + len(thought.closing)))
            assert tuple(sample.ids[k] for k in sample.given) == thought.closing
        else:
            assert sample.given == []
        alone, = ask([i])
        assert alone.ids == sample.ids and alone.given == sample.given


@pytest.mark.parametrize("ends", [1, 4, 5])
def test_thought_that_ends_by_itself_is_left_alone(ends, monkeypatch):
    """One whose marker comes in time, at the last token of the budget too; a token later it has been put there"""
    policy = thinking_policy()
    thought, real, calls = thought_of(ChatFormat.of(policy.tokenizer)), llamagym.engine.draw_from, []

    def draw_from(logits, *args):
        calls.append(1)
        return real(logits.index_fill(-1, torch.tensor(thought.close_ids), 1e4 if len(calls) == ends else -1e4), *args)

    monkeypatch.setattr(llamagym.engine, "draw_from", draw_from)
    sample, = Engine(policy, (), GenerateConfig(max_new_tokens=12, thinking_budget=4), thought=thought).sample([[5, 6, 7]], [np.random.default_rng(0)])
    assert sample.ids.count(thought.close_ids[0]) == 1
    assert (sample.ids.index(thought.close_ids[0]), sample.given) == ((ends - 1, []) if ends < 5 else (5, [4, 5, 6, 7]))


@pytest.mark.parametrize("opened", [False, True])
def test_thought_budget_of_nothing_answers_at_once(opened):
    agent = thinking_agent(thinking_policy(opened), generate__thinking_budget=0)
    thought = agent.engine.thought
    for turn in collect(agent, episodes=4, num_envs=4).turns:
        assert tuple(turn.response_ids[: len(thought.empty)]) == thought.empty and turn.given == list(range(len(thought.empty)))
        assert turn.thought == "" and len(turn.logprobs) == len(turn.response_ids) - len(thought.empty)


def test_thought_budget_of_a_model_that_keeps_nothing():
    """... which answers through transformers' `generate`"""
    tokenizer = thinking_tokenizer(True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, pad_token_id=0, eos_token_id=2))
    thought = thought_of(ChatFormat.of(tokenizer))
    engine = Engine(Policy(model, tokenizer), (), GenerateConfig(max_new_tokens=12, thinking_budget=3), thought=thought)
    for sample in engine.sample([[5, 6, 7], [5, 6, 8]], [np.random.default_rng(i) for i in range(2)]):
        assert tuple(sample.ids[3 : 3 + len(thought.closing)]) == thought.closing and len(sample.logprobs) == 12 - len(thought.closing)


# through the whole loop


@pytest.mark.parametrize("ratio", ["token", "turn", "sequence"])
def test_thought_that_was_ended_is_learned_from_but_for_its_end(ratio, tmp_path):
    """Masks, batches, files; the first step's ratios are 1; the policy's gradient is that of the sampled tokens alone"""
    agent = thinking_agent(thinking_policy(), generate__thinking_budget=4, ppo__epochs=1, ppo__mini_batch_size=10**6, ppo__kl_coef=0.0, ppo__ratio=ratio,
                           ppo__max_grad_norm=1e9, credit__normalize=False, credit__gamma=0.9)  # fmt: skip
    episodes = collect(agent, episodes=5, num_envs=3, top=1)
    rng = np.random.default_rng(0)
    for episode in episodes:
        episode.validate()
        for turn in episode.turns:
            turn.reward = float(rng.normal())
            assert turn.given and turn.num_decisions == len(turn.logprobs) == len(turn.response_ids) - len(turn.given)
            assert [k for k, m in enumerate(episode.segments[turn.segment].mask[turn.start : turn.start + len(turn.response_ids)]) if not m] == turn.given
    assert EpisodeBuffer.load(EpisodeBuffer(episodes).save(tmp_path / "episodes.parquet")) == EpisodeBuffer(episodes)
    reference = agent.learner.annotate(episodes)
    assign(episodes, 0.9, agent.config.credit.gae_lambda)
    batch = Batch.from_episodes(episodes)
    assert batch.num_tokens == sum(map(len, (t.logprobs for t in episodes.turns))) == episodes.summary()["tokens"]
    stats = agent.learner.update(batch, reference)
    assert stats["logprob_gap"] < 1e-4 and stats["clip_fraction"] == 0.0
    if ratio != "token":
        return
    policy, expected = thinking_policy(), torch.zeros(())
    for episode in episodes:
        logits = policy.model(input_ids=torch.tensor([episode.segments[0].ids])).logits[0].log_softmax(-1)
        for turn in episode.turns:
            for k in set(range(len(turn.response_ids))) - set(turn.given):
                expected = expected - turn.advantage * logits[turn.start + k - 1, turn.response_ids[k]] / batch.num_tokens
    expected.backward()
    ours = thinking_agent(thinking_policy(), generate__thinking_budget=4)
    seen = annotate(ours.policy, episodes)
    ours.learner.config.kl_coef = ours.learner.kl_coef = 0.0
    loss = ours.learner.loss(batch, batch, batch, seen, 1, _Log())
    (loss - 0.5 * _critic(ours, batch, seen)).backward()
    a, b = (torch.cat([p.grad.flatten() for p in one.parameters()]) for one in (policy, ours.policy))
    assert (a - b).norm() < 1e-4 * a.norm()


class _Log:
    def add(self, terms, micro): ...


def _critic(agent, batch, reference):
    values = agent.policy.value_head(reference.turn_hidden)
    return 0.5 * (values - batch.returns).square().sum() / batch.num_turns


def test_thought_that_is_cut_holds_no_action():
    """However clearly it names one; the reason says what to do"""
    agent = thinking_agent(thinking_policy(), generate__max_new_tokens=4)
    episodes = collect(agent, episodes=4, num_envs=2)
    cut = [t for t in episodes.turns if t.cut_thought]
    assert cut and all(not t.valid and t.invalid_reason == CUT_THOUGHT and t.response == "" and t.thought is not None for t in cut)


def test_thought_is_kept_from_the_parser():
    """The methods of a user see the answer; a thought that names another action does not count"""
    seen = []

    class Player(Agent):
        def get_system_prompt(self): return "Play."
        def format_observation(self, observation): return f"Step {observation}."
        def extract_action(self, response): return seen.append(response) or int(response.removeprefix("Action: "))
        def format_reward(self, response): return 0.5 if response == "Action: 2" else -1.0

    policy = thinking_policy(opened=False)
    agent = Player(policy)
    ids = encode(policy.tokenizer, "<think>\nAction: 1 drowns.\n</think>\n\nAction: 2<|im_end|>")
    numbers = np.zeros(len(ids), dtype=np.float32)
    agent._shared.engine = _Says(ids, numbers, policy)
    assert agent.act(0) == 2 and seen == ["Action: 2"]
    agent.assign_reward(1.0)
    agent.terminate_episode()
    turn = agent.buffer[0].turns[0]
    assert (turn.thought, turn.response, turn.reward) == ("Action: 1 drowns.", "Action: 2", 1.5)
    assert "thought  Action: 1 drowns." in str(agent.buffer[0]) and "reply  Action: 2" in str(agent.buffer[0])


class _Says(Engine):
    """An engine that says what it is told"""

    def __init__(self, ids, numbers, policy):
        super().__init__(policy, ChatFormat.of(policy.tokenizer).stop_ids, GenerateConfig())
        self.ids, self.numbers = ids, numbers

    def sample(self, prompts, streams, **_):
        return [Sample(list(self.ids), self.numbers, self.numbers, True) for _ in prompts]


@pytest.mark.parametrize("opened", [False, True])
def test_thought_of_a_transcript_is_imitated(opened):
    """In the reply's text, or beside it: between its markers, which are tokens; nothing that belonged to other ids is left"""
    agent = thinking_agent(thinking_policy(opened))
    begin = "" if opened else "<think>\n"
    expected = encode(agent.tokenizer, f"{begin}The left is wet.\n</think>\n\nAction: 2<|im_end|>")
    messages = [dict(role="user", content="Step 0."), dict(role="assistant", content="<think>\nThe left is wet.\n</think>\n\nAction: 2")]
    spoken = from_messages(messages)
    apart = Episode([Turn("Step 0.", "Action: 2", thought="The left is wet.", given=[1], logprobs=np.zeros(3, np.float32), terminated=True)])
    for episode in (spoken, apart):
        turn = encode_transcript(agent, episode).turns[0]
        assert turn.response_ids == expected and turn.given is None and turn.logprobs is None
    forged = Episode([Turn("Step 0.", "Action: 2", thought="a </think> b", terminated=True)])
    ids = encode_transcript(agent, forged).turns[0].response_ids
    assert ids.count(thought_of(ChatFormat.of(agent.tokenizer)).close_ids[0]) == 1


def test_thought_whose_marker_is_merged_is_over():
    """A marker that is spelled in pieces, the last of which goes on: the thought has ended, nothing is put into the answer"""
    policy = thinking_policy(True, markers=MARKERS[:2])
    thought = thought_of(ChatFormat.of(policy.tokenizer))
    row = llamagym.engine._Row()
    row.take(llamagym.engine.Request([1, 2], None, greedy=True), 0)
    for said, put in (("so </think>\n\nAction", False), ("so on and on", True)):
        ids = encode(policy.tokenizer, said)
        row.take(llamagym.engine.Request([1, 2], None, greedy=True), 0)
        for i in ids:
            row.add(i, (0.0, 0.0, None))
        row.watch(thought, len(ids), policy.tokenizer.decode)
        assert bool(row.put) == put


# bad input


def test_thought_bad_input():
    policy = thinking_policy()
    thought = thought_of(ChatFormat.of(policy.tokenizer))
    with pytest.raises(ValueError, match="thinking_budget=3, but the chat template knows of no thoughts; leave it out"):
        Engine(policy, (), GenerateConfig(thinking_budget=3))
    with pytest.raises(ValueError, match="thinking_budget=30 of max_new_tokens=32 leaves no room for an answer; raise generate.max_new_tokens"):
        Engine(policy, (), GenerateConfig(thinking_budget=30), thought=thought)
    with pytest.raises(ValueError, match="expected >= 0"):
        GenerateConfig(thinking_budget=-1)
    conversation = Conversation(policy.tokenizer)
    conversation.add_user("Step 0.")
    with pytest.raises(ValueError, match=r"given=\[7\]; expected positions in 2 ids"):
        conversation.add_response([70, 71], False, given=[7])
    conversation.add_response([70, 71], False, given=[1])
    assert conversation.segments[0].mask[-2:] == [1, 0]


def test_thought_drift_is_noticed():
    """Turns whose given ids and masks do not agree"""
    episodes = collect(thinking_agent(thinking_policy(), generate__thinking_budget=4), episodes=1, num_envs=1)
    turn, episode = episodes[0].turns[0], episodes[0]
    given = turn.given
    for wrong, message in (([*given, 0], "logprobs for"), (given[:-1], "logprobs for"), ([g - 1 for g in given], "doesn't mark all of positions")):
        turn.given = wrong
        with pytest.raises(ValueError, match=message):
            episode.validate()
    turn.given = given
    Episode(episode.turns, episode.segments).validate()
