"""How a mixture starts: D2MoRA with one change at a time (scale, start of A and B, loss, gate, learning rates), each at its own best rate.

    python benchmarks/mixture_starts.py                                 # the hard toy world: nbs/results/hard-world-starts.json
    python benchmarks/mixture_starts.py --recipe demo --changes d2mora,distinct-up   # another world: nbs/results/toy-starts.json
    python benchmarks/mixture_starts.py --steps 20 --seeds 0 --most 3 --runs runs/tiny --output runs/tiny           # a trial

A plain training loop of thirty lines, so that each change is a few lines that touch nothing of the library. A run is one JSON file under
--runs: the same command goes on with a study that was stopped. --workers runs go side by side, one thread each.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer

from d2mora.compare import adapters_at, best_rate, next_rates, varied
from d2mora.data import collator_for, prepare, read_rows
from d2mora.evaluate import test_rows
from d2mora.orthogonality import active_experts, attach_orthogonality, expert_layers, pairwise_cosine
from d2mora.recipe import Recipe, adapted_base, load_recipe
from d2mora.routers import PAIRINGS, many_to_many
from d2mora.scoring import grade_rows
from d2mora.train import row_losses
from d2mora.tuner import D2MoraLinear, parameter_groups, record_routing
from d2mora.utils import write_text

ROOT = Path(__file__).resolve().parents[1]
CHOOSING_SEEDS = (1000, 1001)
HELD_OUT = 400  # rows


# The changes. Each may set fields of the adapter, change the fresh weights, act before an optimizer step, or set rates apart.


@dataclass
class Change:
    about: str
    adapter: dict = field(default_factory=dict)  # fields of the `adapter:` section
    start: Callable | None = None  # start(model): changes the fresh weights
    before_step: Callable | None = None  # before_step(model, share of the run that is over): after clipping
    rates: dict = field(default_factory=dict)  # learning rate of "down", "up", "routers" as a multiple of the others'


def layers(model):
    return [m for m in model.modules() if isinstance(m, D2MoraLinear)]


@torch.no_grad()
def distinct_up(model):
    "B's that differ and sum to zero, up-routers at zero: all weights are equal, so the output is the base's."
    for layer in layers(model):
        A, B = layer.experts("default")
        drawn = torch.randn_like(B)
        drawn -= drawn.mean(0)
        B.copy_(
            drawn * (A.flatten(1).norm(dim=1).mean() / drawn.flatten(1).norm(dim=1).mean() / 10)
        )  # a tenth of A's norm
        layer.d2mora_router_up["default"].weight.zero_()


@torch.no_grad()
def orthogonal_down(model):
    "All rows of all A's orthogonal to each other, with the norm that they had."
    for layer in layers(model):
        A, _ = layer.experts("default")
        rows = torch.linalg.qr(torch.randn(A.shape[-1], A.shape[0] * A.shape[1])).Q.T
        A.copy_(rows.reshape(A.shape) * A.norm() / rows.norm())


@torch.no_grad()
def svd_down(model):
    "The leading right singular vectors of the frozen weight, dealt out to the A's, with the norm that they had."
    for layer in layers(model):
        A, _ = layer.experts("default")
        rows = torch.linalg.svd(layer.get_base_layer().weight.float(), full_matrices=False).Vh[
            : A.shape[0] * A.shape[1]
        ]
        A.copy_(rows.reshape(A.shape[1], A.shape[0], -1).transpose(0, 1) * A.norm() / rows.norm())


def set_weight(model, weight):
    for layer in layers(model):
        layer.adapter_config["default"].orthogonality_weight = weight


def weight_rises(weight, model, over):
    "λ from zero to its value over the first half."
    set_weight(model, weight * min(1.0, 2 * over))


def weight_waits(weight, model, over):
    "λ only in layers whose B's have a tenth of the norm of their A's."
    for layer in layers(model):
        A, B = layer.experts("default")
        config = layer.adapter_config["default"]
        large = B.flatten(1).norm(dim=1).mean() > 0.1 * A.flatten(1).norm(dim=1).mean()
        if config.orthogonality_weight != weight * large:
            layer.adapter_config["default"] = type(config)(
                **own_fields(config) | {"orthogonality_weight": weight * float(large)}
            )


def own_fields(config):
    return {k: v for k, v in vars(config).items() if k in type(config).__dataclass_fields__ and k != "peft_type"}


def floored_loss(weight, model, over):
    "The gradient of the loss with each B's norm taken as at least the mean norm of the layer's A's."
    for A, B, _ in active_experts(model):
        floor = A.stack().detach().flatten(1).norm(dim=1).mean()
        for E, least in ((A, 0.0), (B, floor)):
            with torch.enable_grad():
                V = E.stack().flatten(1)
                V = V / V.norm(dim=1, keepdim=True).clamp(min=least + 1e-6)
                (grad,) = torch.autograd.grad(weight * (V @ V.T).triu(1).abs().sum(), E.weight)
            E.weight.grad = grad if E.weight.grad is None else E.weight.grad + grad


def root_gates(down, route_down, route_up, x):
    "Both mixes with √w in place of w."
    return many_to_many(down, lambda v: route_down(v).sqrt(), lambda v: route_up(v).sqrt(), x)


def normed_gate(down, route_down, route_up, x):
    "The up-router reads z divided by its root mean square."
    return many_to_many(
        down, route_down, lambda z: route_up(z / (z.float().pow(2).mean(-1, keepdim=True).sqrt() + 1e-6).to(z.dtype)), x
    )


PAIRINGS["root-gates"], PAIRINGS["normed-gate"] = root_gates, normed_gate


def changes(ours: dict, d_in: int) -> dict[str, Change]:
    "All of them for a recipe's adapter."
    r, alpha, weight = ours["r"], ours["lora_alpha"], ours["orthogonality_weight"]
    off = {"orthogonality_weight": 0.0}
    return {
        "d2mora": Change("as published"),
        "no-loss": Change("λ = 0", off),
        "scale-root-r": Change("lora_alpha / √r", {"lora_alpha": alpha * math.sqrt(r)}),
        "scale-goat": Change("scale √(3 d_in / r)", {"lora_alpha": math.sqrt(3 * d_in * r)}),
        "scale-times-6": Change(
            "lora_alpha times 6.3 (the ratio of LoRA's rank to ours)", {"lora_alpha": alpha * 19 / 3}
        ),
        "distinct-up": Change("B's differ and sum to zero; up-router zero", start=distinct_up),
        "orthogonal-down": Change("orthogonal A's", start=orthogonal_down),
        "svd-down": Change("A's from the singular vectors of W", start=svd_down),
        "loss-rises": Change("λ from zero over the first half", before_step=partial(weight_rises, weight)),
        "loss-waits": Change("λ once ‖B‖ > ‖A‖ / 10", before_step=partial(weight_waits, weight)),
        "loss-floored": Change("norm of B in the loss at least ‖A‖", off, before_step=partial(floored_loss, weight)),
        "root-gates": Change("√w in both mixes", {"pairing": "root-gates"}),
        "normed-gate": Change("up-router reads z / rms(z)", {"pairing": "normed-gate"}),
        "rates-up-16": Change("B's rate 16 times the others' (LoRA+)", rates={"up": 16.0}),
        "rates-routers-10": Change("routers' rate 10 times the others'", rates={"routers": 10.0}),
    }


def together(names: list[str], known: dict[str, Change]) -> Change:
    "Several changes at once."
    parts = [known[name] for name in names]
    adapter, rates = {}, {}
    for part in parts:
        adapter |= part.adapter
        rates |= part.rates
    starts, steps = [p.start for p in parts if p.start], [p.before_step for p in parts if p.before_step]

    def start(model):
        for one in starts:
            one(model)

    def before_step(model, over):
        for one in steps:
            one(model, over)

    return Change(" + ".join(names), adapter, start, before_step if steps else None, rates)


# One run.


@torch.no_grad()
def held_out(model, batches) -> float:
    "Mean loss of held-out rows, nats per target token."
    model.eval()
    total, tokens = sum(row_losses(model, batch).sum(0) for batch in batches).tolist()
    model.train()
    return total / tokens


def inside(model, batch, task_norm: float) -> dict[str, float]:
    "What a figure of the first steps shows: means over the adapted layers, for one batch; after backward, before the step."
    seen: dict[str, list[float]] = {"output change": []}

    def measure(layer, inputs, output):
        base = layer.base_layer(*inputs)
        seen["output change"].append(float((output - base).norm() / base.norm()))

    adapted = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    handles = [layer.register_forward_hook(measure) for layer in adapted]
    ours = layers(model)
    with torch.no_grad():
        if ours:
            with record_routing(model) as record:
                model(**batch)
            for side in ("down", "up"):
                weights = [w[side] for w in record.values() if side in w]
                if weights:
                    seen[f"entropy {side}"] = [
                        float(-(w.clamp(min=1e-12).log() * w).sum(-1).mean() / math.log(w.shape[-1]))
                        for w in weights
                        if w.shape[-1] > 1
                    ]
        else:
            model(**batch)
    for handle in handles:
        handle.remove()
    loss_grads = []
    for layer in ours:
        A, B = layer.experts("default")
        for side, E in (("A", A.detach()), ("B", B.detach())):
            seen.setdefault(f"norm {side}", []).append(float(E.flatten(1).norm(dim=1).mean()))
            if len(E) > 1:
                pairs = pairwise_cosine(E).abs().triu(1).sum() / (len(E) * (len(E) - 1) / 2)
                seen.setdefault(f"cosine {side}", []).append(float(pairs))
        for E, weight in (
            (m, layer.adapter_config["default"].orthogonality_weight) for m in layer.active_experts()[0][:2]
        ):
            if weight > 0:
                with torch.enable_grad():
                    similar = pairwise_cosine(E.stack()).triu(1).abs().sum()
                    loss_grads.append(torch.autograd.grad(weight * similar, E.weight)[0].norm())
    found = {key: mean(values) for key, values in seen.items() if values}
    if loss_grads:
        loss_norm = float(torch.stack(loss_grads).norm())
        found["loss's share of the gradient"] = loss_norm / (loss_norm + task_norm)
    return found


def fit(recipe: Recipe, change: Change, rate: float, seed: int, steps: int, looks: int = 0) -> dict:
    "Train with a plain loop; held-out losses (step, loss), accuracy, and what is seen inside at the first steps."
    model, tokenizer = adapted_base(recipe, seed)
    rows = prepare(read_rows(recipe.data), recipe.data, tokenizer)
    collate, size = collator_for(tokenizer), recipe.training["per_device_train_batch_size"]
    held = [row for own in rows.validation.values() for row in own]
    held_batches = [collate(held[i : i + 100]) for i in range(0, len(held), 100)]
    if change.start:
        change.start(model)
    ours = bool(layers(model))
    if ours:
        groups = parameter_groups(model, **{side: {"lr": rate * times} for side, times in change.rates.items()})
    else:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    if any(True for _ in expert_layers(model)):
        attach_orthogonality(model, optimizer)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, recipe.training["warmup_steps"], steps)
    every, curve, figures, order = max(1, steps // 20), [[0, held_out(model, held_batches)]], [], []
    draw, trained = random.Random(seed), [p for p in model.parameters() if p.requires_grad]
    for step in range(1, steps + 1):
        if len(order) < size:
            order += draw.sample(range(len(rows.train)), len(rows.train))
        batch, order = collate([rows.train[i] for i in order[:size]]), order[size:]
        loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, recipe.training["max_grad_norm"])
        if not math.isfinite(float(norm)):
            return {"loss": None}
        if change.before_step:
            change.before_step(model, step / steps)
        if looks and (step <= 300 and step % (300 // looks) == 0):
            figures.append({"step": step} | inside(model, batch, min(float(norm), recipe.training["max_grad_norm"])))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % every == 0 or step == steps:
            curve.append([step, held_out(model, held_batches)])
    model.eval()
    accuracy = {}
    for task, own in test_rows(recipe.data, recipe.data.tasks, None).items():
        accuracy[task] = mean(
            float(g["right"]) for g in grade_rows(model, tokenizer, task, own, "choice", recipe.data.prompt)
        )
    return {
        "loss": curve[-1][1],
        "curve": curve,
        "accuracy": mean(accuracy.values()),
        "tasks": accuracy,
        "inside": figures,
    }


# The study.


def job(args, name: str, rate: float, seed: int, looks: int = 0) -> dict:
    "One run, or its file."
    path = args.runs / args.recipe / name / f"rate-{rate:g}" / f"seed-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    recipe, change = prepared(args, name)
    result = {"change": name, "rate": rate, "seed": seed, "steps": args.steps} | fit(
        recipe, change, rate, seed, args.steps, looks
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result) + "\n")
    print(
        f"{name}, rate {rate:g}, seed {seed}: loss {result['loss']}, accuracy {result.get('accuracy')}",
        file=sys.stderr,
        flush=True,
    )
    return result


def prepared(args, name: str) -> tuple[Recipe, Change]:
    "The recipe of a change or of plain LoRA."
    recipe = load_recipe(args.recipe, [f"data.validation_rows={HELD_OUT}", f"adapter.lora_alpha={args.lora_alpha}"])
    about = {
        "lora": "plain LoRA, as many parameters",
        "lora-same-rank": "plain LoRA of the rank of one expert",
        "one-to-one": "pairs, as many parameters, no loss",
        "one-to-many": "one A, as many parameters, no loss",
    }
    if name in about:
        return varied(recipe, adapters_at(recipe, methods=(name,))[name]), Change(about[name])
    known = changes(recipe.adapter, args.width)
    change = together(name.split("+"), known)
    return varied(recipe, recipe.adapter | change.adapter), change


def one_change(args, name: str) -> dict:
    "Search the learning rate by two seeds, then run all seeds at the best."
    losses: dict[float, float] = {}
    while todo := next_rates(losses, args.start, args.most):
        found = []
        for seed in CHOOSING_SEEDS:
            loss = job(args, name, todo[0], seed)["loss"]
            found.append(math.inf if loss is None else loss)
            if loss is None:
                break
        losses[todo[0]] = mean(found)
    rates = {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in sorted(losses.items())}
    best = best_rate(rates)
    runs = [job(args, name, best, seed, looks=15) for seed in args.seeds]
    return {"about": prepared(args, name)[1].about, "learning_rates": rates, "runs": runs}


def quiet() -> None:
    "One thread and no messages of libraries, in each process."
    import datasets

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def main(argv=None) -> None:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def listed(kind):
        return lambda text: [kind(part) for part in text.split(",")]

    names = ["lora", *changes({"r": 1, "lora_alpha": 1, "orthogonality_weight": 0.0}, 1)]
    parser.add_argument("--recipe", default="demo-hard")
    parser.add_argument(
        "--changes", type=listed(str), default=names, help="names, or several joined by +: " + ", ".join(names)
    )
    parser.add_argument("--seeds", type=listed(int), default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--start", type=float, default=3e-3, help="the learning rate where each search begins")
    parser.add_argument("--most", type=int, default=9, help="learning rates tried at most")
    parser.add_argument("--lora-alpha", type=float, default=24)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/starts")
    parser.add_argument("--output", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args(argv)
    quiet()
    started, recipe = time.monotonic(), load_recipe(args.recipe)
    args.width = adapted_base(recipe, 0)[0].config.hidden_size
    for name in args.changes:
        prepared(args, name)  # an unknown name is an error now
    if args.workers == 1:
        found = [one_change(args, name) for name in args.changes]
    else:
        with ProcessPoolExecutor(args.workers, get_context("spawn"), quiet) as pool:
            found = list(pool.map(partial(one_change, args), args.changes, chunksize=1))
    keys = ("recipe", "steps", "seeds", "lora_alpha", "start", "most")
    result = {key: getattr(args, key) for key in keys} | {"changes": dict(zip(args.changes, found))}
    result["command"] = "python benchmarks/mixture_starts.py " + " ".join(sys.argv[1:] if argv is None else argv)
    args.output.mkdir(parents=True, exist_ok=True)
    name = {"demo-hard": "hard-world-starts", "demo": "toy-starts"}.get(args.recipe, f"{Path(args.recipe).stem}-starts")
    write_text(args.output / f"{name}.json", json.dumps(result, indent=1) + "\n")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in this call", file=sys.stderr)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers
    main()
