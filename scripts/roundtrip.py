"""nbdev_export and nbdev_clean must change nothing: notebooks and package say the same. Works in a dirty tree too."""

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def fingerprints(
    root: Path,  # the repository's root
) -> dict:  # path relative to the root -> hash of the file
    "Hashes of every exported module and every notebook."
    files = sorted([*root.glob("d2mora/**/*.py"), *root.glob("nbs/*.ipynb")])
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def differing(
    before: dict,  # fingerprints before
    after: dict,  # fingerprints after
) -> list:  # paths that were changed, added or removed
    "What export and clean touched."
    return sorted(f for f in {*before, *after} if before.get(f) != after.get(f))


def orphans(
    root: Path,  # the repository's root
) -> list:  # modules that no notebook exports
    "Left-over modules: every file of the package but `__init__.py` names a notebook that exists."
    made = [f for f in root.glob("d2mora/*.py") if f.name not in ("__init__.py", "_modidx.py")]
    exports = "".join(f.read_text() for f in root.glob("nbs/*.ipynb"))
    return sorted(str(f.relative_to(root)) for f in made if f'default_exp {f.stem}"' not in exports.replace("\\n", '"'))


def main():
    "Export, clean, compare; exit status 1 names the files."
    before, bin = fingerprints(ROOT), Path(sys.executable).parent
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([bin / command], cwd=ROOT, check=True)
    changed, left = differing(before, fingerprints(ROOT)), orphans(ROOT)
    for f in changed:
        print(
            f"round trip: {f} differs from its notebook's export: edit the notebook, then nbdev_export; nbdev_clean",
            file=sys.stderr,
        )
    for f in left:
        print(f"round trip: {f} is exported by no notebook: remove it", file=sys.stderr)
    sys.exit(bool(changed or left))


if __name__ == "__main__":
    main()
