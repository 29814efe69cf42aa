"""Under each title a badge that opens the notebook in Colab, and a hidden cell that fetches there what it needs; --mend inserts both.

usage: python scripts/colab.py [--mend] [NAME.ipynb ...]     (default: every notebook with code)
"""

import sys
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parents[1] / "nbs"
REPO = "https://github.com/d2mora/d2mora"
COLAB = "https://colab.research.google.com/github/d2mora/d2mora/blob/main/nbs"
FETCH = f"!test -d /content/d2mora || git clone -q --depth 1 {REPO} /content/d2mora\n%pip install -q /content/d2mora\n%cd -q /content/d2mora/nbs"
QUIET = 'warnings.filterwarnings("ignore", message="IProgress")  # tqdm, where ipywidgets is missing'
CELL = f'#| hide\nimport sys\nimport warnings\n\n{QUIET}\nif "google.colab" in sys.modules:\n    ' + FETCH.replace(
    "\n", "\n    "
)


def badge(
    name: str,  # file name of a notebook
) -> str:  # markdown
    "The link under the title."
    return f"[![Open in Colab](images/colab.svg)]({COLAB}/{name})"


def mended(
    nb: dict,  # a notebook
    name: str,  # its file name
) -> bool:  # was anything changed?
    "Put the badge and the cell behind the title, in place of others like them; a notebook without code needs neither."
    rest = [
        c for c in nb.cells[1:] if "](images/colab.svg)" not in c.source and '"google.colab" in sys' not in c.source
    ]
    if not any(c.cell_type == "code" for c in rest):
        return False
    first = [nbformat.v4.new_markdown_cell(badge(name), id="badge0"), nbformat.v4.new_code_cell(CELL, id="colab0")]
    before = [c.source for c in nb.cells]
    nb.cells = [nb.cells[0], *first, *rest]
    return [c.source for c in nb.cells] != before


def main():
    "All notebooks, or those named; without --mend say which lack the two cells."
    names, lost = [a for a in sys.argv[1:] if a != "--mend"], []
    for path in [NBS / n for n in names] or sorted(NBS.glob("*.ipynb")):
        nb = nbformat.read(path, 4)
        if mended(nb, path.name):
            lost.append(path.name)
            if "--mend" in sys.argv:
                nbformat.write(nb, path)
    if lost:
        print(f"colab: {'mended' if '--mend' in sys.argv else 'no badge or cell in'}: {', '.join(lost)}")
        sys.exit("--mend" not in sys.argv)


if __name__ == "__main__":
    main()
