"""Config files round-trip, unknown options raise, and option names of 2024 are converted."""

import copy
import pickle
import tomllib
import warnings
from dataclasses import fields

import numpy as np
import pytest
from doubles import make_policy
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagym.agent import Agent
from llamagym.config import (
    PRETRAINED,
    SMALL_MODEL,
    Config,
    CreditConfig,
    GenerateConfig,
    LoRAConfig,
    ModelConfig,
    PPOConfig,
)
from llamagym.envs.toy_text import blackjack
from llamagym.models.tiny import tiny_model, tiny_tokenizer
from llamagym.options import Section

fast = settings(max_examples=60, deadline=None)
SECTIONS = [f.default_factory for f in fields(Config)] + [LoRAConfig]

word = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda s: "\n" not in s)
trees = st.fixed_dictionaries(
    {},
    optional={
        "model.name": word,
        "model.quantize": st.sampled_from([None, "nf4"]),
        "model.lora": st.none()
        | st.fixed_dictionaries(
            {},
            optional={"r": st.integers(1, 99), "target_modules": word | st.lists(word, min_size=1)},
        ),
        "context.turns": st.just("full") | st.integers(1, 10**9),
        "rollout.on_invalid": st.sampled_from(["fallback", "terminate", "retry:3"]),
        "rollout.invalid_reward": st.floats(allow_nan=False, allow_infinity=False),
        "ppo.learning_rate": st.floats(0, exclude_min=True, allow_infinity=False),
        "ppo.betas": st.tuples(
            st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)
        ),
        "ppo.value_clip": st.none() | st.floats(1e-300, 1e300),
        "ppo.epochs": st.integers(1, 2**62),
        "credit.normalize": st.booleans(),
        "trainer.output_dir": word,
    },
)


@fast
@given(trees)
def test_config_file_round_trip(tree):
    config = Config.from_dict(tree)
    assert Config.from_toml(config.to_toml()) == config
    assert Config.from_json(config.to_json()) == config
    assert Config.from_dict(config.to_dict()) == config
    for name, value in tree.items():
        if name != "model.lora":
            section, option = name.split(".")
            assert getattr(getattr(config, section), option) == value


def test_saved_config_file_content(tmp_path):
    config = Config.from_dict(
        {"ppo.epochs": 3, "model.lora": {}, "trainer.output_dir": 'l\x7fl \\ " ü'}
    )
    for name in ("a.toml", "new/folder/a.json"):
        assert Config.load(config.save(tmp_path / name)) == config
    assert PPOConfig.load(PPOConfig(epochs=9).save(tmp_path / "ppo.toml")).epochs == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.toml", "new", "ppo.toml"]


def test_every_option_is_documented_also_in_saved_files():
    text = Config(model=ModelConfig(lora=LoRAConfig())).to_toml()
    for section in SECTIONS:
        assert section.__doc__ and not section.__doc__.startswith(section.__name__)
        for f in fields(section):
            assert len(f.metadata["help"]) > 5, f.name
            assert f.metadata["help"] in text
    assert set(Config.names()) == {name for section in SECTIONS for name in section.names()}
    assert {row[0] for row in Config(model=ModelConfig(lora=LoRAConfig())).describe().rows} == set(
        Config.names()
    )


def test_optional_options_default_to_none():
    for section in SECTIONS:
        for f in fields(section):
            if type(None) in getattr(f.type, "__args__", ()):
                assert f.default is None, (
                    f"{section.__name__}.{f.name} allows None, but TOML can't say so"
                )


def test_default_values_are_valid():
    for section in SECTIONS:
        assert section.from_dict(section().to_dict()) == section()
    tomllib.loads(Config().to_toml())


def test_config_converts_numbers():
    ppo = PPOConfig(learning_rate=1, epochs=np.int64(3), clip_range=np.float32(0.5), betas=[0, 0.5])
    assert (ppo.learning_rate, ppo.epochs, ppo.clip_range, ppo.betas) == (1.0, 3, 0.5, (0.0, 0.5))
    assert [type(x) for x in (ppo.learning_rate, ppo.epochs, ppo.clip_range, *ppo.betas)] == [
        float,
        int,
        float,
        float,
        float,
    ]


