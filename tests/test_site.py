"""The site that `make docs` builds: every page, its links, the reference, and the checks that find faults."""

import ast
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


def test_every_notebook_is_a_page_with_a_markdown_twin(site):
    listed = (site / "llms.txt").read_text(encoding="utf-8")
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        name = re.sub(r"^\d+[a-z]?_", "", path.stem)  # nbdev leaves the number out
        text = (site / f"{name}.html").read_text(encoding="utf-8")
        assert re.search(r"<title>[^<]+ · d2mora</title>", text) and "#| hide" not in text, path
        assert f'href="notebooks/{path.name}"' in text and "google.colab" not in text, path
        twin = (site / f"{name}.llms.md").read_text(encoding="utf-8")
        assert twin.startswith("# ") and ".ipynb)" not in re.sub(r"\(https?:\S+", "", twin), path
        assert "data:image" not in twin and f"/{name}.llms.md)" in listed, path


def test_code_is_folded_and_found(site):
    text = (site / "routers.html").read_text(encoding="utf-8")
    assert 'id="many_to_many"' in text and "Exported source" in text and 'href="api_routers.html"' in text
    assert "<summary>Code of the plot</summary>" in text and "<details open><summary>Exported source" in text
    found = (site / "search.js").read_text(encoding="utf-8")
    assert '"routers.html#many_to_many"' in found and "<" not in re.sub(r'"(?:[^"\\]|\\.)*"', "", found)


def test_the_reference_and_the_project_pages(site):
    reference = (site / "api_tuner.html").read_text(encoding="utf-8")
    plain = re.sub(r"<[^>]+>", "", reference)
    assert "rank of every expert" in plain and "D2MoraConfig(peft.PeftConfig)" in plain
    lines = (ROOT / "d2mora" / "tuner.py").read_text(encoding="utf-8").splitlines()
    links = re.findall(r"tuner\.py#L(\d+)-L(\d+)", reference)
    assert len(links) > 10 and all(re.match(r"def |class |[A-Z]|@", lines[int(first) - 1]) for first, _ in links)
    assert "Keep a Changelog" in (site / "changelog.html").read_text(encoding="utf-8")
    assert "@inproceedings" in (site / "citing.html").read_text(encoding="utf-8")
    assert (site / "404.html").exists() and (site / "contributing.html").exists()


def test_downloaded_notebooks_stand_alone(site):
    nb = nbformat.read(site / "notebooks" / "index.ipynb", 4)
    text = "".join(c.source for c in nb.cells if c.cell_type == "markdown")
    assert nb.cells[2].source.count("d2mora") > 3 and "/content" not in nb.cells[2].source
    assert "](images/" not in text and not re.search(r"\]\((?!http)[^)]*\.ipynb", text)


# ---- in a browser ----
PLANTED = {  # a page that is good but for this -> what the check says
    "<main><pre style='width: 300px; overflow: auto'>" + "x" * 400 + "</pre></main>": "bad.html at 1400: pre is",
    "<main><p style='width: 500px'>wide</p></main>": "bad.html at 400: the page is",
    "<nav class='book' style='height: 2000px'></nav>": "bad.html at 1400: the sidebar is 2000 high",
    "<script>undefined.x</script>": "Cannot read properties",
}


@pytest.fixture
def browser(scripts):
    "The check in Chromium; where there is none it is not run, and says so."
    check = scripts("browser_check")
    if not check.browser_path():
        pytest.skip("no Chromium here: widths, sidebar and sliders were not looked at in a browser")
    return check


def test_nothing_is_wider_than_the_screen(browser, site):
    assert browser.faults(site) == []


def test_the_browser_sees_what_is_planted(browser, tmp_path):
    live = (ROOT / "nbs" / "live.html").read_text(encoding="utf-8")
    (tmp_path / "good.html").write_text(f"<!doctype html><main>{live}</main>", encoding="utf-8")
    assert browser.faults(tmp_path) == []
    (tmp_path / "good.html").write_text(f"<!doctype html><main>{live.replace('8 * lambda', '0 * lambda')}</main>")
    assert "λ moves the cosine" in browser.faults(tmp_path)[0]
    (tmp_path / "good.html").unlink()
    for planted, said in PLANTED.items():
        (tmp_path / "bad.html").write_text(f"<!doctype html>{planted}")
        assert any(said in line for line in browser.faults(tmp_path)), said


# ---- the checks without a browser ----
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


def test_site_check_finds_what_is_planted(scripts, tmp_path):
    check = scripts("site_check")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "01_lora.svg").write_text("<svg/>")
    (tmp_path / "glossary.html").write_text("<h1>Glossary</h1><p>::</p>")
    page = '<h1>LoRA</h1><p><img alt="a drawing" src="images/01_lora.svg"><pre>::: $$ {#x}</pre>'
    (tmp_path / "lora.html").write_text(page)
    assert check.faults(tmp_path, tmp_path, {}) == []
    for planted, said in BROKEN.items():
        (tmp_path / "lora.html").write_text(page + planted)
        found = check.faults(tmp_path, tmp_path, {})
        assert len(found) == 1 and said in found[0], planted


def test_docments_are_read_as_written(scripts):
    api = scripts("api")
    source = 'def f(\n    x: "Later",  # one\n    n: int = 3,  # two,\n                 # and more\n) -> str:  # three\n    "Does | it."\n'
    text = "\n".join(api.entry(ast.parse(source).body[0], api.comments(source), 3))
    assert "f(x: Later, n: int = 3) -> str" in text and "Does \\| it." in text
    assert "| [n]{.code} | [int]{.code} | [3]{.code} | two, and more |" in text and "three" in text


@pytest.mark.parametrize("failed", [False, True])
def test_a_notebook_that_was_not_run_or_failed_is_refused(scripts, tmp_path, capsys, failed):
    error = nbformat.v4.new_output("error", ename="NameError", evalue="name 'r' is not defined", traceback=[])
    cells = [nbformat.v4.new_code_cell("print(1)", outputs=[error] * failed) for _ in range(4)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    with pytest.raises(SystemExit):
        scripts("docs").read_notebook(tmp_path / "a.ipynb")
    err = capsys.readouterr().err
    said = (
        "a.ipynb fails with NameError: name 'r'" if failed else "has no stored outputs: run make notebooks NB=a.ipynb"
    )
    assert err.count("\n") == 1 and said in err


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
    "html": "theme toc toc-depth code-fold code-overflow code-copy html-math-method grid respect-user-color-scheme",
    "grid": "sidebar-width body-width margin-width gutter-width",
}


def test_quarto_knows_every_key():
    project = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    html = project["format"]["html"]
    parts = {"": project, "website": project["website"], "html": html, "grid": html["grid"]}
    for part, given in [*parts.items(), *(("sidebar", bar) for bar in project["website"]["sidebar"])]:
        assert {*given} <= {*KNOWN[part].split()}, part
