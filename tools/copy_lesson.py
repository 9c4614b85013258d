"""Put a clean copy of a lesson and of its exercises into my/: outputs cleared, links mended. An older copy stays as it is.

usage: python tools/copy_lesson.py 05 | 05_callbacks | 05_callbacks_exercises
"""
import json
import os
import re
import sys
from pathlib import Path

from run_lesson import MINE, NBS, ROOT, find


def clean(path: Path, folder: Path) -> dict:
    "The notebook without outputs; its links lead from `folder` to where they led."
    nb = json.loads(path.read_text(encoding="utf-8"))

    def mended(link: re.Match) -> str:
        if re.match(r"[a-z]+:|/", link[1]): return link[0]
        return f"]({Path(os.path.relpath((path.parent/link[1]).resolve(), folder.resolve())).as_posix()}{link[2] or ''})"
    for cell in nb["cells"]:
        if cell["cell_type"] == "code": cell.update(outputs=[], execution_count=None)
        else: cell["source"] = re.sub(r"\]\(([^)\s#]+)(#[^)\s]*)?\)", mended, "".join(cell["source"])).splitlines(keepends=True)
    return nb


def free_name(folder: Path, name: str) -> Path:
    "folder/name.ipynb, or folder/name_2.ipynb, … if that exists."
    return next(p for p in [folder/f"{name}.ipynb", *(folder/f"{name}_{i}.ipynb" for i in range(2, 10_000))] if not p.exists())


def copy(path: Path, folder: Path = MINE) -> Path:
    "Write the clean copy of one notebook; where it is."
    folder.mkdir(exist_ok=True)
    target = free_name(folder, path.stem)
    target.write_text(json.dumps(clean(path, folder), indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    return target


def main():
    path = find(sys.argv[1] if len(sys.argv) == 2 else "")
    exercises = NBS/"exercises"/f"{path.stem}_exercises.ipynb"
    for source in [path, *([exercises] if path.parent == NBS and exercises.exists() else [])]:
        target = copy(source)
        print(f"{target.relative_to(ROOT)} is yours: git ignores it, and make lesson L=my/{target.stem} runs it")


if __name__ == "__main__": main()
