"""A small world with Gymnasium's interface, and with others; light to import in worker processes."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

OBSERVATIONS = {
    "number": (spaces.Discrete(1000), lambda n: n),
    "array": (spaces.Box(-1e3, 1e3, (2,), np.float32), lambda n: np.array([n, 0.5], np.float32)),
    "pair": (spaces.Tuple([spaces.Discrete(1000), spaces.Discrete(3)]), lambda n: (n, 2)),
    "pair as vector": (spaces.MultiDiscrete([1000, 3]), lambda n: (n, 2)),
    "pair with dict": (
        spaces.Tuple([spaces.Discrete(1000), spaces.Dict({"key": spaces.Discrete(2)})]),
        lambda n: (n, {"key": 1}),
    ),
    "pair outside its space": (
        spaces.Tuple([spaces.Discrete(1), spaces.Dict({"key": spaces.Discrete(2)})]),
        lambda n: (n + 5, {"key": 1}),
    ),
    "triple": (spaces.Tuple([spaces.Discrete(1000)] * 3), lambda n: (n, n, n)),
    "dict": (spaces.Dict({"at": spaces.Discrete(1000)}), lambda n: {"at": n}),
    "text": (spaces.Text(9), lambda n: f"at{n}"),
    "none": (None, lambda n: np.array([n])),
    "dict without space": (None, lambda n: {"at": n}),
}


class World(gym.Env):
    "Begins at a number drawn from the seed, adds the action, and ends after three steps"

    action_space = spaces.Discrete(3)

    def __init__(self, kind="number", ends=(True, False), info=None):
        space, self.describe = OBSERVATIONS[kind]
        if space is not None:
            self.observation_space = space
        self.ends, self.info = ends, info

    def begin(self):
        self.n, self.t = int(self.np_random.integers(500)), 0
        return self.describe(self.n)

    def move(self, action):
        self.n, self.t = self.n + int(action), self.t + 1
        return self.describe(self.n), self.n / 4

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.begin(), {}

    def step(self, action):
        terminated, truncated = self.ends if self.t == 2 else (False, False)
        obs, reward = self.move(action)
        return obs, reward, terminated, truncated, {}


class OldWorld(World):
    "The same with the interface before Gymnasium 0.26"

    def reset(self):
        return self.begin()

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        info = dict(self.info or {})
        if truncated and not terminated:
            info["TimeLimit.truncated"] = True
        return obs, reward, terminated or truncated, info


class OldWorldWithSeed(OldWorld):
    "The same with a method `seed`"

    def seed(self, seed=None):
        gym.Env.reset(self, seed=seed)
        return [seed]


class HalfOldWorld(World):
    "`reset` returns None as info, `step` four values"

    def reset(self, *, seed=None):
        gym.Env.reset(self, seed=seed)
        return self.begin(), None

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, np.bool_(terminated or truncated), None


class PassesOn(gym.Wrapper):
    "A user's wrapper that passes everything on"

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)

    def step(self, action):
        return self.env.step(action)


class Converts(gym.Wrapper):
    "A user's wrapper that converts four values itself: nothing may be put under it"

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self.env.unwrapped, seed=seed)
        return self.env.reset(), {}

    def step(self, action):
        obs, reward, done, info = self.env.step(action)
        return obs, reward, done, False, info


class Returns(World):
    "Returns what it is told to"

    def __init__(self, reset=None, step=None, kind="number"):
        super().__init__(kind)
        self.returned = dict(reset=reset, step=step)

    def reset(self, *, seed=None, options=None):
        usual = super().reset(seed=seed)
        return self.returned["reset"](*usual) if self.returned["reset"] else usual

    def step(self, action):
        usual = super().step(action)
        return self.returned["step"](*usual) if self.returned["step"] else usual


class SeededBy(World):
    "Draws its number in the way that is given, like older environments"

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def reset(self, *, seed=None, options=None):
        self.n, self.t = self.draw(seed), 0
        return self.n, {}


def draw_int32(seed):
    return int(np.int32(seed)) % 400  # raises OverflowError from 2**31 on


def draw_31_bits(seed):
    assert 0 <= seed < 2**31
    return seed % 400


def draw_text(seed):
    if seed >= 2**31:
        raise ValueError("the seed is too large")
    return seed % 400


class Bare(World):
    "Has neither of the two spaces"

    def __init__(self):
        super().__init__("none")

    @property
    def action_space(self):
        raise AttributeError("there is none")


class Unclosable(World):
    spec = None

    def close(self):
        raise OSError("the door is stuck")
