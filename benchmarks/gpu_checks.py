"""Checks that the adapter computes the right thing on a device; `make gpu` runs them first, on the GPU.

Each check gives a relative difference, and CHECKS says how large it may be. A check is called with the device, the folder that holds
golden/, and whether this is a trial without a GPU.
"""

from functools import partial

import peft
import torch
from layer import COMMON, loops
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

import d2mora


def relative(found, right):
    found, right = found.detach().float().cpu(), right.detach().float().cpu()
    return (found - right).norm() / right.norm().clamp(min=1e-30)


def worst(found, right):
    "The largest relative difference of tensors of the same name; NaN if there is one."
    return float(torch.stack([relative(found[name], right[name]) for name in right]).max())


def together(found, right):
    "The relative difference of all tensors as one vector."
    return float(
        relative(*(torch.cat([tensors[name].flatten().float() for name in right]) for tensors in (found, right)))
    )


def fill(model, std):
    "Random adapters: a fresh one adds nothing and hides every fault."
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "d2mora_" in name:
            p.data.copy_(std * torch.randn(p.shape))
    return model


def small_model(device, std=0.1, **fields):
    "A LLaMA of two layers with a filled adapter, float32, the same on each device."
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = d2mora.D2MoraConfig(**COMMON | {"lora_dropout": 0.0} | fields)
    return fill(peft.get_peft_model(AutoModelForCausalLM.from_config(shape).to(device), config), std)


def small_layer(device, **fields):
    "An adapted linear layer without bias: the module that holds it as `proj`, and its PEFT model."
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"proj": torch.nn.Linear(64, 48, bias=False)}).to(device)
    return net, fill(peft.get_peft_model(net, d2mora.D2MoraConfig(target_modules=["proj"], **fields)), 0.3)


def token_ids(device):
    return torch.randint(3, 97, (3, 24), generator=torch.Generator().manual_seed(3)).to(device)


def gradients(model):
    "The logits, and the gradient of the loss in every trained parameter, always with the same random numbers."
    torch.manual_seed(5)
    ids = token_ids(next(model.parameters()).device)
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return {"logits": out.logits} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def golden(device, shared, trial, name, dtype):
    "The published layer's recorded output and gradients."
    path = shared / "golden" / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: name a folder that holds golden/ by --shared")
    with safe_open(path, "pt") as file:
        meta, gold = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}

    def ours(prefix):
        published = {
            f"base_model.model.proj.{k.removeprefix(prefix)}": v
            for k, v in gold.items()
            if k.startswith(f"{prefix}lora_")
        }
        return d2mora.convert_official_checkpoint(published, lora_alpha=float(meta["lora_alpha"]), task_type=None)

    net = torch.nn.ModuleDict(
        {"proj": torch.nn.Linear(gold["x"].shape[-1], gold["y"].shape[-1], bias="base.bias" in gold)}
    )
    net.proj.load_state_dict({k.removeprefix("base."): v for k, v in gold.items() if k.startswith("base.")})
    model = peft.get_peft_model(net.to(device, dtype), ours("")[0])
    peft.set_peft_model_state_dict(model, ours("")[1])
    x = gold["x"].to(device, dtype).requires_grad_()
    y = net.proj(x)
    loss = (y.float() * gold["grad_out"].to(device)).sum() + float(meta["orth_weight"]) * d2mora.orthogonality_loss(
        model
    )
    loss.backward()
    grads = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if "d2mora_" in n}
    return worst({"y": y, "x": x.grad} | grads, {"y": gold["y"], "x": gold["grad.x"]} | ours("grad.")[1])


def against_loops(device, shared, trial):
    model = small_model(device)
    ours = gradients(model)
    with loops():
        return worst(ours, gradients(model))


