"""The book: drawings, README, round trip, and the site with its link check."""

import importlib
import json
import os
import re
import shutil
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
    "The book, built once by the same program as `make docs`."
    out = tmp_path_factory.mktemp("site") / "docs"
    run = subprocess.run([sys.executable, ROOT / "scripts" / "docs.py", out], capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return out


def page_of(path):
    "nbdev's page name: the notebook's without its number."
    return re.sub(r"^\d+[a-z]?_", "", path.stem) + ".html"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_is_a_page(site, path):
    text = (site / page_of(path)).read_text(encoding="utf-8")
    title = nbformat.read(path, 4).cells[0].source.splitlines()[0].lstrip("# ")
    assert re.search(r"<title>[^<]+ · d2mora</title>", text) and title.replace("'", "&#39;")[:8] in text.replace("’", "&#39;").replace("'", "&#39;")
    assert "#| hide" not in text and "default_exp" not in re.sub(r"<(pre|code).*?</\1>", "", text, flags=re.S)
    assert f"blob/main/nbs/{path.name}" in text and f"edit/main/nbs/{path.name}" in text and f'href="notebooks/{path.name}"' in text


def undescribed(notebook):
    "Code cells that show a plot and give it no alt text and no caption."
    shows = lambda cell: any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
    return [cell.source for cell in notebook.cells if shows(cell) and not re.search(r"^#\| ?fig-(alt|cap): *\S", cell.source, re.M)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_plot_is_described(path):
    assert undescribed(nbformat.read(path, 4)) == []


def test_a_plot_without_description_is_noticed():
    notebook = nbformat.read(ROOT / "nbs" / "01_lora.ipynb", 4)
    for cell in notebook.cells:
        cell.source = re.sub(r"^#\| ?fig-.*\n", "", cell.source, flags=re.M)
    assert len(undescribed(notebook)) == 1


def test_code_and_names_reach_the_page(site):
    text = (site / "routers.html").read_text(encoding="utf-8")
    assert 'id="many_to_many"' in text and "Exported source" in text and 'href="api_routers.html"' in text
    links = re.findall(r'<a\s+href="(\w+)\.html#\w+"[^>]*>\s*<code>', "".join(p.read_text(encoding="utf-8") for p in site.glob("*.html")))
    assert {*links} - {"glossary"}, "no name in the text was linked to where it is defined"


def test_reference_has_signatures_arguments_and_sources(site):
    text = re.sub(r"<[^>]+>", "", (site / "api_tuner.html").read_text(encoding="utf-8"))
    assert "rank of every expert" in text and "router_widths(" in text and "D2MoraConfig(peft.PeftConfig)" in text
    lines = (ROOT / "d2mora" / "tuner.py").read_text(encoding="utf-8").splitlines()
    links = re.findall(r"tuner\.py#L(\d+)-L(\d+)", (site / "api_tuner.html").read_text(encoding="utf-8"))
    assert len(links) > 10 and all(re.match(r"def |class |[A-Z]|@", lines[int(first) - 1]) for first, _ in links)
    assert (site / "api.html").read_text(encoding="utf-8").count("api_tuner.html#d2moraconfig") >= 2


def test_project_pages(site):
    assert "Keep a Changelog" in (site / "changelog.html").read_text(encoding="utf-8")
    assert "@inproceedings" in (site / "citing.html").read_text(encoding="utf-8") and (site / "404.html").exists() and (site / "contributing.html").exists()
    head = (site / "routers.html").read_text(encoding="utf-8").partition("</head>")[0]
    assert (site / re.search(r'rel="icon" href="([^"]+)"', head)[1]).exists()
    card = re.search(r'og:image" content="https://d2mora.github.io/d2mora/([^"]+)"', head)[1]
    assert (site / card).read_bytes()[16:24] == (1200).to_bytes(4, "big") + (630).to_bytes(4, "big")


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
    '<link rel="stylesheet" href="//elsewhere.example/x.css">': "loaded from elsewhere",
    "<p>::: note</p>": "raw markup",
    "<p>See ?@fig-lost</p>": "raw markup",
    "<p>$$a = b$$</p>": "raw markup",
    "<p>[text](other.html)</p>": "raw markup",
    "<h1>Again</h1>": "2 first-level headings",
}


@pytest.mark.parametrize("planted", BROKEN)
def test_site_check_finds_what_is_planted(scripts, planted, tmp_path):
    check = scripts("site_check")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "01_lora.svg").write_text("<svg/>")
    (tmp_path / "glossary.html").write_text("<h1>Glossary</h1><p>::</p>")
    page = '<h1>LoRA</h1><p><img alt="a drawing" src="images/01_lora.svg"><pre>::: $$ {#x}</pre><figure><img src="images/01_lora.svg"><figcaption>What it shows</figcaption></figure>'
    (tmp_path / "lora.html").write_text(page)
    assert check.faults(tmp_path, tmp_path, {}) == []
    (tmp_path / "lora.html").write_text(page + planted)
    found = check.faults(tmp_path, tmp_path, {})
    assert len(found) == 1 and BROKEN[planted] in found[0]


