"""The wheel works where nothing of the repository and none of the book's tools is installed; metadata, versions, CI."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
import venv
import zipfile
from pathlib import Path

import peft
import pytest
import torch
import yaml
from helpers import difference, fill, tiny_llama, tokens

import d2mora
from d2mora import lora, routers, shared_a, tuner

ROOT = Path(__file__).parents[1]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy so that the working tree stays as it is."
    copy, out = tmp_path_factory.mktemp("source") / "d2mora", tmp_path_factory.mktemp("wheel")
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "d2mora", copy / "d2mora", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").mkdir()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:] + run.stdout[-2000:]
    return next(out.glob("*.whl"))


def test_wheel_holds_the_package_and_only_that(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"d2mora-{d2mora.__version__}.dist-info/METADATA").decode()
    files = [f for f in (ROOT / "d2mora").rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert {str(f.relative_to(ROOT)) for f in files} <= {*names}
    assert all(n.startswith(("d2mora/", f"d2mora-{d2mora.__version__}.dist-info/")) for n in names)
    assert any(n.endswith("LICENSE") for n in names) and any(n.endswith("NOTICE") for n in names)
    assert "Requires-Python: >=3.11" in metadata and "License-Expression: Apache-2.0" in metadata
    assert wheel.stat().st_size < 6e6


IN_THE_WHEEL = """
import sys, time
for name in ("fastcore", "nbdev", "execnb", "datasets"):  # the book's tools: an import of one fails
    sys.modules[name] = None
