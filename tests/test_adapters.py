"""Adapters of peft: several policies on one model, and all kinds of them, against peft's own forward."""

import copy
import json
import shutil

import peft
import pytest
import torch
from doubles import lake, perturb, some
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from llamagym.agent import Agent
from llamagym.config import Config, GenerateConfig, LoRAConfig, WarmstartConfig
from llamagym.envs.baselines import RandomAgent, play
from llamagym.inference.engine import Engine
from llamagym.models.adapters import matches_checkpoint
from llamagym.models.policy import Policy
from llamagym.models.reference import add_lora
from llamagym.models.tiny import tiny_model, tiny_tokenizer
from llamagym.rollout import collect
from llamagym.training.cloning import clone

IDS = torch.tensor([[1, 20, 30, 40, 50, 60]])
TARGETS = ["q_proj", "v_proj", "down_proj"]
BASE_INITS = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"]


def lora(**options) -> LoraConfig:
    return LoraConfig(**dict(r=4, target_modules=TARGETS, task_type="CAUSAL_LM") | options)


def adapted(config, name: str = "default", family: str = "smollm", base=None) -> PeftModel:
    "Return a peft model whose adapter changes what it computes"
    model = get_peft_model(
        base or tiny_model(family).eval(), copy.deepcopy(config), adapter_name=name
    )
    perturb([p for p in model.parameters() if p.requires_grad], 0.05)
    return model.eval()


@torch.no_grad()
def logprobs(model) -> torch.Tensor:
    "Compute with transformers' or peft's own forward"
    return model(IDS).logits.log_softmax(-1)


def logprobs_of_adapter(model: PeftModel, name: str) -> torch.Tensor:
    model.base_model.enable_adapter_layers()
    model.set_adapter(name)
    return logprobs(model)


@torch.no_grad()
def computed(policy: Policy) -> torch.Tensor:
    return policy.logits(policy.backbone(IDS)[0]).log_softmax(-1)[None]


def reference_of(policy: Policy) -> torch.Tensor:
    with torch.no_grad(), policy.as_reference():
        hidden = policy.backbone(IDS)[0]
    return policy.reference.logits(hidden).log_softmax(-1)[None]


def assert_close(a, b, tolerance=1e-4):
    assert (a - b).abs().max() < tolerance


def assert_apart(a, b):
    assert (a - b).abs().max() > 1e-2


def two_players(family="smollm", **black_options):
    "Return two policies on one peft model, and what peft says of each of their adapters"
    model = adapted(lora(), "white", family)
    white = Policy(model, tiny_tokenizer())
    model.add_adapter("black", lora(**black_options))
    model.set_adapter("black")
    perturb([p for p in model.parameters() if p.requires_grad], 0.05, seed=1)
    black = Policy(model.eval(), tiny_tokenizer())
    truth = {name: logprobs_of_adapter(model, name) for name in ("white", "black")}
    assert_apart(truth["white"], truth["black"])
    return white, black, truth


# Several policies on one model


@pytest.mark.parametrize(
    "black_options",
    [{}, dict(target_modules=["k_proj", "up_proj"]), dict(modules_to_save=["lm_head"], r=2)],
    ids=["alike", "other_modules", "own_head"],
)
def test_adapters_of_two_policies_compute_whatever_was_called_last(black_options):
    white, black, truth = two_players(**black_options)
    model = white.model
    base = logprobs(tiny_model("smollm").eval())
    rows, positions = torch.zeros(5, dtype=torch.long), torch.arange(1, 6)

    def disable():
        model.base_model.disable_adapter_layers()

    disturbances = [
        lambda: model.set_adapter("white"),
        lambda: model.set_adapter("black"),
        lambda: model.set_adapter("black", inference_mode=True),
        lambda: computed(white),
        lambda: computed(black),
        lambda: reference_of(white),
        lambda: reference_of(black),
        disable,
    ]
    for disturb in disturbances:
        for name, policy in (("white", white), ("black", black)):
            disturb()
            assert_close(computed(policy), truth[name], 1e-5)
            disturb()
            score = policy.score(IDS, rows, positions).logprobs
            assert_close(score, truth[name][0, range(5), IDS[0, 1:]], 1e-5)
            disturb()
            assert_close(reference_of(policy), base, 1e-5)


