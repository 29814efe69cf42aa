"""The layer and the loss against recordings of the published code (facts of the method: see 04, 05 and appendix B)."""

import pytest
import torch
from safetensors import safe_open

from d2mora.lora import project_down, project_up
from d2mora.orthogonality import similarity
from d2mora.routers import many_to_many, route


@pytest.fixture(params=["m3n8r8", "m4n3r16"])
def golden(request, shared):
    with safe_open(shared / "golden" / f"{request.param}.safetensors", "pt") as f:
        return f.metadata(), {name: f.get_tensor(name) for name in f.keys()}


def stacked(gold, prefix=""):
    "The published tensors in our storage, as leaves that require gradients."
    parts = {k.removeprefix(prefix): v for k, v in gold.items() if k.startswith(f"{prefix}lora_")}
    count = {kind: sum(k.startswith(f"lora_{kind}.") for k in parts) for kind in "AB"}
    A = torch.stack([parts[f"lora_A.{i}.weight"] for i in range(count["A"])])
    B = torch.stack([parts[f"lora_B.{j}.weight"].T for j in range(count["B"])]).contiguous()
    return dict(A=A, B=B, down=parts["lora_route1.weight"], up=parts["lora_route2.weight"])


def run(meta, gold, similarity, route):
    "Everything the recording holds, computed by our functions: outputs, weights, z, gradients."
    p = {k: v.clone().requires_grad_() for k, v in stacked(gold).items()}
    x, seen = gold["x"].clone().requires_grad_(), {}

    def weigh(side, v):
        seen[side], seen["z"] = route(v, p[side]), v
        return seen[side]

    e = many_to_many(lambda v: project_down(v, p["A"]), lambda v: weigh("down", v), lambda v: weigh("up", v), x)
    y = gold["base_out"] + float(meta["lora_alpha"]) / int(meta["r"]) * project_up(e, p["B"])
    base = x @ gold["base.weight"].T  # only for the gradient of x, which flows through the frozen layer too
    orth = similarity(p["A"]), similarity(p["B"])
    ((y + base - base.detach()) * gold["grad_out"]).sum().add(float(meta["orth_weight"]) * sum(orth)).backward()
    return dict(y=y, z=seen["z"], weight_down=seen["down"], weight_up=seen["up"], orth_A=orth[0], orth_B=orth[1]), p, x


def relative(a, b):
    return (a - b).norm() / b.norm()


def mismatches(golden, similarity=similarity, route=route):
    meta, gold = golden
    out, p, x = run(meta, gold, similarity, route)
    expected = stacked(gold, "grad.")
    wrong = [k for k, v in out.items() if not torch.allclose(v, gold[k], rtol=1e-5, atol=1e-5)]
    wrong += [f"grad.{k}" for k in p if relative(p[k].grad, expected[k]) > 1e-4]
    return wrong + ["grad.x"] * bool(relative(x.grad, gold["grad.x"]) > 1e-4)


def test_outputs_and_all_gradients_match(golden):
    assert mismatches(golden) == []


def test_a_wrong_loss_or_router_is_noticed(golden):
    "The check can fail: a loss that is too large shows in the gradients, a router without softmax everywhere."
    assert {"grad.A", "grad.B"} & set(mismatches(golden, similarity=lambda W: 3000 * similarity(W)))
    assert "y" in mismatches(golden, route=lambda v, R: torch.sigmoid(v @ R.T))
