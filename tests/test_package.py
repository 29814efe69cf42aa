"""The wheel: what is in it, and that it works where nothing of the repository and none of the book's tools can be seen."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import d2mora

ROOT = Path(__file__).parents[1]
BLOCK = "import sys\nfor name in ('fastcore', 'nbdev', 'execnb', 'datasets'): sys.modules[name] = None\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy so that the working tree stays as it is."
    import shutil
    copy, out = tmp_path_factory.mktemp("source") / "d2mora", tmp_path_factory.mktemp("wheel")
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, copy)
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
    assert not [n for n in names if n.endswith(".ipynb")] and any(n.endswith("LICENSE") for n in names)


def test_import_comes_from_the_wheel_without_the_books_tools(python, tmp_path):
    done = run(python, BLOCK + "import d2mora, peft\nprint(d2mora.__file__); print(peft.PEFT_TYPE_TO_CONFIG_MAPPING['D2MORA'].__name__)", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    file, config = done.stdout.split()
    assert Path(file).is_relative_to(python.parents[1]) and config == "D2MoraConfig"


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


def test_import_is_light(python, tmp_path):
    done = run(python, "import sys, d2mora\nprint([m for m in ('matplotlib', 'sklearn', 'datasets', 'pandas', 'click') if m in sys.modules])", tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-500:]


def test_figures_find_their_style(python, tmp_path):
    done = run(python, "import matplotlib.pyplot as plt\nplt.style.use('d2mora.assets.figure'); print(plt.rcParams['axes.prop_cycle'].by_key()['color'][:3])", tmp_path)
    assert done.stdout.strip() == "['#0072B2', '#D55E00', '#009E73']", done.stderr[-500:]


def test_command_is_installed(python, tmp_path):
    done = subprocess.run([python.parent / "d2mora", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "train" in done.stdout, done.stderr[-500:]
