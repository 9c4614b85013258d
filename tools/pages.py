"""Notebooks as the Markdown pages of the site: cut where they are long, with links that work there.

A page of a lesson and the reference of the package point at each other, name by name.
"""
import ast
import posixpath
import re
import struct
from base64 import b64decode
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import nbformat
from house import NBS, ROOT, default_exp, lessons, read, settings, source
from markdown.extensions.toc import slugify
from reference import definitions, names

EXP = ROOT/"exp"
PART = 48_000        # a long notebook is cut into parts of about so many bytes, bars aside


# --- who is where --------------------------------------------------------------------------------

@cache
def public(module: str) -> list[str]:
    "The public names of a module of the package."
    file = EXP/f"{module.replace('.', '/')}.py"
    return names(ast.parse(file.read_text(encoding="utf-8")))


def exported(text: str, default: str | None) -> tuple[str, list[str]] | None:
    "(module, its public names that are defined here) for the text of a cell that is exported."
    found = re.search(r"^#\| *export\b *(\S*) *$", text, flags=re.M)
    if not found: return None
    module, made = found[1] or default, definitions(ast.parse(text))
    return module, [x for x in made
                    if x in public(module) and not isinstance(made[x], ast.ImportFrom)]


@cache
def homes() -> dict[tuple[str, str], Path]:
    "(module, name) -> the lesson that builds it."
    out = {}
    for path in lessons():
        for cell in (c for c in read(path)["cells"] if c["cell_type"] == "code"):
            module, made = exported(source(cell), default_exp(path)) or (None, [])
            for name in made: out.setdefault((module, name), path)
    return out


def modules() -> list[str]:
    "The modules that lessons build, in reading order."
    return list(dict.fromkeys(module for module, _ in homes()))


@cache
def title(path: Path) -> str:
    "The heading of a notebook."
    text = "\n".join(source(c) for c in read(path)["cells"] if c["cell_type"] == "markdown")
    return re.search(r"^# (.+)$", text, flags=re.M)[1]


def repository(path: Path) -> str:
    "The address of a file or folder of ours in the repository."
    cfg, kind = settings(), "tree" if path.is_dir() else "blob"
    return f'{cfg["git_url"]}/{kind}/{cfg["branch"]}/{path.relative_to(ROOT).as_posix()}'


def between(here: str, there: str) -> str:
    "A link from one page to another."
    return posixpath.relpath(there, posixpath.dirname(here) or ".")


def slug(heading: str) -> str:
    "The anchor of a heading, or of Jupyter's anchor for it: The-Loop -> the-loop."
    return slugify(unquote(heading).replace("-", " "), "-")


# --- long notebooks are cut ----------------------------------------------------------------------

def sections(cells: list) -> list[list]:
    "Cells by section; a cell that goes on into the next section is cut there."
    out = [[]]
    for cell in cells:
        if cell.cell_type == "code":
            if cell.source.strip(): out[-1].append(cell)
            continue
        for piece in re.split(r"^(?=## )", cell.source, flags=re.M):
            if piece.startswith("## "): out.append([])
            if piece.strip(): out[-1].append(nbformat.v4.new_markdown_cell(piece))
    return out


def weight(cell) -> float:
    "About how many bytes of HTML a cell becomes: code is coloured, which more than doubles it."
    outputs = sum(250 + len(o.get("text", "")) + 2*len(o.get("data", {}).get("text/markdown", ""))
                  for o in cell.get("outputs", []))
    return 120 + len(cell.source)*(2.4 if cell.cell_type == "code" else 1.3) + outputs


def packed(found: list[list], most: float) -> list[list]:
    "Sections put together, in order, while they weigh no more than `most`."
    parts, room = [], 0
    for part in found:
        if not parts or sum(map(weight, part)) > room: parts.append([]); room = most
        parts[-1].extend(part)
        room -= sum(map(weight, part))
    return parts


def cut(cells: list, most: float) -> list[list]:
    "As few parts as possible, of about equal weight, each of whole sections."
    found = sections(cells)
    tries = [packed(found, most*percent/100) for percent in range(5, 101, 5)]
    return next(parts for parts in tries if len(parts) == len(tries[-1]))


class Notebook:
    "A notebook, the page or pages it becomes, and on which of them a section or a name stands."
    def __init__(self, path: Path):
        self.path, self.places = path, {}
        self.stem = path.relative_to(NBS).with_suffix("").as_posix()
        self.parts = cut(nbformat.read(path, as_version=4).cells, PART)
        for i, part in enumerate(self.parts):
            for anchor in (a for cell in part for a in self.anchors(cell)):
                self.places.setdefault(anchor, i)

    def anchors(self, cell) -> list[str]:
        "What one may point at in a cell: headings, and names that it exports."
        if cell.cell_type == "markdown":
            return [slug(head) for head in re.findall(r"^#+ (.+)$", cell.source, flags=re.M)]
        _, made = exported(cell.source, default_exp(self.path)) or (None, [])
        return [f"exp-{name}" for name in made]

    def page(self, i: int = 0) -> str:
        "The file of part i."
        return f"{self.stem}_{i + 1}.md" if i else f"{self.stem}.md"

    def at(self, anchor: str = "") -> str:
        "The page on which an anchor stands, and the anchor."
        return self.page(self.places.get(anchor, 0)) + (f"#{anchor}" if anchor else "")

    def pages(self) -> dict[str, str]:
        "Every page -> its title."
        return {self.page(i): title(self.path) + (f" ({i + 1})" if i else "")
                for i in range(len(self.parts))}


