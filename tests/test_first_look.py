"""`first_look`: what it shows is what the model got and gave, it trains nothing, and its code runs."""

import dataclasses
import functools
import html
import math
import re
import time
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import config, make_policy
from walks import Walk

import llamagym.training.first_look as first_look_module
from llamagym import Agent, ScoredAgent, Trainer, clone, collect, first_look
from llamagym.agents.remedies import (
    AdviceContext,
    ResponseCounts,
    is_users_parser,
    reason_kind,
    remedies,
    warn_all_invalid,
)
from llamagym.buffer import EpisodeBuffer
from llamagym.cli import main
from llamagym.config import Config
from llamagym.envs.actions import DiscreteActions
from llamagym.envs.toy_text import BLACKJACK_ACTIONS, blackjack, frozen_lake, taxi
from llamagym.episodes.episode import Turn
from llamagym.models.policy import Policy
from llamagym.rollout import EvalStats
from llamagym.trainer import TooManyInvalidResponses
from llamagym.training.clone_result import wilson_interval
from llamagym.training.first_look import (
    RunCosts,
    action_probabilities,
    forecast_memory,
    sample_responses,
    shorten_middle,
    time_training_pass,
)

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action")


@pytest.fixture(scope="module")
def policy():
    torch.set_num_threads(1)
    return Policy.load("tiny")


@pytest.fixture(autouse=True)
def known_memory(monkeypatch, request):
    "Spare most tests the planner, which takes longer than everything else"
    if "memory" not in request.node.name:
        sizes = dict(rollout=1e9, update=2e9)
        monkeypatch.setattr(first_look_module, "forecast_memory", lambda *args: sizes)


def agent_of(policy, task=None, kind=Agent, **options):
    options = dict(generate__max_new_tokens=6, rollout__num_envs=8, rollout__episodes=8) | options
    return kind.for_task(task or blackjack(), policy, config=config(**options))


@pytest.fixture(scope="module")
def look(policy):
    return first_look(agent_of(policy))


def state_of(agent) -> list[torch.Tensor]:
    learner, policy = agent.learner, agent.policy
    head = policy.value_head
    tensors = [*policy.model.parameters(), *head.parameters(), *head.buffers()]
    states = [v for s in learner.optimizer.state.values() for v in s.values()]
    tensors += [torch.as_tensor(value) for value in states]
    tensors.append(learner.generator.get_state())
    return [tensor.detach().clone() for tensor in tensors]


# nothing is trained


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_first_look_trains_nothing(kind):
    agent = agent_of(make_policy(kind))
    before, scale = state_of(agent), dataclasses.replace(agent.learner.advantage_scale)
    first = collect(agent, episodes=4)
    first_look(agent, episodes=4)
    after = state_of(agent)
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))
    assert agent.learner.advantage_scale == scale and agent.learner.num_updates == 0
    again = collect(agent, episodes=4)
    assert [t.response_ids for t in again.turns] == [t.response_ids for t in first.turns]
    assert all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(again.turns, first.turns))


def test_first_look_leaves_a_trained_optimizer_as_it_was(tmp_path):
    agent = agent_of(make_policy("lora"), trainer__output_dir=str(tmp_path), trainer__eval_every=0)
    Trainer(agent).fit(1)
    before = state_of(agent)
    episodes = collect(agent, episodes=4)
    time_training_pass(agent, episodes)
    after = state_of(agent)
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(turn.advantage is None and turn.value is None for turn in episodes.turns)


# what it shows


