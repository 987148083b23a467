"""Measure rollouts and updates of SmolLM2-135M-Instruct against plain transformers and peft, side by side.

    make pretrained                          # fetches the model
    python benchmarks/pretrained_speed.py

One thread, float32, LoRA of rank 16 on all linear layers, `guess_number(1, 15, 4)`. Both sides have the
same adapter, imitating random play for a round, so that responses are as long as in training.

- Rollouts: `collect` against batched `generate`, which reads the whole conversation again in each turn.
- Updates: `PPO.update` of one epoch against a loop over the same conversations, one padded row each, in
  optimizer steps of as many rows: reference (adapter off) and values without gradient, then the clipped
  surrogate, the KL to the reference and the value loss. Logits are computed where responses were sampled.

Turns per CPU second of that thread. A round measures each once, the two sides one after the other; ratios
are medians over rounds, with the lowest and the highest.
"""

import argparse
import statistics
import time
import warnings

import numpy as np
import torch
from workloads import Clock, Naive, table

from llamagym import Agent, Config, LoRAConfig, Policy, clone
from llamagym.algorithms.advantages import turn_gae
from llamagym.envs.guess_number import guess_number
from llamagym.episodes.episode import Episode
from llamagym.models.smollm2 import fetch_smollm2
from llamagym.rollout import collect

NEW_TOKENS = 8
ENVS = 32
MINI_BATCH = 16  # turns of an optimizer step
PAIRS = {"rollouts": ("collect", "generate"), "updates": ("update", "padded update")}


class Generate(Naive):
    "Plays with `generate`, sampling from the full softmax"

    @torch.no_grad()
    def respond(self, prompts: list[list[int]]) -> list[list[int]]:
        width, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
        )
        eos = self.tokenizer.eos_token_id
        return [row[: row.index(eos) + 1] if eos in row else row for row in out[:, width:].tolist()]

    def act(self, env, conversation, response):
        "Step with the response's action or, if it is invalid, with any that is legal"
        conversation.add_response(response, response[-1] in conversation.stop_ids)
        text = self.tokenizer.decode(response, skip_special_tokens=True)
        try:
            action = self.task.extract_action(text)
        except ValueError:
            action = None
        legal = np.flatnonzero(env.unwrapped.mask) + env.unwrapped.low
        return env.step(action if action in legal else int(legal[0]))


class PaddedUpdate:
    "One epoch of PPO with peft and padded rows"

    def __init__(self, policy: Policy) -> None:
        self.model, self.pad = policy.model, policy.pad_id
        self.head = torch.nn.Sequential(
            torch.nn.Linear(policy.hidden_size, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW([*trained, *self.head.parameters()], lr=1e-5)

    def pad_rows(self, episodes: list[Episode]) -> dict[str, torch.Tensor]:
        "Return padded ids, their mask, and where responses and the tokens before them are"
        rows = [torch.tensor(episode.segments[0].ids) for episode in episodes]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        lengths = torch.tensor([len(row) for row in rows])
        responses = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(episode.segments[0].mask).bool() for episode in episodes],
            batch_first=True,
        )
        starts = torch.zeros_like(responses)
        for row, episode in enumerate(episodes):
            starts[row, [turn.start - 1 for turn in episode.turns]] = True
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return dict(ids=ids, mask=mask, responses=responses[:, 1:], starts=starts)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        "Return the distributions [tokens, V] of sampled tokens, and the values [turns]"
        backbone = self.model.get_base_model().model
        hidden = backbone(
            input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False
        ).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[:, :-1][batch["responses"]])
        return logits.log_softmax(-1), self.head(hidden[batch["starts"]].detach()).squeeze(-1)

    def update(self, episodes: list[Episode]) -> None:
        turns = [turn for episode in episodes for turn in episode.turns]
        per_step = max(1, round(MINI_BATCH * len(episodes) / len(turns)))
        for begin in range(0, len(episodes), per_step):
            mini = episodes[begin : begin + per_step]
            batch = self.pad_rows(mini)
            tokens = batch["ids"][:, 1:][batch["responses"]]
            with torch.no_grad():
                with self.model.disable_adapter():
                    reference, _ = self.forward(batch)
                _, values = self.forward(batch)
            advantages, returns, end = [], [], 0
            for episode in mini:
                own = values[end : end + len(episode.turns)].tolist()
                a, g = turn_gae(episode.rewards, own, 0.99, 0.95)
                advantages += list(a)
                returns += list(g)
                end += len(episode.turns)
            of_token = np.repeat(
                advantages, [len(turn.response_ids) for e in mini for turn in e.turns]
            )
            advantage = torch.tensor(of_token, dtype=torch.float32)
            old = torch.tensor(np.concatenate([turn.logprobs for e in mini for turn in e.turns]))
            log_dist, predicted = self.forward(batch)
            ratio = (log_dist.gather(-1, tokens[:, None]).squeeze(-1) - old).exp()
            surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
            kl = (log_dist.exp() * (log_dist - reference)).sum(-1)
            value_loss = (predicted - torch.tensor(returns, dtype=torch.float32)).square().mean()
            loss = (surrogate + 0.1 * kl).mean() + 0.25 * value_loss
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=ENVS, help="(default: %(default)s)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began = time.perf_counter()
    policy = Policy.load(fetch_smollm2(), lora=LoRAConfig(r=16), device="cpu")
    config = Config.for_model(policy).replace(
        {
            "generate.max_new_tokens": NEW_TOKENS,
            "rollout.num_envs": ENVS,
            "ppo.epochs": 1,
            "ppo.learning_rate": 1e-5,
            "ppo.early_stop_kl": None,
            "ppo.mini_batch_size": MINI_BATCH,
            "warmstart.random_turns": 128,
            "warmstart.max_random_turns": 128,
            "warmstart.probe_episodes": 0,
        }
    )
    agent = Agent.for_task(guess_number(1, 15, 4), policy, config=config)
    clone(agent, progress=False)
    generate = Generate(policy.model, policy.tokenizer, agent.task)
    padded = PaddedUpdate(policy)
    rates: dict[str, list[float]] = {name: [] for pair in PAIRS.values() for name in pair}
    count = arguments.episodes
    for seed in range(arguments.rounds):
        with Clock() as clock:
            episodes = collect(agent, episodes=count, num_envs=ENVS, seed=seed)
        turns = sum(map(len, episodes))
        rates["collect"].append(turns / clock.cpu)
        with Clock() as clock:
            played = generate.batch(1000 * seed, count)
        rates["generate"].append(played / clock.cpu)
        for name, update in (("update", agent.learner.update), ("padded update", padded.update)):
            with Clock() as clock:
                update(episodes)
            rates[name].append(turns / clock.cpu)
    lines = []
    for name, (ours, other) in PAIRS.items():
        ratios = sorted(a / b for a, b in zip(rates[ours], rates[other]))
        lines.append(
            dict(
                work=name,
                this=statistics.median(rates[ours]),
                plain=statistics.median(rates[other]),
                ratio=statistics.median(ratios),
                low=ratios[0],
                high=ratios[-1],
            )
        )
    print(table(lines, dict(work="", this=".2f", plain=".2f", ratio=".2f", low=".2f", high=".2f")))
    print(
        f"turns per CPU second; {time.perf_counter() - began:.0f} s in all, torch {torch.__version__}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
