"""Numbers at their edges: the smallest and largest r, M and N, no tokens, saturated routers, gradients in float64."""

import peft
import pytest
import torch
from helpers import PAIRS, difference, fill, loop, our_config
from torch import nn

from d2mora import lean
from d2mora.routers import route
from d2mora.tuner import update

SIZES = [(pairing, M, N, r) for pairing, (M, N) in PAIRS.items() for r in (1, 256)]
SIZES += [("many-to-many", *size) for size in ((64, 1, 8), (1, 64, 8), (1, 1, 1))] + [("one-to-one", 64, 64, 8)]
SMALL = [(pairing, M, N, 1) for pairing, (M, N) in PAIRS.items()] + [("many-to-many", 2, 2, 16)]
WIDE, OUT = 16, 12
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
pairings = pytest.mark.parametrize("pairing", PAIRS)


def layer_of(pairing="many-to-many", M=3, N=8, r=8, dtype=torch.float32, std=0.05, **fields):
    "One adapted linear layer, every tensor of it filled."
    sizes = dict(num_down_experts=M, num_up_experts=N, r=r, lora_alpha=r)
    config = our_config(pairing, target_modules=["proj"], task_type=None, **sizes, **fields)
    model = peft.get_peft_model(nn.ModuleDict({"proj": nn.Linear(WIDE, OUT)}), config)
    return fill(model, std=std).base_model.model["proj"].to(dtype).train()


def passes(layer, x):
    "Output and every gradient of one pass, by name."
    x = x.detach().requires_grad_()
    y = layer(x)
    y.double().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad(set_to_none=True)
    return {"y": y.detach(), "x": x.grad, **grads}


def finite(tensors):
    return all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("pairing, M, N, r", SIZES)
def test_any_size_equals_the_loop_in_float64(pairing, M, N, r):
    layer, x = layer_of(pairing, M, N, r, std=0.3), torch.randn(2, 3, WIDE)
    expected = loop(layer, x)
    assert expected.abs().max() > 1e-3
    assert difference(update(layer.double(), "default", x.double()), expected) < 1e-9 * expected.abs().max()
    assert difference(update(layer.float(), "default", x), expected) < 1e-5 * expected.abs().max() * r**0.5


@pytest.mark.parametrize("pairing, M, N, r", SMALL)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_in_float64(pairing, M, N, r, p, monkeypatch):
    "gradcheck of input, experts and routers; with dropout, under a mask that stays."
    layer = layer_of(pairing, M, N, r, torch.float64, std=0.5, lora_dropout=p)
    layer.base_layer.weight.data.zero_()
    monkeypatch.setattr(lean, "draw_mask", lambda count, *_: torch.arange(-(-count // 8) * 8) % 5 > 1)
    names, held = zip(*((name, p) for name, p in layer.named_parameters() if "d2mora_" in name))

    def output(x, *own):
        return torch.func.functional_call(layer, dict(zip(names, own)), (x,))

    x = torch.randn(2, WIDE, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(t.detach().clone().requires_grad_() for t in held))
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True) and output(*inputs).abs().max() > 1e-3


@halves
def test_routers_saturate_without_nan(dtype):
    "Logits far beyond exp's range, and equal ones: weights from 0 to 1 that sum to 1."
    R = torch.tensor([1.0, -1.0, 0.0, 1.0])[:, None].expand(4, WIDE).to(dtype)
    x = (torch.rand(5, WIDE) * 1e4 / WIDE).to(dtype).requires_grad_()
    weights = route(x, R)
    weights[..., 0].sum().backward()
    assert weights.dtype == torch.float32 and weights.sum(-1).sub(1).abs().max() < 1e-6 and x.grad.isfinite().all()
    assert torch.equal(weights[:, 0], weights[:, 3])


@pairings
@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0), (1,), ()])
def test_no_token_and_one(pairing, shape):
    layer, x = layer_of(pairing, *PAIRS[pairing], lora_dropout=0.5), torch.randn(*shape, WIDE)
    found = passes(layer, x)
    assert found["y"].shape == (*shape, OUT) and finite(found)
    grads = [t for name, t in found.items() if "d2mora" in name]
    assert grads and all((g == 0).all() for g in grads) == (0 in shape)
