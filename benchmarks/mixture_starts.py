"""How a mixture starts: D2MoRA with one change at a time (scale, start of A and B, loss, gate, learning rates), each at its own best rate.

    python benchmarks/mixture_starts.py                                 # the hard toy world: nbs/results/hard-world-starts.json
    python benchmarks/mixture_starts.py --recipe demo --changes d2mora,distinct-up   # another world: nbs/results/toy-starts.json
    python benchmarks/mixture_starts.py --steps 20 --seeds 0 --most 3 --runs runs/tiny --output runs/tiny           # a trial

A plain training loop of thirty lines, so that each change is a few lines that touch nothing of the library. A run is one JSON file under
--runs: the same command goes on with a study that was stopped. --workers runs go side by side, one thread each.
"""

import argparse
import copy
import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import transformers
from hard_world import called, listed, side_by_side

from d2mora.compare import CHOOSING_SEEDS, adapters_at, best_rate, next_rates, output_change, varied
from d2mora.data import collator_for, prepare, read_rows
from d2mora.evaluate import test_rows
from d2mora.orthogonality import active_experts, attach_orthogonality, expert_layers, similarity
from d2mora.recipe import Recipe, adapted_base, load_recipe
from d2mora.routers import PAIRINGS, many_to_many
from d2mora.scoring import grade_rows
from d2mora.train import row_losses
from d2mora.tuner import D2MoraLinear, parameter_groups, record_routing
from d2mora.utils import write_text

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 400  # rows
LOOKS = 15  # times that the inside of a run is looked at, in its first 300 steps


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


def norm(E):
    "Mean norm of a layer's experts (E, r, d)."
    return E.flatten(1).norm(dim=1).mean()


@torch.no_grad()
def distinct_up(model):
    "B's that differ and sum to zero, a tenth of A's norm; up-routers at zero: all weights equal, so no output changes."
    for layer in layers(model):
        A, B = layer.experts("default")
        drawn = torch.randn_like(B)
        drawn -= drawn.mean(0)
        B.copy_(drawn * norm(A) / norm(drawn) / 10)
        layer.d2mora_router_up["default"].weight.zero_()


def replace_down(A, rows):
    "Deal rows of length 1, (M·r, d_in), out to the A's, with the norm that they had."
    A.copy_(rows.reshape(A.shape[1], A.shape[0], -1).transpose(0, 1) * A.norm() / rows.norm())


@torch.no_grad()
def orthogonal_down(model):
    "All rows of all A's orthogonal to each other."
    for layer in layers(model):
        A, _ = layer.experts("default")
        replace_down(A, torch.linalg.qr(torch.randn(A.shape[-1], A.shape[0] * A.shape[1])).Q.T)


@torch.no_grad()
def svd_down(model):
    "The leading right singular vectors of the frozen weight."
    for layer in layers(model):
        A, _ = layer.experts("default")
        right = torch.linalg.svd(layer.get_base_layer().weight.float(), full_matrices=False).Vh
        replace_down(A, right[: A.shape[0] * A.shape[1]])


def set_weight(layer, weight):
    "λ of one layer."
    layer.adapter_config["default"] = copy.copy(layer.adapter_config["default"])
    layer.adapter_config["default"].orthogonality_weight = weight


def weight_rises(weight, model, over):
    "λ from zero to its value over the first half."
    for layer in layers(model):
        set_weight(layer, weight * min(1.0, 2 * over))


def weight_waits(weight, model, over):
    "λ only in layers whose B's have a tenth of the norm of their A's."
    for layer in layers(model):
        A, B = layer.experts("default")
        set_weight(layer, weight * float(norm(B) > norm(A) / 10))


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
        "d2mora-no-loss": Change("λ = 0", off),
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
    parts, whole = [known[name] for name in names], Change(" + ".join(names))
    for part in parts:
        whole.adapter |= part.adapter
        whole.rates |= part.rates
    for what in ("start", "before_step"):
        calls = [call for part in parts if (call := getattr(part, what))]
        setattr(whole, what, (lambda *given, calls=calls: [call(*given) for call in calls]) if calls else None)
    return whole


# One run.


