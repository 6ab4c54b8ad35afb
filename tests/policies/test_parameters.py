"""Snapshots of weights: entering, leaving, following, and an exact state."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tiltflow.policies.parameters import PolicyWeights


def linear():
    module = nn.Linear(2, 1, bias=False)
    nn.init.ones_(module.weight)
    return module


def test_a_snapshot_is_used_inside_and_theta_outside():
    module = linear()
    weights = PolicyWeights(dict(module.named_parameters()))
    with torch.no_grad():
        module.weight.fill_(5.0)
        parameter = module.weight
        with weights.using("old"):
            assert module(torch.ones(1, 2)).item() == 2.0
            assert module.weight is parameter
    assert module(torch.ones(1, 2)).item() == 10.0


def test_theta_comes_back_after_an_exception():
    module = linear()
    weights = PolicyWeights(dict(module.named_parameters()))
    with torch.no_grad():
        module.weight.fill_(5.0)
    with pytest.raises(KeyError), torch.no_grad(), weights.using("ref"):
        raise KeyError
    assert module.weight[0, 0].item() == 5.0


def test_a_snapshot_with_gradients_is_refused():
    weights = PolicyWeights(dict(linear().named_parameters()))
    with pytest.raises(RuntimeError, match="no_grad"), weights.using("old"):
        pass


def test_follow_moves_by_one_minus_decay_and_leaves_the_others_alone():
    module = linear()
    weights = PolicyWeights(dict(module.named_parameters()))
    with torch.no_grad():
        module.weight.fill_(5.0)
    weights.follow("old", decay=0.75)
    state = weights.state()
    assert state["old.weight"].tolist() == [[2.0, 2.0]]
    assert state["ema.weight"].tolist() == [[1.0, 1.0]]
    with torch.no_grad(), weights.using("ref"):
        assert module.weight.tolist() == [[1.0, 1.0]]


def test_state_round_trip_is_exact_and_a_foreign_state_is_refused():
    first, second = linear(), linear()
    weights = PolicyWeights(dict(first.named_parameters()))
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[0.1, 0.2]]))
    weights.follow("ema", decay=0.9)
    other = PolicyWeights(dict(second.named_parameters()))
    other.load_state(weights.state())
    assert all(torch.equal(value, weights.state()[name]) for name, value in other.state().items())
    with pytest.raises(KeyError, match=r"theta\.weight"):
        other.load_state({})


def test_a_reference_context_replaces_the_copy():
    module = linear()
    entered = []

    @contextmanager
    def reference():
        entered.append("in")
        yield
        entered.append("out")

    weights = PolicyWeights(dict(module.named_parameters()), reference=reference)
    with torch.no_grad(), weights.using("ref"):
        assert entered == ["in"]
    assert entered == ["in", "out"]


def test_a_state_with_surplus_parameters_is_refused_and_nothing_is_loaded():
    small, large = nn.Linear(2, 1, bias=False), nn.Linear(2, 1)
    weights = PolicyWeights(dict(small.named_parameters()))
    before = small.weight.clone()
    with pytest.raises(ValueError, match=r"bias is in the state and not in the model"):
        weights.load_state(PolicyWeights(dict(large.named_parameters())).state())
    assert torch.equal(small.weight, before)
