"""Bad and good input, generated: whatever is valid trains, saves, loads and equals; whatever is not raises a ValueError that says why.

200 cases here; `make fuzz` sets D2MORA_FUZZ=FILE, tries at least 5,000 and writes its figures into FILE.
"""

import copy
import functools
import json
import os
import re
import tempfile
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import torch
import yaml
from bad_input import published, rows
from helpers import PAIRS, difference, fill, loop, tiny_llama, tokens
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

import d2mora
from d2mora.data import DataConfig, read_task, row_problem
from d2mora.evaluate import with_adapter
from d2mora.recipe import load_recipe
from d2mora.checkpoints import read_adapter, read_weights
from d2mora.checks import misfit
from d2mora.tuner import PAIRINGS, D2MoraLinear

FUZZ = os.environ.get("D2MORA_FUZZ")
CASES, FEW, SOME = (820, 100, 300) if FUZZ else (27, 8, 32)  # of each property; the slow ones get fewer
quiet = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False, phases=[Phase.generate])  # a failure is shown as it was found
settings.register_profile("here", derandomize=True, **quiet)
settings.register_profile("fuzz", **quiet)
settings.load_profile("fuzz" if FUZZ else "here")
FIGURES: dict[str, dict] = {}
pytestmark = pytest.mark.filterwarnings("ignore")


def fuzzed(cases=CASES, **strategies):
    "A property: tried with values of the strategies, its cases, failures and seconds counted."
    def of(test):
        @functools.wraps(test)
        def counted(**values):
            figures = FIGURES.setdefault(test.__name__.removeprefix("test_"), {"cases": 0, "failures": 0, "seconds": 0.0})
            begun = time.perf_counter()
            torch.manual_seed(0)
            try: test(**values)
            except Exception:
                figures["failures"] += 1
                raise
            finally:
                figures["cases"] += 1
                figures["seconds"] = round(figures["seconds"] + time.perf_counter() - begun, 3)
        return settings(max_examples=cases)(given(**strategies)(counted))
    return of


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    "Keep what `datasets` caches out of the way."
    import datasets

    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(autouse=True)
def figures():
    "After each property, write what was tried so far."
    yield
    if not FUZZ: return
    total = {key: round(sum(own[key] for own in FIGURES.values())) for key in ("cases", "failures", "seconds")}
    found = {"total": total | {"properties": len(FIGURES)}, "properties": FIGURES, "versions": {name: version(name) for name in ("d2mora", "hypothesis", "torch", "transformers", "peft")}}
    Path(FUZZ).write_text(json.dumps(found, indent=1) + "\n")


def complaint(call) -> str:
    "What a call complains of: one line, as a ValueError; empty if it does not."
    try: call()
    except ValueError as error:
        assert str(error) and "\n" not in str(error), repr(error)
        return str(error)
    except Exception as error: raise AssertionError(f"{type(error).__name__} instead of a ValueError: {error}") from error
    return ""


# ---- what is drawn ----
ONE_TO = st.integers(1, 5)


@st.composite
def configurations(draw):
    "Fields of a valid configuration, without its layers."
    pairing = draw(st.sampled_from(sorted(PAIRINGS)))
    M, N = draw(ONE_TO), draw(ONE_TO)
    r = draw(st.integers(1, 9))
    M, N = next((m, n) for m, n in ((M, N), (N, N), (1, N), (M, 1), PAIRS[pairing]) if not misfit(pairing, m, n, r))
    made = dict(pairing=pairing, num_down_experts=M, num_up_experts=N, r=r, lora_alpha=draw(st.floats(0.125, 32) | st.integers(1, 32)))
    dropout = draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1e-9, 1 - 1e-9]))
    return made | dict(lora_dropout=dropout, expert_dropout=draw(st.sampled_from(["shared", "independent"])), orthogonality_weight=draw(st.floats(0, 0.01)))


@st.composite
def chains(draw):
    "Sizes and kinds of linear layers, and a configuration that names at least one of them."
    widths = draw(st.lists(st.integers(1, 12), min_size=2, max_size=4))
    kinds = [draw(st.sampled_from([nn.Linear, nn.Linear, Conv1D])) for _ in widths[1:]]
    adapted = draw(st.lists(st.integers(0, len(kinds) - 1), min_size=1, unique=True).map(sorted))
    names = [str(i) for i in adapted]
    rest = [str(i) for i in range(len(kinds)) if i not in adapted]
    said = draw(st.sampled_from([dict(target_modules=names), dict(target_modules="|".join(names)), dict(target_modules=names + rest, exclude_modules=rest or None),
                                 dict(target_modules=r"\d", exclude_modules="|".join(rest) or None)]))
    return widths, kinds, names, draw(configurations()) | said


