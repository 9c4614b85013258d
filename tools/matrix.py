"""Do the promises hold on other processors and on the newest PyTorch? Runs the tests without notebooks four times, then every lesson once.

usage: python tools/matrix.py [ENVIRONMENT]     (a virtual environment with another PyTorch and the tools of the tests)
"""
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS, LESSONS = ["tests"], ["tests/fresh_kernels.py"]


def command(python: str | Path, what: list[str], threads: int = 1, capability: str | None = None) -> tuple[list[str], dict]:
    "What to call, under which environment: offline, small, with so many threads and these instructions."
    env = {k: v for k, v in os.environ.items() if k not in ("EXP_DATA", "EXP_MIRROR", "EXP_RECORD", "ATEN_CPU_CAPABILITY")}
    env |= dict(EXP_OFFLINE="1", EXP_SCALE="tiny", EXP_THREADS=str(threads), OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads),
                OMP_WAIT_POLICY="PASSIVE", JUPYTER_PLATFORM_DIRS="1", PYTHONPATH=os.pathsep.join([str(ROOT/"tests/offline"), str(ROOT)]))
    if capability: env["ATEN_CPU_CAPABILITY"] = capability
    return [str(python), "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *what], env


def runs(other: str) -> list[tuple[str, tuple[list[str], dict] | None]]:
    "The columns of the matrix: a name, and a command or None."
    here, python = sys.executable, Path(other or "no environment")/"bin/python"
    return [("plain instructions, 1 thread", command(here, TESTS, 1, "default")),
            ("AVX2, 2 threads", command(here, TESTS, 2, "avx2")),
            ("this processor's best, 2 threads", command(here, TESTS, 2)),
            ("another PyTorch, 1 thread", command(python, TESTS) if python.exists() else None),
            ("every lesson in a fresh kernel", command(here, LESSONS))]


def about(argv: list[str], env: dict) -> str:
    "Version, instructions and threads as a process of this run sees them."
    code = "import torch; print('torch', torch.__version__, '·', torch.backends.cpu.get_cpu_capability(), '·', torch.get_num_threads(), 'threads')"
    return subprocess.run([argv[0], "-c", code], env=env, capture_output=True, text=True).stdout.strip() or f"{argv[0]} has no torch"


def main():
    other, rows = sys.argv[1] if len(sys.argv) > 1 else "", []
    for name, run in runs(other):
        if run is None:
            rows.append((name, "not run: say make matrix MATRIX_TORCH=PATH of an environment with it" + (f", {other!r} has no bin/python" if other else "")))
            continue
        argv, env = run
        print(f"\n=== {name}: {about(argv, env)}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(argv, cwd=ROOT, env=env).returncode
        rows.append((name, f"{'passed' if code == 0 else 'FAILED'} in {(time.perf_counter() - start)/60:.1f} min ({about(argv, env)})"))
    print("\n" + "\n".join(f"{name:34}{what}" for name, what in rows))
    if any("FAILED" in what for _, what in rows): sys.exit(1)


if __name__ == "__main__": main()