def test_first_look_shows_the_prompt_as_the_model_gets_it(policy, look):
    tokenizer, task = policy.tokenizer, blackjack()
    (episode,) = collect(agent_of(policy), episodes=1)
    messages = [
        dict(role="system", content=task.system_prompt),
        dict(role="user", content=episode.turns[0].observation),
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert look.prompt.text == rendered and rendered in str(look).replace("\n  ", "\n")
    assert look.prompt.tokens == len(tokenizer.encode(rendered, add_special_tokens=False))
    for name, text in (("system", task.system_prompt), ("observation", messages[1]["content"])):
        count = len(tokenizer.encode(text, add_special_tokens=False))
        assert getattr(look.prompt, f"{name}_tokens") == count
    assert str(look.prompt).startswith(f"{look.prompt.tokens} tokens: ")


def test_first_look_shortens_long_texts_in_the_middle():
    text = "".join(map(str, range(2000)))
    short = shorten_middle(text, 100)
    start, _, end = short.partition(" […")
    number, _, end = end.partition(" characters…] ")
    assert text.startswith(start) and text.endswith(end) and len(start) == len(end) == 50
    assert int(number.replace(",", "")) == len(text) - 100
    assert shorten_middle("short", 100) == "short"


def test_first_look_counts_are_those_of_the_episodes(look):
    turns = look.episodes.turns
    valid = sum(turn.valid for turn in turns)
    assert (look.valid.valid, look.valid.responses) == (valid, len(turns))
    assert look.valid.interval == wilson_interval(valid, len(turns))
    assert sum(count for _, count in look.counts.reasons) == look.counts.invalid
    assert look.counts.cut == sum(not t.valid and not t.stopped for t in turns)
    games = EvalStats.from_episodes(look.episodes, blackjack().success)
    assert (look.games.mean_return, look.games.ci95) == (games.mean_return, games.ci95)
    assert look.references["optimal"] == -0.0466 and "optimal -0.047" in str(look)


def test_first_look_responses_hold_a_valid_one_and_different_reasons():
    turns = [
        Turn("a", "x", valid=False, invalid_reason="1"),
        Turn("a", "x", valid=False, invalid_reason="1"),
        Turn("b", "y", valid=False, invalid_reason="1"),
        Turn("c", "z", valid=False, invalid_reason="2"),
        Turn("d", "Action: hit"),
        Turn("d", "Action: stick"),
    ]
    chosen = sample_responses(turns)
    assert [turn.valid for turn in chosen] == [True, False, False]
    assert {turn.invalid_reason for turn in chosen[1:]} == {"1", "2"}
    assert [turn.response for turn in sample_responses(turns[:2])] == ["x"]
    assert [turn.response for turn in sample_responses(turns[4:])] == [
        "Action: hit",
        "Action: stick",
    ]


@pytest.mark.parametrize("make_task", [blackjack, taxi])
def test_first_look_probabilities_are_those_of_the_plain_model(policy, make_task):
    "The oracle: each legal text scored by a forward pass of its own"
    task = dataclasses.replace(make_task(), max_steps=2)
    agent = agent_of(policy, task, generate__temperature=1.5)
    episodes = collect(agent, episodes=5)
    actions = action_probabilities(agent, episodes)
    assert len(actions) >= 3
    turns = [(n, e, t) for e in episodes for n, t in enumerate(e.turns)]
    # Of turns with the same observation, the earliest of the first episode is scored.
    turns = sorted(turns[::-1], key=lambda each: -each[0])
    prompts = {t.observation: e.segments[t.segment].ids[: t.start] for _, e, t in turns}
    tokenizer, sizes = policy.tokenizer, set()
    for state in actions:
        scores = {}
        for text in state.probabilities:
            ids = agent.shared.renderer.encode_response(text)[0]
            prompt = prompts[state.observation]
            with torch.no_grad():
                logits = policy.causal_lm(torch.tensor([prompt + ids])).logits[0]
            logprobs = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt + ids) - 1), ids]
            scores[text] = logprobs.sum().item() / 1.5
        expected = torch.tensor(list(scores.values())).softmax(0)
        np.testing.assert_allclose(list(state.probabilities.values()), expected, atol=1e-4)
        assert list(state.probabilities.values()) == sorted(state.probabilities.values())[::-1]
        sizes.add(len(scores))
    assert tokenizer is agent.tokenizer
    assert sizes == {2} if make_task is blackjack else max(sizes) < 6  # the mask of walls


def test_first_look_of_a_scored_agent_shows_recorded_probabilities(policy):
    look = first_look(agent_of(policy, kind=ScoredAgent), episodes=4)
    first = look.episodes[0].turns[0]
    recorded = dict(zip(first.candidates, np.exp(first.candidate_logprobs)))
    assert look.actions[0].probabilities == pytest.approx(recorded)
    assert look.valid.share == 1 and [a.what for a in look.advice] == ["Train"] and not look.trials


def test_first_look_of_an_agent_without_a_task(policy):
    agent = Strict(policy, config=config(rollout__num_envs=4))
    look = first_look(agent, Walk, episodes=8)
    assert not look.actions and not look.references
    assert [a.what for a in look.advice] == [
        "Check the parser",
        "Show the format of a response in the prompt",
        "Imitate transcripts (warm start)",
        "Score the actions instead of sampling a text",
    ]
    with pytest.raises(ValueError, match="env is needed"):
        first_look(agent)