def chain(widths, kinds, dtype):
    "The layers; the same each time."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = [nn.Linear(a, b) if kind is nn.Linear else Conv1D(b, a) for a, b, kind in zip(widths, widths[1:], kinds)]
        return nn.Sequential(*made).to(dtype)


def step(model, loss) -> None:
    "One optimizer step with the orthogonality gradient; every gradient must be finite."
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    d2mora.attach_orthogonality(model, optimizer)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained)
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()


# ---- what is valid works ----
@fuzzed(SOME, layers=chains(), dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]), cast=st.booleans(),
        leading=st.lists(st.integers(0, 3), max_size=3))
def test_layers_compute_train_save_and_load(layers, dtype, cast, leading):
    widths, kinds, names, config = layers
    if dtype == torch.float16: config = config | {"lora_dropout": min(config["lora_dropout"], 0.5), "lora_alpha": min(config["lora_alpha"], config["r"])}  # more would leave fp16's range
    base = chain(widths, kinds, dtype)
    model = fill(peft.get_peft_model(base, d2mora.D2MoraConfig(**config), autocast_adapter_dtype=cast))
    assert sorted(n.rpartition(".")[-1] for n, m in model.named_modules() if isinstance(m, D2MoraLinear)) == sorted(names)
    x, frozen = torch.randn(*leading, widths[0]).to(dtype), copy.deepcopy(base[int(names[0])].base_layer.state_dict())
    before = copy.deepcopy({n: p for n, p in model.named_parameters() if p.requires_grad})
    y = model.train()(x)
    assert y.shape == (*leading, widths[-1]) and y.dtype == dtype
    step(model, y.float().pow(2).sum() / max(1, y.numel()))
    moved = any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert moved or not x.numel() or config["lora_dropout"] > 0.01 or dtype.itemsize < 4 or not any(p.grad is not None and p.grad.abs().max() > 1e-4 for p in model.parameters())
    assert all(torch.equal(frozen[k], v) for k, v in base[int(names[0])].base_layer.state_dict().items())
    layers_equal(model.eval(), names, x, widths)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(chain(widths, kinds, dtype), folder, autocast_adapter_dtype=cast).eval()
        assert torch.equal(again(x), model(x)) and read_weights(Path(folder)).keys() == peft.get_peft_model_state_dict(model).keys()
    with model.disable_adapter(): assert torch.equal(model(x), chain(widths, kinds, dtype)(x))
    assert "cannot be merged" in complaint(model.merge_and_unload)


def layers_equal(model, names, x, widths) -> None:
    "Each adapted layer adds what the loop adds."
    layer, x = model.base_model.model[int(names[0])], torch.randn(3, widths[int(names[0])])
    if next(layer.parameters()).dtype not in (torch.float32, torch.float64): return
    x = x.to(next(layer.base_layer.parameters()).dtype)
    added, wanted = layer(x).double() - layer.base_layer(x).double(), loop(layer, x)
    assert difference(added, wanted) <= 1e-4 * max(1.0, wanted.abs().max().item()), difference(added, wanted)


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)


@st.composite
def patterns(draw):
    "Layers of a LLaMA of two blocks in PEFT's words, and (block, projection) of each."
    names, blocks = draw(st.lists(st.sampled_from(PROJECTIONS), min_size=1, unique=True)), draw(st.sampled_from([[0], [1], [0, 1]]))
    how = draw(st.sampled_from(["list", "blocks", "pattern", "all", "without"]))
    if how == "list": return dict(target_modules=names), {(b, n) for b in (0, 1) for n in names}
    if how == "blocks": return dict(target_modules=names, layers_to_transform=blocks, layers_pattern=draw(st.sampled_from([None, "layers"]))), {(b, n) for b in blocks for n in names}
    if how == "pattern": return dict(target_modules=rf".*\.layers\.({'|'.join(map(str, blocks))})\..*\.({'|'.join(names)})"), {(b, n) for b in blocks for n in names}
    if how == "all": return dict(target_modules="all-linear"), {(b, n) for b in (0, 1) for n in PROJECTIONS}
    out = [n for n in PROJECTIONS if n not in names]
    return dict(target_modules=PROJECTIONS, exclude_modules=out or None), {(b, n) for b in (0, 1) for n in names}


