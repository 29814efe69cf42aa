"""Generated cases: whatever is valid trains, saves, loads and equals the loop; whatever is damaged is refused in one line.

About 160 cases here; with D2MORA_FUZZ=1 thousands, other ones each time.
"""

import copy
import functools
import gzip
import json
import os
import tempfile
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch
import yaml
from helpers import PAIRS, difference, fill, loop, tiny_llama
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

import d2mora
from d2mora.checkpoints import read_weights
from d2mora.data import DataConfig, read_task, row_problem
from d2mora.evaluate import with_adapter
from d2mora.recipe import load_recipe
from d2mora.checks import misfit
from d2mora.toy import toy_rows
from d2mora.tuner import PAIRINGS, D2MoraLinear

MANY = bool(os.environ.get("D2MORA_FUZZ"))
CASES = 800 if MANY else 27  # of each property
pytestmark = pytest.mark.filterwarnings("ignore")


def fuzzed(**strategies):
    "A property that is tried with values of the strategies; a failure is shown as it was found."
    how = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    return lambda test: settings(max_examples=CASES, derandomize=not MANY, **how)(given(**strategies)(test))


def complaint(call):
    "What a call complains of: one line, as a ValueError; empty if it does not."
    try:
        call()
    except ValueError as error:
        assert str(error) and "\n" not in str(error), repr(error)
        return str(error)
    return ""


# ---- what is valid works ----
ONE_TO = st.integers(1, 5)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])


@st.composite
def configurations(draw):
    "Fields of a valid configuration, without its layers."
    pairing = draw(st.sampled_from(sorted(PAIRINGS)))
    M, N, r = draw(ONE_TO), draw(ONE_TO), draw(st.integers(1, 9))
    shapes = [(M, N), (N, N), (1, N), (M, 1), PAIRS[pairing]]
    M, N = next((m, n) for m, n in shapes if not misfit(pairing, m, n, r))
    return dict(
        pairing=pairing,
        num_down_experts=M,
        num_up_experts=N,
        r=r,
        lora_alpha=draw(st.floats(0.125, 32) | st.integers(1, 32)),
        lora_dropout=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
        expert_dropout=draw(st.sampled_from(["shared", "independent"])),
        orthogonality_weight=draw(st.floats(0, 0.01)),
    )


def chain(widths, kinds, dtype):
    "Linear layers one behind the other; the same each time."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pairs = zip(kinds, widths, widths[1:])
        return nn.Sequential(*(Conv1D(b, a) if kind is Conv1D else nn.Linear(a, b) for kind, a, b in pairs)).to(dtype)


def step(model, loss):
    "One optimizer step with the orthogonality gradient; every gradient must be finite."
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    d2mora.attach_orthogonality(model, optimizer)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained)
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()


@fuzzed(
    widths=st.lists(st.integers(1, 12), min_size=4, max_size=4),
    kinds=st.lists(st.sampled_from([nn.Linear, nn.Linear, Conv1D]), min_size=3, max_size=3),
    adapted=st.lists(st.integers(0, 2), min_size=1, unique=True).map(sorted),
    config=configurations(),
    dtype=DTYPES,
    leading=st.lists(st.integers(0, 3), max_size=3),
)
def test_layers_compute_train_save_and_load(widths, kinds, adapted, config, dtype, leading):
    names = [str(i) for i in adapted]
    base = chain(widths, kinds, dtype)
    model = fill(peft.get_peft_model(base, d2mora.D2MoraConfig(target_modules=names, **config)))
    assert [n[-1] for n, m in model.named_modules() if isinstance(m, D2MoraLinear)] == names
    x = torch.randn(*leading, widths[0]).to(dtype)
    y = model.train()(x)
    assert y.shape == (*leading, widths[-1]) and y.dtype == dtype
    step(model, y.float().pow(2).sum() / max(1, y.numel()))
    model.eval()
    if dtype in (torch.float32, torch.float64):
        layer, x_in = base[adapted[0]], torch.randn(3, widths[adapted[0]]).to(dtype)
        added, wanted = layer(x_in).double() - layer.base_layer(x_in).double(), loop(layer, x_in)
        assert difference(added, wanted) <= 1e-4 * max(1.0, wanted.abs().max().item())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert torch.equal(peft.PeftModel.from_pretrained(chain(widths, kinds, dtype), folder).eval()(x), model(x))
    with model.disable_adapter():
        assert torch.equal(model(x), chain(widths, kinds, dtype)(x))


SMALL = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)


def published(M, N, r, d, layers):
    "Parameters as the authors publish them."
    draw, made = torch.Generator().manual_seed(0), {}
    for layer in range(layers):
        at = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        made |= {f"{at}A.{i}.weight": torch.randn(r, d, generator=draw) for i in range(M)}
        made |= {f"{at}B.{j}.weight": torch.randn(d, r, generator=draw) for j in range(N)}
        made[f"{at}route1.weight"] = torch.randn(M, d, generator=draw)
        made[f"{at}route2.weight"] = torch.randn(N, r, generator=draw)
    return made


DAMAGE = {"nan": lambda t: t * float("nan"), "flat": torch.flatten, "wide": lambda t: torch.cat([t, t], 1)}


