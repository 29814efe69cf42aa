"""A merged export behind a real server that speaks OpenAI's protocol, on loopback."""

from pathlib import Path

import pytest

from d2mora.data import read_task
from d2mora.export import export

ROOT = Path(__file__).parents[1]


def test_server_answers_as_the_model_does_in_python(tmp_path, monkeypatch):
    for name in ("fastapi", "uvicorn", "openai"): pytest.importorskip(name, reason=f"{name} is missing: pip install 'd2mora[serve]'")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from serving import answers

    export(ROOT / "nbs/results/demo", tmp_path / "served", rank=9, merge=True, form="fitted", tasks=["piqa", "openbookqa"], rows=16, limit=4)
    found = answers(tmp_path / "served", {task: read_task("toy", task, "test")[1] for task in ("piqa", "openbookqa")})
    for row in found:
        assert row["python"] == row["server"] and row["python"].startswith("the correct answer is "), row
    assert len({row["python"] for row in found}) == 2  # it did read the prompts
