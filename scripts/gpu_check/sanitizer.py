"""NVIDIA's compute-sanitizer, which watches every access to memory: where it is, and what it says."""

import os
import shutil
import sys
from pathlib import Path

# Accesses that are out of bounds or misaligned; races in shared memory; barriers that not all threads come to.
TOOLS = {
    # Some tests ask the driver for what it must refuse.
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": [],
    "synccheck": [],
}
# Status when the program is content but the tool is not.
FOUND = 86
ABSENT = "compute-sanitizer was not found; CUDA's toolkit has it, and PyPI's nvidia-cuda-sanitizer-api"


def find():
    """The program, from PATH, a toolkit, or the packages of this Python."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    toolkits = [*sorted(map(str, Path("/usr/local").glob("cuda*")), reverse=True), "/opt/cuda"]
    packages = [str(folder) for path in sys.path if path for folder in sorted(Path(path).glob("nvidia/*/bin"))]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes + toolkits), *packages]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def command(program, tool):
    """The words before those of what is watched. All that it finds counts, in the order in which it is said."""
    return [program, "--tool", tool, *TOOLS[tool], "--error-exitcode", str(FOUND), "--print-limit", "20"]


def said(output):
    """Its own lines, without the one that it begins with."""
    lines = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    return [line for line in lines if line and not line.startswith("COMPUTE-SANITIZER")]
