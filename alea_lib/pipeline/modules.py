"""What one library file says, read from its syntax: what it imports, what a face exports, and a hash of its code."""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

ALL = "*"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Import(NamedTuple):
    """``name`` taken from module ``base`` (dotted, inside the package)."""

    base: str
    name: str


class Module(NamedTuple):
    """What one file says. ``file``: its path from the repository; ``face``: exported name -> module that defines
    it, of an ``__init__.py`` that only exports; ``methods``: its table MODULES; ``data``: data files that it names."""

    file: str
    digest: str
    imports: tuple[Import, ...]
    face: dict[str, str] | None
    methods: dict[str, str]
    data: tuple[str, ...]


@cache
def parse_module(file: str, text: str) -> Module:
    tree = ast.parse(text)
    top, *folders, name = file.split("/")
    here = ".".join(folders)
    nodes = list(ast.walk(tree))
    return Module(
        file=file,
        digest=sha256(syntax(tree)),
        imports=imports_of(nodes, here, top),
        face=_face(tree, here, top) if name == "__init__.py" else None,
        methods=_methods(tree),
        data=tuple(sorted(text for text in texts(nodes) if text.endswith((".yaml", ".json")))),
    )


def syntax(node) -> str:
    """A syntax tree as text, without docstrings and positions; the same in every version of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(syntax, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            value = value[1:]
        if value is not None and value != [] and name not in ("kind", "type_comment", "type_ignores"):
            fields.append(f"{name}={syntax(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def texts(nodes: Iterable[ast.AST]) -> frozenset[str]:
    """The strings that stand in code."""
    return frozenset(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))


def imports_of(nodes: Iterable[ast.AST], here: str, top: str) -> tuple[Import, ...]:
    """What code takes from the package ``top``; ``here``: the dotted package inside it that the code lies in."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            inside = [alias.name.partition(".")[2] for alias in node.names if alias.name.startswith(f"{top}.")]
            found += [as_import(module) for module in inside]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = here.split(".") if here else []
                parts = parts[: len(parts) - node.level + 1] + ([module] if module else [])
            elif module.split(".")[0] == top:
                parts = module.split(".")[1:]
            else:
                continue
            found += [Import(".".join(parts), alias.name) for alias in node.names]
    return tuple(found)


def as_import(module: str) -> Import:
    base, _, name = module.rpartition(".")
    return Import(base, name)


def _methods(tree: ast.Module) -> dict[str, str]:
    """The module-level table MODULES: name of a method -> the module beside it that holds it."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "MODULES":
            return ast.literal_eval(node.value)
    return {}


def _face(tree: ast.Module, here: str, top: str) -> dict[str, str] | None:
    """What an ``__init__.py`` exports, by ``lazy_loader.attach`` or by ``from .module import name``; None where it
    holds other code."""
    found: dict[str, str] = {}
    for node in tree.body[1:] if ast.get_docstring(tree) else tree.body:
        if isinstance(node, ast.ImportFrom):
            for base, exported in imports_of([node], here, top):
                found[exported] = base if base != here else f"{base}.{exported}"
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):  # lazy_loader.attach
            given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.value.keywords}
            found |= {name: f"{here}.{name}" for name in given.get("submodules", ())}
            for module, names in given.get("submod_attrs", {}).items():
                found |= dict.fromkeys(names, f"{here}.{module}")
        elif not isinstance(node, ast.Import) and ast.unparse(node).split(" ")[0] != "__all__":
            return None
    return found


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
