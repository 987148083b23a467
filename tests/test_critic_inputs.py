"The critic's standardized inputs: predictions are kept, regressions are well conditioned, old files load"

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamagym import Agent, Policy, RandomAgent, blackjack, clone, play
from llamagym.models.value_head import ValueHead


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def learned_head(width: int) -> ValueHead:
    "Return a head whose predictions depend on its inputs"
    head = ValueHead(6, width)
    head.out.weight.data = drawn(head.out.weight.shape, 1)
    head.out.bias.data = drawn((1,), 2)
    return head


@pytest.mark.parametrize("width", [0, 8])
def test_standardized_inputs_keep_all_predictions(width):
    head, probe = learned_head(width), drawn((5, 6), 3)
    before = head(probe).detach()
    for seed in range(4):
        head.standardize_inputs((seed + 1) * drawn((20, 6), seed) + 3 * seed)
        torch.testing.assert_close(head(probe).detach(), before, rtol=1e-4, atol=1e-4)
    assert head.input_mean.abs().max() > 0.5 and (head.input_std - 1).abs().max() > 0.2


def test_standardized_inputs_have_mean_0_and_deviation_1():
    head, hidden = ValueHead(6, 8), 100 + drawn((50, 6), 0) * torch.tensor([9, 3, 1, 5, 2, 7])
    first_layer = head.inner[0].weight.detach().clone()
    head.standardize_inputs(hidden)
    inputs = (hidden - head.input_mean) / head.input_std
    torch.testing.assert_close(inputs.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    std = inputs.std(0, unbiased=False)
    assert (std[[0, 1, 3, 4, 5]] > 0.95).all() and (std < 1.001).all()
    assert torch.equal(head.inner[0].weight, first_layer)  # nothing was learned that must be kept


@pytest.mark.parametrize("hidden", [drawn((1, 6), 0), drawn((1, 6), 0).expand(9, 6)])
def test_equal_inputs_change_nothing(hidden):
    head = learned_head(8)
    before = copy.deepcopy(head.state_dict())
    head.standardize_inputs(hidden)
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())


def test_constant_dimensions_stay_small():
    head, hidden = ValueHead(3), torch.tensor([[5.0, 0.0, 1.0], [5.0, 2.0, 1.001]])
    head.standardize_inputs(hidden)
    inputs = (hidden - head.input_mean) / head.input_std
    assert inputs[:, 0].abs().max() == 0 and inputs[:, 2].abs().max() < 0.02


def test_regression_on_alike_inputs_needs_fewer_steps():
    "Least squares by gradient descent, beside the exact solution"
    hidden = 8 + 0.1 * drawn((64, 6), 0)
    targets = hidden @ drawn((6,), 1)
    targets = (targets - targets.mean()) / targets.std()
    errors = []
    for standardizes in (False, True):
        head = ValueHead(6)
        if standardizes:
            head.standardize_inputs(hidden)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (head(hidden) - targets).square().mean()
            loss.backward()
            optimizer.step()
        errors.append(loss.item())
    assert errors[1] < 0.05 < 0.5 < errors[0]  # the exact solution's is 0


def test_a_detached_critic_leaves_the_warm_start_of_the_policy_alone():
    weights = []
    transcripts = list(play(blackjack(), RandomAgent(blackjack()), 16))
    for coef in (0.0, 1.0):
        agent = Agent.for_task(blackjack(), Policy.load("tiny", seed=0))
        agent.config.warmstart.critic_coef = coef
        agent.config.warmstart.epochs = 1
        clone(agent, transcripts, progress=False)
        weights.append([p.detach().clone() for p in agent.policy.parameters()])
        head = agent.policy.value_head
        assert head.standardized and head.has_learned == bool(coef)
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_value_head_of_an_older_version_loads_without_standardized_inputs(tmp_path):
    policy = Policy.load("tiny", seed=0)
    policy.value_head.out.weight.data.fill_(0.1)
    policy.save(tmp_path)
    file = tmp_path / "value_head.safetensors"
    state = load_file(file)
    for name in ("input_mean", "input_std", "standardized"):
        del state[name]
    save_file(state, file)
    hidden = drawn((4, policy.hidden_size), 0)
    torch.testing.assert_close(
        Policy.load(tmp_path).value_head(hidden), policy.value_head(hidden), rtol=0, atol=0
    )
