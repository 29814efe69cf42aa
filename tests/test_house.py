"""House rules that a machine can hold: short functions, exercises with solutions that are run, terms that link to the glossary, types."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
TAUGHT = [p for p in NOTEBOOKS if re.match(r"0[1-7]_|07b|08_|08[a-ce]_", p.name)]  # these end with exercises
SOLUTION = '#| code-fold: true\n#| code-summary: "Solution"\n'


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def too_long(source, most=25):
    "Functions of more lines than that, signature included."
    return [n.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno >= most]


@pytest.mark.parametrize("path", sorted((ROOT / "d2mora").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_functions_are_short(path):
    assert too_long(path.read_text(encoding="utf-8")) == []


def test_a_long_function_is_noticed():
    assert too_long("def f():\n" + "    x = 1\n" * 25) == ["f"] and too_long("def f():\n" + "    x = 1\n" * 24) == []


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


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem not in ("index", "glossary")], ids=lambda p: p.stem)
def test_a_notebook_asks_answers_and_leads_on(scripts, path):
    "Its question, what one needs and gets, what is known at the end, and the next notebook of the sidebar."
    text = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
    assert text[1].startswith("**The question.** ") and "**You need:**" in "".join(text[1:4]) and "**You get:**" in "".join(text[1:4])
    assert any("## What we know now" in t for t in text[-12:])
    order = scripts("standin").names_in(yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"][0]["contents"])
    following = order[order.index(path.name) + 1]
    assert re.search(rf"^Next: \[[^\]]+\]\({re.escape(following)}\)", "\n".join(text), re.M), f"the next notebook is {following}"


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


def test_counts_see_what_they_count(scripts, tmp_path):
    counts = scripts("counts")
    code = ["#| export\ndef f(\n    x,  # a number\n):\n    return x", "assert f(1) == 1", "x = 1\n\ny = 2"]
    cells = [nbformat.v4.new_markdown_cell("# Three words, $a$ [and one](more.ipynb)"), *map(nbformat.v4.new_code_cell, code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    found = counts.count([tmp_path / "a.ipynb"])
    assert (found["code cells"], found["median"], found["longest"], found["exports"], found["tests"]) == (3, 2, 4, 1, 1)


def test_types():
    "`make types`; mypy keeps what it found in .mypy_cache, so only the first run is slow."
    pytest.importorskip("mypy")
    run = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:]