def test_adapters_of_two_policies_learn_alone():
    white, black, truth = two_players()
    own = {id(p) for p in white.parameters()}
    assert own and not own & {id(p) for p in black.parameters()}
    versions = white.version, black.version
    white.model.set_adapter("black")  # freezes white's weights
    loss = white.score(IDS, torch.zeros(5, dtype=torch.long), torch.arange(1, 6)).logprobs.sum()
    computed(black)
    black.parameters()
    loss.backward()
    assert all(p.grad is not None for p in white.parameters())
    assert sum(p.grad.abs().sum() for p in white.parameters()) > 0
    others = [p for p in white.model.parameters() if id(p) not in own]
    assert all(p.grad is None for p in others)
    assert (white.version, black.version) == versions
    expected = [p.grad.clone() for p in white.parameters()]

    white.model.zero_grad()
    white.model.set_adapter("white")  # the oracle: peft with this adapter alone
    log_dist = white.model(IDS).logits.log_softmax(-1)
    log_dist[0, range(5), IDS[0, 1:]].sum().backward()
    for a, p in zip(expected, white.parameters()):
        assert_close(a, p.grad, 1e-4)

    perturb(white.parameters(), seed=5)
    assert white.version != versions[0] and black.version == versions[1]
    assert_apart(computed(white), truth["white"])
    assert torch.equal(computed(black), truth["black"])


def test_adapters_of_two_policies_have_a_reference_each():
    white, black, truth = two_players()
    white.set_reference()
    perturb(white.parameters(), 0.05, seed=3)
    black.set_reference()
    perturb(black.parameters(), 0.05, seed=4)
    for _ in range(2):
        assert_close(reference_of(white), truth["white"], 1e-5)
        assert_close(reference_of(black), truth["black"], 1e-5)
    assert_apart(computed(white), truth["white"])
    with white.as_reference():
        assert_apart(computed(black), truth["black"])  # its own, trained weights
        assert_close(computed(white), truth["white"], 1e-5)
    white.reference.drop()
    assert_close(reference_of(white), logprobs(tiny_model("smollm").eval()), 1e-5)
    assert_close(reference_of(black), truth["black"], 1e-5)


def test_adapters_reference_version_changes_when_it_is_set():
    policy = Policy(adapted(lora()), tiny_tokenizer())
    with policy.as_reference():
        before = policy.version
    policy.set_reference()
    with policy.as_reference():
        assert policy.version != before


def test_adapters_of_a_policy_that_is_gone_are_reused():
    model = adapted(lora())
    for _ in range(3):
        policy = Policy(model, tiny_tokenizer())
        policy.set_reference()
        del policy
    assert list(model.peft_config) == ["default", "default_reference"]
    first, second = Policy(model, tiny_tokenizer()), Policy(model, tiny_tokenizer())
    first.set_reference()
    second.set_reference()
    assert first.reference.copy_name != second.reference.copy_name


def greedy_oracle(model: PeftModel, name: str, prompt: list[int], length: int) -> list[int]:
    model.set_adapter(name)
    ids = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # the fused decoder; the modules
def test_adapters_of_two_engines_sample_in_turns(family):
    white, black, _ = two_players(family)
    config = GenerateConfig(max_new_tokens=6)
    engines = [Engine(policy, (), config) for policy in (white, black)]
    prompts = [[1, 20, 30, 40], [1, 77, 30]]
    for seed in range(2):
        expected = [
            [greedy_oracle(white.model, name, prompt, 6) for prompt in prompts]
            for name in ("white", "black")
        ]
        requests = [
            [engine.submit(prompt, None, greedy=True) for prompt in prompts] for engine in engines
        ]
        while any(engine.busy for engine in engines):  # one step each
            for engine in engines:
                if engine.busy:
                    engine.step()
        sampled = [[request.sample.ids for request in group] for group in requests]
        assert [[list(ids) for ids in group] for group in sampled] == expected
        perturb(white.parameters(), 0.1, seed)


