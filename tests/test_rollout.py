"""`collect` and `evaluate`: which episodes are played, how they end, what is recorded of them."""

import functools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import Walk, config, lake, lake_agent, make_policy, tokenizer_of, walk_task

from llamagym.agent import Agent, InvalidResponse
from llamagym.chat import window
from llamagym.policy import Policy
from llamagym.passes import annotate
from llamagym.rollout import collect, evaluate
from llamagym.task import episode_seed, get_task, retry
from llamagym.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:none of .* responses held an action", "ignore:.*is_gradient_checkpointing",
                                        "ignore:Could not find a config file")  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy("plain")


def agent_of(policy, task=None, **options) -> Agent:
    return Agent.for_task(task or walk_task(), policy, config=config(**options))


class LongWalk(Walk):
    """As long as its number says: 1 to 5 steps"""

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        self.length = 1 + self.number % 5
        return observation, info


# which episodes


@pytest.mark.parametrize("num_envs", [1, 3, 100])
def test_episodes_are_those_asked_for_and_all_are_played_out(policy, num_envs):
    played = collect(agent_of(policy), LongWalk, episodes=8, num_envs=num_envs, seed=10, first=4)
    assert [e.index for e in played] == list(range(4, 12)) and [e.seed for e in played] == [episode_seed(10, i) for i in range(4, 12)]
    assert [len(e) for e in played] == [1 + n % 5 for n in range(14, 22)]  # no bias towards short ones
    for number, episode in zip(range(14, 22), played):
        assert [t.reward for t in episode.turns] == [number + t / 10 for t in range(len(episode))]
        assert [t.observation for t in episode.turns] == [f"Step {t} of walk {number}." for t in range(len(episode))]
        assert [t.terminated for t in episode.turns] == [False] * (len(episode) - 1) + [True] and not any(t.truncated for t in episode.turns)
        assert episode.final_ids is None and episode.final_observation is None and episode.system_prompt == "Walk."
        episode.validate()


def test_an_episode_depends_on_its_number_alone(policy):
    agent = agent_of(policy)
    some, all_ = collect(agent, episodes=3, num_envs=2, seed=7, first=5), collect(agent, episodes=8, num_envs=3, seed=7)
    assert [t.response_ids for e in some for t in e.turns] == [t.response_ids for e in all_[5:] for t in e.turns]
    other = collect(agent, episodes=3, num_envs=2, seed=8, first=5)
    assert [t.response_ids for e in some for t in e.turns] != [t.response_ids for e in other for t in e.turns]
    assert len({tuple(t.response_ids) for e in all_ for t in e.turns[:1]}) > 1


@pytest.mark.parametrize("num_envs", [1, 2, 4])
def test_slots_take_the_next_episode_as_soon_as_they_are_free(policy, num_envs):
    """Occupancy against a simulation of a queue of episodes of 1 to 5 turns"""
    lengths = [1 + s % 5 for s in range(9)]
    left, slots, rounds = list(lengths), [0] * num_envs, 0
    while left or any(slots):
        slots = [s or (left.pop(0) if left else 0) for s in slots]
        slots, rounds = [max(0, s - 1) for s in slots], rounds + 1
    agent = agent_of(policy)
    agent.engine.stop_ids = np.array([], dtype=np.int64)  # all responses have four tokens, so that all slots go in step
    played = collect(agent, LongWalk, episodes=9, num_envs=num_envs)
    assert agent.engine.stats.steps == 4 * rounds and agent.engine.stats.spoken_tokens == 4 * sum(lengths)
    assert played.occupancy == pytest.approx(sum(lengths) / (rounds * num_envs)) and played.seconds > 0 and played.failures == []


def test_environments_of_every_kind(policy):
    """Id, factory and instances; the user's own instance stays open and is the one that is played"""
    agent = Agent.for_task(get_task("CliffWalking-v1"), policy, config=config())
    agent.words.max_steps = 2
    for env in ("CliffWalking-v1", functools.partial(gym.make, "CliffWalking-v1"), gym.make("CliffWalking-v1")):
        assert [len(e) for e in collect(agent, env, episodes=3, num_envs=2)] == [2, 2, 2]
    closed = []
    mine = LongWalk(trouble=lambda where, *_: closed.append(where) if where == "close" else None)
    assert [len(e) for e in collect(agent_of(policy), mine, episodes=3, num_envs=1)] == [1, 2, 3] and mine.number == 2
    assert closed == []
    made = []
    collect(agent_of(policy), lambda: made.append(Walk(trouble=lambda where, *_: closed.append(where) if where == "close" else None)) or made[-1], 3, 2)
    assert len(made) == 2 and closed == ["close"] * 2