def test_site_check_finds_lost_formulas_names_and_fonts(scripts, tmp_path):
    check = scripts("site_check")
    (tmp_path / "lora.html").write_text("<h1>LoRA</h1><math></math>")
    (tmp_path / "theme.css").write_text('@import url("https://fonts.example/lato"); p { background: url(images/x.png) }')
    (tmp_path / "lora.py").write_text('__all__ = ["update"]\n\ndef update(x): return x\n')
    found = check.faults(tmp_path, tmp_path, {"lora.html": "$$a$$ and\n\n$$b$$\n\n```\n$$no$$\n```"})
    assert [part for line, part in zip(found, ("fonts.example", "1 formulas shown, 2", "d2mora.lora.update is not")) if part in line] == ["fonts.example", "1 formulas shown, 2", "d2mora.lora.update is not"]


def test_filter_renders_quarto_markup(tmp_path):
    import pypandoc
    source = '::: {.callout-warning}\n## Careful\nText\n:::\n\n$$a = b$$ {#eq-a}\n\nSee @eq-a.\n\n::: {.fold summary="More" open=false}\n```python\nx\n```\n:::\n\n![](x.svg){fig-alt="A drawing"}\n'
    page = pypandoc.convert_text(source, "html5", format="markdown", extra_args=["--mathml", "--lua-filter", str(ROOT / "scripts" / "standin.lua")])
    assert 'class="callout warning"' in page and "Careful" in page and 'id="eq-a"' in page and '<a href="#eq-a">Equation 1</a>' in page
    assert "<details><summary>More</summary>" in page and "{#eq-a}" not in page and 'alt="A drawing"' in page


def test_docments_are_read_as_written(scripts):
    import ast
    api = scripts("api")
    source = 'def f(\n    x: "Later",  # one\n    n: int = 3,  # two,\n                 # and more\n    *rest,\n) -> str | None:  # three\n    "Does | it."\n'
    text = "\n".join(api.entry(ast.parse(source).body[0], api.comments(source), 3))
    assert "f(x: Later, n: int = 3, *rest) -> str | None" in text and "Does \\| it." in text
    assert "| [n]{.code} | [int]{.code} | [3]{.code} | two, and more |" in text and "three" in text


