"""What an NVIDIA GPU gives: right results, speed at LLaMA-7B's shape, generation and grading, jobs of the study (`make gpu`).

    bash scripts/gpu.sh 10 benchmarks/results/gpu     # 10 minutes; what the first three parts leave of them goes to the study
    bash scripts/gpu.sh 2 /tmp/trial --cpu            # the same code on tiny shapes, without a GPU

Each part runs in a process of its own, is stopped at its time bound, and keeps what it has found in a JSON file of its name. Weights are
random. The base is in bfloat16 and the adapters are in float32 under autocast, as the Trainer has them. Methods take turns in each round;
reported times are medians. torch, transformers, peft, accelerate and safetensors are needed; EXTRAS lists what more a part needs.
"""

import argparse
import copy
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

NEEDED = ("torch", "transformers", "peft", "accelerate", "safetensors")
EXTRAS = {
    "the plan in speed": ("pydantic", "yaml"),
    "grading in generation": ("pydantic", "yaml", "tokenizers"),
    "study": (
        "datasets",
        "pyarrow",
        "pandas",
        "dill",
        "multiprocess",
        "xxhash",
        "pydantic",
        "filelock",
        "scipy",
        "matplotlib",
        "click",
    ),
}
WHEELS = "put their wheels into a folder and name it by WHEELS=FOLDER"


def refuse(message):
    "One line on stderr, exit 2."
    print(f"gpu: {message}", file=sys.stderr)
    sys.exit(2)


def absent(names):
    "Which of these packages are not installed."
    return [name for name in names if importlib.util.find_spec(name) is None]


try:
    import peft
    import torch
    import transformers
    from gpu_checks import CHECKS
    from layer import METHODS, OURS, LiveBytes, adapted, form
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from transformers import AutoConfig, AutoModelForCausalLM

    import d2mora
    from d2mora.orthogonality import expert_layers
    from d2mora.tasks import TASKS
except ModuleNotFoundError as error:
    refuse(f"{', '.join(absent(NEEDED)) or error.name} not installed: {WHEELS}, or name another python by PYTHON=PATH")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
LLAMA = ROOT / "d2mora" / "assets" / "bases" / "huggyllama" / "llama-7b"
GiB = 2**30
COMPILED = "D2MoRA compiled"
METHODS[COMPILED] = OURS
SPEED = ("frozen", "LoRA r 64", "loops", "D2MoRA")
BOUNDS = {"correctness": 120, "speed": 240, "generation": 120}  # seconds; the study takes what is left
TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
)


@dataclass
class Job:
    "What every part is given: where its files are, what it runs on, and how large everything is."

    out: Path
    shared: Path
    facts: dict  # device, trial, memory_gib, versions, date
    deadline: float = 0  # of the part, by time.monotonic()

    def __post_init__(self):
        trial = self.facts["trial"]
        self.device = torch.device("cpu" if trial else "cuda")
        self.backend = "aot_eager" if trial else "inductor"
        self.shape = AutoConfig.from_pretrained(LLAMA, **(TINY if trial else {}))
        self.micro_batches = ((2, 16),) if trial else ((4, 256), (16, 256))  # rows, tokens
        self.rounds, self.prompt, self.new_tokens = (2, 8, 4) if trial else (7, 128, 32)
        self.batches = (1, 2) if trial else (1, 8)  # rows that are generated at once
        self.tasks, self.rows = (
            (list(TASKS)[:2], 4) if trial else (list(TASKS), 32)
        )  # graded by `choice`: rows of each task

    def save(self, part, results, **more):
        "Write a part's file whole or not at all."
        path = self.out / f"{part}.json"
        path.with_suffix(".tmp").write_text(json.dumps(self.facts | more | {"results": results}, indent=1) + "\n")
        path.with_suffix(".tmp").replace(path)


@contextmanager
def time_limit(seconds):
    "Raise TimeoutError in the block when its time is over."

    def late(*_):
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def attempt(job, seconds, call, *args, needs=()):
    "What a call gives, or {'skipped': why}: a case that fails does not end its part."
    if lacking := absent(needs):
        return {"skipped": f"{', '.join(lacking)} not installed"}
    try:
        with time_limit(min(seconds, job.deadline - time.monotonic())):
            return call(*args)
    except torch.OutOfMemoryError:
        reason = f"out of memory ({job.facts['memory_gib']} GiB)"
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    gc.collect()
    torch.cuda.empty_cache()
    return {"skipped": reason}


