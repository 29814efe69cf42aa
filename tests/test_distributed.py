"""Two processes without a GPU: the same run as one process with the same rows a step."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2mora.recipe import load_recipe
from d2mora.train import read_metrics
from d2mora.train import train

CONFIGS = files("d2mora") / "assets" / "accelerate"
SMALL = {
    "adapter.lora_dropout": 0.0, "adapter.orthogonality_weight": 1e-4, "data.tasks": ["boolq", "piqa"], "data.train_on_inputs": True,
    "data.validation_rows": 14, "training.max_steps": 6, "training.warmup_steps": 0, "training.logging_steps": 1, "training.use_cpu": True,
    "training.save_strategy": "steps", "training.save_steps": 3, "training.disable_tqdm": True,
}  # fmt: skip
CPU = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(command):
    done = subprocess.run(list(map(str, command)), env=CPU, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def words(output, batch):
    keys = SMALL | {"training.per_device_train_batch_size": batch, "training.per_device_eval_batch_size": batch}
    return ["train", "demo", *[f"{key}={json.dumps(value)}" for key, value in keys.items()], "--output", output]


def vector(run):
    return torch.cat(
        [tensor.flatten() for _, tensor in sorted(load_file(run / "adapter" / "adapter_model.safetensors").items())]
    )


def apart(a, b):
    return float((vector(a) - vector(b)).norm() / vector(b).norm())


def test_two_processes_train_as_one(tmp_path):
    "DDP by torchrun against one process by accelerate's launcher and our shipped file."
    two = run([*TORCHRUN, "-m", "d2mora.cli", *words(tmp_path / "two", 4)])
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        CONFIGS / "one_gpu.yaml",
        "--cpu",
        "-m",
        "d2mora.cli",
    ]
    one = run([*launch, *words(tmp_path / "one", 8)])
    assert "a step reads 8 rows: 4 at once, 1 times, in 2 processes" in two.stderr and "in 1 process\n" in one.stderr
    assert two.stderr.count("a step reads") == 1 and two.stdout.count("adapter:") == 1  # rank 0 alone speaks
    logs = [read_metrics(tmp_path / name) for name in ("two", "one")]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] and len(logs[0]) == 6 + 2 * 3
    for a, b in zip(*logs):
        assert a.keys() == b.keys() and a.get("tokens") == b.get("tokens")
        assert all(abs(a[key] - b[key]) < 1e-5 for key in a if "loss" in key), (a, b)
    assert apart(tmp_path / "two", tmp_path / "one") < 1e-4
    assert (tmp_path / "two" / "checkpoints" / "checkpoint-6" / "rng_state_1.pth").exists()
    assert not list((tmp_path / "two").rglob("*.tmp")) and not list((tmp_path / "two").rglob(".writing"))
    for weight in (0.0, 2e-4):  # the check sees a λ that is not counted, or counted twice
        keys = SMALL | {"training.per_device_train_batch_size": 8, "adapter.orthogonality_weight": weight}
        assert apart(train(load_recipe("demo", keys), tmp_path / str(weight)), tmp_path / "one") > 1e-3


def test_fsdp2_sees_whole_experts_and_counts_lambda_once(tmp_path):
    driver = Path(__file__).with_name("fsdp_run.py")
    seen = json.loads(run([*TORCHRUN, driver, tmp_path / "adapter"]).stdout.splitlines()[-1])
    assert seen["dtensors"] and seen["share"] < 0.7  # split in earnest
    assert abs(seen["loss"][0] - seen["loss"][1]) < 1e-5 and seen["loss"][0] > 1 and seen["gradient"] < 1e-5
    assert all(abs(a - b) < 1e-5 for a, b in zip(*seen["losses"]))
    assert seen["adapter"] < 1e-4 and seen["saved"] < 1e-4
    assert all(distance > 1e-3 for distance in seen["wrong"].values())  # λ twice, or not at all


def test_fsdp1_trains_the_experts_and_refuses_lambda():
    seen = json.loads(run([*TORCHRUN, Path(__file__).with_name("fsdp_run.py")]).stdout.splitlines()[-1])
    assert len(seen["losses"]) == 3 and all(
        abs(a - b) < 1e-5 for losses in seen["losses"][1:] for a, b in zip(losses, seen["losses"][0])
    )
    assert len(seen["refused"]) == 2 and all("use FSDP 2" in text and "\n" not in text for text in seen["refused"])


@pytest.mark.parametrize("name", ["one_gpu", "ddp", "fsdp2", "multi_node"])
def test_shipped_configurations_are_accelerates(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses unknown keys
    kind = {"one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "multi_node": "MULTI_GPU"}[name]
    assert config.distributed_type.value == kind and config.mixed_precision == "no"
    assert (config.num_machines > 1) == (name == "multi_node") and config.num_processes >= config.num_machines


def test_the_fsdp2_file_makes_a_plugin_of_version_2(monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin

    keys = load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(keys) <= known, set(keys) - known
    for key, value in keys.items():  # as the launcher hands them on
        monkeypatch.setenv("FSDP_" + key.removeprefix("fsdp_").upper(), str(value))
    plugin = FullyShardedDataParallelPlugin(fsdp_version=keys["fsdp_version"])
    assert (
        plugin.fsdp_version == 2
        and plugin.reshard_after_forward is True
        and plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    )
