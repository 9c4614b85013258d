"The site: built from the notebooks, whole, light, of one host, and right in a real browser, by day and by night, on a desk and on a phone."
import ast
import functools
import http.server
import re
import shutil
import threading
from collections import Counter
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest
from conftest import ROOT
from house import NBS, lessons, notebooks, read, source

pytest.importorskip("mkdocs", reason="this environment cannot make the site")
import docs
import markdown
import nbformat
import pages
import reference
from markdown_it import MarkdownIt

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def text_of(path) -> str: return "\n\n".join(source(c) for c in read(path)["cells"] if c["cell_type"] == "markdown")


def has_all(path) -> bool:
    "Does a lesson hold a formula, a figure and something printed?"
    outputs = [o for c in read(path)["cells"] for o in c.get("outputs", [])]
    kinds = {k for o in outputs for k in o.get("data", {})} | {o["output_type"] for o in outputs}
    return "$$" in text_of(path) and {"image/png", "text/markdown", "stream"} <= kinds


# Two lessons stand for all: the smallest that have everything a page can hold.
CHOSEN = sorted(filter(has_all, lessons()), key=lambda p: p.stat().st_size)[:2]


# --- the reference, from a source ----------------------------------------------------------------------------------------

SOURCE = '''"A module."
__all__ = ["double", "area", "Box", "SIZE", "helper", "Row"]
from .other import helper
SIZE = 3   # pixels

def double(x: int) -> int:    # twice as much
    "Multiply by *two*, as `a*b*c` does. Raises: TypeError. Same as: torch.mul (1e-6)."

def area(
    h, w: int,                # of the box,
                              # in pixels
    *rest: float,             # more sides
    unit: str | None = None,  # of length
) -> float:                   # in units²
    "Multiply <all>."

class Box(Base):
    "A box."
    def __init__(self, side: int = SIZE): pass
    def grow(self, by: float) -> None: "Grow it."
    def _hide(self): "Not for you."
    @property
    def volume(self): "What fits in."

@dataclass
class Row:
    "One row."
    name: str    # who
'''


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")/"shapes.py"
    path.write_text(SOURCE)
    parts = re.split(r"^## (\w+) \{ #\1 \}\n\n", reference.module_page(path, lambda name: f"[here](#{name})"), flags=re.M)
    assert parts[0].startswith("# exp.shapes\n\n> A module.")
    return dict(zip(parts[1::2], parts[2::2]))


def test_reference_of_a_function(entries):
    assert entries["double"] == ("Built in [here](#double)\n\n```python\ndouble(x: int) -> int  # twice as much\n```\n\n"
                                 "Multiply by \\*two\\*, as `a*b*c` does.<br>**Raises:** TypeError.<br>**Same as:** torch.mul (1e-6).\n\n")
    rows = entries["area"].split("|---|---|---|\n")[1].split("\n")
    assert "```python\narea(h, w, *rest, unit=None)\n```" in entries["area"] and "Multiply &lt;all>." in entries["area"]
    assert rows[:4] == ["| `h`, `w` | `int` | of the box, in pixels |", "| `*rest` | `float` | more sides |",
                        "| `unit` | `str | None` | of length |", "| **returns** | `float` | in units² |"]


def test_reference_of_a_class(entries):
    assert "```python\nclass Box(Base)\n\nBox(side: int=SIZE)\n```\n\nA box." in entries["Box"]
    assert "#### Box.grow { #Box.grow }" in entries["Box"] and ".grow(by: float) -> None" in entries["Box"] and "**`.volume`** What fits in." in entries["Box"]
    assert "hide" not in entries["Box"] and "| `name` | `str` | who |" in entries["Row"]


def test_reference_of_other_names(entries):
    assert "```python\nSIZE = 3\n```" in entries["SIZE"] and "(other.md#helper)" in entries["helper"]
    assert list(entries) == ["double", "area", "Box", "SIZE", "helper", "Row"]