def test_alternatives_are_recorded_where_asked(policy):
    (episode,) = collect(agent_of(policy), episodes=1, num_envs=1, top=3, greedy=True)
    for turn in episode.turns:
        assert [len(token) for token in turn.top_alternatives] == [3] * len(turn.response_ids)
        assert [token[0][0] for token in turn.top_alternatives] == turn.response_ids
        assert [token[0][1] for token in turn.top_alternatives] == pytest.approx(turn.logprobs.tolist())
    assert collect(agent_of(policy), episodes=1, num_envs=1)[0].turns[0].top_alternatives is None


# how they end


def value_of(policy, ids) -> float:
    with torch.no_grad(), policy.as_reference():
        return policy.value_head(policy.trunk(torch.tensor([ids]))[0, -1]).item()


@pytest.mark.parametrize("context", ["full", window(1), window(2)], ids=str)
def test_a_time_limit_keeps_what_the_episode_went_on_with(context):
    """The prompt after the last step, in the context the agent plays with, and its value"""
    policy = make_policy("lora")
    torch.nn.init.normal_(policy.value_head.out.weight, std=0.1)
    agent = lake_agent(policy, task=lake(3, context=context))
    episodes = collect(agent, episodes=4, num_envs=2)
    cut = [e for e in episodes if e.truncated]
    assert cut and all((e.final_ids is None) == e.terminated for e in episodes)
    annotate(policy, episodes)
    for episode in cut:
        last = episode.turns[-1]
        assert last.truncated and not last.terminated and len(episode) == 3
        conversation = agent.conversation(episode.system_prompt)
        for turn in episode.turns:
            conversation.add_user(turn.observation)
            conversation.add_response(turn.response_ids, turn.stopped)
        assert episode.final_ids == conversation.add_user(episode.final_observation)
        assert [s.ids for s in episode.segments] == [s.ids for s in conversation.segments]  # which holds no trace of it
        assert episode.final_value == pytest.approx(value_of(policy, episode.final_ids), abs=1e-5)
        for turn in episode.turns:
            assert turn.value == pytest.approx(value_of(policy, episode.segments[turn.segment].ids[: turn.start]), abs=1e-5)


def test_an_end_at_the_time_limit_is_an_end(policy):
    class Both(Walk):
        def step(self, action):
            obs, reward, terminated, _, info = super().step(action)
            return obs, reward, terminated, terminated, info

    (episode,) = collect(agent_of(policy), Both, episodes=1, num_envs=1)
    assert episode.terminated and not episode.truncated and episode.final_ids is None


@pytest.mark.parametrize("k", [1, 2])
def test_a_window_shows_the_newest_turns(policy, k):
    agent = agent_of(policy, walk_task(5, context=window(k)))
    (episode,) = collect(agent, episodes=1, num_envs=1)
    assert len(episode.segments) == 5
    for t, turn in enumerate(episode.turns):
        text = agent.tokenizer.decode(episode.segments[t].ids[: turn.start])
        assert turn.segment == t and "Walk." in text
        assert [f"Step {i} of" in text for i in range(5)] == [t - k < i <= t for i in range(5)]
        assert sum(episode.segments[t].mask) == len(turn.response_ids)
    episode.validate()


# responses without an action


def moody(text):
    """Every other response, more or less, holds no action"""
    if sum(map(ord, text)) % 2:
        raise ValueError("in no mood")
    return 1


RULES = {"fallback": "fallback", "terminate": "terminate", "retry": retry(2)}


@pytest.mark.parametrize("rule", RULES)
def test_responses_without_an_action(policy, rule):
    given = []
    task = walk_task(3, trouble=lambda where, seed, t: given.append((seed, t)) if where == "step" else None, parse=moody, on_invalid=RULES[rule],
                     invalid_reward=-0.5, fallback=lambda obs, info: 0, format_reward=lambda text: 0.01 * len(text))  # fmt: skip
    played = collect(agent_of(policy, task), episodes=12, num_envs=5, seed=2)
    turns = [t for e in played for t in e.turns]
    assert 0.2 < np.mean([t.valid for t in turns]) < 0.8
    steps = 0
    for episode in played:
        t, attempts = 0, 0  # what a referee would have said
        for number, turn in enumerate(episode.turns):
            valid = sum(map(ord, turn.response)) % 2 == 0
            assert turn.valid == valid and turn.observation == f"Step {t} of walk {2 + episode.index}."
            assert turn.invalid_reason == (None if valid else "ValueError: in no mood")
            expected = 0.01 * len(turn.response) - 0.5 * (not valid)
            again = not valid and rule == "retry" and attempts < 2
            over = not valid and rule == "terminate"
            if again or over:
                assert turn.action is None
                attempts += 1
            else:
                expected += 2 + episode.index + t / 10
                assert turn.action == (1 if valid else 0)
                t, attempts, steps = t + 1, 0, steps + 1
            assert turn.reward == pytest.approx(expected)
            assert turn.terminated == (over or t == 3) == (number == len(episode) - 1)
        episode.validate()
    assert len(given) == steps