def test_adapters_of_two_agents_update_alone():
    white, black, truth = two_players("llama")
    config = Config.from_dict({"generate.max_new_tokens": 4, "ppo.epochs": 1})
    agent = Agent.for_task(lake(max_steps=4), white, config=config)
    before = [p.detach().clone() for p in white.parameters()]
    optimized = {id(p) for g in agent.learner.optimizer.param_groups for p in g["params"]}
    assert not optimized & {id(p) for p in black.parameters()}
    assert {id(p) for p in white.parameters()} <= optimized
    black.model.set_adapter("black")
    episodes = collect(agent, episodes=4, num_envs=4)
    assert agent.learner.update(episodes)["max_logprob_diff"] < 1e-4
    assert any(not torch.equal(a, b) for a, b in zip(before, white.parameters()))
    assert torch.equal(computed(black), truth["black"])
    assert_close(computed(white), logprobs_of_adapter(white.model, "white"), 1e-5)


@pytest.mark.slow
def test_adapters_of_two_agents_clone_alone():
    pytest.importorskip("trl")
    white, black, truth = two_players("llama")
    task = lake(max_steps=4)
    agent = Agent.for_task(task, white)
    black.model.set_adapter("black")
    transcripts = play(task, RandomAgent(task), 4)
    clone(agent, transcripts, WarmstartConfig(epochs=1), progress=False)
    assert_apart(computed(white), truth["white"])
    assert_close(reference_of(white), computed(white), 1e-5)
    assert torch.equal(computed(black), truth["black"])
    assert all(p.requires_grad for p in [*white.parameters(), *black.parameters()])


def test_adapters_switched_off_by_the_user_stay_off():
    policy = Policy(adapted(lora()), tiny_tokenizer())
    expected, version = computed(policy), policy.version
    with policy.model.disable_adapter():
        assert torch.equal(computed(policy), logprobs(tiny_model("smollm").eval()))
        assert policy.version != version
    assert torch.equal(computed(policy), expected) and policy.version == version


@pytest.mark.parametrize("kind", ["embeddings", "tokens", "saved_both", "dora", "norms", "ia3"])
def test_adapters_of_each_kind_sample_in_the_engine(kind):
    policy = Policy(adapted(SUPPORTED[kind]), tiny_tokenizer())
    prompts = [[1, 20, 30, 40], [1, 77, 30]]
    samples = Engine(policy, (), GenerateConfig(max_new_tokens=6)).sample(
        prompts, [None, None], greedy=True
    )
    for prompt, sample in zip(prompts, samples):
        assert list(sample.ids) == greedy_oracle(policy.model, "default", prompt, 6)


def test_adapters_of_two_policies_save_and_load_alone(tmp_path):
    white, black, truth = two_players()
    for policy in (white, black):
        policy.set_reference()
        perturb(policy.parameters(), 0.05, seed=3)
    expected = {p.adapter: computed(p) for p in (white, black)}
    for policy in (white, black):
        name = policy.adapter
        folder = policy.save(tmp_path / name)
        saved = {p.parent.name for p in folder.rglob("adapter_model.safetensors")}
        assert saved == {name, "reference"}
        loaded = Policy.load(folder)
        assert_close(computed(loaded), expected[name], 1e-5)
        assert_close(reference_of(loaded), truth[name], 1e-5)
        merged = policy.merge_and_save(tmp_path / "merged")
        assert_close(logprobs(AutoModelForCausalLM.from_pretrained(merged)), expected[name])
        perturb(policy.parameters(), 0.05, seed=6)
        policy.restore(folder)
        assert torch.equal(computed(policy), expected[name])
    assert torch.equal(computed(white), expected["white"])


# Adapters of the user's


