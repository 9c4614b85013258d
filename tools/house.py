"""What is generated from one place: badges and links in every notebook, the map of lessons, the README's snippet and picture.

usage: python tools/house.py [--check]      (--check: change nothing, list what is stale, exit 1 if anything is)
"""
import base64
import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
PICTURE = NBS/"images"/"readme.png"
LABEL = "# The picture of the README"      # the cell that holds this comment draws it


def settings() -> dict:
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT/"settings.ini", encoding="utf-8")
    return dict(cfg["DEFAULT"])


def lessons() -> list[Path]:
    "The lessons in reading order, which is the order of their names: 00_setup, 00a_datasets, …"
    return sorted(NBS.glob("[0-9]*.ipynb"))


def notebooks() -> list[Path]:
    "Every notebook, by its name below nbs/."
    return sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def read(path: Path) -> dict: return json.loads(path.read_text(encoding="utf-8"))


def source(cell) -> str: return "".join(cell["source"])


def exports(path: Path) -> dict[str, list[str]]:
    """The cells a notebook exports, by module, in order.

    `#| default_exp norm` names the module of every `#| export`; a second lesson of the module has none and says
    `#| export norm`, which any notebook may say. A notebook that exports nothing gives {}."""
    default, out = None, {}
    for cell in read(path)["cells"]:
        if cell["cell_type"] != "code": continue
        text = source(cell)
        named = re.search(r"^#\| *default_exp +(\S+)", text, flags=re.M)
        if named: default = named[1]; out.setdefault(default, [])
        found = re.search(r"^#\| *exporti?\b *(\S*) *$", text, flags=re.M)
        if not found: continue
        module = found[1] or default
        if module is None: raise ValueError(f"{path.name} exports to no module: say #| export NAME, or #| default_exp NAME once")
        out.setdefault(module, []).append(re.sub(r"^#\|.*$", "", text, flags=re.M))
    return out


def default_exp(path: Path) -> str | None:
    "The module a notebook names with `#| default_exp`; None for one that names none."
    found = [m[1] for c in read(path)["cells"] if c["cell_type"] == "code" for m in [re.search(r"^#\| *default_exp +(\S+)", source(c), flags=re.M)] if m]
    return found[0] if found else None


def reading_minutes(path: Path) -> int:
    "About how long a careful reader takes: 150 words or 15 lines of code a minute, to the next five minutes."
    words = sum(len(source(c).split()) for c in read(path)["cells"] if c["cell_type"] == "markdown")
    lines = sum(bool(line.strip()) for c in read(path)["cells"] if c["cell_type"] == "code" for line in source(c).splitlines())
    return max(5, 5*round((words/150 + lines/15)/5))


# --- links -------------------------------------------------------------------------------------------------------------

def nav(name: str, names: list[str]) -> str:
    "Badge, and the way to the previous and next lesson (or back to the lesson, from its exercises)."
    cfg = settings()
    colab = f'https://colab.research.google.com/github/{cfg["user"]}/{cfg["repo"]}/blob/{cfg["branch"]}/nbs/{name}.ipynb'
    parts = [f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})"]
    stem = name.split("/")[-1]
    if "/" in name:
        lesson, kind = stem.rsplit("_", 1)
        other = {"exercises": "solutions", "solutions": "exercises"}[kind]
        parts += [f"[the lesson](../{lesson}.ipynb)", f"[{other}](../{other}/{lesson}_{other}.ipynb)"]
    elif stem in names:
        i = names.index(stem)
        if i > 0: parts.append(f"[← {names[i-1]}]({names[i-1]}.ipynb)")
        parts.append("[contents](index.ipynb)")
        if i + 1 < len(names): parts.append(f"[{names[i+1]} →]({names[i+1]}.ipynb)")
    return " · ".join(parts) + " <!-- nav -->"   # last: a line that starts with a comment is raw HTML


def colab_cell() -> str:
    cfg = settings()
    return ("#| eval: false\n"
            "# On Colab this installs the package the lessons build; anywhere else it does nothing.\n"
            "from importlib.util import find_spec\n"
            f'if find_spec("exp") is None:\n    %pip install -q "{cfg["lib_name"]} @ git+{cfg["git_url"]}"')


def furnish(nb, name: str, names: list[str] | None = None):
    "Fill in the generated parts of one notebook, in place."
    names = names or [p.stem for p in lessons()]
    for cell in nb["cells"]:
        text = source(cell)
        if cell["cell_type"] == "markdown" and "<!-- nav -->" in text:
            new = re.sub(r"^.*<!-- nav -->.*$", lambda m: nav(name, names), text, flags=re.M)
        elif cell["cell_type"] == "markdown" and "<!-- map -->" in text: new = between(text, "map", lesson_map(inside_nbs=True))
        elif text.strip() == "#| colab" or text.startswith("#| eval: false\n# On Colab this installs"): new = colab_cell()
        else: continue
        cell["source"] = new if isinstance(cell["source"], str) else new.splitlines(keepends=True)


# --- the map of lessons --------------------------------------------------------------------------------------------------

