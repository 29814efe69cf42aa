"""Dropout and projection in one function: the same numbers as the plain composition, less kept. Bits and bytes: chapter 06."""

import pytest
import torch
from helpers import adapted, tiny_llama, tokens

from d2mora.lean import draw_mask, dropout_project
from d2mora.lora import project_down
from d2mora.tuner import update

modes = pytest.mark.parametrize("mode", ["shared", "independent"])


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.99])
def test_a_mask_drops_at_its_rate(p):
    for count in (0, 1, 7, 8, 9, 1001):
        mask = draw_mask(count, p)
        assert mask.dtype == torch.bool and len(mask) == -(-count // 8) * 8
    kept = draw_mask(400_000, p).view(-1, 8).float()
    error = 5 * (p * (1 - p) / len(kept)) ** 0.5 + 1 / 65536
    assert (1 - kept.mean(0) - p).abs().max() < error  # at each place of a byte
    noise = 1e-3 * torch.randn_like(kept.T)
    assert (torch.corrcoef(kept.T + noise) - torch.eye(8)).abs().max() < 0.03  # and independently


def composed(x, A, p):
    "The plain composition, with the mask that the fused function draws."
    keep = draw_mask(x.numel(), p)[: x.numel()].view(x.shape)
    return project_down(x * keep / (1 - round(p * 65536) / 65536), A)


@pytest.mark.parametrize("shape", [(6, 16), (2, 5, 16), (16,), (0, 16)])
@pytest.mark.parametrize("noncontiguous", [False, True])
def test_equal_to_the_composition(shape, noncontiguous):
    A, x, results = torch.randn(3, 4, 16, requires_grad=True), torch.randn(shape), []
    x = (torch.stack([x, x], -1)[..., 0] if noncontiguous else x).requires_grad_()
    for function in (composed, dropout_project):
        torch.manual_seed(9)
        y = function(x, A, 0.3)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
        results.append((y, *torch.autograd.grad((y * weights).sum(), (x, A))))
    torch.testing.assert_close(*results)


def test_expected_value_rate_and_masks():
    x, A = torch.ones(4000, 32), torch.eye(32).repeat(2, 1, 1)
    shared, independent = dropout_project(x, A, 0.25), dropout_project(x, A, 0.25, independent=True)
    for y in (shared, independent):
        assert y.mean().item() == pytest.approx(1, abs=0.02)
        assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(shared[:, 0], shared[:, 1]) and not torch.equal(independent[:, 0], independent[:, 1])


def kept_tensors(function):
    "What autograd keeps for backward, and the result."
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = function()
    return kept, result


@pytest.mark.parametrize("autocast, copies", [(True, 0), (False, 1)])
def test_half_precision_inputs_are_not_copied_for_float32_experts(autocast, copies):
    "Of each layer's input only the router's weight gradient needs a float32 copy, and none under autocast."
    model = adapted(tiny_llama(torch.bfloat16), lora_dropout=0.1, r=4).train()
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        kept, _ = kept_tensors(lambda: update(layer, "default", x))
    assert sum(t.dtype == torch.float32 and t.numel() == x.numel() and t.shape[-1] == 64 for t in kept) == copies
    assert any(t.data_ptr() == x.data_ptr() for t in kept)  # x itself is what is kept


@modes
def test_dropout_in_the_model(mode):
    "On in training, off in eval, the same under the same seed."
    model, ids = adapted(lora_dropout=0.5, expert_dropout=mode), tokens()
    exact = model(ids).logits
    assert torch.equal(model(ids).logits, exact)
    model.train()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model(ids).logits)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], exact)


@modes
def test_gradients_by_sample(mode):
    "torch.func maps a gradient over rows; `randomness` says whether they share a mask, and must be given, as with LoRA."
    layer = adapted(lora_dropout=0.5, expert_dropout=mode).train().base_model.model.model.layers[0].self_attn.q_proj
    rows, own = torch.randn(1, 5, 64).expand(3, 5, 64), {n: p.detach() for n, p in layer.named_parameters()}

    def spread(randomness):
        grad = torch.func.grad(lambda own, x: torch.func.functional_call(layer, own, (x,)).square().sum())
        by_row = torch.func.vmap(grad, in_dims=(None, 0), randomness=randomness)(own, rows)
        return max((g[0] - g[1]).abs().max().item() for g in by_row.values())

    assert spread("same") == 0 < spread("different")
    with pytest.raises(RuntimeError, match="randomness"):
        spread("error")
