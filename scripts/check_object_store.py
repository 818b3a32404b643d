"""Runs of ferropt that copy their checkpoints to an S3 server which fails in all the usual ways.

    python scripts/check_object_store.py FERROPT

The server is moto on the loopback address. Between it and ferropt is a proxy that can answer 500, cut uploads, or be down.
"""

import http.client
import http.server
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

FERROPT = sys.argv[1]
SECRET = "a-secret-that-nobody-may-read"
STEPS, EVERY = 200, 10


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests on to the server, or does not."""

    daemon_threads = True

    def __init__(self, server):
        super().__init__(("127.0.0.1", 0), Handler)
        self.server_at = server
        self.mode = "up"
        self.lock = threading.Lock()
        self.requests = self.faults = 0
        self.sealed = []  # folders whose manifest has arrived
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # a killed client


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def pass_on(self):
        proxy = self.server
        with proxy.lock:
            proxy.requests += 1
            number, mode = proxy.requests, proxy.mode
        length = int(self.headers.get("Content-Length") or 0)
        if mode == "down" or (mode == "flaky" and length > 1000 and number % 7 == 3):
            # Down, or cut in the middle of an upload.
            self.rfile.read(length // 2)
            proxy.faults += 1
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.rfile.read(length)
        if mode == "flaky" and number % 4 == 1:
            proxy.faults += 1
            self.answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
            return
        server = http.client.HTTPConnection("127.0.0.1", proxy.server_at, timeout=30)
        server.request(self.command, self.path, body=body, headers=dict(self.headers))
        response = server.getresponse()
        content = response.read()
        if self.command == "PUT" and response.status == 200 and "manifest.json" in self.path:
            proxy.sealed.append(self.path.split("/")[-2])
        self.answer(response.status, dict(response.getheaders()), content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

    def answer(self, status, headers, content):
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", len(content)) if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def start_server():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        try:
            ask(port, "PUT", "/bucket")
            return server, port
        except OSError:
            time.sleep(0.1)
    sys.exit("check-object-store: the server did not start")


def ask(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
    connection.request(method, path, body=body, headers=headers)
    response = connection.getresponse()
    content = response.read()
    assert response.status == 200, f"{method} {path}: {response.status} {content}"
    return content


def write_lab(lab):
    """A corpus, a tokenizer of bytes, and a configuration."""
    words = "the cat sat on a mat and saw one dog that ran to see it".split()
    state, text = 1, []
    for _ in range(20000):
        state = (state * 1103515245 + 12345) % 2**31
        text.append(words[(state >> 16) % len(words)])
    (lab / "text.txt").write_text(" ".join(text))
    vocab = {special: number for number, special in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    others = 256
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        vocab[chr(byte if printable else others)] = byte + 4
        others += not printable
    added = [
        {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for number, content in enumerate(["<s>", "<pad>", "</s>", "<unk>"])
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": []},
    }
    (lab / "tokenizer.json").write_text(json.dumps(tokenizer))
    (lab / "run.toml").write_text(f"""