def test_configs_do_not_share_sections(tmp_path):
    first, second = Config(), Config()
    first.ppo.epochs = 9
    assert second.ppo.epochs == PPOConfig.epochs
    assert copy.deepcopy(first) == first == pickle.loads(pickle.dumps(first))
    changed = first.replace({"ppo.epochs": 1, "model": {"lora": {"r": 2}}})
    assert (changed.ppo.epochs, changed.model.lora.r, first.ppo.epochs, first.model.lora) == (
        1,
        2,
        9,
        None,
    )
    assert changed.replace({"model.lora.alpha": 1}).model.lora == LoRAConfig(r=2, alpha=1.0)


def test_config_accepts_nested_and_dotted_names_together():
    config = Config.from_dict(
        {
            "model.lora.r": 4,
            "model": {"lora": {"dropout": 0.1}, "seed": 1},
            "model.lora.alpha": 8,
            "model.critic": "shared",
        }
    )
    assert config.model == ModelConfig(lora=LoRAConfig(4, 8.0, 0.1), seed=1, critic="shared")


def test_config_accepts_sections_as_dictionaries():
    assert Config(ppo={"epochs": 2}).ppo == PPOConfig(epochs=2)
    assert ModelConfig(lora={"r": 2}).lora == LoRAConfig(r=2)


@pytest.mark.parametrize("section", SECTIONS)
def test_config_is_displayed_as_a_table(section):
    lines = section()._repr_markdown_().splitlines()
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    assert len(lines) == 2 + len(str(section().describe()).splitlines())


def test_for_training_drops_evaluation_options():
    with pytest.warns(
        UserWarning, match="do_sample=False, top_p=0.6, top_k=5 is dropped"
    ) as caught:
        train = GenerateConfig(do_sample=False, top_p=0.6, top_k=5, temperature=0.7).for_training()
    assert train == GenerateConfig(temperature=0.7) and len(caught) == 1
    with warnings.catch_warnings(action="error"):
        assert GenerateConfig(max_new_tokens=3).for_training() == GenerateConfig(max_new_tokens=3)


# The legacy LlamaGym (2024) dictionaries

EXAMPLE_2024 = {
    "generate/max_new_tokens": 32, "generate/do_sample": True, "generate/top_p": 0.6, "generate/top_k": 0, "generate/temperature": 0.9,
}  # fmt: skip


def test_config_of_2024_examples_converts_without_a_warning():
    with warnings.catch_warnings(action="error"):
        config = Config.from_2024(EXAMPLE_2024, {"batch_size": 8, "mini_batch_size": 8})
        assert (
            GenerateConfig.from_2024({k.split("/")[1]: v for k, v in EXAMPLE_2024.items()})
            == config.generate
        )
        assert Config.from_2024() == Config()
    assert config.generate == GenerateConfig(32, 0.9, True, 0.6, 0)
    assert config.ppo == PPOConfig(turns_per_update=8, mini_batch_size=8)


def test_config_names_of_trl_map_to_current_names():
    given = dict(ppo_epochs=2, learning_rate=1e-5, init_kl_coef=0.3, horizon=5, cliprange=0.1, cliprange_value=0.3, vf_coef=0.2, gamma=0.9, lam=0.8, seed=7,
                 mini_batch_size=2, gradient_accumulation_steps=4, max_grad_norm=0.5, target_kl=0.1, early_stopping=True)  # fmt: skip
    with pytest.warns(UserWarning, match="early_stopping"):
        config = Config.from_2024(None, given)
    expected = PPOConfig(epochs=2, learning_rate=1e-5, kl_coef=0.3, kl_horizon=5, clip_range=0.1, value_clip=0.3, vf_coef=0.2, mini_batch_size=8,
                         max_grad_norm=0.5, early_stop_kl=0.1)  # fmt: skip
    assert config.ppo == expected
    assert config.credit == CreditConfig(gamma=0.9, gae_lambda=0.8) and config.trainer.seed == 7
    with pytest.warns(UserWarning, match="target_kl .early_stopping was off."):
        assert PPOConfig.from_2024({"target_kl": 1, "early_stopping": False}).early_stop_kl is None


