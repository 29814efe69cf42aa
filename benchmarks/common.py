"""What the scripts of this folder share; it needs the standard library and torch only."""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("D2MORA_SHARED") or ROOT.parent / "shared")


def command_line(text: str) -> argparse.ArgumentParser:
    "A parser whose help is the script's own text."
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def versions(*more: str) -> dict[str, str]:
    "Versions of what every result depends on, of further packages, and of Python."
    names = ("d2mora", "torch", "transformers", "peft", *more)
    return {name: version(name) for name in names} | {"python": platform.python_version(), "system": platform.system()}


def machine() -> dict:
    "Processor, cores, threads, load and GPU."
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    about = {"processor": name or platform.processor() or platform.machine(), "cores": os.cpu_count()}
    about |= {"threads": torch.get_num_threads(), "load_at_start": os.getloadavg()[0]}
    return about | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}


def store(path: Path, result: dict) -> None:
    "Write a result as JSON, whole or not at all."
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
