"""Make .venv with the exact tested set and the project itself, without pulling CUDA onto a machine that has no GPU.

usage: python3 tools/install.py        TORCH_INDEX=ADDRESS chooses the index PyTorch comes from; TORCH_INDEX=default accepts pip's own
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT/".venv"
PYTHON = VENV/("Scripts/python.exe" if os.name == "nt" else "bin/python")

NO_GPU = """
This machine has no NVIDIA GPU, and from its package index PyTorch would bring several gigabytes of CUDA libraries.
Give the address of PyTorch's own CPU index, as the README's Troubleshooting section says:

    make {goal} TORCH_INDEX=ADDRESS

or, to take the large download all the same:  make {goal} TORCH_INDEX=default
"""


def pip(*args: str, **kwargs): return subprocess.run([PYTHON, "-m", "pip", *args], check=True, cwd=ROOT, **kwargs)


def would_pull_cuda() -> bool:
    "Ask pip what it would install for torch, from the index's metadata alone."
    report = pip("install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", "-c", "constraints.txt", "torch",
                 stdout=subprocess.PIPE)
    names = [item["metadata"]["name"].lower() for item in json.loads(report.stdout)["install"]]
    return any(name.startswith(("nvidia", "cuda", "triton")) for name in names)


def install_torch(index: str):
    "PyTorch first, so that nothing that needs it chooses another build."
    if not index and not shutil.which("nvidia-smi") and would_pull_cuda():
        sys.exit(NO_GPU.format(goal=os.environ.get("GOAL", "lab")))
    pip("install", "-c", "constraints.txt", "torch", *([] if index in ("", "default") else ["--index-url", index]))


def main():
    if sys.version_info < (3, 11):
        sys.exit(f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed (make lab PYTHON=python3.12)")
    if not PYTHON.exists(): subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    install_torch(os.environ.get("TORCH_INDEX", ""))
    pip("install", "-c", "constraints.txt", "-e", ".[dev]")


if __name__ == "__main__":
    try: main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"installation stopped (see above); after mending it, call make again: {error.cmd[-1]}")
