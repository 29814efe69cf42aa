"""A hub on loopback that serves the embedded base, each repository wrong in its own way; then each is loaded, and the answers printed as JSON.

usage: python tests/evil_hub.py FOLDER     (FOLDER: an empty cache)
"""
import hashlib
import http.server
import json
import os
import sys
import threading
from pathlib import Path

FILES = {p.name: p.read_bytes() for p in (Path(__file__).parents[1] / "d2mora" / "assets" / "toy-base").iterdir()}
COMMIT, MOST = "a" * 40, 40 * 2**20  # what counts as endless here
WRONG = {  # what is sent in the file's place
    "good": lambda c: c, "bytes": lambda c: c[:-4] + b"EVIL", "more": lambda c: c + b"x" * 1000, "less": lambda c: c[:-1000], "endless": None,
    "small": lambda c: c.replace(b'"num_hidden_layers": 3', b'"num_hidden_layers": 2'),
}  # fmt: skip


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def do_HEAD(self): self.serve(body=False)

    def do_GET(self): self.serve(body=True)

    def reply(self, status, headers, content=b"", body=True):
        self.send_response(status)
        for name, value in ({"Content-Length": len(content), "X-Repo-Commit": COMMIT} | headers).items():
            if value is not None: self.send_header(name, value)
        self.end_headers()
        if body: self.wfile.write(content)

    def serve(self, body):
        how, name = self.path.split("evil/")[1].split("/")[0].split("?")[0], self.path.split("?")[0].split("/")[-1]
        if "/tree/" in self.path: return self.reply(200, {}, json.dumps([{"type": "file", "path": n, "size": len(c), "oid": "b" * 40} for n, c in FILES.items()]).encode(), body)
        if "/api/" in self.path: return self.reply(200, {}, json.dumps({"id": f"evil/{how}", "sha": COMMIT, "siblings": [{"rfilename": n} for n in FILES]}).encode(), body)
        if name not in FILES: return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        good, large = FILES[name], name == "model.safetensors"
        tag = hashlib.sha256(good).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(good) + good).hexdigest()
        headers = {"ETag": f'"{tag}"'} | ({"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": len(good)} if large else {})
        hit = name == ("config.json" if how == "small" else "model.safetensors")
        if not hit or not body: return self.reply(200, headers, good, body)
        if how != "endless": return self.reply(200, headers, WRONG[how](good))
        self.reply(200, headers | {"Content-Length": None, "Connection": "close"}, body=False)
        for _ in range(MOST // 2**20): self.wfile.write(b"\0" * 2**20)
        self.close_connection = True


def main(cache):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": cache, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "no_proxy": "*"}
    from d2mora.recipe import load_base

    for how in WRONG:
        try: said = f"loaded {load_base(f'evil/{how}')[0].num_parameters()}"
        except ValueError as error: said = str(error)
        kept = sum(p.stat().st_size for p in Path(cache).rglob("*") if p.is_file() and not p.is_symlink() and p.suffix != ".incomplete" and f"evil--{how}" in str(p))  # older clients leave what they began
        print(json.dumps({"how": how, "said": said, "kept": kept}), flush=True)


if __name__ == "__main__": main(sys.argv[1])
