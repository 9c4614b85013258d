"The rules of the house: imports run one way, the ledger binds, every name is documented and stands alone, notebooks are clean."
import ast
import inspect
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from house import NBS, LABEL, lessons, notebooks, read, source, generated

EXP = ROOT/"exp"


def default_exp(path: Path) -> str | None:
    found = [m[1] for c in read(path)["cells"] if c["cell_type"] == "code" for m in [re.match(r"#\| default_exp (\S+)", source(c))] if m]
    return found[0] if found else None


LESSONS = {default_exp(p): p for p in lessons()}                                     # module -> notebook, in reading order
EXERCISES = {default_exp(p): p for p in sorted((NBS/"exercises").glob("*.ipynb"))}
ORDER = list(LESSONS)


def tree(module: str) -> ast.Module: return ast.parse((EXP/(module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))


def imports(module: str) -> list[tuple[str, str | None]]:
    "(module, name) for every import statement of a module, those inside functions included."
    out = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import): out += [(a.name, None) for a in node.names]
        if isinstance(node, ast.ImportFrom): out += [("."*node.level + (node.module or ""), a.name) for a in node.names]
    return out


# --- one way -------------------------------------------------------------------------------------------------------------

def test_every_lesson_has_a_module_and_every_module_a_lesson():
    assert None not in LESSONS and None not in EXERCISES
    made = {p.relative_to(EXP).with_suffix("").as_posix().replace("/", ".") for p in EXP.rglob("*.py") if not p.name.startswith("_")}
    assert made == set(LESSONS) | set(EXERCISES)


def back_arrows(order: list[str], edges: dict[str, set[str]]) -> list[str]:
    "Imports of a module that comes later, or of one that is no lesson."
    return [f"{m} imports {o}" for m, others in edges.items() for o in others if o not in order or order.index(o) >= order.index(m)]


def edges() -> dict[str, set[str]]:
    return {m: {name.split(".")[1] if "." in name else (what or "exp") for name, what in imports(m) if name.split(".")[0] == "exp"} for m in ORDER}


def test_imports_point_to_earlier_lessons():
    assert not back_arrows(ORDER, edges())


def test_the_test_above_can_fail():
    assert back_arrows(["a", "b"], {"a": {"b"}, "b": {"a"}}) == ["a imports b"]
    assert back_arrows(["a"], {"a": {"exercises"}}) == ["a imports exercises"]


@pytest.mark.parametrize("module", [*LESSONS, *EXERCISES])
def test_imports_are_explicit(module):
    found = imports(module)
    assert not [m for m, name in found if name == "*"], "no star imports"
    assert not [m for m, _ in found if m.split(".")[0] in ("fastcore", "nbdev", "torchvision", "IPython")]
    aliases = {a.asname for node in ast.walk(tree(module)) if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names if a.asname}
    assert aliases <= {"nn", "F", "np", "plt"}, aliases
    top = {n for node in tree(module).body if isinstance(node, (ast.Import, ast.ImportFrom))
           for n in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])}
    assert not {n for n in top if n.split(".")[0] in ("matplotlib", "fastprogress")}, "import plotting inside the functions that draw"