def papers(nb) -> str:
    "Authors and years of the paper boxes: '> **Paper.** X. Glorot & Y. Bengio (2010), …'."
    found = [m for c in nb["cells"] if c["cell_type"] == "markdown"
             for m in re.findall(r"^> \*\*Paper\.\*\* (.+?) \(([12]\d{3}[^)]*)\)", source(c), flags=re.M)]
    # 'X. Glorot & Y. Bengio' -> 'Glorot & Bengio'; three authors and more -> 'He et al.'
    def short(authors):
        names = [re.sub(r"^(?:[A-Z]\S*\.[ -]?)+", "", a.strip()) for a in re.split(r",|&| and ", authors) if a.strip()]
        return names[0] if len(names) == 1 else " & ".join(names) if len(names) == 2 and "et al" not in authors else f"{names[0].replace(' et al.', '')} et al."
    return ", ".join(dict.fromkeys(f"{short(a)} {y}" for a, y in found))


def records(stem: str, gpu: bool) -> list[dict]:
    "A lesson's records from one kind of machine, headline first, then the best; exercises last."
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT/"results").glob(f"{stem}-*.json"))]
    return sorted((r for r in found if (r["scale"] == "gpu") == gpu), key=lambda r: (not r.get("headline"), r["what"].startswith("exercise"), -r["mean"]))


def result(stem: str, gpu: bool) -> str:
    "The first record of a lesson in words; a lesson that was measured on a CPU only says so."
    from exp.testing import result_text
    found = records(stem, gpu)
    if not found: return "not yet measured" if gpu and records(stem, False) else ""
    data = found[0].get("data", {}).get("name")
    return f"{found[0]['what']}: {result_text(found[0])}" + (f" ({data})" if data else "")


def lesson_map(inside_nbs: bool = False) -> str:
    "Lesson → module → what it builds → papers → time → results, a Markdown table made from the notebooks and results/."
    rows = ["| lesson | module | builds | papers | to read | to run | result on a CPU | result on a GPU |", "|---|---|---|---|---|---|---|---|"]
    for path in lessons():
        nb = read(path)
        title = source(nb["cells"][0])
        name = re.search(r"^# (.+)$", title, flags=re.M).group(1)
        modules = ", ".join(f"`exp.{m}`" for m in exports(path)) or "–"
        builds = re.search(r"\*\*You will build\*\* (.+?) · ", title).group(1)
        time = re.search(r"\*\*Time\*\* (.+)$", title, flags=re.M).group(1).replace(" on a laptop CPU", "").split(",")[0]
        time = re.sub(r" min$", " minutes", re.sub(r" s$", " seconds", time)).replace("1 minutes", "1 minute")
        link = path.name if inside_nbs else f"nbs/{path.name}"
        cells = [f"[{name}]({link})", modules, builds, papers(nb), f"{reading_minutes(path)} minutes", time, result(path.stem, False), result(path.stem, True)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def between(text: str, mark: str, new: str) -> str:
    "Replace what stands between <!-- mark --> and <!-- /mark -->."
    return re.sub(rf"<!-- {mark} -->.*?<!-- /{mark} -->", lambda m: f"<!-- {mark} -->\n\n{new}\n\n<!-- /{mark} -->", text, flags=re.S)


# --- the README --------------------------------------------------------------------------------------------------------

def snippet(text: str) -> str:
    "The README's Python example."
    return re.search(r"<!-- snippet -->\s*```python\n(.*?)```", text, flags=re.S)[1]


def run_snippet(code: str) -> str:
    "What the example prints, run offline on the stand-ins, as a reader without the network would see it."
    env = dict(os.environ, EXP_OFFLINE="1", EXP_SCALE="tiny", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT, check=True)
    return done.stdout


def same_but_for_rounding(a: str, b: str, rel: float = .05) -> bool:
    "Equal texts, where numbers may differ by a twentieth: processors sum in different orders."
    number = r"\d+\.\d+"
    pairs = zip(re.findall(number, a), re.findall(number, b))
    return re.sub(number, "#", a) == re.sub(number, "#", b) and all(
        abs(float(x) - float(y)) <= rel*max(abs(float(x)), abs(float(y))) for x, y in pairs)


def picture() -> bytes | None:
    "The figure of the cell that carries LABEL."
    for path in lessons():
        for cell in read(path)["cells"]:
            if cell["cell_type"] == "code" and LABEL in source(cell):
                found = [o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {})]
                return base64.b64decode("".join(found[0])) if found else None


def readme(text: str) -> str:
    "The README with map and printed output brought up to date."
    text = between(text, "map", lesson_map())
    printed = re.search(r"<!-- output -->\s*```text\n(.*?)```", text, flags=re.S)
    now = run_snippet(snippet(text))
    if printed and same_but_for_rounding(printed[1], now): return text
    return between(text, "output", f"```text\n{now}```")


# --- all together --------------------------------------------------------------------------------------------------------

def generated() -> dict[Path, bytes]:
    "Every file that is made here, wholly or in part, as it should be."
    names = [p.stem for p in lessons()]
    files = {}
    for path in notebooks():
        nb = read(path)
        before = json.dumps(nb)
        furnish(nb, path.relative_to(NBS).with_suffix("").as_posix(), names)
        if json.dumps(nb) != before: files[path] = (json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()
    files[ROOT/"README.md"] = readme((ROOT/"README.md").read_text(encoding="utf-8")).encode()
    png = picture()
    if png: files[PICTURE] = png
    return files


def main():
    stale = [(p, new) for p, new in generated().items() if not p.exists() or p.read_bytes() != new]
    for path, new in stale:
        print(f"{'stale' if '--check' in sys.argv else 'wrote'}: {path.relative_to(ROOT)}")
        if "--check" not in sys.argv: path.write_bytes(new)
    if stale and "--check" in sys.argv: sys.exit("run `make export` and commit what it changes")


if __name__ == "__main__": main()
