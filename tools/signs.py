"""The vital signs of exported code: its lines, what part of them are checks, names, lengths of functions, annotations.

usage: python tools/signs.py [exp]      (a folder of modules; a mirror, of which tests/test_house.py holds the firm parts)
"""
import ast
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

COLUMNS, LINES = 100, 40      # the longest line, and the longest function
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Signs:
    "What one module shows."
    code: int                     # lines, without docstrings, comments and empty ones
    checks: int                   # of them, those that refuse something
    public: int                   # top-level functions and classes
    private: int
    lengths: list[int]            # of all functions, their signature and docstring included
    parameters: int               # of public functions
    bare_parameters: list[str]    # those without annotation
    long_lines: list[int]
    long_functions: list[str]

    def row(self, name: str) -> str:
        lengths = sorted(self.lengths) or [0]
        share = 100*(1 - len(self.bare_parameters)/max(1, self.parameters))
        return (f"{name:12}{self.code:6}{100*self.checks/max(1, self.code):8.1f} %{self.public:8}{self.private:9}"
                f"{statistics.median(lengths):8}{lengths[int(.9*(len(lengths) - 1))]:5}{lengths[-1]:5}{share:9.0f} %")


def refusing(node: ast.AST) -> bool:
    "Is this a statement that only refuses: a raise, an `if` or `except` that raises, or a whole function called check?"
    if isinstance(node, FUNCTION): return node.name.lstrip("_").startswith("check_")
    if isinstance(node, ast.If): return not node.orelse and all(isinstance(b, ast.Raise) for b in node.body)
    return isinstance(node, ast.Raise) or isinstance(node, ast.ExceptHandler) and any(isinstance(b, ast.Raise) for b in node.body)


def span(node: ast.AST) -> range: return range(node.lineno, node.end_lineno + 1)


def documentation(tree: ast.Module) -> set[int]:
    "The lines of docstrings."
    homes = [n for n in ast.walk(tree) if isinstance(n, (*FUNCTION, ast.ClassDef, ast.Module)) and ast.get_docstring(n) is not None]
    return {line for n in homes for line in span(n.body[0])}


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    "All but self, cls, *args and **kwargs."
    arguments = function.args
    return [a for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs if a.arg not in ("self", "cls")]


def measure(path: Path) -> Signs:
    "The signs of one module."
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    words = documentation(tree)
    code = {i for i, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#") and i not in words}
    functions = [n for n in ast.walk(tree) if isinstance(n, FUNCTION)]
    public = [f for f in functions if not f.name.startswith("_") or f.name == "__init__"]
    top = [n.name for n in tree.body if isinstance(n, (*FUNCTION, ast.ClassDef))]
    header = next((set(span(n)) for n in tree.body[:2] if "__all__" in ast.unparse(n)), set())      # nbdev writes it
    return Signs(
        code=len(code), checks=len(code & {i for n in ast.walk(tree) if refusing(n) for i in span(n)}),
        public=sum(not name.startswith("_") for name in top), private=sum(name.startswith("_") for name in top),
        lengths=[len(span(f)) for f in functions],
        parameters=sum(len(parameters(f)) for f in public),
        bare_parameters=[f"{f.name}({p.arg})" for f in public for p in parameters(f) if p.annotation is None],
        long_lines=[i for i, line in enumerate(lines, 1) if len(line) > COLUMNS and i not in header],
        long_functions=[f.name for f in functions if len(span(f)) > LINES])


def total(all_signs: list[Signs]) -> Signs:
    "The signs of several modules together."
    parts = [[getattr(signs, name) for signs in all_signs] for name in Signs.__dataclass_fields__]
    return Signs(*[sum(part, []) if isinstance(part[0], list) else sum(part) for part in parts])


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent/"exp")
    found = {p.stem: measure(p) for p in sorted(root.glob("*.py")) if not p.name.startswith("_")}
    print(f"{'module':12}{'code':>6}{'checks':>10}{'public':>8}{'private':>9}{'median':>8}{'p90':>5}{'max':>5}{'annotated':>11}")
    for name, signs in found.items(): print(signs.row(name))
    print(total(list(found.values())).row("all"))


if __name__ == "__main__": main()
