"""Two processes without a GPU: the same run as one process with the same rows a step."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from d2mora.recipe import load_recipe
from d2mora.train import read_metrics, train

CONFIGS = files("d2mora") / "assets" / "accelerate"
SMALL = {
    "adapter.lora_dropout": 0.0, "adapter.orthogonality_weight": 1e-4, "adapter.target_modules": ["q_proj"], "data.tasks": ["boolq"],
    "data.train_on_inputs": True, "data.validation_rows": 14, "training.max_steps": 4, "training.warmup_steps": 0,
    "training.logging_steps": 1, "training.use_cpu": True, "training.save_strategy": "steps", "training.save_steps": 2,
    "training.disable_tqdm": True,
}  # fmt: skip
CPU = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    "One launch of two processes: the folder of d2mora's run, what was printed, and what FSDP did."
    folder, driver = tmp_path_factory.mktemp("two"), Path(__file__).with_name("two_processes.py")
    keys = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    words = ["train", "demo", *keys, "training.per_device_train_batch_size=4", "--output", folder / "run"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = list(map(str, [*launch, driver, folder / "adapter", *words]))
    done = subprocess.run(command, env=os.environ | CPU, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run", done, json.loads(done.stdout.splitlines()[-1])


def alone(folder, weight=1e-4):
    "One process with all the rows of a step."
    keys = {"training.per_device_train_batch_size": 8, "adapter.orthogonality_weight": weight}
    return train(load_recipe("demo", SMALL | keys), folder / str(weight))


def apart(a, b):
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (a, b))
    vector = lambda own: torch.cat([own[name].flatten() for name in sorted(own)])
    return float((vector(a) - vector(b)).norm() / vector(b).norm())


def test_two_processes_train_as_one(launched, tmp_path, capsys):
    two, done, _ = launched
    one = alone(tmp_path)
    assert "in 1 process\n" in capsys.readouterr().err
    assert done.stderr.count("a step reads 8 rows: 4 at once, 1 times, in 2 processes") == 1  # rank 0 alone speaks
    assert done.stdout.count("adapter:") == 1
    added = ("grad_norm_", "alarms_")  # by the command's monitoring callback
    logs = [[{k: v for k, v in m.items() if not k.startswith(added)} for m in read_metrics(run)] for run in (two, one)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] and len(logs[0]) == 4 + 2 * 2
    for a, b in zip(*logs):
        assert a.keys() == b.keys() and a.get("tokens") == b.get("tokens")
        assert all(abs(a[key] - b[key]) < 1e-5 for key in a if "loss" in key), (a, b)
    assert apart(two, one) < 1e-4
    assert (two / "checkpoints" / "checkpoint-4" / "rng_state_1.pth").exists()
    assert not list(two.rglob("*.tmp")) and not list(two.rglob(".writing"))
    for weight in (0.0, 2e-4):  # the check sees a λ that is not counted, or counted twice
        assert apart(alone(tmp_path, weight), one) > 1e-3


def test_fsdp2_sees_whole_experts_and_counts_lambda_once(launched):
    seen = launched[2]["fsdp2"]
    assert seen["dtensors"] and seen["share"] < 0.7  # split in earnest
    assert abs(seen["loss"][0] - seen["loss"][1]) < 1e-5 and seen["loss"][0] > 1 and seen["gradient"] < 1e-5
    assert all(abs(a - b) < 1e-5 for a, b in zip(*seen["losses"]))
    assert seen["adapter"] < 1e-4 and seen["saved"] < 1e-4
    assert all(distance > 1e-3 for distance in seen["wrong"].values())  # λ twice, or not at all


def test_fsdp1_trains_the_experts_and_refuses_lambda(launched):
    seen = launched[2]["fsdp1"]
    assert len(seen["losses"]) == 3
    assert all(abs(a - b) < 1e-5 for losses in seen["losses"][1:] for a, b in zip(losses, seen["losses"][0]))
    assert len(seen["refused"]) == 2 and all("use FSDP 2" in text and "\n" not in text for text in seen["refused"])


@pytest.mark.parametrize("name, kind", {"one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "multi_node": "MULTI_GPU"}.items())  # fmt: skip
def test_shipped_configurations_are_accelerates(name, kind):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses unknown keys
    assert config.distributed_type.value == kind and config.mixed_precision == "no"
    assert (config.num_machines > 1) == (name == "multi_node") and config.num_processes >= config.num_machines