# time and memory


def test_first_look_forecast_adds_up(policy):
    options = config(rollout__episodes=40, ppo__epochs=3, trainer__updates=7, trainer__eval_every=3,
                     trainer__eval_episodes=10)  # fmt: skip
    costs = RunCosts(options, 10, 5.0, 8, 12, 1.0, 2.0, dict(rollout=1e9, update=2e9))
    assert costs.episode_seconds == 0.5
    assert costs.update_seconds == 40 / 8 * (1.0 + 3 * 2.0)
    assert costs.evaluation_seconds == 3 * 10 * 0.5
    assert costs.run_seconds == 7 * (40 * 0.5 + 35.0) + 15.0
    sources = [source for _, _, source in costs.rows()]
    assert sources[0].startswith("measured") and all("estimated" in s for s in sources[1:])
    assert RunCosts(options.replace({"trainer.eval_every": 0}), 10, 5.0, 8, 12, 1.0, 2.0, "").evaluation_seconds == 0  # fmt: skip


@pytest.mark.slow
def test_first_look_times_a_pass_of_an_update(policy):
    "The estimate for an update of the same episodes is near what the update takes"
    agent = agent_of(make_policy("lora"), ppo__epochs=4)
    episodes = collect(agent, episodes=16, num_envs=16)
    time_training_pass(agent, episodes)  # the first pass of a process is slower
    estimates, taken = [], []
    for _ in range(3):
        preparing, training = time_training_pass(agent, episodes)
        estimates.append(preparing + 4 * training)
        start = time.perf_counter()
        agent.learner.update(episodes)
        taken.append(time.perf_counter() - start)
    assert 0.4 < min(estimates) / min(taken) < 2.5


def test_first_look_memory_is_that_of_the_policy_as_it_is():
    "LoRA and its rank are read from the policy, although the options do not say so"
    agents = [agent_of(make_policy(kind)) for kind in ("plain", "lora")]
    sizes = [forecast_memory(a, collect(a, episodes=2))["update"] for a in agents]
    assert sizes[0] > sizes[1] > 0
    weights = sum(p.nbytes for p in agents[0].policy.model.parameters())
    assert sizes[0] > 4 * weights  # weights, reference, gradients and two moments, and more


# advice


class Strict(Agent):
    def get_system_prompt(self):
        return "Walk."

    def format_observation(self, observation):
        return f"Number {observation}."

    def extract_action(self, response):
        return {"left": 0, "right": 1}[response]


def test_first_look_knows_whose_parser_it_is(policy):
    task, names = blackjack(), DiscreteActions(("a", "b"))
    assert not is_users_parser(task.extract_action) and not is_users_parser(names.extract_action)
    assert is_users_parser(lambda text: names.extract_action(text)) and is_users_parser(int)
    assert is_users_parser(functools.partial(lambda a, b: 1, 1))
    assert not is_users_parser(functools.partial(names.extract_action))
    assert is_users_parser(Strict(policy).extract_action)
    assert not is_users_parser(agent_of(policy).advice_context().parser)

    class Own(DiscreteActions):
        def extract_action(self, text):
            return super().extract_action(text.lower())

    class Renamed(DiscreteActions):
        pass

    assert is_users_parser(Own(("a", "b")).extract_action)
    assert not is_users_parser(Renamed(("a", "b")).extract_action)


def test_first_look_counts_reasons_without_the_responses():
    texts = [
        "I fold",
        "it's me",
        'say "x"',
        "Action: jump",
        "Action: run\nnow",
        "7",
        "8",
        "hit, stick",
    ]
    turns = []
    for text in texts:
        with pytest.raises(ValueError) as error:
            BLACKJACK_ACTIONS.extract_action(text)
        turns.append(Turn("", text, valid=False, invalid_reason=f"ValueError: {error.value}"))
    kinds = [reason_kind(turn).partition(":")[0] for turn in turns]
    assert kinds == [
        *["no action in …"] * 3,
        *["… does not start with an action"] * 2,
        *["… is not an action"] * 2,
        "… states several actions (hit, stick)",
    ]


def context_of(task, **changes):
    context = AdviceContext(
        Config(), task.extract_action, "TaskAgent", task.system_prompt, task, gym.spaces.Discrete(2)
    )
    return dataclasses.replace(context, **changes)