import peft, torch
start = time.process_time()  # does not rise with what else the machine does
import d2mora
seconds = time.process_time() - start
heavy = [m for m in ("matplotlib", "scipy.stats", "pandas", "click") if m in sys.modules]
base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
config = d2mora.D2MoraConfig(r=2, num_down_experts=2, num_up_experts=3, target_modules=["0", "2"])
model = peft.get_peft_model(base, config)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
d2mora.attach_orthogonality(model, optimizer)
before = model(torch.ones(1, 8)).sum().item()
model(torch.ones(1, 8)).sum().backward()
optimizer.step()
model.save_pretrained("adapter")
import contextlib, io, json
from importlib.metadata import entry_points
(command,) = entry_points(group="console_scripts", name="d2mora")
sys.argv = ["d2mora", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    command.load()()
shown = out.getvalue()
print(json.dumps([d2mora.__file__, seconds, heavy, before - model(torch.ones(1, 8)).sum().item(), shown]))
"""


def test_the_wheel_works_where_nothing_else_of_ours_is(wheel, tmp_path):
    "In an environment with the wheel alone; third-party packages come from a path file."
    home, work = tmp_path / "environment", tmp_path / "work"
    work.mkdir()
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "zz_third_party.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    options = ["install", "-q", "--no-deps", "--no-index", "--ignore-installed", "--no-compile", wheel]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *options], check=True, timeout=300)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, "-c", IN_THE_WHEEL], cwd=work, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    file, seconds, heavy, fell, shown = json.loads(done.stdout)
    assert Path(file).is_relative_to(home) and not heavy and fell > 0
    assert seconds < 0.5, "import d2mora takes 0.5 s or more beyond torch and peft"
    assert (work / "adapter" / "adapter_model.safetensors").exists()
    assert (home / "bin" / "d2mora").exists() and "train" in shown


# ---- what is declared ----
IMPORT_NAMES = {"PIL": "pillow", "yaml": "pyyaml", "lm_eval": "lm-eval"}


def declared(key):
    "Requirements in pyproject.toml, name -> lower bound."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    given = project["dependencies"] if key == "dependencies" else project["optional-dependencies"][key]
    return dict(re.match(r"([\w.-]+)\s*(.*)", line).groups() for line in given)


def imported_packages():
    "What the modules import, our own package and Python's left out."
    found = set()
    for path in (ROOT / "d2mora").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return {IMPORT_NAMES.get(n, n).lower().replace("_", "-") for n in found - {*sys.stdlib_module_names, "d2mora"}}


def test_what_is_imported_is_declared_with_a_lower_bound_and_the_reverse():
    wanted = {name.replace("_", "-"): bound for name, bound in declared("dependencies").items()}
    assert {*wanted, *declared("eval")} >= imported_packages() >= {*wanted}
    assert all(re.match(r">=\d", bound) for bound in wanted.values())


def test_lowest_constraints_are_the_lower_bounds():
    text = (ROOT / "constraints-lowest.txt").read_text()
    lines = [line.split("==") for line in text.splitlines() if not line.startswith("#")]
    padded = lambda v: tuple(int(x) for x in (v.split(".") + ["0", "0"])[:3])
    bounds = {name: padded(bound.lstrip(">=")) for name, bound in declared("dependencies").items()}
    assert {name: padded(v) for name, v in lines} == bounds


def test_versions_and_notice_agree_with_what_is_there():
    for name, pattern in (("settings.ini", r"^version = (.+)$"), ("CITATION.cff", r"^version: (.+)$")):
        assert re.search(pattern, (ROOT / name).read_text(), re.M)[1] == d2mora.__version__
    paths = re.findall(r"^((?:d2mora|nbs)/\S*[^\s,])", (ROOT / "NOTICE").read_text(), re.M)
    assert len(paths) >= 6 and all(list(ROOT.glob(path.rstrip("/"))) for path in paths)


# ---- the workflows ----
def test_workflows_use_pinned_official_actions_with_least_rights():
    for name, flow in WORKFLOWS.items():
        assert flow["permissions"] == {"contents": "read"} and "pull_request_target" not in flow[True], name
        for job in flow["jobs"].values():
            assert "timeout-minutes" in job and {*job.get("permissions", {})} <= {"pages", "id-token"}, name
            for action in [step["uses"] for step in job["steps"] if "uses" in step]:
                assert re.fullmatch(r"(actions|quarto-dev|pypa)/[\w/-]+@[0-9a-f]{40}", action), action


def test_workflows_call_targets_and_tests_that_exist():
    runs = [
        step.get("run", "") for flow in WORKFLOWS.values() for job in flow["jobs"].values() for step in job["steps"]
    ]
    tests = {*re.findall(r"tests/test_\w+\.py", " ".join(runs))}
    assert len(tests) > 6 and all((ROOT / path).exists() for path in tests)
    targets = {word for run in runs for word in re.findall(r"^make ([a-z-]+)", run, re.M)}
    made = {*re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)}
    assert {"install", "roundtrip", "docs", "dist", "lab-check"} <= targets <= made


def test_the_pairing_that_contributing_walks_through(monkeypatch):
    "Its loop and its function give the same numbers, and it becomes a pairing by one entry."
    names = {"torch": torch, "Tensor": torch.Tensor, "Callable": object, "mix_up": shared_a.mix_up}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for code in re.findall(r"^   ```python\n(.*?)^   ```", text, re.S | re.M):
        exec(textwrap.dedent(code), names)
    A, R_down, R_up = torch.randn(3, 4, 16), torch.randn(3, 16), torch.randn(5, 4)
    parts = lambda v: lora.project_down(v, A), lambda v: routers.route(v, R_down), lambda v: routers.route(v, R_up)
    x = torch.randn(2, 5, 16)
    expected = names["loop"](*parts, x).reshape(-1, 5, 4)
    torch.testing.assert_close(names["strongest_to_many"](*parts, x).reshape(-1, 5, 4), expected)
    monkeypatch.setitem(tuner.PAIRINGS, "strongest-to-many", names["strongest_to_many"])
    sizes = dict(num_down_experts=3, num_up_experts=5, r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base, ids = tiny_llama(), tokens()
    before = base(ids).logits
    model = fill(peft.get_peft_model(base, d2mora.D2MoraConfig(pairing="strongest-to-many", **sizes))).eval()
    assert difference(model(ids).logits, before) > 1e-2
    assert difference(model(ids[:1]).logits, model(ids).logits[:1]) < 1e-4  # a row does not depend on the others
