"""Make the embedded stand-ins of this folder again, from packages that anyone can install.

    pip install numpy pillow zopfli rdata scikit-image scikit-learn scipy==1.10.1
    apt-get download dataset-fashion-mnist r-cran-janeaustenr      # then: dpkg-deb -x FILE.deb FOLDER

    python data/make_standins.py OUT --fashion  …/share/datasets/fashion-mnist    (the four IDX files)
                                     --skimage  …/site-packages/skimage/data      (astronaut.png, …)
                                     --sklearn  …/site-packages/sklearn/datasets/images
                                     --scipy    …/site-packages/scipy/misc        (face.dat, up to SciPy 1.11)
                                     --austen   …/site-library/janeaustenr/data   (Rdata.rdb, Rdata.rdx)
                                     --cards    …/playing-cards                   (as `fetch` returns it)

Each option makes its own stand-in and may be left out (the photographs want all three of theirs; cats-raccoons is made of
the photographs in OUT, with --cards or with them). The same sources give the
same bytes; the JPEGs also depend on the version of Pillow (13.0 made these). Nothing here is needed to use the stand-ins.
"""
import argparse
import bz2
import gzip
import json
import random
import re
import shutil
import struct
import warnings
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN, VAL = 40, 12      # photographs per class


def note(folder: Path, text: str):
    "What `source_of` reads."
    (folder/".source.json").write_text(json.dumps({"source": "stand-in", "what": text}, indent=1) + "\n", encoding="utf-8")


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# ---- clothes: the first 1,000 (200) pictures of each class, in the order of the original ----

def idx(path: Path) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes())
    shape = struct.unpack(f">{raw[3]}I", raw[4:4 + 4*raw[3]])
    return np.frombuffer(raw, np.uint8, offset=4 + 4*raw[3]).reshape(shape)


def write_idx(path: Path, a: np.ndarray):
    import zopfli.gzip
    header = bytes([0, 0, 8, a.ndim]) + struct.pack(f">{a.ndim}I", *a.shape)
    path.write_bytes(zopfli.gzip.compress(header + a.tobytes(), numiterations=15))   # writes no time stamp


def make_fashion(out: Path, source: Path):
    fresh(out)
    for part, n in (("train", 1000), ("t10k", 200)):
        x, y = idx(source/f"{part}-images-idx3-ubyte.gz"), idx(source/f"{part}-labels-idx1-ubyte.gz")
        keep = np.sort(np.concatenate([np.flatnonzero(y == c)[:n] for c in range(10)]))
        write_idx(out/f"{part}-images-idx3-ubyte.gz", x[keep])
        write_idx(out/f"{part}-labels-idx1-ubyte.gz", y[keep])
    note(out, "10,000 + 2,000 pictures of Fashion-MNIST, 1,000 + 200 of each class")


# ---- photographs: (file, region for train, region for val, smallest and largest side of a crop) ----
# Regions are (left, top, right, bottom) as fractions of the picture; train and val never overlap.

PHOTOS = {
    "astronaut":  ("astronaut.png", (.02, .15, .90, .66), (.02, .66, .96, 1.), .28, .40),
    "brick":      ("brick.png", (0., 0., .62, 1.), (.62, 0., 1., 1.), .30, .38),
    "cat":        ("chelsea.png", (0., 0., .60, 1.), (.60, 0., 1., 1.), .42, .60),
    "coffee":     ("coffee.png", (.10, 0., .60, 1.), (.60, 0., .98, 1.), .40, .57),
    "flower":     ("flower.jpg", (.15, .10, .52, 1.), (.52, .10, .88, 1.), .36, .54),
    "galaxies":   ("hubble_deep_field.jpg", (0., 0., .62, 1.), (.62, 0., 1., 1.), .22, .42),
    "launch_pad": ("rocket.jpg", (.25, .10, .60, 1.), (.60, .10, 1., 1.), .36, .52),
    "raccoon":    ("face.dat", (.05, 0., .60, .85), (.60, 0., 1., .85), .32, .52),
    "retina":     ("retina.jpg", (.08, .08, .58, .92), (.58, .08, .94, .92), .22, .36),
    "temple":     ("china.jpg", (.04, .02, .50, .58), (.04, .58, .50, .98), .34, .46),
}


def photograph(name: str, folders: list[Path]) -> Image.Image:
    path = next(f/name for f in folders if (f/name).exists())
    if path.suffix != ".dat": return Image.open(path).convert("RGB")
    return Image.fromarray(np.frombuffer(bz2.decompress(path.read_bytes()), np.uint8).reshape(768, 1024, 3))


