"""Run one lesson in a fresh kernel; leave the executed notebook and an HTML page in _out/, and show its last output.

usage: python tools/run_lesson.py 05 | 05_callbacks | 05_callbacks_exercises | my/05_callbacks
       python tools/run_lesson.py --record 05      (maintainers: outputs stay in the notebook, results in results/)
"""
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
NBS, MINE = ROOT/"nbs", ROOT/"my"


def notebooks(folder: Path) -> list[Path]:
    "All notebooks of a folder, by name."
    return sorted(p for p in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def number(name: str) -> str | None:
    "'4', '04' and '04_training_loop' are all number '04', '5a' is '05a'; None where there is none."
    found = re.match(r"0*(\d+)([a-z]?)(?:_|$)", name)
    return f"{int(found[1]):02}{found[2]}" if found else None


def find(name: str) -> Path:
    "The notebook that a name or a number means: the lesson's, or, if it says my/ or stands only there, the reader's own."
    wanted, in_mine = Path(name).name.removesuffix(".ipynb"), Path(name).parts[:1] == ("my",)
    for folder in [MINE] if in_mine else [NBS, MINE]:
        found = [p for p in notebooks(folder) if p.stem == wanted]
        if not found and re.fullmatch(r"\d+[a-z]?", wanted):
            found = [p for p in sorted(folder.glob("*.ipynb")) if number(p.stem) == number(wanted)]
        if found: return min(found, key=lambda p: (len(p.parts), len(p.name)))
    names = " ".join(p.stem for p in sorted(NBS.glob("[0-9]*.ipynb")))
    if in_mine: sys.exit(f"there is no {name} yet: make copy L={wanted} puts a copy of that lesson there, out of these\n{names}")
    sys.exit(f"{f'no lesson {name!r}' if name else 'which lesson?'}: say L=NUMBER or L=NAME, with one of\n{names}")


def run(path: Path, timeout: int = 3600, tell=lambda done, of, cell: None):
    "Execute a notebook in a fresh kernel, in its own folder; the executed copy comes back, with the error if one struck."
    nb = nbformat.read(path, as_version=4)
    of = sum(cell.cell_type == "code" for cell in nb.cells)
    place = {id(cell): i for i, cell in enumerate(cell for cell in nb.cells if cell.cell_type == "code")}
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
                            extra_arguments=["--log-level=CRITICAL"],   # its own words are not about the lesson
                            on_cell_start=lambda cell, cell_index: id(cell) in place and tell(place[id(cell)], of, cell_index))
    try: client.execute()
    except (CellExecutionError, CellTimeoutError) as error: return nb, error
    except (DeadKernelError, AssertionError, KeyboardInterrupt):    # by Ctrl-C nbclient loses its kernel, and asserts that it has one
        return nb, RuntimeError("its kernel is gone: by Ctrl-C, or because it ran out of memory")
    return nb, None


def last_output(nb) -> str:
    "What the last code cell with an output shows, as text."
    cell = next((c for c in reversed(nb.cells) if c.cell_type == "code" and c.outputs), None)
    outputs = cell.outputs if cell else []
    texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs]
    return "".join("(a figure)\n" if text.startswith("<Figure") else text for text in texts).rstrip()


class Teller:
    "Says which part of a notebook runs: one line that grows old in a terminal, a line per section elsewhere."
    def __init__(self, path: Path):
        self.heads, head = [], ""
        for cell in nbformat.read(path, as_version=4).cells:
            for title in re.findall(r"^##? (.+)$", cell.source, flags=re.M) if cell.cell_type == "markdown" else (): head = title
            self.heads.append(head)
        self.said, self.live = None, sys.stdout.isatty()

    def __call__(self, done: int, of: int, cell: int):
        "Speak of the cell that starts now."
        if self.live: print(f"\r\033[K  cell {done + 1} of {of} · {self.heads[cell]}"[:110], end="", flush=True)
        elif self.said != self.heads[cell]: print(f"  cell {done + 1} of {of} · {self.heads[cell]}", flush=True)
        self.said = self.heads[cell]


def main():
    words = [w for w in sys.argv[1:] if w != "--record"]
    path, keep = find(words[0] if len(words) == 1 else ""), "--record" in sys.argv
    if keep: os.environ["EXP_RECORD"] = "1"
    shown = path.relative_to(ROOT)
    print(f"running {shown} in a fresh kernel (scale {os.environ.get('EXP_SCALE') or 'by device'}; Ctrl-C stops it)")
    start = time.perf_counter()
    nb, error = run(path, tell=Teller(path))
    print(("\r\033[K" if sys.stdout.isatty() else "") + ("stopped by an error" if error else "every cell ran") + f", {time.perf_counter() - start:.0f} s")
    out = ROOT/"_out"
    out.mkdir(exist_ok=True)
    nbformat.write(nb, path if keep and not error else out/path.name)
    (out/f"{path.stem}.html").write_text(HTMLExporter().from_notebook_node(nb)[0], encoding="utf-8")
    print(f"{shown if keep and not error else f'_out/{path.name}'} and _out/{path.stem}.html written")
    if error: sys.exit(str(error))
    print(f"The last output of the notebook reads:\n\n{last_output(nb)}")


if __name__ == "__main__": main()
