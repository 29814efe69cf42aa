"""D2MoRA: asymmetric mixtures of LoRA experts with dual orthogonality, as a PEFT method."""

__version__ = "0.1.0"

import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait for each other sleep; spinning, two of them take ten times as long beside other processes
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # its hint at a faster kernel would stand beside a command's one line

from d2mora.orthogonality import attach_orthogonality, orthogonality_loss
from d2mora.checkpoints import convert_official_checkpoint
from d2mora.tuner import D2MoraConfig, D2MoraModel, parameter_groups

__all__ = [
    "D2MoraConfig",
    "D2MoraModel",
    "D2MoraTrainer",
    "attach_orthogonality",
    "convert_official_checkpoint",
    "orthogonality_loss",
    "parameter_groups",
]


def __getattr__(name):
    "Import the trainer, which needs datasets, only where it is asked for."
    if name == "D2MoraTrainer":
        from d2mora.train import D2MoraTrainer

        return D2MoraTrainer
    raise AttributeError(f"module 'd2mora' has no attribute '{name}'")
