"The rules of the house: imports run one way, the ledger binds, every name is documented and stands alone, notebooks are clean."
import ast
import graphlib
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from house import NBS, LABEL, default_exp, exports, generated, lessons, notebooks, read, source
from signs import measure

EXP = ROOT/"exp"
LESSONS = lessons()                                                                  # notebooks, in reading order
MODULES = list(dict.fromkeys(m for p in LESSONS for m in exports(p)))                # in the order of their first cells
EXERCISES = {default_exp(p): p for p in sorted((NBS/"exercises").glob("*.ipynb"))}
by_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)


def tree(module: str) -> ast.Module: return ast.parse((EXP/(module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))


def exported(path: Path) -> ast.Module:
    "All that one lesson exports, to whichever module."
    return ast.parse("\n".join(cell for cells in exports(path).values() for cell in cells))


def imports(code: ast.AST) -> list[tuple[str, str | None]]:
    "(module, name) for every import statement, those inside functions included; in exported cells exp's are absolute, in exp/ relative."
    out = []
    for node in ast.walk(code):
        if isinstance(node, ast.Import): out += [(a.name, None) for a in node.names]
        if isinstance(node, ast.ImportFrom): out += [("exp."*(node.level > 0) + (node.module or ""), a.name) for a in node.names]
    return out


def ours(code: ast.AST) -> list[tuple[str, str | None]]:
    "(module of exp, name) for each import from the package."
    found = [(module.split(".")[1:], name) for module, name in imports(code) if module.split(".")[0] == "exp"]
    return [(".".join(rest), name) if rest and rest[0] else (name or "", None) for rest, name in found]


def defined(body: list) -> set[str]:
    "Names that top-level statements bind, imports aside."
    out = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): out.add(node.name)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            out |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.For)): out |= defined([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)])
    return out


# --- one way -------------------------------------------------------------------------------------------------------------

def test_every_module_has_a_lesson_and_one_lesson_names_it():
    assert None not in EXERCISES
    made = {p.relative_to(EXP).with_suffix("").as_posix().replace("/", ".") for p in EXP.rglob("*.py") if not p.name.startswith("_")}
    assert made == set(MODULES) | set(EXERCISES)
    named = [default_exp(p) for p in LESSONS]
    assert sorted(filter(None, named)) == sorted(MODULES), "each module is named by one lesson, with #| default_exp"
    for i, path in enumerate(LESSONS):
        assert set(exports(path)) <= set(named[:i+1]), f"{path.name} exports to a module that no lesson has named yet"


def back_arrows(given: list[tuple[set[tuple[str, str]], list[tuple[str, str | None]], set[str]]]) -> list[str]:
    "Per lesson what it exports as (module, name), what it imports, and the modules it writes to; out come imports of what is not there yet."
    known, bad = set(), []
    for i, (makes, needs, own) in enumerate(given):
        modules = {m for m, _ in known} | own
        bad += [f"lesson {i} imports {m}" + (f".{name}" if name else "") for m, name in needs
                if m not in modules or name and m not in own and (m, name) not in known]
        known |= makes
    return bad


def makes(path: Path) -> set[tuple[str, str]]:
    "(module, name) for all that a lesson exports, names that it takes from an earlier module and passes on included."
    code = {m: ast.parse("\n".join(cells)) for m, cells in exports(path).items()}
    return {(m, name) for m, part in code.items() for name in defined(part.body) | {name for _, name in ours(part)}}


def test_imports_point_to_earlier_lessons():
    given = [(makes(p), ours(exported(p)), set(exports(p))) for p in LESSONS]
    bad = [re.sub(r"lesson (\d+)", lambda m: LESSONS[int(m[1])].stem, text) for text in back_arrows(given)]
    assert not bad


def test_modules_have_no_cycle():
    graph = {m: {other for other, _ in ours(tree(m))} - {m} for m in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())           # raises CycleError and names the circle
    assert set().union(*graph.values()) <= set(MODULES), "a lesson imports no exercises"


def test_the_tests_above_can_fail():
    assert back_arrows([({("a", "f")}, [("b", "g")], {"a"}), ({("b", "g")}, [("a", "f")], {"b"})]) == ["lesson 0 imports b.g"]
    assert back_arrows([({("a", "f")}, [], {"a"}), (set(), [("a", "late")], {"b"}), ({("a", "late")}, [], {"a"})]) == ["lesson 1 imports a.late"]
    assert back_arrows([(set(), [("exercises", None)], {"a"})]) == ["lesson 0 imports exercises"]
    assert ours(ast.parse("from exp.norm import BatchNorm\nfrom .data import x\nimport exp.init\nfrom exp import plots\nimport torch")) == [
        ("norm", "BatchNorm"), ("data", "x"), ("init", None), ("plots", None)]
    assert defined(ast.parse("x, (y, *z) = 1, (2, 3)\nif x:\n    def f(): a = 1\nclass C: b = 2\nD: int = 3").body) == {"x", "y", "z", "f", "C", "D"}