def quotient(a, b):
    return round(a / b, 3) if a and b else None


# --- part 1: right on this device -----------------------------------------------------------------------------------------------------


def correctness(job):
    results = {}
    for name, (check, bound) in CHECKS.items():
        found = attempt(job, 60, lambda: {"value": check(job.device, job.shared, job.facts["trial"])})
        results[name] = found | {"bound": bound, "right": found.get("value", float("nan")) <= bound}
        job.save("correctness", results)


def correctness_summary(results):
    wrong = [
        f"wrong: {n}: {r.get('skipped') or 'off by {value:.1e}, allowed {bound:.0e}'.format(**r)}"
        for n, r in results.items()
        if not r["right"]
    ]
    return [f"{len(results) - len(wrong)} of {len(CHECKS)} checks are right", *wrong]


# --- part 2: speed at true shapes -----------------------------------------------------------------------------------------------------


def now(device):
    "A point in time on the device."
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start, end):
    return start.elapsed_time(end) if isinstance(start, torch.cuda.Event) else (end - start) * 1e3


def clock(job):
    "Seconds, when the device has done all that it was given."
    if job.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def llama(job):
    "LLaMA-7B's shape with random frozen weights in bfloat16, made on the device."
    torch.manual_seed(0)
    with torch.device(job.device):
        base = AutoModelForCausalLM.from_config(job.shape, dtype=torch.bfloat16)
    base.generation_config.eos_token_id = None
    return base.requires_grad_(False)


class Method:
    "A method at work on the shared frozen base."

    def __init__(self, job, base, name):
        self.job, self.name = job, name
        self.model = (
            copy.deepcopy(base, {id(p): p for p in base.parameters()}) if name == "frozen" else adapted(base, name)
        ).train()
        if name in ("frozen", COMPILED):
            self.model.enable_input_require_grads()  # for backward to go through a frozen model; and it makes all layers alike to the compiler
        if name == COMPILED:  # what is compiled for one layer serves all
            for layer in self.model.get_base_model().model.layers:
                layer.compile(fullgraph=True, dynamic=False, backend=job.backend)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
        if any(True for _ in expert_layers(self.model)):
            d2mora.attach_orthogonality(self.model, self.optimizer)
        self.held = bytes_of(self.model.parameters()) + 2 * bytes_of(trained)  # weights, and Adam's two moments

    def step(self, batch):
        "A training step; three points in time: its start, after forward and backward, after the optimizer."
        times = [now(self.job.device)]
        with form(self.name):  # around backward too, which computes checkpointed layers again
            with torch.autocast(self.job.device.type, torch.bfloat16):
                loss = self.model(**batch, use_cache=False).loss
            loss.backward()
        times.append(now(self.job.device))
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return [*times, now(self.job.device)]

    def warm(self, batch):
        "Two steps; of the second the peak of memory, with this method's weights and optimizer and without the other methods'."
        self.step(batch)
        if self.job.device.type != "cuda":
            if self.name == COMPILED:
                return self.step(batch) and {}  # bytes cannot be counted inside a compiled layer
            with LiveBytes() as live:
                self.step(batch)
            return {"peak_gib": round((self.held + live.peak) / GiB, 4)}
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(batch)
        torch.cuda.synchronize()
        peaks = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
        return {key: round((self.held + peak - before) / GiB, 4) for key, peak in peaks.items()}


