"""`collect` and `evaluate` play the requested episodes, end them correctly and record them completely."""

import functools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import Walk, config, lake, lake_agent, make_policy, tokenizer_of, walk_task

from llamagym.agent import Agent, InvalidResponse
from llamagym.algorithms.forward import compute_values_and_ref_logprobs
from llamagym.chat.conversation import Window
from llamagym.envs.adapters import episode_seed
from llamagym.envs.registry import get_task
from llamagym.envs.task import Retry
from llamagym.models.policy import Policy
from llamagym.models.tiny import tiny_model
from llamagym.rollout import collect, evaluate

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing",
                                        "ignore:Could not find a config file")  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy("plain")


def agent_of(policy, task=None, **options) -> Agent:
    return Agent.for_task(task or walk_task(), policy, config=config(**options))


class LongWalk(Walk):
    """A walk of 1 to 5 steps, depending on its number"""

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        self.length = 1 + self.number % 5
        return observation, info


# Episodes of a rollout


@pytest.mark.parametrize("num_envs", [1, 3, 100])
def test_collect_plays_the_requested_episodes_to_their_end(policy, num_envs):
    episodes = collect(agent_of(policy), LongWalk, episodes=8, num_envs=num_envs, seed=10, first=4)
    assert [e.index for e in episodes] == list(range(4, 12)) and [e.seed for e in episodes] == [
        episode_seed(10, i) for i in range(4, 12)
    ]
    # no bias toward short episodes
    assert [len(e) for e in episodes] == [1 + n % 5 for n in range(14, 22)]
    for number, episode in zip(range(14, 22), episodes):
        assert [t.reward for t in episode.turns] == [number + t / 10 for t in range(len(episode))]
        assert [t.observation for t in episode.turns] == [
            f"Step {t} of walk {number}." for t in range(len(episode))
        ]
        assert [t.terminated for t in episode.turns] == [False] * (len(episode) - 1) + [
            True
        ] and not any(t.truncated for t in episode.turns)
        assert (
            episode.final_ids is None
            and episode.final_observation is None
            and episode.system_prompt == "Walk."
        )
        episode.validate()


def test_episode_depends_only_on_its_index(policy):
    agent = agent_of(policy)
    part, whole = (
        collect(agent, episodes=3, num_envs=2, seed=7, first=5),
        collect(agent, episodes=8, num_envs=3, seed=7),
    )
    assert [t.response_ids for e in part for t in e.turns] == [
        t.response_ids for e in whole[5:] for t in e.turns
    ]
    other_seed = collect(agent, episodes=3, num_envs=2, seed=8, first=5)
    assert [t.response_ids for e in part for t in e.turns] != [
        t.response_ids for e in other_seed for t in e.turns
    ]
    assert len({tuple(t.response_ids) for e in whole for t in e.turns[:1]}) > 1


@pytest.mark.parametrize("num_envs", [1, 2, 4])
def test_idle_environments_start_the_next_episode_at_once(policy, num_envs):
    """Occupancy matches a simulated queue of episodes of 1 to 5 turns"""
    lengths = [1 + s % 5 for s in range(9)]
    queue, steps_left, rounds = list(lengths), [0] * num_envs, 0
    while queue or any(steps_left):
        steps_left = [s or (queue.pop(0) if queue else 0) for s in steps_left]
        steps_left, rounds = [max(0, s - 1) for s in steps_left], rounds + 1
    agent = agent_of(policy)
    # all responses have four tokens, so all environments step together
    agent.engine.sampler.stop_ids = frozenset()
    rollout = collect(agent, LongWalk, episodes=9, num_envs=num_envs)
    assert agent.engine.stats.steps == 4 * rounds and agent.engine.stats.sampled_tokens == 4 * sum(
        lengths
    )
    assert (
        rollout.occupancy == pytest.approx(sum(lengths) / (rounds * num_envs))
        and rollout.seconds > 0
        and rollout.failures == []
    )


