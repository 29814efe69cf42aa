"""Generating with a routed adapter, with the LoRA it is exported to, and merged: what each costs for a token (notebook 14).

    python benchmarks/generation.py      # nbs/results/generation.json, about ten minutes on one core, most of them compiling

q, k and v of a random LLaMA (d 1024, 2 layers) are adapted by D2MoRA {M 3, N 8, r 8}; by LoRA r 8, which a static export at mean routing is,
and by LoRA r 64, the paper's baseline; `merged` is the frozen model, as after merge_and_unload. One row, 32 tokens of prompt, 24 new tokens,
greedy: with the usual growing cache, with a static one, and with a static one and a compiled forward pass. All in turns in one run; what is
reported is the mean ratio within rounds with its 95 % interval, of wall time and of processor time, which other jobs disturb less. D2MoRA's
tokens under each cache are compared with those under the growing one.
"""

import copy
import json
import time
from pathlib import Path
from statistics import median

import peft
import torch
import transformers
from common import ROOT, command_line, machine, store, versions
from layer import COMMON, METHODS, SHAPES, adapted, frozen, generation, in_turns, ratios

NAMES, CACHES, NEW = ("D2MoRA", "merged", "LoRA r 8", "LoRA r 64"), ("growing", "static", "static, compiled"), 24
METHODS["LoRA r 8"] = peft.LoraConfig(r=8, lora_alpha=16, **COMMON)
SHAPES["d 1024, 2 layers"] = SHAPES["d 1024, 6 layers"] | {"num_hidden_layers": 2}


def writer(base, name: str, cache: str):
    "Greedy generation with a kind of cache, ready to be called."
    shared = {id(p): p for p in base.parameters()}  # the frozen weights
    model = copy.deepcopy(base, shared) if name == "merged" else adapted(base, name)
    whole = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if cache == "static, compiled":
        whole.forward = torch.compile(whole.forward)
    ids = (torch.arange(32) * 7 % 1000)[None]
    return generation(model, ids, NEW, **({} if cache == "growing" else {"cache_implementation": "static"}))


def main():
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=ROOT / "nbs/results/generation.json")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    begun, about, base = time.perf_counter(), machine(), frozen("d 1024, 2 layers")
    calls = {(cache, name): writer(base, name, cache) for cache in CACHES for name in NAMES}
    written = {cache: calls[cache, "D2MoRA"]() for cache in CACHES}
    assert all(tokens == written["growing"] for tokens in written.values()), written
    seconds = in_turns(calls, options.rounds, warm=2)
    took = {cache: {name: seconds[cache, name] for name in NAMES} for cache in CACHES}
    ours = {cache: own["D2MoRA"] for cache, own in took.items()}
    found = {
        "D2MoRA against": {cache: {n: ratios(ours[cache], own[n]) for n in NAMES[1:]} for cache, own in took.items()},
        "D2MoRA, cache against growing": {cache: ratios(ours[cache], ours["growing"]) for cache in CACHES[1:]},
        "minutes": round((time.perf_counter() - begun) / 60, 1),
    }
    medians = {cache: {n: round(median(w for w, _ in s), 3) for n, s in own.items()} for cache, own in took.items()}
    result = {"command": "python benchmarks/generation.py", "rounds": options.rounds, "new_tokens": NEW} | found
    result |= {"same_tokens": True, "median_seconds": medians, "machine": about, "versions": versions()}
    store(options.output, result)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