@pytest.mark.parametrize("own", ["default", "reference", "default_reference"])
def test_adapters_named_reference_are_left_alone(own, tmp_path):
    model = adapted(lora(), own)
    for name in {"reference", "default_reference"} - {own}:
        model.add_adapter(name, lora(init_lora_weights=False))
    model.set_adapter(own)
    policy = Policy(model, tiny_tokenizer())
    users = {name: logprobs_of_adapter(model, name) for name in model.peft_config}
    assert_close(reference_of(policy), logprobs(tiny_model("smollm").eval()), 1e-5)
    policy.set_reference()
    perturb(policy.parameters(), 0.05, seed=2)
    assert_close(reference_of(policy), users[own], 1e-5)
    expected = computed(policy)
    loaded = Policy.load(policy.save(tmp_path / "p"))
    assert_close(computed(loaded), expected, 1e-5)
    assert_close(reference_of(loaded), users[own], 1e-5)
    assert set(loaded.model.peft_config) == {own, loaded.reference.copy_name}
    for name in set(users) - {own}:
        assert torch.equal(logprobs_of_adapter(model, name), users[name])


def test_adapters_deleted_by_the_user_raise():
    white, black, _ = two_players()
    white.model.delete_adapter("black")
    with pytest.raises(ValueError, match="'black' was deleted from the model; it has"):
        computed(black)
    computed(white)


# Kinds of adapters

SUPPORTED = {
    "lora": lora(),
    "rslora": lora(use_rslora=True, lora_alpha=16),
    "dora": lora(use_dora=True),
    "dropout": lora(lora_dropout=0.5),
    "patterns": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}),
    "some_layers": lora(layers_to_transform=[1]),
    "regex": lora(target_modules=r".*\.1\..*q_proj"),
    "gaussian": lora(init_lora_weights="gaussian"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "mica": lora(init_lora_weights="mica"),
    "eva": lora(init_lora_weights="eva", eva_config=peft.EvaConfig()),
    "head": lora(target_modules=["q_proj", "lm_head"]),
    "embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "both": lora(target_modules=["embed_tokens", "lm_head"]),
    "saved_head": lora(modules_to_save=["lm_head"]),
    "saved_embeddings": lora(modules_to_save=["embed_tokens"]),
    "saved_both": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "saved_tied": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "saved_norm": lora(modules_to_save=["norm"]),
    "tokens": lora(trainable_token_indices=[20, 30, 99]),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": peft.LoHaConfig(r=4, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=4, target_modules=TARGETS),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "hra": peft.HRAConfig(r=4, target_modules=TARGETS),
    "fourier": peft.FourierFTConfig(n_frequency=10, target_modules=TARGETS),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}
QUICK = ["dora", "mica", "both", "saved_both", "saved_tied", "tokens", "ia3", "lokr", "norms"]


def check_life(
    model: PeftModel, base: torch.Tensor, tmp_path, tolerance=1e-4, twice=False
) -> Policy:
    "Compare a policy with its peft model: forward, gradients, reference, files, merging"
    expected = logprobs(model)
    policy = Policy(model, tiny_tokenizer())
    assert_apart(expected, base)
    assert_close(computed(policy), expected, 1e-5)
    assert_close(reference_of(policy), base, 1e-4)

    policy.score(
        IDS, torch.zeros(5, dtype=torch.long), torch.arange(1, 6)
    ).logprobs.sum().backward()
    trained = {id(p) for p in policy.parameters()}
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
    assert with_gradient <= trained and with_gradient
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    model.zero_grad()

    policy.set_reference()
    perturb(policy.parameters(), 0.05, seed=2)
    trained = computed(policy)
    assert_apart(trained, expected)
    assert_close(trained, logprobs(model), 1e-5)
    assert_close(reference_of(policy), expected, 1e-4)
    loaded = Policy.load(policy.save(tmp_path / "policy"))
    assert_close(computed(loaded), trained, tolerance)
    assert_close(logprobs(loaded.model), trained, tolerance)
    assert_close(reference_of(loaded), expected, tolerance)
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in policy.parameters()]
    perturb(loaded.parameters(), 0.05, seed=3)
    loaded.restore(tmp_path / "policy")
    assert_close(computed(loaded), trained, tolerance)
    shutil.rmtree(tmp_path / "policy")
    if twice:  # what was loaded from a folder that is gone can be saved again
        again = Policy.load(loaded.save(tmp_path / "again"))
        assert_close(computed(again), trained, tolerance)
        shutil.rmtree(tmp_path / "again")
    merged = AutoModelForCausalLM.from_pretrained(policy.merge_and_save(tmp_path / "merged"))
    assert_close(logprobs(merged), trained, tolerance)
    assert torch.equal(computed(policy), trained)
    shutil.rmtree(tmp_path / "merged")
    return policy