def test_exports_go_by_directive(tmp_path):
    def write(*cells):
        (tmp_path/"x.ipynb").write_text(json.dumps(dict(cells=[dict(cell_type="code", source=c) for c in cells])))
        return tmp_path/"x.ipynb"
    assert exports(write("1 + 1", "#| eval: false\nx = 1")) == {}
    assert exports(write("#| default_exp norm", "#| export\nx = 1", "#| export learner\ny = 2", "z = 3")) == {"norm": ["\nx = 1"], "learner": ["\ny = 2"]}
    assert exports(write("#| export norm\nx = 1")) == {"norm": ["\nx = 1"]} and default_exp(write("#| export norm\nx = 1")) is None
    with pytest.raises(ValueError, match="exports to no module"): exports(write("#| export\nx = 1"))


@pytest.mark.parametrize("module", [*MODULES, *EXERCISES])
def test_imports_are_explicit(module):
    found = imports(tree(module))
    assert not [m for m, name in found if name == "*"], "no star imports"
    assert not [m for m, _ in found if m.split(".")[0] in ("fastcore", "nbdev", "torchvision", "IPython")]
    aliases = {a.asname for node in ast.walk(tree(module)) if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names if a.asname}
    assert aliases <= {"nn", "F", "np", "plt"}, aliases
    top = {n for node in tree(module).body if isinstance(node, (ast.Import, ast.ImportFrom))
           for n in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])}
    assert not {n for n in top if n and n.split(".")[0] in ("matplotlib", "fastprogress")}, "import plotting inside the functions that draw"


# --- private names, and the signs of good health --------------------------------------------------------------------------

def is_private(name: str) -> bool: return name.startswith("_") and not name.endswith("__")


def borrowed(code: ast.AST) -> list[str]:
    "Private names that code takes from another module of the package, by import or as an attribute of it."
    found = [f"{m}.{name}" for m, name in ours(code) if name and is_private(name)]
    modules = {name for _, name in [(m, m.split(".")[-1]) for m, name in ours(code) if name is None]}
    return found + [f"{n.value.id}.{n.attr}" for n in ast.walk(code) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
                    and n.value.id in modules and is_private(n.attr)]


@pytest.mark.parametrize("module", [*MODULES, *EXERCISES])
def test_private_names_stay_at_home(module):
    assert not borrowed(tree(module)), f"exp.{module} uses private names of other modules"


def test_no_private_name_has_two_meanings():
    homes = {}
    for module in MODULES:
        for name in filter(is_private, defined(tree(module).body)): homes.setdefault(name, []).append(module)
    assert not {name: at for name, at in homes.items() if len(at) > 1}


def test_the_search_for_private_names_can_fail():
    assert borrowed(ast.parse("from exp.norm import _Norm, BatchNorm\nfrom .data import _x\nfrom exp import plots\nplots._style()\nself._mine")) == [
        "norm._Norm", "data._x", "plots._style"]
    assert not borrowed(ast.parse("from exp.setup import __doc__\nfrom torch import _C"))


@pytest.mark.parametrize("module", MODULES)
def test_exported_code_is_readable(module):
    signs = measure(EXP/f"{module}.py")
    print(module, signs)                                             # `python tools/signs.py` prints the table of all modules
    assert not signs.long_lines, f"exp/{module}.py, lines {signs.long_lines}: more than 100 columns"
    assert not signs.long_functions, f"exp/{module}.py: more than 40 lines in {signs.long_functions}"
    assert not signs.bare_parameters, f"exp/{module}.py: annotate {signs.bare_parameters}"


# --- the ledger ------------------------------------------------------------------------------------------------------------

GATED = {"backward", "requires_grad", "requires_grad_", "grad", "detach", "softmax", "log_softmax", "logsumexp", "relu", "relu_", "tanh", "sigmoid",
         "matmul", "mm", "bmm", "mv", "addmm", "einsum", "unfold", "qr", "svd"}
ROOTS = {"torch": "torch", "nn": "nn", "F": "F", "torch.nn": "nn", "torch.nn.functional": "F"}


