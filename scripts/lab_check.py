"""Run notebooks in the real JupyterLab: server, browser, Run All; fails on any error output or cell that did not run.

usage: python scripts/lab_check.py [NAME.ipynb ...] [--pictures FOLDER]     (default 01_lora.ipynb; needs Chromium)
"""
import argparse, json, os, re, shutil, socket, subprocess, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import sync_playwright

from notebooks import NBS, SKIPPED

PROMPTS = "() => [...document.querySelectorAll('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell .jp-InputPrompt')].map(p => p.textContent)"


def copy_notebooks(folder: Path  # an empty folder
                   ) -> None:
    "A copy to work in, since JupyterLab saves; cells flagged slow or gpu are emptied."
    shutil.copytree(NBS, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "_quarto.yml"))
    for path in folder.glob("*.ipynb"):
        nb = nbformat.read(path, 4)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs = []
                if SKIPPED.search(cell.source): cell.source = ""
        nbformat.write(nb, path)


@contextmanager
def lab_server(folder: Path,  # notebooks
               home: Path     # an own HOME: the user's settings stay out
               ):
    "JupyterLab on a free port of loopback; yields its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for extension, name, value in (("notebook-extension", "tracker", {"windowingMode": "none"}), ("apputils-extension", "notification", {"fetchNews": "false"})):
        settings = home / "settings" / "@jupyterlab" / extension
        settings.mkdir(parents=True)
        (settings / f"{name}.jupyterlab-settings").write_text(json.dumps(value))
    env = {**os.environ, "HOME": str(home), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_RUNTIME_DIR": str(home / "run")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=book", f"--ServerApp.root_dir={folder}"]
    with (home / "log").open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as server:
        try: yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token=book&reset"
        finally: server.terminate()


def wait_for(what: str,       # for the message
             ready,           # function without arguments
             seconds: float   # longest wait
             ) -> None:
    "Poll until ready."
    end = time.time() + seconds
    while not ready():
        if time.time() > end: raise SystemExit(f"lab check: {what}: not within {seconds:g} s")
        time.sleep(0.5)


def open_page(page,         # of the browser
              address: str  # of the notebook
              ) -> None:
    "Open a notebook, once the server answers."
    def answers():
        try: return page.goto(address).ok
        except Exception: return False
    wait_for("JupyterLab's server", answers, 60)
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=60_000)
    page.get_by_text("| Idle").wait_for(timeout=60_000)  # in the status bar: the kernel is there
    page.wait_for_timeout(1000)


def run_all(page,             # with the notebook open
            path: Path,       # the copy that JupyterLab saves
            seconds: float    # longest run
            ) -> None:
    "Run > Run All Cells, wait for the last one, save."
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    wait_for(f"{path.name}: start", lambda: any(re.search(r"[*\d]", p) for p in page.evaluate(PROMPTS)), 60)
    wait_for(f"{path.name}: Run All", lambda: not any("*" in p for p in page.evaluate(PROMPTS)), seconds)
    before = path.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    wait_for(f"{path.name}: save", lambda: path.stat().st_mtime_ns != before, 30)


def picture(page,        # with the notebook open
            path: Path   # PNG to write
            ) -> None:
    "The whole notebook as one picture: the window is made as tall as its content."
    cells = "document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer')"
    tall = page.evaluate(f"() => [...{cells}.querySelectorAll('.jp-Cell')].reduce((sum, c) => sum + c.offsetHeight, 0)")
    page.set_viewport_size({"width": 1300, "height": min(tall + 300, 16000)})
    page.wait_for_timeout(1000)
    page.evaluate(f"() => {{ {cells}.scrollTop = 0 }}")
    page.wait_for_timeout(1000)
    page.screenshot(path=path)


def problems(path: Path  # a notebook that was run and saved
             ) -> list:  # one line each
    "Error outputs, and cells that did not run."
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code" and c.source.strip()]
    bad = [f"{path.name}: {o.ename}: {o.evalue}" for c in cells for o in c.outputs if o.output_type == "error"]
    return bad or [f"{path.name}: did not run: {c.source.splitlines()[0]}" for c in cells if not c.execution_count]


def check(name: str,       # notebook
          pictures: Path   # folder for a picture of the page, or None
          ) -> list:       # problems
    "One notebook in a server and a browser of its own."
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as p:
        folder, home = Path(tmp, "nbs"), Path(tmp, "home")
        copy_notebooks(folder)
        home.mkdir()
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        with lab_server(folder, home) as address:
            open_page(page, address.format(name))
            run_all(page, folder / name, 300)
            if pictures: picture(page, pictures / f"{Path(name).stem}.png")
            browser.close()
        return problems(folder / name)


def main():
    "Check each notebook; exit status 1 with its problems."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["01_lora.ipynb"])
    parser.add_argument("--pictures", type=Path)
    args = parser.parse_args()
    if args.pictures: args.pictures.mkdir(parents=True, exist_ok=True)
    bad = []
    for name in args.names:
        start, found = time.time(), check(name, args.pictures)
        bad += found
        print(f"{name}: {'ok' if not found else 'failed'} in JupyterLab, {time.time() - start:.0f} s", flush=True)
    for line in bad: print(line, file=sys.stderr)
    sys.exit(bool(bad))


if __name__ == "__main__": main()
