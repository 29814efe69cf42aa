"""The monitoring callback finds planted faults, changes no result, and ends no run."""

import shutil
from functools import partial

import peft
import pytest
import torch
from helpers import adapted, fill, our_config, tiny_llama
from test_analysis import TEXTS, matrices

from d2mora import analysis
from d2mora.analysis import Monitor
from d2mora.recipe import load_recipe
from d2mora.train import read_metrics, train

SHORT = {
    "training.max_steps": 8,
    "training.logging_steps": 2,
    "training.disable_tqdm": True,
    "training.save_strategy": "steps",
    "training.save_steps": 4,
    "data.tasks": ["piqa"],
    "adapter.target_modules": ["q_proj", "v_proj"],
    "adapter.orthogonality_weight": 0.0,
}


def duplicate(model):
    matrices(model)[4][7] = -2 * matrices(model)[4][0]


def route(model, change):
    layer = model.base_model.model.model.layers[1].self_attn.k_proj
    layer.d2mora_router_down["default"].register_forward_hook(lambda router, args, weights: change(weights))


PLANTED = [
    (lambda model: None, {}),
    (duplicate, {"duplicates": ["B1 = B8 in block 1 k_proj"]}),
    (partial(route, change=lambda w: 0.01 * w + 0.99 * torch.eye(3)[2]), {"collapsed": ["A3 in block 1 k_proj"]}),
    (partial(route, change=lambda w: w * torch.tensor([1, 1, 0.01])), {"dead": ["A3 in block 1 k_proj"]}),
]


@pytest.mark.parametrize("plant, expected", PLANTED)
def test_a_planted_fault_is_found_and_no_other(plant, expected):
    model = fill(adapted(), std=0.05)
    with torch.no_grad():
        plant(model)
    found = analysis.find_faults(model, TEXTS)
    assert {kind: own for kind, own in found.items() if own} == expected


def test_a_fresh_adapter_is_healthy():
    assert not any(analysis.find_faults(peft.get_peft_model(tiny_llama(), our_config()), TEXTS).values())


def test_a_monitored_run_ends_with_the_same_weights_and_logs_the_same_when_resumed(tmp_path):
    recipe, adapter = load_recipe("demo", SHORT), "adapter/adapter_model.safetensors"
    run, plain = train(recipe, tmp_path / "run", [Monitor()]), train(recipe, tmp_path / "plain")
    assert (plain / adapter).read_bytes() == (run / adapter).read_bytes()
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert all({"grad_norm_A", "grad_norm_B", "grad_norm_routers", "alarms_dead"} <= line.keys() for line in lines)
    assert lines[-1]["alarms_duplicates"] > 0 == lines[-1]["alarms_collapsed"]  # without the loss the B's stay copies
    parts = sum(lines[-1][f"grad_norm_{part}"] ** 2 for part in ("A", "B", "routers"))
    assert parts**0.5 == pytest.approx(lines[-1]["grad_norm"], rel=1e-4)
    added = lambda key: key.startswith(("grad_norm_", "alarms_"))
    logged = read_metrics(run)
    assert [{k: v for k, v in line.items() if not added(k)} for line in logged] == read_metrics(plain)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "checkpoint-8")
    train(recipe, run, [Monitor()], resume=True)
    assert read_metrics(run) == logged


def test_a_lora_run_is_monitored_and_drawn_too(tmp_path):
    recipe = load_recipe("demo", {"training.max_steps": 1, "training.logging_steps": 1, "training.disable_tqdm": True})
    recipe.adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    run = train(recipe, tmp_path / "run", [Monitor()])
    assert {"grad_norm_A", "grad_norm_B"} <= read_metrics(run)[0].keys() and "alarms" not in str(read_metrics(run))
    assert [path.name for path in analysis.draw(run)] == ["loss.png"]


def test_monitoring_that_fails_is_told_once_and_ends_no_run(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise IndexError("The shape of the mask\n does not fit")

    monkeypatch.setattr(analysis, "find_faults", broken)
    assert len(read_metrics(train(load_recipe("demo", SHORT), tmp_path / "run", [Monitor()]))) >= 4
    told = [line for line in capsys.readouterr().err.splitlines() if "monitoring" in line]
    assert len(told) == 1 and "IndexError: The shape of the mask" in told[0] and "the run goes on" in told[0]