def dotted(node) -> str | None:
    parts = []
    while isinstance(node, ast.Attribute): parts.append(node.attr); node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def own_names(code: ast.AST) -> set[str]:
    "Attributes of self, and functions: names that mean ours."
    return {n.attr for n in ast.walk(code) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"} | {
        n.name for n in ast.walk(code) if isinstance(n, ast.FunctionDef)}


def facilities(code: ast.AST, own: set[str] | None = None) -> set[str]:
    "The PyTorch facilities that code uses: torch.x, nn.x, F.x, names imported from torch, and gated tensor methods as .x."
    out, inner, own = set(), set(), own_names(code) | (own or set())
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            out |= {f"{ROOTS.get(node.module, node.module)}.{a.name}" for a in node.names} - {"torch.nn", "nn.functional"}
        if isinstance(node, ast.Import): out |= {a.name for a in node.names if a.name.startswith("torch.") and a.name not in ROOTS}
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            name = dotted(node)
            if name and name.split(".")[0] in ("torch", "nn", "F"):
                out.add(name.replace("torch.nn.functional.", "F.").replace("torch.nn.", "nn."))
                part = node.value
                while isinstance(part, ast.Attribute): inner.add(id(part)); part = part.value
            elif node.attr in GATED and node.attr not in own: out.add("." + node.attr)
    return out


def ledger(path: Path) -> set[str]:
    "The names that a lesson's ledger box adds."
    boxes = [source(c).split("This lesson adds:")[1] for c in read(path)["cells"] if c["cell_type"] == "markdown" and "**This lesson adds:**" in source(c)]
    assert len(boxes) == 1, f"{path.name} needs exactly one ledger box"
    return set(re.findall(r"`([^`]+)`", boxes[0]))


def unearned(used: set[str], earned: set[str]) -> set[str]:
    "Facilities not covered by a name in the ledger; `torch.linalg` covers `torch.linalg.qr`, and `.relu` `torch.relu`."
    def covered(name):
        tail = name.split(".")[-1]
        return any(name == e or name.startswith(e + ".") for e in earned) or (
            name.startswith(".") and any(e.split(".")[-1] == tail or e == tail for e in earned))
    return {u for u in used if not covered(u)}


@by_lesson
def test_nothing_is_used_before_it_is_earned(path):
    earned = set().union(*map(ledger, LESSONS[:LESSONS.index(path)+1]))
    own = set().union(*[own_names(tree(m)) for m in exports(path)])
    missing = unearned(facilities(exported(path), own), earned)
    assert not missing, f"{path.name} exports code that uses {sorted(missing)} before a ledger earned it"


def test_the_ledger_lint_can_fail():
    code = ast.parse("import torch\nimport torch.nn.functional as F\nfrom torch import nn\nfrom torch.utils.data import Dataset\n"
                     "def f(x):\n    x.sum().backward()\n    return F.relu(torch.exp(x)) + torch.nn.functional.gelu(x) + nn.Linear(2, 3)(x)")
    used = facilities(code)
    assert used == {"torch.exp", "F.relu", "F.gelu", "nn.Linear", ".backward", "torch.utils.data.Dataset"}
    assert unearned(used, {"torch.exp", "F.relu", "torch.utils.data"}) == {"F.gelu", "nn.Linear", ".backward"}


# --- public names ----------------------------------------------------------------------------------------------------------

def public(module: str) -> list[str]:
    names = [ast.literal_eval(n.value) for n in tree(module).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return names[0] if names else []


@pytest.mark.parametrize("module", [*MODULES, *EXERCISES])
def test_public_names_are_documented_and_annotated(module):
    mod, bad = importlib.import_module(f"exp.{module}"), []
    for name in public(module):
        thing = getattr(mod, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)): continue
        if not thing.__doc__ or inspect.isclass(thing) and "__doc__" not in vars(thing): bad.append(f"{name}: no docstring")
        if inspect.isclass(thing) and "__init__" not in vars(thing): continue
        func = thing.__init__ if inspect.isclass(thing) else thing
        text = inspect.getsource(thing)
        for p in list(inspect.signature(func).parameters.values()):
            if p.name in ("self", "cls"): continue
            if p.annotation is p.empty and not re.search(rf"\b{p.name}\b[^\n]*#", text): bad.append(f"{name}({p.name}): neither annotation nor comment")
    assert not bad, bad


CALLS = {p.stem.replace("exercises_", "exercises."): tomllib.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT/"tests/calls").glob("*.toml"))}