@pytest.mark.parametrize("kind", some(SUPPORTED, QUICK))
def test_adapters_of_each_kind_compute_save_load_and_merge(kind, tmp_path):
    base = logprobs(tiny_model("smollm").eval())
    check_life(adapted(SUPPORTED[kind], "white"), base, tmp_path)


@pytest.mark.parametrize(
    "kind", some(["tokens", "head", "embeddings", "lora", "saved_both"], ["tokens"])
)
def test_adapters_on_untied_embeddings(kind, tmp_path):
    base = logprobs(tiny_model("llama").eval())
    check_life(adapted(SUPPORTED[kind], family="llama"), base, tmp_path)


def test_adapters_with_lora_bias(tmp_path):
    config = lora(target_modules=["q_proj"], lora_bias=True)
    check_life(adapted(config, family="llama"), logprobs(tiny_model("llama").eval()), tmp_path)
    with pytest.raises(ValueError, match="q_proj has no bias.*use lora_bias=False"):
        Policy(adapted(config), tiny_tokenizer())


def test_adapters_on_expert_weights(tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_local_experts=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2)
    base = MixtralForCausalLM(MixtralConfig(vocab_size=len(tiny_tokenizer()), **sizes, **heads))
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(lora(target_modules=["q_proj"], target_parameters=experts), base=base.eval())
    expected = logprobs(model)
    policy = Policy(model, tiny_tokenizer())
    policy.set_reference()
    perturb(policy.parameters(), 0.05, seed=2)
    trained = logprobs(policy.active_model)
    assert_apart(trained, expected)
    loaded = Policy.load(policy.save(tmp_path / "policy"))
    assert_close(logprobs(loaded.active_model), trained)
    with loaded.as_reference():
        assert_close(logprobs(loaded.active_model), expected)
    merged = AutoModelForCausalLM.from_pretrained(policy.merge_and_save(tmp_path / "merged"))
    assert_close(logprobs(merged), trained)


# Changed bases


@pytest.mark.parametrize("init", BASE_INITS)
@pytest.mark.parametrize("given_whole", some([True, False], [True]))
def test_adapters_that_change_the_base(init, given_whole, tmp_path):
    base = tiny_model("smollm").eval()
    original = logprobs(base)
    config = lora(init_lora_weights=init)
    if init == "corda":
        config.corda_config = CordaConfig(corda_method="kpm")
        preprocess_corda(base, config, run_model=lambda: base(IDS))
    if init == "lora_ga":
        config.lora_ga_config = peft.LoraGAConfig()
        preprocess_loraga(base, config, lambda: base(IDS, labels=IDS).loss.backward())
        base.zero_grad()
    if given_whole or init in ("corda", "lora_ga"):
        policy = Policy(get_peft_model(base, config), tiny_tokenizer())
    else:
        policy = Policy.load("tiny:smollm", lora=config, device="cpu")
    start = computed(policy)
    assert_close(start, original)
    assert_close(reference_of(policy), start, 1e-5)  # not the base without what was taken from it
    perturb(policy.parameters(), 0.05)
    trained = computed(policy)
    assert_apart(trained, start)
    loaded = Policy.load(policy.save(tmp_path / "policy"))
    assert_close(computed(loaded), trained)
    assert_close(reference_of(loaded), start)
    merged = AutoModelForCausalLM.from_pretrained(loaded.merge_and_save(tmp_path / "merged"))
    assert_close(logprobs(merged), trained)
    again = Policy.load(loaded.save(tmp_path / "policy"))  # over what it was loaded from
    assert_close(computed(again), trained)
    again.restore(tmp_path / "policy")
    assert_close(reference_of(again), start)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("smollm").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def resize(model):
    tokenizer = tiny_tokenizer(special_tokens=("<extra>", "<pad2>"))
    model.resize_token_embeddings(len(tokenizer))
    return model


