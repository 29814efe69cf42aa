"""A plan against what really happens, counted by PyTorch's own allocator and hooks, and the dry run."""

from functools import cache

import peft
import pytest
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

from d2mora.cli import main
from d2mora.data import DataConfig, prepare, read_rows
from d2mora.plan import GPUS, Load, Plan, _GiB, _micro_batch, _SPARE, _tokens_line
from d2mora.plan import count_parts, dry_run, find_gpu, fits, plan, plan_memory, plan_step, step_bytes, step_flops
from d2mora.recipe import Recipe, adapter_config, bare_model, load_recipe
from d2mora.toy import toy_base
from helpers import QKV

SIZES = dict(num_hidden_layers=4, hidden_size=64, intermediate_size=300, num_attention_heads=4)
SHAPES = {
    "llama": LlamaConfig(**SIZES | dict(num_hidden_layers=7, hidden_size=96), vocab_size=300, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=700, n_embd=64, n_layer=5, n_head=4, n_positions=128),
    "qwen2": Qwen2Config(**SIZES, vocab_size=1500, num_key_value_heads=1, tie_word_embeddings=True),
}
ADAPTERS = {"d2mora": {"peft_type": "D2MORA"}, "lora": {"peft_type": "LORA", "r": 16}}


def recipe_for(name, adapter="d2mora", **training):
    fields = {"lora_dropout": 0.05, "target_modules": ["c_attn"] if name == "gpt2" else QKV}
    return Recipe("none", ADAPTERS[adapter] | fields, DataConfig(path="toy"), training)


def real_model(name, checkpointing=False, adapter="d2mora"):
    base = AutoModelForCausalLM.from_config(SHAPES[name])
    model = peft.get_peft_model(base, adapter_config(recipe_for(name, adapter).adapter)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


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


@pytest.mark.parametrize("name, checkpointing, adapter", [
    ("llama", False, "d2mora"), ("llama", True, "d2mora"), ("gpt2", True, "lora"), ("qwen2", False, "d2mora"),
])  # fmt: skip
def test_the_plan_is_within_a_tenth_of_a_real_step(name, checkpointing, adapter):
    recipe, real = recipe_for(name, adapter), real_model(name, checkpointing, adapter)
    planned = lambda count, *sizes: plan_step(count, SHAPES[name], recipe, *sizes, checkpointing=checkpointing)
    batch, (peak,) = _micro_batch(4, 60, 60), planned(step_bytes, 4, 60)
    most = allocated(real, batch)
    assert peak == pytest.approx(most, rel=0.1)
    assert planned(step_bytes, 4, 50)[0] < 0.9 * most  # a wrong plan is noticed
    if not checkpointing:
        assert planned(step_flops, 4, 60) == pytest.approx(step_flops(real, batch), rel=0.01)
    trained = lambda model: {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    bare = bare_model(SHAPES[name], recipe)
    assert trained(bare) == trained(real)
    assert sum(count_parts(bare).values()) == sum(p.numel() for p in real.parameters())


def test_fewer_target_tokens_take_fewer_bytes():
    full, few = (plan_step(step_bytes, SHAPES["qwen2"], recipe_for("qwen2"), 4, 60, n)[0] for n in (None, 6))
    assert few < 0.8 * full
    assert few == pytest.approx(allocated(real_model("qwen2"), _micro_batch(4, 60, 6)), rel=0.1)


@cache
def toy_plan():
    keys = {"data.tasks": ["boolq"], "data.validation_rows": 100, "training.max_steps": 50}
    recipe = load_recipe("demo", keys | {"training.eval_strategy": "steps", "training.eval_steps": 10})
    return plan(
        recipe, prepare(read_rows(DataConfig("toy", ["boolq"])), recipe.data, AutoTokenizer.from_pretrained(toy_base()))
    )


def test_a_gpu_that_is_too_small_is_told():
    plain, again = (sum(parts.values()) / _GiB + _SPARE for parts in toy_plan().memory.values())
    said = lambda memory: fits(toy_plan(), find_gpu(f'{{"name": "x", "memory": {memory}, "tflops": 1}}'))
    assert again < plain and "gradient_checkpointing=true" in said((plain + again) / 2)
    assert said(plain + 0.01).startswith("fits (") and said(again - 0.01).startswith("does not fit")
    parts = {"weights": 13 * _GiB, "gradients": _GiB, "optimizer": _GiB, "activations": 40 * _GiB}
    heavy = Plan({}, 0, None, 0, 0, {False: parts, True: parts}, {})
    assert "lower training.per_device_train_batch_size" in fits(heavy, GPUS["A100-40"])
    small = fits(heavy, find_gpu('{"name": "x", "memory": 12, "tflops": 1}'))  # too small for the weights alone
    assert "batch_size" not in small and "a larger GPU" in small


def test_steps_evaluations_and_moments_are_counted():
    found = toy_plan()
    assert (found.steps, found.evaluations, found.load.rows) == (50, 5, 700) and found.flops["validation"] > 0
    moments = lambda optim: plan_memory(SHAPES["llama"], recipe_for("llama", optim=optim), 1, 8, 8, False)["optimizer"]
    assert moments("adamw_torch") == 4 * moments("adamw_bnb_8bit")


@pytest.mark.parametrize("useful, sampling, advice", [(80, "random", True), (95, "random", False)])
def test_packing_is_recommended_where_it_pays(useful, sampling, advice):
    line = _tokens_line(Load(10, useful * 10**4, 10**6, 5, (2, 5), (2, 9), 3), sampling)
    assert f"{100 - useful}.0% padding" in line and ("data.sampling=packed computes 0.80 M" in line) == advice


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = dry_run(load_recipe("demo", {"data.tasks": ["boolq"]}), gpus=list(GPUS))
    assert "two steps:  done" in text and "% padding" in text and all(name in text for name in GPUS)
    assert not list(tmp_path.iterdir()) and "a step reads" not in capsys.readouterr().err  # as `train` alone would say


@pytest.mark.parametrize("words, part", [
    ("data.tasks=[boolq] data.cutoff=100000", "data.cutoff=100000 is more than"),
    ("data.tasks=[boolq] adapter.target_modules=[nope]", "target_modules"),
])  # fmt: skip
def test_mistakes_in_a_dry_run_are_one_line(words, part, capsys):
    status = main(["train", "demo", "--dry-run", *words.split()])
    out, err = capsys.readouterr()
    assert status == 2 and part in err and err.count("\n") == 1 and not out, err