@pytest.mark.parametrize("rule", RULES)
def test_the_users_loop_is_the_same(policy, rule):
    """`act` and `assign_reward` leave the episodes that `collect` makes, of the same random numbers: same responses, actions, rewards, ends"""
    task = walk_task(3, parse=moody, on_invalid=RULES[rule], invalid_reward=-0.5, fallback=lambda obs, info: 0, format_reward=lambda text: 0.01 * len(text))
    agent, env = agent_of(policy, task), Walk(3)
    for seed in range(6):
        (observation, info), done = env.reset(seed=seed), False
        agent.start_dialogue(np.random.default_rng([0, seed]))
        while not done:
            try:
                action = agent.act(observation, info)
            except InvalidResponse as error:
                assert rule == "terminate" and "in no mood" in str(error)
                break
            observation, reward, done, _, info = env.step(action)
            agent.assign_reward(reward)
        agent.terminate_episode()
    fields = ("observation", "response", "response_ids", "segment", "start", "stopped", "action", "terminated", "truncated", "valid", "invalid_reason")
    for mine, theirs in zip(agent.buffer, collect(agent_of(policy, task), episodes=6, num_envs=3)):
        assert [[getattr(t, f) for f in fields] for t in mine.turns] == [[getattr(t, f) for f in fields] for t in theirs.turns]
        assert [t.reward for t in mine.turns] == pytest.approx([t.reward for t in theirs.turns])
        assert [s.ids for s in mine.segments] == [s.ids for s in theirs.segments]


def test_the_configuration_has_the_last_word(policy):
    """Where it says nothing, the task decides"""
    task = walk_task(2, pays=lambda seed, t: 0.0, parse=lambda text: None, on_invalid=retry(1), invalid_reward=-1.0, context=window(1))
    (episode,) = collect(agent_of(policy, task), episodes=1, num_envs=1)
    assert [t.reward for t in episode.turns] == [-1.0] * 4 and len(episode.segments) == 4
    options = dict(rollout__on_invalid="fallback", rollout__invalid_reward=-3.0, context__context="full")
    agent = agent_of(policy, task, **options)
    (episode,) = collect(agent, episodes=1, num_envs=1)
    assert [t.reward for t in episode.turns] == [-3.0] * 2 and len(episode.segments) == 1
    for number in range(2):
        assert agent.act(*Walk(2).reset(seed=number)) == 0
        assert agent.current_episode_rewards == [-3.0] * number
        agent.assign_reward(0.0)
    agent.terminate_episode()
    assert [t.reward for t in agent.buffer[0].turns] == [-3.0] * 2 and len(agent.buffer[0].segments) == 1
    (episode,) = collect(agent_of(policy, task, rollout__on_invalid="terminate"), episodes=1, num_envs=1)
    assert [(t.reward, t.terminated) for t in episode.turns] == [(-1.0, True)]


# sessions


class Diary(Agent):
    """Remembers its episode, from the system prompt on"""

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


def diary(policy) -> Diary:
    return Diary(policy, config=config())


def test_every_slot_has_a_session_of_its_own(policy):
    agent = diary(policy)
    played = collect(agent, LongWalk, episodes=7, num_envs=3)
    for episode in played:
        assert [t.observation for t in episode.turns] == [f"Walk {episode.index}: {t + 1} seen, all of it: True." for t in range(len(episode))]
    assert not hasattr(agent, "pages") and len(agent.buffer) == 0 and agent.current_episode_rewards == []


def test_what_a_users_methods_keep_belongs_to_one_episode(policy):
    """Also where one slot plays several, and nothing resets it"""

    class Counts(Diary):
        def get_system_prompt(self):
            return "Count."

    agent = Counts(policy, config=config())
    agent.pages = [-1]  # what the agent had seen before is where each episode begins
    for episode in collect(agent, LongWalk, episodes=5, num_envs=2):
        assert [t.observation for t in episode.turns] == [f"Walk {episode.index}: {t + 2} seen, all of it: False." for t in range(len(episode))]
    assert agent.pages == [-1]


def test_a_subclass_chooses_what_to_fall_back_on(policy):
    """In `collect` as in `act`"""
    for episode in collect(diary(policy), LongWalk, episodes=5, num_envs=2):
        assert [t.action for t in episode.turns] == [(t + 1) % 2 for t in range(len(episode))] and not any(t.valid for t in episode.turns)


