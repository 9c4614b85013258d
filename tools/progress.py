"""How far am I? Which lessons ran, and which exercises of my/ pass: their checkers are asked anew.

usage: python tools/progress.py [05] [--limit SECONDS]   (make progress, make progress L=05)

A lesson ran if a copy of it in my/, or what make lesson left in _out/, shows every cell executed
without an error. The exercises of each copy are run in a kernel of their own; a cell that outlasts
the limit or ends Python is left out, and the others count.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from run_lesson import MINE, NBS, ROOT, number

LIMIT = 60      # seconds for one cell of a reader's


def copies(folder: Path, stem: str) -> list[Path]:
    "A notebook and its further copies: 05_callbacks.ipynb, 05_callbacks_2.ipynb, …"
    found = sorted(folder.glob(f"{stem}*.ipynb"))
    return [p for p in found if re.fullmatch(rf"{re.escape(stem)}(_\d+)?", p.stem)]


def code_cells(path: Path) -> list[dict]:
    "The cells of code of a notebook, each source in one piece."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"])} for c in cells if c["cell_type"] == "code"]


# --- lessons --------------------------------------------------------------------------------------

def executed(path: Path) -> tuple[int, int, bool]:
    "Cells that were executed, cells that can be, and whether an error stands in one."
    code = [c for c in code_cells(path)
            if c["source"].strip() and not c["source"].startswith("#| eval: false")]
    failed = any(o["output_type"] == "error" for c in code for o in c["outputs"])
    return sum(bool(c["execution_count"]) for c in code), len(code), failed


def ran(stem: str, folders: list[Path]) -> str:
    "In words, for the copy that came furthest."
    found = [executed(p) for folder in folders for p in copies(folder, stem)]
    found = [(done, of, failed) for done, of, failed in found if done]
    if not found: return "–"
    done, of, failed = max(found, key=lambda f: (f[0] == f[1] and not f[2], f[0]))
    if failed: return f"an error, {done} of {of} cells"
    return "every cell" if done == of else f"{done} of {of} cells"


# --- exercises ------------------------------------------------------------------------------------

def names(source: str) -> list[str]:
    "The exercises whose checkers a cell calls: ['sigmoid'] for check_sigmoid(Sigmoid)."
    return re.findall(r"^check_(\w+)\(", source, flags=re.M)


def run_all(path: Path, limit: float) -> list[tuple[str, list]]:
    "(source, outputs) of every code cell; what stops the kernel is left out, and all begins again."
    nb = nbformat.read(path, as_version=4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    sources, started = [cell.source for cell in code], []
    while True:
        client = NotebookClient(
            nb, timeout=limit, allow_errors=True, kernel_name="python3",
            shutdown_kernel="immediate", extra_arguments=["--log-level=CRITICAL"],
            resources={"metadata": {"path": str(path.parent)}},
            on_cell_start=lambda cell, cell_index: started.append(cell))
        try:
            client.execute()
            return [(source, cell.outputs) for source, cell in zip(sources, code)]
        except CellTimeoutError: why = f"TimeoutError('no answer after {limit:g} seconds')"
        except DeadKernelError: why = "SystemError('this ends Python, or needs too much memory')"
        started[-1].source = f"raise {why}"


def verdict(name: str, source: str, outputs: list) -> tuple[str, str]:
    "✓, ○ or ✗ for one exercise in one cell, and what the checker says of it."
    text = "".join(o.get("text", "") for o in outputs if o["output_type"] == "stream")
    said = re.search(rf"^([✓○]) {name}\b(.*)$", text, flags=re.M)
    if said: return said[1], said[2].strip(" :")
    error = next((o for o in outputs if o["output_type"] == "error"), None)
    if error is None: return "○", "its checker said nothing"
    advice = error["ename"] == "AssertionError"
    return "✗", error["evalue"] if advice else f"{error['ename']}: {error['evalue']}"


def exercises(path: Path, limit: float = LIMIT) -> dict[str, tuple[str, str]]:
    "Name -> (sign, word) for one copy; what is checked several times must pass each time."
    found, worse = {}, "✗○✓".index
    for source, outputs in run_all(path, limit):
        for name in names(source):
            new = verdict(name, source, outputs)
            if name not in found or worse(new[0]) < worse(found[name][0]): found[name] = new
    return found


# --- all together ---------------------------------------------------------------------------------

def asked_for(stem: str) -> set[str]:
    "All exercises of a lesson, from our own notebook."
    path = NBS/"exercises"/f"{stem}_exercises.ipynb"
    if not path.exists(): return set()
    return {name for c in code_cells(path) for name in names(c["source"])}


def report(stem: str, limit: float, folders: list[Path]) -> tuple[bool, set[str]]:
    "Print a lesson's lines, unless it is untouched; whether it ran, and the exercises that pass."
    how, mine, passed = ran(stem, folders), copies(folders[0], f"{stem}_exercises"), set()
    if how == "–" and not mine: return False, passed
    print(f"{stem:22}{how}")
    for path in mine:
        print(f"  {path.stem} …", end="\r" if sys.stdout.isatty() else "\n", flush=True)
        found = exercises(path, limit)
        print(f"  {path.stem}: " + "  ".join(f"{sign} {name}" for name, (sign, _) in found.items()))
        for name, (sign, word) in found.items():
            if sign == "✗": print(f"      {name}: {(word or 'no word').splitlines()[0][:160]}")
        passed |= {name for name, (sign, _) in found.items() if sign == "✓"}
    return how == "every cell", passed & (asked_for(stem) or passed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lesson", nargs="?", default="", help="such as 05; without it, all lessons")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for a cell ({LIMIT})")
    args = parser.parse_args()
    stems = [p.stem for p in sorted(NBS.glob("[0-9]*.ipynb"))
             if not args.lesson or number(p.stem) == number(args.lesson)]
    if not stems: sys.exit(f"no lesson {args.lesson!r}: say L=NUMBER, or leave it out")
    rows = [report(stem, args.limit, [MINE, ROOT/"_out"]) for stem in stems]
    n_ran, n_passed = sum(ran for ran, _ in rows), sum(len(passed) for _, passed in rows)
    n_asked = sum(len(asked_for(stem)) for stem in stems)
    print(f"{n_ran} of {len(stems)} lessons ran, {n_passed} of {n_asked} exercises pass")
    if not n_ran and not n_passed:
        first = stems[0].split("_")[0]
        print(f"make lesson L={first} runs one; make copy L={first} makes it yours, in my/")


if __name__ == "__main__": main()
