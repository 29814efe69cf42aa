"""Commonsense-170K on a base that knows something: SmolLM2-135M, labels against texts, LoRA against mixtures.

    make smollm2                                                          # the base, in models/smollm2-135m
    python benchmarks/smollm2.py --data FOLDER                            # everything: days on two cores, an evening on one GPU
    python benchmarks/smollm2.py --data FOLDER --share 16 --formats cloze --methods lora,d2mora --seeds 0 --limit 500
    python benchmarks/smollm2.py --data FOLDER --minutes 9 --learning-rates 1e-3,2e-3 --formats labels,cloze --methods lora,d2mora
    python benchmarks/smollm2.py --table                                  # what there is so far

A job is a format (the recipe smollm2-135m or smollm2-135m-cloze), a method at the recipe's number of parameters, a learning rate, a seed,
and a share of the epoch (16: a sixteenth of the steps). Of each format and method the first seed searches the learning rate: it is doubled
and halved until the best, by held-out loss, has worse ones on both sides. Jobs at the best rate are graded on test rows by `choice` and
`content`, and so is the base without an adapter. Every job writes a small JSON of its own to benchmarks/results/smollm2 as soon as it is
done, and what is done is not done again: the study grows by whoever runs it next. When the time is up, jobs save a checkpoint and stop; the
same command goes on from there while the runs (in runs/smollm2) are kept.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import mean

import torch
import transformers

from d2mora.compare import METHODS, adapters_at, next_rates, varied
from d2mora.data import find_file, read_file, task_file
from d2mora.evaluate import evaluate, paired, read_graded
from d2mora.recipe import Recipe, load_recipe
from d2mora.tasks import TASKS
from d2mora.train import begun, read_metrics, train, validation_losses
from d2mora.utils import write_text

ROOT = Path(__file__).resolve().parents[1]
FORMATS = {"labels": "smollm2-135m", "cloze": "smollm2-135m-cloze"}  # the recipe of each
PROTOCOLS = ("choice", "content")
START = 1e-3  # where the search for a learning rate begins


@dataclass(frozen=True)
class Job:
    "One adapter to train, or the frozen base."

    format: str = "none"
    method: str = "frozen"
    rate: float = 0.0
    seed: int = 0
    share: int = 1  # so many jobs of this length make an epoch
    graded: bool = False  # on test rows

    @property
    def name(self) -> str:
        return (
            "frozen"
            if self.method == "frozen"
            else f"{self.format}-{self.method}-rate-{self.rate:g}-seed-{self.seed}-share-{self.share}"
        )


# --- which jobs are wanted ---------------------------------------------------------------------------------------------------


def held_out(result: dict) -> float:
    "Mean over tasks of the loss on held-out rows; infinite where training broke down."
    return mean(last for _, last in result["held_out"].values()) if result.get("held_out") else math.inf


def wanted(results: dict[str, dict], args) -> list[Job]:
    "Jobs that are not done yet and can begin now, the most wanted first."
    jobs = [Job(graded=True)]
    for style, method in product(args.formats, args.methods):
        job = Job(style, method, seed=args.seeds[0], share=args.share)
        losses = {
            r["job"]["rate"]: held_out(r)
            for r in results.values()
            if Job(**r["job"] | {"rate": 0.0, "graded": False}) == job
        }
        todo = (
            [rate for rate in args.learning_rates if rate not in losses]
            if args.learning_rates
            else next_rates(losses, START)
        )
        jobs += [replace(job, rate=rate) for rate in todo]
        if not todo:
            jobs += [
                replace(job, rate=min(losses, key=lambda rate: losses[rate]), seed=seed, graded=True)
                for seed in args.seeds
            ]
    return [job for job in jobs if not finished(results.get(job.name), job, args.limit)]


def finished(result: dict | None, job: Job, limit: int | None) -> bool:
    "Whether a result says all that a job would; rows that were graded once count, however few are asked for."
    if result is None or not job.graded:
        return result is not None
    enough = lambda had: had is None or limit is not None and had >= limit
    return all(p in result.get("grades", {}) and enough(result["grades"][p]["limit"]) for p in PROTOCOLS)


# --- one job -----------------------------------------------------------------------------------------------------------------


class Eager(transformers.TrainerCallback):
    "On a CPU, attention written out, whose backward pass is faster there than the fused one's."

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.device.type == "cpu":
            model.get_base_model().set_attn_implementation("eager")


def recipe_of(job: Job, args) -> Recipe:
    "The recipe of a job: its method's adapter, its rate, seed and number of steps."
    recipe = load_recipe(
        FORMATS[job.format],
        {"base": str(args.base), "data.path": str(args.data), "data.validation_rows": args.validation_rows},
    )
    steps = max(
        1,
        (args.rows - args.validation_rows)
        // (recipe.training["per_device_train_batch_size"] * recipe.training["gradient_accumulation_steps"])
        // job.share,
    )
    adapter = adapters_at(recipe, "equal", (job.method,), "ratio")[
        job.method
    ]  # one lora_alpha / r for all, as in the results that are there
    return varied(
        recipe,
        adapter,
        learning_rate=job.rate,
        seed=job.seed,
        max_steps=steps,
        warmup_steps=max(1, steps // 30),
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


def about(args) -> dict:
    "On what a job was run."
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"CPU, {torch.get_num_threads()} thread ({platform.machine()})",
        "dtype": "bfloat16",
        "workers": args.workers,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "marks": args.marks,
    }


def trained(job: Job, run: Path, args) -> dict:
    "Train, or go on; the figures of the run."
    recipe, clock = recipe_of(job, args), time.perf_counter()
    spent = json.loads((run / "seconds.json").read_text()) if (run / "seconds.json").is_file() else 0.0
    try:
        train(recipe, run, [Eager()], resume=begun(run))
    except FloatingPointError as error:
        return {"broke_down": str(error)[:200]}
    finally:
        if run.is_dir():
            write_text(run / "seconds.json", json.dumps(spent + time.perf_counter() - clock))
    lines = read_metrics(run)
    seconds, tokens = json.loads((run / "seconds.json").read_text()), max(line.get("tokens", 0) for line in lines)
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "adapter": recipe.adapter,
        "steps": recipe.training["max_steps"],
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_bytes": peak,
        "held_out": validation_losses(run),
    }


def bits(graded: list[dict]) -> str:
    "Which rows were right, in their order, as hexadecimal digits behind a 1."
    return f"{int('1' + ''.join(str(int(g['right'])) for g in graded), 2):x}"


def grades(job: Job, run: Path, args) -> dict:
    "Grades by protocol: accuracy by task with its interval, and which rows were right."
    found = {}
    for protocol in PROTOCOLS:
        whole = {"base": str(args.base)} if job.method == "frozen" else {"target": run}
        result = evaluate(
            **whole,
            protocol=protocol,
            tasks=args.tasks,
            limit=args.limit,
            data=str(args.data),
            output=run,
            batch_size=args.batch_size,
            progress=False,
        )
        rows = sorted(read_graded(run, protocol), key=lambda g: g["row"])
        kept = {
            t: {k: own[k] for k in ("n", "accuracy", "by_length", "interval", "chance")}
            | {"right": bits([g for g in rows if g["task"] == t][: own["n"]])}
            for t, own in result["tasks"].items()
        }
        found[protocol] = {
            "limit": args.limit,
            "average": result["average"],
            "average_interval": result["average_interval"],
            "tasks": kept,
        }
    return found


def work(job: Job, args) -> None:
    "What a job's process does."
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    run, path = args.output / job.name, args.results / f"{job.name}.json"
    run.mkdir(parents=True, exist_ok=True) if job.method == "frozen" else None
    old = json.loads(path.read_text()) if path.is_file() else {}
    if not old:
        old = (
            {"job": asdict(replace(job, graded=False))}
            | about(args)
            | ({} if job.method == "frozen" else trained(job, run, args))
        )
    args.results.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(old, indent=1) + "\n")
    if job.graded:
        write_text(path, json.dumps(old | {"grades": grades(job, run, args)}, indent=1) + "\n")


# --- many jobs ---------------------------------------------------------------------------------------------------------------


def read_results(folder: Path, marks: dict | None = None) -> dict[str, dict]:
    "All results by name; an error if one was made with another base or with other data."
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for name, result in found.items():
        other = [what for what, mark in (marks or {}).items() if result["marks"][what] != mark]
        if other:
            raise ValueError(
                f"{folder / name}.json was made with another {' and other '.join(other)}: name another folder by --results and --output; nothing was changed"
            )
    return found


def start(job: Job, args) -> multiprocessing.Process:
    "A process of its own for a job."
    print(f"begin {job.name}{' (and grade it)' * job.graded}", file=sys.stderr, flush=True)
    process = multiprocessing.get_context("spawn").Process(target=work, args=(job, args))
    process.start()
    return process


def study(args) -> None:
    "Run jobs side by side until all are done, the time is up, or the process is asked to stop."
    end, running, failed = time.monotonic() + 60 * args.minutes, {}, set()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while time.monotonic() < end:
            for job, process in [(j, p) for j, p in running.items() if not p.is_alive()]:
                del running[job]
                print(f"{'end' if process.exitcode == 0 else 'failed:'} {job.name}", file=sys.stderr, flush=True)
                if process.exitcode:
                    failed.add(job)
            todo = next_jobs(read_results(args.results, args.marks), [*running], failed, args)
            for job in todo[: args.workers - len(running)]:
                running[job] = start(job, args)
            if not running:
                break
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.terminate()  # a training saves a checkpoint, a grading keeps its rows
        for process in running.values():
            process.join(90)
            process.kill()
    if failed:
        raise ValueError(
            f"{len(failed)} jobs failed ({', '.join(sorted(job.name for job in failed))}): see above; the others are in {args.results}"
        )


def next_jobs(results: dict[str, dict], running: list[Job], failed: set[Job], args) -> list[Job]:
    "Jobs to begin now: a search for a rate waits for those of its own that are under way, before it names others."
    same = lambda a, b: (a.format, a.method, a.share) == (b.format, b.method, b.share)
    jobs = [job for job in wanted(results, args) if job.name not in {j.name for j in (*running, *failed)}]
    first = {rate for rate in args.learning_rates or next_rates({}, START)}
    return [
        job
        for job in jobs
        if job.graded or job.rate in first or not any(same(job, other) and not other.graded for other in running)
    ]


def throughput(workers: int, args, steps: int = 30) -> float:
    "Tokens per second of so many jobs side by side, all together, each with a few steps."
    with tempfile.TemporaryDirectory() as aside:
        short = argparse.Namespace(
            **vars(args) | {"output": Path(aside) / "runs", "results": Path(aside) / "results", "workers": workers}
        )
        jobs = [Job("cloze", "lora", START, seed, max(1, args.rows // 32 // steps)) for seed in range(workers)]
        processes = [start(job, short) for job in jobs]
        for process in processes:
            process.join()
        return sum(r["tokens_per_second"] for r in read_results(short.results).values())


def best_workers(args) -> int:
    "How many jobs side by side pay on this GPU: the number is doubled as long as a tenth more tokens come out."
    rates = {1: throughput(1, args)}
    while (n := 2 * max(rates)) <= 16:
        rates[n] = throughput(n, args)
        if rates[n] < 1.1 * rates[n // 2]:
            break
    print(f"tokens per second by jobs side by side: {rates}", file=sys.stderr)
    return max(rates, key=lambda n: rates[n])


# --- what came of it ---------------------------------------------------------------------------------------------------------


def rights(result: dict, protocol: str) -> list[dict]:
    "The graded rows of a result, as `paired` takes them."
    return [
        {"hash": f"{task} {i}", "task": task, "right": bit == "1"}
        for task, own in result["grades"][protocol]["tasks"].items()
        for i, bit in enumerate(f"{int(own['right'], 16):b}"[1:])
    ]


def best(results: Iterable[dict], style: str, method: str, share: int) -> list[dict]:
    "The graded results of a format and a method."
    return [
        r
        for r in results
        if r.get("grades") and (r["job"]["format"], r["job"]["method"], r["job"]["share"]) == (style, method, share)
    ]


def table(results: dict[str, dict], protocol: str) -> "list[dict]":
    "A row for the frozen base and for each format, method and share that was graded: accuracies in percent, held-out loss, rate, rates tried, device."
    rows = [("frozen base", "", "", [results["frozen"]])] if results.get("frozen", {}).get("grades") else []
    keys = sorted(
        {
            (r["job"]["format"], r["job"]["share"], r["job"]["method"])
            for r in results.values()
            if r["job"]["method"] != "frozen"
        }
    )
    rows += [
        (method, style, f"1/{share}", found)
        for style, share, method in keys
        if (found := best(results.values(), style, method, share))
    ]
    shown = []
    for method, style, share, found in rows:
        own = [r["grades"][protocol] for r in found]
        tried = sorted(
            r["job"]["rate"]
            for r in results.values()
            if (r["job"]["format"], r["job"]["method"], f"1/{r['job']['share']}") == (style, method, share)
        )
        low, high = own[0]["average_interval"]
        shown.append(
            {
                "method": method,
                "format": style,
                "epoch": share,
                "seeds": len(found),
                **{t: round(100 * mean(g["tasks"][t]["accuracy"] for g in own), 1) for t in own[0]["tasks"]},
                "average": round(100 * mean(g["average"] for g in own), 1),
                "95 % interval over rows": f"{100 * low:.1f} to {100 * high:.1f}" if len(own) == 1 else "",
                "rows a task": own[0]["limit"] or "all",
                "held-out loss": round(mean(map(held_out, found)), 3) if style else None,
                "rate": found[0]["job"]["rate"] or None,
                "rates tried": f"{tried[0]:g} to {tried[-1]:g}" if tried else "",
                "device": found[0]["device"],
            }
        )
    return shown


def compared(results: dict[str, dict], protocol: str, style: str, method: str, rival: str, share: int) -> dict:
    "Two methods on the same rows and seed: accuracies, difference with its interval, and p of McNemar's test."
    pairs = [
        (a, b)
        for a in best(results.values(), style, method, share)
        for b in best(results.values(), style, rival, share)
        if a["job"]["seed"] == b["job"]["seed"]
    ]
    return paired(rights(pairs[0][0], protocol), rights(pairs[0][1], protocol)) if pairs else {}


def marks_of(args) -> dict:
    "What tells one base and one set of rows from another."
    files = [file for task in TASKS for split in ("train", "test") if (file := task_file(args.data, task, split))]
    digest = lambda paths: sha256(b"".join(sha256(p.read_bytes()).digest() for p in paths)).hexdigest()[:16]
    return {"base": digest([args.base / "model.safetensors"]), "data": digest(files)}


def check(args) -> None:
    "Refuse what cannot be run before the first job begins."
    if not (args.base / "model.safetensors").is_file():
        raise ValueError(f"no base in {args.base}: run make smollm2, or name a folder by --base")
    for name, known in (("formats", FORMATS), ("methods", METHODS)):
        for value in getattr(args, name):
            if value not in known:
                raise ValueError(f"--{name} {value}: choose among {', '.join(known)}")
    args.tasks = [t for t in TASKS if task_file(args.data, t, "test")]
    if not args.tasks:
        raise ValueError(f"--data {args.data}: no folder of a task with test rows there")


def main(argv=None) -> None:
    "Command line."
    parser, listed = (
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter),
        lambda kind: lambda text: [kind(part) for part in text.split(",")],
    )
    parser.add_argument("--base", type=Path, default=ROOT / "models/smollm2-135m")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("D2MORA_SHARED", ROOT.parent / "shared")) / "data",
        help="a folder with one folder a task",
    )
    parser.add_argument("--formats", type=listed(str), default=["cloze", "labels"])
    parser.add_argument(
        "--methods", type=listed(str), default=["lora", "d2mora", "one-to-many", "one-to-one", "d2mora-no-loss"]
    )
    parser.add_argument(
        "--seeds", type=listed(int), default=[0, 1, 2, 3, 4], help="the first one searches the learning rate"
    )
    parser.add_argument("--learning-rates", type=listed(float), default=[], help="try just these instead of searching")
    parser.add_argument("--share", type=int, default=1, help="16: a sixteenth of an epoch")
    parser.add_argument("--limit", type=int, help="test rows a task; default: all")
    parser.add_argument("--validation-rows", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32, help="test rows graded at once")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop cleanly after so long")
    parser.add_argument(
        "--workers", type=int, default=0, help="jobs side by side; default: one a core, or as many as pay on a GPU"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs/smollm2")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/smollm2")
    parser.add_argument("--table", action="store_true", help="print what there is, and run nothing")
    args = parser.parse_args(argv)
    if not args.table:
        check(args)
        args.marks, args.threads = (
            marks_of(args),
            1 if not torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // 8),
        )
        args.rows = sum(
            len(read_file(find_file(args.data, task, "train")))
            for task in load_recipe(FORMATS["cloze"], {"data.path": "toy"}).data.tasks
        )
        read_results(args.results, args.marks)
        args.workers = args.workers or (best_workers(args) if torch.cuda.is_available() else os.cpu_count() or 1)
        study(args)
    for protocol in PROTOCOLS:
        print(f"\n{protocol}:")
        for row in table(read_results(args.results), protocol):
            print("  " + "  ".join(f"{k} {v}" for k, v in row.items() if v not in ("", None)))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"smollm2: {error}", file=sys.stderr), sys.exit(2)