def test_every_public_name_has_a_home_in_a_lesson():
    for name in pages.modules():
        tree = ast.parse((ROOT/f"exp/{name}.py").read_text(encoding="utf-8"))
        own = [x for x, node in reference.definitions(tree).items() if x in pages.public(name) and not isinstance(node, ast.ImportFrom)]
        assert [x for x in own if (name, x) not in pages.homes()] == []
    assert pages.homes()["setup", "set_seed"].stem == "00_setup"


# --- Markdown ------------------------------------------------------------------------------------------------------------

COUNTED = ("li", "table", "td", "em", "strong", "code", "pre", "p", "h1", "h2", "h3")


def shape(html: str) -> dict[str, int]:
    "How many parts of each kind."
    found = Counter(re.findall(r"<(\w+)", html))
    return {tag: found[tag] for tag in COUNTED}


def read_both_ways(text: str) -> tuple[dict, dict]:
    "The shape of a text as Jupyter and as the site reads it, formulas and comments aside."
    text = re.sub(r"\$\$.+?\$\$|(?<![\w`$])\$[^$`\n]+\$", "formula", re.sub(r"<!--.*?-->", "", text, flags=re.S), flags=re.S)
    return (shape(MarkdownIt("commonmark").enable("table").render(text)),
            shape(markdown.markdown(text, extensions=["tables", "fenced_code"])))


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_text_means_the_same_to_jupyter_and_to_the_site(path):
    for cell in read(path)["cells"]:
        if cell["cell_type"] != "markdown": continue
        jupyter, ours = read_both_ways(source(cell))
        assert jupyter == ours, f"read differently (a blank line before a list or table?):\n{source(cell)}"


def test_the_comparison_of_readings_can_fail():
    jupyter, ours = read_both_ways("A list:\n- one\n- two $a*b*c$")
    assert jupyter["li"] == 2 and ours["li"] == 0 and jupyter["em"] == 0


def test_links_of_a_notebook_find_their_page():
    lesson, other = CHOSEN
    exercise = NBS/"exercises"/f"{lesson.stem}_exercises.ipynb"
    site = {p: pages.Notebook(p) for p in (lesson, exercise)}
    site[lesson].parts, site[lesson].places = [[], []], {"the-loop": 1}
    def to(link, path=lesson, here="x.md"): return pages.target(link, path, here, site)
    assert to(f"exercises/{exercise.name}") == to("exercises") == f"exercises/{exercise.stem}.md"
    assert to(f"../{lesson.name}#The-Loop", exercise, "exercises/x.md") == f"../{lesson.stem}_2.md#the-loop" and to("#The-Loop") == f"{lesson.stem}_2.md#the-loop"
    assert to("../images/readme.png", exercise, "exercises/x.md") == "../images/readme.png" and to("https://x.org/y") == "https://x.org/y"
    assert to(other.name) == pages.repository(other) and to("../LICENSE").endswith("/blob/main/LICENSE") and to("../results").endswith("/tree/main/results")
    with pytest.raises(ValueError, match="links to nowhere.ipynb"): to("nowhere.ipynb")


def cells(*texts) -> list:
    "Cells of a notebook: code starts with x, and an x alone is an empty cell."
    return [nbformat.v4.new_code_cell(t[t == "x":]) if t.startswith("x") else nbformat.v4.new_markdown_cell(t) for t in texts]


def test_long_notebooks_are_cut_at_sections():
    given = cells("x", "# Title", "x = 1", "an end\n\n## One\n\n### Inner", "x = 2", "## Two", "## Three\n\ntext")
    found = pages.sections(given)
    assert [[c.source for c in part] for part in found] == [["# Title", "x = 1", "an end\n\n"], ["## One\n\n### Inner", "x = 2"], ["## Two"], ["## Three\n\ntext"]]
    assert len(pages.cut(given, 1e6)) == 1
    parts = pages.cut(given, sum(map(pages.weight, given))*.6)
    assert len(parts) == 2 and [c.source for part in parts for c in part] == [c.source for part in found for c in part]
    assert all(part[0].source.startswith("## ") for part in parts[1:])
    assert len(pages.cut(given, 1)) == 4, "a section that is too heavy alone stays whole"


