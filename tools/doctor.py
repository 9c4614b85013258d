"""Is this machine ready? What is there, what is missing, and what to do about each trouble.

usage: python tools/doctor.py             (make doctor; with Python 3.7 or newer and nothing else)
       python tools/doctor.py --record    (maintainers, on a quiet machine: its speed is kept in
                                           results/, as the figure that others compare with)
"""
from __future__ import annotations

import configparser
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FINE, NOTE, TROUBLE = "✓", "○", "✗"
AGAIN = "remove .venv and call make lab again"
LESSON, SPEED = "01_matmul", "speed, for make doctor: {}"      # the records to compare with


def settings() -> configparser.SectionProxy:
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def numbers(version: str) -> tuple:
    "'2.13.0+cpu' -> (2, 13, 0), to compare."
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


def installed(name: str) -> str | None:
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None


def ready() -> bool:
    "Has make set everything up here?"
    return (ROOT/".venv/.installed").exists()


# --- the checks: each gives (sign, topic, what it found and what to do) ---------------------------

def check_python():
    least = settings()["min_python"]
    found = ".".join(map(str, sys.version_info[:3]))
    inside = sys.prefix != sys.base_prefix
    if sys.version_info[:2] < numbers(least):
        cure = "name another, as in make lab PYTHON=python3.12"
        yield TROUBLE, "Python", f"{found} is too old: {cure}"
    else:
        where = "in an environment" if inside else "no environment: make lab makes one"
        yield FINE, "Python", f"{found}, {where}"


def check_torch():
    if not importlib.util.find_spec("torch"):
        if ready(): yield TROUBLE, "PyTorch", f"not here: {AGAIN}"
        else: yield NOTE, "PyTorch", "not here yet: make lab installs it"
        return
    try: import torch
    except Exception as error:      # half an installation fails in many ways
        yield TROUBLE, "PyTorch", f"does not import ({error}): {AGAIN}"
        return
    least = re.search(r"torch>=(\S+)", settings()["requirements"])[1]
    if numbers(torch.__version__) >= numbers(least): yield FINE, "PyTorch", torch.__version__
    else:
        yield TROUBLE, "PyTorch", f"{torch.__version__} is older than {least}: pip install -U torch"
    if torch.cuda.is_available(): yield FINE, "GPU", torch.cuda.get_device_name()
    elif torch.backends.mps.is_available(): yield FINE, "GPU", "Apple's"
    else: yield NOTE, "GPU", "none that PyTorch can use: part 1 needs none; Colab has one"


def check_packages():
    requirements = settings()["requirements"].split()
    wanted = dict(r.split(">=") for r in requirements if not r.startswith("torch"))
    found = {name: installed(name) for name in wanted}
    bad = [f"{name} {version or 'missing'}" for name, version in found.items()
           if numbers(version or "0") < numbers(wanted[name])]
    if not bad: yield FINE, "packages", " · ".join(f"{n} {version}" for n, version in found.items())
    elif ready(): yield TROUBLE, "packages", f"{', '.join(bad)}: {AGAIN}"
    else: yield NOTE, "packages", f"{', '.join(bad)}: make lab installs them"
    if not bad and not installed("jupyterlab"):
        yield NOTE, "JupyterLab", "not here: pip install -e .[dev] brings it"


def check_exp():
    spec = importlib.util.find_spec("exp")
    if spec is None and ready(): yield TROUBLE, "exp", "does not import: pip install -e ."
    elif spec is None: yield NOTE, "exp", "does not import: make lab installs it"
    elif Path(spec.origin).resolve().parent != ROOT/"exp":
        yield TROUBLE, "exp", (f"comes from {Path(spec.origin).parent}, not from this folder: "
                               "pip install -e . here, or start Python from its environment")
    else: yield FINE, "exp", "comes from this folder"


def check_threads():
    cores = os.cpu_count() or 1
    names = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "EXP_THREADS"
    said = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    yield FINE, "processor", f"{cores} cores" + (f" ({said})" if said else "")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.2*cores:
        yield NOTE, "processor", (f"{os.getloadavg()[0]:.0f} programs want {cores} cores now: "
                                  "lessons take longer, and times are not to be trusted")


def check_settings():
    scale, mirror = os.environ.get("EXP_SCALE"), os.environ.get("EXP_MIRROR")
    if scale and scale not in ("tiny", "cpu", "gpu"):
        yield TROUBLE, "EXP_SCALE", f"is {scale!r}: set it to tiny, cpu or gpu, or unset it"
    elif scale: yield NOTE, "EXP_SCALE", f"is {scale}: lessons do that much work"
    if os.environ.get("EXP_OFFLINE") == "1":
        yield NOTE, "EXP_OFFLINE", "is 1: lessons use small stand-ins; unset it for the real data"
    if mirror and "://" not in mirror and not (Path(mirror).expanduser()/"SHA256SUMS").exists():
        cure = "name a folder or an address that has one"
        yield TROUBLE, "EXP_MIRROR", f"{mirror} holds no SHA256SUMS: {cure}"