def merge_other(model):
    return adapted(lora(r=1, target_modules=["v_proj"]), base=model).merge_and_unload()


def edit_row(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[33] += 0.5
    return model


def drop_layer(model):
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def other_rope(model):
    model.config.rms_norm_eps = 1e-2
    return AutoModelForCausalLM.from_pretrained(
        model.name_or_path, config=model.config, dtype=torch.float32
    )


@pytest.mark.parametrize("change", [resize, merge_other, edit_row, drop_layer, other_rope])
@pytest.mark.parametrize("kind", some(["lora", "saved_embeddings", "tokens", "head"], ["lora"]))
def test_adapters_on_a_changed_base(change, kind, checkpoint, tmp_path, caplog):
    model = change(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval())
    base = logprobs(model.eval())
    policy = check_life(adapted(SUPPORTED[kind], base=model), base, tmp_path, twice=True)
    assert policy.base is None
    assert "Policy.save writes the base model in full" in caplog.text


@pytest.mark.parametrize("kind", some(["lora", "tokens", "saved_both", "embeddings"], ["lora"]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_on_an_unchanged_base_save_its_name(kind, dtype, checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    policy = Policy(adapted(SUPPORTED[kind], base=model), tiny_tokenizer())
    assert policy.base == dict(name=str(checkpoint), dtype=str(dtype).removeprefix("torch."))
    folder = policy.save(tmp_path / "policy")
    assert not (folder / "base").exists()
    assert_close(computed(Policy.load(folder, device="cpu")), computed(policy), 1e-4)


def test_adapters_base_without_files_is_saved(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "gone")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gone", dtype=torch.float32)
    assert matches_checkpoint(model)
    shutil.rmtree(tmp_path / "gone")
    policy = Policy(adapted(lora(), base=model.eval()), tiny_tokenizer())
    loaded = Policy.load(policy.save(tmp_path / "policy"))
    assert_close(computed(loaded), computed(policy), 1e-5)


# 4 bits


@pytest.mark.parametrize("kind", some(["lora", "dora", "tokens", "saved_head", "ia3"], ["lora"]))
def test_adapters_on_4_bit_weights(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = Policy.load("tiny:smollm", quantize="nf4", lora=LoRAConfig(r=1), device="cpu")
    expected = computed(base)
    model = adapted(SUPPORTED[kind], base=base.model.unload())
    policy = Policy(model, tiny_tokenizer(), base=base.base)
    assert_close(computed(policy), logprobs(model), 1e-5)
    assert_close(reference_of(policy), expected, 1e-4)
    policy.set_reference()
    reference = computed(policy)
    perturb(policy.parameters(), 0.05, seed=2)
    trained = computed(policy)
    for base_args in (base.base, None):  # by name, and saved in 4 bits
        policy.base = base_args
        loaded = Policy.load(policy.save(tmp_path / "policy"), device="cpu")
        assert_close(computed(loaded), trained, 1e-4)
        assert_close(reference_of(loaded), reference, 1e-4)
    merged = AutoModelForCausalLM.from_pretrained(policy.merge_and_save(tmp_path / "merged"))
    assert_close(logprobs(merged), trained, 1e-3)


# Refused

REFUSED = {
    "prompt tuning": (
        lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        "kind PROMPT_TUNING, which changes the input.*use peft.LoraConfig",
    ),
    "prefix tuning": (
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        "kind PREFIX_TUNING, which changes the input.*use peft.LoraConfig",
    ),
    "p-tuning": (
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        "kind P_TUNING, which changes the input",
    ),
    "adaption prompt": (
        lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
        "kind ADAPTION_PROMPT, which changes the input",
    ),
    "adalora": (
        lambda: peft.AdaLoraConfig(r=4, target_modules=TARGETS, total_step=10),
        "kind ADALORA, which needs update_and_allocate.*LoraConfig with a fixed rank",
    ),
    "untested": (
        lambda: peft.MissConfig(r=4, target_modules=TARGETS),
        "kind MISS; expected one of LORA, IA3",
    ),
    "bias all": (lambda: lora(bias="all"), "bias='all', which trains biases.*use bias='none'"),
    "bias lora_only": (lambda: lora(bias="lora_only"), "bias='lora_only', which trains"),
    "bias boft_only": (
        lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS, bias="boft_only"),
        "bias='boft_only', which trains",
    ),
    "loftq": (
        lambda: lora(),
        "rounds the base in memory.*replace_lora_weights_loftq",
    ),
    "tied targets": (
        lambda: lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
        "leave ensure_weight_tying out",
    ),
    "layer replication": (
        lambda: lora(layer_replication=[(0, 2), (0, 2)]),
        "has layer_replication.*save the deeper base model first",
    ),
    "activated": (
        lambda: lora(alora_invocation_tokens=[20, 30]),
        r"LoraConfig\(alora_invocation_tokens=\[20, 30\]\) is not supported.*leave",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_refused_with_what_to_do(kind):
    config, message = REFUSED[kind]
    model = get_peft_model(tiny_model("smollm"), config())
    if kind == "loftq":  # making one needs scipy
        model.peft_config["default"].init_lora_weights = "loftq"
    with pytest.raises(ValueError, match=message):
        Policy(model, tiny_tokenizer())


@pytest.mark.parametrize("name", ["mlp", "weight", "lora_A", "lora_B", "model", "0", "base_layer"])
def test_adapters_named_like_modules_are_refused(name):
    with pytest.raises(ValueError, match=f"is named '{name}'.*choose another name"):
        Policy(get_peft_model(tiny_model("smollm"), lora(), adapter_name=name), tiny_tokenizer())
    white, black, _ = two_players()
    white.model.add_adapter(name, lora())
    with pytest.raises(ValueError, match=f"is named '{name}'.*choose another name"):
        white.save("never written")


@pytest.mark.parametrize(
    "name", some(["lora_white", "lora_", "ml", "proj", "policy-1", "q_proj2"], ["lora_", "ml"])
)
def test_adapters_named_almost_like_modules(name, tmp_path):
    base = logprobs(tiny_model("smollm").eval())
    check_life(adapted(lora(), name), base, tmp_path)


def test_adapters_in_states_that_a_policy_cannot_take_are_refused():
    model = adapted(lora(), "white")
    model.add_adapter("black", lora())
    model.base_model.set_adapter(["white", "black"])
    with pytest.raises(ValueError, match=r"\['white', 'black'\] are active.*set_adapter\(name\)"):
        Policy(model, tiny_tokenizer())
    model.set_adapter("white")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['white'\] are merged.*unmerge_adapter\(\)"):
        Policy(model, tiny_tokenizer())
    model.unmerge_adapter()
    Policy(model, tiny_tokenizer())
    with pytest.raises(ValueError, match="contains adapters but is not a peft.PeftModel"):
        Policy(model.get_base_model(), tiny_tokenizer())
    plain = tiny_model("smollm")
    plain.add_adapter(lora())
    with pytest.raises(ValueError, match="contains adapters but is not a peft.PeftModel"):
        Policy(plain, tiny_tokenizer())


def test_adapters_restored_from_another_rank_raise(tmp_path):
    folder = Policy(adapted(lora(r=4)), tiny_tokenizer()).save(tmp_path / "p")
    for other in (lora(r=2), lora(r=4, target_modules=["q_proj"]), lora(use_dora=True)):
        policy = Policy(adapted(other), tiny_tokenizer())
        before = computed(policy)
        with pytest.raises(ValueError, match="does not fit adapter 'default'.*saved adapter's"):
            policy.restore(folder)
        assert torch.equal(computed(policy), before)


# Files of earlier versions


def save_as_before(policy: Policy, model: PeftModel, folder, base, has_reference: bool) -> None:
    "Write what version 0.3 wrote: peft's own folders, the reference under its name"
    names = [policy.adapter, "reference"] if has_reference else [policy.adapter]
    policy.save(folder)
    shutil.rmtree(folder / "adapters")
    shutil.rmtree(folder / "base", ignore_errors=True)
    model.save_pretrained(folder / "adapters", selected_adapters=names)
    metadata = json.loads((folder / "policy.json").read_text())
    metadata |= dict(base=base, has_reference=has_reference)
    (folder / "policy.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize("kind", some(["lora", "embeddings", "tokens", "saved_head"], ["tokens"]))
@pytest.mark.parametrize("name", ["default", "white"])
def test_adapters_saved_by_earlier_versions_load(kind, name, checkpoint, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model = adapted(SUPPORTED[kind], name, base=base)
    policy = Policy(model, tiny_tokenizer())
    model.add_adapter("reference", copy.deepcopy(SUPPORTED[kind]))
    model.set_adapter("reference")
    perturb([p for p in model.parameters() if p.requires_grad], 0.05, seed=7)
    truth = {n: logprobs_of_adapter(model, n) for n in (name, "reference")}
    source = dict(name=str(checkpoint), dtype="float32")
    save_as_before(policy, model, tmp_path / "p", source, has_reference=True)
    loaded = Policy.load(tmp_path / "p")
    assert_close(computed(loaded), truth[name], 1e-5)
    assert_close(reference_of(loaded), truth["reference"], 1e-5)
    policy.restore(tmp_path / "p")
    assert_close(reference_of(policy), truth["reference"], 1e-5)


def test_adapters_on_a_resized_base_saved_by_earlier_versions_load(checkpoint, tmp_path):
    base = resize(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval())
    model = adapted(lora(), base=base)
    policy = Policy(model, tiny_tokenizer())
    source = dict(name=str(checkpoint), dtype="float32")
    save_as_before(policy, model, tmp_path / "p", source, has_reference=False)
    loaded = Policy.load(tmp_path / "p")
    assert_close(computed(loaded), computed(policy), 1e-5)
    again = Policy.load(loaded.save(tmp_path / "again"))
    assert_close(computed(again), computed(policy), 1e-5)


def test_adapters_of_add_lora_with_a_reference_survive_a_copy():
    "Agents and tests copy policies: the copy shares nothing with the original"
    policy = Policy(add_lora(tiny_model("smollm"), lora()), tiny_tokenizer())
    policy.set_reference()
    perturb(policy.parameters(), 0.05)
    expected = computed(policy)
    other = copy.deepcopy(policy, {id(policy.tokenizer): policy.tokenizer})
    perturb(other.parameters(), 0.05, seed=1)
    other.set_reference()
    assert torch.equal(computed(policy), expected)
    assert_close(reference_of(policy), logprobs(tiny_model("smollm").eval()), 1e-5)
    assert_close(reference_of(other), computed(other), 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mixtral"])
def test_adapters_base_is_compared_under_the_names_of_its_files(family, tmp_path):
    "GPT-2 files leave out a prefix, GPT-NeoX names its head otherwise, Mixtral splits experts"
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    if family != "gpt2":
        sizes |= dict(intermediate_size=32)
    if family == "mixtral":
        sizes |= dict(num_key_value_heads=2, num_local_experts=2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=99, **sizes))
    model.save_pretrained(tmp_path)
    if family == "gpt2":
        file = tmp_path / "model.safetensors"
        weights = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for parameter in model.parameters():
        assert matches_checkpoint(model)
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.1)
        assert not matches_checkpoint(model)
        with torch.no_grad():
            parameter.copy_(before)


@pytest.mark.parametrize("frozen", [slice(1), slice(None)], ids=["one", "all"])
def test_adapters_leave_weights_frozen_that_the_user_froze(frozen):
    policy = Policy(adapted(lora()), tiny_tokenizer())
    policy.set_reference()
    all_weights = policy.parameters()
    for weight in all_weights[frozen]:
        weight.requires_grad_(False)
    kept = all_weights[frozen.stop :] if frozen.stop else []
    computed(policy)
    reference_of(policy)
    assert [id(p) for p in policy.parameters()] == [id(p) for p in kept]


def test_adapters_frozen_by_another_keep_what_the_user_froze():
    white, black, _ = two_players()
    first, *others = white.parameters()
    first.requires_grad_(False)
    assert [id(p) for p in white.parameters()] == [id(p) for p in others]
    white.model.set_adapter("black")  # freezes all of white's
    assert [id(p) for p in white.parameters()] == [id(p) for p in others]
