"""Language-model agents that learn by reinforcement learning in Gymnasium environments, from a notebook.

Every name that a tutorial uses is here. Each is imported when it is first used, so that
`import llamagym` stays quick.
"""

__version__ = "0.4.0"

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agent import Agent, TaskAgent
    from .agents.exact import greedy_choices, plot_policy
    from .agents.scored import ScoredAgent
    from .algorithms.registry import ALGORITHMS
    from .buffer import EpisodeBuffer
    from .chat.conversation import Window
    from .cli import find_tutorial
    from .config import Config, LoRAConfig
    from .envs.baselines import RandomAgent, ScriptedAgent, play
    from .envs.check import check_env
    from .envs.exact import blackjack_tree
    from .envs.guess_number import guess_number
    from .envs.probes import PROBES
    from .envs.registry import get_task
    from .envs.tabular import tabular_model
    from .envs.task import Task
    from .envs.toy_text import blackjack, cliff_walking, frozen_lake, taxi
    from .episodes.episode import Episode
    from .models.policy import Policy
    from .models.smollm2 import fetch_smollm2
    from .rollout import collect, evaluate
    from .trainer import Trainer
    from .training.branch import branch
    from .training.callbacks import Anneal, Callback
    from .training.cloning import clone
    from .training.first_look import first_look
    from .training.planner import plan
    from .training.probe_runs import immediate_reward, plot_probe_results, run_probe
    from .widgets.monitor import TrainingMonitor
    from .widgets.player import EpisodePlayer
    from .widgets.plots import plot_episode, plot_run, plot_runs

__all__ = [
    "ALGORITHMS",
    "Agent",
    "Anneal",
    "Callback",
    "Config",
    "Episode",
    "EpisodeBuffer",
    "EpisodePlayer",
    "LoRAConfig",
    "PROBES",
    "Policy",
    "RandomAgent",
    "ScoredAgent",
    "ScriptedAgent",
    "Task",
    "TaskAgent",
    "Trainer",
    "TrainingMonitor",
    "Window",
    "blackjack",
    "blackjack_tree",
    "branch",
    "check_env",
    "cliff_walking",
    "clone",
    "collect",
    "evaluate",
    "fetch_smollm2",
    "find_tutorial",
    "first_look",
    "frozen_lake",
    "get_task",
    "greedy_choices",
    "guess_number",
    "immediate_reward",
    "plan",
    "play",
    "plot_episode",
    "plot_policy",
    "plot_probe_results",
    "plot_run",
    "plot_runs",
    "run_probe",
    "tabular_model",
    "taxi",
]

_MODULE_OF = {
    "Agent": "agent",
    "TaskAgent": "agent",
    "greedy_choices": "agents.exact",
    "plot_policy": "agents.exact",
    "ScoredAgent": "agents.scored",
    "ALGORITHMS": "algorithms.registry",
    "Episode": "episodes.episode",
    "EpisodeBuffer": "buffer",
    "Window": "chat.conversation",
    "fetch_smollm2": "models.smollm2",
    "find_tutorial": "cli",
    "Config": "config",
    "LoRAConfig": "config",
    "RandomAgent": "envs.baselines",
    "ScriptedAgent": "envs.baselines",
    "play": "envs.baselines",
    "check_env": "envs.check",
    "blackjack_tree": "envs.exact",
    "guess_number": "envs.guess_number",
    "PROBES": "envs.probes",
    "get_task": "envs.registry",
    "tabular_model": "envs.tabular",
    "Task": "envs.task",
    "blackjack": "envs.toy_text",
    "cliff_walking": "envs.toy_text",
    "frozen_lake": "envs.toy_text",
    "taxi": "envs.toy_text",
    "Policy": "models.policy",
    "collect": "rollout",
    "evaluate": "rollout",
    "Trainer": "trainer",
    "branch": "training.branch",
    "Anneal": "training.callbacks",
    "Callback": "training.callbacks",
    "clone": "training.cloning",
    "first_look": "training.first_look",
    "plan": "training.planner",
    "immediate_reward": "training.probe_runs",
    "plot_probe_results": "training.probe_runs",
    "run_probe": "training.probe_runs",
    "TrainingMonitor": "widgets.monitor",
    "EpisodePlayer": "widgets.player",
    "plot_episode": "widgets.plots",
    "plot_run": "widgets.plots",
    "plot_runs": "widgets.plots",
}

# peft imports bitsandbytes, which warns on every CPU that an optional bfloat16 kernel is missing.
# Policies compute in float32 there and do not need it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