def test_a_page_has_no_directives_and_points_at_the_reference():
    lesson = next(p for p in lessons() if p.stem == "00_setup")      # it builds set_seed
    notebook = pages.Notebook(lesson)
    made = [c for i in range(len(notebook.parts)) for c in pages.page(notebook, i, {lesson: notebook}).cells]
    assert not any(re.search(r"^#\||Open in Colab\]\(https://colab.research.google.com/assets", c.source, flags=re.M) for c in made)
    assert "[`set_seed`](api/setup.md#set_seed)" in made[0].source and pages.repository(lesson) in made[0].source
    note = next(c.source for c in made if 'id="exp-set_seed"' in c.source)
    assert "exported to `exp.setup`" in note and note.endswith("{: .exported }")
    assert notebook.at("exp-set_seed").endswith("#exp-set_seed")


def test_slim_leaves_the_text_of_code_alone():
    code = '<pre><span class="n">x</span>\n    <span class="k">if</span></pre>'
    assert docs.slim(f"<p>\n    a\n\n   {code}\n  b") == '<p>\na\n<pre>x\n    <span class="k">if</span></pre>\nb'


# --- the pages -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "PART", 30_000)       # so that a lesson is cut
        docs.build(folder, [f"{p.stem}{end}" for p in CHOSEN for end in ("", "_exercises", "_solutions")])
    return folder


class Links(HTMLParser):
    "Collects the anchors of a page, where it leads, and what it loads."
    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs.get("id"), attrs.get("name")}
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        elif tag == "link" and attrs.get("rel") in ("canonical", "prev", "next"): pass
        elif attrs.get("href") or attrs.get("src"): self.loads.append(attrs.get("href") or attrs["src"])


def test_every_link_inside_leads_somewhere_and_nothing_is_loaded_from_outside(site):
    found_in = {p: Links(p.read_text(encoding="utf-8")) for p in site.rglob("*.html") if p.name != "404.html"}
    dead, foreign = [], []
    for page, found in found_in.items():
        for link in found.links + found.loads:
            if re.match(r"[a-z]+:|//", link):
                if link in found.loads and not link.startswith("data:"): foreign.append(f"{page.name}: {link}")
                continue
            name, anchor = urldefrag(link)
            file = (page.parent/unquote(name)).resolve() if name else page
            if not file.exists() or anchor and file in found_in and unquote(anchor) not in found_in[file].ids | {"__skip"}: dead.append(f"{page.name}: {link}")
    assert not dead and not foreign, (dead, foreign)
    assert len(found_in) > 7 + 1 + len(pages.modules()) and (site/f"api/{pages.modules()[0]}.html") in found_in
    for css in site.rglob("*.css"):
        for url in re.findall(r"url\(([^)]+)\)", css.read_text(encoding="utf-8")):
            assert url.strip("\"'").startswith(("data:", "#")) or (css.parent/url).exists(), f"{css.name}: {url}"


def parts_of(site, path) -> list[str]:
    "The pages of a lesson."
    return sorted(p.name for p in site.glob(f"{path.stem}*.html"))


def test_pages_are_light_and_lead_back_to_the_notebook(site):
    for page in site.rglob("*.html"): assert page.stat().st_size <= docs.LIMIT, page.name
    assert max(len(parts_of(site, path)) for path in CHOSEN) > 1
    for path in CHOSEN:
        first, *rest = parts_of(site, path)
        html = (site/first).read_text(encoding="utf-8")
        assert pages.repository(path) in html and "colab.research.google.com/github/" in html
        assert all(f'href="{name}"' in html for name in rest), "the first part leads to the others"
        for name in (first, *rest):
            html = (site/name).read_text(encoding="utf-8")
            assert len(list((site/name.removesuffix(".html")).glob("*.png"))) == html.count('loading="lazy"') and "base64" not in html.split("<body")[1]


def test_a_heavy_page_is_refused(tmp_path, monkeypatch):
    (tmp_path/"big.html").write_text("x"*90_000)
    with pytest.raises(ValueError, match="big.html weighs 90 kB"): docs.finish(tmp_path)


# --- in a browser --------------------------------------------------------------------------------------------------------

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown(); server.server_close(); thread.join(10)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None: pytest.skip("no browser here")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as play:
        made = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000)
        yield made
        made.close()