def micro_batch(job, rows, tokens):
    "Random tokens; the first row ends in padding, so that attention gets a mask, as it does in training."
    ids = torch.randint(3, job.shape.vocab_size, (rows, tokens), device=job.device)
    mask = torch.ones_like(ids)
    mask[0, -tokens // 16 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def in_turns(job, methods, rows, tokens, again):
    "All methods at one micro-batch: memory, then times in turns."
    batch, found = micro_batch(job, rows, tokens), {}
    for name, method in methods.items():
        method.model.gradient_checkpointing_enable(
            {"use_reentrant": False}
        ) if again else method.model.gradient_checkpointing_disable()
        found[name] = attempt(job, 75, method.warm, batch)
    names = [name for name in found if "skipped" not in found[name]]
    steps, end = {name: [] for name in names}, min(job.deadline, time.monotonic() + 30)
    for turn in range(job.rounds):
        for name in (
            names[turn % len(names) :] + names[: turn % len(names)]
            if names and (turn < 3 or time.monotonic() < end)
            else ()
        ):
            steps[name].append(methods[name].step(batch))
            clock(job)
    for name, times in steps.items():
        parts = {"micro_batch_ms": (0, 1), "optimizer_ms": (1, 2), "step_ms": (0, 2)}
        took = {part: [milliseconds(t[a], t[b]) for t in times] for part, (a, b) in parts.items()}
        found[name] |= {part: round(median(ms), 3) for part, ms in took.items()}
        found[name] |= {"step_ms_range": [round(f(took["step_ms"]), 3) for f in (min, max)], "rounds": len(times)}
        found[name]["tokens_per_second"] = round(rows * tokens / median(took["step_ms"]) * 1e3, 1)
    return found


def profile(job, method, batch):
    "Where the time of one step goes, by kernel and by operator."
    method.step(batch)
    start, on_gpu = clock(job), job.device.type == "cuda"
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    ) as seen:
        method.step(batch)
        wall = (clock(job) - start) * 1e3
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [e for e in seen.key_averages() if not getattr(e, "is_user_annotation", False)]
    sides = {
        "kernels": [e for e in events if (e.device_type == DeviceType.CUDA) == on_gpu],
        "operators": [e for e in events if e.device_type == DeviceType.CPU],
    }
    total = sum(getattr(e, own) for e in sides["kernels"])
    found = {
        "wall_ms_while_profiled": round(wall, 2),
        "kernels_ms": round(total / 1e3, 2),
        "launches": sum(e.count for e in sides["kernels"]),
    }
    for side, events in sides.items():
        top = sorted(events, key=lambda e: -getattr(e, own))[:10]
        found[side] = [
            {
                "name": e.key[:100],
                "ms": round(getattr(e, own) / 1e3, 3),
                "calls": e.count,
                "share": quotient(getattr(e, own), total),
            }
            for e in top
        ]
    return found


def planned(job, method, rows, tokens, again):
    "The plan's memory and operations, and its time for the GPU of this name; a trial takes an H100 for its own."
    from d2mora.data import DataConfig
    from d2mora.plan import GPUS, plan_memory, plan_step, step_flops
    from d2mora.recipe import Recipe

    config = METHODS[method]
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "num_down_experts", "num_up_experts")
    adapter = {"peft_type": config.peft_type.value} | {
        name: getattr(config, name) for name in names if hasattr(config, name)
    }
    recipe = Recipe(
        "huggyllama/llama-7b", adapter, DataConfig(path="toy"), {"bf16": True, "per_device_train_batch_size": rows}
    )
    memory = plan_memory(job.shape, recipe, rows, tokens, tokens, again)
    _, operations = plan_step(step_flops, job.shape, recipe, rows, tokens, checkpointing=again)
    found = {"gib": round(sum(memory.values()) / GiB, 4), "tera_operations": round(operations / 1e12, 6)}
    card = "H100" if job.facts["trial"] else job.facts["device"]
    known = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in card]
    if known:
        gpu = min(known, key=lambda gpu: abs(gpu.memory - job.facts["memory_gib"]))
        found |= {
            "ms": round(operations / gpu.tflops / gpu.utilisation / 1e9, 6),
            "assumed_utilisation": gpu.utilisation,
            "assumed_tflops": gpu.tflops,
        }
    return found


def speed(job):
    "What is compiled comes last, beside the same method without: compiling may take all the time that is left."
    results, base = {"cases": {}, "profile": {}, "plan": {}, "compiled": {}}, llama(job)
    methods = {name: Method(job, base, name) for name in SPEED}
    cases = {
        f"{rows} x {tokens}{', checkpointing' * again}": (rows, tokens, again)
        for again in (False, True)
        for rows, tokens in job.micro_batches
    }
    for name, case in cases.items():
        results["cases"][name] = in_turns(job, methods, *case)
        if not results["profile"]:
            batch = micro_batch(job, *case[:2])
            results["profile"] = {m: attempt(job, 30, profile, job, methods[m], batch) for m in ("LoRA r 64", "D2MoRA")}
        job.save("speed", results)
    for name, case in cases.items():
        results["plan"][name] = {
            m: attempt(job, 60, planned, job, m, *case, needs=EXTRAS["the plan in speed"])
            for m in ("LoRA r 64", "D2MoRA")
        }
        job.save("speed", results)
    methods = {"D2MoRA": methods["D2MoRA"], COMPILED: Method(job, base, COMPILED)}
    for name, case in cases.items():
        results["compiled"][name] = in_turns(job, methods, *case)
        job.save("speed", results)


