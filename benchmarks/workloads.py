"What the benchmarks share: models of three sizes, two environments, and the loop of 2024 as the baseline."

import functools
import os
import time
from dataclasses import dataclass

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gymnasium as gym
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from llamagym.agent import Agent
from llamagym.chat.conversation import Conversation
from llamagym.chat.renderer import ChatRenderer
from llamagym.config import Config, LoRAConfig
from llamagym.envs.task import Task
from llamagym.envs.toy_text import blackjack
from llamagym.episodes.episode import Episode
from llamagym.models.policy import Policy
from llamagym.models.reference import add_lora
from llamagym.models.tiny import tiny_tokenizer

NEW_TOKENS = 32  # of a response; a random model hardly ever stops by itself
SIZES = {  # Llama shapes; the last is SmolLM-135M's
    "1M": dict(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    ),
    "14M": dict(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=6,
    ),
    "135M": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
}


@functools.cache
def tokenizer_of(size: str) -> PreTrainedTokenizerBase:
    "Return the tiny tokenizer, filled up with words to the vocabulary size"
    missing = SIZES[size]["vocab_size"] - len(tiny_tokenizer())
    return tiny_tokenizer(words=tuple(f"w{i:05d}" for i in range(missing // 2)))


def model_of(size: str, seed: int = 0) -> PeftModel:
    "Return a Llama with random weights and an adapter on queries and values, as is usual"
    torch.manual_seed(seed)
    tokenizer = tokenizer_of(size)
    config = LlamaConfig(max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **SIZES[size])  # fmt: skip
    return add_lora(
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(),
        LoRAConfig(r=16, target_modules=["q_proj", "v_proj"]),
        seed,
    )


class Corridor(gym.Env):
    "Twenty turns of some thirty tokens each, whatever the action"

    action_space, observation_space = gym.spaces.Discrete(2), gym.spaces.MultiDiscrete([100, 100])

    def __init__(self, turns: int = 20):
        self.turns = turns

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.array([self.t, self.np_random.integers(100)]), {}

    def step(self, action):
        self.t += 1
        return (
            np.array([self.t, self.np_random.integers(100)]),
            float(action),
            self.t == self.turns,
            False,
            {},
        )


def any_response(text: str) -> int:
    "Return an action for any response: these models produce no words"
    return sum(map(ord, text)) % 2


def task_of(name: str, turns: int = 20) -> Task:
    "Return the task `blackjack`, or `corridor` with a number of turns"
    if name == "blackjack":
        task = blackjack()
        task.extract_action = any_response
        return task

    def describe(obs, info):
        return f"Turn {obs[0]} of {turns}. You stand at position {obs[1]} of the cliff and see the wall, the lake and the goal. Left or right?"

    return Task(functools.partial(Corridor, turns), describe, any_response, lambda a: f"Action: {a}", name="corridor",
                system_prompt="Walk to the goal without going over the cliff. Each turn you see where you stand; "
                              "each step has a cost. Reply Action: 0 or Action: 1.")  # fmt: skip


def agent_of(size: str, task: Task, **options) -> Agent:
    "Return this project's agent of a benchmark's model; `ppo__epochs=4` sets an option"
    given = {"generate.max_new_tokens": NEW_TOKENS, "generate.temperature": 0.9} | {
        k.replace("__", "."): v for k, v in options.items()
    }
    return Agent.for_task(
        task, Policy(model_of(size), tokenizer_of(size)), config=Config.from_dict(given)
    )


@dataclass
class Naive:
    """The loop of 2024: one environment at a time, the whole conversation prefilled at each turn, by `generate`

    It gets the ids of the conversation as they are: text of a random model, encoded again, would be
    twice as long.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    task: Task

    def __post_init__(self):
        self.env, self.renderer = self.task.make(), ChatRenderer.for_tokenizer(self.tokenizer)

    @torch.no_grad()
    def respond(self, prompts: list[list[int]]) -> list[list[int]]:
        "Return responses to prompts, padded on the left if there are several"
        width = max(map(len, prompts))
        ids = torch.tensor(
            [[self.tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts],
            device=self.model.device,
        )
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device
        )
        out = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.9, top_p=0.6, top_k=0,
                                  eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id)  # fmt: skip
        responses = []
        for row in out[:, width:].tolist():
            end = (
                row.index(self.tokenizer.eos_token_id) + 1
                if self.tokenizer.eos_token_id in row
                else len(row)
            )
            responses.append(row[:end])
        return responses

    def act(self, env: gym.Env, conversation: Conversation, response: list[int]) -> tuple:
        "Apply a response to an environment"
        conversation.add_response(response, response[-1] in conversation.stop_ids)
        return env.step(
            self.task.extract_action(self.tokenizer.decode(response, skip_special_tokens=True))
        )

    def episode(self, seed: int) -> int:
        "Play an episode and return its turns"
        (obs, info), done, turns = self.env.reset(seed=seed), False, 0
        conversation = Conversation(self.renderer, self.task.system_prompt)
        while not done:
            (response,) = self.respond(
                [conversation.add_user(self.task.format_observation(obs, info))]
            )
            obs, _, terminated, truncated, info = self.act(self.env, conversation, response)
            done, turns = terminated or truncated, turns + 1
        return turns

    def batch(self, seed: int, envs: int) -> int:
        "Play a batch of episodes in parallel, prefilling the whole conversation at each turn; return their turns"
        games, turns = [], 0
        for i in range(envs):
            env = self.task.make()
            games.append(
                (
                    env,
                    Conversation(self.renderer, self.task.system_prompt),
                    *env.reset(seed=seed + i),
                )
            )
        while games:
            responses = self.respond(
                [
                    conversation.add_user(self.task.format_observation(obs, info))
                    for _, conversation, obs, info in games
                ]
            )
            turns, going = turns + len(games), []
            for (env, conversation, *_), response in zip(games, responses):
                obs, _, terminated, truncated, info = self.act(env, conversation, response)
                if not (terminated or truncated):
                    going.append((env, conversation, obs, info))
            games = going
        return turns


class Clock:
    "CPU and wall seconds of a block"

    def __enter__(self):
        self.cpu, self.wall = -time.process_time(), -time.perf_counter()
        return self

    def __exit__(self, *_):
        self.cpu, self.wall = self.cpu + time.process_time(), self.wall + time.perf_counter()


class Meter:
    """Wall seconds inside some functions while the block runs, as in `Meter(env=[(TextEnv, "send")])`; the outermost counts"""

    def __init__(self, **parts: list[tuple[object, str]]):
        self.parts, self.seconds, self.inside = parts, dict.fromkeys(parts, 0.0), False

    def timed(self, part: str, function):
        def call(*args, **kwargs):
            if self.inside:
                return function(*args, **kwargs)
            self.inside, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[part] += time.perf_counter() - began

        return call

    def __enter__(self):
        self.own = [
            (owner, name, getattr(owner, name))
            for places in self.parts.values()
            for owner, name in places
        ]
        for part, places in self.parts.items():
            for owner, name in places:
                setattr(owner, name, self.timed(part, getattr(owner, name)))
        self.whole = -time.perf_counter()
        return self

    def __exit__(self, *_):
        self.whole += time.perf_counter()
        for owner, name, function in self.own:
            setattr(owner, name, function)

    def shares(self, rest: str, **known: float) -> str:
        "Return the share of the block that each part took; the remainder is called `rest`"
        parts = self.seconds | known
        return ", ".join(
            f"{part} {seconds / self.whole:.0%}"
            for part, seconds in (parts | {rest: self.whole - sum(parts.values())}).items()
        )


def table(rows: list[dict], columns: dict[str, str]) -> str:
    "Return rows as aligned text; `columns` maps names to formats"
    cells = [list(columns)] + [
        [format(row[name], spec) if name in row else "" for name, spec in columns.items()]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths))
        )
        for line in cells
    )


def naive_rows(episodes: list[Episode]) -> list[tuple[torch.Tensor, int, float]]:
    "Return one row per turn with the whole history: its ids, the start of the response, and the reward"
    turns = [
        (episode.segments[turn.segment].ids[: turn.start + len(turn.response_ids)], turn)
        for episode in episodes
        for turn in episode.turns
    ]
    return [(torch.tensor(ids), turn.start, turn.reward) for ids, turn in turns]


class NaiveUpdate:
    "The update of 2024: rows of whole histories, logits at every position, value head, KL in the reward, four epochs"

    def __init__(self, model: PeftModel, epochs: int = 4, learning_rate: float = 1e-4):
        self.model, self.pad, self.epochs = model, 0, epochs
        self.head = torch.nn.Linear(self.model.get_base_model().config.hidden_size, 1)
        self.trained = [p for p in self.model.parameters() if p.requires_grad] + list(
            self.head.parameters()
        )
        self.optimizer = torch.optim.Adam(self.trained, lr=learning_rate)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        )
        logprobs = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return logprobs, self.head(out.hidden_states[-1]).squeeze(-1)[:, :-1]

    def step(self, rows: list[tuple[torch.Tensor, int, float]]) -> None:
        lengths = torch.tensor([len(ids) for ids, *_ in rows])
        ids = torch.nn.utils.rnn.pad_sequence(
            [ids for ids, *_ in rows], batch_first=True, padding_value=self.pad
        )
        position = torch.arange(ids.shape[1])
        mask = (position < lengths[:, None]).long()
        scored = (
            (position[1:] >= torch.tensor([start for _, start, _ in rows])[:, None])
            & (position[1:] < lengths[:, None])
        ).float()
        with torch.no_grad():
            old, values = self.forward(ids, mask)
            with self.model.disable_adapter():
                reference, _ = self.forward(ids, mask)
            rewards = -0.2 * (old - reference) * scored
            rewards[torch.arange(len(rows)), lengths - 2] += torch.tensor(
                [reward for *_, reward in rows]
            )
            advantages, last = torch.zeros_like(rewards), torch.zeros(len(rows))
            for t in reversed(range(rewards.shape[1])):
                following = values[:, t + 1] * scored[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
                last = (rewards[:, t] + following - values[:, t] + 0.95 * last) * scored[:, t]
                advantages[:, t] = last
            returns = advantages + values
        for _ in range(self.epochs):
            new, predicted = self.forward(ids, mask)
            ratio = (new - old).exp()
            surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
            loss = (
                (surrogate + 0.05 * (predicted - returns).square()) * scored
            ).sum() / scored.sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