# ---- bad input ----
@pytest.fixture
def small_book(tmp_path):
    "A repository with a few short notebooks, so that building it takes seconds."
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "d2mora").mkdir()
    (tmp_path / "d2mora" / "__init__.py").write_text('from d2mora.routers import route\n\n__all__ = ["route"]\n')
    for name in ("lora", "routers"): shutil.copy(ROOT / "d2mora" / f"{name}.py", tmp_path / "d2mora")
    for name in ("settings.ini", "pyproject.toml", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff"): shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs" / "images", tmp_path / "nbs" / "images")
    names = ["index.ipynb", "01_lora.ipynb", "04_routers.ipynb", "glossary.ipynb"]
    for name in names: shutil.copy(ROOT / "nbs" / name, tmp_path / "nbs")
    project = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    project["website"]["sidebar"][0]["contents"] = [*names, "changelog.qmd", "contributing.qmd", "security.qmd", "citing.qmd"]
    for path in (tmp_path / "_quarto.yml", tmp_path / "nbs" / "_quarto.yml"): path.write_text(yaml.safe_dump(project))
    return tmp_path


def docs(book, **environment):
    "`make docs` there; what it says on stderr."
    done = subprocess.run([sys.executable, "scripts/docs.py"], cwd=book, capture_output=True, text=True, timeout=300, env=os.environ | environment)
    return done.returncode, done.stderr, done.stdout


def spoil(book, change):
    "Change notebook 01."
    path = book / "nbs" / "01_lora.ipynb"
    nb = nbformat.read(path, 4)
    change([c for c in nb.cells if c.cell_type == "code"])
    nbformat.write(nb, path)


def test_docs_without_stored_outputs(small_book):
    spoil(small_book, lambda code: [c.update(outputs=[]) for c in code])
    status, err, _ = docs(small_book)
    assert status == 2 and err.count("\n") == 1 and "01_lora.ipynb has no stored outputs: run make notebooks NB=01_lora.ipynb" in err
    assert not (small_book / "_docs").exists()


def test_docs_with_a_failing_notebook(small_book):
    spoil(small_book, lambda code: code[3].update(outputs=[nbformat.v4.new_output("error", ename="NameError", evalue="name 'r' is not defined", traceback=[])]))
    status, err, _ = docs(small_book)
    assert status == 2 and err.count("\n") == 1 and "01_lora.ipynb fails with NameError: name 'r'" in err


def test_docs_with_something_that_is_no_notebook(small_book):
    (small_book / "nbs" / "01_lora.ipynb").write_text('{"cells": [')
    status, err, _ = docs(small_book)
    assert status == 2 and err.count("\n") == 1 and "01_lora.ipynb is no notebook" in err


def test_docs_without_quarto_and_pandoc(small_book):
    (small_book / "scripts" / "pypandoc.py").write_text("raise ImportError('not installed')")
    status, err, _ = docs(small_book, PATH="/usr/bin:/bin")
    assert status == 2 and err.count("\n") == 1 and "neither Quarto nor pandoc" in err and "make install" in err


def write_notebook(path, *cells):
    "Code cells, each with its stored text."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code, outputs=[nbformat.v4.new_output("stream", text=text)] if text else []) for code, text in cells])
    nbformat.write(nb, path)
    return path


def test_running_again_shows_what_changed(scripts, tmp_path, capsys):
    path = write_notebook(tmp_path / "a.ipynb", ("print(1 + 1)", "3\n"), ("print('same')", "same\n"), ("#| slow\nprint('kept')", "measured\n"))
    assert scripts("notebooks").run_and_say(path)
    out = capsys.readouterr().out
    assert "a.ipynb" in out and "    -3" in out and "    +2" in out and "same" not in out
    assert [c.outputs[0].text for c in nbformat.read(path, 4).cells] == ["2\n", "same\n", "measured\n"]
    assert scripts("notebooks").run_and_say(path) and "nothing changed" in capsys.readouterr().out


def test_running_a_failing_notebook_again_leaves_it(scripts, tmp_path, capsys):
    path = write_notebook(tmp_path / "a.ipynb", ("print(1)", "0\n"), ("raise KeyError('lost')", ""))
    before = path.read_bytes()
    assert not scripts("notebooks").run_and_say(path)
    err = capsys.readouterr().err
    assert "a.ipynb fails: KeyError: 'lost' (in the cell that begins \"raise KeyError('lost')\")" in err and path.read_bytes() == before


