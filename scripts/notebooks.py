"""Run every notebook (or those named) again in a kernel of its own and store its outputs; flagged cells keep theirs."""
import os, re, subprocess, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NBS = Path(__file__).resolve().parents[1] / "nbs"
SKIPPED = re.compile(r"^#\|\s*(notest|slow|gpu|eval:\s*false)", re.M)


def rerun(path: Path  # a notebook
          ) -> float:  # seconds
    "Execute a copy whose flagged cells are empty, then put its outputs into the notebook."
    nb, start = nbformat.read(path, 4), time.time()
    copy = nbformat.reads(nbformat.writes(nb), 4)
    for cell in copy.cells:
        if SKIPPED.search(cell.source): cell.source = ""
    NotebookClient(copy, timeout=600, resources={"metadata": {"path": str(NBS)}}).execute()
    for cell, ran in zip(nb.cells, copy.cells):
        if cell.cell_type == "code" and not SKIPPED.search(cell.source):
            cell.outputs = [o for o in ran.outputs if o.get("name") != "stderr"]  # bars and warnings name this machine, not the book
    nbformat.write(nb, path)
    return time.time() - start


def main():
    "All notebooks in reading order, cleaned at the end."
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    paths = [NBS / n for n in sys.argv[1:]] or sorted(NBS.glob("*.ipynb"))
    for path in paths: print(f"{path.name}: {rerun(path):.1f} s", flush=True)
    subprocess.run([Path(sys.executable).parent / "nbdev_clean"], cwd=NBS.parent, check=True)


if __name__ == "__main__": main()
