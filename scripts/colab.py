"""Under each title a badge that opens the notebook in Colab, and a hidden cell that fetches there what it needs: say where they lack; --mend inserts them."""

import sys
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parents[1] / "nbs"
REPO = "https://github.com/d2mora/d2mora"
BADGE = "[![Open in Colab](images/colab.svg)](https://colab.research.google.com/github/d2mora/d2mora/blob/main/nbs/{})"
CELL = f"""#| hide
import sys
import warnings

warnings.filterwarnings("ignore", message="IProgress")  # tqdm, where ipywidgets is missing
if "google.colab" in sys.modules:
    !test -d /content/d2mora || git clone -q --depth 1 {REPO} /content/d2mora
    %pip install -q /content/d2mora
    %cd -q /content/d2mora/nbs"""


def mended(nb, name: str) -> bool:
    "Put badge and cell behind the title, in place of others like them; a notebook without code needs neither. Was anything changed?"
    before = [c.source for c in nb.cells]
    own = ("](images/colab.svg)", '"google.colab" in sys')
    rest = [c for c in nb.cells[1:] if not any(part in c.source for part in own)]
    if not any(c.cell_type == "code" for c in rest):
        return False
    first = [nbformat.v4.new_markdown_cell(BADGE.format(name), id="badge0")]
    nb.cells = [nb.cells[0], *first, nbformat.v4.new_code_cell(CELL, id="colab0"), *rest]
    return [c.source for c in nb.cells] != before


def main():
    "All notebooks."
    lost = []
    for path in sorted(NBS.glob("*.ipynb")):
        nb = nbformat.read(path, 4)
        if mended(nb, path.name):
            lost.append(path.name)
            if "--mend" in sys.argv:
                nbformat.write(nb, path)
    if lost and "--mend" not in sys.argv:
        sys.exit(f"colab: no badge or cell in {', '.join(lost)}: run scripts/colab.py --mend")


if __name__ == "__main__":
    main()
