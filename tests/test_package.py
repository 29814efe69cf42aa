"""The wheel: what is in it, and that it works where nothing of the repository and none of the book's tools can be seen."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from program import Program, program
import yaml
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import d2mora

ROOT = Path(__file__).parents[1]
BLOCK = "import sys\nfor name in ('fastcore', 'nbdev', 'execnb', 'datasets'): sys.modules[name] = None\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy so that the working tree stays as it is."
    import shutil
    copy, out = tmp_path_factory.mktemp("source") / "d2mora", tmp_path_factory.mktemp("wheel")
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"): shutil.copy(ROOT / name, copy)
    for name in ("d2mora", "nbs", "tests", "scripts"): shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    run = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:] + run.stdout[-2000:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    "The Python of an empty environment with the wheel in it; third-party packages are seen by a path file, nothing is downloaded."
    home = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    site = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip())
    (site / "zz_third_party.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", "--ignore-installed", wheel], check=True, timeout=300)
    return python


def run(python, code, tmp_path):
    "Run code in the empty environment, away from the repository."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([python, "-c", code], cwd=tmp_path, env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300)


def test_wheel_holds_the_package_and_nothing_of_the_book(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    own = {str(f.relative_to(ROOT)) for f in (ROOT / "d2mora").rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    assert own <= {*names}, own - {*names}
    assert {n for n in own if n.endswith(".yaml")} and "d2mora/assets/figure.mplstyle" in names
    assert all(n.startswith(("d2mora/", f"d2mora-{d2mora.__version__}.dist-info/")) for n in names)
    assert not [n for n in names if n.endswith(".ipynb")] and any(n.endswith("LICENSE") for n in names) and any(n.endswith("NOTICE") for n in names)


def test_notice_names_what_is_there():
    paths = re.findall(r"^((?:d2mora|nbs)/\S*[^\s,])", (ROOT / "NOTICE").read_text(), re.M)
    assert len(paths) >= 6 and all(list(ROOT.glob(path.rstrip("/"))) for path in paths)
    foreign = [p.name for p in (ROOT / "d2mora" / "assets").iterdir() if p.suffix in (".csv", ".safetensors") or p.name in ("toy-base", "bases")]
    assert all(name in " ".join(paths) for name in foreign)


def test_import_comes_from_the_wheel_without_the_books_tools_and_is_light(python, tmp_path):
    code = BLOCK + """import d2mora, json, peft
heavy = [m for m in ('matplotlib', 'sklearn', 'scipy.stats', 'pandas', 'click') if m in sys.modules]
import matplotlib.pyplot as plt
plt.style.use('d2mora.assets.figure')
print(json.dumps([d2mora.__file__, peft.PEFT_TYPE_TO_CONFIG_MAPPING['D2MORA'].__name__, heavy, plt.rcParams['axes.prop_cycle'].by_key()['color'][:3]]))"""
    done = run(python, code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    file, config, heavy, colors = json.loads(done.stdout)
    assert Path(file).is_relative_to(python.parents[1]) and config == "D2MoraConfig"
    assert heavy == [] and colors == ["#0072B2", "#D55E00", "#009E73"]  # the figures find their style


def test_adapter_trains_in_the_wheel(python, tmp_path):
    code = BLOCK + """
import torch, d2mora
from peft import get_peft_model
from d2mora import D2MoraConfig, attach_orthogonality
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
model = get_peft_model(base, D2MoraConfig(r=2, num_down_experts=2, num_up_experts=3, target_modules=["0", "2"]))
x, y = torch.randn(64, 8), torch.randint(2, (64,))
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
attach_orthogonality(model, optimizer)
losses = []
for _ in range(60):
    loss = torch.nn.functional.cross_entropy(model(x), y); optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())