def invalid_counts(**changes):
    return ResponseCounts(**dict(responses=20, invalid=20, cut=0, cut_in_reasoning=0, reasons=()) | changes)  # fmt: skip


def test_first_look_advice_names_the_part_of_the_prompt():
    task = blackjack()
    prompts = {
        None: "Write a system prompt",
        "Play.": "Show an example in the system prompt",
        task.system_prompt: "Repeat the format at the end of each observation",
    }
    for prompt, expected in prompts.items():
        changed = dataclasses.replace(task, system_prompt=prompt)
        assert remedies(context_of(changed), invalid_counts())[0].what == expected


def test_first_look_advice_follows_the_measurements():
    context = context_of(blackjack())
    whats = [each.what for each in remedies(context, invalid_counts())]
    assert not {"Allow more tokens per response", "End the reasoning in time"} & {*whats}
    cut = remedies(context, invalid_counts(cut=12))[0]
    assert cut.what == "Allow more tokens per response" and "12 of 20 responses" in cut.why
    thinking = remedies(context, invalid_counts(cut_in_reasoning=15, cut=3))[0]
    assert thinking.what == "End the reasoning in time" and "thinking_budget" in thinking.code
    text = context_of(blackjack(), space=gym.spaces.Text(9))
    assert "Score" not in " ".join(each.what for each in remedies(
        dataclasses.replace(text, task=None), invalid_counts()))  # fmt: skip


@pytest.mark.parametrize("prompt", ["task", None, "Play."])
def test_first_look_code_runs_and_does_what_it_says(policy, prompt):
    task = blackjack()
    if prompt != "task":
        task = dataclasses.replace(task, system_prompt=prompt)
    small = dict(warmstart__random_turns=8, warmstart__max_random_turns=8, warmstart__epochs=1,
                 warmstart__probe_episodes=0, warmstart__probe_responses=8)  # fmt: skip
    agent = agent_of(make_policy("lora"), task, **small)
    counts = invalid_counts(cut=12)
    made = {}
    for advice in remedies(agent.advice_context(), counts):
        names = {"agent": agent}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(advice.code, names)
        made[advice.what] = names["agent"]
    longer = made.pop("Allow more tokens per response")
    assert longer.engine.config.max_new_tokens == 18
    scored = made.pop("Score the actions instead of sampling a text")
    assert collect(scored, episodes=2).summary()["invalid_rate"] == 0
    shown = made.pop("Show demonstrations")
    assert len(shown.task.demonstrations) == 8
    assert len(shown.conversation().messages) == 16 + (prompt is not None)
    assert made.pop("Imitate random games (warm start)").policy.reference.is_set
    ((what, changed),) = made.items()
    (episode,) = collect(changed, episodes=1)
    seen = (episode.system_prompt or "") + episode.turns[0].observation
    assert seen.endswith("Action: hit") or "Action: stick or Action: hit" in episode.system_prompt
    assert changed.policy is agent.policy
    if prompt != "task":
        assert collect(agent, episodes=1)[0].system_prompt == prompt


def test_first_look_does_not_advise_what_it_tried_in_vain(look):
    assert {str(trial).partition(",")[0] for trial in look.trials} == {
        "tried: with generate.max_new_tokens=18",
        "tried: with 'Reply with one line: Action: stick or Action: hit' after the observation",
    }
    assert [each.what for each in look.advice if "demonstrations" not in each.what] == [
        "Imitate random games (warm start)",
        "Score the actions instead of sampling a text",
    ]
    assert "that alone does not help" in str(look)


def test_first_look_advises_more_tokens_where_they_help(policy):
    "A parser that wants many characters: only longer responses pass"
    task = dataclasses.replace(
        frozen_lake(), extract_action=lambda text: 0 if len(text.split()) > 6 else None
    )
    agent = agent_of(make_policy("plain"), task, generate__max_new_tokens=4)
    look = first_look(agent, episodes=2)
    trial = look.trials[0]
    assert trial.change == "generate.max_new_tokens=12"
    helps = trial.valid > 1 + trial.responses * look.valid.share
    assert helps == ("Allow more tokens per response" in [a.what for a in look.advice])
    assert trial.valid > 0, "the case is not tested"


# the warning


def message_of(turns, context, error=None) -> str:
    with pytest.warns(
        UserWarning, match=f"none of {len(turns)} responses held an action"
    ) as caught:
        warn_all_invalid(turns, context, error)
    return str(caught[0].message)


