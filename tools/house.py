"""What is generated from one place: badges and links in every notebook, the map of lessons and the roads through them, what may
be skipped, the milestones, the board of results, the README's snippet and picture.

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
BOARD = ROOT/"results"/"README.md"
LABEL = "# The picture of the README"      # the cell that holds this comment draws it

# Roads through the lessons, by number. A lesson of LATER that is not there yet is left out, and steps in when it arrives.
LATER = {"12d", "13", "13a", "14"}
ROADS = {
    "Images": ("networks that see, from one multiplication to a photo of yours",
               "00 00a 00b 01 02 02a 03 04 04a 05 05a 05c 05d 05e 06 08 08a 09 09b 10 12 12a 12b 14"),
    "Text": ("networks that read: words, language models, a classifier",
             "00 00a 01 02 02a 03 04 04a 05 05a 05b 05c 08 09 12c 12d 13"),
    "Engineer": ("you know the mathematics and want `exp`, or a training library of your own",
                 "00 00c 04 04a 05 05a 05b 05c 05e 08 08a 09 09a 11 13a 14"),
    "One weekend": ("the idea of each layer, once, and photos of yours at the end",
                    "00 01 02 02a 04 05 05c 05d 06 12a"),
}

# What a reader in a hurry may leave out, by lesson: a line of its title cell. *Names* are sections of that lesson.
SKIP = {
    "00": "Read *Tensors in five minutes*, *How a lesson works* and *The glossary of short names*; the rest is there to be looked up.",
    "00a": "Read *The idea, in ten lines* and *`fetch`*. How to distrust an archive can wait.",
    "00b": "Read *The idea, in fifteen lines*, and come back when you draw.",
    "00c": "Read *In twelve lines* and *The judge: `test_like`*; come back when a lesson races, searches or records.",
    "01": "Skip *Where the time goes* and *Rounding*: no later lesson builds on them.",
    "02": "Only run *It must survive large scores* (lesson 04 has it again), and skip *A checker for every layer to come*.",
    "02a": "Skip *When data changes behind the tape's back*, *What the tape keeps* and *What the tape costs*.",
    "03": "Skip *Why √5?*, and of *What tanh does to it* all but the cell of `gaussian_mean`.",
    "03a": "Skip all of it: later lessons do without.",
    "04": "Skip *Stable is not yet accurate*, *An ablation ladder* and *Learning by heart*.",
    "04a": "Skip *Other hands: threads* and *Other hands: processes* as long as your data fit into memory.",
    "05": "Skip *Several processes* and, until lesson 12a, *Optimizers, groups and base rates* and *Two rates in one network*.",
    "05a": "Skip *A log that is whole at any moment* and *Looking more often than once an epoch*.",
    "05b": "Read *Is it enough to save the weights?* and *Save, load, resume*.",
    "05c": "Skip *Round and round* and *Struck down, and back again*.",
    "05d": "Skip *How far can one number see?* and what it says about looking.",
    "05e": "Read *A hook in five lines* and *The life of a network, in pictures*.",
    "06": "Skip *A variance that survives a mean of 1000* and *Why? An honest account*.",
    "06a": "Skip all of it unless your batches are small or your data are texts.",
    "07": "Skip all of it: later lessons do without.",
    "08": "Skip *The same four questions: texts*, *… and a table* and *When something is wrong*.",
    "08a": "Run, but do not read, *A shorter road for plain JPEGs* and *Decode once*: they change the time, not the photos.",
    "09": "Skip *Layers that do not trust their gradient*, *Two landscapes* and *What decay does under a norm*. Run their cells all the same: `lars`, `lamb` and the photos of the race come from there.",
    "09a": "Read *Passes through memory*; the rest changes no rule and no number.",
    "09b": "Skip *What if a photo shrinks?*, *From another side* and *What lies on a photo moves with it*.",
    "10": "Skip *CutMix: a box instead of a ghost* and *Beside other libraries*.",
    "11": "Read *Why not simply half of everything?* and *One callback*.",
    "12": "Read it without running it, and skip *Cheap blocks for many channels* and *Channels last*.",
    "12a": "Skip *Features once, not in every epoch* and *A body that has seen a thousand classes*.",
    "12b": "Skip *What does an answer rest on?* and *Photos from elsewhere*.",
    "12c": "Skip *How fast?* and, unless a language model is your aim, *One long text*.",
    "12d": "Skip *Counting well*, *Five dropouts* but for its table, and *What does it keep in mind?*.",
    "13": "Skip *Which part is missed?*, *If test texts are read* and *Which words did it?*.",
    "13a": "Skip *A team that ends together* but for its last cells, and *What BatchNorm changes*.",
    "14": "Of *Tricks that are still missing* read *Filters that need not be learnt* only.",
}


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


def number(path: Path) -> str:
    "'04a' of 04a_loaders.ipynb."
    return path.stem.split("_")[0]


def title_cell(path: Path) -> str: return source(read(path)["cells"][0])


def title(path: Path) -> str: return re.search(r"^# (.+)$", title_cell(path), flags=re.M)[1]


def run_time(path: Path) -> tuple[int, str]:
    "How long a lesson runs on a laptop's CPU, as its title cell says: (2, 'minutes')."
    size, unit = re.search(r"\*\*Time\*\* (\d+) (s|min)", title_cell(path)).groups()
    return int(size), {"s": "second", "min": "minute"}[unit] + "s"*(size != "1")


def run_minutes(path: Path) -> float:
    size, unit = run_time(path)
    return size/60 if unit.startswith("second") else size


def needs(path: Path) -> set[str]:
    "The numbers of the lessons that a title cell names after 'You need'."
    named = re.search(r"\*\*You need\*\* (.+?) · \*\*Time", title_cell(path))[1]
    return set(re.findall(r"\]\((\d+[a-z]?)_\w+\.ipynb\)", named))


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


def with_skip(text: str, number: str) -> str:
    "A title cell with the line for readers in a hurry at its end, if SKIP has one for this lesson."
    text = re.sub(r"\n+\*\*In a hurry\?\*\*.*<!-- skip -->", "", text)
    return text.rstrip() + f"\n\n**In a hurry?** {SKIP[number]} <!-- skip -->" if number in SKIP else text


def furnish(nb, name: str, names: list[str] | None = None):
    "Fill in the generated parts of one notebook, in place."
    names = names or [p.stem for p in lessons()]
    for cell in nb["cells"]:
        text = source(cell)
        if cell["cell_type"] == "markdown" and "<!-- nav -->" in text:
            new = re.sub(r"^.*<!-- nav -->.*$", lambda m: nav(name, names), text, flags=re.M)
            if name in names: new = with_skip(new, name.split("_")[0])
        elif cell["cell_type"] == "markdown" and any(f"<!-- {mark} -->" in text for mark in TABLES): new = filled(text, inside_nbs=True)
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
    "A lesson's records from one kind of machine, headline first, then the best; exercises, milestones and speeds last."
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT/"results").glob(f"{stem}-*.json"))]
    return sorted((r for r in found if (r["scale"] == "gpu") == gpu), key=lambda r: (not r.get("headline"), r["what"].startswith(("exercise", "milestone", "speed")), -r["mean"]))


def result(stem: str, gpu: bool) -> str:
    "The first record of a lesson in words; a lesson that was measured on a CPU only says so."
    from exp.testing import result_text
    found = records(stem, gpu)
    if not found: return "not yet measured" if gpu and records(stem, False) else ""
    data = found[0].get("data", {}).get("name")
    return f"{found[0]['what']}: {result_text(found[0])}" + (f" ({data})" if data else "")


def lesson_map(inside_nbs: bool = False) -> str:
    "Lesson → module → what it builds → papers → time → results, a Markdown table made from the notebooks and results/."
    rows = []
    for path in lessons():
        modules = ", ".join(f"`exp.{m}`" for m in exports(path)) or "–"
        builds = re.search(r"\*\*You will build\*\* (.+?) · ", title_cell(path))[1]
        time = "{} {}".format(*run_time(path))
        link = path.name if inside_nbs else f"nbs/{path.name}"
        rows.append([f"[{title(path)}]({link})", modules, builds, papers(read(path)), f"{reading_minutes(path)} minutes", time,
                     result(path.stem, False), result(path.stem, True)])
    head = ["lesson", "module", "builds", "papers", "to read", "to run", "result on a CPU", "result on a GPU"]
    if any(row[-1] not in ("", "not yet measured") for row in rows): return grid(head, rows)
    return grid([*head[:-2], "result on a CPU (on a GPU: not yet measured)"], [row[:-1] for row in rows])


def grid(head: list[str], rows: list[list[str]]) -> str:
    "A Markdown table."
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, *rows]).replace("\n", f"\n|{'---|'*len(head)}\n", 1)


# --- roads -----------------------------------------------------------------------------------------------------------------

def hours(minutes: float) -> str:
    "As '25 minutes' or '9 h 45 min', to the next five minutes."
    whole = max(5, 5*round(minutes/5))
    return f"{whole} minutes" if whole < 60 else f"{whole//60} h {whole % 60:02} min"


def on_road(numbers: str) -> list[Path]:
    "The lessons of a road that are there."
    return [path for path in lessons() if number(path) in numbers.split()]


def on_trust(stops: list[Path]) -> list[str]:
    "What the lessons of a road need and the road leaves out."
    return sorted(set().union(*map(needs, stops)) - set(map(number, stops)))


def roads(inside_nbs: bool = False) -> str:
    "Road → for whom → its lessons → minutes → what it takes on trust: sums of the lessons' own numbers."
    folder, rows = "" if inside_nbs else "nbs/", []
    for name, (why, numbers) in ROADS.items():
        stops = on_road(numbers)
        links = " → ".join(f"[{number(p)}]({folder}{p.name})" for p in stops)
        rows.append([f"**{name}**", why, links, hours(sum(map(reading_minutes, stops))), hours(sum(map(run_minutes, stops))),
                     ", ".join(on_trust(stops)) or "nothing"])
    return grid(["road", "for", "lessons", "to read", "to run on a CPU", "on trust"], rows)


def milestones(inside_nbs: bool = False) -> str:
    "Year → step → what was reported then → what our run gave → how to run it: from tools/milestones.py and results/."
    from milestones import MILESTONES, is_there, results
    rows = [[m.year, m.step, m.then, results(m) or ("not yet measured" if is_there(m) else "–"),
             f"`make milestone Y={key}`" if is_there(m) else f"comes with lesson {m.lesson.split('_')[0]}"]
            for key, m in MILESTONES.items()]
    return grid(["year", "step", "reported then", "ours", "run it"], rows)


# --- the board ---------------------------------------------------------------------------------------------------------------

def board_row(path: Path, record: dict) -> list[str]:
    "Lesson, what, number, data, machine, commit of one record."
    from exp.testing import result_text
    commit = (record["commit"] or "unknown")[:7] + (" and changes" if record["dirty"] else "")
    data = " ".join(filter(None, [record["data"]["name"], f"({record['data']['source']})" if record["data"]["source"] else ""]))
    return [f"[{number(path)}](../nbs/{path.name})", record["what"].replace("|", "\\|"), result_text(record), str(len(record["values"])), data or "–",
            record["device"], commit]


def board(best: bool) -> str:
    "The headline of each lesson and kind of machine, or every record."
    rows = []
    for path in lessons():
        for found in (records(path.stem, gpu) for gpu in (False, True)):
            rows += [board_row(path, r) for r in (found[:1] if best else found)]
    return grid(["lesson", "what", "result", "runs", "data", "machine", "commit"], rows)


TABLES = {"map": lesson_map, "roads": roads, "milestones": milestones,
          "board": lambda inside_nbs: board(True), "records": lambda inside_nbs: board(False)}


def filled(text: str, inside_nbs: bool = False) -> str:
    "A text with every generated table in it brought up to date."
    for mark, make in TABLES.items():
        if f"<!-- {mark} -->" in text: text = between(text, mark, make(inside_nbs))
    return text


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
    "The README with its tables and printed output brought up to date."
    text = filled(text)
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
    files[BOARD] = filled(BOARD.read_text(encoding="utf-8")).encode()
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
