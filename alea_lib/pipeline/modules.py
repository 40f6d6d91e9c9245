"""What one library file says, read from its syntax: what it imports, exports lazily, and a hash of its code."""

import ast
import hashlib
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

ALL = "*"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Import(NamedTuple):
    """``name`` taken from module ``base`` (dotted, inside the package); ``uses``: its attributes that are used."""

    base: str
    name: str
    uses: tuple[str, ...] = (ALL,)


@dataclass(frozen=True)
class Module:
    """What one library file says. ``face``: exported name -> submodule, of a room with a lazy face; ``methods``: its
    table MODULES; ``by_name``: it calls import_module; ``data``: names of data files in its strings."""

    name: str
    digest: str
    imports: tuple[Import, ...]
    data: tuple[str, ...]
    face: dict[str, str] | None
    methods: dict[str, str] | None
    by_name: bool


@cache
def parse_module(name: str, text: str) -> Module:
    """A file by its path from the repository and its text."""
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    calls = {getattr(node.func, "attr", getattr(node.func, "id", "")) for node in nodes if isinstance(node, ast.Call)}
    top, *folders, file = name.split("/")
    return Module(
        name=name,
        digest=sha256(syntax(tree).encode()),
        imports=imports_of(tree, ".".join(folders), top),
        data=tuple(sorted({n.value for n in nodes if is_text(n) and n.value.endswith((".yaml", ".json"))})),
        face=_face(tree) if file == "__init__.py" else None,
        methods=_table(tree, "MODULES"),
        by_name="import_module" in calls,
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


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def split_name(module: str) -> tuple[str, str]:
    base, _, name = module.rpartition(".")
    return base, name


def _uses(tree: ast.AST) -> dict[str, set[str]]:
    """For each name, the attributes that are taken of it; ALL where it stands alone."""
    found: dict[str, set[str]] = {}
    inner = set()
    for node in ast.walk(tree):  # a node comes before what it holds
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.setdefault(node.value.id, set()).add(node.attr)
            inner.add(node.value)
        elif isinstance(node, ast.Name) and node not in inner:
            found.setdefault(node.id, set()).add(ALL)
    return found


def imports_of(tree: ast.AST, here: str, top: str) -> tuple[Import, ...]:
    """What a piece of code takes from the package ``top``; ``here``: the dotted package inside it that it lies in."""
    uses, found = _uses(tree), []

    def used(name: str) -> tuple[str, ...]:
        return tuple(sorted(uses.get(name, {ALL})))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == top:
                    found += [Import("", name) for name in used(alias.asname or top)]
                elif alias.name.startswith(f"{top}."):
                    base, name = split_name(alias.name.removeprefix(f"{top}."))
                    found.append(Import(base, name, used(alias.asname) if alias.asname else (ALL,)))
        elif isinstance(node, ast.ImportFrom) and (base := _base(node, here, top)) is not None:
            found += [Import(base, alias.name, used(alias.asname or alias.name)) for alias in node.names]
    return tuple(found)


def _base(node: ast.ImportFrom, here: str, top: str) -> str | None:
    """The module that names come from, dotted and relative to the package; None: not of this package."""
    module = node.module or ""
    if node.level:
        parts = here.split(".") if here else []
        return ".".join([*parts[: len(parts) - node.level + 1], *([module] if module else [])])
    if module == top or module.startswith(f"{top}."):
        return module.removeprefix(top).lstrip(".")
    return None


def _table(tree: ast.Module, name: str) -> dict[str, str] | None:
    """A module-level dict literal of strings, if there is one of that name."""
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if getattr(targets[0], "id", "") != name or not isinstance(node.value, ast.Dict):
            continue
        if all(is_text(part) for part in (*node.value.keys, *node.value.values)):
            return ast.literal_eval(node.value)
    return None


def _face(tree: ast.Module) -> dict[str, str] | None:
    """Exported name -> submodule, of a lazy face."""
    if (exports := _table(tree, "_EXPORTS")) is not None:  # the flat table of the package
        return exports
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "attach":
            given = dict(zip(("package_name", "submodules", "submod_attrs"), node.args, strict=False))
            given |= {keyword.arg: keyword.value for keyword in node.keywords}
            rooms, attributes = (
                ast.literal_eval(given.get(name, ast.Constant(None))) or {} for name in ("submodules", "submod_attrs")
            )
            return {name: name for name in rooms} | {n: sub for sub, names in attributes.items() for n in names}
    return None


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