def crop(im: Image.Image, region, smallest: float, largest: float, rng: random.Random) -> Image.Image:
    "A random square of the region, as a picture of 160×160; sides are fractions of the picture's shorter side."
    l, t, r, b = (round(f*s) for f, s in zip(region, im.size*2))
    side = min(round(rng.uniform(smallest, largest)*min(im.size)), r - l, b - t)
    x, y = rng.randint(l, r - side), rng.randint(t, b - side)
    return im.resize((160, 160), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))


def make_photos(out: Path, folders: list[Path]):
    fresh(out)
    for label, (name, train, val, smallest, largest) in PHOTOS.items():
        im, rng = photograph(name, folders), random.Random(label)
        for part, region, n in (("train", train, TRAIN), ("val", val, VAL)):
            (out/part/label).mkdir(parents=True)
            for i in range(n):
                small = crop(im, region, smallest, largest, rng)
                if (label in ("brick", "cat") and i % 13 == 5): small = small.convert("L")   # real sets hold a few grey ones
                small.save(out/part/label/f"{label}_{i:02}.jpg", quality=72, optimize=True, progressive=False)
    note(out, f"{TRAIN} + {VAL} crops of one free photograph in each of ten classes")


def make_cats_raccoons(out: Path, photos: Path):
    "Like horse2zebra: two kinds in folders A and B, which are no pairs."
    fresh(out)
    for letter, label in (("A", "cat"), ("B", "raccoon")):
        for part, source, n in (("train", "train", 8), ("test", "val", 4)):
            (out/f"{part}{letter}").mkdir()
            for path in spread(sorted((photos/source/label).glob("*.jpg")), n):
                small = Image.open(path).convert("RGB").resize((96, 96), Image.Resampling.LANCZOS)
                small.save(out/f"{part}{letter}"/path.name, quality=72, optimize=True)
    note(out, "8 + 4 crops of one free photograph of a cat, and as many of a raccoon")


# ---- playing cards ----

def small_card_photo(xml: Path, out: Path, side: int = 160):
    "A photograph with its boxes, its long side `side` pixels."
    root = ET.parse(xml).getroot()
    photo = next(p for p in (xml.with_suffix(".JPG"), xml.with_suffix(".jpg")) if p.exists())
    im = Image.open(photo).convert("RGB")
    scale, file = side/max(im.size), out/f"{xml.stem}.jpg"
    size = [round(s*scale) for s in im.size]
    im.resize(size, Image.Resampling.LANCZOS).save(file, quality=72, optimize=True)
    new = ET.Element("annotation")
    ET.SubElement(new, "filename").text = file.name
    sizes = ET.SubElement(new, "size")
    for tag, pixels in zip(("width", "height"), size): ET.SubElement(sizes, tag).text = str(pixels)
    for found in root.findall("object"):
        one = ET.SubElement(new, "object")
        ET.SubElement(one, "name").text = found.findtext("name")
        box = ET.SubElement(one, "bndbox")
        for tag in ("xmin", "ymin", "xmax", "ymax"):
            most = size["y" in tag] if "max" in tag else size["y" in tag] - 1
            ET.SubElement(box, tag).text = str(min(round(int(found.findtext(f"bndbox/{tag}"))*scale), most))
    ET.indent(new)
    (out/f"{xml.stem}.xml").write_text(ET.tostring(new, encoding="unicode") + "\n", encoding="utf-8", newline="\n")


def make_cards(out: Path, source: Path):
    fresh(out)
    for part, n in (("train", 36), ("test", 12)):
        (out/part).mkdir()
        for xml in spread(sorted((source/part).glob("*.xml")), n): small_card_photo(xml, out/part)
    shutil.copy(source/"LICENSE", out/"LICENSE")
    note(out, "36 + 12 photographs of playing cards with boxes, long side 160")


# ---- novels ----

def read_austen(folder: Path) -> dict[str, list[str]]:
    "R keeps a lazily loaded data set as an index (.rdx) into compressed blobs (.rdb); each novel is a vector of lines."
    import rdata
    def decode(raw): return rdata.conversion.convert(rdata.parser.parse_data(raw))
    warnings.filterwarnings("ignore", module="rdata")
    index = decode(gzip.decompress((folder/"Rdata.rdx").read_bytes()))["variables"]
    blob = (folder/"Rdata.rdb").read_bytes()
    return {str(k): [str(line) for line in decode(zlib.decompress(blob[o + 4:o + n]))] for k, (o, n) in index.items()}


def chapters(lines: list[str]) -> list[list[str]]:
    "Paragraphs by chapter, without the title page; soft line breaks are joined."
    parts = re.split(r"(?m)^ *(?:VOLUME [IVX]+|CHAPTER [IVXL\d]+|Chapter [IVXL\d]+)\.?\s*$", "\n".join(lines))
    found = [[re.sub(r"\s+", " ", p).strip().replace("_", "") for p in re.split(r"\n\s*\n", part)] for part in parts[1:]]
    return [[p for p in c if p and not re.fullmatch(r"(THE END|Finis|FINIS)\.?", p)] for c in found if sum(map(len, c)) > 2000]


