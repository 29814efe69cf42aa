"""FSDP on a CPU mesh against one process: `torchrun --nproc_per_node 2 fsdp_run.py FOLDER`; rank 0 prints JSON. Without FOLDER it is FSDP 1.

accelerate's FSDP plugin on a CPU silently becomes DDP and would prove nothing, so this shards by torch's own `fully_shard`.
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
warnings.filterwarnings("ignore")

import peft
import torch
import torch.distributed as dist
from helpers import fill, our_config, tiny_llama, tokens
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import d2mora
from d2mora.orthogonality import orthogonality_loss, whole

LAMBDA, STEPS = 1e-4, 3


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
    "Three clipped steps on this process's part of each batch; the losses of the whole batches and the gradient norms."
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


def adapter(model):
    return torch.cat([whole(p.detach()).flatten() for p in model.parameters() if p.requires_grad])


def relative(a, b):
    return float((a - b).norm() / b.norm())


def loss_and_gradients(model):
    loss = orthogonality_loss(model)
    found = torch.autograd.grad(loss, [p for n, p in model.named_parameters() if "d2mora_A" in n or "d2mora_B" in n])
    return loss.detach(), torch.cat([whole(g).flatten() for g in found])


def main(folder):
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), dist.init_device_mesh("cpu", (dist.get_world_size(),))
    part = slice(2 * rank, 2 * rank + 2)
    single, split = adapted(), shard(adapted(), mesh)
    experts = [p for n, p in split.named_parameters() if "d2mora_" in n]
    local = sum(p.to_local().numel() for p in experts)
    (one, one_grad), (two, two_grad) = loss_and_gradients(single), loss_and_gradients(split)
    expected, losses = train(single), train(split, part)
    dist.all_reduce(losses)
    wrong = {
        name: train_control(shard(adapted(weight), mesh), part, attach)
        for name, weight, attach in (("twice", LAMBDA, twice), ("none", 0.0, d2mora.attach_orthogonality))
    }
    state = {name: whole(p.detach()) for name, p in split.named_parameters() if p.requires_grad}
    if rank == 0:
        split.save_pretrained(str(folder), state_dict=state)
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), str(folder))
        saved = torch.cat([p.detach().flatten() for n, p in loaded.named_parameters() if "d2mora_" in n])
        result = {
            "dtensors": all(isinstance(p, DTensor) for p in experts), "share": local / sum(p.numel() for p in experts),
            "loss": [float(one), float(two)], "gradient": relative(two_grad, one_grad),
            "losses": [expected.tolist(), (losses / dist.get_world_size()).tolist()], "adapter": relative(adapter(split), adapter(single)),
            "saved": relative(saved, adapter(single)), "wrong": {name: relative(vector, adapter(single)) for name, vector in wrong.items()},
        }  # fmt: skip
        print(json.dumps(result))
    else:
        adapter(split)
    dist.destroy_process_group()


def first_version():
    "FSDP 1 by PEFT's own policy: the losses without λ, and what is said with it, for both kinds of parameters."
    dist.init_process_group("gloo")
    rank, result = dist.get_rank(), {"losses": [train(adapted(0.0)).tolist()], "refused": []}
    for original in (False, True):
        for weight in (0.0, LAMBDA):
            model = adapted(weight)
            model = FullyShardedDataParallel(
                model,
                auto_wrap_policy=fsdp_auto_wrap_policy(model),
                use_orig_params=original,
                device_id=torch.device("cpu"),
            )
            try:
                losses = train(model, slice(2 * rank, 2 * rank + 2))
            except ValueError as error:
                result["refused"].append(str(error))
                continue
            dist.all_reduce(losses)
            result["losses"].append((losses / dist.get_world_size()).tolist())
    if rank == 0:
        print(json.dumps(result))
    dist.destroy_process_group()


def train_control(model, part, attach):
    train(model, part, attach)
    return adapter(model)


if __name__ == "__main__":
    main(Path(sys.argv[1])) if sys.argv[1:] else first_version()
