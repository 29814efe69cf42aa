"""Numbers at their edges: half precision with large inputs, the smallest and largest r, M and N, no tokens and many, gradients in float64.

Where a result is not finite, PEFT's LoRA of the same rank and the same weights is asked the same; only what it gives finite, ours must.
"""

import copy

import peft
import pytest
import torch
from helpers import PAIRS, adapted, difference, fill, loop, our_config, tiny_llama, tokens
from torch import nn

import d2mora
from d2mora import lean, lora, tuner
from d2mora.orthogonality import orthogonality_loss
from d2mora.tuner import D2MoraLinear, update

HALVES = [torch.bfloat16, torch.float16]
SIZES = [(pairing, M, N, r) for pairing, (M, N) in PAIRS.items() for r in (1, 256)] + [  # M or N of 1 and of 64
    ("many-to-many", 1, 8, 8), ("many-to-many", 64, 8, 8), ("many-to-many", 3, 1, 8), ("many-to-many", 3, 64, 8), ("many-to-many", 1, 1, 1),
    ("many-to-many", 64, 64, 1), ("one-to-many", 1, 1, 8), ("one-to-many", 1, 64, 8), ("one-to-one", 1, 1, 8), ("one-to-one", 64, 64, 8)]  # fmt: skip
WIDE, OUT = 16, 12


def layer_of(pairing="many-to-many", M=3, N=8, r=8, dtype=torch.float32, std=0.05, **fields):
    "One adapted linear layer, every tensor of it filled."
    config = our_config(
        pairing,
        num_down_experts=M,
        num_up_experts=N,
        r=r,
        target_modules=["proj"],
        task_type=None,
        **{"lora_alpha": r, **fields},
    )
    model = peft.get_peft_model(nn.ModuleDict({"proj": nn.Linear(WIDE, OUT)}), config)
    layer = fill(model, std=std).base_model.model["proj"]
    return layer.to(dtype).train()


def lora_of(layer):
    "PEFT's LoRA of the same rank, its A the first A and its B the sum of the B's: as large a step as ours can be."
    r, dtype = layer.adapter_config["default"].r, layer.base_layer.weight.dtype
    model = peft.get_peft_model(
        nn.ModuleDict({"proj": nn.Linear(WIDE, OUT)}), peft.LoraConfig(r=r, lora_alpha=r, target_modules=["proj"])
    )
    twin = model.base_model.model["proj"].to(dtype).train()
    (
        twin.lora_A["default"].weight.data.copy_(layer.experts("default")[0][0]),
        twin.lora_B["default"].weight.data.copy_(layer.experts("default")[1].sum(0).T),
    )
    twin.base_layer.load_state_dict(layer.base_layer.state_dict())
    return twin


def passes(layer, x):
    "Output and every gradient of one pass, in float64, by name."
    x = x.detach().requires_grad_()
    y = layer(x)
    y.double().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad(set_to_none=True)
    return {"y": y.detach(), "x": x.grad, **grads}


def finite(found):
    return all(t.isfinite().all() for t in found.values())


# ---- against the loop in float64 ----
@pytest.mark.parametrize("pairing, M, N, r", SIZES)
def test_any_size_equals_the_loop_in_float64(pairing, M, N, r):
    layer, x = layer_of(pairing, M, N, r, std=0.3), torch.randn(2, 3, WIDE)
    expected = loop(layer, x)
    assert expected.abs().max() > 1e-3
    assert difference(update(layer.double(), "default", x.double()), expected) < 1e-9 * expected.abs().max()
    assert difference(update(layer.float(), "default", x), expected) < 1e-5 * expected.abs().max() * r**0.5
    assert finite(passes(layer, x))