def test_first_look_warning_blames_no_parser_of_the_package():
    task = blackjack()
    turns = [
        Turn("", "I fold", valid=False, invalid_reason="ValueError: no action in 'I fold'")
    ] * 9
    error = ValueError("no action")
    text = message_of(turns, context_of(task), error)
    assert "at fault" not in text and "Traceback" not in text and "9 responses: no action" in text
    order = [text.index(code) for code in ("dataclasses.replace(", "\n       clone(agent)", "ScoredAgent.for_task(")]  # fmt: skip
    assert order == sorted(order)
    text = message_of(turns, context_of(task, parser=int), error)
    assert "extract_action is at fault" in text and "ValueError: no action" in text
    assert text.index("at fault") < text.index("clone(agent)")


@pytest.mark.filterwarnings("default:none of .* responses held an action")
def test_first_look_warning_of_rollouts_and_of_loops(policy):
    agent = agent_of(policy)
    with pytest.warns(UserWarning, match="(?s)none of .*What to do, in this order.*clone.agent"):
        collect(agent, episodes=8)
    with pytest.warns(UserWarning, match="(?s)none of 64 .*What to do, in this order") as caught:
        for _ in range(70):
            agent.act((14, 10, 0))
            agent.assign_reward(0)
    texts = [str(w.message) for w in caught if "none of" in str(w.message)]
    assert len(texts) == 1 and "at fault" not in texts[0]
    assert not agent.shared.first_turns


def test_first_look_agrees_with_the_doctor(policy, tmp_path):
    options = dict(trainer__output_dir=str(tmp_path), trainer__eval_every=0, ppo__epochs=1)
    run = Trainer(agent_of(make_policy("lora"), **options)).fit(3)
    found = {k: v for m in run.history for k, v in m.get("findings", {}).items()}
    text = found["invalid responses"]
    order = [text.index(part) for part in ("(clone(agent))", "(ScoredAgent.for_task(", "first_look(agent)")]  # fmt: skip
    assert order == sorted(order) and "extract_action" not in text


# the trainer stops


def test_first_look_stops_a_run_before_it_trains(policy, tmp_path):
    agent = agent_of(make_policy("lora"), trainer__output_dir=str(tmp_path), rollout__episodes=16)
    agent.config.trainer.stop_if_invalid = 0.5
    before = state_of(agent)
    trainer = Trainer(agent)
    with pytest.raises(TooManyInvalidResponses, match="stopped before its first update") as error:
        trainer.fit(2)
    message, look = str(error.value), error.value.look
    assert str(look) in message and "trainer.stop_if_invalid = 1" in message
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(agent)))
    assert (trainer.update, trainer.history) == (0, [])
    assert not (tmp_path / "checkpoint").exists()
    saved = EpisodeBuffer.load(error.value.path)
    assert [t.response for t in saved.turns] == [t.response for t in look.episodes.turns]
    assert len(saved) == 16
    agent.config.trainer.stop_if_invalid = 1
    agent.config.trainer.eval_every = 0
    assert len(Trainer(agent).fit(1).history) == 1


def files_of(folder) -> dict:
    kept = [folder / "metrics.jsonl", *(folder / "checkpoint").rglob("*")]
    return {path: path.read_bytes() for path in kept if path.is_file()}


def test_first_look_leaves_the_files_of_another_run(tmp_path):
    options = dict(trainer__output_dir=str(tmp_path), trainer__eval_every=0, ppo__epochs=1)
    Trainer(agent_of(make_policy("lora"), **options)).fit(1)
    files = files_of(tmp_path)
    agent = agent_of(make_policy("lora"), trainer__stop_if_invalid=0.5, **options)
    with pytest.raises(TooManyInvalidResponses):
        Trainer(agent).fit(1)
    assert len(files) > 1 and files == files_of(tmp_path)
    resumed = Trainer(agent).fit(2, resume=True)  # a resumed run is not checked
    assert len(resumed.history) == 2


def half_valid_task(share: float):
    "A task whose parser finds an action in a share of all responses, by their length"
    count = iter(range(10**6))
    return dataclasses.replace(
        blackjack(), extract_action=lambda text: 0 if next(count) % 10 >= 10 * share else None
    )


@pytest.mark.parametrize(("share", "limit", "stops"), [
    (0.4, 0.5, False), (0.6, 0.5, True), (0.6, 0.7, False), (0.1, 0.0, True), (1.0, 1, False)])  # fmt: skip
