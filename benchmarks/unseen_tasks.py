"Ten tasks that no default was tuned on by hand: dials, clues, lakes, a cliff, a taxi, cards, a number to guess."

import dataclasses
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import FlattenObservation

from llamagym.envs.actions import DiscreteActions
from llamagym.envs.task import Task
from llamagym.envs.toy_text import blackjack, cliff_walking, frozen_lake, taxi

LETTERS = ("a", "b", "c", "d", "e", "f")
COLORS = ("red", "green", "yellow", "blue", "black", "white")


class Lock(gym.Env):
    """A lock of several dials, set one after the other to one of six letters

    The observation is the dial, and the clue for it: the right letter's color, or always 0 without
    clues. The combination is fixed without clues; with them it is drawn anew at each reset."""

    def __init__(self, dials: int, clues: bool = False, sparse: bool = False) -> None:
        self.dials = dials
        self.clues = clues
        self.sparse = sparse  # reward 1 for the whole combination, instead of a share per dial
        self.combination = np.random.default_rng(dials).integers(6, size=dials)
        self.observation_space = gym.spaces.MultiDiscrete([dials + 1, 6 if clues else 1])
        self.action_space = gym.spaces.Discrete(6)

    def _observation(self) -> np.ndarray:
        open_dial = self.dial < self.dials
        clue = (self.combination[self.dial] + 2) % 6 if self.clues and open_dial else 0
        return np.array([self.dial, clue])

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.dial, self.num_right = 0, 0
        if self.clues:
            self.combination = self.np_random.integers(6, size=self.dials)
        return self._observation(), {}

    def step(self, action: int):
        right = int(action) == self.combination[self.dial]
        self.num_right += right
        self.dial += 1
        done = self.dial == self.dials
        reward = float(done and self.num_right == self.dials) if self.sparse else right / self.dials
        return self._observation(), float(reward), done, False, {}


LETTER_ACTIONS = DiscreteActions(LETTERS)


def lock_task(dials: int, clues: bool = False, sparse: bool = False) -> Task:
    "Return the task of a `Lock`"

    def describe(obs: np.ndarray, info: dict[str, Any]) -> str:
        clue = f" Clue: {COLORS[obs[1]]}." if clues else ""
        return f"Dial {obs[0] + 1} of {dials}.{clue}"

    random = (1 / 6) ** dials if sparse else 1 / 6
    return Task(
        lambda: Lock(dials, clues, sparse),
        describe,
        LETTER_ACTIONS.extract_action,
        LETTER_ACTIONS.format_action,
        name="clue lock" if clues else "sparse lock" if sparse else "lock",
        system_prompt="Open the lock: set each dial to its letter. " + LETTER_ACTIONS.prompt,
        reference_returns=dict(random=random, optimal=1.0),
    )


class GuessNumber(gym.Env):
    "Guess a number; the environment tells the bounds that are left"

    def __init__(self, low: int = 1, high: int = 50, turns: int = 6) -> None:
        self.low, self.high, self.turns = low, high, turns
        self.observation_space = gym.spaces.Box(0, high + turns, (3,), np.int64)
        self.action_space = gym.spaces.Discrete(high - low + 1, start=low)

    def _observation(self) -> np.ndarray:
        return np.array([*self.bounds, self.left])

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.number = int(self.np_random.integers(self.low, self.high + 1))
        self.bounds, self.left = [self.low, self.high], self.turns
        return self._observation(), {}

    def step(self, action: int):
        guess = int(action)
        self.left -= 1
        found = guess == self.number
        if guess < self.number:
            self.bounds[0] = max(self.bounds[0], guess + 1)
        elif guess > self.number:
            self.bounds[1] = min(self.bounds[1], guess - 1)
        return self._observation(), float(found), found or not self.left, False, {}


def guess_task(low: int = 1, high: int = 50, turns: int = 6) -> Task:
    "Return the task of `GuessNumber`; random play's return is that of uniform guesses in the range"
    actions = DiscreteActions(tuple(map(str, range(low, high + 1))), start=low)
    size = high - low + 1
    return Task(
        lambda: GuessNumber(low, high, turns),
        lambda obs, info: f"From {obs[0]} to {obs[1]}. {obs[2]} turns left.",
        actions.extract_action,
        actions.format_action,
        name=f"guess the number {low}-{high}",
        system_prompt=f"Guess a number from {low} to {high}. Reply Action: and a number.",
        reference_returns=dict(
            random=1 - (1 - 1 / size) ** turns, optimal=min(1.0, (2**turns - 1) / size)
        ),
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    "A task, and the length of a run on it"

    task: Callable[[], Task]
    updates: int  # of 64 episodes
    scored: bool = False  # the agent chooses among the texts of the legal actions

    def env(self) -> gym.Env:
        "Return an environment with an observation of fixed length, for the baseline"
        env = self.task().make()
        return (
            FlattenObservation(env) if isinstance(env.observation_space, gym.spaces.Tuple) else env
        )


PROBLEMS = {
    "lock": Problem(lambda: lock_task(5), 60),
    "clue_lock": Problem(lambda: lock_task(5, clues=True), 100),
    "lake": Problem(lambda: frozen_lake(slippery=False), 40),
    "lake8": Problem(lambda: frozen_lake(slippery=False, map_name="8x8"), 160),
    "slippery": Problem(frozen_lake, 200),
    "cliff": Problem(cliff_walking, 40),
    "taxi": Problem(taxi, 60, scored=True),
    "blackjack": Problem(blackjack, 200),
    "guess": Problem(guess_task, 120),
    "sparse": Problem(lambda: lock_task(3, sparse=True), 80),
}
