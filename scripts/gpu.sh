#!/usr/bin/env bash
# Everything that a GPU is asked for, in one command (`make gpu`): bash scripts/gpu.sh [MINUTES [OUT]] [options of benchmarks/gpu.py]
#
# Needs no network. It takes the python of .venv, or python3, or the one that PYTHON names; packages that it lacks are installed from WHEELS,
# a folder of wheel files, into a folder of their own that is removed at the end.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || command -v python3 || true)}
[ -n "$python" ] || { echo "gpu: there is no python3: install one, or name one by PYTHON=PATH" >&2; exit 2; }
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
install() { "$python" -m pip install -q --no-index --no-deps --no-compile --disable-pip-version-check --root-user-action ignore --target "$site" "$@"; }
if [ -n "${WHEELS:-}" ]; then
  compgen -G "$WHEELS/*.whl" >/dev/null || { echo "gpu: WHEELS=$WHEELS holds no .whl file: name a folder of wheels, or leave WHEELS out" >&2; exit 2; }
  install "$WHEELS"/*.whl || { echo "gpu: the wheels of WHEELS=$WHEELS cannot be installed for $("$python" --version): see pip's message above" >&2; exit 2; }
fi
# Parts of the package ask for its installed version.
"$python" -c 'import importlib.metadata as m; m.version("d2mora")' 2>/dev/null || install --no-build-isolation "$root" 2>/dev/null ||
  echo "gpu: d2mora is run from $root without being installed" >&2
export PYTHONPATH="$root:$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
"$python" "$root/benchmarks/gpu.py" "$@"
