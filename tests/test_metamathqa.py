"""The launcher of PEFT's benchmark MetaMathQA, with a script of the same form: the loss is attached, the script unchanged."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1] / "benchmarks" / "metamathqa"
UTILS = """
import torch

def get_optimizer_and_scheduler(model, *, optimizer_type, **settings):
    return getattr(torch.optim, optimizer_type)(model.parameters(), **settings), None
"""
RUN = """
import sys, peft, torch, transformers
from utils import get_optimizer_and_scheduler

if __name__ == "__main__":
    torch.manual_seed(0)
    config = peft.PeftConfig.from_pretrained(sys.argv[1])
    config.orthogonality_weight *= float(sys.argv[2])
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), config)
    optimizer, _ = get_optimizer_and_scheduler(model, optimizer_type="SGD", lr=1.0)
    ids = torch.arange(12)[None]
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
"""


@pytest.mark.parametrize("experiment", sorted(p.name for p in (ROOT / "experiments/d2mora").iterdir()))
def test_the_benchmark_trains_with_the_loss(experiment, tmp_path, monkeypatch):
    for name, text in {"utils.py": UTILS, "run.py": RUN}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    after = {}
    for factor in ("0", "1"):
        monkeypatch.delitem(sys.modules, "utils", raising=False)
        monkeypatch.setattr(sys, "argv", ["run.py", str(ROOT / "experiments/d2mora" / experiment), factor])
        after[factor] = runpy.run_path(str(ROOT / "run_d2mora.py"), run_name="__main__")["ran"]["trained"]
    monkeypatch.delitem(sys.modules, "utils")
    moved = {name for name, p in after["0"].items() if not torch.equal(p, after["1"][name])}
    assert moved == {name for name in after["0"] if "d2mora_A" in name}  # in the first step all B's are zero
