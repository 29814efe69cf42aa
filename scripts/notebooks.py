"""Run every notebook (or those named) again in a kernel of its own, store its outputs and show what changed; flagged cells keep theirs.

usage: python scripts/notebooks.py [NAME.ipynb ...]     (a notebook that fails is left as it is; exit status 1)
"""

import base64
import difflib
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

NBS = Path(__file__).resolve().parents[1] / "nbs"
SKIPPED = re.compile(r"^#\|\s*(notest|slow|gpu|eval:\s*false)", re.M)


def output_text(
    outputs: list,  # of a cell
) -> list:  # lines; a picture is a line with its size
    "What a reader sees of the outputs."
    lines = []
    for o in outputs:
        data = o.get("data", {})
        picture = next((k for k in data if k.startswith("image/")), None)
        lines += (
            [f"[{picture}, {len(data[picture])} characters]"]
            if picture
            else str(o.get("text") or data.get("text/markdown") or data.get("text/plain", "")).splitlines()
        )
    return lines


def changes(
    before: dict,  # notebook
    after: dict,  # the same, run again
) -> list:  # lines to print
    "The outputs that differ, cell by cell, as a short diff."
    shown = []
    for old, new in zip(before.cells, after.cells):
        if old.cell_type != "code":
            continue
        diff = [
            line
            for line in difflib.unified_diff(output_text(old.outputs), output_text(new.outputs), n=0, lineterm="")
            if not line.startswith(("---", "+++", "@@"))
        ]
        if diff:
            shown += [
                f"  {old.source.strip().splitlines()[0][:80]}",
                *(f"    {line[:120]}" for line in diff[:6]),
                *([f"    … {len(diff) - 6} lines more"] if len(diff) > 6 else []),
            ]
    return shown


def smaller(
    picture: str,  # a PNG, in base64
) -> str:  # the same with 256 colours, where that takes less
    "A plot's PNG in a palette: half the bytes or fewer, and no eye sees it."
    from PIL import Image

    Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(
        256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE
    ).save(small := io.BytesIO(), format="png", optimize=True)
    return min(picture, base64.b64encode(small.getvalue()).decode(), key=len)


def kept(
    outputs: list,  # of a cell that ran
) -> list:  # what the notebook stores of them
    "No bars and warnings, which name this machine and not the book; plots made small."
    for o in outputs:
        if "image/png" in o.get("data", {}):
            o["data"]["image/png"] = smaller(o["data"]["image/png"])
    return [o for o in outputs if o.get("name") != "stderr"]


def rerun(
    path: Path,  # a notebook
) -> tuple:  # (seconds, lines that say what changed)
    "Execute a copy whose flagged cells are empty, then put its outputs into the notebook."
    nb, start = nbformat.read(path, 4), time.time()
    copy, before = (nbformat.reads(nbformat.writes(nb), 4) for _ in range(2))
    for cell in copy.cells:
        if SKIPPED.search(cell.source):
            cell.source = ""
    NotebookClient(copy, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell, ran in zip(nb.cells, copy.cells):
        if cell.cell_type == "code" and not SKIPPED.search(cell.source):
            cell.outputs = kept(ran.outputs)
    nbformat.write(nb, path)
    return time.time() - start, changes(before, nb)


def run_and_say(
    path: Path,  # a notebook
) -> bool:  # did it run?
    "One notebook: a line, and what changed; or what failed, and where."
    try:
        seconds, changed = rerun(path)
    except (CellExecutionError, DeadKernelError, TimeoutError) as error:
        what = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else f"{type(error).__name__}"
        cell = re.search(r"-{9,}\n(.*?)\n-{9,}", str(error), re.S)
        where = f" (in the cell that begins {cell[1].strip().splitlines()[0][:60]!r})" if cell else ""
        print(
            f"notebooks: {path.name} fails: {' '.join(what.split())[:300]}{where}; it is left as it was",
            file=sys.stderr,
        )
        return False
    print(
        f"{path.name}: {seconds:.1f} s, {'changed:' if changed else 'nothing changed'}", *changed, sep="\n", flush=True
    )
    return True


def main():
    "All notebooks in reading order, cleaned at the end."
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    paths = [NBS / n for n in sys.argv[1:]] or sorted(NBS.glob("*.ipynb"))
    if lost := [p.name for p in paths if not p.exists()]:
        sys.exit(f"notebooks: no {', '.join(lost)} in nbs/")
    done = [run_and_say(path) for path in paths]
    subprocess.run([Path(sys.executable).parent / "nbdev_clean"], cwd=NBS.parent, check=True)
    sys.exit(not all(done))


if __name__ == "__main__":
    main()