[model]
layers = 2
heads = 2
width = 64
vocab = 260
positions = 64
[data]
train = '{lab}/text.txt'
tokenizer = '{lab}/tokenizer.json'
cache = '{lab}/cache'
[batch]
tokens = 512
[optimizer]
lr = 5e-3
[run]
steps = {STEPS}
threads = 1
[checkpoint]
every = {EVERY}
keep_last = 2
""")


class Lab:
    def __init__(self, folder, proxy):
        self.folder, self.proxy, self.said = folder, proxy, ""
        self.environment = dict(
            os.environ,
            AWS_ACCESS_KEY_ID="tester",
            AWS_SECRET_ACCESS_KEY=SECRET,
            AWS_ENDPOINT_URL=proxy.url(),
            AWS_ALLOW_HTTP="true",
            AWS_REGION="us-east-1",
        )

    def start(self, run, *sets, environment=None):
        command = [FERROPT, "train", str(self.folder / "run.toml"), "--set", f"run.dir={self.folder / run}"]
        for item in sets:
            command += ["--set", item]
        return subprocess.Popen(
            command, env=environment or self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, process, refused=False):
        said, _ = process.communicate(timeout=300)
        self.said += said
        assert (process.returncode != 0) == refused, f"status {process.returncode}:\n{said}"
        return said

    def train(self, run, *sets, refused=False):
        return self.finish(self.start(run, *sets), refused)

    def ranks(self, run, count, *sets):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        variables = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = [
            self.start(run, *sets, environment=dict(self.environment, RANK=str(rank), **variables))
            for rank in range(count)
        ]
        return "".join(self.finish(process) for process in started)

    def copies(self, *arguments, refused=False):
        """`ferropt checkpoint copies`: what it prints."""
        command = [FERROPT, "checkpoint", "copies", *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)
        self.said += done.stdout + done.stderr
        assert (done.returncode != 0) == refused, f"status {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def lose(self, run):
        shutil.rmtree(self.folder / run)

    def tensors(self, run, step=STEPS):
        files = sorted((self.folder / run / f"checkpoints/step-{step:08}").glob("*.safetensors"))
        assert files, f"{run} has no checkpoint of step {step}"
        return {file.name: file.read_bytes() for file in files}

    def in_bucket(self, prefix):
        """Steps of the mirror, and whether each has a manifest."""
        listing = ask(self.proxy.server_at, "GET", f"/bucket?list-type=2&prefix={prefix}/").decode()
        keys = [part.split("</Key>")[0] for part in listing.split("<Key>")[1:]]
        folders = {}
        for key in keys:
            folder, file = key[len(prefix) + 1 :].split("/")
            folders.setdefault(folder, set()).add(file)
        return sorted((int(folder[5:13]), "manifest.json" in files) for folder, files in folders.items()), keys


def mirror(prefix):
    return f"checkpoint.mirror=s3://bucket/{prefix}"


def wait_for(what, happened):
    for _ in range(3000):
        if happened():
            return
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what}")


def check(lab):
    proxy = lab.proxy
    step("a run that nothing disturbs")
    lab.train("whole")
    whole = lab.tensors("whole")

    step("killed, its disk lost, while the server fails now and then")
    proxy.mode = "flaky"
    process = lab.start("lost", mirror("lost"), "checkpoint.mirror_keep_last=3")
    wait_for("two copies", lambda: len(proxy.sealed) >= 2 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    lab.said += process.communicate()[0]
    lab.lose("lost")
    said = lab.train("lost", mirror("lost"), "checkpoint.mirror_keep_last=3")
    assert "fetched step" in said and "copied step" in said, said
    assert proxy.faults > 5, f"only {proxy.faults} faults"
    assert lab.tensors("lost") == whole, "the run that lost its disk has other bits"
    there, _ = lab.in_bucket("lost")
    assert there[-1] == (STEPS, True) and len(there) <= 3 and all(whole for _, whole in there), there
    print(f"    {proxy.faults} faults in {proxy.requests} requests; in the bucket: {[step for step, _ in there]}")

    step("a copy that is damaged is passed over")
    proxy.mode = "up"
    _, keys = lab.in_bucket("lost")
    newest = [key for key in keys if f"step-{STEPS:08}" in key and key.endswith("adam_v.safetensors")]
    content = bytearray(ask(proxy.server_at, "GET", f"/bucket/{newest[0]}"))
    content[-1] ^= 1
    ask(proxy.server_at, "PUT", f"/bucket/{newest[0]}", bytes(content))
    there = "s3://bucket/lost"
    listed = json.loads(lab.copies(there, "--json"))["checkpoints"]
    assert [copy["step"] for copy in listed][-1] == STEPS and not any(copy["findings"] for copy in listed), listed
    said = lab.copies(there, "--verify", refused=True)
    assert f"1 of {len(listed)} copies" in said and f"{newest[0]} of {there} is damaged" in said, said
    before = listed[-2]["step"]
    lab.copies(there, "--verify", "--checkpoint", before)
    lab.copies(there, "--fetch", lab.folder / "fetched", refused=True)
    lab.copies(there, "--fetch", lab.folder / "fetched", "--checkpoint", before)
    assert lab.tensors("fetched", before)
    said = lab.copies(there, "--checkpoint", 1, refused=True)
    assert f"has no step 1; it has {listed[0]['step']}" in said, said
    assert "has no checkpoints" in lab.copies("s3://bucket/nothing", refused=True)
    lab.lose("lost")
    said = lab.train("lost", mirror("lost"))
    assert "passed over a damaged checkpoint" in said and "adam_v.safetensors" in said, said
    assert lab.tensors("lost") == whole

    step("down in the middle of a run: training goes on, and the next copy succeeds")
    proxy.sealed.clear()
    process = lab.start("down", mirror("down"))
    wait_for("a copy", lambda: proxy.sealed)
    proxy.mode = "down"
    time.sleep(3)
    proxy.mode = "up"
    lab.finish(process)
    assert lab.tensors("down") == whole
    there, _ = lab.in_bucket("down")
    assert there[-1] == (STEPS, True), there

    step("down to the end: a warning; the next start makes up for it")
    proxy.sealed.clear()
    process = lab.start("late", mirror("late"))
    wait_for("a copy", lambda: proxy.sealed)
    proxy.mode = "down"
    said = lab.finish(process)
    assert f"step {STEPS} is not in the mirror" in said, said
    assert (STEPS, True) not in lab.in_bucket("late")[0]

    step("down at the start: refused without a checkpoint, a warning with one")
    said = lab.train("none", mirror("late"), refused=True)
    assert "whether the mirror has one is unknown" in said, said
    said = lab.train("late", mirror("late"))
    assert f"whether the mirror has more than step {STEPS} is unknown" in said, said
    proxy.mode = "up"
    lab.train("late", mirror("late"))
    assert lab.in_bucket("late")[0][-1] == (STEPS, True)

    step("a bucket that does not exist")
    said = lab.train("none", "checkpoint.mirror=s3://nobucket/x", refused=True)
    assert "s3://nobucket/x" in said, said

    step("two ranks copy their shares; two others fetch them")
    lab.ranks("two-whole", 2)
    proxy.sealed.clear()
    lab.ranks("two", 2, mirror("two"), f"run.steps={STEPS // 2}", f"schedule.total={STEPS}", "schedule.warmup=20")
    lab.lose("two")
    said = lab.ranks("two", 2, mirror("two"), f"schedule.total={STEPS}", "schedule.warmup=20")
    assert f"fetched step {STEPS // 2}" in said, said
    assert lab.tensors("two") == lab.tensors("two-whole"), "two ranks that lost their disk have other bits"

    assert SECRET not in lab.said, "the secret key was written"


def step(what):
    print(f"{time.monotonic() - STARTED:5.1f} s  {what}", flush=True)


STARTED = time.monotonic()
moto, at = start_server()
try:
    with tempfile.TemporaryDirectory() as folder:
        write_lab(pathlib.Path(folder))
        check(Lab(pathlib.Path(folder), Proxy(at)))
    step("check-object-store: all is well")
finally:
    moto.kill()
