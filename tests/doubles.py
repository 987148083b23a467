"""Small policies, agents and environments shared by several test modules."""

import functools
import tempfile

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from walks import Walk

from llamagym.agent import Agent
from llamagym.config import Config, LoRAConfig
from llamagym.envs.task import Task
from llamagym.envs.toy_text import frozen_lake
from llamagym.models.policy import Policy
from llamagym.models.tiny import tiny_config, tiny_model, tiny_tokenizer

KINDS = ("plain", "lora", "nf4")
RANK = LoRAConfig(r=4, alpha=8.0)


def make_policy(kind: str, name: str = "tiny", perturbed: bool = True, **kwargs) -> Policy:
    "Return a tiny policy; with `perturbed`, its adapter is non-zero and changes the outputs"
    kwargs = {"plain": {}, "lora": dict(lora=RANK), "nf4": dict(lora=RANK, quantize="nf4")}[
        kind
    ] | kwargs
    policy = Policy.load(name, **dict(device="cpu") | kwargs)
    if kind != "plain" and perturbed:
        perturb(policy.parameters())
    return policy


def windows(families) -> list[tuple[str, int | None]]:
    "Return (family, window) pairs: the default window, one shorter than most rows, one longer than all rows"
    return [
        (f, w)
        for f in families
        for w in (None, 40, 4096)
        if w is None or getattr(tiny_config(f), "sliding_window", None)
    ]


def perturb(parameters, scale: float = 0.02, seed: int = 0) -> None:
    "Add small seeded noise to weights"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p.device))


def random_rows(vocab: int, lengths, seed=0) -> list[list[int]]:
    "Return rows of random token ids, each starting with the tiny tokenizer's BOS"
    generator = np.random.default_rng(seed)
    return [[1, *generator.integers(0, vocab, n - 1).tolist()] for n in lengths]


def config(**options) -> Config:
    """Return a config with short responses; `ppo__epochs=1` sets `ppo.epochs`

    Untrained models are trained on purpose, although few of their responses are valid."""
    return Config.from_dict(
        {
            "generate.max_new_tokens": 4,
            "ppo.turns_per_update": 1000,
            "trainer.stop_if_invalid": 1,
        }
        | {k.replace("__", "."): v for k, v in options.items()}
    )


def lake(max_steps: int = 6, **changes) -> Task:
    "Return FrozenLake without slipping, as one conversation: deterministic given the actions"
    task = frozen_lake(slippery=False)
    task.max_steps, task.context = max_steps, "full"
    for name, value in changes.items():
        setattr(task, name, value)
    return task


def some(values, quick) -> list:
    "Return parameters of which only some run by default"
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


def lake_agent(policy: Policy, max_steps: int = 6, task: Task | None = None, **options) -> Agent:
    return Agent.for_task(task or lake(max_steps), policy, config=config(**options))


# Models as scripts of 2024 make them, with transformers and peft alone


@functools.cache
def _folder_of(tokenizer) -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    tiny_model(seed=0, tokenizer=tokenizer).save_pretrained(folder.name)
    return folder


def users_model(kind: str, tokenizer=None, prepare: bool = False, **lora):
    "Return a model made with transformers and peft alone; with `prepare`, prepared for 4-bit training by peft"
    tokenizer = tokenizer or tiny_tokenizer()
    if kind == "plain":
        return tiny_model(seed=0, tokenizer=tokenizer)
    if kind == "lora":
        base = tiny_model(seed=0, tokenizer=tokenizer)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        base = AutoModelForCausalLM.from_pretrained(
            _folder_of(tokenizer).name,
            quantization_config=quantization,
            device_map={"": "cpu"},
            dtype=torch.float32,
        )
        base = prepare_model_for_kbit_training(base) if prepare else base
    return get_peft_model(
        base,
        LoraConfig(
            **(dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") | lora)
        ),
    )


LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + system if loop.first else '[INST] ' }}{{ message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def tokenizer_of(style: str):
    "Return a tokenizer with a chat template: `llama2`, `chatml` or `none`"
    if style == "llama2":
        return tiny_tokenizer(LLAMA2_TEMPLATE)
    if style == "chatml":
        return tiny_tokenizer(CHATML_TEMPLATE, special_tokens=("<|im_start|>", "<|im_end|>"))
    return tiny_tokenizer(None)


# Environments


def walk_task(length: int = 3, trouble=None, reward_function=None, **changes) -> Task:
    "Return a task whose action is the parity of the response's length; an empty response is invalid"

    def parse(text):
        if not text:
            raise ValueError("the response is empty")
        return len(text) % 2

    words = dict(
        format_observation=lambda obs, info: f"Step {obs[1]} of walk {obs[0]}.",
        extract_action=parse,
        format_action=lambda a: "a" * (2 - a),
        system_prompt="Walk.",
    )
    return Task(functools.partial(Walk, length, trouble, reward_function), **(words | changes))
