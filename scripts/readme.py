"""README.md from nbs/index.ipynb, by pandoc, and by nothing else.

usage: python scripts/readme.py [--check]     (--check: only say whether README.md is up to date)
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pypandoc

ROOT = Path(__file__).resolve().parents[1]


def cell_markdown(cell) -> str:
    "Markdown as it is; code in a fence, its text outputs in another; nothing of a hidden cell."
    if cell.cell_type == "markdown":
        return cell.source
    if re.search(r"^#\|\s*hide\b", cell.source, re.M):
        return ""
    outputs = [
        o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs if o.get("name") != "stderr"
    ]
    return "\n\n".join([f"```python\n{cell.source}\n```", *(f"```text\n{text.rstrip()}\n```" for text in outputs)])


def readme(index: Path) -> str:
    "All cells through pandoc; links and pictures point into nbs/."
    text = "\n\n".join(filter(None, map(cell_markdown, nbformat.read(index, 4).cells)))
    command = [pypandoc.get_pandoc_path(), "-f", "gfm", "-t", "gfm", "--wrap=preserve"]
    out = subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=60).stdout
    out = re.sub(r'(\]\(|src="|href=")(?=images/|[\w-]+\.ipynb)', r"\1nbs/", out)
    return "<!-- Written by `make readme` from nbs/index.ipynb: edit that. -->\n\n" + out


def main():
    "Write, or compare and say what to do."
    path, text = ROOT / "README.md", readme(ROOT / "nbs" / "index.ipynb")
    if "--check" not in sys.argv:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        raise SystemExit("readme: README.md is not what nbs/index.ipynb gives: run make readme")


if __name__ == "__main__":
    main()
