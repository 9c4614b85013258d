"""Run one lesson in a fresh kernel; leave the executed notebook and an HTML page in _out/ and print the last code cell's output.

usage: python tools/run_lesson.py 04_training_loop
"""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"


def find(name: str) -> Path:
    "The notebook of a lesson, exercise or solution, by its name."
    found = [p for p in NBS.rglob("*.ipynb") if p.stem == Path(name).stem and ".ipynb_checkpoints" not in p.parts]
    if len(found) == 1: return found[0]
    names = " ".join(sorted(p.stem for p in NBS.glob("[0-9]*.ipynb")))
    sys.exit(f"no lesson {name!r}: say make lesson L=NAME with one of\n{names}")


def run(path: Path, timeout: int = 3600):
    "Execute a notebook in a fresh kernel, in its own folder; the executed copy comes back, with the error if one struck."
    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    try: client.execute()
    except CellExecutionError as error: return nb, error
    return nb, None


def last_output(nb) -> str:
    "What the last code cell with an output shows, as text."
    cell = next((c for c in reversed(nb.cells) if c.cell_type == "code" and c.outputs), None)
    outputs = cell.outputs if cell else []
    return "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs).rstrip()


def main():
    if len(sys.argv) != 2 or not sys.argv[1]: find("")
    path = find(sys.argv[1])
    nb, error = run(path)
    out = ROOT/"_out"
    out.mkdir(exist_ok=True)
    nbformat.write(nb, out/path.name)
    (out/f"{path.stem}.html").write_text(HTMLExporter().from_notebook_node(nb)[0], encoding="utf-8")
    print(f"_out/{path.name} and _out/{path.stem}.html written")
    if error: sys.exit(str(error))
    print(last_output(nb))


if __name__ == "__main__": main()
