"""Is this machine ready for the lessons? What is there, what is missing, and what to do about each trouble.

usage: python tools/doctor.py             (make doctor; any Python 3.7 or newer will do, nothing need be installed)
       python tools/doctor.py --record    (maintainers, on a quiet machine: keep its speed in results/ as the figure to compare with)
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
LESSON, SPEED = "01_matmul", "speed, for make doctor: {}"      # the record that speeds are compared with


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


# --- the checks: each gives (sign, topic, what it found and what to do) ------------------------------------------------

def check_python():
    least = settings()["min_python"]
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < numbers(least): yield TROUBLE, "Python", f"{found} is too old: name another, as in make lab PYTHON=python3.12"
    else: yield FINE, "Python", f"{found}, {'in an environment' if sys.prefix != sys.base_prefix else 'no environment: make lab makes one'}"


def check_torch():
    if not importlib.util.find_spec("torch"):
        yield (TROUBLE if ready() else NOTE), "PyTorch", "not here" + (": remove .venv and call make lab again" if ready() else " yet: make lab installs it")
        return
    try: import torch
    except Exception as error:      # half an installation fails in many ways
        yield TROUBLE, "PyTorch", f"does not import ({error}): remove .venv and call make lab again"
        return
    least = re.search(r"torch>=(\S+)", settings()["requirements"])[1]
    old = numbers(torch.__version__) < numbers(least)
    yield (TROUBLE, "PyTorch", f"{torch.__version__} is older than {least}: pip install -U torch") if old else (FINE, "PyTorch", torch.__version__)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "Apple's" if torch.backends.mps.is_available() else None
    yield (FINE, "GPU", gpu) if gpu else (NOTE, "GPU", "none that PyTorch can use: part 1 needs none; on Colab there is one")


def check_packages():
    wanted = dict(re.match(r"([\w-]+)>=(\S+)", r).groups() for r in settings()["requirements"].split() if not r.startswith("torch"))
    found = {name: installed(name) for name in wanted}
    bad = [f"{name} {version or 'missing'}" for name, version in found.items() if not version or numbers(version) < numbers(wanted[name])]
    if not bad: yield FINE, "packages", " · ".join(f"{name} {version}" for name, version in found.items())
    elif ready(): yield TROUBLE, "packages", f"{', '.join(bad)}: remove .venv and call make lab again"
    else: yield NOTE, "packages", f"{', '.join(bad)}: make lab installs them"
    if not bad and not installed("jupyterlab"): yield NOTE, "JupyterLab", "not here: pip install -e .[dev] brings it"


def check_exp():
    spec = importlib.util.find_spec("exp")
    if spec is None: yield (TROUBLE if ready() else NOTE), "exp", "does not import: " + ("pip install -e ." if ready() else "make lab installs it")
    elif Path(spec.origin).resolve().parent != ROOT/"exp":
        yield TROUBLE, "exp", f"comes from {Path(spec.origin).parent}, not from this folder: pip install -e . here, or start Python from its environment"
    else: yield FINE, "exp", "comes from this folder"


def check_threads():
    cores = os.cpu_count() or 1
    said = ", ".join(f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "EXP_THREADS") if name in os.environ)
    yield FINE, "processor", f"{cores} cores" + (f" ({said})" if said else "")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.2*cores:
        yield NOTE, "processor", f"{os.getloadavg()[0]:.0f} programs want those {cores} cores now: lessons take longer, and times are not to be trusted"


def check_settings():
    scale, offline, mirror = (os.environ.get(name) for name in ("EXP_SCALE", "EXP_OFFLINE", "EXP_MIRROR"))
    if scale and scale not in ("tiny", "cpu", "gpu"): yield TROUBLE, "EXP_SCALE", f"is {scale!r}: set it to tiny, cpu or gpu, or unset it"
    elif scale: yield NOTE, "EXP_SCALE", f"is {scale}: lessons do that much work"
    if offline == "1": yield NOTE, "EXP_OFFLINE", "is 1: lessons use the small stand-ins; unset it for the real data"
    if mirror and "://" not in mirror and not (Path(mirror).expanduser()/"SHA256SUMS").exists():
        yield TROUBLE, "EXP_MIRROR", f"{mirror} holds no SHA256SUMS: name a folder or an address that has one"


def places() -> list[Path]:
    "Where unpacked sets are looked for."
    users = (os.environ.get("XDG_CACHE_HOME") or "~/.cache") + "/dl-from-scratch"
    return [(ROOT/Path(place).expanduser()) for place in (os.environ.get("EXP_DATA"), "data/cache", users) if place]


def missing_sets() -> dict[str, float]:
    "Names and MB of the sets that are not here yet."
    import tomllib
    sets = tomllib.loads((ROOT/"data/sets.toml").read_text(encoding="utf-8"))
    return {name: about["size"] for name, about in sets.items() if not any((place/name/".source.json").exists() for place in places())}


def check_data():
    if sys.version_info < (3, 11): return
    import tomllib
    sets = list(tomllib.loads((ROOT/"data/sets.toml").read_text(encoding="utf-8")))
    missing = missing_sets()
    here = [name for name in sets if name not in missing]
    if here: yield FINE, "data", f"here: {', '.join(here)}"
    if missing:
        yield NOTE, "data", (f"not here yet: {', '.join(f'{name} ({size:g} MB)' for name, size in missing.items())}; "
                             "each is fetched when a lesson first asks for it, or from EXP_MIRROR")


def check_disk():
    free = shutil.disk_usage(ROOT).free/1e9
    data = 3*sum(missing_sets().values())/1000 if sys.version_info >= (3, 11) else 1     # archive, files and what is made of them
    need = data + (0 if ready() else 2)
    text = f"{free:.1f} GB free, about {need:.1f} GB wanted for what is still to come"
    yield (FINE, "disk", text) if free > need else (TROUBLE, "disk", f"{text}: make room, or point EXP_DATA to another disk")


# --- how fast ----------------------------------------------------------------------------------------------------------

def speeds(rounds: int = 7) -> dict[str, float]:
    "GFLOP/s of a matrix product and of a convolution with its gradients, on one thread: medians of a few rounds."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    x, w = torch.rand(512, 512), torch.rand(512, 512)
    photos, filters = torch.rand(8, 32, 32, 32), torch.rand(32, 32, 3, 3, requires_grad=True)
    work = {"matrix product": (lambda: x @ w, 2*512**3),
            "convolution": (lambda: torch.nn.functional.conv2d(photos, filters, padding=1).sum().backward(), 2*2*8*32*32*32*32*9)}
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
    found = (json.loads(p.read_text(encoding="utf-8")) for p in (ROOT/"results").glob(f"{LESSON}-speed-*.json"))
    return next((r for r in found if r["what"] == SPEED.format(name)), None)


def check_speed():
    if not importlib.util.find_spec("torch"): return
    found = speeds()
    text = " · ".join(f"{name} {speed:.0f} GFLOP/s" for name, speed in found.items()) + ", on one thread"
    known = {name: recorded(name) for name in found}
    if not all(known.values()):
        yield NOTE, "speed", f"{text}; there is no recorded figure to compare with"
        return
    slower = max(known[name]["mean"]/speed for name, speed in found.items())
    told = "the minutes that lessons say should hold" if .7 < slower < 1.4 else f"expect about {slower:.1f}× the minutes that lessons say"
    yield (FINE if slower < 3 else NOTE), "speed", f"{text}; recorded {' and '.join(format(r['mean'], '.0f') for r in known.values())}: {told}"


def keep_speed():
    "Write the figures of this machine down."
    from exp.testing import record
    runs = [speeds() for _ in range(5)]
    os.environ.update(EXP_RECORD="1")
    for name in runs[0]: print(record(LESSON, SPEED.format(name), [r[name] for r in runs], unit="GFLOP/s", device="cpu"))


CHECKS = [check_python, check_torch, check_packages, check_exp, check_threads, check_settings, check_data, check_disk, check_speed]


def examine(checks=None) -> list[tuple]:
    "What all checks find; one that fails is a trouble itself."
    found = []
    for check in checks or CHECKS:
        try: found += check()
        except Exception as error: found.append((TROUBLE, check.__name__.replace("check_", ""), f"could not be examined ({error!r}): please tell us"))
    return found


def main():
    if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(errors="replace")      # a file on Windows may know no ✓
    if "--record" in sys.argv: return keep_speed()
    found = examine()
    for sign, topic, text in found: print(f"{sign} {topic:12} {text}")
    troubles = sum(sign == TROUBLE for sign, *_ in found)
    print(f"\n{troubles} {'trouble' if troubles == 1 else 'troubles'}: see {TROUBLE} above" if troubles
          else "\nready" if ready() else "\nnothing is in the way: make lab sets everything up")
    sys.exit(bool(troubles))


if __name__ == "__main__": main()