@fuzzed(M=ONE_TO, N=ONE_TO, r=st.integers(1, 4), d=st.integers(1, 6), layers=st.integers(1, 3), order=st.randoms())
def test_published_checkpoints_in_any_order(M, N, r, d, layers, order):
    good = published(M, N, r, d, layers)
    shuffled = dict(order.sample(list(good.items()), len(good)))
    config, weights = d2mora.convert_official_checkpoint(shuffled, 16)
    assert (config.num_down_experts, config.num_up_experts, config.r, config.lora_alpha) == (M, N, r, 16)
    same = d2mora.convert_official_checkpoint(good, 16)[1]
    assert all(torch.equal(weights[name], tensor) for name, tensor in same.items())
    key, how = order.choice(sorted(good)), order.choice(["drop", *DAMAGE])
    broken = {k: DAMAGE[how](t) if k == key and how != "drop" else t for k, t in good.items()}
    if how == "drop":
        del broken[key]
    assert complaint(lambda: d2mora.convert_official_checkpoint(broken, 16)), (key, how)


# ---- what is not says why ----
OWNERS = {"adapter": d2mora.D2MoraConfig, "data": DataConfig, "training": TrainingArguments}
FIELDS = [f"{part}.{f.name}" for part, owner in OWNERS.items() for f in fields(owner) if f.init]
SIDE_EFFECTS = ["training.deepspeed", "training.fsdp_config", "training.accelerator_config", "training.fsdp"]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANY = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@fuzzed(key=st.sampled_from(sorted(set(FIELDS) - set(SIDE_EFFECTS))), value=ANY)
def test_any_value_of_any_key_is_taken_or_named(key, value):
    said = complaint(lambda: load_recipe("demo", {key: value}))
    assert not said or key.partition(".")[2] in said or key in ("data.tasks", "adapter.pairing"), (key, value, said)


YAMLISH = st.text(alphabet="abr: -[]{},&*!|>'\"#\n\t%@`0.~\\", max_size=60) | st.text(max_size=40)
PARTS = st.dictionaries(st.sampled_from(["base", "adapter", "data", "training", "dta"]), ANY, max_size=4)


@fuzzed(text=YAMLISH | PARTS.map(yaml.safe_dump) | st.binary(max_size=40))
def test_any_recipe_file_is_read_or_refused(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        complaint(lambda: load_recipe(path))


@st.composite
def damages(draw):
    "A change of some bytes: cut off, cut out, put in, or turned over."
    place, length = draw(st.floats(0, 1)), draw(st.integers(1, 40))
    how = draw(st.sampled_from(["end", "out", "in", "flip"]))
    noise = draw(st.binary(min_size=1, max_size=6) | st.sampled_from([b"null", b"{}", b'"', b",", b"1e999", b"[[[["]))

    def damage(content):
        i = int(place * len(content))
        head, tail = content[:i], content[i:]
        flipped = bytes(b ^ 255 for b in tail[:1]) + tail[1:]
        return head + {"end": b"", "out": tail[length:], "in": noise + tail, "flip": flipped}[how]

    return damage


ROWS = json.dumps(toy_rows("toy", "boolq", "train")[:4]).encode()


@fuzzed(damage=damages(), zipped=st.booleans())
def test_damaged_data_is_named_or_sound(damage, zipped):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "boolq" / ("train.json.gz" if zipped else "train.json")
        path.parent.mkdir()
        path.write_bytes(damage(gzip.compress(ROWS) if zipped else ROWS))
        rows = []
        said = complaint(lambda: rows.extend(read_task(folder, "boolq", "train").to_list()))
        assert (str(path) in said) if said else all(row_problem(row, "boolq") == "" for row in rows)


@functools.cache
def saved_adapter():
    "A good adapter of the small LLaMA, file by file."
    with tempfile.TemporaryDirectory() as folder:
        config = d2mora.D2MoraConfig(
            r=2, num_down_experts=2, num_up_experts=2, target_modules=["q_proj"], task_type="CAUSAL_LM"
        )
        fill(peft.get_peft_model(tiny_llama(**SMALL), config)).save_pretrained(folder, save_embedding_layers=False)
        names = ("adapter_config.json", "adapter_model.safetensors")
        return {name: (Path(folder) / name).read_bytes() for name in names}


@fuzzed(
    name=st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]), damage=damages(), front=st.booleans()
)
def test_damaged_adapters_are_refused_or_loaded_whole(name, damage, front):
    files = copy.copy(saved_adapter())
    head = 900 if front and name.endswith("safetensors") else 10**9  # into the names and shapes
    files[name] = damage(files[name][:head]) + files[name][head:]
    with tempfile.TemporaryDirectory() as folder:
        for own, content in files.items():
            (Path(folder) / own).write_bytes(content)
        loaded = []
        said = complaint(lambda: loaded.append(with_adapter(tiny_llama(**SMALL), Path(folder), "tiny")))
        if not said:
            own = peft.get_peft_model_state_dict(loaded[0], save_embedding_layers=False)
            assert own and all(torch.equal(own[k], v) for k, v in read_weights(Path(folder)).items())
