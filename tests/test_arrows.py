"""Arrows point back: a module imports only modules of earlier notebooks; the package needs no notebook tools."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIDEBAR = re.findall(r"- (\w+)\.ipynb", (ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def module_of(notebook):
    "The module that a notebook makes, if it makes one."
    path = ROOT / "nbs" / f"{notebook}.ipynb"
    found = path.is_file() and re.search(r"#\|\s*default_exp (\w+)", path.read_text(encoding="utf-8"))
    return found and found[1]


ORDER = (
    "utils lora shared_a many_to_many routers orthogonality lean checks tuner checkpoints tasks toy data recipe train scoring evaluate analysis compare plan export cli".split()
)
MODULES = sorted(p.stem for p in (ROOT / "d2mora").glob("*.py") if not p.stem.startswith("_"))


def imported(source):
    "Every module that the source imports, anywhere in it."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = "d2mora" * (node.level == 1) + "." * (node.level == 1 and bool(node.module)) + (node.module or "")
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def forward_arrows(module, source):
    "Modules of ours that stand at or behind `module` in the sequence and are imported by it."
    ours = {name.split(".")[1] for name in imported(source) if name.startswith("d2mora.")}
    return sorted(m for m in ours if m in ORDER and ORDER.index(m) >= ORDER.index(module))


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_back(module):
    source = (ROOT / "d2mora" / f"{module}.py").read_text(encoding="utf-8")
    assert module in ORDER, f"{module}: no notebook of the sidebar in _quarto.yml makes it"
    assert forward_arrows(module, source) == []
    top = {name.split(".")[0] for name in imported(source)}
    assert not top & {"fastcore", "nbdev", "execnb", "IPython"}


def test_a_forward_arrow_is_noticed():
    assert forward_arrows("lora", "def f():\n    from d2mora.tuner import D2MoraConfig") == ["tuner"]
    assert forward_arrows("lora", "from .tuner import D2MoraConfig") == ["tuner"]
    assert forward_arrows("tuner", "from d2mora import lora") == []


def test_import_needs_torch_and_peft_only():
    "`import d2mora` works where nbdev, fastcore, datasets, matplotlib and the rest are not installed."
    blocked = ["fastcore", "nbdev", "datasets", "matplotlib", "click", "pydantic"]
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import d2mora
d2mora.D2MoraConfig()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
