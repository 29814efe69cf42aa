"""D2MoRA: asymmetric mixtures of LoRA experts with dual orthogonality, as a PEFT method."""

__version__ = "0.1.0"
