"""Games with illegal actions and with text actions, shared by several test modules."""

import gymnasium as gym
import numpy as np

LINES = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]


class TicTacToe(gym.Env):
    """Tic-tac-toe against a random opponent; an occupied cell raises, as in many a board game"""

    action_space = gym.spaces.Discrete(9)

    def __init__(self, mask: str | None = None):
        self.mask = mask  # where it is: "info", "obs", or None
        cells = gym.spaces.MultiDiscrete([3] * 9)
        masks = gym.spaces.MultiBinary(9)
        self.observation_space = cells
        if mask == "obs":
            self.observation_space = gym.spaces.Dict(observation=cells, action_mask=masks)
        self.received = []

    def seen(self):
        free = (self.board == 0).astype(np.int8)
        if self.mask == "obs":
            return {"observation": self.board.copy(), "action_mask": free}, {}
        return self.board.copy(), {"action_mask": free} if self.mask == "info" else {}

    def wins(self, player):
        return any(all(self.board[cell] == player for cell in line) for line in LINES)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.board = np.zeros(9, int)
        return self.seen()

    def step(self, action):
        self.received.append(action)
        if self.board[action]:
            raise ValueError(f"cell {action} is occupied")
        self.board[action] = 1
        reward, done = float(self.wins(1)), self.wins(1) or self.board.all()
        if not done:
            self.board[self.np_random.choice(np.flatnonzero(self.board == 0))] = 2
            reward, done = -float(self.wins(2)), self.wins(2) or self.board.all()
        obs, info = self.seen()
        return obs, reward, bool(done), False, info


class House:
    """A text world of three rooms with the API of gym before 0.26: reset gives an observation, step gives four values"""

    HEADER = "Welcome to the house! It is old.\n$$$$$$$ \n\n"
    DOORS = {("hall", "east"): "kitchen", ("kitchen", "west"): "hall", ("kitchen", "north"): "attic"}  # fmt: skip
    COMMANDS = ("look", "inventory", "take key", "go east", "go west", "go north")

    def __init__(self, limit: int = 6):
        self.limit, self.received = limit, []

    def seed(self, seed=None):
        return [seed]

    def close(self):
        pass

    def reset(self):
        self.room, self.steps, self.key = "hall", 0, False
        return f"{self.HEADER}You are in the {self.room}."

    def step(self, action):
        assert isinstance(action, str), f"a text game was given {action!r}"
        self.received.append(action)
        self.steps += 1
        text = "That is not a verb I know."
        if action in ("look", "inventory"):
            text = "You have a key." if self.key else "You have nothing."
        elif action == "take key" and self.room == "kitchen":
            self.key, text = True, "Taken."
        elif action.startswith("go "):
            way = (self.room, action[3:])
            self.room, text = self.DOORS.get(way, self.room), "You walk."
        won = self.key and self.room == "attic"
        done = won or self.steps == self.limit
        late = {"TimeLimit.truncated": True} if done and not won else {}
        return f"{text} You are in the {self.room}.", float(won), done, late