def test_lab_check_sees_what_went_wrong_in_the_page(scripts, tmp_path):
    problems = scripts("lab_check").problems
    for name in ("stored", "good", "bad"): (tmp_path / name).mkdir()
    cell, out = nbformat.v4.new_code_cell, nbformat.v4.new_output
    drawn = out("display_data", data={"image/png": "aGk="})
    stored, good = [cell("draw()", id="one", outputs=[drawn])], [cell("draw()", id="one", outputs=[drawn], execution_count=1)]
    bad = [cell("draw()", id="one", execution_count=1), cell("1/0", execution_count=2, outputs=[out("error", ename="ZeroDivisionError", evalue="by zero", traceback=[])]),
           cell("bar()", execution_count=3, outputs=[out("stream", name="stderr", text="TqdmWarning: IProgress not found")])]
    for name, cells in (("stored", stored), ("good", good), ("bad", bad)): nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / name / "a.ipynb")
    assert problems(tmp_path / "good" / "a.ipynb", tmp_path / "stored" / "a.ipynb") == []
    found = problems(tmp_path / "bad" / "a.ipynb", tmp_path / "stored" / "a.ipynb")
    assert [line.partition(": ")[2] for line in found] == ["ZeroDivisionError: by zero", "picture not drawn: draw()", "IProgress not found in an output"]


QUARTO = """#!/bin/bash
# stands for Quarto: checks that it is given a whole project, and warns as Quarto does
test "$1" = render && test -f "$2/_quarto.yml" && test -f "$2/index.ipynb" || exit 7
mkdir -p "$2/_docs" && echo '<h1>index</h1>' > "$2/_docs/index.html"
printf '%b' "$SAYS" >&2
exit ${STATUS:-0}
"""


@pytest.fixture
def quarto(tmp_path, monkeypatch):
    "A program of that name, first on PATH."
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "quarto").write_text(QUARTO)
    (tmp_path / "bin" / "quarto").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize("says, status, part", [
    ("\\x1b[33mWARNING (main.lua:14000) Unable to resolve crossref @fig-nope\\x1b[39m\\n", "0", "Unable to resolve crossref @fig-nope"),
    ("WARN: Unable to resolve link target: 99_gone.ipynb\\n", "0", "99_gone.ipynb"),
    ("ERROR: YAML validation failed\\n", "1", "exit status 1"),
])
def test_quartos_warnings_about_references_stop_the_build(scripts, quarto, monkeypatch, capsys, tmp_path, says, status, part):
    monkeypatch.setenv("SAYS", says)
    monkeypatch.setenv("STATUS", status)
    (tmp_path / "proc" / "notebooks").mkdir(parents=True)
    for name in ("_quarto.yml", "index.ipynb"): (tmp_path / "proc" / name).write_text("")
    with pytest.raises(SystemExit) as stopped: scripts("docs").render_quarto(tmp_path / "proc", tmp_path / "out")
    assert stopped.value.code == 2 and part in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_docs_gives_quarto_a_whole_project(small_book, quarto):
    status, err, out = docs(small_book, SAYS="Output created\\n")
    assert "Output created" in out and status == 2 and "d2mora.lora.project_up is not in the reference" in err, err  # the stand-in for Quarto wrote no such page
    project = yaml.safe_load((small_book / "_proc" / "_quarto.yml").read_text())
    assert {"404.qmd", "api_routers.qmd", "01_lora.ipynb"} <= {*project["project"]["render"]} and all((small_book / "_proc" / name).exists() for name in project["project"]["render"])
    assert all((small_book / "_proc" / name).exists() for name in ("site.scss", project["website"]["favicon"], project["website"]["image"]))
    assert [bar["id"] for bar in project["website"]["sidebar"]] == ["book", "api"] and {*project["website"]} <= {*KNOWN["website"].split()}


