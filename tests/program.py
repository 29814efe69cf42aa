"""`d2mora` in a process of its own that does not pay for imports: a fork of a server that has imported everything once.

A test process cannot be forked itself: PyTorch refuses to run backward in a child of a process that already has.
`python -m d2mora.cli` is asked in `test_cli.py`, the installed command in `test_package.py`.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SERVER = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
if SERVER.get_start_method() == "forkserver":
    SERVER.set_forkserver_preload(["d2mora.cli", "d2mora.compare", "d2mora.export", "d2mora.analysis", "d2mora.plan"])


def command(*words):
    "What a user types after `d2mora`."
    from d2mora.cli import main

    return main([str(word) for word in words])


def work(call, words, folder, cwd, environment, output):
    "What the process does; `output` is a terminal or None."
    os.environ.clear(), os.environ.update(environment)
    for number, name in enumerate(("in", "out", "err")):
        os.dup2(os.open(output if output and number else folder / name, os.O_RDWR), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    os.chdir(cwd)
    sys.exit(call(*words))


class Program:
    "A `d2mora`, or another call, that has been started, spoken to as a `subprocess.Popen`."

    def __init__(self, *words, call=command, cwd=".", stdin="", env=None, output=None):
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        for name in ("in", "out", "err"):
            (folder / name).write_text(stdin if name == "in" else "")
        before = dict(os.environ)
        os.environ.update(ENVIRONMENT)  # for the server, if it is not there yet
        try:
            self.process = SERVER.Process(
                target=work, args=(call, words, folder, os.path.abspath(cwd), (env or before) | ENVIRONMENT, output)
            )
            self.process.start()
        finally:
            os.environ.clear(), os.environ.update(before)

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.process.pid, number)

    def communicate(self, timeout=300):
        "What it said, at its end."
        self.process.join(timeout)
        if self.poll() is None:
            self.send_signal(signal.SIGKILL), self.process.join()
            raise TimeoutError(f"not done after {timeout} s: {self.said('err')[-2000:]}")
        return self.said("out"), self.said("err")

    def said(self, name):
        return (Path(self.folder.name) / name).read_text(encoding="utf-8")

    @property
    def returncode(self):
        return self.poll()


def program(*words, **how):
    "Run `d2mora` to its end."
    started = Program(*words, **how)
    out, err = started.communicate()
    return subprocess.CompletedProcess(words, started.returncode, out, err)
