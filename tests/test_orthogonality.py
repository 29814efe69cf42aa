"""The orthogonality loss: how it is attached, and the warning when nobody applies it. Its values: chapter 05. Who trains: test_trainers."""

import pickle
import warnings

import pytest
import torch
from helpers import adapted, tokens
from torch import nn

import d2mora
from d2mora.orthogonality import add_orthogonality_gradient, orthogonality_loss, similarity

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def norm(model):
    return sum(p.grad.norm() for p in trained(model) if p.grad is not None)


def test_values_and_gradient():
    "Pairs add up; the gradient is right wherever the loss is smooth, and finite where experts are zero, equal or opposite."
    W = torch.randn(5, 3, 7, dtype=torch.float64, requires_grad=True)
    cosine = torch.nn.functional.cosine_similarity
    pairs = sum(cosine(W[i].flatten(), W[j].flatten(), dim=0).abs() for i in range(5) for j in range(i))
    torch.testing.assert_close(similarity(W), pairs, rtol=1e-4, atol=1e-5)
    assert torch.autograd.gradcheck(similarity, W)
    one = torch.ones(2, 5)
    for experts in (torch.zeros(4, 2, 5), one.expand(3, 2, 5), torch.stack([one, -one, 0 * one])):
        experts = experts.clone().requires_grad_()
        similarity(experts).backward()
        assert experts.grad.isfinite().all()
    assert orthogonality_loss(adapted(num_down_experts=1, num_up_experts=1)) == 0


def test_hook_equals_a_term_in_the_loss():
    "Without accumulation and clipping, attaching is the same as adding λ · loss."
    model = adapted(orthogonality_weight=0.3)
    (model(tokens(), labels=tokens()).loss + 0.3 * orthogonality_loss(model)).backward()
    expected = [p.grad for p in trained(model)]
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    d2mora.attach_orthogonality(model, optimizer)
    optimizer.step()
    torch.testing.assert_close([p.grad for p in trained(model)], expected)


def test_attached_twice_counts_once_and_detaches():
    model = adapted(orthogonality_weight=1.0)
    optimizer, norms = torch.optim.SGD(trained(model), lr=0.0), []
    for _ in range(2):
        handle = d2mora.attach_orthogonality(model, optimizer)
        model.zero_grad()
        optimizer.step()
        norms.append(norm(model).item())
    assert norms[0] == norms[1] > 0
    handle.remove()
    model.zero_grad()
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


def test_only_trained_experts_are_moved_and_a_fused_scaler_is_followed():
    model = adapted(orthogonality_weight=1.0)
    for name, p in model.named_parameters():
        p.requires_grad_("d2mora_B" in name)
    optimizer, norms = torch.optim.SGD(model.parameters(), lr=0.0), []
    for scale in (1.0, 8.0):  # a fused step divides by the scaler's factor
        optimizer.grad_scale = torch.tensor(scale)
        model.zero_grad()
        add_orthogonality_gradient(model, optimizer)
        assert {"d2mora_B" in name for name, p in model.named_parameters() if p.grad is not None} == {True}
        norms.append(norm(model))
    torch.testing.assert_close(norms[1], 8 * norms[0])


def test_wrong_model_or_optimizer_is_refused():
    with pytest.raises(ValueError, match="adapt it with a D2MoraConfig"):
        orthogonality_loss(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="holds none of the model's experts"):
        d2mora.attach_orthogonality(adapted(), torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0))


@pytest.mark.parametrize("how, count", [
    ({}, 1), (dict(steps=1), 0), (dict(weight=0.0), 0), (dict(use="attach"), 0), (dict(use="loss"), 0), (dict(train=False), 0),
])  # fmt: skip
def test_a_weight_that_nobody_applies_warns_once(how, count):
    "One step has moved nothing yet."
    weight, use, steps, train = ({"weight": 1e-4, "use": None, "steps": 4, "train": True} | how).values()
    model = adapted(orthogonality_weight=weight).train(train)
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if use == "attach":
            d2mora.attach_orthogonality(model, optimizer)
        for _ in range(steps):
            loss = model(tokens(), labels=tokens()).loss
            (loss + (1e-4 * orthogonality_loss(model) if use == "loss" else 0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        pickle.dumps(model)
    assert sum("not applied" in str(w.message) for w in caught) == count


def test_inference_mode_is_no_training():
    "Inference tensors count no changes."
    model = adapted().train()
    with torch.inference_mode():
        assert model(tokens()).logits.isfinite().all()
        born = adapted().train()
    born(tokens(), labels=tokens())
