"""The comparison of notebook 12 on real rows: the methods on 16,000 real rows, on the base that real_base.py has made.

    python benchmarks/real_study.py --seeds 0,1,2       # runs/real; writes nbs/results/compare-real.json after every run
    python benchmarks/real_study.py --budget paper      # the paper's proportions: compare-real-paper.json

Seed 0 trains every method with three learning rates, at equal parameters; the loss on validation rows chooses one for both budgets. These
runs are whole: a rate that is best after a tenth of the steps may break a run later. Then every method is trained, seed by seed, and graded
on real test rows by `content` and `choice`, and by its loss on each of them: on the whole row, and on the answer alone. Two runs go at a
time, a thread each (`--workers`).

What is finished in runs/real is not done again, so a study that was killed, or is to have more seeds, goes on where it stopped. `--add` goes
on from the result file alone: its whole seeds stay, whichever are asked for, and none of their runs need be here. Where a processor rounds
otherwise, real_base.py makes another base: `kept_seeds` says on which base each kept seed was run. Methods are compared within a seed.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from statistics import mean, stdev

import datasets
import torch
import transformers

from d2mora.compare import (
    BUDGETS,
    METHODS,
    SCALINGS,
    about_comparison,
    adapters_at,
    best_rate,
    held_out_loss,
    one_run,
    varied,
)
from d2mora.data import DataConfig, collator_for, encode, read_task
from d2mora.evaluate import evaluate, load_target, paired, read_graded
from d2mora.recipe import Recipe, load_recipe
from d2mora.tasks import TASKS
from d2mora.utils import write_text

ROOT = Path(__file__).resolve().parents[1]
PROTOCOLS, KINDS = ("content", "choice"), ("row", "answer")
REFERENCE = "d2mora"  # the method that the others are held against, row by row
CHOOSING_SEED = 0  # the one whose runs choose the learning rates

# --- losses on test rows, row by row -----------------------------------------------------------------------------------------


@torch.no_grad()
def batch_losses(model, collator, rows: list[dict]) -> list[dict]:
    "For each encoded row the loss per token of all of it, and the summed loss of its answer, in nats."
    batch = collator(rows)
    following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), following.flatten(), reduction="none"
    ).view(following.shape)
    real = (following != -100).sum(1)
    return [
        {"row": (own.sum() / n).item(), "answer": own[row["answer_from"] - 1 :].sum().item()}
        for own, n, row in zip(losses, real, rows)
    ]


def task_losses(model, tokenizer, config: DataConfig, rows: list[dict]) -> list[dict]:
    "Losses of a task's rows, in their order; rows of like length are read together."
    columns = {k: [row[k] for row in rows] for k in ("instruction", "input", "output")}
    coded, found = encode(columns, tokenizer, config), {}
    ready = [
        {"input_ids": ids, "target_start": 0, "answer_from": start}
        for ids, start in zip(coded["input_ids"], coded["target_start"])
    ]
    order = sorted(range(len(ready)), key=lambda i: len(ready[i]["input_ids"]))
    for start in range(0, len(order), 32):
        batch = order[start : start + 32]
        found |= dict(zip(batch, batch_losses(model, collator_for(tokenizer), [ready[i] for i in batch])))
    return [found[i] for i in range(len(rows))]


def test_losses(recipe: Recipe, folder: Path, limit: int, target: Path | None) -> dict[str, list[dict]]:
    "Losses of every test row by task; what an earlier call has found is read."
    path = folder / "test-losses.json"
    if path.is_file() and (kept := json.loads(path.read_text()))["limit"] == limit:
        return kept["losses"]
    model, tokenizer, _ = load_target(target, None if target else recipe.base)
    config = DataConfig(
        recipe.data.path, prompt=recipe.data.prompt, cutoff=model.config.max_position_embeddings
    )  # no test row is cut that the base can read
    losses = {
        task: task_losses(model.eval(), tokenizer, config, read_task(recipe.data.path, task, "test").to_list()[:limit])
        for task in TASKS
    }
    write_text(path, json.dumps({"limit": limit, "losses": losses}))
    return losses


# --- figures -----------------------------------------------------------------------------------------------------------------


def interval(values: list[float]) -> dict:
    "Mean and its 95 % interval over rows."
    half = 1.959964 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"mean": mean(values), "half": half, "n": len(values)}


def over_tasks(found: dict[str, dict]) -> dict:
    "The unweighted mean of tasks, whose rows are independent."
    return {
        "mean": mean(f["mean"] for f in found.values()),
        "half": math.sqrt(sum(f["half"] ** 2 for f in found.values())) / len(found),
        "n": sum(f["n"] for f in found.values()),
    }


def loss_figures(
    losses: dict[str, list[dict]], trained: list[str], minus: dict[str, list[dict]] | None = None
) -> dict[str, dict]:
    "By kind of loss and task, and over the trained tasks: mean and interval; of the differences on the same rows where another's losses are given."
    found = {}
    for kind in KINDS:
        values = {
            task: [row[kind] - (minus[task][i][kind] if minus else 0) for i, row in enumerate(own)]
            for task, own in losses.items()
        }
        found[kind] = (own := {task: interval(v) for task, v in values.items()}) | {
            "average": over_tasks({task: own[task] for task in trained})
        }
    return found


def held_against(folder: Path, reference: Path, recipe: Recipe, limit: int) -> dict:
    "A finished run against another on the same rows: McNemar by protocol, differences of losses."
    tests = {p: paired(read_graded(folder, p), read_graded(reference, p)) for p in PROTOCOLS}
    return tests | {
        "losses": loss_figures(
            test_losses(recipe, folder, limit, folder),
            recipe.data.tasks,
            test_losses(recipe, reference, limit, reference),
        )
    }


# --- the study ---------------------------------------------------------------------------------------------------------------


@contextmanager
def clocked(path: Path):
    "Sum the processor's seconds of all calls in a file; what was finished before costs nothing worth counting."
    begun, before = time.process_time(), json.loads(path.read_text()) if path.is_file() else 0
    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (spent := time.process_time() - begun) > 1:
            write_text(path, json.dumps(round(before + spent, 1)))


def seconds(path: Path) -> float:
    return json.loads(path.read_text()) if path.is_file() else 0.0


def frozen(recipe: Recipe, folder: Path, limit: int) -> dict:
    "The base without an adapter."
    folder.mkdir(parents=True, exist_ok=True)
    grades = {
        p: evaluate(base=recipe.base, data=recipe.data.path, protocol=p, limit=limit, output=folder, progress=False)
        for p in PROTOCOLS
    }
    kept = ("n", "accuracy", "interval", "chance")
    return {
        "grades": {
            p: {
                "average": g["average"],
                "average_interval": g["average_interval"],
                "tasks": {t: {k: own[k] for k in kept} for t, own in g["tasks"].items()},
            }
            for p, g in grades.items()
        },
        "losses": loss_figures(test_losses(recipe, folder, limit, None), recipe.data.tasks),
    }


def finished(recipe: Recipe, folder: Path, method: str, limit: int) -> dict:
    "Train, grade, measure; or read what is there."
    clock = folder / "seconds.json"
    if not clock.is_file() or not (folder / "test-losses.json").is_file():
        with clocked(clock):
            one_run(recipe, folder, PROTOCOLS, limit, list(TASKS)), test_losses(recipe, folder, limit, folder)
    return (
        {"method": method, "cpu_seconds": round(seconds(clock))}
        | one_run(recipe, folder, PROTOCOLS, limit, list(TASKS))
        | {"losses": loss_figures(test_losses(recipe, folder, limit, folder), recipe.data.tasks)}
    )


def quiet() -> None:
    "One thread, and no messages of libraries: of each process."
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    (
        transformers.logging.set_verbosity_error(),
        transformers.logging.disable_progress_bar(),
        datasets.disable_progress_bars(),
    )


@contextmanager
def workers(count: int) -> Iterator[Callable]:
    "A `map` whose calls run in so many processes of their own, or in this one."
    if count == 1:
        yield map
    else:
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), quiet) as pool:
            yield pool.map


def place(folder: Path, method: str, rate: float, seed: int) -> Path:
    "Where a run lies."
    return folder / method / f"learning-rate-{rate:g}" / f"seed-{seed}"


def tried(recipe: Recipe, folder: Path) -> float | None:
    "Validation loss of a run."
    with clocked(folder / "seconds.json"):
        return held_out_loss(recipe, folder)


def choose(
    recipe: Recipe, folder: Path, adapters: dict[str, dict], args, each: Callable
) -> dict[str, dict[str, float | None]]:
    "Validation loss by method and learning rate: whole runs of one seed."
    rates: dict[str, dict[str, float | None]] = {m: {} for m in adapters}
    tries = [(m, rate) for m in adapters for rate in args.learning_rates]
    jobs = [
        (varied(recipe, adapters[m], learning_rate=rate, seed=CHOOSING_SEED), place(folder, m, rate, CHOOSING_SEED))
        for m, rate in tries
    ]
    for loss, (m, rate) in zip(each(tried, *zip(*jobs)), tries):
        rates[m][f"{rate:g}"] = loss
    return rates


def kept(path: Path, result: dict, rates: list[float]) -> dict:
    "What a result file of the same study holds, to add seeds to: its choice of learning rates, and the whole seeds with their base."
    if not path.is_file():
        raise ValueError(
            f"--add: there is no {path} to add seeds to. Leave it out for a new study, or name another --results"
        )
    old = json.loads(path.read_text())
    other = ["learning rates to choose from"] * any(
        set(own) != {f"{rate:g}" for rate in rates} for own in old["learning_rates"].values()
    )
    other += [
        key
        for key, value in result.items()
        if key not in ("command", "planned_seeds", "base_sha256") and old.get(key) != json.loads(json.dumps(value))
    ]
    if other:
        raise ValueError(
            f"{path} is of another study, with other {', '.join(other)}. Leave out --add, or name another --results"
        )
    whole = [
        seed for seed in old["planned_seeds"] if sum(r["seed"] == seed for r in old["runs"]) == len(result["methods"])
    ]
    bases = {str(seed): old.get("kept_seeds", {}).get(str(seed), old["base_sha256"]) for seed in whole}
    return {key: old[key] for key in ("learning_rates", "rates_left_cpu_seconds", "frozen")} | {
        "planned_seeds": list(dict.fromkeys([*whole, *result["planned_seeds"]])),
        "kept_seeds": bases,
        "runs": [r for r in old["runs"] if r["seed"] in whole],
        "paired": {seed: tests for seed, tests in old["paired"].items() if int(seed) in whole},
    }


def begun(recipe: Recipe, folder: Path, equal: dict[str, dict], args, each: Callable) -> dict:
    "Learning rates, chosen at equal parameters, and the base without an adapter; no runs yet."
    rates = choose(recipe, folder, equal, args, each)
    left = [
        place(folder, m, float(rate), CHOOSING_SEED) / "seconds.json"
        for m, losses in rates.items()
        for rate in losses
        if float(rate) != best_rate(losses)
    ]
    return {
        "learning_rates": rates,
        "rates_left_cpu_seconds": round(sum(map(seconds, left))),
        "frozen": frozen(recipe, folder / "frozen", args.limit),
        "kept_seeds": {},
        "runs": [],
        "paired": {},
    }


def study(recipe: Recipe, folder: Path, args, each: Callable) -> None:
    "Every method with every seed, seed by seed; the result file is renewed after each run. `each` is a `map`."
    adapters, equal = (adapters_at(recipe, budget, args.methods, args.scaling) for budget in (args.budget, "equal"))
    command = f"python benchmarks/real_study.py{' --budget paper' * (args.budget == 'paper')} --seeds {','.join(map(str, args.seeds))}{' --scaling ratio' * (args.scaling == 'ratio')}{' --add' * args.add}"
    result = about_comparison(recipe, args.budget, args.limit) | {
        "command": command,
        "planned_seeds": args.seeds,
        "methods": adapters,
    }
    result["rows"] = {
        "train": recipe.training["max_steps"] * recipe.training["per_device_train_batch_size"],
        "validation": recipe.data.validation_rows,
    }
    result["base_sha256"] = sha256((Path(recipe.base) / "model.safetensors").read_bytes()).hexdigest()
    result |= kept(args.results, result, args.learning_rates) if args.add else begun(recipe, folder, equal, args, each)
    rates, done = result["learning_rates"], len(result["runs"])
    at = {
        m: folder if adapters[m] == equal[m] else folder / args.budget for m in adapters
    }  # one size at both budgets: one run
    where = {
        (seed, m): place(at[m], m, best_rate(rates[m]), seed)
        for seed in result["planned_seeds"]
        if str(seed) not in result["kept_seeds"]
        for m in adapters
    }
    jobs = [
        (varied(recipe, adapters[m], learning_rate=best_rate(rates[m]), seed=seed), run, m, args.limit)
        for (seed, m), run in where.items()
    ]
    for run, (seed, method) in zip(each(finished, *zip(*jobs)) if jobs else (), where):
        result["runs"].append(run)
        rivals = [r["method"] for r in result["runs"] if r["seed"] == seed and r["method"] != REFERENCE]
        if method == REFERENCE:
            result["paired"][str(seed)] = {
                m: held_against(where[seed, m], where[seed, REFERENCE], recipe, args.limit) for m in rivals
            }
        write_text(args.results, json.dumps(result, indent=1) + "\n")
        print(f"{len(result['runs'])} of {done + len(jobs)} runs: {method}, seed {seed}", file=sys.stderr, flush=True)


def main(argv=None) -> None:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="base=FOLDER, section.key=value: values of benchmarks/real.yaml")
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser.add_argument(
        "--methods",
        type=numbers(str),
        default=list(METHODS),
        help=f"{REFERENCE} is the one that the others are held against",
    )
    parser.add_argument(
        "--budget", choices=BUDGETS, default="equal", help="equal parameters, or the paper's proportions"
    )
    parser.add_argument(
        "--scaling",
        choices=SCALINGS,
        default="alpha",
        help="one lora_alpha for all methods, or (the committed results) one lora_alpha / r",
    )
    parser.add_argument(
        "--seeds",
        type=numbers(int),
        default=[0, 1, 2, 3, 4],
        help=f"runs of seed {CHOOSING_SEED} choose the learning rates, whether it stands here or not",
    )
    parser.add_argument("--learning-rates", type=numbers(float), default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--limit", type=int, default=300, help="test rows a task")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/real")
    parser.add_argument(
        "--add",
        action="store_true",
        help="add the seeds to those that are whole in the result file, at its learning rates; its runs need not be here",
    )
    parser.add_argument("--results", type=Path, help="default: nbs/results/compare-real.json, compare-real-paper.json")
    args = parser.parse_args(argv)
    args.results = args.results or ROOT / "nbs/results" / f"compare-real{'-paper' * (args.budget == 'paper')}.json"
    with workers(args.workers) as each:
        study(load_recipe(ROOT / "benchmarks/real.yaml", args.overrides), args.output, args, each)


if __name__ == "__main__":
    quiet()
    os.chdir(ROOT)  # the recipe names its folders from here
    try:
        main()
    except ValueError as error:
        print(f"real_study: {error}", file=sys.stderr), sys.exit(2)
