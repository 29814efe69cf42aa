"""Everything that two processes on a CPU can show, in one launch: `torchrun --nproc_per_node 2 two_processes.py FOLDER d2mora's words`.

First `d2mora` itself, which trains by DDP. Then FSDP 2 and FSDP 1 against one process; rank 0 prints JSON. accelerate's FSDP plugin on
a CPU silently becomes DDP and would prove nothing, so this shards by torch's own `fully_shard`.
"""

import json
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import peft
import torch
import torch.distributed as dist
from helpers import fill, our_config, tiny_llama, tokens
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import d2mora
from d2mora.cli import main as command
from d2mora.orthogonality import orthogonality_loss, whole

LAMBDA, STEPS = 1e-4, 2


def adapted(weight=LAMBDA):
    return fill(peft.get_peft_model(tiny_llama(), our_config(orthogonality_weight=weight)))


def shard(model, mesh):
    "Split each block and the rest over the mesh, as accelerate does on GPUs."
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def twice(model, optimizer):
    d2mora.attach_orthogonality(model, optimizer)
    optimizer.register_step_pre_hook(lambda *_: d2mora.orthogonality.add_orthogonality_gradient(model, optimizer))


def train(model, part=slice(None), attach=d2mora.attach_orthogonality):
    "Clipped steps on this process's part of each batch; its losses."
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attach(model, optimizer)
    losses = []
    for step in range(STEPS):
        batch = tokens(rows=4, seed=step)[part]
        loss = model(batch, labels=batch).loss
        loss.backward()
        if isinstance(model, FullyShardedDataParallel):
            model.clip_grad_norm_(1.0)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def over_all(losses):
    "The losses of the whole batches."
    dist.all_reduce(losses)
    return (losses / dist.get_world_size()).tolist()


def adapter(model):
    return torch.cat([whole(p.detach()).flatten() for p in model.parameters() if p.requires_grad])


def relative(a, b):
    return float((a - b).norm() / b.norm())


def loss_and_gradients(model):
    loss = orthogonality_loss(model)
    found = torch.autograd.grad(loss, [p for n, p in model.named_parameters() if "d2mora_A" in n or "d2mora_B" in n])
    return loss.detach(), torch.cat([whole(g).flatten() for g in found])


def second_version(folder, part, mesh):
    "FSDP 2: the loss, its gradient, a trained and a saved adapter; and what two wrong ways of counting λ would give."
    single, split = adapted(), shard(adapted(), mesh)
    experts = [p for n, p in split.named_parameters() if "d2mora_" in n]
    local = sum(p.to_local().numel() for p in experts)
    (one, one_grad), (two, two_grad) = loss_and_gradients(single), loss_and_gradients(split)
    expected, losses, wrong = train(single).tolist(), over_all(train(split, part)), {}
    for name, weight, attach in (("twice", LAMBDA, twice), ("none", 0.0, d2mora.attach_orthogonality)):
        train(model := shard(adapted(weight), mesh), part, attach)
        wrong[name] = relative(adapter(model), adapter(single))
    state, trained = {n: whole(p.detach()) for n, p in split.named_parameters() if p.requires_grad}, adapter(split)
    if dist.get_rank():
        return {}
    split.save_pretrained(str(folder), state_dict=state)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), str(folder))
    saved = torch.cat([p.detach().flatten() for n, p in loaded.named_parameters() if "d2mora_" in n])
    return {
        "dtensors": all(isinstance(p, DTensor) for p in experts), "share": local / sum(p.numel() for p in experts),
        "loss": [float(one), float(two)], "gradient": relative(two_grad, one_grad), "losses": [expected, losses],
        "adapter": relative(trained, adapter(single)), "saved": relative(saved, adapter(single)), "wrong": wrong,
    }  # fmt: skip


def first_version(part):
    "FSDP 1 by PEFT's own policy: the losses without λ, and what is said with it, for both kinds of parameters."
    losses, refused = [train(adapted(0.0)).tolist()], []
    for original in (False, True):
        for weight in (0.0, LAMBDA):
            model = adapted(weight)
            how = dict(auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=original)
            try:
                losses.append(
                    over_all(train(FullyShardedDataParallel(model, **how, device_id=torch.device("cpu")), part))
                )
            except ValueError as error:
                refused.append(str(error))
    return {"losses": losses, "refused": refused}


def main(folder, words):
    assert command(words) == 0
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), dist.init_device_mesh("cpu", (dist.get_world_size(),))
    part = slice(2 * rank, 2 * rank + 2)
    seen = {"fsdp2": second_version(folder, part, mesh), "fsdp1": first_version(part)}
    if rank == 0:
        print(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
