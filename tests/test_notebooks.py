"""The notebooks: round trip with the package, order of imports, exercises, glossary links, descriptions of pictures."""

import ast
import importlib
import json
import re
import shutil
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
FORMATTED = ["nbs", "tests", "scripts", "benchmarks"]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


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


def test_round_trip_sees_a_hand_edit_and_an_orphan(scripts, tmp_path):
    roundtrip = scripts("roundtrip")
    for folder in ("d2mora", "nbs"):
        (tmp_path / folder).mkdir()
    exports = {"cells": [{"cell_type": "code", "source": ["#| default_exp kept\n"]}]}
    (tmp_path / "nbs" / "00_kept.ipynb").write_text(json.dumps(exports, indent=1))
    for name in ("kept", "left"):
        (tmp_path / "d2mora" / f"{name}.py").write_text("a = 1\n")
    before = roundtrip.fingerprints(tmp_path)
    (tmp_path / "d2mora" / "kept.py").write_text("a = 2\n")
    assert roundtrip.differing(before, roundtrip.fingerprints(tmp_path)) == ["d2mora/kept.py"]
    assert roundtrip.orphans(tmp_path) == ["d2mora/left.py"]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapters_say_how_long_they_run_and_end_with_exercises_that_check_themselves(path):
    cells = nbformat.read(path, 4).cells
    assert re.search(r"\*Runs in about \d+ s on two cores", "\n".join(c.source for c in cells[:8]))
    begin = next(i for i, c in enumerate(cells) if "## Exercise" in c.source)
    asked = re.findall(r"^\*\*\d\.\*\*", "\n".join(c.source for c in cells[begin:] if c.cell_type == "markdown"), re.M)
    solved = [c for c in cells[begin:] if c.source.startswith(SOLUTION)]
    assert len(solved) >= 1 and len(solved) == max(len(asked), 1)
    for cell in solved:
        assert re.search(r"\bassert\b|assert_close", cell.source) and not cell.outputs, cell.source
        assert cell.metadata["jupyter"]["source_hidden"], "a solution that JupyterLab shows unasked"


@each_notebook
def test_terms_link_to_the_glossary_and_colab_is_prepared(scripts, path):
    terms, colab = scripts("terms"), scripts("colab")
    assert path.stem in terms.OUTSIDE or terms.check(path) == [], "run scripts/terms.py --mend"
    assert not colab.mended(nbformat.read(path, 4), path.name), "run scripts/colab.py --mend"


def test_a_term_without_link_is_noticed_and_mended(scripts, tmp_path):
    terms = scripts("terms")
    text = "Two routers, `router`, [a router](https://x). Then a [router](glossary.ipynb#router)."
    cells = [nbformat.v4.new_markdown_cell(t) for t in ("# Router\n> router", text)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    assert terms.check(tmp_path / "a.ipynb", mend=True) == ["router"] and terms.check(tmp_path / "a.ipynb") == []
    assert "Two [routers](glossary.ipynb#router), `router`" in nbformat.read(tmp_path / "a.ipynb", 4).cells[1].source


@each_notebook
def test_pictures_are_described_and_outputs_are_small(path):
    for cell in nbformat.read(path, 4).cells:
        plotted = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        assert not plotted or re.search(r"^#\| ?fig-(alt|cap): *\S", cell.source, re.M), cell.source
        if cell.cell_type == "markdown":
            for alt, image in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", cell.source):
                assert (path.parent / image).is_file() and len(alt) > 10, image
    assert path.stat().st_size < 250_000, "run make notebooks, or show less"


def test_drawings_are_what_the_script_draws(scripts):
    drawings = scripts("drawings")
    for name in drawings.DRAWINGS:
        drawn = (drawings.IMAGES / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == drawings.svg(name) and "<desc" in drawn, f"run make drawings: {name}.svg"


def test_readme_check_sees_a_change(scripts, monkeypatch, tmp_path):
    readme = scripts("readme")
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "index.ipynb", tmp_path / "nbs")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for arguments in (["readme.py"], ["readme.py", "--check"]):
        monkeypatch.setattr(sys, "argv", arguments)
        readme.main()
    (tmp_path / "README.md").write_text("edited by hand")
    with pytest.raises(SystemExit, match="make readme"):
        readme.main()


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


def write_notebook(path, *cells):
    "Code cells, each with its stored text."
    stored = lambda text: [nbformat.v4.new_output("stream", text=text)] if text else []
    made = [nbformat.v4.new_code_cell(code, outputs=stored(text)) for code, text in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


def test_running_again_shows_what_changed_and_leaves_a_failing_notebook(scripts, tmp_path, capsys):
    path = write_notebook(tmp_path / "a.ipynb", ("print(1 + 1)", "3\n"), ("#| slow\nprint('kept')", "measured\n"))
    assert scripts("notebooks").run_and_say(path)
    out = capsys.readouterr().out
    assert "a.ipynb" in out and "    -3" in out and "    +2" in out
    assert [c.outputs[0].text for c in nbformat.read(path, 4).cells] == ["2\n", "measured\n"]
    path = write_notebook(tmp_path / "b.ipynb", ("print(1)", "0\n"), ("raise KeyError('lost')", ""))
    before = path.read_bytes()
    assert not scripts("notebooks").run_and_say(path)
    assert "b.ipynb fails: KeyError: 'lost'" in capsys.readouterr().err and path.read_bytes() == before


def test_types_and_style():
    "mypy on the package, ruff on what is written by hand."
    pytest.importorskip("mypy")
    for command in (["mypy"], ["ruff", "format", "--check", *FORMATTED], ["ruff", "check", *FORMATTED]):
        run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stdout[-3000:]