def places() -> list[Path]:
    "Where unpacked sets are looked for."
    users = (os.environ.get("XDG_CACHE_HOME") or "~/.cache") + "/dl-from-scratch"
    found = os.environ.get("EXP_DATA"), "data/cache", users
    return [ROOT/Path(place).expanduser() for place in found if place]


def all_sets() -> dict[str, float]:
    "Names and MB of the sets that lessons use."
    import tomllib
    sets = tomllib.loads((ROOT/"data/sets.toml").read_text(encoding="utf-8"))
    return {name: about["size"] for name, about in sets.items()}


def missing_sets() -> dict[str, float]:
    "Those that are not here yet."
    def here(name): return any((place/name/".source.json").exists() for place in places())
    return {name: size for name, size in all_sets().items() if not here(name)}


def check_data():
    if sys.version_info < (3, 11): return
    missing = missing_sets()
    here = [name for name in all_sets() if name not in missing]
    if here: yield FINE, "data", f"here: {', '.join(here)}"
    if missing:
        names = ", ".join(f"{name} ({size:g} MB)" for name, size in missing.items())
        yield NOTE, "data", (f"not here yet: {names}; each is fetched when a lesson first asks "
                             "for it, or from EXP_MIRROR")


def check_disk():
    free = shutil.disk_usage(ROOT).free/1e9
    # a set takes about three times its archive: that, its files, and what lessons make of them
    data = 3*sum(missing_sets().values())/1000 if sys.version_info >= (3, 11) else 1
    need = data + (0 if ready() else 2)
    text = f"{free:.1f} GB free, about {need:.1f} GB wanted for what is still to come"
    if free > need: yield FINE, "disk", text
    else: yield TROUBLE, "disk", f"{text}: make room, or point EXP_DATA to another disk"


# --- how fast -------------------------------------------------------------------------------------

def speeds(rounds: int = 7) -> dict[str, float]:
    "GFLOP/s of a matrix product and of a convolution with its gradients: medians, on one thread."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    x, w = torch.rand(512, 512), torch.rand(512, 512)
    photos, filters = torch.rand(8, 32, 32, 32), torch.rand(32, 32, 3, 3, requires_grad=True)
    def convolution(): torch.nn.functional.conv2d(photos, filters, padding=1).sum().backward()
    work = {"matrix product": (lambda: x @ w, 2*512**3),
            "convolution": (convolution, 2*2*8*32*32*32*32*9)}     # there, and back to the filters
    found = {}
    for name, (call, flops) in work.items():
        call()
        times = []
        for _ in range(rounds):
            start = time.perf_counter(); call(); times.append(time.perf_counter() - start)
        found[name] = flops/statistics.median(times)/1e9
    torch.set_num_threads(before)
    return found


def recorded(name: str) -> dict | None:
    "The maintainers' figure for one of `speeds`."
    for path in (ROOT/"results").glob(f"{LESSON}-speed-*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["what"] == SPEED.format(name): return record
    return None


def check_speed():
    if not importlib.util.find_spec("torch"): return
    found = speeds()
    text = " · ".join(f"{name} {speed:.0f} GFLOP/s" for name, speed in found.items())
    known = {name: recorded(name) for name in found}
    if not all(known.values()):
        yield NOTE, "speed", f"{text} on one thread; there is no recorded figure to compare with"
        return
    slower = max(known[name]["mean"]/speed for name, speed in found.items())
    told = ("the minutes that lessons say should hold" if .7 < slower < 1.4
            else f"expect about {slower:.1f}× the minutes that lessons say")
    figures = " and ".join(f"{r['mean']:.0f}" for r in known.values())
    yield FINE if slower < 3 else NOTE, "speed", f"{text} on one thread; recorded {figures}: {told}"


def keep_speed():
    "Write the figures of this machine down."
    from exp.testing import record
    runs = [speeds() for _ in range(5)]
    os.environ.update(EXP_RECORD="1")
    for name in runs[0]:
        values = [speed[name] for speed in runs]
        print(record(LESSON, SPEED.format(name), values, unit="GFLOP/s", device="cpu"))


CHECKS = [check_python, check_torch, check_packages, check_exp, check_threads, check_settings,
          check_data, check_disk, check_speed]


def examine(checks=None) -> list[tuple]:
    "What all checks find; one that fails is a trouble itself."
    found = []
    for check in checks or CHECKS:
        try: found += check()
        except Exception as error:
            topic = check.__name__.replace("check_", "")
            found.append((TROUBLE, topic, f"could not be examined ({error!r}): please tell us"))
    return found


def main():
    if hasattr(sys.stdout, "reconfigure"):      # a file on Windows may know no ✓
        sys.stdout.reconfigure(errors="replace")
    if "--record" in sys.argv: return keep_speed()
    found = examine()
    for sign, topic, text in found: print(f"{sign} {topic:12} {text}")
    troubles = sum(sign == TROUBLE for sign, *_ in found)
    if troubles: print(f"\n{troubles} trouble{'s'*(troubles > 1)}: see {TROUBLE} above")
    else: print("\nready" if ready() else "\nnothing is in the way: make lab sets everything up")
    sys.exit(bool(troubles))


if __name__ == "__main__": main()