@fuzzed(FEW, config=configurations(), layers=patterns(), dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]), head=st.booleans(),
        sparing=st.booleans(), length=st.integers(2, 9))
def test_language_models_train_save_and_load(config, layers, dtype, head, sparing, length):
    said, wanted = layers
    saved = {"modules_to_save": ["lm_head"]} if head else {}
    model = fill(peft.get_peft_model(tiny_llama(dtype, **SMALL), d2mora.D2MoraConfig(task_type="CAUSAL_LM", **config, **said, **saved)))
    found = {(int(re.search(r"layers\.(\d)", n)[1]), n.rpartition(".")[-1]) for n, m in model.named_modules() if isinstance(m, D2MoraLinear)}
    assert found == wanted
    ids = tokens(length=length)
    step(model, model.train()(ids, labels=ids).loss)
    logits = model.eval()(ids).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        again = peft.PeftModel.from_pretrained(tiny_llama(dtype, **SMALL), folder, low_cpu_mem_usage=sparing and dtype == torch.float32).eval()  # PEFT rounds on that way to the base's dtype
        assert torch.equal(again(ids).logits, logits)
        assert read_adapter(Path(folder))["pairing"] == config["pairing"]
    assert torch.equal(model.unload()(ids).logits, tiny_llama(dtype, **SMALL)(ids).logits) or head


@fuzzed(M=ONE_TO, N=ONE_TO, r=st.integers(1, 4), d=st.integers(1, 6), layers=st.integers(1, 3), order=st.randoms(use_true_random=False), alpha=st.floats(0.1, 64))
def test_published_checkpoints_in_any_order(M, N, r, d, layers, order, alpha):
    good = published(M, N, r, d, layers)
    shuffled = order.sample(list(good.items()), len(good))
    config, weights = d2mora.convert_official_checkpoint(dict(shuffled), alpha)
    assert (config.num_down_experts, config.num_up_experts, config.r, config.lora_alpha) == (M, N, r, alpha)
    for name, tensor in d2mora.convert_official_checkpoint(good, alpha)[1].items(): assert torch.equal(weights[name], tensor)
    key, how = order.choice(sorted(good)), order.choice(["drop", "nan", "flat", "wide", "int"])
    broken = dict(good)
    if how == "drop": del broken[key]
    else: broken[key] = {"nan": good[key] * float("nan"), "flat": good[key].flatten(), "wide": torch.cat([good[key], good[key]], 1), "int": good[key].int()}[how]
    assert complaint(lambda: d2mora.convert_official_checkpoint(broken, alpha)), (key, how)


# ---- what is not says why ----
ODD = st.none() | st.booleans() | st.text(max_size=5) | st.lists(st.integers(), max_size=2) | st.just(float("nan"))
COUNT = st.integers(max_value=0) | st.integers(65536) | st.floats() | ODD
NAMES = st.integers() | st.floats() | st.lists(st.integers(), min_size=1, max_size=2) | st.just({"a": 1}) | st.sampled_from(["(", "[a", "*", "a{2,1}", "(?P<a"])
WRONG = {
    **dict.fromkeys(("r", "num_down_experts", "num_up_experts"), COUNT),
    "lora_alpha": st.floats(max_value=0) | st.just(float("inf")) | ODD,
    "orthogonality_weight": st.floats(max_value=-1e-30) | st.just(float("inf")) | ODD,
    "lora_dropout": st.floats(min_value=1) | st.floats(max_value=-1e-30) | st.integers(1) | ODD,
    **dict.fromkeys(("pairing", "expert_dropout"), ODD | st.integers()),
    "target_modules": NAMES, "exclude_modules": NAMES, "layers_pattern": NAMES, "modules_to_save": NAMES | st.text(max_size=3),
    "layers_to_transform": st.integers(max_value=-1) | st.floats() | st.text(max_size=3) | st.lists(st.integers(max_value=-1), min_size=1),
}
MEND = re.compile("give|did you mean|there are|needs|mend|leave|list")


