"""A plan against what really happens: other witnesses than the plan's own counter, and the whole command."""

import functools
import re
import time

import pytest
import torch
from program import program
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

import peft
from d2mora.cli import main
from d2mora.data import prepare
from d2mora.data import DataConfig, read_rows
from d2mora.recipe import base_shape, bare_model
from d2mora.plan import count_parts, micro_batch, plan_step, step_bytes, step_flops
from d2mora.plan import GPUS, dry_run, find_gpu, fits, plan, small_shape
from d2mora.recipe import Recipe, adapter_config, load_recipe
from helpers import QKV

SHAPES = {
    "llama": LlamaConfig(vocab_size=300, hidden_size=96, intermediate_size=200, num_hidden_layers=7, num_attention_heads=6, num_key_value_heads=3),
    "gpt2": GPT2Config(vocab_size=700, n_embd=64, n_layer=5, n_head=4, n_positions=128),
    "qwen2": Qwen2Config(vocab_size=1500, hidden_size=64, intermediate_size=300, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True),
}
ADAPTERS = {"d2mora": {"peft_type": "D2MORA", "lora_dropout": 0.05}, "lora": {"peft_type": "LORA", "r": 16, "lora_dropout": 0.05}}


def recipe_for(shape, adapter="d2mora", **training):
    targets = ["c_attn"] if SHAPES["gpt2"] is shape else QKV
    return Recipe("none", ADAPTERS[adapter] | {"target_modules": targets}, DataConfig(path="toy"), training)