@pytest.fixture
def visit(browser, address):
    "Open a page; afterwards there was no error, and nothing asked of another host."
    opened, trouble, asked = [], [], []
    def go(name, **how):
        context = browser.new_context(**how)
        context.set_default_timeout(120_000)       # a busy machine is no fault of the site
        page = context.new_page()
        page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.on("response", lambda answer: trouble.append(answer.url) if answer.status >= 400 else None)
        page.goto(f"{address}/{name}")
        opened.append(context)
        return page
    yield go
    for context in opened: context.close()
    assert not trouble, trouble
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))], "a request to another host"


def test_search_finds_a_section(visit):
    page = visit("index.html")
    word = [h for h in re.findall(r"^## (.+)$", text_of(CHOSEN[0]), flags=re.M) if re.fullmatch(r"[\w ,]+", h)][2]
    page.locator(".md-search__input").click()
    page.keyboard.type(word)
    found = page.locator(".md-search-result__link").filter(has_text=word)
    found.first.wait_for(state="attached")
    links = found.evaluate_all("links => links.map(link => link.href)")
    assert any(f"/{CHOSEN[0].stem}" in link and "#" in link for link in links), links


BARE = """() => { const copy = document.querySelector('article').cloneNode(true)
    copy.querySelectorAll('pre, code, .katex').forEach(part => part.remove()); return copy.textContent }"""


@pytest.mark.parametrize("path", CHOSEN, ids=lambda p: p.stem)
def test_mathematics_is_typeset(visit, site, path):
    met = 0
    for name in parts_of(site, path):
        page = visit(name)
        formulas = page.locator(".arithmatex").count()
        assert page.locator(".arithmatex > .katex, .arithmatex > .katex-display").count() == formulas
        assert page.locator(".katex-error").count() == 0 and not re.search(r"\$\$|\\[a-z]+\{", page.evaluate(BARE))
        met += page.locator(".katex-display").count()
    assert met == text_of(path).count("$$")//2


def test_code_copies(visit):
    page = visit(f"{CHOSEN[0].stem}.html", permissions=["clipboard-read", "clipboard-write"])
    block = page.locator(".highlight:not(.output)").first
    block.hover()
    block.locator("[data-clipboard-target], [data-md-type=copy]").first.click()
    assert page.evaluate("navigator.clipboard.readText()").strip() == block.locator("code").inner_text().strip()
    assert page.locator(".output [data-md-type=copy]").count() == 0, "what was printed is not for pasting"


BRIGHT = "part => getComputedStyle(part).{}.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0)/765"


def test_dark_mode_is_dark_and_figures_keep_their_paper(visit, site):
    name = next(n for path in CHOSEN for n in parts_of(site, path) if 'loading="lazy"' in (site/n).read_text(encoding="utf-8"))
    page = visit(name, color_scheme="dark")
    body = page.locator("body")
    assert body.get_attribute("data-md-color-scheme") == "slate"
    assert body.evaluate(BRIGHT.format("backgroundColor")) < .25 and page.locator("article p").first.evaluate(BRIGHT.format("color")) > .5
    assert page.locator("article img").first.evaluate(BRIGHT.format("backgroundColor")) == 1
    assert visit(name, color_scheme="light").locator("body").get_attribute("data-md-color-scheme") == "default"


def test_a_phone_shows_all_without_scrolling_the_page_sideways(visit, address):
    page = visit("index.html", viewport=dict(width=390, height=800))
    for name in ["index.html", "api/index.html", "api/learner.html", *(f"{p.stem}.html" for p in CHOSEN)]:
        page.goto(f"{address}/{name}")
        page.wait_for_function("document.querySelectorAll('.md-typeset table').length == document.querySelectorAll('.md-typeset__table table').length")
        width, wide = page.evaluate("""() => [document.documentElement.scrollWidth, [...document.querySelectorAll('article *')].filter(part =>
            part.getBoundingClientRect().right > 391 && !part.closest('pre, .md-typeset__scrollwrap, .arithmatex, .katex')).map(part => part.outerHTML.slice(0, 90))]""")
        assert width <= 390 and not wide, (name, width, wide)