def aims(results):
    "What was aimed at, and what came out for each case."
    lines = {
        "tokens/s of D2MoRA over LoRA r 64 (aim: 1 or more)": [],
        "adapter time of loops over D2MoRA's (aim: 3 or more)": [],
    }
    lines |= {f"planned {what} over measured (aim: 0.85 to 1.15)": [] for what in ("memory", "time")}
    lines["GiB of D2MoRA at most (aim: 39.4 or less at 4 rows, an A100 of 40 GB)"] = []
    for name, found in results["cases"].items():
        ours, lora, loop, frozen = (found.get(method, {}) for method in ("D2MoRA", "LoRA r 64", "loops", "frozen"))
        plan = results["plan"].get(name, {}).get("D2MoRA", {})
        extra = [
            m["step_ms"] - frozen["step_ms"] if "step_ms" in m and "step_ms" in frozen else None for m in (loop, ours)
        ]
        pairs = (ours, lora, "tokens_per_second"), (plan, ours, "gib", "peak_gib"), (plan, ours, "ms", "micro_batch_ms")
        rate, memory, spent = (quotient(a.get(keys[0]), b.get(keys[-1])) for a, b, *keys in pairs)
        for line, value in zip(lines.values(), (rate, quotient(*extra), memory, spent, ours.get("peak_gib"))):
            line.append(f"{name}: {'not measured' if value is None else value}")
    return lines


def speed_summary(results):
    lines = []
    for name, method, m in (
        (n, *pair) for side in ("cases", "compiled") for n, found in results[side].items() for pair in found.items()
    ):
        said = (
            m.get("skipped")
            or f"{m['tokens_per_second']:>10,.0f} tokens/s {m['step_ms']:>10.2f} ms a step {m.get('peak_gib', float('nan')):>8.2f} GiB"
        )
        lines.append(f"{name:24} {method:16} {said}")
    lines += [f"{aim}: {'; '.join(values)}" for aim, values in aims(results).items()]
    for method, seen in results["profile"].items():
        top = ", ".join(f"{k['name'][:40]} {k['share']:.0%}" for k in seen.get("kernels", ())[:3])
        lines.append(
            f"a step of {method}: "
            + (seen.get("skipped") or f"{seen['launches']} launches, {seen['kernels_ms']} ms in them; most in {top}")
        )
    return lines


# --- part 3: generation and grading ---------------------------------------------------------------------------------------------------


def written(job, models, rows):
    "Tokens per second with the cache, greedily, in turns."
    ids, n, seconds = (
        torch.randint(3, job.shape.vocab_size, (rows, job.prompt), device=job.device),
        job.new_tokens,
        {name: [] for name in models},
    )
    for turn in range(4):
        for name, model in models.items():
            start = clock(job)
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=n,
                min_new_tokens=n,
                pad_token_id=0,
            )
            if turn:  # the first round warms up
                seconds[name].append(clock(job) - start)
    return {
        name: {"tokens_per_second": round(rows * n / median(s), 2), "seconds": [round(v, 4) for v in s]}
        for name, s in seconds.items()
    }


def test_rows(job, task):
    "Rows from the middle of a test set that is sorted by length, read without `datasets`."
    from d2mora.data import read_file, task_file

    path = task_file(job.shared / "data", task, "test")
    if not path:
        raise FileNotFoundError(
            f"there is no {job.shared}/data/{task}/test.json: name a folder that holds data/ by --shared"
        )
    rows = sorted(read_file(path), key=lambda row: len(row["instruction"]))
    middle = max(0, len(rows) - job.rows) // 2
    return rows[middle : middle + job.rows]


