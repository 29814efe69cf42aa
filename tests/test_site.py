"""The site that `make docs` builds: every page, its links, the reference, and the check that finds faults."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.fixture
def scripts(monkeypatch):
    "Import a module of scripts/."
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The book, built once by the same program as `make docs`, which checks every page."
    out = tmp_path_factory.mktemp("site") / "docs"
    command = [sys.executable, ROOT / "scripts" / "docs.py", out]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_is_a_page(site, path):
    page = re.sub(r"^\d+[a-z]?_", "", path.stem) + ".html"  # nbdev leaves the number out
    text = (site / page).read_text(encoding="utf-8")
    assert re.search(r"<title>[^<]+ · d2mora</title>", text) and "#| hide" not in text
    assert f"blob/main/nbs/{path.name}" in text and f'href="notebooks/{path.name}"' in text


def test_code_names_and_reference(site):
    text = (site / "routers.html").read_text(encoding="utf-8")
    assert 'id="many_to_many"' in text and "Exported source" in text and 'href="api_routers.html"' in text
    reference = (site / "api_tuner.html").read_text(encoding="utf-8")
    plain = re.sub(r"<[^>]+>", "", reference)
    assert "rank of every expert" in plain and "D2MoraConfig(peft.PeftConfig)" in plain
    lines = (ROOT / "d2mora" / "tuner.py").read_text(encoding="utf-8").splitlines()
    links = re.findall(r"tuner\.py#L(\d+)-L(\d+)", reference)
    assert len(links) > 10 and all(re.match(r"def |class |[A-Z]|@", lines[int(first) - 1]) for first, _ in links)


def test_project_pages(site):
    assert "Keep a Changelog" in (site / "changelog.html").read_text(encoding="utf-8")
    assert "@inproceedings" in (site / "citing.html").read_text(encoding="utf-8")
    assert (site / "404.html").exists() and (site / "contributing.html").exists()


def test_downloaded_notebooks_stand_alone(site):
    nb = nbformat.read(site / "notebooks" / "04_routers.ipynb", 4)
    text = "".join(c.source for c in nb.cells if c.cell_type == "markdown")
    assert "%pip install" in nb.cells[1].source and "](images/" not in text and ".ipynb" not in text


BROKEN = {  # what is planted in a good page -> what the check must say
    '<a href="nowhere.html"></a>': "lora.html: nowhere.html: no such file",
    '<a href="glossary.html#no-such-term"></a>': "lora.html: glossary.html#no-such-term: no such anchor",
    '<img alt="a drawing" src="images/gone.svg">': "lora.html: images/gone.svg: no such file",
    '<img src="images/01_lora.svg">': "picture without alt text",
    '<script src="https://elsewhere.example/x.js"></script>': "loaded from elsewhere",
    "<p>::: note</p>": "raw markup",
    "<p>See ?@fig-lost</p>": "raw markup",
    "<h1>Again</h1>": "2 first-level headings",
}


@pytest.mark.parametrize("planted", BROKEN)
def test_site_check_finds_what_is_planted(scripts, planted, tmp_path):
    check = scripts("site_check")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "01_lora.svg").write_text("<svg/>")
    (tmp_path / "glossary.html").write_text("<h1>Glossary</h1><p>::</p>")
    page = '<h1>LoRA</h1><p><img alt="a drawing" src="images/01_lora.svg"><pre>::: $$ {#x}</pre>'
    (tmp_path / "lora.html").write_text(page)
    assert check.faults(tmp_path, tmp_path, {}) == []
    (tmp_path / "lora.html").write_text(page + planted)
    found = check.faults(tmp_path, tmp_path, {})
    assert len(found) == 1 and BROKEN[planted] in found[0]


def test_docments_are_read_as_written(scripts):
    import ast

    api = scripts("api")
    source = 'def f(\n    x: "Later",  # one\n    n: int = 3,  # two,\n                 # and more\n) -> str:  # three\n    "Does | it."\n'
    text = "\n".join(api.entry(ast.parse(source).body[0], api.comments(source), 3))
    assert "f(x: Later, n: int = 3) -> str" in text and "Does \\| it." in text
    assert "| [n]{.code} | [int]{.code} | [3]{.code} | two, and more |" in text and "three" in text


BAD = {  # what is done to a notebook's code cells -> what is said
    "has no stored outputs: run make notebooks NB=a.ipynb": lambda code: [c.update(outputs=[]) for c in code],
    "a.ipynb fails with NameError: name 'r'": lambda code: code[0].update(
        outputs=[nbformat.v4.new_output("error", ename="NameError", evalue="name 'r' is not defined", traceback=[])]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_notebook_that_was_not_run_or_failed_is_refused(scripts, tmp_path, capsys, message):
    cell = lambda: nbformat.v4.new_code_cell("print(1)", outputs=[nbformat.v4.new_output("stream", text="1\n")])
    cells = [cell() for _ in range(4)]
    BAD[message](cells)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    with pytest.raises(SystemExit):
        scripts("docs").read_notebook(tmp_path / "a.ipynb")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


QUARTO = """#!/bin/bash
# stands for Quarto: checks that it is given a whole project, and warns as Quarto does
test "$1" = render && test -f "$2/_quarto.yml" && test -f "$2/index.ipynb" || exit 7
mkdir -p "$2/_docs" && echo '<h1>index</h1>' > "$2/_docs/index.html"
printf '%b' "$SAYS" >&2
exit ${STATUS:-0}
"""


@pytest.mark.parametrize(
    "says, status, part",
    [
        ("\\x1b[33mWARNING Unable to resolve crossref @fig-nope\\x1b[39m\\n", "0", "crossref @fig-nope"),
        ("WARN: Unable to resolve link target: 99_gone.ipynb\\n", "0", "99_gone.ipynb"),
        ("ERROR: YAML validation failed\\n", "1", "exit status 1"),
    ],
)
def test_quartos_warnings_stop_the_build(scripts, monkeypatch, capsys, tmp_path, says, status, part):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "quarto").write_text(QUARTO)
    (tmp_path / "bin" / "quarto").chmod(0o755)
    (tmp_path / "proc" / "notebooks").mkdir(parents=True)
    for name in ("_quarto.yml", "index.ipynb"):
        (tmp_path / "proc" / name).write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SAYS", says)
    monkeypatch.setenv("STATUS", status)
    with pytest.raises(SystemExit) as stopped:
        scripts("docs").render_quarto(tmp_path / "proc", tmp_path / "out")
    assert stopped.value.code == 2 and part in capsys.readouterr().err and not (tmp_path / "out").exists()


KNOWN = {  # keys of Quarto's own schema; an unknown one stops a build there
    "": "project format execute website metadata-files",
    "website": "title description favicon site-url repo-url repo-actions search navbar sidebar page-navigation "
    "back-to-top-navigation page-footer image open-graph twitter-card llms-txt",
    "sidebar": "id title logo search tools contents style alignment collapse-level",
    "html": "theme toc toc-depth code-fold code-overflow code-copy html-math-method",
}


def test_quarto_knows_every_key():
    project = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    parts = {"": project, "website": project["website"], "html": project["format"]["html"]}
    for part, given in [*parts.items(), *(("sidebar", bar) for bar in project["website"]["sidebar"])]:
        assert {*given} <= {*KNOWN[part].split()}, part