def test_the_users_methods_are_called_in_the_same_order(policy):
    class Recorder(Diary):
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

    agent = Recorder(policy, config=config())
    collect(agent, functools.partial(Walk, 2), episodes=1, num_envs=1)
    collected, agent.log[:] = list(agent.log), []
    env = Walk(2)
    observation, done = env.reset(seed=0)[0], False
    while not done:
        observation, reward, done, *_ = env.step(agent.act(observation))
        agent.assign_reward(reward)
    assert agent.log == ["system", "observation", "action", "observation", "action"]
    assert collected[: len(agent.log)] == agent.log  # `collect` describes the last observation, too


def test_spawned_sessions_share_what_learns(policy):
    agent = diary(policy)
    agent.act(np.array([3, 0]))
    agent.note = [1]
    session = agent.spawn()
    assert session.policy is agent.policy and session.learner is agent.learner and session.buffer is agent.buffer and session.engine is agent.engine
    assert session.note == [1] and session.note is not agent.note
    assert session.current_episode_rewards == [] and len(agent.current_episode_messages) == 3  # its own episode goes on
    agent.assign_reward(1.0)
    agent.terminate_episode()
    assert len(session.buffer) == 1


# evaluation


def test_evaluation_counts(policy):
    task = walk_task(2, parse=moody, success=lambda episode: episode.index % 2 == 0)
    agent = agent_of(policy, task)
    weights = [p.clone() for p in policy.parameters()]
    result = evaluate(agent, episodes=5, seeds=[100, 200], num_envs=3)
    for found in (result.greedy, result.sampled):
        assert [e.seed for e in found.episodes] == [episode_seed(seed, i) for seed in (100, 200) for i in range(5)]
        returns = np.array([e.total_reward for e in found.episodes])
        assert found.mean_return == pytest.approx(returns.mean()) == pytest.approx(2 * 152 + 0.1)
        assert found.ci95 == pytest.approx(1.96 * returns.std(ddof=1) / math.sqrt(10))
        assert found.success == 0.6 and found.length == 2
        assert found.invalid_rate == pytest.approx(np.mean([not t.valid for e in found.episodes for t in e.turns]))
    assert len(agent.buffer) == 0 and all(torch.equal(a, b) for a, b in zip(policy.parameters(), weights))
    assert "return 304.100" in repr(result) and "| greedy | 304.100 |" in result._repr_markdown_()


def test_greedy_and_sampled(policy):
    agent = agent_of(policy, walk_task(1))
    both = evaluate(agent, episodes=6, num_envs=3)
    assert evaluate(agent, episodes=2, num_envs=2, greedy=True).sampled is None and evaluate(agent, episodes=2, num_envs=2, greedy=False).greedy is None
    words = lambda found: [t.response_ids for e in found.episodes for t in e.turns]
    assert words(both.greedy) == words(evaluate(agent, episodes=6, num_envs=2, greedy=True).greedy)
    assert words(both.greedy) != words(both.sampled)
    for episode in both.greedy.episodes:
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([episode.segments[0].ids])).logits[0]
        turn = episode.turns[0]
        assert turn.response_ids == logits[turn.start - 1 : turn.start - 1 + len(turn.response_ids)].argmax(-1).tolist()


@pytest.mark.filterwarnings("ignore:in training")
def test_evaluation_samples_as_configured(policy):
    task = walk_task(2)
    greedy = evaluate(agent_of(policy, task), episodes=4, greedy=True).greedy
    words = lambda found: [t.response_ids for e in found.episodes for t in e.turns]
    for options in (dict(generate__top_k=1), dict(generate__top_p=1e-6), dict(generate__do_sample=False)):
        assert words(evaluate(agent_of(policy, task, **options), episodes=4, greedy=False).sampled) == words(greedy)
        agent = agent_of(policy, task, **options)
        assert words(greedy) != [t.response_ids for e in collect(agent, episodes=4, seed=1_000_000) for t in e.turns]  # training does not


def test_one_episode_has_no_interval(policy):
    assert evaluate(agent_of(policy), episodes=1, greedy=True).greedy.ci95 == math.inf


def test_a_saved_policy_plays_in_three_lines(policy, tmp_path):
    agent = lake_agent(make_policy("lora"), 3)
    agent.policy.save(tmp_path / "policy")
    again = Agent.for_task(lake(3), Policy.load(tmp_path / "policy"), config=config())
    assert repr(evaluate(again, episodes=3)) == repr(evaluate(agent, episodes=3))


def test_tokenizers_of_other_styles_play(policy):
    """A template without a generation prompt of its own, and one whose end is a token of its own"""
    for style in ("llama2", "chatml"):
        tokenizer = tokenizer_of(style)
        agent = Agent.for_task(walk_task(3), tiny_model(tokenizer=tokenizer), tokenizer, config())
        for episode in collect(agent, episodes=2, num_envs=2):
            episode.validate()
            assert len(episode.segments) == 1
