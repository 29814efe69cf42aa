"""The reference: one page for each module, read from its source and docments without running or importing it.

nbdev's `show_doc` gives a signature only, needs the module imported, and stops at PEFT's dataclasses, whose inherited
annotations it cannot evaluate; these pages have the table of arguments, the lines of the source and the place in the book.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

KEPT = {"__init__", "__call__", "forward"}  # methods with underscores, or without a docstring, that callers meet


# ---- reading a module ----
def comments(
    source: str,  # of a module
) -> tuple:  # ({line: comment at its end}, {line: comment that fills it})
    "Every comment, without its `#`."
    ends, lines = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            (lines if token.line.strip().startswith("#") else ends)[token.start[0]] = token.string.lstrip("# ").rstrip()
    return ends, lines


def docment(
    end: int,  # the line on which an argument ends
    notes: tuple,  # of `comments`
) -> str:  # what the comment there, and those below it, say
    "The docment of an argument."
    ends, lines = notes
    said = [ends.get(end, "")]
    while end + 1 in lines:
        said, end = [*said, lines[end + 1]], end + 1
    return " ".join(filter(None, said))


def arguments(
    node: ast.FunctionDef,  # a function or method
    notes: tuple,  # of `comments`
) -> list:  # (name, type, default, docment); self and cls left out
    "The arguments in the order of the signature."
    a = node.args
    plain, stars = [*a.posonlyargs, *a.args], [("*", a.vararg), ("**", a.kwarg)]
    found = [*zip(plain, [None] * (len(plain) - len(a.defaults)) + a.defaults), *zip(a.kwonlyargs, a.kw_defaults)]
    rows = [
        (x.arg, x.annotation, d, max(x.end_lineno, d.end_lineno if d else 0))
        for x, d in found
        if x.arg not in ("self", "cls")
    ]
    rows += [(star + x.arg, x.annotation, None, x.end_lineno) for star, x in stars if x]
    last = {end: name for name, _, _, end in rows}  # several on one line: its comment is the last one's
    if node.returns:
        last.pop(node.returns.end_lineno, None)
    return [
        (name, type_of(t), unparsed(d), docment(end, notes) if last.get(end) == name else "")
        for name, t, d, end in rows
    ]


def fields(
    node: ast.ClassDef,  # a dataclass
    notes: tuple,  # of `comments`
) -> list:  # (name, type, default, docment)
    "The fields of a dataclass; a `help` in their metadata is their docment."
    rows = []
    for item in node.body:
        if not isinstance(item, ast.AnnAssign):
            continue
        default, said = item.value, docment(item.end_lineno, notes)
        if isinstance(default, ast.Call) and unparsed(default.func).endswith("field"):
            given = {k.arg: k.value for k in default.keywords}
            if "metadata" in given:
                said = ast.literal_eval(given["metadata"]).get("help", said)
            default = given.get("default") or (
                ast.Call(given["default_factory"], [], []) if "default_factory" in given else None
            )
        elif isinstance(default, ast.Call) and unparsed(default.func) == "_option":  # D2MoraConfig's: default, help
            default, said = default.args[0], ast.literal_eval(default.args[1])
        rows.append((item.target.id, type_of(item.annotation), unparsed(default), said))
    return rows


def unparsed(
    node,  # of the syntax tree, or None
) -> str:  # source, "" for None
    "A piece of the syntax tree as source."
    return ast.unparse(node) if node else ""


def type_of(
    node,  # an annotation, or None
) -> str:  # source, "" for None
    "A type; one that is named before it exists loses its quotes."
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else unparsed(node)


# ---- writing markdown ----
def plain(
    text: str,  # of a comment or a type
) -> str:  # the same as pandoc's markdown, outside code
    "Escape what markdown would take for markup; what stands between backticks stays code."
    parts = re.split(r"(`[^`|]*`)", text)
    return "".join(p if i % 2 else re.sub(r"([\\*_$<>\[\]#|~^@`{}'\"-])", r"\\\1", p) for i, p in enumerate(parts))


def typed(
    text: str,  # a type or default
) -> str:  # a span in the code font; code spans cannot hold the `|` of a table
    "Source in a table's cell."
    return f"[{plain(text.replace('`', chr(39)))}]{{.code}}" if text else ""


def table(
    rows: list,  # of `arguments` or `fields`
    returns: tuple,  # (type, docment) of the result, or None
) -> str:  # markdown, "" for no rows
    "The table of arguments."
    cells = [[typed(name), typed(t), typed(d), plain(said)] for name, t, d, said in rows]
    if returns:
        cells.append(["*returns*", typed(returns[0]), "", plain(returns[1])])
    cells = [["", "type", "default", ""], [":----", ":------", ":----", ":---------------"], *cells]
    if not any(d for _, _, d, _ in rows):
        cells = [[a, b, d] for a, b, _, d in cells]
    return "\n".join(["::: {.arguments}", *(f"| {' | '.join(c)} |" for c in cells), ":::"]) if rows or returns else ""


def signature(
    name: str,  # of a function or class
    rows: list,  # its arguments
    returns: str,  # its result's type, or ""
) -> str:  # a fenced block
    "One line where it fits, else a line for each argument."
    parts = [n + (f": {t}" if t else "") + ((" = " if t else "=") + d if d else "") for n, t, d, _ in rows]
    arrow = f" -> {returns}" if returns else ""
    line = f"{name}({', '.join(parts)}){arrow}"
    if len(line) > 96:
        line = f"{name}(\n" + "".join(f"    {p},\n" for p in parts) + f"){arrow}"
    return f"```python\n{line}\n```"


def summary(node) -> str:  # first line of the docstring
    "What a definition says of itself."
    return (ast.get_docstring(node) or "").split("\n")[0]


def function_entry(
    node: ast.FunctionDef,  # a function or method
    notes: tuple,  # of `comments`
    name: str,  # as shown
) -> list:  # paragraphs
    "Signature, docstring, table."
    rows, result = arguments(node, notes), type_of(node.returns)
    returns = (result, docment(node.returns.end_lineno, notes)) if node.returns and result != "None" else None
    shown = [(n, t if len(t) < 60 else "", d, s) for n, t, d, s in rows]
    described = table(rows, returns) if any(r[3] for r in rows) or (returns and returns[1]) else ""
    return [signature(name, shown, result), plain(summary(node)), described]


def entry(
    node,  # a definition of the module
    notes: tuple,  # of `comments`
    level: int,  # of its heading
) -> list:  # paragraphs, the heading left out
    "A function or a class with its methods."
    if isinstance(node, ast.FunctionDef):
        return function_entry(node, notes, node.name)
    rows = fields(node, notes) if any("dataclass" in unparsed(d) for d in node.decorator_list) else []
    bases = ", ".join(map(unparsed, node.bases))
    parts = [
        f"```python\nclass {node.name}{f'({bases})' if bases else ''}\n```",
        plain(summary(node)),
        table(rows, None),
    ]
    for method in [m for m in node.body if isinstance(m, ast.FunctionDef)]:
        public = not method.name.startswith("_") and ast.get_docstring(method)
        if public or (method.name in KEPT and any(r[3] for r in arguments(method, notes))):
            parts += [
                f"{'#' * (level + 1)} {node.name}.{plain(method.name)} {{#{node.name.lower()}.{method.name.lower()}}}",
                *function_entry(method, notes, method.name),
            ]
    return parts


def exported(
    tree: ast.Module,  # of a module
) -> dict:  # name -> its node, in the order of the source
    "What the module offers: the names of `__all__`, where they are defined."
    names = next(
        (
            ast.literal_eval(n.value)
            for n in tree.body
            if isinstance(n, ast.Assign) and unparsed(n.targets[0]) == "__all__"
        ),
        [],
    )
    found = {}
    for node in tree.body:
        for name in (
            [node.name]
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            else [unparsed(t) for t in getattr(node, "targets", [getattr(node, "target", None)]) if t]
        ):
            if name in names:
                found.setdefault(name, node)
    return found


def module_page(
    path: Path,  # a module
    book: str,  # its notebook's file name
    repo: str,  # address of the sources on the hosting site, up to and with the branch
) -> str:  # markdown with front matter
    "The reference of one module."
    source = path.read_text(encoding="utf-8")
    tree, notes = ast.parse(source), comments(source)
    parts = [
        f'---\ntitle: "d2mora.{path.stem}"\ndescription: "{summary(tree)}"\n---',
        f"Built step by step in [{book.removesuffix('.ipynb')}]({book}).",
    ]
    for name, node in exported(tree).items():
        where = f"[source]({repo}/d2mora/{path.name}#L{node.lineno}-L{node.end_lineno})"
        is_code = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if is_code:
            where += f" · [in the book]({book}#{name.lower()})"
        parts += [f"### {plain(name)} {{#{name.lower()} .api}}", f"::: {{.where}}\n{where}\n:::"]
        parts += entry(node, notes, 3) if is_code else constant(node, notes)
    return "\n\n".join(filter(None, parts)) + "\n"


def constant(
    node: ast.Assign,  # of an exported name
    notes: tuple,  # of `comments`
) -> list:  # paragraphs
    "A constant: its value where it is short."
    value = ast.unparse(node)
    return [
        f"```python\n{value if len(value) < 300 else value[:200].rsplit(' ', 1)[0] + ' …'}\n```",
        plain(docment(node.end_lineno, notes)),
    ]


def top_names(
    init: Path,  # the package's __init__.py
) -> dict:  # name -> the module that it is imported from
    "What `import d2mora` offers, the names that are imported late included."
    tree = ast.parse(init.read_text(encoding="utf-8"))
    names = next(
        ast.literal_eval(n.value)
        for n in tree.body
        if isinstance(n, ast.Assign) and unparsed(n.targets[0]) == "__all__"
    )
    made = {
        a.name: n.module.rpartition(".")[2] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names
    }
    return {name: made[name] for name in names}


def names_table(
    names: list,  # (module, name) to list
    nodes: dict,  # module -> its exported nodes
) -> str:  # markdown
    "A row for each name: what it is called, what it says of itself."
    said = lambda node: plain(summary(node)) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else "a constant"
    rows = [f"| [{typed(name)}](api_{stem}.qmd#{name.lower()}) | {said(nodes[stem][name])} |" for stem, name in names]
    return "\n".join(["::: {.names}", "| | |", "|:-----|:-----------|", *rows, ":::"])


def overview(
    modules: list,  # paths in reading order
    init: Path,  # the package's __init__.py
) -> str:  # markdown with front matter
    "All names on one page."
    trees = {p.stem: ast.parse(p.read_text(encoding="utf-8")) for p in modules}
    nodes = {stem: exported(tree) for stem, tree in trees.items()}
    parts = [
        '---\ntitle: "API"\ndescription: "Every exported name, with its arguments and its source."\n---',
        "## import d2mora {#top}",
        names_table([(stem, name) for name, stem in top_names(init).items()], nodes),
    ]
    for stem, tree in trees.items():
        parts += [
            f"## [d2mora.{plain(stem)}](api_{stem}.qmd) {{#{stem}}}",
            plain(summary(tree)),
            names_table([(stem, name) for name in nodes[stem]], nodes),
        ]
    return "\n\n".join(parts) + "\n"
