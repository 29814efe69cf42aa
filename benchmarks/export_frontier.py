"""What a static export keeps of a routed adapter, rank by rank: the frontier of notebook 15.

    python benchmarks/export_frontier.py --world toy     # nbs/results/demo; writes nbs/results/export-toy.json, about 5 minutes on one core
    python benchmarks/export_frontier.py --world real    # D2MoRA on stories260K; writes nbs/results/export-real.json, about half an hour

The real adapter is runs/grade-real/seed-0/D2MoRA, which is trained first where it is missing (as `grade_main_job.py --world real` does).
Measured: the fitted map cut to each rank, and the same distilled. Then one export for all tasks against one for each task.
"""

import time
from dataclasses import replace
from pathlib import Path

import transformers
from common import ROOT, command_line, machine, store, versions

from d2mora.data import data_path
from d2mora.evaluate import load_target, test_rows
from d2mora.export import calibrate, distill, encoded_rows, measure, static_lora
from d2mora.recipe import load_recipe, max_positions

ON_TOY, ON_REAL = ROOT / "nbs/results/demo", ROOT / "runs/grade-real/seed-0/D2MoRA"
WORLDS = {
    "toy": dict(run=ON_TOY, ranks=(1, 2, 3, 5, 7, 9), distilled=(1, 2, 3, 5, 7, 9), steps=100, limit=100, rows=100),
    "real": dict(run=ON_REAL, ranks=(2, 4, 8, 16, 24), distilled=(2, 8, 24), steps=60, limit=100, rows=60),
}


def trained(world: str) -> Path:
    "The run whose adapter is exported."
    folder = WORLDS[world]["run"]
    if not (folder / "adapter").exists():
        from grade_main_job import real, trained

        name, overrides, adapters, _ = real()
        trained(folder, name, overrides, adapters["D2MoRA"], seed=0)
    return folder


def forms_of(model, tokenizer, rows, world, learning_rate):
    "Yield (form, rank, static model) for every form and rank, one after the other: only one is kept at a time."
    moments = calibrate(model, rows)
    for rank in world["ranks"]:
        yield "fitted", rank, static_lora(model, moments, rank)
    for rank in world["distilled"]:
        static = static_lora(model, moments, rank)
        distill(model, static, rows, tokenizer, world["steps"], learning_rate)
        yield "distilled", rank, static


def by_task(model, tokenizer, config, tasks, train, limit, rank) -> dict:
    "One LoRA for all tasks against one for each, on each task's rows."
    shared, found = static_lora(model, calibrate(model, sum(train.values(), [])), rank), {}
    for task in tasks:
        forms = {"all": shared, "own": static_lora(model, calibrate(model, train[task]), rank)}
        texts = encoded_rows(tokenizer, config, task, "test", 32)
        costs = measure(model, forms, tokenizer, test_rows(config, [task], limit), texts, config.prompt)
        found[task] = {"routed": costs["own"]["routed_average"]}
        for name, cost in costs.items():
            kept = {"agreement": cost["agreement"], "accuracy": cost["average"], "divergence": cost["divergence"]}
            found[task][name] = kept
        print(task, {name: found[task][name]["agreement"] for name in costs}, flush=True)
    return found


def main():
    parser = command_line(__doc__)
    parser.add_argument("--world", choices=WORLDS, required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error(), transformers.utils.logging.disable_progress_bar()
    began, run, world = time.process_time(), trained(options.world), WORLDS[options.world]
    limit = world["limit"]
    model, tokenizer, config = load_target(run)
    config = replace(config, path=data_path(config), cutoff=min(config.cutoff, max_positions(model) or config.cutoff))
    learning_rate = load_recipe(run / "recipe.yaml").training["learning_rate"]
    train = {task: encoded_rows(tokenizer, config, task, "train", world["rows"]) for task in config.tasks}
    rows, every = test_rows(config, config.tasks, limit), sum(train.values(), [])
    texts = [row for task in config.tasks for row in encoded_rows(tokenizer, config, task, "test", 32)]
    forms = {}
    for form, rank, static in forms_of(model, tokenizer, every, world, learning_rate):
        name = f"{form} R {rank}"
        forms[name] = measure(model, {name: static}, tokenizer, rows, texts, config.prompt)[name]
        found = {key: forms[name][key] for key in ("agreement", "average", "divergence")}
        print(name, found, f"{time.process_time() - began:.0f} s", flush=True)
        forms[name] |= {"form": form, "rank": rank}
    adapter = model.peft_config["default"]
    result = {
        "command": f"python benchmarks/export_frontier.py --world {options.world}",
        "n": sum(map(len, rows.values())),
        "rows_a_task": limit,
        "calibration_rows_a_task": world["rows"],
        "steps": world["steps"],
        "learning_rate": learning_rate,
        "adapter": f"M {adapter.num_down_experts}, N {adapter.num_up_experts}, r {adapter.r}",
        "forms": forms,
        "per_task_rank": adapter.r,
        "per_task": by_task(model, tokenizer, config, config.tasks, train, limit, adapter.r),
        "cpu_seconds": round(time.process_time() - began),
        "machine": machine(),
        "versions": versions(),
    }
    store(options.output or ROOT / f"nbs/results/export-{options.world}.json", result)


if __name__ == "__main__":
    main()