@pytest.mark.parametrize(
    "pairing, M, N, r",
    [size for size in SIZES if size[3] < 256 and size[1] * size[2] < 100] + [("many-to-many", 2, 2, 16)],
)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_in_float64(pairing, M, N, r, p, monkeypatch):
    "gradcheck of input, experts and routers; with dropout, under a mask that stays."
    layer = layer_of(pairing, M, N, r, torch.float64, std=0.5, lora_dropout=p)
    monkeypatch.setattr(lean, "draw_mask", lambda count, p, device=None: torch.arange(-(-count // 8) * 8) % 5 > 1)
    names = [
        n for n in ("d2mora_A", "d2mora_B", "d2mora_router_down", "d2mora_router_up") if "default" in getattr(layer, n)
    ]
    x, own = (
        torch.randn(2, WIDE, dtype=torch.float64, requires_grad=True),
        [getattr(layer, n)["default"].weight for n in names],
    )

    def output(x, *own):
        for name, value in zip(names, own):
            getattr(layer, name)["default"].weight.data.copy_(value.detach())
        return torch.func.functional_call(
            Update(layer), {f"layer.{n}.default.weight": v for n, v in zip(names, own)}, (x,)
        )

    inputs = (x, *(p.detach().clone().requires_grad_() for p in own))
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True) and output(*inputs).abs().max() > 1e-3


class Update(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return update(self.layer, "default", x)


@pytest.mark.parametrize("part", [0, 1])
def test_gradient_of_the_orthogonality_loss_in_float64(part):
    "Also where experts are zero, equal or opposite: finite, and right wherever the loss is smooth."
    layer = layer_of(M=3, N=3, r=2, dtype=torch.float64, std=0.5)
    weight = [layer.d2mora_A, layer.d2mora_B][part]["default"].weight
    W = layer.experts("default")[part].detach()

    def loss(value):
        with torch.no_grad():
            W.copy_(value)
        from d2mora.orthogonality import similarity

        return similarity(value)

    assert torch.autograd.gradcheck(loss, W.detach().clone().requires_grad_())
    for value in (
        torch.zeros_like(W),
        torch.ones_like(W),
        torch.stack([torch.ones_like(W[0]), -torch.ones_like(W[0]), torch.zeros_like(W[0])]),
    ):
        W.data.copy_(value), layer.zero_grad()
        orthogonality_loss(layer).backward()
        assert weight.grad.isfinite().all()


# ---- half precision, large inputs ----
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("pairing, M, N, r", SIZES)
def test_finite_wherever_lora_is(pairing, M, N, r, size, dtype):
    "Weights and inputs in 16 bits. Never a NaN, and an infinity only where the number itself is beyond fp16, which ends at 65,504."
    layer = layer_of(pairing, M, N, r, dtype)
    x = (size * torch.rand(4, WIDE).mul(2).sub(1)).to(dtype)
    found, plain = passes(layer, x), passes(lora_of(layer), x)
    exact = passes(copy.deepcopy(layer).double(), x.double())
    if not finite(plain):
        return  # PEFT's LoRA passes fp16's end: nothing is asked of ours
    for name, t in found.items():
        assert (t.isfinite() | (exact[name].abs() > 60_000)).all() and not t.isnan().any(), name
    assert dtype == torch.float16 or finite(found)  # bfloat16 has the range of float32


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("pairing", PAIRS)
def test_float32_experts_beside_a_base_in_half_precision(pairing, size, dtype):
    "As training has them: inputs in 16 bits up to 1e4, experts in float32. Finite, and as near to float64 as the output's type allows."
    layer = layer_of(pairing, *PAIRS[pairing])
    layer.base_layer.to(dtype)
    x = (size * torch.rand(6, WIDE).mul(2).sub(1)).to(dtype)
    got, expected = update(layer, "default", x), loop(layer, x)
    assert got.dtype == torch.float32 and difference(got, expected) < 2e-5 * expected.abs().max()
    assert finite(passes(layer, x))


def test_fp16_overflows_for_lora_too():
    "The limit that is not ours: with weights near 1, r = 256 and inputs of 1e4 neither fits into fp16; float32 experts do."
    layer, x = layer_of(r=256, dtype=torch.float16, std=1.0), torch.full((2, WIDE), 1e4, dtype=torch.float16)
    assert not finite(passes(lora_of(layer), x)) and not finite(passes(layer, x))
    (
        layer.base_layer.half(),
        [
            modules.float()
            for modules in (layer.d2mora_A, layer.d2mora_B, layer.d2mora_router_down, layer.d2mora_router_up)
        ],
    )
    assert update(layer, "default", x).isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_routers_saturate_without_nan(dtype, scale):
    "Logits far beyond exp's range, and equal ones: weights from 0 to 1 that sum to 1."
    from d2mora.routers import route

    R = torch.stack([torch.full((WIDE,), v) for v in (1.0, -1.0, 0.0, 1.0)]).to(dtype)
    x = (torch.rand(5, WIDE) * scale / WIDE).to(dtype).requires_grad_()
    weights = route(x, R)
    weights[..., 0].sum().backward()
    assert weights.dtype == torch.float32 and weights.sum(-1).sub(1).abs().max() < 1e-6 and x.grad.isfinite().all()
    assert (weights[:, 0] - weights[:, 3]).abs().max() == 0


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_is_finite_where_loras_is(dtype):
    model, ids = adapted(tiny_llama(), r=8).train(), tokens()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert (
        loss.isfinite()
        and all(g is not None and g.isfinite().all() for g in grads)
        and max(g.abs().max() for g in grads) > 1e-4
    )


# ---- how many tokens ----
@pytest.mark.parametrize("pairing", PAIRS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0), (1,), (1, 1), ()])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_no_token_and_one(pairing, shape, p):
    layer, x = layer_of(pairing, *PAIRS[pairing], lora_dropout=p), torch.randn(*shape, WIDE)
    found = passes(layer, x)
    assert found["y"].shape == (*shape, OUT) and finite(found)
    grads = [t for name, t in found.items() if "d2mora" in name]
    assert grads and all((g == 0).all() for g in grads) == (0 in shape)


@pytest.mark.parametrize("pairing", PAIRS)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_many_tokens_are_each_as_alone(pairing, p):
    "32,768 tokens at once, with and without dropout's mask."
    layer = layer_of(pairing, *PAIRS[pairing], lora_dropout=p)
    x = torch.randn(32_768, WIDE)
    assert finite(passes(layer, x))
    with torch.no_grad():
        whole = update(layer.eval(), "default", x)
        some = torch.tensor([0, 1, 16_383, 32_766, 32_767])
        torch.testing.assert_close(whole[some], torch.stack([update(layer, "default", x[i]) for i in some]))


@pytest.mark.parametrize("pairing", PAIRS)
def test_a_sequence_of_32768_tokens_through_the_layer_keeps_its_gradients(pairing):
    "Sums over that many tokens, in float32, against float64."
    layer, x = layer_of(pairing, *PAIRS[pairing]), torch.randn(1, 32_768, WIDE)
    single, double = passes(layer, x), passes(layer.double(), x.double())
    for name in single:
        error = (single[name].double() - double[name]).norm() / double[name].norm()
        assert error < 1e-4, (name, float(error))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_padding_only(side, dtype):
    "They change no other row, and bring no NaN that the base would not have."
    base = tiny_llama(dtype)
    ids = tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[1] = 0  # a row of nothing but padding
    mask[2, :3] = 0 if side == "left" else 1
    if side == "right":
        mask[2, 5:] = 0
    bare = base(input_ids=ids, attention_mask=mask).logits
    model = adapted(base)
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(bare.isfinite(), logits.isfinite())
    alone = model(input_ids=ids[:1], attention_mask=mask[:1]).logits
    assert difference(alone, logits[:1]) < (1e-4 if dtype == torch.float32 else 0.1)
    labels = ids.masked_fill(mask == 0, -100)
    model.train()(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_packed_experts_do_not_overflow_where_they_are_summed():
    "The sum over N·r products is taken in the matmul's own precision: 64 up-projections of r 256 in bf16 stay as near as one does."
    layer, x = layer_of("many-to-many", 3, 64, 256, torch.bfloat16), torch.randn(8, WIDE).bfloat16()
    expected = loop(layer, x)
    assert difference(update(layer, "default", x), expected) < 0.05 * expected.abs().max()


def test_the_layers_are_ours():
    assert (
        isinstance(layer_of(), D2MoraLinear)
        and set(tuner.PAIRINGS) == set(PAIRS)
        and d2mora.D2MoraConfig
        and lora.project_up
    )
