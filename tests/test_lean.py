"""Dropout and projection in one function: the same numbers as the plain composition, less kept."""

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers import adapted, tiny_llama, tokens
from torch import nn

from d2mora.lean import DropoutProject, draw_mask, dropout_project, pack_bits, unpack_bits
from d2mora.lora import project_down
from d2mora.tuner import update


@pytest.mark.parametrize("count", [0, 8, 16, 104])
def test_bits_come_back(count):
    mask = torch.rand(count) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.numel() == count // 8
    assert torch.equal(unpack_bits(packed), mask)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1001])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.99])
def test_a_mask_drops_at_its_rate(count, p):
    mask = draw_mask(count, p)
    assert mask.dtype == torch.bool and len(mask) == -(-count // 8) * 8
    kept = draw_mask(400_000, p).view(-1, 8).float()
    assert (1 - kept.mean(0) - p).abs().max() < 5 * (p * (1 - p) / len(kept)) ** 0.5 + 1 / 65536  # at each place of a byte
    assert (torch.corrcoef(kept.T + 1e-3 * torch.randn_like(kept.T)) - torch.eye(8)).abs().max() < 0.03  # and independently


def composed(x, A, p, seed):
    "The plain composition, with the mask that the fused function draws."
    torch.manual_seed(seed)
    keep = draw_mask(x.numel(), p)[: x.numel()].view(x.shape)
    return project_down(x * keep / (1 - round(p * 65536) / 65536), A)


@pytest.mark.parametrize("shape", [(6, 16), (2, 5, 16), (16,), (0, 16)])
@pytest.mark.parametrize("noncontiguous", [False, True])
def test_equal_to_the_composition(shape, noncontiguous):
    A = torch.randn(3, 4, 16, requires_grad=True)
    x = torch.randn(shape)
    x = (torch.stack([x, x], -1)[..., 0] if noncontiguous else x).requires_grad_()
    results = []
    for function in (lambda: composed(x, A, 0.3, 9), lambda: torch.manual_seed(9) and dropout_project(x, A, 0.3)):
        y = function()
        grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), (x, A))
        results.append((y, *grads))
    torch.testing.assert_close(*results)


def test_gradcheck_in_float64():
    x, W = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def fixed_mask(x, W):
        torch.manual_seed(4)
        return DropoutProject.apply(x, W, 0.4)

    assert torch.autograd.gradcheck(fixed_mask, (x, W))


def test_gradients_only_where_asked_for():
    A, x = torch.randn(2, 4, 8, requires_grad=True), torch.randn(5, 8)
    dropout_project(x, A, 0.5).sum().backward()
    assert x.grad is None and A.grad is not None
    frozen = torch.randn(2, 4, 8)
    x.requires_grad_()
    dropout_project(x, frozen, 0.5).sum().backward()
    assert x.grad is not None and frozen.grad is None


def test_expected_value_and_rate():
    x, A = torch.ones(4000, 32), torch.eye(32)[None]
    y = dropout_project(x, A, 0.25)[:, 0]
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_independent_draws_a_mask_for_each_expert():
    x, A = torch.ones(400, 16), torch.eye(16).repeat(3, 1, 1)
    shared, independent = dropout_project(x, A, 0.5), dropout_project(x, A, 0.5, independent=True)
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert not torch.equal(independent[:, 0], independent[:, 1])


def test_no_dropout_is_the_plain_projection():
    x, A = torch.randn(5, 8), torch.randn(2, 4, 8)
    assert torch.equal(dropout_project(x, A), project_down(x, A))


def kept_bytes(function):
    "Bytes that autograd keeps for backward, each storage once."
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return sum(kept.values()), result


def test_keeps_x_and_one_bit_per_element():
    x, A = torch.randn(64, 512, requires_grad=True), torch.randn(3, 8, 512, requires_grad=True)
    lean, _ = kept_bytes(lambda: dropout_project(x, A, 0.1))
    assert lean == x.nbytes + A.nbytes + x.numel() // 8
    plain, _ = kept_bytes(lambda: project_down(F.dropout(x, 0.1), A))
    assert plain > lean


@pytest.mark.parametrize("mode", ["shared", "independent"])
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


@pytest.mark.parametrize("mode", ["shared", "independent"])
def test_gradients_by_sample_as_with_lora(mode):
    "torch.func maps a gradient over rows; `randomness` says whether they share a mask, and must be given, as with LoRA."
    layer = adapted(lora_dropout=0.5, expert_dropout=mode).train().base_model.model.model.layers[0].self_attn.q_proj
    plain = peft.get_peft_model(nn.ModuleDict({"layer": nn.Linear(64, 64)}), peft.LoraConfig(lora_dropout=0.5, target_modules=["layer"], init_lora_weights=False)).train().base_model.model["layer"]
    rows = torch.randn(1, 5, 64).expand(3, 5, 64)
    for module in (layer, plain):
        own = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        loss = lambda own, x: torch.func.functional_call(module, own, (x,)).square().sum()
        by_row = lambda randomness: torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness=randomness)(own, rows)
        apart = lambda found: max((g[0] - g[1]).abs().max().item() for g in found.values())
        assert apart(by_row("same")) == 0 < apart(by_row("different"))
        with pytest.raises(RuntimeError, match="randomness"): by_row("error")


def test_nothing_is_kept_without_gradients():
    model, ids = adapted(lora_dropout=0.1).train(), tokens()
    with torch.no_grad():
        kept, logits = kept_bytes(lambda: model(ids).logits)
    assert kept == 0 and not logits.requires_grad


@pytest.mark.parametrize("autocast, copies", [(True, 0), (False, 1)])
def test_half_precision_inputs_are_not_copied_for_float32_experts(autocast, copies):
    "Of each layer's input only the router's weight gradient needs a float32 copy, and none under autocast."
    model = adapted(tiny_llama(torch.bfloat16), lora_dropout=0.1, r=4).train()
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    wide = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: wide.append(t) or t, lambda t: t):
            update(layer, "default", x)
    assert sum(t.dtype == torch.float32 and t.numel() == x.numel() and t.shape[-1] == x.shape[-1] for t in wide) == copies
    assert any(t.data_ptr() == x.data_ptr() for t in wide)  # x itself is what is kept
