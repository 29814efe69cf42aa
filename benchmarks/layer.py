"""The layer against PEFT's LoRA and against loops over experts: bytes, operations, time (`make bench`).

    python benchmarks/layer.py                              # benchmarks/results/layer.json, under 10 minutes on two cores
    python benchmarks/layer.py --rounds 2 --output x.json   # a quick look

q, k and v of random LLaMA blocks are adapted: {M 3, N 8, r 8}, LoRA r = 64 (the paper's baseline) and r = 45 (equal parameters), dropout
0.05, float32. Bytes and operations are counted. Times are taken in turns, one method after the other in each round; what is reported is the
mean ratio within rounds and its 95 % interval, once of wall time and once of processor time, which other jobs on the machine disturb less.
"""

import copy
import time
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median, stdev

import peft
import torch
import torch.nn.functional as F
import transformers
from common import ROOT, command_line, machine, store, versions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import d2mora
from d2mora import tuner
from d2mora.orthogonality import expert_layers

SHAPES = {
    "d 1024, 6 layers": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16),
    "d 4096, 1 layer": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32),
}
COMMON = dict(target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0.05, task_type="CAUSAL_LM")
OURS = d2mora.D2MoraConfig(r=8, num_down_experts=3, num_up_experts=8, lora_alpha=16, **COMMON)
METHODS = {
    "LoRA r 64": peft.LoraConfig(r=64, lora_alpha=128, **COMMON),
    "LoRA r 45": peft.LoraConfig(r=45, lora_alpha=90, **COMMON),
    "loops": OURS,
    "D2MoRA": OURS,
}


def loop_update(layer, name, x):
    "The update of a layer, expert by expert, with a dropout for each A."
    config, (A, B) = layer.adapter_config[name], layer.experts(name)
    w_down = F.softmax(F.linear(x, layer.d2mora_router_down[name].weight), -1)
    z = sum(
        w_down[..., i, None] * F.linear(F.dropout(x, config.lora_dropout, layer.training), A[i]) for i in range(len(A))
    )
    w_up = F.softmax(F.linear(z, layer.d2mora_router_up[name].weight), -1)
    return sum(w_up[..., j, None] * (z @ B[j]) for j in range(len(B))) * (config.lora_alpha / config.r)


@contextmanager
def loops():
    "Every layer computes its update by loops."
    ours, tuner.update = tuner.update, loop_update
    try:
        yield
    finally:
        tuner.update = ours


def form(method):
    return loops() if method == "loops" else nullcontext()


def frozen(shape):
    "A random LLaMA without trainable weights."
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=1000, max_position_embeddings=2048, **SHAPES[shape])
    ).requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


def adapted(base, method):
    "The base with an adapter of random weights; the frozen weights are shared between all methods."
    if method == "frozen":
        return base
    model = peft.get_peft_model(copy.deepcopy(base, {id(p): p for p in base.parameters()}), METHODS[method])
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.02)
    return model


def loss(model, x):
    "A scalar from hidden input x (rows, tokens, d), which needs a gradient as inside a deep model."
    return model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits.square().mean()


def kept_bytes(model, x):
    "Bytes put aside for backward, each storage once, parameters not."
    storages, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            storages[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        alive = loss(model, x)  # noqa: F841
    return sum(storages.values())


def flops(model, x):
    "Operations of forward and backward."
    with FlopCounterMode(display=False) as counter:
        loss(model, x).backward()
    return counter.get_total_flops()


class LiveBytes(TorchDispatchMode):
    "Adds up the storages that operations make, until they are freed; `peak` is the largest sum."

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in known | self.sizes.keys():
                self.add(t.untyped_storage())
        return out

    def add(self, storage):
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, storage._cdata)

    def free(self, key):
        self.now -= self.sizes.pop(key, 0)


def peak_bytes(model, x):
    "Largest sum of live tensors that one training step makes: activations, gradients, temporaries; not weights and optimizer state."
    step = training_step(model, x)
    step()
    x.grad = None
    with LiveBytes() as live:
        step()
    return live.peak


def counted(base, methods, tokens):
    "Bytes and operations of each method, beyond the frozen model's where that is said."
    x = torch.randn(1, tokens, base.config.hidden_size, requires_grad=True)
    own_kept, own_flops, out = kept_bytes(base, x), flops(base, x), {}
    for method in methods:
        model = adapted(base, method).train()
        with form(method):
            bytes_and_operations = {
                "kept_bytes": kept_bytes(model, x) - own_kept,
                "flops": flops(model, x) - own_flops,
                "peak_bytes": peak_bytes(model, x),
            }
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            out[method] = {"trainable": trainable} | bytes_and_operations
    return out


