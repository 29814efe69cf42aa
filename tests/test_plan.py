"""A plan against what really happens, counted by PyTorch's own allocator and hooks, and the whole command."""

import re
import time
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from program import program
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

from d2mora.cli import main
from d2mora.data import DataConfig, prepare, read_rows
from d2mora.plan import GPUS, SPARE, GiB, count_parts, dry_run, find_gpu, fits, micro_batch, plan, plan_step
from d2mora.plan import small_shape, step_bytes, step_flops
from d2mora.recipe import Recipe, adapter_config, bare_model, base_shape, load_recipe
from d2mora.toy import toy_base
from helpers import QKV

SIZES = dict(num_hidden_layers=4, hidden_size=64, intermediate_size=300, num_attention_heads=4)
SHAPES = {
    "llama": LlamaConfig(**SIZES | dict(num_hidden_layers=7, hidden_size=96), vocab_size=300, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=700, n_embd=64, n_layer=5, n_head=4, n_positions=128),
    "qwen2": Qwen2Config(**SIZES, vocab_size=1500, num_key_value_heads=1, tie_word_embeddings=True),
}
ADAPTERS = {"d2mora": {"peft_type": "D2MORA"}, "lora": {"peft_type": "LORA", "r": 16}}


def recipe_for(name, adapter="d2mora"):
    fields = {"lora_dropout": 0.05, "target_modules": ["c_attn"] if name == "gpt2" else QKV}
    return Recipe("none", ADAPTERS[adapter] | fields, DataConfig(path="toy"), {})


def real_model(name, checkpointing=False, adapter="d2mora"):
    base = AutoModelForCausalLM.from_config(SHAPES[name])
    model = peft.get_peft_model(base, adapter_config(recipe_for(name, adapter).adapter)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def planned(count, name, *sizes, adapter="d2mora", **options):
    return plan_step(count, SHAPES[name], recipe_for(name, adapter), *sizes, **options)


def allocated(model, batch):
    "The most bytes that PyTorch's own allocator handed out in a step."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model(**batch).loss.backward()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def saved(model, batch):
    "Bytes that autograd saves for backward, by its own hook; weights not counted."
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**batch)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_memory_is_what_the_allocator_hands_out(name, checkpointing):
    real = allocated(real_model(name, checkpointing), micro_batch(4, 60, 60))
    assert planned(step_bytes, name, 4, 60, checkpointing=checkpointing)[1] == pytest.approx(real, rel=0.1)
    assert planned(step_bytes, name, 4, 50, checkpointing=checkpointing)[1] < 0.9 * real  # a wrong plan is noticed


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_what_autograd_saves(name, adapter):
    real = saved(real_model(name, adapter=adapter), micro_batch(2, 50, 50))
    assert planned(step_bytes, name, 2, 50, adapter=adapter)[0] == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_and_operations_are_the_real_ones(name):
    real, bare = real_model(name), bare_model(SHAPES[name], recipe_for(name))
    trained = lambda model: {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    parts = count_parts(bare)
    assert sum(parts.values()) == sum(p.numel() for p in real.parameters()) and "rest" not in parts
    assert trained(bare) == trained(real)
    assert planned(step_flops, name, 2, 40) == pytest.approx(step_flops(real, micro_batch(2, 40, 40)), rel=0.01)


def test_fewer_target_tokens_keep_fewer_bytes():
    full, few = (planned(step_bytes, "qwen2", 4, 60, targets)[1] for targets in (None, 6))
    assert few < 0.8 * full
    assert few == pytest.approx(step_bytes(real_model("qwen2"), micro_batch(4, 60, 6))[1], rel=0.1)


@cache
def toy_plan(**training):
    overrides = {"data.tasks": ["boolq"], "data.validation_rows": 100}
    recipe = load_recipe("demo", overrides | {f"training.{k}": v for k, v in training.items()})
    return plan(recipe, prepare(read_rows("toy", ["boolq"]), recipe.data, AutoTokenizer.from_pretrained(toy_base())))


def test_a_gpu_that_is_too_small_is_told():
    plain, again = (sum(parts.values()) / GiB + SPARE for parts in toy_plan().memory.values())
    assert again < plain
    said = lambda memory: fits(toy_plan(), find_gpu(f'{{"name": "x", "memory": {memory}, "tflops": 1}}'))
    assert said(plain + 0.01).startswith("fits (") and said(again - 0.01).startswith("does not fit")
    assert "gradient_checkpointing=true" in said((plain + again) / 2)


def test_the_run_is_counted_in_steps_and_evaluations():
    found = toy_plan(max_steps=50, eval_strategy="steps", eval_steps=10)
    assert (found.steps, found.evaluations, found.load.rows) == (50, 5, 700)
    assert found.flops["validation"] > 0 and toy_plan().flops["validation"] == 0


@pytest.mark.parametrize("base", ["huggyllama/llama-7b", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen2.5-0.5B"])
def test_the_small_model_is_of_the_same_kind(base):
    small = AutoModelForCausalLM.from_config(small_shape(base_shape(base), 100))
    assert type(small.config) is type(base_shape(base)) and small.config.num_hidden_layers == 2
    assert sum(p.numel() for p in small.parameters()) < 200_000


def test_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = dry_run(load_recipe("demo-hard", {"data.tasks": ["boolq"]}), gpus=list(GPUS))
    assert "two steps:  done" in text and all(name in text for name in GPUS) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, part",
    [
        ("", "--output is missing"),
        ("--dry-run --output x", "--dry-run writes nothing"),
        ("--gpu H100 --output x", "belong to --dry-run"),
        ("--dry-run --gpu H1000", "did you mean 'H100'"),
        (f"--dry-run --tokenizer {Path(__file__).parent}", "tokenizer of"),
        ("--dry-run data.cutoff=100000", "data.cutoff=100000 is more than"),
        ("--dry-run adapter.target_modules=[nope]", "target_modules"),
        ("--dry-run data.cutoff=4", "data.cutoff"),
    ],
)
def test_command_mistakes_are_one_line_and_status_2(words, part, capsys):
    status = main(["train", "demo", *words.split()])
    out, err = capsys.readouterr()
    assert status == 2 and part in err.strip().splitlines()[-1] and "Traceback" not in err and not out, err


def test_the_command_of_the_7b_recipe_in_three_minutes(shared):
    tasks = "data.tasks=[boolq,piqa,social_i_qa,winogrande,ARC-Easy,ARC-Challenge,openbookqa]"
    words = ["train", "llama-7b-m3n8r8", f"data.path={shared}/data", tasks]
    start = time.time()
    done = program(*words, "--tokenizer", f"{shared}/tokenizers/mistral-v1", "--dry-run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.time() - start < 180
    for part in ("35,788,800", "standing in for that of huggyllama/llama-7b", "105,675 rows", "answer lost"):
        assert part in done.stdout, part
    assert "A100-40     fits" in done.stdout and "two steps:  done" in done.stdout
    useful, computed = map(float, re.search(r"([\d.]+) M useful tokens of ([\d.]+) M computed", done.stdout).groups())
    assert 12 < useful < 13 and 0.8 < useful / computed < 0.9
