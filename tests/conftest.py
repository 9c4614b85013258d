"The whole suite runs offline, on small data, one thread a worker (or EXP_THREADS): the same here as under `make test`."
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = str(ROOT/"tests"/"offline")
THREADS = int(os.environ.get("EXP_THREADS") or 1)
os.environ.update(EXP_OFFLINE="1", EXP_SCALE="tiny", OMP_NUM_THREADS=str(THREADS), OMP_WAIT_POLICY="PASSIVE", MPLBACKEND="agg")
for name in ("EXP_DATA", "EXP_MIRROR", "EXP_RECORD"): os.environ.pop(name, None)
if OFFLINE not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [OFFLINE, os.environ.get("PYTHONPATH")]))
    exec(compile((ROOT/"tests/offline/sitecustomize.py").read_text(), "sitecustomize.py", "exec"), {"__name__": "offline"})
sys.path[:0] = [str(ROOT/"tools"), str(ROOT/"tests")]

import torch
from hypothesis import settings

torch.set_num_threads(THREADS)
signal.signal(signal.SIGINT, signal.default_int_handler)     # Ctrl-C counts, even where a shell in the background ignores it
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("suite")


def data(n=40, seed=0):
    "n points of six features, and on which side of zero the first one lies."
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()