@torch.no_grad()
def held_out(model, batches) -> float:
    "Mean loss of held-out rows, nats per target token."
    model.eval()
    total, tokens = sum(row_losses(model, batch).sum(0) for batch in batches).tolist()
    model.train()
    return total / tokens


def router_entropy(record: dict) -> dict[str, float]:
    "Entropy of the routing weights of each side, mean over layers and tokens, as a share of the largest one."
    found = {}
    for side in ("down", "up"):
        weights = [own[side] for own in record.values() if side in own and own[side].shape[-1] > 1]
        shares = [-(w * w.clamp(min=1e-12).log()).sum(-1).mean() / math.log(w.shape[-1]) for w in weights]
        if shares:
            found[f"entropy {side}"] = float(torch.stack(shares).mean())
    return found


def expert_figures(model) -> dict[str, float]:
    "Norms and mean |cosine| of A's and B's, mean over layers; the norm of the gradient of λ times the loss, over all."
    seen, gradients = {}, []
    for A, B, weight in active_experts(model):
        for side, E in (("A", A), ("B", B)):
            stack = E.stack().detach()
            seen.setdefault(f"norm {side}", []).append(float(norm(stack)))
            if len(stack) > 1:
                pairs = len(stack) * (len(stack) - 1) / 2
                seen.setdefault(f"cosine {side}", []).append(float(similarity(stack) / pairs))
            if weight > 0:
                with torch.enable_grad():
                    gradients.append(torch.autograd.grad(weight * similarity(E.stack()), E.weight)[0].norm())
    return {key: mean(own) for key, own in seen.items()} | {"loss": float(torch.tensor(gradients).norm())}


@torch.no_grad()
def inside(model, batch, task_norm: float) -> dict[str, float]:
    "What a figure of the first steps shows, for one batch; after clipping, before the step."
    if not layers(model):
        return {"output change": output_change(model, batch)}
    with record_routing(model) as record:
        found = {"output change": output_change(model, batch)}
    found |= router_entropy(record) | expert_figures(model)
    loss_norm = found.pop("loss")
    return found | ({"loss's share of the gradient": loss_norm / (loss_norm + task_norm)} if loss_norm else {})


def optimizer_of(model, rate: float, change: Change) -> torch.optim.Optimizer:
    "AdamW with the change's rates, and the orthogonality loss attached."
    if layers(model):
        groups = parameter_groups(model, **{side: {"lr": rate * times} for side, times in change.rates.items()})
    else:
        groups = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    if any(True for _ in expert_layers(model)):
        attach_orthogonality(model, optimizer)
    return optimizer


def batches_of(rows, collate, size: int, seed: int):
    "Batches of rows in random order, epoch after epoch."
    draw, order = random.Random(seed), []
    while True:
        if len(order) < size:
            order += draw.sample(range(len(rows)), len(rows))
        yield collate([rows[i] for i in order[:size]])
        order = order[size:]


def graded(model, tokenizer, recipe: Recipe) -> dict[str, float]:
    "Accuracy by task."
    style = recipe.data.prompt
    return {
        task: mean(float(row["right"]) for row in grade_rows(model, tokenizer, task, rows, "choice", style))
        for task, rows in test_rows(recipe.data, recipe.data.tasks, None).items()
    }