Site = dict[Path, Notebook]      # the notebooks that become pages


# --- text ----------------------------------------------------------------------------------------

def target(link: str, path: Path, here: str, site: Site) -> str:
    "Where a notebook's link leads: a page, a picture, a folder's first page, or the repository."
    if re.match(r"[a-z]+:", link): return link
    name, _, anchor = link.partition("#")
    file = (path.parent/name).resolve() if name else path
    if not file.exists(): raise ValueError(f"{path.name} links to {link}, which is not there")
    if file.is_dir(): file = next((p for p in site if p.parent == file), file)
    if file in site: return between(here, site[file].at(slug(anchor)))
    if file.parent == NBS/"images": return between(here, file.relative_to(NBS).as_posix())
    return repository(file)


def words(text: str, path: Path, here: str, site: Site) -> str:
    "A cell of text for the site: links work, and each `exp.module` leads to the reference."
    badge = r"\[!\[Open in Colab\]\([^)]*\)\](\([^)]*\))"
    ours = f" · [this notebook in the repository]({repository(path)})"
    text = re.sub(badge, lambda m: f"[Open in Colab]{m[1]}{ours}", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"\]\(([^)\s]+)\)", lambda m: f"]({target(m[1], path, here, site)})", text)
    def refer(m):
        return f"[{m[0]}]({between(here, f'api/{m[1]}.md')})" if m[1] in modules() else m[0]
    return re.sub(r"(?<!\[)`exp\.(\w+)`(?!\])", refer, text)


def promised(text: str, path: Path, here: str) -> str:
    "The title cell, where each name that the lesson builds leads to the reference."
    mine = {name: module for (module, name), home in homes().items() if home == path}
    def refer(m):
        if m[1] not in mine: return m[0]
        return f"[{m[0]}]({between(here, f'api/{mine[m[1]]}.md')}#{m[1]})"
    return re.sub(r"(?<!\[)`(\w+)`(?!\])", refer, text)


def export_note(text: str, path: Path, here: str) -> str | None:
    "A line above an exported cell: what of it is in the reference, which leads back here."
    module, made = exported(text, default_exp(path)) or (None, [])
    mine = [name for name in made if homes().get((module, name)) == path]
    if not mine: return None
    marks = "".join(f'<span id="exp-{name}"></span>' for name in mine)
    page = between(here, f"api/{module}.md")
    links = ", ".join(f"[`{name}`]({page}#{name})" for name in mine)
    return f"{marks}exported to `exp.{module}`: {links}\n{{: .exported }}"


def way(notebook: Notebook, i: int) -> str:
    "The other parts of a long notebook."
    links = [f"**{k + 1}**" if k == i else f"[{k + 1}]({between(notebook.page(i), page)})"
             for k, page in enumerate(notebook.pages())]
    return f"Part {' · '.join(links)}"


# --- outputs, and all together -------------------------------------------------------------------

def caption(cells: list, i: int) -> str:
    "What is said of a figure, in italics, below its cell."
    after = cells[i + 1].source if i + 1 < len(cells) else ""
    found = re.match(r"\*([^*].*?)\*\s*$", after, flags=re.M)
    return re.sub(r"[\[\]`$*_\\|]", "", found[1]) if found else "a figure of this section"


def shown(output, alt: str) -> bool:
    "Prepare an output for the template; is there anything to show?"
    data = output.get("data", {})
    if "image/png" in data:      # a PNG says its width and height in bytes 16 to 23
        size = struct.unpack(">II", b64decode(data["image/png"])[16:24])
        output.metadata.update(words=alt, width=size[0], height=size[1])
    elif "text/html" in data:    # tables of results stay, without clothes of their own; bars go
        data["text/html"] = re.sub(r"<(t\w+)[^>]*>\s*", r"<\1>", data["text/html"])
        return "<table" in data["text/html"]
    return bool(data or output.get("text", "").strip())


def page(notebook: Notebook, i: int, site: Site):
    "Part i as a reader of the site wants it, a notebook still: no directives, no cell for Colab."
    path, here, cells = notebook.path, notebook.page(i), []
    def say(text): cells.append(nbformat.v4.new_markdown_cell(text))
    if i: say(f"# {notebook.pages()[here]}\n\n{way(notebook, i)}")
    for k, cell in enumerate(notebook.parts[i]):
        if cell.cell_type == "markdown":
            text = words(cell.source, path, here, site)
            say(promised(text, path, here) if i == k == 0 else text)
            if i == k == 0 and len(notebook.parts) > 1: say(way(notebook, 0))
        elif not cell.source.startswith("#| eval: false\n# On Colab"):
            note, alt = export_note(cell.source, path, here), caption(notebook.parts[i], k)
            code = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
            outputs = [o for o in cell.outputs if shown(o, alt)]
            if note: say(note)
            if code: cells.append(nbformat.v4.new_code_cell(code, outputs=outputs))
    return nbformat.v4.new_notebook(cells=cells)
