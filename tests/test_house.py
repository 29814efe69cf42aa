"""What a machine can hold of the book: exercises with solutions that are run, terms that link to the glossary, types."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
TAUGHT = [p for p in NOTEBOOKS if re.match(r"0[1-7]_|07b|08_|08[a-ce]_", p.name)]  # these end with exercises
SOLUTION = '#| code-fold: true\n#| code-summary: "Solution"\n'


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


@pytest.mark.parametrize("path", TAUGHT, ids=lambda p: p.stem)
def test_exercises_have_folded_solutions_that_check_themselves(path):
    cells = nbformat.read(path, 4).cells
    begin = next(i for i, c in enumerate(cells) if c.source.startswith("## Exercises"))
    asked = [c for c in cells[begin:] if c.cell_type == "markdown" and re.match(r"\*\*\d\.\*\*", c.source)]
    solved = [c for c in cells[begin:] if c.source.startswith(SOLUTION)]
    assert 2 <= len(asked) == len(solved)
    for cell in solved:
        assert re.search(r"\bassert\b|assert_close", cell.source) and not cell.outputs, cell.source
        assert cell.metadata["jupyter"]["source_hidden"], "a solution that JupyterLab shows unasked"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_first_uses_link_to_the_glossary(scripts, path):
    terms = scripts("terms")
    assert path.stem in terms.OUTSIDE or terms.check(path) == []


def test_a_term_without_link_is_noticed_and_mended(scripts, tmp_path):
    terms = scripts("terms")
    text = "Two routers, `router`, [a router](https://x). Then a [router](glossary.ipynb#router)."
    cells = [nbformat.v4.new_markdown_cell(t) for t in ("# Router\n> router", text)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    assert terms.check(tmp_path / "a.ipynb", mend=True) == ["router"] and terms.check(tmp_path / "a.ipynb") == []
    assert "Two [routers](glossary.ipynb#router), `router`" in nbformat.read(tmp_path / "a.ipynb", 4).cells[1].source


def test_types():
    "`make types`; mypy keeps what it found in .mypy_cache, so only the first run is slow."
    pytest.importorskip("mypy")
    run = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:]