def passages(chapter: list[str], least: int = 200, most: int = 400) -> list[str]:
    "Runs of whole paragraphs with `least` to `most` words; a long paragraph is cut at a sentence."
    pieces = [s for p in chapter for s in (re.split(r"(?<=[.!?]) (?=[A-Z])", p) if len(p.split()) > 150 else [p])]
    found, run = [], []
    for piece in pieces:
        run.append(piece)
        words = sum(len(r.split()) for r in run)
        if words >= least:
            if words <= most: found.append(" ".join(run))
            run = []
    return found


def spread(items: list, n: int) -> list:
    "n of the items, evenly spaced."
    return [items[i*len(items)//n] for i in range(n)]


def write_passages(folder: Path, texts: list[str]):
    folder.mkdir(parents=True)
    for i, text in enumerate(texts): (folder/f"{i}.txt").write_text(text + "\n", encoding="utf-8")


def make_novels(out: Path, books: dict[str, list[str]]):
    "Like IMDB: train/<class>, test/<class>, train/unsup; test passages come from other chapters than train."
    fresh(out)
    for label, book in (("emma", "emma"), ("mansfield_park", "mansfieldpark")):
        held_out = chapters(books[book])
        test = [c for i, c in enumerate(held_out) if i % 4 == 3]
        train = [c for i, c in enumerate(held_out) if i % 4 != 3]
        write_passages(out/"train"/label, spread([p for c in train for p in passages(c)], 150))
        write_passages(out/"test"/label, spread([p for c in test for p in passages(c)], 60))
    unlabelled = [p for book in ("northangerabbey", "persuasion") for c in chapters(books[book]) for p in passages(c)]
    write_passages(out/"train"/"unsup", spread(unlabelled, 100))
    note(out, "passages of Jane Austen's novels, two novels as two classes and two more without labels")


def tokens(text: str) -> str:
    "WikiText's look: words and marks apart, @-@ inside words and @,@ inside numbers."
    text = text.replace("--", " — ")
    text = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", text)
    text = re.sub(r"(?<=\d)([,.])(?=\d)", r" @\1@ ", text)
    text = re.sub(r"([\"“”().,;:!?\[\]—])", r" \1 ", text)
    text = re.sub(r"(\w)('s|'ll|'d|'m|'re|'ve)\b", r"\1 \2", text)
    return " ".join(text.split())


def make_tokens(out: Path, books: dict[str, list[str]]):
    "Like WikiText-2: ' = Title = ' lines, one paragraph a line, words met fewer than three times become <unk>."
    fresh(out)
    parts = {"train": [], "valid": [], "test": []}
    for title, book in (("Pride and Prejudice", "prideprejudice"), ("Sense and Sensibility", "sensesensibility")):
        for i, c in enumerate(chapters(books[book])[:40]):
            part = {7: "valid", 8: "test"}.get(i % 10, "train")
            parts[part] += [f"= {title} : Chapter {i + 1} =", *map(tokens, c)]
    counts = {}
    for line in parts["train"]:
        for w in line.split(): counts[w] = counts.get(w, 0) + 1
    for part, lines in parts.items():
        body = [" ".join(w if counts.get(w, 0) >= 3 or line.startswith("= ") else "<unk>" for w in line.split()) for line in lines]
        text = "".join(f" \n {line} \n \n" if line.startswith("= ") else f" {line} \n" for line in body)
        (out/f"{part}.txt").write_text(text, encoding="utf-8", newline="\n")
    note(out, "chapters of two novels by Jane Austen, tokenised like WikiText")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="where the folders fashion, photos, cats-raccoons, cards, novels and novel-tokens are made")
    for name in ("fashion", "skimage", "sklearn", "scipy", "austen", "cards"): p.add_argument(f"--{name}", type=Path)
    a = p.parse_args()
    if a.fashion: make_fashion(a.out/"fashion", a.fashion)
    if a.skimage and a.sklearn and a.scipy: make_photos(a.out/"photos", [a.skimage, a.sklearn, a.scipy])
    if a.cards: make_cards(a.out/"cards", a.cards)
    if (a.out/"photos").exists(): make_cats_raccoons(a.out/"cats-raccoons", a.out/"photos")
    if a.austen:
        books = read_austen(a.austen)
        make_novels(a.out/"novels", books)
        make_tokens(a.out/"novel-tokens", books)


if __name__ == "__main__": main()