def real_model(shape, recipe, checkpointing=False):
    model = peft.get_peft_model(AutoModelForCausalLM.from_config(shape), adapter_config(recipe.adapter)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def allocated(model, batch):
    "The most bytes that PyTorch's own allocator handed out in a step."
    from torch.profiler import ProfilerActivity, profile

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
def test_planned_memory_is_what_the_allocator_hands_out(name, checkpointing):
    recipe, batch = recipe_for(SHAPES[name]), micro_batch(4, 60, 60)
    _, planned = plan_step(step_bytes, SHAPES[name], recipe, 4, 60, checkpointing=checkpointing)
    assert planned == pytest.approx(allocated(real_model(SHAPES[name], recipe, checkpointing), batch), rel=0.1)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", SHAPES)
def test_planned_activations_are_what_autograd_saves(name, adapter):
    recipe, batch = recipe_for(SHAPES[name], adapter), micro_batch(2, 50, 50)
    kept, _ = plan_step(step_bytes, SHAPES[name], recipe, 2, 50)
    assert kept == pytest.approx(saved(real_model(SHAPES[name], recipe), batch), rel=0.1)


def test_a_wrong_plan_would_be_noticed():
    recipe = recipe_for(SHAPES["llama"])
    real = allocated(real_model(SHAPES["llama"], recipe), micro_batch(4, 60, 60))
    assert plan_step(step_bytes, SHAPES["llama"], recipe, 4, 50)[1] < 0.9 * real
    assert plan_step(step_bytes, SHAPES["llama"], recipe, 4, 60, checkpointing=True)[1] < 0.9 * real


@pytest.mark.parametrize("name", SHAPES)
def test_planned_parameters_are_the_real_ones(name):
    recipe = recipe_for(SHAPES[name])
    real, bare = real_model(SHAPES[name], recipe), bare_model(SHAPES[name], recipe)
    assert sum(count_parts(bare).values()) == sum(p.numel() for p in real.parameters()) and "rest" not in count_parts(bare)
    assert {n: p.shape for n, p in bare.named_parameters() if p.requires_grad} == {n: p.shape for n, p in real.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", SHAPES)
def test_planned_operations_are_the_real_ones(name):
    recipe = recipe_for(SHAPES[name])
    real = step_flops(real_model(SHAPES[name], recipe), micro_batch(2, 40, 40))
    assert plan_step(step_flops, SHAPES[name], recipe, 2, 40) == pytest.approx(real, rel=0.01)


def test_operations_of_a_frozen_base_are_four_for_each_weight_and_token():
    shape, recipe = base_shape("huggyllama/llama-7b"), load_recipe("llama-7b-m3n8r8", {"data.path": "toy"})
    _, total = plan_step(step_flops, shape, recipe, 1, 128)
    assert total == pytest.approx(4 * 6.6e9 * 128, rel=0.05)  # 2 forward and 2 for the gradient of the input; none for the frozen weights


def test_grading_the_answer_only_keeps_fewer_bytes():
    recipe = recipe_for(SHAPES["qwen2"])
    full, few = (plan_step(step_bytes, SHAPES["qwen2"], recipe, 4, 60, graded)[1] for graded in (None, 6))
    assert few < 0.8 * full
    real = step_bytes(real_model(SHAPES["qwen2"], recipe), micro_batch(4, 60, 6))[1]
    assert few == pytest.approx(real, rel=0.1)


@functools.cache
def toy_plan(**training):
    from transformers import AutoTokenizer

    from d2mora.toy import toy_base

    recipe = load_recipe("demo", {"data.tasks": ["boolq"], "data.validation_rows": 100, **{f"training.{k}": v for k, v in training.items()}})
    return plan(recipe, prepare(read_rows("toy", ["boolq"]), recipe.data, AutoTokenizer.from_pretrained(toy_base())))


def test_a_gpu_that_is_too_small_is_told():
    from d2mora.plan import GiB, SPARE

    found = toy_plan()
    sizes = {again: sum(parts.values()) / GiB + SPARE for again, parts in found.memory.items()}
    assert sizes[True] < sizes[False]
    gpu = lambda memory: find_gpu(f'{{"name": "x", "memory": {memory}, "tflops": 1}}')
    assert fits(found, gpu(sizes[False] + 0.01)).startswith("fits (")
    assert "gradient_checkpointing=true" in fits(found, gpu((sizes[False] + sizes[True]) / 2))
    assert fits(found, gpu(sizes[True] - 0.01)).startswith("does not fit")


def test_the_run_is_counted_in_steps_and_evaluations():
    found = toy_plan(max_steps=50, eval_strategy="steps", eval_steps=10)
    assert (found.steps, found.evaluations, found.load.rows) == (50, 5, 700)
    assert found.flops["validation"] > 0 and toy_plan().flops["validation"] == 0


@pytest.mark.parametrize("base", ["huggyllama/llama-7b", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen2.5-0.5B"])
def test_the_small_model_is_of_the_same_kind(base):
    shape = base_shape(base)
    small = AutoModelForCausalLM.from_config(small_shape(shape, 100))
    assert type(small.config) is type(shape) and small.config.num_hidden_layers == 2 and sum(p.numel() for p in small.parameters()) < 200_000


def test_dry_run_of_every_adapter_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for recipe in ("demo", "demo-hard"):
        said = dry_run(load_recipe(recipe, {"data.tasks": ["boolq"]}), gpus=list(GPUS))
        assert "two steps:  done" in said and all(name in said for name in GPUS)
    assert not list(tmp_path.iterdir())


def words(capsys, *args):
    status = main(list(args))
    out = capsys.readouterr()
    return status, out.out, out.err.strip()


def test_command_mistakes_are_one_line_and_status_2(capsys, tmp_path):
    for args, part in {
        ("train", "demo"): "--output is missing",
        ("train", "demo", "--dry-run", "--output", "x"): "--dry-run writes nothing",
        ("train", "demo", "--gpu", "H100", "--output", "x"): "belong to --dry-run",
        ("train", "demo", "--dry-run", "--gpu", "H1000"): "did you mean 'H100'",
        ("train", "demo", "--dry-run", "--tokenizer", str(tmp_path)): "tokenizer of",
        ("train", "demo", "--dry-run", "data.cutoff=100000"): "data.cutoff=100000 is more than",
        ("train", "demo", "--dry-run", "adapter.target_modules=[nope]"): "target_modules",
        ("train", "demo", "--dry-run", "data.cutoff=4"): "data.cutoff",
    }.items():
        status, out, err = words(capsys, *args)
        assert status == 2 and part in err.splitlines()[-1] and "Traceback" not in err, (args, err)
        assert not out


def test_the_command_of_the_7b_recipe_in_three_minutes(shared):
    tasks = "data.tasks=[boolq,piqa,social_i_qa,winogrande,ARC-Easy,ARC-Challenge,openbookqa]"
    command = ["train", "llama-7b-m3n8r8", f"data.path={shared}/data", tasks, "--tokenizer", f"{shared}/tokenizers/mistral-v1", "--dry-run"]
    start = time.time()
    done = program(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.time() - start < 180
    for part in ("35,788,800", "standing in for that of huggyllama/llama-7b", "105,675 rows", "answer lost", "A100-40     fits", "two steps:  done"):
        assert part in done.stdout, part
    useful, computed = map(float, re.search(r"([\d.]+) M useful tokens of ([\d.]+) M computed", done.stdout).groups())
    assert 12 < useful < 13 and 0.8 < useful / computed < 0.9
