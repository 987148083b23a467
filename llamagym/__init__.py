"""Language-model agents that learn by reinforcement learning in Gymnasium environments, from a notebook.

The most used names are here; they are imported when first asked for, so that `import llamagym` is quick.
"""

__version__ = "0.2.0"

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agent import Agent
    from .buffer import Episode, EpisodeBuffer
    from .config import Config
    from .player import EpisodePlayer
    from .policy import Policy
    from .rollout import collect, evaluate
    from .task import Task
    from .trainer import Trainer
    from .warmstart import clone

__all__ = ["Agent", "Config", "Episode", "EpisodeBuffer", "EpisodePlayer", "Policy", "Task", "Trainer", "clone", "collect", "evaluate"]

_MODULE_OF = {
    "Agent": "agent",
    "Config": "config",
    "Episode": "buffer",
    "EpisodeBuffer": "buffer",
    "EpisodePlayer": "player",
    "Policy": "policy",
    "Task": "task",
    "Trainer": "trainer",
    "clone": "warmstart",
    "collect": "rollout",
    "evaluate": "rollout",
}


# peft imports bitsandbytes, which regrets on every CPU that an optional bfloat16 kernel is missing; a policy uses float32 there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
