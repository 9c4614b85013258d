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
There is a smaller build for processors alone. To take it:

  1. Open the web site pytorch.org and press "Get Started".
  2. In the table there choose Stable, your system, Pip, Python and, as compute platform, CPU.
  3. Its last row shows a command that ends in --index-url and an address. Copy that address.
  4. Call, with it in place of ADDRESS:

       make {goal} TORCH_INDEX=ADDRESS

Once is enough. Or, to take the large download all the same:  make {goal} TORCH_INDEX=default
"""

NO_PIP = """
{python} cannot make an environment that has pip. On Debian and Ubuntu the package python3-venv is missing
(sudo apt install python3-venv). Or name another Python:  make {goal} PYTHON=python3.12
"""


def goal() -> str: return os.environ.get("GOAL", "lab")


def has_pip() -> bool:
    "Is there a .venv that can install something?"
    return PYTHON.exists() and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0


def make_venv():
    "Make .venv, also over one that was left half-made or without pip."
    if has_pip(): return
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV])
    if has_pip(): return
    shutil.rmtree(VENV, ignore_errors=True)
    sys.exit(NO_PIP.format(python=sys.executable, goal=goal()))


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
        sys.exit(NO_GPU.format(goal=goal()))
    pip("install", "-c", "constraints.txt", "torch", *([] if index in ("", "default") else ["--index-url", index]))


def main():
    if sys.version_info < (3, 11):
        sys.exit(f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed (make lab PYTHON=python3.12)")
    make_venv()
    install_torch(os.environ.get("TORCH_INDEX", ""))
    pip("install", "-c", "constraints.txt", "-e", ".[dev]")


if __name__ == "__main__":
    try: main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"installation stopped (see above); after mending it, call make again: {error.cmd[-1]}")