def test_config_from_2024_accepts_current_names():
    config = Config.from_2024(
        {"max_new_tokens": 4},
        {"clip_range": 0.1, "epochs": 2, "kl_adaptive_target": 0.01, "gae_lambda": 0.5},
    )
    assert (
        config.ppo.clip_range,
        config.ppo.epochs,
        config.ppo.kl_adaptive_target,
        config.credit.gae_lambda,
    ) == (0.1, 2, 0.01, 0.5)


def test_one_warning_lists_options_without_effect():
    with pytest.warns(UserWarning) as caught:
        PPOConfig.from_2024(
            {
                "log_with": "wandb",
                "adap_kl_ctrl": True,
                "target": 6,
                "optimize_cuda_cache": True,
                "batch_size": 4,
            }
        )
    (warning,) = caught
    assert warning.filename == __file__
    for part in (
        "log_with (metrics go to a file",
        "target (it was in nats per response",
        "optimize_cuda_cache (ppo.token_budget",
    ):
        assert part in str(warning.message)
    with pytest.warns(UserWarning, match="pad_token_id .taken from the tokenizer") as caught:
        Config.from_2024({"pad_token_id": 0, "max_new_tokens": 8}, {"tracker_project_name": "x"})
    assert len(caught) == 1 and caught[0].filename == __file__


# The names of trl 0.7.11's PPOConfig, as its documentation lists them.
TRL_NAMES = """exp_name seed log_with task_name model_name query_dataset reward_model remove_unused_columns tracker_kwargs accelerator_kwargs
project_kwargs tracker_project_name push_to_hub_if_best_kwargs steps learning_rate adap_kl_ctrl init_kl_coef kl_penalty target horizon gamma lam
cliprange cliprange_value vf_coef batch_size forward_batch_size mini_batch_size gradient_accumulation_steps world_size ppo_epochs max_grad_norm
optimize_cuda_cache optimize_device_cache early_stopping target_kl compare_steps ratio_threshold use_score_scaling use_score_norm score_clip
whiten_rewards is_encoder_decoder is_peft_model backward_batch_size global_backward_batch_size global_batch_size"""


@pytest.mark.filterwarnings("ignore:without effect")
@pytest.mark.parametrize("name", TRL_NAMES.split())
def test_each_option_name_of_trl_is_accepted(name):
    value = 0.5 if name in ("gamma", "lam", "cliprange") else 1
    assert isinstance(Config.from_2024(None, {name: value}), Section)


def test_config_for_model_knows_small_models_without_adapters():
    """A small model that is trained whole has its own defaults; `for_task` uses them"""
    plain, lora = make_policy("plain"), make_policy("lora")
    small = Config.for_model(plain)
    assert small == Config.from_dict(SMALL_MODEL) != Config()
    assert Config.for_model(lora) == Config.from_dict(PRETRAINED) != Config()
    lora.causal_lm.num_parameters = lambda: 7_000_000_000
    assert Config.for_model(lora) == Config.from_dict(PRETRAINED)
    large = make_policy("plain")
    large.causal_lm.num_parameters = lambda: 7_000_000_000
    assert (
        Config.for_model(large).ppo.learning_rate == 1e-5 < Config.for_model(lora).ppo.learning_rate
    )
    assert Agent.for_task(blackjack(), plain).config == small
    assert Agent.for_task(blackjack(), plain, config=Config()).config == Config()
    model = tiny_model(seed=0)
    assert Agent.for_task(blackjack(), model, tiny_tokenizer()).config == small
