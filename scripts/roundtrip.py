"""nbdev_export and nbdev_clean must change nothing: notebooks and package say the same. Works in a dirty tree too."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def contents(root: Path) -> dict[str, bytes]:
    "Every module and every notebook."
    return {str(f.relative_to(root)): f.read_bytes() for f in [*root.glob("d2mora/*.py"), *root.glob("nbs/*.ipynb")]}


def faults(before: dict, after: dict) -> list[str]:
    "What export and clean changed, and modules that no notebook exports."
    changed = sorted(f for f in {*before, *after} if before.get(f) != after.get(f))
    notebooks = b"".join(text for name, text in after.items() if name.startswith("nbs"))
    made = {name for name in after if name.startswith("d2mora")} - {"d2mora/__init__.py", "d2mora/_modidx.py"}
    orphans = sorted(name for name in made if f"default_exp {Path(name).stem}".encode() not in notebooks)
    return [f"{f} differs from its notebook's export: edit the notebook" for f in changed] + [
        f"{f} is exported by no notebook: remove it" for f in orphans
    ]


def main():
    "Export, clean, compare; exit status 1 names the files."
    before = contents(ROOT)
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent / command], cwd=ROOT, check=True)
    if bad := faults(before, contents(ROOT)):
        sys.exit("\n".join(f"round trip: {line}" for line in bad))


if __name__ == "__main__":
    main()
