"""Build the wheel and try it in an empty environment: what a stranger gets from `pip install`.

usage: python tools/wheel.py [REQUIREMENT …]
       (make wheel; for other versions python tools/wheel.py torch==2.4.1 "numpy<2")

TORCH_INDEX=ADDRESS is the index PyTorch comes from, as for make install. Everything lies in
build/wheel, and nothing of the checkout is on the path when the package is tried: every module
imports, the README's example runs on the stand-ins, and so does python -m exp.imagenette once there
is one.
"""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from house import ROOT, snippet

FOLDER = ROOT/"build"/"wheel"
IMPORTS = """
import importlib, pkgutil, sys, exp
names = [m.name for m in pkgutil.walk_packages(exp.__path__, "exp.")]
for name in names: importlib.import_module(name)
assert "site-packages" in exp.__file__, exp.__file__
strange = {"fastcore", "nbdev", "IPython", "pytest"} & set(sys.modules)
assert not strange, f"modules import {strange}"
print(f"{len(names)} modules import")
"""


def pip(python: Path | str, *words):
    subprocess.run([python, "-m", "pip", words[0], "--quiet", *words[1:]], check=True)


def build(folder: Path) -> Path:
    "The wheel of this checkout."
    for old in (folder, ROOT/"build"/"lib"):      # there lie modules that are gone
        shutil.rmtree(old, ignore_errors=True)
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    return next(folder.glob("*.whl"))


def lacking(wheel: Path) -> list[str]:
    "What should be in the wheel and is not: modules, stand-ins, the licence."
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = [p.relative_to(ROOT).as_posix() for p in (ROOT/"exp").rglob("*.py")]
    listed = subprocess.run(["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True)
    standins = [f"exp/standins/{name.removeprefix('data/')}" for name in listed.stdout.splitlines()]
    licence = ["LICENSE"]*(not any(name.endswith("LICENSE") for name in held))
    return [name for name in modules + standins if name not in held] + licence


def environment(folder: Path, wheel: Path, wanted: list[str]) -> Path:
    "The Python of a new environment that holds the wheel and what it asks for."
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    python = folder/("Scripts/python.exe" if os.name == "nt" else "bin/python")
    index = os.environ.get("TORCH_INDEX", "")
    torch = next((w for w in wanted if w.startswith("torch")), "torch")
    pip(python, "install", torch, *([] if index in ("", "default") else ["--index-url", index]))
    pip(python, "install", wheel, *wanted)
    return python


def attempt(python: Path, folder: Path) -> list[str]:
    "Try the installed package, away from the checkout; what failed."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("EXP_", "PYTHONPATH"))}
    env |= dict(EXP_OFFLINE="1", EXP_SCALE="tiny", OMP_NUM_THREADS="1", MPLBACKEND="agg",
                PYTHONUTF8="1")
    here = folder/"elsewhere"
    here.mkdir(parents=True, exist_ok=True)
    example = snippet((ROOT/"README.md").read_text(encoding="utf-8"))
    runs = {"every module imports": ["-c", IMPORTS], "the README's example": ["-c", example]}
    if (ROOT/"exp/imagenette.py").exists():
        runs["exp.imagenette"] = ["-m", "exp.imagenette", "--size", "64", "--epochs", "1"]
    failed = []
    for name, words in runs.items():
        print(f"--- {name}", flush=True)
        if subprocess.run([python, *words], cwd=here, env=env).returncode: failed.append(name)
    return failed


def main():
    wheel = build(FOLDER/"dist")
    print(f"{wheel.name}, {wheel.stat().st_size/1e6:.1f} MB")
    missing = lacking(wheel)
    if missing: sys.exit(f"the wheel lacks {missing}: see packages and package_data in setup.py")
    python = environment(FOLDER/"env", wheel, sys.argv[1:])
    failed = attempt(python, FOLDER)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__": main()
