"""The demo's adapter, exported and merged, behind `transformers serve`: its answers beside the model's own in Python (notebook 15).

python benchmarks/serving.py         # nbs/results/serving.json; needs pip install "d2mora[serve]"
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
import transformers
from common import ROOT, command_line, store, versions

from d2mora.data import read_task
from d2mora.export import export
from d2mora.tasks import TASKS, evaluation_prompt


@contextmanager
def served(folder: Path, seconds: float = 180):
    "A `transformers serve` of a model's folder on a free port of loopback; yields its address."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), *where]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | quiet) as server,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, server, log, seconds)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_for(address, server, log, seconds):
    "Return as soon as a server answers; say what it said if it ends, or takes too long."
    end = time.monotonic() + seconds
    while True:
        try:
            return urlopen(f"{address}/health", timeout=5).read()
        except (URLError, OSError):
            if server.poll() is not None or time.monotonic() > end:
                log.seek(0)
                raise RuntimeError(f"no server at {address}: {log.read()[-1500:]}") from None
            time.sleep(0.3)


def completion(address: str, model: str, prompt: str, tokens: int = 16) -> str:
    "What the server writes after a prompt, by OpenAI's protocol for completions."
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}).encode()
    request = Request(f"{address}/v1/completions", body, {"content-type": "application/json"})
    with urlopen(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]["text"]


@torch.no_grad()
def written(model, tokenizer, prompt: str, tokens: int = 16) -> str:
    "What a model in this process writes, greedily."
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def answers(folder: Path, rows: dict[str, dict]) -> list[dict]:
    "Prompts answered in Python and by the server."
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer, found = transformers.AutoTokenizer.from_pretrained(folder), []
    with served(folder) as address:
        for task, row in rows.items():
            prompt = evaluation_prompt(row)
            both = {"python": written(model, tokenizer, prompt), "server": completion(address, str(folder), prompt)}
            found.append({"task": task, "answer": row["answer"]} | {who: said.strip() for who, said in both.items()})
    return found


def main():
    parser = command_line(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "nbs/results/serving.json")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    rows = {task: read_task("toy", task, "test")[0] for task in TASKS}
    with tempfile.TemporaryDirectory() as scratch:
        found = export(ROOT / "nbs/results/demo", Path(scratch) / "served", rank=3, distill=100, merge=True, limit=32)
        result = {"command": "python benchmarks/serving.py", "form": found[""]["taken"], "rank": 3}
        result |= {"answers": answers(Path(scratch) / "served", rows), "versions": versions("fastapi", "uvicorn")}
    store(options.output, result)
    print(json.dumps(result["answers"], indent=1))


if __name__ == "__main__":
    main()