def test_collect_accepts_id_factory_and_instance(policy):
    """An instance of the user is used itself and stays open"""
    agent = Agent.for_task(get_task("CliffWalking-v1"), policy, config=config())
    agent.task.max_steps = 2
    for env in (
        "CliffWalking-v1",
        functools.partial(gym.make, "CliffWalking-v1"),
        gym.make("CliffWalking-v1"),
    ):
        assert [len(e) for e in collect(agent, env, episodes=3, num_envs=2)] == [2, 2, 2]
    closed = []
    instance = LongWalk(
        trouble=lambda where, *_: closed.append(where) if where == "close" else None
    )
    assert [len(e) for e in collect(agent_of(policy), instance, episodes=3, num_envs=1)] == [
        1,
        2,
        3,
    ] and instance.number == 2
    assert closed == []
    created = []
    collect(
        agent_of(policy),
        lambda: (
            created.append(
                Walk(trouble=lambda where, *_: closed.append(where) if where == "close" else None)
            )
            or created[-1]
        ),
        3,
        2,
    )
    assert len(created) == 2 and closed == ["close"] * 2


def test_top_logprobs_are_recorded_on_request(policy):
    (episode,) = collect(agent_of(policy), episodes=1, num_envs=1, top_logprobs=3, greedy=True)
    for turn in episode.turns:
        assert [len(token) for token in turn.top_alternatives] == [3] * len(turn.response_ids)
        assert [token[0][0] for token in turn.top_alternatives] == turn.response_ids
        assert [token[0][1] for token in turn.top_alternatives] == pytest.approx(
            turn.logprobs.tolist()
        )
    assert collect(agent_of(policy), episodes=1, num_envs=1)[0].turns[0].top_alternatives is None


# Ends of episodes


def expected_value(policy, ids) -> float:
    with torch.no_grad(), policy.as_reference():
        return policy.value_head(policy.backbone(torch.tensor([ids]))[0, -1]).item()


@pytest.mark.parametrize("context", ["full", Window(1), Window(2)], ids=str)
def test_truncated_episode_keeps_its_final_prompt_and_value(context):
    """The prompt after the last step has the context in which the agent plays"""
    policy = make_policy("lora", critic="reference", value_head_width=0)
    torch.nn.init.normal_(policy.value_head.out.weight, std=0.1)
    agent = lake_agent(policy, task=lake(3, context=context))
    episodes = collect(agent, episodes=4, num_envs=2)
    truncated = [e for e in episodes if e.truncated]
    assert truncated and all((e.final_ids is None) == e.terminated for e in episodes)
    compute_values_and_ref_logprobs(policy, episodes)
    for episode in truncated:
        last = episode.turns[-1]
        assert last.truncated and not last.terminated and len(episode) == 3
        conversation = agent.conversation(episode.system_prompt)
        for turn in episode.turns:
            conversation.add_user(turn.observation)
            conversation.add_response(turn.response_ids, turn.stopped)
        assert episode.final_ids == conversation.add_user(episode.final_observation)
        # the final prompt is not part of the segments
        assert [s.ids for s in episode.segments] == [s.ids for s in conversation.segments]
        assert episode.final_value == pytest.approx(
            expected_value(policy, episode.final_ids), abs=1e-5
        )
        for turn in episode.turns:
            assert turn.value == pytest.approx(
                expected_value(policy, episode.segments[turn.segment].ids[: turn.start]), abs=1e-5
            )


def test_termination_at_the_time_limit_is_not_truncation(policy):
    class TerminatedAndTruncated(Walk):
        def step(self, action):
            obs, reward, terminated, _, info = super().step(action)
            return obs, reward, terminated, terminated, info

    (episode,) = collect(agent_of(policy), TerminatedAndTruncated, episodes=1, num_envs=1)
    assert episode.terminated and not episode.truncated and episode.final_ids is None


@pytest.mark.parametrize("k", [1, 2])
def test_window_contains_the_newest_turns(policy, k):
    agent = agent_of(policy, walk_task(5, context=Window(k)))
    (episode,) = collect(agent, episodes=1, num_envs=1)
    assert len(episode.segments) == 5
    for t, turn in enumerate(episode.turns):
        text = agent.tokenizer.decode(episode.segments[t].ids[: turn.start])
        assert turn.segment == t and "Walk." in text
        assert [f"Step {i} of" in text for i in range(5)] == [t - k < i <= t for i in range(5)]
        assert sum(episode.segments[t].mask) == len(turn.response_ids)
    episode.validate()


# Responses without an action