assert losses[-1] < 0.8 * losses[0], losses[::20]
model.save_pretrained("adapter")
"""
    done = run(python, code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_command_is_installed(python, tmp_path):
    done = subprocess.run([python.parent / "d2mora", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "train" in done.stdout, done.stderr[-500:]


def test_narrow_terminal_and_no_colour(tmp_path):
    "At 60 columns no line of a table or bar wraps, and nothing is coloured; in a pipe the table is whole, and bars stay on stderr."
    import fcntl
    import pty
    import select
    import struct
    import termios

    words = ["evaluate", "--base", "toy", "--data", "toy", "--tasks", "boolq", "--limit", "4"]
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}  # the terminal itself is asked
    piped = program(*words, env=env)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    process, seen = Program(*words, env=env, output=os.ttyname(theirs)), b""
    while process.poll() is None or select.select([ours], [], [], 0.1)[0]:
        if select.select([ours], [], [], 0.1)[0]: seen += os.read(ours, 4096)
    assert process.returncode == 0 and piped.returncode == 0, piped.stderr
    lines = re.split(r"[\r\n]+", seen.decode())
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) >= 3 and max(map(len, tables)) <= 60 and all("%" not in line or len(line) <= 60 for line in lines if "it/s" in line or "row/s" in line)
    assert "\x1b[3" not in seen.decode() and "\x1b[" not in piped.stdout
    assert max(len(line) for line in piped.stdout.splitlines() if line.startswith("|")) > 60 and "row/s" not in piped.stdout


# ---- what is declared ----
IMPORT_NAMES = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "lm_eval": "lm-eval"}


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
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0] for name in names}
    return {IMPORT_NAMES.get(n, n).lower().replace("_", "-") for n in found - {*sys.stdlib_module_names, "d2mora"}}


def test_what_is_imported_is_declared_with_a_lower_bound_and_the_reverse():
    wanted, extra = declared("dependencies"), declared("eval")
    assert {name.replace("_", "-") for name in wanted} | {*extra} >= imported_packages() >= {name.replace("_", "-") for name in wanted}
    assert all(re.match(r">=\d", bound) for bound in wanted.values())


def test_import_time():
    "In processor time, which does not rise with what else the machine does."
    code = "import time, torch, peft\nstart = time.process_time()\nimport d2mora\nprint(time.process_time() - start)"
    seconds = lambda: float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert any(seconds() < 0.3 for _ in range(2)), "import d2mora takes 0.3 s or more beyond torch and peft"


def test_metadata_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive: text = archive.read(f"d2mora-{d2mora.__version__}.dist-info/METADATA").decode()
    assert wheel.stat().st_size < 6e6 and "Requires-Python: >=3.11" in text and "License-Expression: Apache-2.0" in text
    assert all(f"Programming Language :: Python :: 3.{minor}" in text for minor in (11, 12, 13)) and "Typing :: Typed" in text
    assert all(f"Project-URL: {name}" in text for name in ("Documentation", "Source", "Changelog", "Issues"))


def test_sdist_is_complete(tmp_path):
    "What an unpacked source distribution needs to build the wheel, run the tests and make the book."
    done = subprocess.run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive: names = {n.partition("/")[2] for n in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode: pytest.skip("not a git checkout")
    missing = {n for n in tracked.stdout.splitlines() if (ROOT / n).exists()} - names
    assert not missing, sorted(missing)[:20]
    assert not [n for n in names if n.startswith(("_docs", "_proc", "runs", ".venv", "nbs/.ipynb_checkpoints"))]


def test_twine_check(wheel):
    pytest.importorskip("twine")
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lowest_constraints_are_the_lower_bounds():
    lines = [line.split("==") for line in (ROOT / "constraints-lowest.txt").read_text().splitlines() if not line.startswith("#")]
    padded = lambda v: tuple(int(x) for x in (v.split(".") + ["0", "0"])[:3])
    assert {name: padded(v) for name, v in lines} == {name: padded(bound.lstrip(">=")) for name, bound in declared("dependencies").items()}


def test_pins_install_on_debians_python():
    "3.11.2: a pin that asks for a later patch release can only be answered after minutes of resolving, or not at all."
    pins = [canonicalize_name(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    there = {canonicalize_name(d.metadata["Name"]): d.metadata["Requires-Python"] or "" for d in distributions()}
    assert len(known := [name for name in pins if name in there]) > 0.9 * len(pins)
    assert not [name for name in known if not SpecifierSet(there[name]).contains("3.11.2")]


def test_versions_agree_everywhere():
    found = {name: re.search(pattern, (ROOT / name).read_text(), re.M)[1] for name, pattern in (("settings.ini", r"^version = (.+)$"), ("CITATION.cff", r"^version: (.+)$"))}
    assert {*found.values()} == {d2mora.__version__}
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text() or f"## [{d2mora.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# ---- the workflows ----
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_use_pinned_official_actions_with_least_rights(name):
    flow, text = WORKFLOWS[name], (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
    assert flow["permissions"] == {"contents": "read"} and "secrets." not in text and "pull_request_target" not in text
    for job in flow["jobs"].values():
        assert "timeout-minutes" in job and {*job.get("permissions", {})} <= {"pages", "id-token"}
        for step in job["steps"]:
            if "uses" in step: assert re.fullmatch(r"(actions|quarto-dev|pypa)/[\w/-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
            if "actions/checkout" in step.get("uses", ""): assert step["with"]["persist-credentials"] is False
    assert all(re.search(r"# v\d", line) for line in text.splitlines() if "uses:" in line)


def test_workflows_do_what_they_are_for():
    runs = {name: [step.get("run", "") for job in flow["jobs"].values() for step in job["steps"]] for name, flow in WORKFLOWS.items()}
    assert WORKFLOWS["ci"]["jobs"]["gate"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"] and any("nbdev_test" in run for run in runs["ci"])
    assert [row["set"] for row in WORKFLOWS["ci"]["jobs"]["versions"]["strategy"]["matrix"]["include"]] == ["lowest", "newest"]
    named = re.findall(r"tests/test_\w+\.py", " ".join(runs["ci"]))
    assert len(named) > 8 and all((ROOT / path).exists() for path in named)
    targets = {word for run in sum(runs.values(), []) for word in re.findall(r"^make ([a-z-]+)", run, re.M)}
    made = {*re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)}
    assert {"install", "roundtrip", "nbmake", "docs", "dist", "lab-check"} <= targets <= made
    publish = WORKFLOWS["release"]["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["environment"]["name"] == "pypi" and len(publish["steps"]) == 2


# ---- what CONTRIBUTING walks through ----
def test_the_pairing_that_contributing_walks_through(monkeypatch):
    "Its loop and its function give the same numbers, and it becomes a pairing by one entry."
    import peft
    import torch
    from helpers import difference, fill, tiny_llama, tokens

    from d2mora import lora, routers, shared_a, tuner

    names = {"torch": torch, "Tensor": torch.Tensor, "Callable": object, "mix_up": shared_a.mix_up}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for code in re.findall(r"^   ```python\n(.*?)^   ```", text, re.S | re.M): exec(textwrap.dedent(code), names)
    A, R_down, R_up = torch.randn(3, 4, 16), torch.randn(3, 16), torch.randn(5, 4)
    parts = lambda v: lora.project_down(v, A), lambda v: routers.route(v, R_down), lambda v: routers.route(v, R_up)
    for shape in ((7,), (2, 5)):
        x = torch.randn(*shape, 16)
        torch.testing.assert_close(names["strongest_to_many"](*parts, x).reshape(-1, 5, 4), names["loop"](*parts, x).reshape(-1, 5, 4))
    monkeypatch.setitem(tuner.PAIRINGS, "strongest-to-many", names["strongest_to_many"])
    base, ids = tiny_llama(), tokens()
    before = base(ids).logits
    config = d2mora.D2MoraConfig(pairing="strongest-to-many", num_down_experts=3, num_up_experts=5, r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = fill(peft.get_peft_model(base, config)).eval()
    assert difference(model(ids).logits, before) > 1e-2
    assert difference(model(ids[:1]).logits, model(ids).logits[:1]) < 1e-4  # a row does not depend on its batch mates
