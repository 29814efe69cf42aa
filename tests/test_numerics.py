"""Numbers at their edges: half precision with large inputs, the smallest and largest r, M and N, no tokens and many, gradients in float64.

Where a result is not finite, PEFT's LoRA of the same rank and the same weights is asked the same; only what it gives finite, ours must.
"""

import copy

import peft
import pytest
import torch
from helpers import PAIRS, adapted, difference, fill, loop, our_config, tiny_llama, tokens
from torch import nn

from d2mora import lean
from d2mora.routers import route
from d2mora.tuner import update

SIZES = [(pairing, M, N, r) for pairing, (M, N) in PAIRS.items() for r in (1, 256)]
SIZES += [("many-to-many", *size) for size in ((64, 1, 8), (1, 64, 8), (1, 1, 1))]
SIZES += [("one-to-many", 1, 1, 8), ("one-to-many", 1, 64, 8), ("one-to-one", 1, 1, 8), ("one-to-one", 64, 64, 8)]
SMALL = [size for size in SIZES if size[3] < 256 and size[1] * size[2] < 100] + [("many-to-many", 2, 2, 16)]
WIDE, OUT = 16, 12
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
pairings = pytest.mark.parametrize("pairing", PAIRS)


def layer_of(pairing="many-to-many", M=3, N=8, r=8, dtype=torch.float32, std=0.05, **fields):
    "One adapted linear layer, every tensor of it filled."
    sizes = dict(num_down_experts=M, num_up_experts=N, r=r, lora_alpha=r)
    config = our_config(pairing, target_modules=["proj"], task_type=None, **sizes, **fields)
    model = peft.get_peft_model(nn.ModuleDict({"proj": nn.Linear(WIDE, OUT)}), config)
    return fill(model, std=std).base_model.model["proj"].to(dtype).train()


def lora_of(layer):
    "PEFT's LoRA of the same rank, its A the first A and its B the sum of the B's: as large a step as ours can be."
    (A, B), r = layer.experts("default"), layer.adapter_config["default"].r
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=["proj"])
    lora = peft.get_peft_model(nn.ModuleDict({"proj": nn.Linear(WIDE, OUT)}), config).base_model.model["proj"]
    lora = lora.to(A.dtype).train()
    lora.lora_A["default"].weight.data.copy_(A[0])
    lora.lora_B["default"].weight.data.copy_(B.sum(0).T)
    lora.base_layer.load_state_dict(layer.base_layer.state_dict())
    return lora


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
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("pairing, M, N, r", SIZES)
def test_finite_wherever_lora_is(pairing, M, N, r, size, dtype):
    "16 bits: never a NaN, and an infinity only where the number itself is beyond fp16, which ends at 65,504."
    layer = layer_of(pairing, M, N, r, dtype)
    x = (size * torch.rand(4, WIDE).mul(2).sub(1)).to(dtype)
    ours, plain = passes(layer, x), passes(lora_of(layer), x)
    if not finite(plain):
        return  # PEFT's LoRA passes fp16's end: nothing is asked of ours
    exact = passes(copy.deepcopy(layer).double(), x.double())
    for name, t in ours.items():
        assert (t.isfinite() | (exact[name].abs() > 60_000)).all() and not t.isnan().any(), name
    assert dtype == torch.float16 or finite(ours)  # bfloat16 has the range of float32


@halves
@pytest.mark.parametrize("size", [1.0, 1e4])
@pairings
def test_float32_experts_beside_a_base_in_half_precision(pairing, size, dtype):
    "As training has them. Finite, and as near to float64 as the output's type allows."
    layer = layer_of(pairing, *PAIRS[pairing])
    layer.base_layer.to(dtype)
    x = (size * torch.rand(6, WIDE).mul(2).sub(1)).to(dtype)
    got, expected = update(layer, "default", x), loop(layer, x)
    assert got.dtype == torch.float32 and difference(got, expected) < 2e-5 * expected.abs().max()
    assert finite(passes(layer, x))


def test_fp16_overflows_for_lora_too():
    "The limit that is not ours: with weights near 1, r = 256 and inputs of 1e4 neither fits; float32 experts do."
    layer, x = layer_of(r=256, dtype=torch.float16, std=1.0), torch.full((2, WIDE), 1e4, dtype=torch.float16)
    assert not finite(passes(lora_of(layer), x)) and not finite(passes(layer, x))
    layer.float().base_layer.half()
    assert update(layer, "default", x).isfinite().all()


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


@pairings
def test_32768_tokens(pairing):
    "Each as alone, and sums over that many in float32 near those in float64."
    layer, x = layer_of(pairing, *PAIRS[pairing]), torch.randn(1, 32_768, WIDE)
    single = passes(layer, x)
    some = torch.tensor([0, 1, 16_383, 32_767])
    torch.testing.assert_close(single["y"][0, some], torch.stack([layer(x[0, i]) for i in some]))
    double = passes(layer.double(), x.double())
    for name in single:
        assert (single[name].double() - double[name]).norm() < 1e-4 * double[name].norm(), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_padding_only(side, dtype):
    "They change no other row, and bring no NaN that the base would not have."
    base, ids = tiny_llama(dtype), tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[1] = 0  # a row of nothing but padding
    mask[2, slice(3) if side == "left" else slice(5, None)] = 0
    bare = base(input_ids=ids, attention_mask=mask).logits
    model = adapted(base)
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(bare.isfinite(), logits.isfinite())
    alone = model(input_ids=ids[:1], attention_mask=mask[:1]).logits
    assert difference(alone, logits[:1]) < (1e-4 if dtype == torch.float32 else 0.1)
    labels = ids.masked_fill(mask == 0, -100)
    model.train()(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