KNOWN = {  # keys of Quarto's own schema that a project file may have; an unknown one stops a build there
    "": "project format execute website metadata-files",
    "project": "type output-dir render resources",
    "website": "title description favicon site-url site-path repo-url repo-subdir repo-branch issue-url repo-actions search navbar sidebar body-header body-footer margin-header margin-footer page-navigation "
               "back-to-top-navigation bread-crumbs page-footer image image-alt comments open-graph twitter-card other-links code-links",
    "search": "location type limit collapse-after copy-button keyboard-shortcut show-item-context",
    "navbar": "title logo logo-alt logo-href background foreground search pinned collapse collapse-below left right toggle-position",
    "sidebar": "id title logo search tools contents style background foreground border alignment collapse-level pinned header footer",
    "twitter-card": "title description image image-alt image-width image-height card-style creator site",
    "page-footer": "left right center border background foreground",
    "html": "theme toc toc-depth code-fold code-overflow code-copy html-math-method",
}


def test_quarto_knows_every_key():
    project = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    site = project["website"]
    parts = {"": project, "project": project["project"], "website": site, "html": project["format"]["html"]} | {k: site[k] for k in ("search", "navbar", "twitter-card", "page-footer")}
    for part, given in [*parts.items(), *(("sidebar", bar) for bar in site["sidebar"])]:
        assert {*given} <= {*KNOWN[part].split()}, part


def test_drawings_are_what_the_script_draws(scripts):
    drawings = scripts("drawings")
    for name in drawings.DRAWINGS:
        assert (drawings.IMAGES / f"{name}.svg").read_text(encoding="utf-8") == drawings.svg(name), f"run make drawings: {name}.svg"


def test_every_drawing_says_what_it_shows(scripts):
    import xml.etree.ElementTree as ET
    for path in (ROOT / "nbs" / "images").glob("*.svg"):
        tags = {e.tag.split("}")[1]: e.text for e in ET.parse(path).getroot()}
        assert tags["title"] and len(tags["desc"]) > 40, path.name


def test_notebooks_show_only_pictures_that_exist_and_describe_them():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            for alt, image in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", cell.source if cell.cell_type == "markdown" else ""):
                assert (path.parent / image).is_file() and len(alt) > 10, f"{path.name}: {image}"


def test_readme_check_sees_a_change(scripts, monkeypatch, tmp_path):
    readme = scripts("readme")
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "index.ipynb", tmp_path / "nbs")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["readme.py"])
    readme.main()
    monkeypatch.setattr(sys, "argv", ["readme.py", "--check"])
    readme.main()
    (tmp_path / "README.md").write_text("edited by hand")
    with pytest.raises(SystemExit, match="make readme"): readme.main()


def test_round_trip_sees_a_hand_edit_and_an_orphan(scripts, tmp_path):
    roundtrip = scripts("roundtrip")
    for folder in ("d2mora", "nbs"): (tmp_path / folder).mkdir()
    notebook = {"cells": [{"cell_type": "code", "source": ["#| default_exp kept\n"]}, {"cell_type": "code", "source": ["#| default_exp last"]}]}
    (tmp_path / "nbs" / "00_kept.ipynb").write_text(json.dumps(notebook, indent=1))
    for name in ("kept", "last", "left"): (tmp_path / "d2mora" / f"{name}.py").write_text("a = 1\n")
    before = roundtrip.fingerprints(tmp_path)
    assert roundtrip.differing(before, roundtrip.fingerprints(tmp_path)) == []
    (tmp_path / "d2mora" / "kept.py").write_text("a = 2\n")
    assert roundtrip.differing(before, roundtrip.fingerprints(tmp_path)) == ["d2mora/kept.py"]
    assert roundtrip.orphans(tmp_path) == ["d2mora/left.py"]


def test_notebooks_stay_small():
    heavy = {p.name: p.stat().st_size for p in NOTEBOOKS if p.stat().st_size > 150_000}
    assert not heavy, f"outputs too large: {heavy}"