def training_step(model, x):
    "One step of AdamW, ready to be called; with experts the orthogonality gradient is part of it."
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if any(True for _ in expert_layers(model)):
        d2mora.attach_orthogonality(model, optimizer)

    def step():
        loss(model, x).backward()
        optimizer.step(), optimizer.zero_grad()

    return step


def generation(model, ids, new_tokens=24, **cache):
    "Greedy generation, ready to be called; it gives the new tokens of the first row."
    model.eval()
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    @torch.no_grad()
    def write():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **cache)
        return out[0, ids.shape[1] :].tolist()

    return write


def in_turns(calls, rounds, warm=1):
    "Seconds of each call in each round, (wall, processor), in turns and in changing order; the first rounds warm up."
    seconds, names = {name: [] for name in calls}, list(calls)
    for r in range(-warm, rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            with form(name):
                calls[name]()
            if r >= 0:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def ratio(ours, theirs):
    "Geometric mean of the ratios within rounds, with its 95 % interval (normal, of the logarithms)."
    logs = torch.tensor(ours).log() - torch.tensor(theirs).log()
    m, s = logs.mean().item(), (1.96 * stdev(logs.tolist()) / len(logs) ** 0.5 if len(logs) > 1 else float("nan"))
    return [round(torch.tensor(v).exp().item(), 4) for v in (m, m - s, m + s)]


def ratios(ours, theirs):
    "The ratio of wall time and of processor time."
    return {clock: ratio([s[i] for s in ours], [s[i] for s in theirs]) for i, clock in enumerate(("wall", "cpu"))}


def timed(calls, rounds):
    "Median seconds of each method, and ours against each rival."
    seconds = in_turns(calls, rounds)
    medians = {name: round(median(wall for wall, _ in own), 4) for name, own in seconds.items()}
    against = {rival: ratios(seconds["D2MoRA"], own) for rival, own in seconds.items() if rival != "D2MoRA"}
    return {"rounds": rounds, "median_seconds": medians, "ratios": against}


def check_loops(base):
    "The rival computes what our layer computes."
    model, x = adapted(base, "D2MoRA").eval(), torch.randn(1, 8, base.config.hidden_size)
    with torch.no_grad():
        ours = model(inputs_embeds=x).logits
        with loops():
            theirs = model(inputs_embeds=x).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def measure(shape, tokens, rounds):
    "All figures of one shape."
    base = frozen(shape)
    check_loops(base)
    print(f"{shape}: counting", flush=True)
    result = dict(tokens=tokens, counted=counted(base, METHODS, tokens))
    x = torch.randn(1, tokens, base.config.hidden_size, requires_grad=True)
    print(f"{shape}: training steps", flush=True)
    result["training step"] = timed({m: training_step(adapted(base, m), x) for m in METHODS}, rounds)
    if base.config.num_hidden_layers > 1:
        for rows in (1, 8):
            print(f"{shape}: generation, batch {rows}", flush=True)
            ids = torch.arange(rows * 32).view(rows, 32) % 1000
            calls = {m: generation(adapted(base, m), ids) for m in ("frozen", "LoRA r 64", "loops", "D2MoRA")}
            result[f"generation, batch {rows}"] = timed(calls, 2 * rounds)
    return result


def main(argv=None):
    "Command line."
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/layer.json")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    begun, about = time.perf_counter(), machine()
    shapes = {shape: measure(shape, tokens, args.rounds) for shape, tokens in zip(SHAPES, (512, 256))}
    result = {"command": "make bench", "machine": about, "versions": versions()}
    store(args.output, result | {"minutes": round((time.perf_counter() - begun) / 60, 1), "shapes": shapes})
    for shape, figures in shapes.items():
        ours, lora, loop = (figures["counted"][m] for m in ("D2MoRA", "LoRA r 64", "loops"))
        counts = ("kept_bytes", "flops", "peak_bytes")
        shares = {k: (round(ours[k] / lora[k], 3), round(ours[k] / loop[k], 3)) for k in counts}
        print(f"{shape}: {shares} of LoRA r 64 and of loops")
        for what in (k for k in figures if k not in ("tokens", "counted")):
            print(f"  {what}:", {r: v["cpu"] for r, v in figures[what]["ratios"].items()})


if __name__ == "__main__":
    main()
