"""The reference of a module as Markdown, read from its source without running it.

For each public name: its signature, the comment beside each parameter (docments), its docstring,
and a link to where a lesson builds it. A signature of one line stands as in the source; a longer
one becomes a table.
"""
import ast
import copy
import io
import re
import tokenize
from collections.abc import Callable
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


def comments(text: str) -> dict[int, str]:
    "The comment of each line that has one."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def escape(text: str) -> str:
    "Text that Markdown shall show as it is; `code` stays code."
    special = {"<": "&lt;", "$": "&#36;"}
    def plain(part):
        return re.sub(r"[\\*_\[\]<$|]", lambda m: special.get(m[0], "\\" + m[0]), part)
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(part if i % 2 else plain(part) for i, part in enumerate(parts))


def said_of(node: ast.AST) -> str:
    "A docstring; what it raises and where it comes from stand on lines of their own."
    text = escape(ast.get_docstring(node) or "")
    text = re.sub(r" *\b(Raises|Same as|Paper|Returns):", r"<br>**\1:**", text)
    return text.removeprefix("<br>")


def fence(text: str) -> str:
    "A block of code."
    return f"```python\n{text}\n```"


def table(rows: list[list[str]]) -> str:
    "Parameters in words: name, type, meaning."
    lines = [f"| {name} | {f'`{kind}`' if kind else ''} | {escape(meaning)} |"
             for name, kind, meaning in rows]
    return "\n".join(["| parameter | type | meaning |", "|---|---|---|", *lines])


# --- functions -----------------------------------------------------------------------------------

def without_self(func: Function) -> ast.arguments:
    "The parameters a caller gives."
    args = copy.deepcopy(func.args)
    for group in (args.posonlyargs, args.args):
        group[:] = [x for x in group if x.arg not in ("self", "cls")]
    return args


def parameters(args: ast.arguments) -> list[tuple[str, ast.arg]]:
    "(name with its stars, node) in the order of the source."
    found = [(x.arg, x) for x in [*args.posonlyargs, *args.args, *args.kwonlyargs]]
    found += [(stars + x.arg, x) for stars, x in (("*", args.vararg), ("**", args.kwarg)) if x]
    return sorted(found, key=lambda pair: (pair[1].lineno, pair[1].col_offset))


def signature(func: Function, name: str, types: bool) -> str:
    "name(parameters), with or without types, broken where it is long."
    args = without_self(func)
    for _, x in parameters(args):
        if not types: x.annotation = None
    end = f") -> {ast.unparse(func.returns)}" if types and func.returns else ")"
    line = f"{name}({ast.unparse(args)}{end}"
    if len(line) <= 88: return line
    parts = re.split(r", (?=\**\w+(?:[:=,]|$)|\*,)", ast.unparse(args))   # not inside a type
    return f"{name}(\n    " + ",\n    ".join(parts) + f",\n{end}"


def rows(func: Function, said: dict[int, str]) -> list[list[str]]:
    "A row for each line of a long signature: what it names, the types, the comment."
    by_line, last = {}, func.returns.end_lineno if func.returns else 0
    for pair in parameters(without_self(func)): by_line.setdefault(pair[1].lineno, []).append(pair)
    out = []
    for at, found in by_line.items():
        below = (n for n in range(at, func.body[0].lineno))
        mine = [at, *(n for n in below if n not in by_line and n != last
                      and max(m for m in by_line if m <= n) == at)]    # the comment may go on
        types = dict.fromkeys(ast.unparse(x.annotation) for _, x in found if x.annotation)
        out.append([", ".join(f"`{name}`" for name, _ in found), ", ".join(types),
                    " ".join(said[n] for n in mine if n in said)])
    if last and ast.unparse(func.returns) != "None":
        out.append(["**returns**", ast.unparse(func.returns), said.get(last, "")])
    return out


def function(func: Function, name: str, said: dict[int, str], doc: str = "", head: str = "") -> str:
    "Signature, docstring, table; of a class, too, whose docstring and head are given."
    found, doc = parameters(without_self(func)), doc or said_of(func)
    if found and found[-1][1].lineno > func.lineno:
        return f"{fence(head + signature(func, name, False))}\n\n{doc}\n\n{table(rows(func, said))}"
    comment = f"  # {said[func.lineno]}" if func.lineno in said else ""    # it is for all of it
    return f"{fence(head + signature(func, name, True) + comment)}\n\n{doc}"


# --- classes and modules -------------------------------------------------------------------------

def fields(node: ast.ClassDef, said: dict[int, str]) -> str:
    "The annotated attributes of a class, with their comments."
    found = [x for x in node.body
             if isinstance(x, ast.AnnAssign) and not x.target.id.startswith("_")]
    return table([[f"`{x.target.id}`", ast.unparse(x.annotation), said.get(x.end_lineno, "")]
                  for x in found]) if found else ""


def method(func: Function, owner: str, said: dict[int, str]) -> str:
    "A public method under a heading of its own; a property in one line."
    if any("property" in ast.unparse(d) for d in func.decorator_list):
        return f"**`.{func.name}`** {said_of(func)}"
    full = f"{owner}.{func.name}"
    return f"#### {full} {{ #{full} }}\n\n{function(func, f'.{func.name}', said)}"


def class_(node: ast.ClassDef, said: dict[int, str]) -> str:
    "How one is made, what it is for, its public methods."
    methods = {x.name: x for x in node.body if isinstance(x, Function)}
    bases = ", ".join(map(ast.unparse, node.bases))
    head, doc = f"class {node.name}" + (f"({bases})" if bases else ""), said_of(node)
    made = f"{fence(head)}\n\n{doc}" if "__init__" not in methods else function(
        methods["__init__"], node.name, said, doc, head + "\n\n")
    shown = [method(x, node.name, said) for name, x in methods.items()
             if not name.startswith("_") and ast.get_docstring(x)]
    return "\n\n".join(filter(None, [made, fields(node, said), *shown]))


def names(tree: ast.Module) -> list[str]:
    "What a module calls public."
    found = [ast.literal_eval(n.value) for n in tree.body
             if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return found[0] if found else []


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    "Top-level statements by the name they bind; the first one counts."
    out = {}
    for n in tree.body:
        if isinstance(n, (Function, ast.ClassDef)): found = [n.name]
        elif isinstance(n, ast.ImportFrom): found = [a.asname or a.name for a in n.names]
        else: found = [x.id for x in ast.walk(n)
                       if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
        for name in found: out.setdefault(name, n)
    return out


def entry(name: str, node: ast.stmt, said: dict[int, str], text: str) -> str:
    "What there is to say about one public name."
    if isinstance(node, ast.ClassDef): return class_(node, said)
    if isinstance(node, Function): return function(node, name, said)
    if not isinstance(node, ast.ImportFrom): return fence(ast.get_source_segment(text, node))
    return f"The same as [`exp.{node.module}.{name}`]({node.module}.md#{name})."


def module_page(path: Path, home: Callable[[str], str]) -> str:
    "The page of a module; home(name) is a link to where a lesson builds the name."
    text = path.read_text(encoding="utf-8")
    tree, said = ast.parse(text), comments(text)
    found, about = definitions(tree), escape(ast.get_docstring(tree) or "")
    parts = [f"# exp.{path.stem}", f"> {about}"]
    for name in names(tree):
        parts.append(f"## {name} {{ #{name} }}")
        if not isinstance(found[name], ast.ImportFrom): parts.append(f"Built in {home(name)}")
        parts.append(entry(name, found[name], said, text))
    return "\n\n".join(parts) + "\n"