def parse_or_reject(text):
    """Reject about half of the responses, as if they had no action"""
    if sum(map(ord, text)) % 2:
        raise ValueError("in no mood")
    return 1


RULES = {"fallback": "fallback", "terminate": "terminate", "retry": Retry(2)}


@pytest.mark.parametrize("rule", RULES)
def test_invalid_responses_are_handled_by_the_configured_rule(policy, rule):
    env_steps = []
    task = walk_task(3, trouble=lambda where, seed, t: env_steps.append((seed, t)) if where == "step" else None, extract_action=parse_or_reject, on_invalid=RULES[rule],
                     invalid_reward=-0.5, fallback=lambda obs, info: 0, format_reward=lambda text: 0.01 * len(text))  # fmt: skip
    episodes = collect(agent_of(policy, task), episodes=12, num_envs=5, seed=2)
    turns = [t for e in episodes for t in e.turns]
    assert 0.2 < np.mean([t.valid for t in turns]) < 0.8
    num_steps = 0
    for episode in episodes:
        t, attempts = 0, 0  # the expected state
        for number, turn in enumerate(episode.turns):
            valid = sum(map(ord, turn.response)) % 2 == 0
            assert (
                turn.valid == valid and turn.observation == f"Step {t} of walk {2 + episode.index}."
            )
            assert turn.invalid_reason == (None if valid else "ValueError: in no mood")
            expected = 0.01 * len(turn.response) - 0.5 * (not valid)
            is_retry = not valid and rule == "retry" and attempts < 2
            ends_episode = not valid and rule == "terminate"
            if is_retry or ends_episode:
                assert turn.action is None
                attempts += 1
            else:
                expected += 2 + episode.index + t / 10
                assert turn.action == (1 if valid else 0)
                t, attempts, num_steps = t + 1, 0, num_steps + 1
            assert turn.reward == pytest.approx(expected)
            assert turn.terminated == (ends_episode or t == 3) == (number == len(episode) - 1)
        episode.validate()
    assert len(env_steps) == num_steps


@pytest.mark.parametrize("rule", RULES)
def test_loop_and_collect_give_the_same_episodes(policy, rule):
    """`act` and `assign_reward` give the episodes of `collect` for the same random numbers"""
    task = walk_task(
        3,
        extract_action=parse_or_reject,
        on_invalid=RULES[rule],
        invalid_reward=-0.5,
        fallback=lambda obs, info: 0,
        format_reward=lambda text: 0.01 * len(text),
    )
    agent, env = agent_of(policy, task), Walk(3)
    for seed in range(6):
        (observation, info), done = env.reset(seed=seed), False
        agent.start_episode(np.random.default_rng([0, seed]))
        while not done:
            try:
                action = agent.act(observation, info)
            except InvalidResponse as error:
                assert rule == "terminate" and "in no mood" in str(error)
                break
            observation, reward, done, _, info = env.step(action)
            agent.assign_reward(reward)
        agent.terminate_episode()
    fields = (
        "observation",
        "response",
        "response_ids",
        "segment",
        "start",
        "stopped",
        "action",
        "terminated",
        "truncated",
        "valid",
        "invalid_reason",
    )
    for episode, expected in zip(
        agent.buffer, collect(agent_of(policy, task), episodes=6, num_envs=3)
    ):
        assert [[getattr(t, f) for f in fields] for t in episode.turns] == [
            [getattr(t, f) for f in fields] for t in expected.turns
        ]
        assert [t.reward for t in episode.turns] == pytest.approx(
            [t.reward for t in expected.turns]
        )
        assert [s.ids for s in episode.segments] == [s.ids for s in expected.segments]