@fuzzed(good=configurations(), wrong=st.sampled_from(sorted(WRONG)).flatmap(lambda f: st.tuples(st.just(f), WRONG[f])))
def test_wrong_fields_are_named_with_value_and_mend(good, wrong):
    field, value = wrong
    said = complaint(lambda: d2mora.D2MoraConfig(**good | {"target_modules": ["q_proj"]} | {field: value}))
    assert field in said and MEND.search(said), (field, value, said)
    shown = value[0] if field == "layers_to_transform" and isinstance(value, list) else value
    assert repr(shown) in said or f"{field}={value}" in said, (field, value, said)


FIELDS = {**{f"adapter.{f.name}": f for f in fields(d2mora.D2MoraConfig)}, **{f"data.{f.name}": f for f in fields(DataConfig)}, **{f"training.{f.name}": f for f in fields(TrainingArguments) if f.init}}
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANY = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6)
SIDE_EFFECTS = {"training.deepspeed", "training.fsdp_config", "training.accelerator_config", "training.fsdp"}


@fuzzed(key=st.sampled_from(sorted(FIELDS.keys() - SIDE_EFFECTS)), value=ANY)
def test_any_value_of_any_key_is_taken_or_named(key, value):
    said = complaint(lambda: load_recipe("demo", {key: value}))
    assert not said or key.partition(".")[2] in said or key in ("data.tasks", "adapter.pairing"), (key, value, said)


YAMLISH = st.text(alphabet="abr: -[]{},&*!|>'\"#\n\t%@`0.~\\", max_size=60) | st.text(max_size=40) | ANY.map(lambda v: yaml.safe_dump(v, allow_unicode=True))
PARTS = st.dictionaries(st.sampled_from(["base", "adapter", "data", "training", "dta"]), ANY, max_size=4).map(yaml.safe_dump)


@fuzzed(text=YAMLISH | PARTS | st.binary(max_size=40))
def test_any_recipe_file_is_read_or_refused(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        complaint(lambda: load_recipe(path))


@st.composite
def damages(draw):
    "A change of some bytes: cut off, cut out, put in, or turned over."
    place, length, how = draw(st.floats(0, 1)), draw(st.integers(1, 40)), draw(st.sampled_from(["end", "out", "in", "flip", "twice"]))
    noise = draw(st.binary(min_size=1, max_size=6) | st.sampled_from([b"null", b"{}", b'"', b",", b"1e999", b"\xff\xfe", b"[[[["]))

    def damage(content: bytes) -> bytes:
        i = int(place * len(content))
        return {"end": content[:i], "out": content[:i] + content[i + length:], "in": content[:i] + noise + content[i:],
                "flip": content[:i] + bytes(b ^ 255 for b in content[i:i + 1]) + content[i + 1:], "twice": content[:i] + content[max(0, i - length):]}[how]
    return damage


@fuzzed(damage=damages(), again=st.booleans())
def test_damaged_data_is_named_or_sound(damage, again):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "boolq" / "train.json"
        path.parent.mkdir()
        path.write_bytes(damage(damage(rows().encode()) if again else rows().encode()))
        found = []
        said = complaint(lambda: found.extend(read_task(folder, "boolq", "train").to_list()))
        assert (str(path) in said) if said else all(row_problem(row, "boolq") == "" for row in found)


@functools.cache
def saved_adapter() -> dict[str, bytes]:
    "A good adapter of the small LLaMA, file by file."
    with tempfile.TemporaryDirectory() as folder:
        config = d2mora.D2MoraConfig(r=2, num_down_experts=2, num_up_experts=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        fill(peft.get_peft_model(tiny_llama(**SMALL), config)).save_pretrained(folder, save_embedding_layers=False)
        return {name: (Path(folder) / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


@fuzzed(name=st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]), damage=damages(), front=st.booleans())
def test_damaged_adapters_are_refused_or_loaded_whole(name, damage, front):
    files = saved_adapter()
    head = 900 if front and name.endswith("safetensors") else 10**9  # into the names and shapes
    broken = damage(files[name][:head]) + files[name][head:]
    if broken == files[name]: broken = b""
    with tempfile.TemporaryDirectory() as folder:
        for own, content in (files | {name: broken}).items(): (Path(folder) / own).write_bytes(content)
        loaded = []
        said = complaint(lambda: (read_adapter(Path(folder)), loaded.append(with_adapter(tiny_llama(**SMALL), Path(folder), "tiny"))))
        if not said:
            own = peft.get_peft_model_state_dict(loaded[0], save_embedding_layers=False)
            assert own and all(torch.equal(own[k], v) for k, v in read_weights(Path(folder)).items())