def redrawn_mask(device, shared, trial):
    "With M = N = 1 the layer is linear in x and in A: forward and backward agree only if they drop the same elements."
    net, _ = small_layer(device, num_down_experts=1, num_up_experts=1, lora_dropout=0.3)
    x, v, g = (torch.randn(257, width, device=device) for width in (64, 64, 48))

    def run(x):
        torch.manual_seed(5)
        return net.train().proj(x)

    y = run(x.requires_grad_())
    (y * g).sum().backward()
    with torch.no_grad():
        added, again = y - net.proj.base_layer(x), run(v)
        by_A = sum((p * p.grad).sum() for name, p in net.named_parameters() if "d2mora_A" in name)
        pairs = ((again, (x.grad * v).sum()), (added, by_A))
        return float(
            torch.stack(
                [((g * out).sum() - found).abs() / (out.norm() * g.norm() / g.numel() ** 0.5) for out, found in pairs]
            ).max()
        )


def one_step(device, half, fused):
    "What one step of SGD changes, with λ such that both gradients are alike in size; in half precision behind a gradient scaler."
    model, ids = small_model(device, std=0.05, orthogonality_weight=3e-3), token_ids(device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0, fused=fused)
    d2mora.attach_orthogonality(model, optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    for _ in range(20):  # the scaler skips steps until its scale is low enough
        with torch.autocast(device.type, torch.float16, enabled=half):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if any(not torch.equal(p, before[name]) for name, p in trained.items()):
            break
    return {name: p.detach() - before[name] for name, p in trained.items()}


def float16(device, shared, trial):
    return max(together(one_step(device, True, fused), one_step(device, False, fused)) for fused in (False, True))


def bfloat16(device, shared, trial):
    model = small_model(device, std=0.05)
    right = gradients(model)
    del right["logits"]  # as one vector with them the gradients would not show
    with torch.autocast(device.type, torch.bfloat16):
        return together(gradients(model), right)


@torch.no_grad()
def with_cache(device, shared, trial):
    model, ids, past, steps = small_model(device).eval(), token_ids(device), None, []
    for token in ids.split(1, dim=1):
        out = model(input_ids=token, past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits)
    return float(relative(torch.cat(steps, 1), model(input_ids=ids, use_cache=False).logits))


@torch.no_grad()
def two_adapters(device, shared, trial):
    "Two active adapters add what each adds alone."
    net, model = small_layer(device)
    model.add_adapter("second", d2mora.D2MoraConfig(target_modules=["proj"], num_down_experts=2, num_up_experts=5, r=4))
    fill(model, 0.3)
    x, added = torch.randn(33, 64, device=device), []
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        added.append(net.proj(x) - net.proj.base_layer(x))
    return float(relative(added[2], added[0] + added[1]))


def checkpointing(device, shared, trial, reentrant):
    "Dropout is on: what is computed again must drop the same elements."
    model = small_model(device, lora_dropout=0.3).train()
    right = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return worst(gradients(model), right)


def compiled(device, shared, trial):
    "One graph: a graph break raises an error."
    model = small_model(device).train()
    right, whole = gradients(model), model.get_base_model()
    whole.forward = torch.compile(whole.forward, fullgraph=True, backend="aot_eager" if trial else "inductor")
    return worst(gradients(model), right)


CHECKS = {  # the check, and the largest difference that is still right
    "recording m3n8r8, float32": (partial(golden, name="m3n8r8", dtype=torch.float32), 1e-4),
    "recording m4n3r16, float32": (partial(golden, name="m4n3r16", dtype=torch.float32), 1e-4),
    "recording m3n8r8, bfloat16": (partial(golden, name="m3n8r8", dtype=torch.bfloat16), 1e-2),
    "recording m4n3r16, bfloat16": (partial(golden, name="m4n3r16", dtype=torch.bfloat16), 1e-2),
    "logits and gradients against loops over experts": (against_loops, 1e-4),
    "dropout mask redrawn in backward": (redrawn_mask, 1e-4),
    "float16 with gradient scaler, one step against float32": (float16, 1e-2),
    "bfloat16 autocast, gradients against float32": (bfloat16, 2e-2),
    "cache against no cache": (with_cache, 1e-4),
    "two adapters": (two_adapters, 1e-4),
    "gradient checkpointing, not reentrant": (partial(checkpointing, reentrant=False), 1e-4),
    "gradient checkpointing, reentrant": (partial(checkpointing, reentrant=True), 1e-4),
    "torch.compile without graph breaks": (compiled, 1e-3),
}