def test_configuration_overrides_the_task(policy):
    """The task determines the options that are not configured"""
    task = walk_task(
        2,
        reward_function=lambda seed, t: 0.0,
        extract_action=lambda text: None,
        on_invalid=Retry(1),
        invalid_reward=-1.0,
        context=Window(1),
    )
    (episode,) = collect(agent_of(policy, task), episodes=1, num_envs=1)
    assert [t.reward for t in episode.turns] == [-1.0] * 4 and len(episode.segments) == 4
    options = dict(
        rollout__on_invalid="fallback", rollout__invalid_reward=-3.0, context__turns="full"
    )
    agent = agent_of(policy, task, **options)
    (episode,) = collect(agent, episodes=1, num_envs=1)
    assert [t.reward for t in episode.turns] == [-3.0] * 2 and len(episode.segments) == 1
    for number in range(2):
        assert agent.act(*Walk(2).reset(seed=number)) == 0
        assert agent.current_episode_rewards == [-3.0] * number
        agent.assign_reward(0.0)
    agent.terminate_episode()
    assert [t.reward for t in agent.buffer[0].turns] == [-3.0] * 2 and len(
        agent.buffer[0].segments
    ) == 1
    (episode,) = collect(
        agent_of(policy, task, rollout__on_invalid="terminate"), episodes=1, num_envs=1
    )
    assert [(t.reward, t.terminated) for t in episode.turns] == [(-1.0, True)]


# Sessions


class RecordingAgent(Agent):
    """An agent that stores data of its episode in an attribute"""

    def get_system_prompt(self):
        self.pages = []
        return "Remember."

    def format_observation(self, observation):
        self.pages.append(int(observation[0]))
        return f"Walk {observation[0]}: {len(self.pages)} seen, all of it: {len(set(self.pages)) == 1}."

    def extract_action(self, response):
        return None

    def fallback_action(self, observation):
        return len(self.pages) % 2


def recording_agent(policy) -> RecordingAgent:
    return RecordingAgent(policy, config=config())


def test_every_episode_has_its_own_session(policy):
    agent = recording_agent(policy)
    episodes = collect(agent, LongWalk, episodes=7, num_envs=3)
    for episode in episodes:
        assert [t.observation for t in episode.turns] == [
            f"Walk {episode.index}: {t + 1} seen, all of it: True." for t in range(len(episode))
        ]
    assert (
        not hasattr(agent, "pages")
        and len(agent.buffer) == 0
        and agent.current_episode_rewards == []
    )


def test_session_attributes_belong_to_one_episode(policy):
    """Nothing is shared if one environment plays several episodes and no method resets them"""

    class NeverResetAgent(RecordingAgent):
        def get_system_prompt(self):
            return "Count."

    agent = NeverResetAgent(policy, config=config())
    agent.pages = [-1]  # each episode starts with a copy of the agent's attribute
    for episode in collect(agent, LongWalk, episodes=5, num_envs=2):
        assert [t.observation for t in episode.turns] == [
            f"Walk {episode.index}: {t + 2} seen, all of it: False." for t in range(len(episode))
        ]
    assert agent.pages == [-1]


def test_fallback_action_of_a_subclass_is_used(policy):
    """`collect` uses the fallback action of the subclass"""
    for episode in collect(recording_agent(policy), LongWalk, episodes=5, num_envs=2):
        assert [t.action for t in episode.turns] == [
            (t + 1) % 2 for t in range(len(episode))
        ] and not any(t.valid for t in episode.turns)


def test_loop_and_collect_call_methods_in_the_same_order(policy):
    class LoggingAgent(RecordingAgent):
        log = []

        def get_system_prompt(self):
            self.log.append("system")
            return super().get_system_prompt()

        def format_observation(self, observation):
            self.log.append("observation")
            return super().format_observation(observation)

        def extract_action(self, response):
            self.log.append("action")
            return 0

    agent = LoggingAgent(policy, config=config())
    collect(agent, functools.partial(Walk, 2), episodes=1, num_envs=1)
    collected, agent.log[:] = list(agent.log), []
    env = Walk(2)
    observation, done = env.reset(seed=0)[0], False
    while not done:
        observation, reward, done, *_ = env.step(agent.act(observation))
        agent.assign_reward(reward)
    assert agent.log == ["system", "observation", "action", "observation", "action"]
    assert collected[: len(agent.log)] == agent.log  # `collect` also formats the last observation


def test_spawned_sessions_share_policy_learner_and_buffer(policy):
    agent = recording_agent(policy)
    agent.act(np.array([3, 0]))
    agent.note = [1]
    session = agent.spawn()
    assert (
        session.policy is agent.policy
        and session.learner is agent.learner
        and session.buffer is agent.buffer
        and session.engine is agent.engine
    )
    assert session.note == [1] and session.note is not agent.note
    # the agent's own episode continues
    assert session.current_episode_rewards == [] and len(agent.current_episode_messages) == 3
    agent.assign_reward(1.0)
    agent.terminate_episode()
    assert len(session.buffer) == 1