@pytest.mark.parametrize("module", ORDER)
def test_exported_lines_fit_the_page(module):
    header = tree(module).body[1] if "__all__" in ast.unparse(tree(module).body[1]) else None       # nbdev writes it
    long = [i for i, line in enumerate((EXP/f"{module}.py").read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 100 and not (header and header.lineno <= i <= header.end_lineno)]
    assert not long, f"exp/{module}.py, lines {long}: more than 100 columns"


# --- the ledger ------------------------------------------------------------------------------------------------------------

GATED = {"backward", "requires_grad", "requires_grad_", "grad", "detach", "softmax", "log_softmax", "logsumexp", "relu", "relu_", "tanh", "sigmoid",
         "matmul", "mm", "bmm", "mv", "addmm", "einsum", "unfold", "qr", "svd"}
ROOTS = {"torch": "torch", "nn": "nn", "F": "F", "torch.nn": "nn", "torch.nn.functional": "F"}


def dotted(node) -> str | None:
    parts = []
    while isinstance(node, ast.Attribute): parts.append(node.attr); node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def facilities(code: ast.AST) -> set[str]:
    "The PyTorch facilities that code uses: torch.x, nn.x, F.x, names imported from torch, and gated tensor methods as .x."
    out, inner, own = set(), set(), {n.attr for n in ast.walk(code) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"}
    own |= {n.name for n in ast.walk(code) if isinstance(n, ast.FunctionDef)}
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


@pytest.mark.parametrize("module", ORDER)
def test_nothing_is_used_before_it_is_earned(module):
    earned = set().union(*[ledger(LESSONS[m]) for m in ORDER[:ORDER.index(module)+1]])
    missing = unearned(facilities(tree(module)), earned)
    assert not missing, f"exp.{module} uses {sorted(missing)} before a ledger earned it"


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


@pytest.mark.parametrize("module", [*LESSONS, *EXERCISES])
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
import os, sys, json, traceback
import torch
torch.set_num_threads(1)
module, calls = json.loads(sys.stdin.read())
for name, code in calls.items():
    sys.stdout.flush()
    pid = os.fork()                       # a fresh process a name, without paying for `import torch` each time
    if pid == 0:
        try:
            space = {"torch": torch}
            exec(f"from exp.{module} import {name}", space)
            exec(code, space)
            os._exit(0)
        except BaseException:
            print(f"--- exp.{module}.{name}: {code}"); traceback.print_exc(file=sys.stdout); sys.stdout.flush()
            os._exit(1)
    if os.waitpid(pid, 0)[1]: failed = True
sys.exit(1 if "failed" in globals() else 0)
"""


@pytest.mark.parametrize("module", [*LESSONS, *EXERCISES])
def test_every_public_name_works_in_a_fresh_process(module, tmp_path):
    calls = CALLS.get(module, {})
    names = public(module)
    assert set(calls) == set(names), f"tests/calls/{module.replace('.', '_')}.toml needs one line for each of {sorted(set(names) ^ set(calls))}"
    done = subprocess.run([sys.executable, "-c", FORK], input=json.dumps([module, calls]), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


# --- exercises -----------------------------------------------------------------------------------------------------------------

def is_check(cell) -> bool:
    "A cell of an exercise notebook that hands an answer to a checker."
    return cell["cell_type"] == "code" and bool(re.match(r"check_\w+\(", source(cell)))


@pytest.mark.parametrize("path", EXERCISES.values(), ids=lambda p: p.stem)
def test_every_stub_fails_its_checker_with_a_helpful_word(path):
    space, failed = {}, set()
    for cell in read(path)["cells"]:
        if cell["cell_type"] != "code" or source(cell).startswith("#| eval: false"): continue
        if not is_check(cell): exec(source(cell), space); continue
        for line in source(cell).strip().splitlines():
            with pytest.raises(AssertionError) as caught: exec(line, space)
            assert len(str(caught.value).split()) >= 5, f"{line}: say what to do, not only {caught.value!r}"
            failed.add(line.split("(")[0])
    assert failed == {n for n in public(default_exp(path)) if n.startswith("check_")}, "every exported checker meets its stub"


@pytest.mark.parametrize("path", EXERCISES.values(), ids=lambda p: p.stem)
def test_solutions_pass_every_checker(path):
    stem = path.stem.removesuffix("_exercises")
    code = "\n".join(source(c) for c in read(NBS/"solutions"/f"{stem}_solutions.ipynb")["cells"] if c["cell_type"] == "code" and not source(c).startswith("#| eval: false"))
    called = {n.func.id for n in ast.walk(ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.M))) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert {n for n in public(default_exp(path)) if n.startswith("check_")} <= called       # that they pass is test_notebooks' business
    assert f"from exp.{default_exp(path)} import" in code


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
    for path in [ROOT/"README.md", *notebooks()]:
        text = path.read_text(encoding="utf-8") if path.suffix == ".md" else "\n".join(source(c) for c in read(path)["cells"] if c["cell_type"] == "markdown")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not re.match(r"[a-z]+:", target) and not (path.parent/target).exists(): dead.append(f"{path.name}: {target}")
    assert not dead


# --- the package -----------------------------------------------------------------------------------------------------------

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
    assert abs(sum(r["values"])/len(r["values"]) - r["mean"]) < 1e-6*max(1, abs(r["mean"]))
