"""How long it takes to read, survey and tokenize the 107,675 real rows, and to plan the 7B run.

D2MORA_SHARED=../shared python benchmarks/data_speed.py nbs/results/data-speed.json
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import SHARED, machine, store

TASKS = "boolq,piqa,social_i_qa,winogrande,ARC-Easy,ARC-Challenge,openbookqa"


def clock():
    "Wall seconds, and CPU seconds of this process and of those that it waited for."
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.time(), sum(u.ru_utime + u.ru_stime for u in used)


def timed(work):
    before = clock()
    work()
    return dict(zip(("wall_s", "cpu_s"), (round(b - a, 1) for a, b in zip(before, clock()))))


def measure() -> dict:
    from transformers import AutoTokenizer

    from d2mora.data import DataConfig, _encode_rows, read_rows, survey

    mistral, names, path = SHARED / "tokenizers/mistral-v1", TASKS.split(","), str(SHARED / "data")
    tokenizer, load = AutoTokenizer.from_pretrained(mistral), os.getloadavg()[0]
    config = DataConfig(path=path, tasks=names, prompt="official", cutoff=512)
    found = {"read and check": timed(lambda: read_rows(config))}
    rows = read_rows(config)
    found["survey"] = timed(lambda: survey(rows, config))
    found["tokenize"] = timed(lambda: _encode_rows(rows, config, tokenizer))
    command = ["-m", "d2mora.cli", "train", "llama-7b-m3n8r8", f"data.path={path}", f"data.tasks=[{TASKS}]"]
    command = [sys.executable, *command, "--tokenizer", str(mistral), "--dry-run"]
    dry = timed(lambda: subprocess.run(command, check=True, capture_output=True))
    found["dry run of llama-7b-m3n8r8"] = dry
    loads = {"load_before": round(load, 1), "load_after": round(os.getloadavg()[0], 1)}
    about = {"rows": len(rows), "tokenizer": "mistral-v1", "cores": os.cpu_count()} | loads
    return about | {"machine": machine()["processor"], "seconds": found}


if __name__ == "__main__":
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
    result = measure()
    print(json.dumps(result, indent=1))
    if len(sys.argv) > 1:
        store(Path(sys.argv[1]), result)
