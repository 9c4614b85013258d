"Pictures, folders of them, and chance, for the tests of data and photos."
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

LINUX = sys.platform == "linux"
linux = pytest.mark.skipif(not LINUX, reason="forks, links, limits and /proc")


def picture(w=20, h=12, seed=0) -> Image.Image:
    "Smooth colours, so that JPEG keeps them nearly."
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((w, h), Image.BICUBIC)


def picture_set(root: Path, end: str) -> Path:
    "train/{cat,dog} and val/{cat,dog}, six and three photos each."
    for part, count in (("train", 6), ("val", 3)):
        for kind in ("cat", "dog"):
            (root/part/kind).mkdir(parents=True)
            for n in range(count): picture(24 + n, 20, n + 10*count).save(root/part/kind/f"{kind}_{n}{end}")
    return root


def gen(seed=0): return torch.Generator().manual_seed(seed)