FORK = """
import json, os, sys, traceback
import matplotlib.pyplot, torch, torch._dynamo   # the last is what an optimizer imports when it is made
torch.set_num_threads(1)
for line in sys.stdin:
    module, calls, folder = json.loads(line)
    failed = False
    for name, code in calls.items():
        pid = os.fork()                   # a fresh process a name, without paying for these imports each time
        if pid == 0:
            os.chdir(folder)
            said = os.open("../said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1); os.dup2(said, 2)
            try:
                space = {"torch": torch}
                exec(f"from exp.{module} import {name}", space)
                exec(code, space)
                os._exit(0)
            except BaseException:
                print(f"--- exp.{module}.{name}: {code}"); traceback.print_exc(file=sys.stdout); sys.stdout.flush()
                os._exit(1)
        failed |= os.waitpid(pid, 0)[1] != 0
    print("failed" if failed else "passed", flush=True)
"""


@pytest.fixture(scope="module")
def forker():
    "A process that has imported what is not ours, and forks one for each public name."
    with subprocess.Popen([sys.executable, "-c", FORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("module", [*MODULES, *EXERCISES])
def test_every_public_name_works_in_a_fresh_process(module, tmp_path, forker):
    calls = CALLS.get(module, {})
    names = public(module)
    assert set(calls) == set(names), f"tests/calls/{module.replace('.', '_')}.toml needs one line for each of {sorted(set(names) ^ set(calls))}"
    folder = tmp_path/"here"; folder.mkdir()
    forker.stdin.write(json.dumps([module, calls, str(folder)]) + "\n"); forker.stdin.flush()
    assert forker.stdout.readline() == "passed\n", (tmp_path/"said").read_text()


# --- exercises -----------------------------------------------------------------------------------------------------------------

def is_check(cell) -> bool:
    "A cell of an exercise notebook that hands an answer to a checker."
    return cell["cell_type"] == "code" and bool(re.match(r"check_\w+\(", source(cell)))


@pytest.mark.parametrize("path", EXERCISES.values(), ids=lambda p: p.stem)
def test_every_stub_gets_a_helpful_word_and_no_tick(path, capsys):
    space, met = {}, set()
    for cell in read(path)["cells"]:
        if cell["cell_type"] != "code" or source(cell).startswith("#| eval: false"): continue
        if not is_check(cell): exec(source(cell), space); continue
        for line in source(cell).strip().splitlines():
            capsys.readouterr()
            try: exec(line, space); word = capsys.readouterr().out
            except AssertionError as error: word = f"○ {error}"
            assert word.startswith("○") and "✓" not in word and len(word.split()) >= 6, f"{line}: say what to do, not only {word!r}"
            met.add(line.split("(")[0])
    assert met == {n for n in public(default_exp(path)) if n.startswith("check_")}, "every exported checker meets its stub"


@pytest.mark.parametrize("path", EXERCISES.values(), ids=lambda p: p.stem)
def test_solutions_pass_every_checker(path):
    stem = path.stem.removesuffix("_exercises")
    code = "\n".join(source(c) for c in read(NBS/"solutions"/f"{stem}_solutions.ipynb")["cells"] if c["cell_type"] == "code" and not source(c).startswith("#| eval: false"))
    called = {n.func.id for n in ast.walk(ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.M))) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert {n for n in public(default_exp(path)) if n.startswith("check_")} <= called       # that they pass is test_notebooks' business
    assert f"from exp.{default_exp(path)} import" in code


def test_the_map_goes_by_lesson(tmp_path, monkeypatch):
    from house import lesson_map, reading_minutes
    rows = {cells[1].split("](")[1].split(")")[0]: cells for line in lesson_map(inside_nbs=True).splitlines()[2:] for cells in [[c.strip() for c in re.split(r"(?<!\\)\|", line)]]}
    assert list(rows) == [p.name for p in LESSONS]
    for path in LESSONS: assert rows[path.name][2] == (", ".join(f"`exp.{m}`" for m in exports(path)) or "–"), path.name
    assert rows["01_matmul.ipynb"][2] == "–" and all(reading_minutes(p) >= 5 and reading_minutes(p) % 5 == 0 for p in LESSONS)


def test_every_lesson_has_exercises_and_solutions():
    stems = {p.stem for p in lessons()}
    for kind in ("exercises", "solutions"):
        assert {p.stem.removesuffix(f"_{kind}") for p in (NBS/kind).glob("*.ipynb")} == stems
    for path in lessons():
        text = "\n".join(map(source, read(path)["cells"]))
        assert f"exercises/{path.stem}_exercises.ipynb" in text and f"solutions/{path.stem}_solutions.ipynb" in text


# --- notebooks -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", lessons(), ids=lambda p: p.stem)
def test_lesson_skeleton(path):
    cells = read(path)["cells"]
    title = source(cells[0])
    assert re.match(r"# \d\d[a-z]? · \S.*\n\n> \S", title), "title, then a promise"
    assert all(word in title for word in ("[![Open in Colab]", "**You will build**", "**You need**", "**Time**"))
    text = "\n".join(source(c) for c in cells if c["cell_type"] == "markdown")
    heads = [text.index(f"## {h}") for h in ("Where we are", "The ledger", "Exercises", "Recap")]
    assert heads == sorted(heads) and "still hurts" in text[heads[-1]:]


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_notebook_hygiene(path):
    nb, raw = read(path), path.read_text(encoding="utf-8")
    assert path.stat().st_size < 1_500_000
    assert set(nb["metadata"]) <= {"kernelspec", "language_info", "accelerator", "colab"}
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    text = "".join(json.dumps(o.get("text", "")) + json.dumps({k: v for k, v in o.get("data", {}).items() if k.startswith("text")}) for o in outputs)
    assert not re.search(r"(?<![\w.:/])/(home|work|root|tmp|Users|usr|private|var)/", text + "".join(map(source, nb["cells"])).replace("/tmp/", "")), "an absolute path"
    assert "Warning:" not in text, "a warning in the outputs"
    assert "widget-view" not in raw
    run = 0
    for c in nb["cells"]:
        run = run + 1 if c["cell_type"] == "code" and not source(c).startswith("#|") else 0
        assert run <= 3, f"more than three code cells in a row before {source(c)[:60]!r}"
    long = [f"cell {i}, line {j}" for i, c in enumerate(nb["cells"]) if c["cell_type"] == "code"
            for j, line in enumerate(source(c).splitlines(), 1) if len(line) > 100]
    assert not long, f"{path.relative_to(ROOT)}, {'; '.join(long)}: more than 100 columns of code, cut off on the page"


def test_basenames_are_unique():
    names = [p.name for p in notebooks()]
    assert len(names) == len(set(names))


def test_readme_and_links_are_current():
    stale = [str(p.relative_to(ROOT)) for p, new in generated().items() if not p.exists() or p.read_bytes() != new]
    assert not stale, f"{stale} stale: run `make export`"
    assert len((ROOT/"README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_one_cell_draws_the_readmes_picture():
    assert sum(LABEL in source(c) for p in lessons() for c in read(p)["cells"] if c["cell_type"] == "code") == 1


def test_links_between_our_files_lead_somewhere():
    dead = []
    for path in [*ROOT.glob("*.md"), ROOT/"results/README.md", *notebooks()]:
        text = path.read_text(encoding="utf-8") if path.suffix == ".md" else "\n".join(source(c) for c in read(path)["cells"] if c["cell_type"] == "markdown")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not re.match(r"[a-z]+:", target) and not (path.parent/target).exists(): dead.append(f"{path.name}: {target}")
    assert not dead


# --- the package -----------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(importlib.util.find_spec("nbdev") is None, reason="this environment has no nbdev")
def test_export_and_clean_leave_no_diff(tmp_path):
    import shutil
    for name in ("nbs", "exp"): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md"): shutil.copy(ROOT/name, tmp_path/name)
    for tool in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent/tool], cwd=tmp_path, check=True, capture_output=True)
    def files(root): return {p.relative_to(root): p.read_bytes() for d in ("nbs", "exp") for p in (root/d).rglob("*") if p.is_file()
                             and not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)} | {Path("pyproject.toml"): (root/"pyproject.toml").read_bytes()}
    before, after = files(ROOT), files(tmp_path)
    assert sorted(map(str, before)) == sorted(map(str, after))
    assert not [str(p) for p in before if before[p] != after[p]], "run `make export`"


def test_importing_the_package_stays_light():
    code = "import sys, exp.training, exp.plots, exp.testing; print([m for m in ('matplotlib', 'fastprogress', 'fastcore', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_no_socket_but_loopback():
    code = "import socket; socket.create_connection(('192.0.2.1', 9), timeout=5)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "tests run offline" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT/"results").glob("*.json")), ids=lambda p: p.stem)
def test_records_are_whole(path):
    r = json.loads(path.read_text(encoding="utf-8"))
    assert {"lesson", "what", "values", "mean", "sd", "unit", "data", "scale", "device", "versions", "seeds", "seconds", "commit"} <= set(r)
    assert r["lesson"] in {p.stem for p in lessons()} and r["scale"] in ("cpu", "gpu")
    assert not re.search(r'"(/[^"/]+/|[A-Za-z]:\\\\)', path.read_text(encoding="utf-8")), "an absolute path"
    assert abs(sum(r["values"])/len(r["values"]) - r["mean"]) < 1e-6*max(1, abs(r["mean"]))
