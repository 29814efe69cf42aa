"""The notebooks: order of imports, round trip with the package, exercises, glossary links, descriptions of pictures."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [p for p in NOTEBOOKS if re.match(r"(0[1-9]|1[0-5])_", p.name)]
ORDER = (
    "utils lora shared_a many_to_many routers orthogonality lean checks tuner checkpoints tasks toy data recipe "
    "train scoring evaluate analysis compare plan export cli"
).split()
SOLUTION = '#| code-fold: true\n#| code-summary: "Solution"\n'


@pytest.fixture
def scripts(monkeypatch):
    "Import a module of scripts/."
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def imported_modules(source):
    "Modules of ours that a source imports, anywhere in it."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = ("d2mora." if node.level else "") + (node.module or "")
            found |= {module} | {f"{module.rstrip('.')}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("d2mora.")} & {*ORDER}


def test_modules_import_only_earlier_ones():
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "d2mora").glob("[!_]*.py")}
    assert sources.keys() == {*ORDER}
    late = {m: [o for o in imported_modules(text) if ORDER.index(o) >= ORDER.index(m)] for m, text in sources.items()}
    assert not {module: names for module, names in late.items() if names}
    assert imported_modules("def f():\n    from .tuner import D2MoraConfig") == {"tuner"}  # the check can fail
    assert imported_modules("from d2mora import lora") == {"lora"}


def test_round_trip_sees_a_hand_edit_and_an_orphan(scripts):
    before = {"d2mora/kept.py": b"a = 1", "d2mora/left.py": b"", "nbs/00_kept.ipynb": b'"#| default_exp kept"'}
    changed, orphan = scripts("roundtrip").faults(before, before | {"d2mora/kept.py": b"a = 2"})
    assert changed.startswith("d2mora/kept.py differs") and orphan.startswith("d2mora/left.py is exported by no")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapters_end_with_exercises_that_check_themselves(path):
    cells = nbformat.read(path, 4).cells
    begin = next(i for i, c in enumerate(cells) if "## Exercise" in c.source)
    solved = [c for c in cells[begin:] if c.source.startswith(SOLUTION)]
    assert solved
    for cell in solved:
        assert re.search(r"\bassert\b|assert_close", cell.source) and not cell.outputs, cell.source
        assert cell.metadata["jupyter"]["source_hidden"], "a solution that JupyterLab shows unasked"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_to_the_glossary_colab_and_pictures(scripts, path):
    nb = nbformat.read(path, 4)
    assert path.stem == "glossary" or scripts("terms").check(path) == [], "run scripts/terms.py --mend"
    for cell in nb.cells:
        plotted = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        assert not plotted or re.search(r"^#\| ?fig-(alt|cap): *\S", cell.source, re.M), cell.source
    assert path.stat().st_size < 250_000, "run make notebooks, or show less"
    assert not scripts("colab").mended(nb, path.name), "run scripts/colab.py --mend"


def test_a_term_without_link_is_noticed_and_mended(scripts, tmp_path):
    terms = scripts("terms")
    text = "Two routers, `router`, [a router](https://x). Then a [router](glossary.ipynb#router)."
    cells = [nbformat.v4.new_markdown_cell(t) for t in ("# Router\n> router", text)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    assert terms.check(tmp_path / "a.ipynb", mend=True) == ["router"] and terms.check(tmp_path / "a.ipynb") == []
    assert "Two [routers](glossary.ipynb#router), `router`" in nbformat.read(tmp_path / "a.ipynb", 4).cells[1].source


def test_drawings_are_what_the_script_draws(scripts):
    drawings = scripts("drawings")
    for name in drawings.DRAWINGS:
        drawn = (drawings.IMAGES / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == drawings.svg(name) and "<desc" in drawn, f"run make drawings: {name}.svg"


def test_the_colab_cell_acts_in_colab_only(scripts, monkeypatch):
    from execnb.shell import CaptureShell

    colab, ran = scripts("colab"), []
    shell = CaptureShell()
    shell.system = lambda line: ran.append(line)
    shell.run_line_magic = lambda name, line, *_: ran.append(f"{name} {line}")
    shell.run_cell(colab.CELL)
    assert ran == []
    monkeypatch.setitem(sys.modules, "google.colab", object())
    shell.run_cell(colab.CELL)
    assert [line.split()[0] for line in ran] == ["test", "pip", "cd"] and colab.REPO in ran[0]


def test_running_again_shows_what_changed_and_leaves_a_failing_notebook(scripts, tmp_path, capsys):
    path = tmp_path / "a.ipynb"
    stored = {"print(1 + 1)": "3\n", "#| slow\nprint('kept')": "measured\n"}
    output = lambda text: nbformat.v4.new_output("stream", text=text)
    cells = [nbformat.v4.new_code_cell(code, outputs=[output(text)]) for code, text in stored.items()]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert scripts("notebooks").run_and_say(path)
    out = capsys.readouterr().out
    assert "a.ipynb" in out and "    -3" in out and "    +2" in out
    assert [c.outputs[0].text for c in nbformat.read(path, 4).cells] == ["2\n", "measured\n"]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise KeyError('lost')")]), path)
    before = path.read_bytes()
    assert not scripts("notebooks").run_and_say(path)
    assert "a.ipynb fails: KeyError: 'lost'" in capsys.readouterr().err and path.read_bytes() == before


def test_types_and_style():
    "mypy on the package, ruff on what is written by hand."
    pytest.importorskip("mypy")
    written = ["nbs", "tests", "scripts", "benchmarks"]
    for command in (["mypy"], ["ruff", "format", "--check", *written], ["ruff", "check", *written]):
        run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stdout[-3000:]