# Evaluation


def test_evaluation_metrics_match_the_episodes(policy):
    task = walk_task(
        2, extract_action=parse_or_reject, success=lambda episode: episode.index % 2 == 0
    )
    agent = agent_of(policy, task)
    weights = [p.clone() for p in policy.parameters()]
    result = evaluate(agent, episodes=5, seeds=[100, 200], num_envs=3)
    for stats in (result.greedy, result.sampled):
        assert [e.seed for e in stats.episodes] == [
            episode_seed(seed, i) for seed in (100, 200) for i in range(5)
        ]
        returns = np.array([e.total_reward for e in stats.episodes])
        assert stats.mean_return == pytest.approx(returns.mean()) == pytest.approx(2 * 152 + 0.1)
        assert stats.ci95 == pytest.approx(1.96 * returns.std(ddof=1) / math.sqrt(10))
        assert stats.success == 0.6 and stats.length == 2
        assert stats.invalid_rate == pytest.approx(
            np.mean([not t.valid for e in stats.episodes for t in e.turns])
        )
    assert len(agent.buffer) == 0 and all(
        torch.equal(a, b) for a, b in zip(policy.parameters(), weights)
    )
    assert "return 304.100" in repr(result) and "| greedy | 304.100 |" in result._repr_markdown_()


def test_evaluation_plays_greedy_and_sampled_episodes(policy):
    agent = agent_of(policy, walk_task(1))
    both = evaluate(agent, episodes=6, num_envs=3)
    assert (
        evaluate(agent, episodes=2, num_envs=2, greedy=True).sampled is None
        and evaluate(agent, episodes=2, num_envs=2, greedy=False).greedy is None
    )
    response_ids = lambda stats: [t.response_ids for e in stats.episodes for t in e.turns]
    assert response_ids(both.greedy) == response_ids(
        evaluate(agent, episodes=6, num_envs=2, greedy=True).greedy
    )
    assert response_ids(both.greedy) != response_ids(both.sampled)
    for episode in both.greedy.episodes:
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([episode.segments[0].ids])).logits[0]
        turn = episode.turns[0]
        assert (
            turn.response_ids
            == logits[turn.start - 1 : turn.start - 1 + len(turn.response_ids)].argmax(-1).tolist()
        )


@pytest.mark.filterwarnings("ignore:in training")
def test_evaluation_samples_as_configured(policy):
    task = walk_task(2)
    greedy = evaluate(agent_of(policy, task), episodes=4, greedy=True).greedy
    response_ids = lambda stats: [t.response_ids for e in stats.episodes for t in e.turns]
    for options in (
        dict(generate__top_k=1),
        dict(generate__top_p=1e-6),
        dict(generate__do_sample=False),
    ):
        assert response_ids(
            evaluate(agent_of(policy, task, **options), episodes=4, greedy=False).sampled
        ) == response_ids(greedy)
        agent = agent_of(policy, task, **options)
        # training does not use these options
        assert response_ids(greedy) != [
            t.response_ids for e in collect(agent, episodes=4, seed=1_000_000) for t in e.turns
        ]


def test_evaluation_of_one_episode_has_no_confidence_interval(policy):
    assert evaluate(agent_of(policy), episodes=1, greedy=True).greedy.ci95 == math.inf


def test_saved_policy_evaluates_the_same(policy, tmp_path):
    agent = lake_agent(make_policy("lora"), 3)
    agent.policy.save(tmp_path / "policy")
    loaded = Agent.for_task(lake(3), Policy.load(tmp_path / "policy"), config=config())
    assert repr(evaluate(loaded, episodes=3)) == repr(evaluate(agent, episodes=3))


def test_collect_works_with_other_chat_templates(policy):
    """Templates without a generation prompt and with an end-of-turn token"""
    for style in ("llama2", "chatml"):
        tokenizer = tokenizer_of(style)
        agent = Agent.for_task(walk_task(3), tiny_model(tokenizer=tokenizer), tokenizer, config())
        for episode in collect(agent, episodes=2, num_envs=2):
            episode.validate()
            assert len(episode.segments) == 1