def fit(recipe: Recipe, change: Change, rate: float, seed: int, steps: int, whole: bool) -> dict:
    "Train with a plain loop: the last held-out loss; of a whole run also its curve, what is seen inside, and accuracy."
    (model, tokenizer), training = adapted_base(recipe, seed), recipe.training
    rows, collate = prepare(read_rows(recipe.data), recipe.data, tokenizer), collator_for(tokenizer)
    aside = [row for own in rows.validation.values() for row in own]
    held = [collate(aside[i : i + 100]) for i in range(0, len(aside), 100)]
    if change.start:
        change.start(model)
    optimizer, trained = optimizer_of(model, rate, change), [p for p in model.parameters() if p.requires_grad]
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, training["warmup_steps"], steps)
    curve, figures = [[0, held_out(model, held)]], []
    drawn = batches_of(rows.train, collate, training["per_device_train_batch_size"], seed)
    for step, batch in zip(range(1, steps + 1), drawn):
        model(**batch).loss.backward()
        task_norm = float(torch.nn.utils.clip_grad_norm_(trained, training["max_grad_norm"]))
        if not math.isfinite(task_norm):
            return {"loss": None}
        if change.before_step:
            change.before_step(model, step / steps)
        if whole and step <= 300 and step % (300 // LOOKS) == 0:
            figures.append({"step": step} | inside(model, batch, min(task_norm, training["max_grad_norm"])))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == steps or whole and step % max(1, steps // 20) == 0:
            curve.append([step, held_out(model, held)])
    if not whole:
        return {"loss": curve[-1][1]}
    tasks = graded(model.eval(), tokenizer, recipe)
    found = {"loss": curve[-1][1], "curve": curve, "accuracy": mean(tasks.values()), "tasks": tasks}
    return found | {"inside": figures}


# The study.


def job(args, name: str, rate: float, seed: int, whole: bool = False) -> dict:
    "One run, or its file."
    path = args.runs / args.recipe / name / f"rate-{rate:g}" / f"seed-{seed}.json"
    if not path.is_file():
        found = fit(*prepared(args, name), rate, seed, args.steps, whole)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"change": name, "rate": rate, "seed": seed, "steps": args.steps} | found) + "\n")
        said = f"loss {found['loss']}, accuracy {found.get('accuracy')}"
        print(f"{name}, rate {rate:g}, seed {seed}: {said}", file=sys.stderr, flush=True)
    return json.loads(path.read_text())


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


def known_rates(args) -> dict[str, dict]:
    "Held-out loss by learning rate of the methods that hard_world.py has compared on the same terms."
    path = args.output / "hard-world.json"
    if args.recipe != "demo-hard" or not path.is_file():
        return {}
    result = json.loads(path.read_text())
    same = (
        result["training"]["max_steps"] == args.steps and result["methods"]["d2mora"]["lora_alpha"] == args.lora_alpha
    )
    return result["learning_rates"] if same else {}


def one_change(args, name: str) -> dict:
    "Search the learning rate by two seeds, unless hard_world.py has done it; then run all seeds at the best."
    losses, rates = dict[float, float](), known_rates(args).get(name, {})
    while not rates and (todo := next_rates(losses, args.start, args.most)):
        found = [job(args, name, todo[0], seed)["loss"] for seed in CHOOSING_SEEDS]
        losses[todo[0]] = math.inf if None in found else mean(found)
    rates = rates or {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in sorted(losses.items())}
    runs = [job(args, name, best_rate(rates), seed, whole=True) for seed in args.seeds]
    return {"about": prepared(args, name)[1].about, "learning_rates": rates, "runs": runs}


def main(argv=None) -> None:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["lora", *changes({"r": 1, "lora_alpha": 1, "orthogonality_weight": 0.0}, 1)]
    parser.add_argument("--recipe", default="demo-hard")
    about = "names, or several joined by +: " + ", ".join(names)
    parser.add_argument("--changes", type=listed(), default=names, help=about)
    parser.add_argument("--seeds", type=listed(int), default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--start", type=float, default=3e-3, help="the learning rate where each search begins")
    parser.add_argument("--most", type=int, default=9, help="learning rates tried at most")
    parser.add_argument("--lora-alpha", type=float, default=24)
    parser.add_argument("--workers", type=int, default=2, help="changes side by side")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/starts")
    parser.add_argument("--output", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args(argv)
    started, (base, _) = time.monotonic(), adapted_base(load_recipe(args.recipe), 0)
    args.width = base.config.hidden_size
    for name in args.changes:
        prepared(args, name)  # an unknown name is an error now
    with side_by_side(args.workers) as each:
        found = list(each(partial(one_change, args), args.changes))
    keys = ("recipe", "steps", "seeds", "lora_alpha", "start", "most")
    result = {key: getattr(args, key) for key in keys} | {"changes": dict(zip(args.changes, found))}
    result["command"] = called("mixture_starts", argv)
    args.output.mkdir(parents=True, exist_ok=True)
    name = {"demo-hard": "hard-world-starts", "demo": "toy-starts"}.get(args.recipe, f"{Path(args.recipe).stem}-starts")
    write_text(args.output / f"{name}.json", json.dumps(result, indent=1) + "\n")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in this call", file=sys.stderr)


if __name__ == "__main__":
    main()