def test_first_look_stops_above_the_limit_only(policy, tmp_path, share, limit, stops):
    agent = agent_of(make_policy("lora"), half_valid_task(share), rollout__episodes=20,
                     trainer__output_dir=str(tmp_path), trainer__stop_if_invalid=limit,
                     trainer__eval_every=0, ppo__epochs=1, generate__max_new_tokens=2)  # fmt: skip
    if stops:
        with pytest.raises(TooManyInvalidResponses):
            Trainer(agent).fit(1)
    else:
        assert len(Trainer(agent).fit(1).history) == 1


def test_first_look_does_not_stop_agents_that_choose_candidates(policy, tmp_path):
    task = dataclasses.replace(blackjack(), extract_action=lambda text: None)
    agent = agent_of(make_policy("lora"), task, kind=ScoredAgent, trainer__stop_if_invalid=0.5,
                     trainer__output_dir=str(tmp_path), trainer__eval_every=0, ppo__epochs=1)  # fmt: skip
    assert Trainer(agent).fit(1).history[0]["invalid_rate"] == 1


def test_first_look_option_is_saved_and_checked(tmp_path):
    options = Config.from_dict({"trainer.stop_if_invalid": 1})
    assert Config.load(options.save(tmp_path / "run.toml")) == options
    with pytest.raises(ValueError, match="trainer.stop_if_invalid=1.5: expected >= 0 and <= 1"):
        Config.from_dict({"trainer.stop_if_invalid": 1.5})
    assert Config().trainer.stop_if_invalid == 0.5


# page and command


def test_first_look_html_escapes_what_the_model_says(policy):
    task = dataclasses.replace(
        blackjack(),
        system_prompt="<script>alert(1)</script>",
        format_observation=lambda obs, info: "<img src=x onerror=alert(1)> \x1b[31m",
    )
    look = first_look(agent_of(policy, task), episodes=2)
    page = look._repr_html_()
    assert "<script" not in page and "<img" not in page and html.escape("<script>") in page
    assert "\x1b" not in str(look)
    tags = re.findall(r"<(/?)(\w+)", page)
    assert sum(not close for close, _ in tags) == sum(bool(close) for close, _ in tags)


def test_first_look_text_has_all_parts(look):
    text = str(look)
    parts = ["Prompt of a first turn", "Responses", "are invalid", "Legal actions", "Return",
             "Time and memory", "What to do, in this order", "clone(agent)"]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert all(math.isfinite(x) and x > 0 for x in (look.costs.run_seconds, look.games.length))
    for title in parts[:7]:
        assert title in look._repr_html_()


def test_first_look_command(capsys):
    arguments = ["look", "tiny", "--env", "Blackjack-v1", "--episodes", "3"]
    assert main([*arguments, "--set", "generate.max_new_tokens=4"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("First look at tiny in Blackjack-v1")
    assert "generate.max_new_tokens=4" in printed
    code = printed[printed.index("    from llamagym import Agent, LoRAConfig") :]
    names: dict = {}
    exec("\n".join(line.removeprefix("    ") for line in code.splitlines()), names)
    assert names["agent"].task.name == "Blackjack-v1"
    assert main(["look", "tiny", "--env", "Blackjak-v1"]) == 1
    assert "did you mean 'Blackjack-v1'" in capsys.readouterr().err
    assert main([*arguments, "--set", "generate.max_tokens=4"]) == 1
    assert "did you mean" in capsys.readouterr().err


def test_first_look_command_reads_a_saved_policy(tmp_path, capsys):
    make_policy("lora").save(tmp_path / "saved")
    arguments = ["look", str(tmp_path / "saved"), "--env", "FrozenLake-v1", "--episodes", "2"]
    assert main([*arguments, "--set", "generate.max_new_tokens=2"]) == 0
    assert "trained through LoRA" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["look", "tiny"])


def test_first_look_clone_says_what_to_do(policy):
    agent = agent_of(make_policy("lora"), warmstart__random_turns=8, warmstart__max_random_turns=8,
                     warmstart__epochs=1, warmstart__probe_responses=8, warmstart__probe_episodes=0)  # fmt: skip
    with pytest.warns(
        UserWarning, match=r"valid after the warm start.*clone\(agent\).*ScoredAgent"
    ):
        result = clone(agent, progress=False)
    assert not result.users_parser and "extract_action" not in result.advice
