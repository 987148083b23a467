"""Run TRL's loop for multi-turn environments: `GRPOTrainer` with a `rollout_func` that plays by `generate`.

    OMP_NUM_THREADS=1 python benchmarks/trl_loop.py --size 1M --task blackjack

Prints one line: episodes and turns played, and the CPU and wall seconds of training.
"""

import argparse
import os
import tempfile
import warnings
from dataclasses import dataclass

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from workloads import NEW_TOKENS, SIZES, Clock, Naive, model_of, task_of, tokenizer_of

from llamagym.chat.conversation import Conversation

EPOCHS = 4  # over the episodes of an iteration
# episodes per forward pass: memory, not results; there is one optimizer step per epoch
ROWS = {"blackjack": 16, "corridor": 4}


@dataclass
class Rollouts(Naive):
    """A `rollout_func` that plays a batch of episodes in parallel, prefilling the whole conversation at each turn

    A prompt is the seed of an episode, so a group of equal prompts starts in the same state. An episode
    becomes one row: its first prompt, then a completion of responses with the observations between
    them, which `env_mask` excludes from the loss. Log-probabilities are None, as from TRL's own
    `generate`: without vLLM the trainer computes them itself.
    """

    def __post_init__(self):
        super().__post_init__()
        self.envs, self.episodes, self.turns = [], 0, 0

    @torch.no_grad()
    def respond(self, prompts: list[list[int]]) -> list[list[int]]:
        "Sample responses with the trainer's settings, from the full softmax that its loss scores"
        inputs = self.tokenizer.pad(
            {"input_ids": prompts}, padding_side="left", return_tensors="pt"
        )
        out = self.model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            generation_config=self.sampling,
        )
        responses, stop = out[:, inputs.input_ids.shape[1] :].tolist(), self.tokenizer.eos_token_id
        return [row[: row.index(stop) + 1] if stop in row else row for row in responses]

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        "Play an episode per prompt"
        self.model, self.sampling = (
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.generation_config,
        )
        self.envs += [self.task.make() for _ in range(len(prompts) - len(self.envs))]
        conversations, first = (
            [Conversation(self.renderer, self.task.system_prompt) for _ in prompts],
            [0] * len(prompts),
        )
        returns, state = (
            [0.0] * len(prompts),
            {i: self.envs[i].reset(seed=int(prompt)) for i, prompt in enumerate(prompts)},
        )
        while state:
            asked = [
                conversations[i].add_user(self.task.format_observation(*seen))
                for i, seen in state.items()
            ]
            self.turns, going = self.turns + len(asked), {}
            for i, prompt, response in zip(state, asked, self.respond(asked)):
                first[i] = first[i] or len(prompt)
                obs, reward, terminated, truncated, info = self.act(
                    self.envs[i], conversations[i], response
                )
                returns[i] += float(reward)
                if not (terminated or truncated):
                    going[i] = obs, info
            state = going
        self.episodes += len(prompts)
        rows = [conversation.segments[0] for conversation in conversations]
        return dict(prompt_ids=[row.ids[:n] for row, n in zip(rows, first)], completion_ids=[row.ids[n:] for row, n in zip(rows, first)],
                    env_mask=[row.mask[n:] for row, n in zip(rows, first)], logprobs=None, returns=returns)  # fmt: skip


def episode_return(completions: list[str], returns: list[float], **_) -> list[float]:
    "Reward function: return what the rollout recorded"
    return returns


def trainer_of(
    size: str, task_name: str, iterations: int, episodes: int, num_generations: int, folder: str
) -> tuple[GRPOTrainer, Rollouts]:
    "Return TRL's trainer for a benchmark's model, and its rollout function"
    model, tokenizer, rows = model_of(size), tokenizer_of(size), min(ROWS[task_name], episodes)
    if episodes % rows:
        raise ValueError(f"episodes={episodes}: expected a multiple of {rows}")
    rollouts = Rollouts(model, tokenizer, task_of(task_name))
    seeds = Dataset.from_dict(
        {"prompt": [str(seed) for seed in range(iterations * episodes // num_generations)]}
    )
    # of names that TRL itself still uses, and of its second adapter, the reference
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = GRPOConfig(folder, use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=iterations * EPOCHS, num_iterations=EPOCHS,
                          per_device_train_batch_size=rows, gradient_accumulation_steps=episodes // rows, num_generations=num_generations,
                          max_completion_length=NEW_TOKENS, temperature=0.9, beta=0.04, learning_rate=1e-4, lr_scheduler_type="constant",
                          shuffle_dataset=False, dataloader_pin_memory=False, logging_strategy="no", save_strategy="no", report_to="none",
                          disable_tqdm=True)  # fmt: skip
        trainer = GRPOTrainer(
            model, episode_return, args, seeds, processing_class=tokenizer, rollout_func=rollouts
        )
    trainer.remove_callback(PrinterCallback)
    return trainer, rollouts


def trl_loop(
    size: str, task_name: str, iterations: int = 4, episodes: int = 16, num_generations: int = 8
) -> dict:
    "Train for some iterations; return episodes and turns played, and the CPU and wall seconds of `train` alone"
    with tempfile.TemporaryDirectory() as folder:
        trainer, rollouts = trainer_of(
            size, task_name, iterations, episodes, num_generations, folder
        )
        with Clock() as clock:
            trainer.train()
    return dict(episodes=rollouts.episodes, turns=rollouts.turns, cpu=clock.cpu, wall=clock.wall)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=SIZES, default="1M", help="of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--task", choices=ROWS, default="blackjack", help="environment (default: %(default)s)"
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=4,
        help="rollouts, each with its update (default: %(default)s)",
    )
    parser.add_argument(
        "--episodes", type=int, default=16, help="per iteration (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    row = trl_loop(arguments.size, arguments.task, arguments.iterations, arguments.episodes)
    print(f"TRL {arguments.size} {arguments.task}: {row['episodes']} episodes, {row['turns']} turns, {row['cpu']:.1f} s CPU, {row['wall']:.1f} s, "
          f"{row['episodes'] / row['wall']:.2f} episodes/s", flush=True)  # fmt: skip
