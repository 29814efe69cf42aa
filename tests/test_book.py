"""The book: drawings, README, round trip, and the site with its link check."""

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
    assert "#| hide" not in text and ":::" not in text and "default_exp" not in re.sub(r"<(pre|code).*?</\1>", "", text, flags=re.S)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_text_is_lost_below_the_title(path):
    "nbdev makes the first cell the page's head and drops what stands below title and subtitle: that text needs its own cell."
    lines = [line for line in nbformat.read(path, 4).cells[0].source.splitlines() if line.strip()]
    assert len(lines) == 2 and lines[0].startswith("# ") and lines[1].startswith("> ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_pictures_reach_the_page(site, path):
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code" and not re.search(r"^#\|\s*(hide|export)", c.source, re.M)]
    pictures = sum("image/png" in o.get("data", {}) for c in cells for o in c.outputs)
    assert (site / page_of(path)).read_text(encoding="utf-8").count("data:image/png;base64,") == pictures


def test_figures_have_their_caption_and_number(site):
    text = (site / "orthogonality.html").read_text(encoding="utf-8")
    assert re.search(r'id="fig-orthogonality".*data:image/png.*class="figcaption">\s*(?:<p>)?Figure 1\. Mean', text, re.S)


def test_exported_code_is_on_the_site_under_an_anchor_that_links_find(site):
    text = (site / "routers.html").read_text(encoding="utf-8")
    assert 'id="many_to_many"' in text and "Exported source" in text
    links = re.findall(r'<a\s+href="(\w+)\.html#\w+"[^>]*>\s*<code>', "".join(p.read_text(encoding="utf-8") for p in site.glob("*.html")))
    assert {*links} - {"glossary"}, "no name in the text was linked to where it is defined"


def test_link_check_finds_what_is_planted(scripts, site, tmp_path):
    docs = scripts("docs")
    copy = shutil.copytree(site, tmp_path / "site")
    assert docs.broken_links(copy) == []
    page = copy / "lora.html"
    page.write_text(page.read_text(encoding="utf-8") + '<a href="nowhere.html"></a><a href="glossary.html#no-such-term"></a><img src="images/gone.svg">', encoding="utf-8")
    assert docs.broken_links(copy) == ["lora.html: glossary.html#no-such-term: no such anchor", "lora.html: images/gone.svg: no such file", "lora.html: nowhere.html: no such file"]


def test_filter_renders_quarto_markup(scripts, tmp_path):
    import pypandoc
    source = '::: {.callout-warning}\n## Careful\nText\n:::\n\n$$a = b$$ {#eq-a}\n\nSee @eq-a.\n\n::: {.fold summary="More" open=false}\n```python\nx\n```\n:::\n'
    page = pypandoc.convert_text(source, "html5", format="markdown", extra_args=["--mathml", "--lua-filter", str(ROOT / "scripts" / "docs.lua")])
    assert 'class="callout warning"' in page and "Careful" in page and 'id="eq-a"' in page and '<a href="#eq-a">Equation 1</a>' in page
    assert "<details><summary>More</summary>" in page and "{#eq-a}" not in page


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
    heavy = {p.name: p.stat().st_size for p in NOTEBOOKS if p.stat().st_size > 400_000}
    assert not heavy, f"outputs too large: {heavy}"