def grading(job, model):
    "Rows per second by `choice` in batches, and by the published way: one row at a time, 4 beams, 32 new tokens."
    from d2mora.scoring import grade_rows
    from evaluate_speed import published

    tokenizer = transformers.AutoTokenizer.from_pretrained(job.shared / "tokenizers" / "mistral-v1")
    rows, found = {task: test_rows(job, task) for task in job.tasks}, {"batch_size": 32}
    ways = {
        "choice": (
            rows,
            lambda task, own: grade_rows(model, tokenizer, task, own, "choice", batch_size=found["batch_size"]),
        ),
        "published": (
            {task: [own[len(own) // 2]] for task, own in rows.items()},
            lambda task, own: [published(model, tokenizer, row) for row in own],
        ),
    }
    for way, (asked, call) in ways.items():
        call(job.tasks[0], asked[job.tasks[0]])  # warm
        start = clock(job)
        count = sum(len(call(task, own)) for task, own in asked.items())
        found[way] = {"rows": count, "rows_per_second": round(count / (clock(job) - start), 3)}
    return found | {"times_as_fast": quotient(*(found[way]["rows_per_second"] for way in ways))}


def generation(job):
    results, base = {"generation": {}}, llama(job)
    models = {name: adapted(base, name).eval() for name in ("LoRA r 64", "D2MoRA")} | {"frozen": base.eval()}
    for rows in job.batches:
        results["generation"][f"batch {rows}"] = attempt(job, 60, torch.no_grad()(written), job, models, rows)
        job.save("generation", results)
    results["grading"] = attempt(job, 60, grading, job, models["D2MoRA"], needs=EXTRAS["grading in generation"])
    job.save("generation", results)


def generation_summary(results):
    lines, graded = [], results.get("grading", {"skipped": "not reached"})
    for batch, found in results["generation"].items():
        said = found.get("skipped") or ", ".join(f"{name} {m['tokens_per_second']:.1f}" for name, m in found.items())
        lines.append(f"tokens/s with the cache, {batch}: {said}")
    said = (
        graded.get("skipped")
        or f"{graded['times_as_fast']} times as fast as one row at a time with 4 beams (aim: 100 or more)"
    )
    return [*lines, f"grading by choice: {said}"]


# --- part 4: jobs of the study --------------------------------------------------------------------------------------------------------


def study_command(job):
    "What is called: texts as answers, LoRA and D2MoRA, two rates, a sixteenth of an epoch; a trial only asks for help."
    program = [sys.executable, str(ROOT / "benchmarks" / "smollm2.py"), "--data", str(job.shared / "data")]
    program += [
        "--formats",
        "cloze",
        "--methods",
        "lora,d2mora",
        "--seeds",
        "0",
        "--learning-rates",
        "1e-3,2e-3",
        "--share",
        "16",
        "--limit",
        "500",
    ]
    return [*program, "--help"] if job.facts["trial"] else program


def study(job, seconds):
    seconds -= 20  # to come to an end
    command, lacking = study_command(job), absent(EXTRAS["study"])
    reasons = {
        f"{', '.join(lacking)} not installed: {WHEELS}": lacking,
        "no time is left": seconds < 10,
        f"{command[1]} is not there": not Path(command[1]).is_file(),
    }
    if why := next((reason for reason, holds in reasons.items() if holds), None):
        return {"skipped": why}
    bounded = ["timeout", "-k", "10", f"{seconds + 10:.0f}", *command]
    done = subprocess.run(bounded, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return {"arguments": command[2:], "exit": done.returncode, "said": done.stdout.splitlines()[-20:]}


def study_summary(results):
    return [f"exit {results['exit']}: {(results['said'] or ['nothing was said'])[-1]}"]


# --- all of it ------------------------------------------------------------------------------------------------------------------------

PARTS = {"correctness": correctness, "speed": speed, "generation": generation}
SUMMARIES = {
    "correctness": correctness_summary,
    "speed": speed_summary,
    "generation": generation_summary,
    "study": study_summary,
}


def device_facts(trial, memory):
    "The card and the versions; one line and exit 2 without a GPU."
    if not trial and not torch.cuda.is_available():
        refuse(
            f"torch {torch.__version__} sees no NVIDIA GPU: mend the driver or CUDA_VISIBLE_DEVICES, or try the command without one by --cpu"
        )
    card = None if trial else torch.cuda.get_device_properties(0)
    total = card.total_memory if card else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, d2mora)} | {
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    name = card.name if card else f"none: a trial on a CPU ({platform.machine()})"
    return {
        "device": name,
        "trial": trial,
        "memory_gib": round(min(memory or total / GiB, total / GiB), 4),
        "versions": versions,
        "date": date.today().isoformat(),
    }


def check_folder(out, facts):
    "Refuse a folder that holds another device's results, and the committed folder for a trial."
    if facts["trial"] and out.resolve() == RESULTS:
        refuse(f"{out} is for results of a GPU, and this is a trial on a CPU: name another folder")
    for path in (out / f"{part}.json" for part in SUMMARIES):
        if not path.is_file():
            continue
        try:
            other = json.loads(path.read_text())["device"]
        except (ValueError, KeyError, TypeError):
            refuse(f"{path} is no result of this command: move it away, or name another folder")
        if other != facts["device"]:
            refuse(
                f"{path} holds results of another device ({other}; here: {facts['device']}): name another folder, nothing is overwritten"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"{out} cannot be made ({error.strerror}): name another folder")


def no_room(job):
    "Why LLaMA-7B does not fit, with numbers; an empty text if it does."
    with torch.device("meta"):
        weights = bytes_of(AutoModelForCausalLM.from_config(job.shape, dtype=torch.bfloat16).parameters()) / GiB
    need, there = weights + (0 if job.facts["trial"] else 1.5), job.facts["memory_gib"]
    return f"the weights alone need {need:.3g} GiB with CUDA's own, and {there:.3g} are there" if need > there else ""


def child(part, job, seconds):
    "One part, in its own process."
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    job.deadline = time.monotonic() + 0.95 * seconds
    if not job.facts["trial"]:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, job.facts["memory_gib"] * GiB / torch.cuda.get_device_properties(0).total_memory)
        )
    PARTS[part](job)


def in_own_process(part, job, seconds):
    "A part, no longer than its bound: its results, and how it ended."
    process = multiprocessing.get_context("fork" if job.facts["trial"] else "spawn").Process(
        target=child, args=(part, job, seconds)
    )
    process.start()
    process.join(seconds)
    ended = {None: f"stopped after {seconds:.0f} s", 0: "complete"}.get(
        process.exitcode, f"failed with exit code {process.exitcode}"
    )
    process.kill()
    process.join()
    path = job.out / f"{part}.json"
    return json.loads(path.read_text())["results"] if path.is_file() else {"skipped": ended}, ended


def run(part, job, seconds, why_not):
    "A part's file with its summary, and the summary."
    begun = time.monotonic()
    (job.out / f"{part}.json").unlink(missing_ok=True)
    if why_not or seconds < 1:
        results, ended = {"skipped": why_not or "no time is left"}, "skipped"
    else:
        results, ended = (study(job, seconds), "complete") if part == "study" else in_own_process(part, job, seconds)
    lines = [f"skipped: {results['skipped']}"] if results.keys() == {"skipped"} else SUMMARIES[part](results)
    job.save(part, results, ended=ended, minutes=round((time.monotonic() - begun) / 60, 2), summary=lines)
    return [f"{part} ({ended})", *(f"  {line}" for line in lines)]


def read_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = next((p for p in (ROOT / "shared", ROOT.parent / "shared") if p.is_dir()), ROOT / "shared")
    parser.add_argument(
        "minutes",
        nargs="?",
        type=float,
        default=10,
        help="for everything; what the first three parts leave goes to the study",
    )
    parser.add_argument("out", nargs="?", type=Path, default=RESULTS, help="folder for one JSON file a part")
    parser.add_argument("--cpu", action="store_true", help="a trial without a GPU, on tiny shapes")
    parser.add_argument(
        "--shared",
        type=Path,
        default=os.environ.get("D2MORA_SHARED") or shared,
        help="folder with golden/, data/ and tokenizers/mistral-v1/",
    )
    parser.add_argument("--parts", default=",".join(SUMMARIES), help="some of these, with commas between them")
    parser.add_argument("--memory", type=float, help="use no more than so many GiB of the GPU")
    options = parser.parse_args(argv)
    if unknown := set(options.parts.split(",")) - SUMMARIES.keys():
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(SUMMARIES)}")
    return options


def main(argv=None):
    options = read_arguments(argv)
    end, facts = time.monotonic() + 60 * options.minutes, device_facts(options.cpu, options.memory)
    check_folder(options.out, facts)
    for part, names in EXTRAS.items():
        if lacking := absent(names):
            print(f"gpu: {part} is left out: {', '.join(lacking)} not installed: {WHEELS}", file=sys.stderr)
    job, table = Job(options.out, options.shared, facts), []
    for part in options.parts.split(","):
        left = end - time.monotonic()
        why_not = no_room(job) if part in ("speed", "generation") else ""
        table += run(part, job, min(BOUNDS.get(part, left), left), why_not)
    print(
        "\n".join(
            [
                "",
                f"{facts['device']}, {facts['memory_gib']} GiB, torch {torch.__version__}; files in {options.out}",
                *table,
            ]
        )
    )
    return int(
        any(
            line.startswith(("  wrong", "correctness (f", "speed (f", "generation (f")) or "(stopped" in line
            for line in table
        )
    )


if __name__ == "__main__":
    sys.exit(main())
