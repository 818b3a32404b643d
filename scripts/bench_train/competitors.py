"""The two kinds of competitors: each can run some training steps and keeps a record of its turns.

A turn is a dict: step_s (seconds of each step), others (CPU seconds that other processes used per second of the turn),
peak_rss_bytes, and parts (seconds per step by part) where the competitor says so.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

# A step counts as disturbed when other processes used more than this share of one core.
DISTURBED = 0.08


@dataclasses.dataclass
class Task:
    """What every competitor trains."""

    sizes: dict
    preset: str
    seq: int
    sequences: int
    precision: str
    threads: int


def busy_seconds():
    """CPU seconds that all processes of the machine have used since it started."""
    with open("/proc/stat") as stat:
        fields = [int(x) for x in stat.readline().split()[1:9]]
    idle, waiting = fields[3], fields[4]
    return (sum(fields) - idle - waiting) / os.sysconf("SC_CLK_TCK")


class Competitor:
    """Base: bookkeeping. Subclasses fill `name` and run steps in `turn`."""

    def __init__(self, name):
        self.name, self.turns, self.about = name, [], {}

    def run(self, steps):
        """Runs some steps, and notes how much others disturbed them."""
        busy, start = busy_seconds(), time.perf_counter()
        turn, own_cpu = self.turn(steps)
        wall = time.perf_counter() - start
        turn["others"] = max(0.0, (busy_seconds() - busy - own_cpu) / wall)
        self.turns.append(turn)

    def result(self):
        """Everything measured, with medians over the undisturbed turns (over all when fewer than three are)."""
        clean = [t for t in self.turns if t["others"] <= DISTURBED]
        used = clean if len(clean) >= 3 else self.turns
        steps = [s for t in used for s in t["step_s"]]
        parts = [p for t in used for p in t.get("parts", [])]
        return {
            "name": self.name,
            "step_s_median": statistics.median(steps),
            "step_s_min": min(steps),
            "steps": len(steps),
            "disturbed": used is not clean,
            "peak_rss_bytes": max(t["peak_rss_bytes"] for t in self.turns),
            "parts": {key: statistics.median(p[key] for p in parts) for key in parts[0]} if parts else {},
            "turns": self.turns,
            **self.about,
        }

    def stop(self):
        """Ends what is still running."""


class PyTorch(Competitor):
    """A torch_worker.py process, which sleeps between turns."""

    def __init__(self, name, python, task, micro_batch, compiled):
        super().__init__(name)
        command = [
            python, Path(__file__).with_name("torch_worker.py"), "--model", json.dumps(task.sizes),
            "--seq", task.seq, "--sequences", task.sequences, "--micro-batch", micro_batch,
            "--precision", task.precision, "--threads", task.threads,
        ]  # fmt: skip
        self.log = tempfile.TemporaryFile("w+")
        environment = os.environ | {"OMP_NUM_THREADS": str(task.threads)}
        self.process = subprocess.Popen(
            [str(c) for c in command] + ["--compile"] * compiled,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip
        ready = self.read()
        self.about = {key: ready[key] for key in ("torch", "transformers", "parameters", "warmup_s")}

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            tail = "".join(self.log.readlines()[-15:])
            raise SystemExit(f"PyTorch ({self.name}) ended with status {code} (-9: killed, likely for lack of memory):\n{tail}")
        return json.loads(line)

    def turn(self, steps):
        self.process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self.process.stdin.flush()
        answer = self.read()
        return {key: answer[key] for key in ("step_s", "parts", "peak_rss_bytes")}, answer["cpu_s"]

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


class Ferropt(Competitor):
    """`ferropt bench train`, started for every turn. Its peak memory is the kernel's figure for the whole process."""

    def __init__(self, binary, task):
        super().__init__("ferropt")
        self.command = [
            str(binary), "bench", "train", "--json", "--preset", task.preset, "--seq", str(task.seq),
            "--batch", str(task.sequences), "--precision", task.precision, "--threads", str(task.threads),
        ]  # fmt: skip

    def turn(self, steps):
        command = self.command + ["--steps", str(steps)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"`{' '.join(command)}` ended with status {process.returncode}")
        answer = json.loads(printed)
        self.about = {key: answer[key] for key in ("device", "parameters", "measured_peak_flops") if key in answer}
        turn = {"step_s": answer["step_s"], "peak_rss_bytes": usage.ru_maxrss * 1024, "parts": [answer["parts"]]}
        return turn, usage.ru_utime + usage.ru_stime
