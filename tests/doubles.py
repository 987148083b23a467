"""Small policies, agents and environments that several test modules share."""

import functools
import tempfile

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llamagym.agent import Agent
from llamagym.config import Config, LoRAConfig
from llamagym.policy import Policy
from llamagym.task import Task, frozen_lake
from llamagym.tiny import tiny_config, tiny_model, tiny_tokenizer
from walks import Walk

KINDS = ("plain", "lora", "nf4")
RANK = LoRAConfig(r=4, alpha=8.0)


def make_policy(kind: str, name: str = "tiny", shaken: bool = True, **kwargs) -> Policy:
    """A policy of a kind; an adapter that is `shaken` does something"""
    kwargs = {"plain": {}, "lora": dict(lora=RANK), "nf4": dict(lora=RANK, quantize="nf4")}[kind] | kwargs
    policy = Policy.load(name, **dict(device="cpu") | kwargs)
    if kind != "plain" and shaken:
        shake(policy.parameters())
    return policy


def windows(families) -> list[tuple[str, int | None]]:
    """Families with the attention windows to try: their own, one short of most rows, and one beyond all"""
    return [(f, w) for f in families for w in (None, 40, 4096) if w is None or getattr(tiny_config(f), "sliding_window", None)]


def shake(parameters, scale: float = 0.02, seed: int = 0) -> None:
    """Move weights by a little noise, always the same"""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p.device))


def random_rows(vocab: int, lengths, seed=0) -> list[list[int]]:
    """Ids that begin with the tiny tokenizer's BOS"""
    generator = np.random.default_rng(seed)
    return [[1, *generator.integers(0, vocab, n - 1).tolist()] for n in lengths]


def config(**options) -> Config:
    """Short responses, and options with `__` for the dots: `ppo__epochs=1`"""
    return Config.from_dict({"generate.max_new_tokens": 4, "ppo.batch_size": 1000} | {k.replace("__", "."): v for k, v in options.items()})


def lake(max_steps: int = 6, **changes) -> Task:
    """FrozenLake on ice that does not slip: several turns, all of them the same for the same actions"""
    task = frozen_lake(slippery=False)
    task.max_steps = max_steps
    for name, value in changes.items():
        setattr(task, name, value)
    return task


def lake_agent(policy: Policy, max_steps: int = 6, task: Task | None = None, **options) -> Agent:
    return Agent.for_task(task or lake(max_steps), policy, config=config(**options))


# what users of 2024 bring: models made by transformers and peft alone


@functools.cache
def _folder_of(tokenizer) -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    tiny_model(seed=0, tokenizer=tokenizer).save_pretrained(folder.name)
    return folder


def users_model(kind: str, tokenizer=None, prepare: bool = False, **lora):
    """A model as a user's own script makes it; many `prepare` a 4-bit one with peft's function for that"""
    tokenizer = tokenizer or tiny_tokenizer()
    if kind == "plain":
        return tiny_model(seed=0, tokenizer=tokenizer)
    if kind == "lora":
        base = tiny_model(seed=0, tokenizer=tokenizer)
    else:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(_folder_of(tokenizer).name, quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.float32)
        base = prepare_model_for_kbit_training(base) if prepare else base
    return get_peft_model(base, LoraConfig(**(dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") | lora)))


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
    """A tokenizer with the template of a style: `llama2`, `chatml` or `none`"""
    if style == "llama2":
        return tiny_tokenizer(LLAMA2_TEMPLATE)
    if style == "chatml":
        return tiny_tokenizer(CHATML_TEMPLATE, special_tokens=("<|im_start|>", "<|im_end|>"))
    return tiny_tokenizer(None)


# environments


def walk_task(length: int = 3, trouble=None, pays=None, **changes) -> Task:
    """Any response of an even number of characters is action 0, of an odd number action 1, of none no action"""

    def parse(text):
        if not text:
            raise ValueError("nothing was said")
        return len(text) % 2

    words = dict(describe=lambda obs, info: f"Step {obs[1]} of walk {obs[0]}.", parse=parse, action_text=lambda a: "a" * (2 - a), system_prompt="Walk.")
    return Task(functools.partial(Walk, length, trouble, pays), **(words | changes))
