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
from PIL import Image

NBS = Path(__file__).resolve().parents[1] / "nbs"
SKIPPED = re.compile(r"^#\|\s*(notest|slow|gpu|eval:\s*false)", re.M)


def output_text(outputs: list) -> list[str]:
    "What a reader sees of a cell's outputs, in lines."
    lines = []
    for out in outputs:
        data = out.get("data", {})
        text = out.get("text") or data.get("text/markdown") or data.get("text/plain", "")
        lines += [f"[picture, {len(data['image/png'])} characters]"] if "image/png" in data else text.splitlines()
    return lines


def changes(cell, outputs: list) -> list[str]:
    "The outputs of a cell that differ, as a short diff."
    diff = [*difflib.unified_diff(output_text(cell.outputs), output_text(outputs), n=0, lineterm="")][2:]
    shown = [f"    {line[:120]}" for line in diff if not line.startswith("@@")]
    return [f"  {cell.source.strip().splitlines()[0][:80]}", *shown[:6]] if shown else []


def kept(outputs: list) -> list:
    "What a notebook stores: no warnings, and plots with 256 colours, which halves their size."
    for out in outputs:
        if picture := out.get("data", {}).get("image/png"):
            drawn = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
            drawn = drawn.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
            drawn.save(small := io.BytesIO(), format="png", optimize=True)
            out["data"]["image/png"] = min(picture, base64.b64encode(small.getvalue()).decode(), key=len)
    return [out for out in outputs if out.get("name") != "stderr"]


def rerun(path: Path) -> list[str]:
    "Execute a copy whose flagged cells are empty, then put its outputs into the notebook; what changed."
    nb, changed = nbformat.read(path, 4), []
    copy = nbformat.read(path, 4)
    for cell in copy.cells:
        if SKIPPED.search(cell.source):
            cell.source = ""
    NotebookClient(copy, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell, ran in zip(nb.cells, copy.cells):
        if cell.cell_type == "code" and not SKIPPED.search(cell.source):
            changed += changes(cell, outputs := kept(ran.outputs))
            cell.outputs = outputs
    nbformat.write(nb, path)
    return changed


def run_and_say(path: Path) -> bool:
    "One notebook: a line, and what changed; or what failed, and where. Did it run?"
    start = time.time()
    try:
        changed = rerun(path)
    except (CellExecutionError, DeadKernelError, TimeoutError) as error:
        what = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else type(error).__name__
        print(f"notebooks: {path.name} fails: {' '.join(what.split())[:300]}; it is left as it was", file=sys.stderr)
        print(re.sub(r"\x1b\[[0-9;]*m", "", str(error))[:1500], file=sys.stderr)
        return False
    news = "changed:" if changed else "nothing changed"
    print(f"{path.name}: {time.time() - start:.1f} s, {news}", *changed, sep="\n", flush=True)
    return True


def main():
    "All notebooks, or those named, cleaned at the end."
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    paths = [NBS / name for name in sys.argv[1:]] or sorted(NBS.glob("*.ipynb"))
    if lost := [path.name for path in paths if not path.exists()]:
        sys.exit(f"notebooks: no {', '.join(lost)} in nbs/")
    done = [run_and_say(path) for path in paths]
    subprocess.run([Path(sys.executable).parent / "nbdev_clean"], cwd=NBS.parent, check=True)
    sys.exit(not all(done))


if __name__ == "__main__":
    main()
