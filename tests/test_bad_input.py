"""Every case of the catalogue (bad_input.py): one line that says what, where and how to mend; nothing written, nothing hangs.

With D2MORA_RECORD=1 the messages are kept in benchmarks/results/bad_input.json, from which the site's page is made.
"""

import json
import os
import re
import shlex
import signal
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import bad_input
import peft
import pytest
import torch
import yaml
from bad_input import CASES, Case

import d2mora
from d2mora.cli import main
from d2mora.data import read_rows, read_task
from d2mora.recipe import load_recipe

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "bad_input.json"
SECONDS = 60  # a case that takes longer hangs
NAMES = {**vars(bad_input), "d2mora": d2mora, "peft": peft, "torch": torch, "Path": Path, "load_recipe": load_recipe, "read_task": read_task, "read_rows": read_rows, "D2MoraConfig": d2mora.D2MoraConfig, "convert_official_checkpoint": d2mora.convert_official_checkpoint}


def put(case: Case, folder: Path) -> None:
    "Make the case's files."
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content): content(path)
        else: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def there(folder: Path) -> dict:
    "All that lies in a folder: files by their hash, folders too."
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in folder.rglob("*")}


def stop(*args): raise TimeoutError(f"no answer within {SECONDS} s")


def answer(case: Case, folder: Path, capsys) -> str:
    "What the case says; it must be one line, with exit 2 or as a ValueError."
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    capsys.readouterr()
    try:
        if not case.given.startswith("d2mora "):
            with pytest.raises(ValueError) as error: eval(case.given, dict(NAMES))
            said = str(error.value)
        else:
            status, (out, err) = main(shlex.split(case.given)[1:]), capsys.readouterr()
            assert (status, out) == (2, ""), (status, out, err)
            said = err.removesuffix("\n")
    finally: signal.alarm(0)
    assert "\n" not in said and "Traceback" not in said, said
    return said.replace(str(folder), ".").replace(str(folder.resolve()), ".")


def pattern(says: str) -> str:
    "… stands for anything."
    return ".*".join(map(re.escape, says.split("…")))
