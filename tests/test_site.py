"""The site that `make docs` builds: its pages, and the checks that find faults."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

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
    listed, searched = ((site / name).read_text(encoding="utf-8") for name in ("llms.txt", "search.js"))
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        name = re.sub(r"^[0-9]+_", "", path.stem)  # nbdev drops the number
        text = (site / f"{name}.html").read_text(encoding="utf-8")
        assert re.search(r"<title>[^<]+ · d2mora</title>", text) and "#| hide" not in text, path
        assert f"/nbs/{path.name}" in text and "google.colab" not in text, path
        twin = (site / f"{name}.llms.md").read_text(encoding="utf-8")
        assert twin.startswith("# ") and ".ipynb)" not in re.sub(r"\(https?:\S+", "", twin), path
        assert "data:image" not in twin and f"/{name}.llms.md)" in listed, path
    text = (site / "routers.html").read_text(encoding="utf-8")
    assert 'id="many_to_many"' in text and "<details open><summary>Exported source" in text
    assert "<summary>Code of the plot</summary>" in text and "Figure 1. Left" in text and ">Equation 1</a>" in text
    assert '"routers.html#many_to_many"' in searched
    assert 'href="routers.html#many_to_many"' in (site / "api.html").read_text(encoding="utf-8")


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
    live = (ROOT / "nbs" / "live.html").read_text(encoding="utf-8").replace("8 * lambda", "0 * lambda")
    for planted, said in (PLANTED | {f"<main>{live}</main>": "λ moves the cosine"}).items():
        (tmp_path / "bad.html").write_text(f"<!doctype html>{planted}", encoding="utf-8")
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
    page += '<figure><img src="images/01_lora.svg"><figcaption>Said here</figcaption></figure>'
    (tmp_path / "lora.html").write_text(page)
    assert check.faults(tmp_path) == []
    for planted, said in BROKEN.items():
        (tmp_path / "lora.html").write_text(page + planted)
        found = check.faults(tmp_path)
        assert len(found) == 1 and said in found[0], (planted, found)


@pytest.mark.parametrize("failed", [False, True])
def test_a_notebook_that_was_not_run_or_failed_is_refused(scripts, tmp_path, capsys, failed):
    error = nbformat.v4.new_output("error", ename="NameError", evalue="name 'r' is not defined", traceback=[])
    cells = [nbformat.v4.new_code_cell("print(1)", outputs=[error] * failed) for _ in range(4)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    with pytest.raises(SystemExit):
        scripts("docs").read_notebook(tmp_path / "a.ipynb")
    said = "fails with NameError: name 'r' is not defined" if failed else "has no stored outputs: run make notebooks"
    assert f"docs: a.ipynb {said}" in capsys.readouterr().err
