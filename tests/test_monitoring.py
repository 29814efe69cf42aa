"""The monitoring callback finds planted faults, changes no result, and ends no run."""

import shutil

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from helpers import adapted, fill, our_config, tiny_llama
from test_analysis import BASES, TEXTS, matrices, model_of

from d2mora import analysis
from d2mora.analysis import Monitor
from d2mora.recipe import load_recipe
from d2mora.scoring import padded
from d2mora.train import read_metrics, train

SHORT = {
    "training.max_steps": 12,
    "training.logging_steps": 2,
    "training.disable_tqdm": True,
    "training.save_strategy": "steps",
    "training.save_steps": 6,
    "data.tasks": ["piqa"],
    "adapter.target_modules": ["q_proj", "v_proj"],
    "adapter.orthogonality_weight": 0.0,
}


def plant_duplicate(model):
    matrices(model)[4][7] = -2 * matrices(model)[4][0]


def plant_collapse(model):
    layer, seen = model.base_model.model.model.layers[1].self_attn.k_proj, []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((0, 1))))
    model(torch.tensor([TEXTS[0]]))
    hook.remove()
    layer.d2mora_router_down["default"].weight.zero_()[2] = 100 * seen[0] / seen[0].norm() ** 2


def plant_zeros(model):
    for name, p in model.named_parameters():
        if "d2mora_A" in name or "d2mora_B" in name:
            p.zero_()


PLANTED = [
    (plant_duplicate, "duplicates", ["B1 = B8 in block 1 k_proj"]),
    (plant_collapse, "collapsed", ["A3 in block 1 k_proj"]),
    (plant_zeros, "vanished", ["grad_norm_A", "grad_norm_B", "grad_norm_routers"]),
]


@pytest.mark.parametrize("plant, kind, expected", PLANTED)
def test_a_planted_fault_is_found_and_no_other(plant, kind, expected):
    model = fill(adapted(), std=0.05)
    with torch.no_grad():
        plant(model)
    ids = torch.tensor([TEXTS[0]])
    model(input_ids=ids, labels=ids).loss.backward()
    norms = {name: float(norm) for name, norm in analysis.gradient_norms(model).items()}
    found = analysis.find_faults(model, TEXTS, norms)
    assert {kind: own for kind, own in found.items() if own} == {kind: expected}


def test_gradient_norms_are_those_of_a_loop():
    model, ids = adapted(), torch.tensor([TEXTS[0]])
    model(input_ids=ids, labels=ids).loss.backward()
    for part, key in (("A", "d2mora_A"), ("B", "d2mora_B"), ("routers", "d2mora_router")):
        squares = sum(p.grad.square().sum() for name, p in model.named_parameters() if key in name)
        torch.testing.assert_close(analysis.gradient_norms(model)[f"grad_norm_{part}"], squares.sqrt())


def test_an_expert_without_weight_is_dead_and_a_fresh_adapter_is_healthy():
    assert analysis._routing_faults("m.0.q_proj", {"up": torch.tensor([[0.6, 0.39, 0.01]])}) == {
        "collapsed": [],
        "dead": ["B3 in block 0 q_proj"],
    }
    fresh = peft.get_peft_model(tiny_llama(), our_config())
    assert not any(analysis.find_faults(fresh, TEXTS).values())


@pytest.fixture(scope="module")
def monitored(tmp_path_factory):
    "A run without the orthogonality loss, whose B's stay copies, with checkpoints."
    recipe = load_recipe("demo", SHORT)
    return recipe, train(recipe, tmp_path_factory.mktemp("monitored") / "run", [Monitor()])


def test_a_monitored_run_ends_with_the_same_weights_and_logs_more(monitored, tmp_path, capsys):
    recipe, run = monitored
    plain = train(recipe, tmp_path / "plain")
    adapter = "adapter/adapter_model.safetensors"
    assert (plain / adapter).read_bytes() == (run / adapter).read_bytes()
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert all({"grad_norm_A", "grad_norm_B", "grad_norm_routers", "alarms_dead"} <= line.keys() for line in lines)
    assert lines[-1]["alarms_duplicates"] > 0 and lines[-1]["alarms_collapsed"] == 0 == lines[-1]["alarms_vanished"]
    parts = sum(lines[-1][f"grad_norm_{part}"] ** 2 for part in ("A", "B", "routers"))
    assert parts**0.5 == pytest.approx(lines[-1]["grad_norm"], rel=1e-4)
    added = ("grad_norm_", "alarms_")
    assert [{k: v for k, v in line.items() if not k.startswith(added)} for line in read_metrics(run)] == read_metrics(
        plain
    )


def test_a_resumed_run_logs_the_same(monitored, tmp_path):
    recipe, run = monitored
    again = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoints" / "checkpoint-12")
    train(recipe, again, [Monitor()], resume=True)
    assert read_metrics(again) == read_metrics(run)


def test_a_lora_run_is_monitored_too(tmp_path):
    recipe = load_recipe("demo", {"training.max_steps": 2, "training.logging_steps": 1, "training.disable_tqdm": True})
    recipe.adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    run = train(recipe, tmp_path / "run", [Monitor()])
    assert {"grad_norm_A", "grad_norm_B"} <= read_metrics(run)[0].keys() and "alarms" not in str(read_metrics(run))
    assert [path.name for path in analysis.draw(run)] == ["loss.png"]


def trained(model, folder):
    "Three monitored steps of transformers' Trainer with a padded batch."
    data = Dataset.from_list([{"input_ids": text} for text in TEXTS])
    args = transformers.TrainingArguments(
        str(folder),
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )

    def collate(rows):
        ids, mask = padded([row["input_ids"] for row in rows], "right", "cpu")
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    trainer = transformers.Trainer(model, args, train_dataset=data, data_collator=collate, callbacks=[Monitor()])
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("name", BASES)
def test_unusual_models_are_monitored(name, tmp_path, capsys):
    lines = trained(model_of(name), tmp_path)
    assert len(lines) == 3 and all({"alarms_dead", "grad_norm_A"} <= line.keys() for line in lines)
    assert "monitoring" not in capsys.readouterr().err


def test_a_fault_that_stays_is_reported_once(tmp_path, capsys):
    model = model_of("flattened")
    with torch.no_grad():
        for B in matrices(model)[:1]:
            B[1] = B[0]
    trained(model, tmp_path)
    told = [line for line in capsys.readouterr().err.splitlines() if "B1 = B2" in line]
    assert told == ["step 2: duplicates: B1 = B2 in block 0 q_proj"]


@pytest.mark.parametrize(
    "part, left",
    [("find_faults", "grad_norm_A"), ("gradient_norms", "alarms_dead"), ("_sample_rows", "alarms_dead")],
)
def test_monitoring_that_fails_is_told_once_and_ends_no_run(part, left, tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise IndexError("The shape of the mask\n does not fit")

    monkeypatch.setattr(analysis, part, broken)
    lines = trained(model_of("flattened"), tmp_path)
    told = [line for line in capsys.readouterr().err.splitlines() if "monitoring" in line]
    assert len(lines) == 3 and all(left in line for line in lines)
    assert len(told) == 1 and "IndexError: The shape of the mask" in told[0] and "the run goes on" in told[0]
