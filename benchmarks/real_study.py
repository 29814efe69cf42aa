"""The comparison of chapter 12 on real rows: the methods on 16,000 real rows, on the base that real_base.py has made.

    python benchmarks/real_study.py                     # runs/real; writes nbs/results/compare-real.json
    python benchmarks/real_study.py --budget paper      # the paper's proportions: compare-real-paper.json

`d2mora.compare.compare` searches the learning rates by the loss on validation rows, trains and grades (`content` and `choice`). This adds
the loss of every run on test rows, on the whole row and on the answer alone, and the base without an adapter. What is finished in runs/real
is not done again: a study that was stopped, or is to have more seeds, goes on by the same command.
"""

import argparse
import json
import math
import os
import sys
from hashlib import sha256
from pathlib import Path
from statistics import mean, stdev

import torch
from hard_world import called, listed, side_by_side

from d2mora.compare import BUDGETS, METHODS, adapters_at, compare, comparison_report
from d2mora.data import DataConfig, collator_for, encode, read_task
from d2mora.evaluate import evaluate, load_target
from d2mora.recipe import Recipe, load_recipe
from d2mora.utils import write_text

ROOT = Path(__file__).resolve().parents[1]
PROTOCOLS, KINDS = ("content", "choice"), ("row", "answer")


@torch.no_grad()
def batch_losses(model, collator, rows: list[dict]) -> list[dict]:
    "For each encoded row the loss per token of all of it, and the summed loss of its answer, in nats."
    batch = collator(rows)
    following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1).float()
    losses = torch.nn.functional.cross_entropy(logits, following.flatten(), reduction="none").view(following.shape)
    counts = (following != -100).sum(1)
    return [
        {"row": (own.sum() / n).item(), "answer": own[row["answer_from"] - 1 :].sum().item()}
        for own, n, row in zip(losses, counts, rows)
    ]


def task_losses(model, tokenizer, config: DataConfig, rows: list[dict]) -> list[dict]:
    "Losses of a task's rows, in their order; rows of like length are read together."
    coded = encode({k: [row[k] for row in rows] for k in ("instruction", "input", "output")}, tokenizer, config)
    both = zip(coded["input_ids"], coded["target_start"])
    ready = [{"input_ids": ids, "target_start": 0, "answer_from": start} for ids, start in both]
    order, found = sorted(range(len(ready)), key=lambda i: len(ready[i]["input_ids"])), {}
    for start in range(0, len(order), 32):
        batch = order[start : start + 32]
        found |= dict(zip(batch, batch_losses(model, collator_for(tokenizer), [ready[i] for i in batch])))
    return [found[i] for i in range(len(rows))]


def interval(values: list[float]) -> dict:
    "Mean and its 95 % interval over rows."
    half = 1.959964 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"mean": mean(values), "half": half, "n": len(values)}


def loss_figures(recipe: Recipe, target: Path | None, limit: int) -> dict[str, dict]:
    "By kind of loss: mean and interval for each task, and over the tasks; of the base where there is no run."
    model, tokenizer, _ = load_target(target, None if target else recipe.base)
    longest = model.config.max_position_embeddings  # no test row is cut that the base can read
    config, found = (
        DataConfig(recipe.data.path, prompt=recipe.data.prompt, cutoff=longest),
        {kind: {} for kind in KINDS},
    )
    for task in recipe.data.tasks:
        rows = read_task(recipe.data.path, task, "test").to_list()[:limit]
        losses = task_losses(model.eval(), tokenizer, config, rows)
        for kind in KINDS:
            found[kind][task] = interval([row[kind] for row in losses])
    for own in found.values():
        half = math.sqrt(sum(f["half"] ** 2 for f in own.values())) / len(own)  # the rows of tasks are independent
        own["average"] = {"mean": mean(f["mean"] for f in own.values()), "half": half}
    return found


def losses_of(recipe: Recipe, folder: Path, limit: int) -> dict:
    "Losses of a finished run; what an earlier call has found is read."
    path = folder / f"test-losses-{limit}.json"
    if not path.is_file():
        write_text(path, json.dumps(loss_figures(recipe, folder, limit)))
    return json.loads(path.read_text())


def graded_base(recipe: Recipe, folder: Path, protocols, limit: int | None) -> dict:
    "Grades of the base without an adapter, by protocol; `folder` keeps the rows."
    folder.mkdir(parents=True, exist_ok=True)
    tasks, found = {"tasks": recipe.data.tasks, "data": recipe.data.path, "limit": limit}, {}
    for protocol in protocols:
        graded = evaluate(base=recipe.base, protocol=protocol, output=folder, progress=False, **tasks)
        kept = {t: {k: own[k] for k in ("n", "accuracy", "interval", "chance")} for t, own in graded["tasks"].items()}
        found[protocol] = {"average": graded["average"], "tasks": kept}
    return found


def study(recipe: Recipe, args, each) -> dict:
    "The comparison, the losses of its runs, and the base without an adapter."
    given = {"methods": args.methods, "seeds": args.seeds, "budget": args.budget, "limit": args.limit}
    result = compare(recipe, args.output, learning_rates=args.learning_rates, protocols=PROTOCOLS, each=each, **given)
    equal = adapters_at(recipe, "equal", args.methods)
    for run in result["runs"]:
        size = "equal" if equal[run["method"]] == result["methods"][run["method"]] else args.budget
        run["losses"] = losses_of(recipe, args.output / size / run["method"] / f"seed-{run['seed']}", args.limit)
    grades = graded_base(recipe, args.output / "frozen", PROTOCOLS, args.limit)
    result["frozen"] = {"grades": grades, "losses": loss_figures(recipe, None, args.limit)}
    result["base_sha256"] = sha256((Path(recipe.base) / "model.safetensors").read_bytes()).hexdigest()
    return result


def main(argv=None) -> None:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="base=FOLDER, section.key=value: values of benchmarks/real.yaml")
    parser.add_argument("--methods", type=listed(), default=list(METHODS))
    parser.add_argument(
        "--budget", choices=BUDGETS, default="equal", help="equal parameters, or the paper's proportions"
    )
    parser.add_argument("--seeds", type=listed(int), default=[0, 1, 2, 3, 4])
    parser.add_argument("--learning-rates", type=listed(float), default=[], help="try these instead of searching")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--limit", type=int, default=300, help="test rows a task")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/real")
    parser.add_argument("--results", type=Path, help="default: nbs/results/compare-real.json, compare-real-paper.json")
    args = parser.parse_args(argv)
    path = args.results or ROOT / "nbs/results" / f"compare-real{'-paper' * (args.budget == 'paper')}.json"
    with side_by_side(args.workers) as each:
        result = study(load_recipe(ROOT / "benchmarks/real.yaml", args.overrides), args, each)
    write_text(path, json.dumps(result | {"command": called("real_study", argv)}, indent=1) + "\n")
    print(comparison_report(result))


if __name__ == "__main__":
    os.chdir(ROOT)  # the recipe names its folders from here
    try:
        main()
    except ValueError as error:
        print(f"real_study: {error}", file=sys.stderr)
        sys.exit(2)
