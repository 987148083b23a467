"""What the benchmarks share: models of three sizes, two environments, and the loop of 2024 that everything is measured against."""

import functools
import os
import time
from dataclasses import dataclass, field

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gymnasium as gym
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from llamagym.agent import Agent
from llamagym.config import Config, LoRAConfig
from llamagym.policy import Policy, add_lora
from llamagym.task import Task, blackjack
from llamagym.tiny import tiny_tokenizer

NEW_TOKENS = 32  # of a response; a random model hardly ever stops by itself
SIZES = {  # Llama shapes; the last is SmolLM-135M's
    "1M": dict(vocab_size=4096, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4),
    "14M": dict(vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=7, num_attention_heads=6, num_key_value_heads=6),
    "135M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3),
}


@functools.cache
def tokenizer_of(size: str) -> PreTrainedTokenizerBase:
    """The tiny tokenizer with as many further words as the vocabulary has room for"""
    missing = SIZES[size]["vocab_size"] - len(tiny_tokenizer())
    return tiny_tokenizer(words=tuple(f"w{i:05d}" for i in range(missing // 2)))


def model_of(size: str, seed: int = 0) -> PeftModel:
    """A Llama with random weights and an adapter on its queries and values, as is usual"""
    torch.manual_seed(seed)
    tokenizer = tokenizer_of(size)
    config = LlamaConfig(max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **SIZES[size])  # fmt: skip
    return add_lora(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), LoRAConfig(r=16, target_modules=["q_proj", "v_proj"]), seed)


class Corridor(gym.Env):
    """Twenty turns of some thirty tokens each, whatever is done"""

    action_space, observation_space = gym.spaces.Discrete(2), gym.spaces.MultiDiscrete([100, 100])

    def __init__(self, turns: int = 20):
        self.turns = turns

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.array([self.t, self.np_random.integers(100)]), {}

    def step(self, action):
        self.t += 1
        return np.array([self.t, self.np_random.integers(100)]), float(action), self.t == self.turns, False, {}


def any_reply(text: str) -> int:
    """An action in whatever is said: the models here have never seen a word"""
    return sum(map(ord, text)) % 2


def task_of(name: str, turns: int = 20) -> Task:
    """`blackjack`, or `corridor` of as many turns"""
    if name == "blackjack":
        task = blackjack()
        task.parse = any_reply
        return task
    def describe(obs, info):
        return f"Turn {obs[0]} of {turns}. You stand at position {obs[1]} of the cliff and see the wall, the lake and the goal. Left or right?"
    return Task(functools.partial(Corridor, turns), describe, any_reply, lambda a: f"Action: {a}", name="corridor",
                system_prompt="Walk to the goal without going over the cliff. Each turn you see where you stand; "
                              "each step has a cost. Reply Action: 0 or Action: 1.")  # fmt: skip


def agent_of(size: str, task: Task, **options) -> Agent:
    """This project's agent of a benchmark's model; `ppo__epochs=4` for an option"""
    given = {"generate.max_new_tokens": NEW_TOKENS, "generate.temperature": 0.9} | {k.replace("__", "."): v for k, v in options.items()}
    return Agent.for_task(task, Policy(model_of(size), tokenizer_of(size)), config=Config.from_dict(given))


@dataclass
class Naive:
    """The loop of 2024: one environment at a time, the whole conversation read again at each turn, by `generate`"""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    env: gym.Env = field(init=False)

    def __post_init__(self):
        self.env = self.task.make()

    def prompt(self, messages: list[dict]) -> torch.Tensor:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids

    @torch.no_grad()
    def respond(self, messages: list[dict]) -> str:
        ids = self.prompt(messages)
        out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.9,
                                  top_p=0.6, top_k=0, pad_token_id=self.tokenizer.pad_token_id)  # fmt: skip
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()

    def episode(self, seed: int) -> tuple[list[dict], list[float]]:
        """The messages of an episode, and the reward of each turn"""
        obs, info = self.env.reset(seed=seed)
        messages, rewards, done = [dict(role="system", content=self.task.system_prompt)], [], False
        while not done:
            messages.append(dict(role="user", content=self.task.describe(obs, info)))
            messages.append(dict(role="assistant", content=self.respond(messages)))
            obs, reward, terminated, truncated, info = self.env.step(self.task.parse(messages[-1]["content"]))
            rewards.append(float(reward))
            done = terminated or truncated
        return messages, rewards


class Clock:
    """CPU and wall seconds of a block"""

    def __enter__(self):
        self.cpu, self.wall = -time.process_time(), -time.perf_counter()
        return self

    def __exit__(self, *_):
        self.cpu, self.wall = self.cpu + time.process_time(), self.wall + time.perf_counter()


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as aligned text; `columns` maps names to formats"""
    cells = [list(columns)] + [[format(row[name], spec) if name in row else "" for name, spec in columns.items()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths))) for line in cells)
