"""Make the site in _docs/: every lesson, exercise and solution, and a reference of the package.

usage: python tools/docs.py [NAME …]      (NAME …: of the notebooks only these, to see one quickly)
"""
import ast
import logging
import re
import shutil
import sys
import tempfile
from pathlib import Path

from house import NBS, ROOT, notebooks, settings
from mkdocs.commands.build import build as make_site
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from nbconvert import MarkdownExporter
from pages import EXP, Notebook, Site, between, homes, modules, page, repository, title
from reference import escape, module_page

DOCS, SITE = ROOT/"docs", ROOT/"_docs"
LIMIT = 80_000       # bytes of HTML that a page may have
PARTS = {"nbs": "Lessons", "exercises": "Exercises", "solutions": "Solutions"}


def write(file: Path, text: str | bytes):
    "Write a file, making its folder."
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode() if isinstance(text, str) else text)


def write_pages(site: Site, folder: Path):
    "Each part of a notebook as Markdown, its pictures in a folder beside it."
    exporter = MarkdownExporter(template_file=str(DOCS/"notebook.md.j2"))
    for notebook in site.values():
        for i, name in enumerate(notebook.pages()):
            resources = dict(unique_key="figure", output_files_dir=Path(name).stem)
            text, found = exporter.from_notebook_node(page(notebook, i, site), resources)
            write(folder/name, text)
            for picture, data in found["outputs"].items():
                write((folder/name).parent/picture, data)


def write_reference(site: Site, folder: Path):
    "A page a module, and a table of them all."
    def link(path, here, anchor=""):
        there = between(here, site[path].at(anchor)) if path in site else repository(path)
        return f"[{title(path)}]({there})"
    rows = ["# The package `exp`\n", "| module | says of itself | built in |", "|---|---|---|"]
    for name in modules():
        file, here = EXP/f"{name}.py", f"api/{name}.md"
        write(folder/here, module_page(
            file, lambda x, name=name, here=here: link(homes()[name, x], here, f"exp-{x}")))
        lessons = dict.fromkeys(path for (module, _), path in homes().items() if module == name)
        about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        links = ", ".join(link(path, here) for path in lessons)
        rows.append(f"| [`exp.{name}`]({name}.md) | {escape(about)} | {links} |")
    write(folder/"api/index.md", "\n".join(rows) + "\n")


def contents(site: Site) -> list[dict]:
    "The way through the site: lessons, exercises, solutions, reference; parts below their lesson."
    def way(notebook):
        found = [{text: name} for name, text in notebook.pages().items()]
        return found[0] if len(found) == 1 else {title(notebook.path): found}
    parts = {"Lessons": [{"Contents": "index.md"}], "Exercises": [], "Solutions": [],
             "Reference": [{"Modules": "api/index.md"}]}
    for path, notebook in site.items():
        if notebook.stem != "index": parts[PARTS[path.parent.name]].append(way(notebook))
    parts["Reference"] += [{f"exp.{name}": f"api/{name}.md"} for name in modules()]
    return [{name: found} for name, found in parts.items() if found]


def slim(html: str) -> str:
    "Half the weight: no indentation outside of code, no colour for names and signs inside."
    parts = re.split(r"(<pre.*?</pre>)", html, flags=re.S)
    parts[::2] = [re.sub(r"\s*\n\s*", "\n", part) for part in parts[::2]]
    parts[1::2] = [re.sub(r'<span class="(?:n|p|w|o)">([^<]*)</span>', r"\1", part)
                   for part in parts[1::2]]
    return "".join(parts)


def finish(folder: Path):
    "Make every page lighter. Raises: ValueError where one stays too heavy."
    heavy = []
    for file in sorted(folder.rglob("*.html")):
        html = slim(file.read_text(encoding="utf-8")).encode()
        file.write_bytes(html)
        if len(html) > LIMIT: heavy.append(f"{file.name} weighs {len(html)//1000} kB")
    if heavy: raise ValueError(f"{', '.join(heavy)}; {LIMIT//1000} are allowed: print less there, "
                               "or cut notebooks finer (PART in tools/pages.py)")


def build(out: Path = SITE, only: list[str] | None = None):
    "Make the site, or contents, reference and some notebooks. Raises: Abort for a dead link."
    chosen = [p for p in notebooks() if not only or p.stem in (*only, "index")]
    site, cfg = {p: Notebook(p) for p in chosen}, settings()
    with tempfile.TemporaryDirectory() as temporary:
        folder, ours = Path(temporary), shutil.ignore_patterns("*.yml", "*.j2", "README.md")
        shutil.copytree(DOCS, folder, dirs_exist_ok=True, ignore=ours)
        shutil.copytree(NBS/"images", folder/"images")
        write_pages(site, folder)
        write_reference(site, folder)
        links = [dict(icon="fontawesome/brands/github", link=cfg["git_url"], name="repository")]
        make_site(load_config(
            str(DOCS/"mkdocs.yml"), docs_dir=str(folder), site_dir=str(out), nav=contents(site),
            site_name=title(NBS/"index.ipynb"), site_url=cfg["doc_host"] + cfg["doc_baseurl"],
            site_description=cfg["description"], extra={"social": links}))
    finish(out)


def main():
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try: build(only=sys.argv[1:])
    except Abort: sys.exit("the site is not whole: see above what leads nowhere")
    except ValueError as error: sys.exit(str(error))
    print(f"{SITE.name}/index.html is its first page; to search, serve it: "
          f"python -m http.server -d {SITE.name}")


if __name__ == "__main__": main()
