"""The structure of a source tree, read from its syntax alone: nothing of it is imported.

`House(root)` reads `llmmix/`, `recipes/` and `eval/` under their import names. Each function below
returns the violations of one rule as sentences, none where the rule is kept; test_architecture.py
asserts that the project keeps them all, and that a planted violation of each kind is found.
"""

import ast
import copy
import graphlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

FOLDERS = {"llmmix": "llmmix", "recipes": "llmmix.recipes", "eval": "llmmix.eval"}
PUBLIC_UNDERSCORES = {"_asdict", "_replace", "_fields"}  # documented by `typing.NamedTuple`


class Import(NamedTuple):
    """One name that a module takes from another."""

    module: str  # where the name is defined
    name: str | None  # None for the module itself
    line: int
    at_top: bool


class House:
    """The modules of a tree, by import name."""

    def __init__(self, root: Path):
        self.root = root
        self.paths: dict[str, Path] = {}
        for folder, package in FOLDERS.items():
            for path in sorted((root / folder).rglob("*.py")):
                parts = path.relative_to(root / folder).with_suffix("").parts
                name = ".".join([package, *parts]).removesuffix(".__init__")
                self.paths[name] = path
        self.texts = {name: path.read_text() for name, path in self.paths.items()}
        self.trees = {name: ast.parse(text) for name, text in self.texts.items()}
        self.faces = {name for name, path in self.paths.items() if path.name == "__init__.py"}
        self._imports: dict[str, list[Import]] = {}

    def planted(self, file: str, text: str, *, instead: bool = False) -> "House":
        """The same tree with text put at the end of a file, or in its place, or into a new one."""
        folder, _, rest = file.removesuffix(".py").partition("/")
        name = ".".join([FOLDERS[folder], *rest.split("/")]).removesuffix(".__init__")
        other = copy.copy(self)
        other.paths = {**self.paths, name: self.root / file}
        before = "" if instead else self.texts.get(name, "")
        other.texts = {**self.texts, name: f"{before}\n{text}" if before else text}
        other.trees = {**self.trees, name: ast.parse(other.texts[name])}
        # What another file takes from a face depends on the face
        keep = {} if name in self.faces else dict(self._imports)
        keep.pop(name, None)
        other._imports = keep
        return other

    def where(self, module: str, line: int | None = None) -> str:
        """A module's file as it is shown."""
        shown = self.paths[module].relative_to(self.root).as_posix()
        return shown if line is None else f"{shown}:{line}"

    def imports(self, module: str) -> list[Import]:
        """What a module takes from anywhere, in functions and for type checkers too."""
        if module not in self._imports:
            self._imports[module] = list(self._read_imports(module))
        return self._imports[module]

    def _read_imports(self, module: str) -> Iterator[Import]:
        top = {id(node) for node in self.trees[module].body}
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, None, node.lineno, id(node) in top)
            elif isinstance(node, ast.ImportFrom):
                source = "." * node.level + (node.module or "")
                for alias in node.names:
                    home, name = self.home(source, alias.name)
                    yield Import(home, name, node.lineno, id(node) in top)

    def home(self, source: str, name: str) -> tuple[str, str | None]:
        """Where a name that is imported from `source` is defined: faces hand names on."""
        if f"{source}.{name}" in self.paths:
            return f"{source}.{name}", None
        if source in self.faces:
            for node in ast.walk(self.trees[source]):
                if isinstance(node, ast.ImportFrom):
                    for alias in node.names:
                        if (alias.asname or alias.name) == name and node.module != source:
                            return self.home(node.module or "", alias.name)
        return source, name

    def classes(self, module: str) -> list[ast.ClassDef]:
        """Classes at the top level of a module."""
        return [node for node in self.trees[module].body if isinstance(node, ast.ClassDef)]

    def find_class(self, module: str, name: str) -> ast.ClassDef | None:
        """A class of ours by where it is defined."""
        return next((c for c in self.classes(module) if c.name == name), None)

    def bases(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, str]]:
        """(module, name) of each base class, ours or not."""
        taken = {}
        for found in ast.walk(self.trees[module]):
            if isinstance(found, ast.ImportFrom):
                for alias in found.names:
                    taken[alias.asname or alias.name] = (found.module or "", alias.name)
            elif isinstance(found, ast.Import):
                for alias in found.names:
                    taken[alias.asname or alias.name] = (alias.name, "")
        for base in node.bases:
            text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            first, _, rest = text.partition(".")
            if first not in taken:
                yield module, text
                continue
            source, name = taken[first]
            if rest:  # torch.autograd.Function, under `import torch`
                *path, last = rest.split(".")
                yield ".".join(filter(None, [source, name, *path])), last
            else:
                home, defined = self.home(source, name)
                yield home, defined or ""

    def line_of(self, module: str, node: ast.ClassDef) -> list[tuple[str, ast.ClassDef]]:
        """A class and its bases that are ours, nearest first."""
        line = [(module, node)]
        for home, name in self.bases(module, node):
            if home in self.paths and (base := self.find_class(home, name)) is not None:
                line += [entry for entry in self.line_of(home, base) if entry not in line]
        return line

    def upstream(self, module: str, node: ast.ClassDef) -> list[type]:
        """The classes of other packages that a class builds on, straight or through ours."""
        found = []
        for home, ours in self.line_of(module, node):
            for source, name in self.bases(home, ours):
                if source in self.paths or source.split(".")[0] == "llmmix":
                    continue
                base = getattr(importlib.import_module(source or "builtins"), name, None)
                if isinstance(base, type):
                    found.append(base)
        return found


@cache
def private_names(owner: type) -> frozenset[str]:
    """Private names that a class of another package, or a base of it, defines or sets on itself."""
    names: set[str] = set()
    for base in owner.__mro__[:-1]:
        names |= {name for name in vars(base) if is_private(name)}
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        names |= set(set_on_self(tree))
    return frozenset(names)


def set_on_self(tree: ast.AST) -> Iterator[str]:
    """Private attributes that code sets on `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if is_self(node.value) and is_private(node.attr):
                yield node.attr


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC_UNDERSCORES


def is_self(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):  # super()
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def defined_in(node: ast.ClassDef) -> set[str]:
    """Private names that a class defines in its body or sets on itself, fields included."""
    names = set()
    for entry in node.body:
        if isinstance(entry, ast.FunctionDef | ast.ClassDef):
            names.add(entry.name)
        targets = entry.targets if isinstance(entry, ast.Assign) else []
        targets = [entry.target] if isinstance(entry, ast.AnnAssign) else targets
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    # `self._x += ...` changes what is there: another class defined it
    changed = {
        id(found.target)
        for found in ast.walk(node)
        if isinstance(found, ast.AugAssign) and isinstance(found.target, ast.Attribute)
    }
    stores = (
        found.attr
        for found in ast.walk(node)
        if isinstance(found, ast.Attribute)
        and isinstance(found.ctx, ast.Store)
        and is_self(found.value)
        and id(found) not in changed
    )
    return {name for name in names | set(stores) if is_private(name)}


# The rules


def room(module: str) -> str:
    """The file or folder of `llmmix` that a module stands in."""
    return module.split(".")[1] if "." in module else ""


def script(module: str) -> bool:
    """Whether a module is a recipe or an evaluation."""
    return module.startswith(("llmmix.recipes", "llmmix.eval"))


def arrows(house: House) -> Iterator[tuple[str, Import]]:
    """Every import of ours by ours, but those by which a package hands its own names on."""
    for module in house.paths:
        for taken in house.imports(module):
            own = module in house.faces and taken.module.startswith(module + ".")
            if taken.module in house.paths and taken.module != module and not own:
                yield module, taken


def upward_arrows(house: House, layers: Sequence[set[str]]) -> list[str]:
    """Imports of a higher layer, and rooms that stand in none."""
    rank = {name: number for number, layer in enumerate(layers) for name in layer}
    rooms = {room(module) for module in house.paths} - {""}
    found = [f"{name} stands in no layer" for name in sorted(rooms - set(rank))]
    found += [f"the layer of {name} has no such room" for name in sorted(set(rank) - rooms)]
    for module, taken in arrows(house):
        low, high = rank.get(room(module), 0), rank.get(room(taken.module), 0)
        if module != "llmmix" and low < high:
            found.append(
                f"{house.where(module, taken.line)} imports {taken.module}, which is above"
            )
    return found


def circles(house: House) -> list[str]:
    """Files, and rooms, that import each other in a ring."""
    files: dict[str, set[str]] = {module: set() for module in house.paths}
    rooms: dict[str, set[str]] = {}
    for module, taken in arrows(house):
        if module == "llmmix":
            continue
        files[module].add(taken.module)
        if room(module) != room(taken.module):
            rooms.setdefault(room(module), set()).add(room(taken.module))
    found = []
    for graph in (files, rooms):
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            found.append("a circle: " + " <- ".join(error.args[1]))
    return found


def foreign_imports(house: House, allowed: Mapping[str, set[str]]) -> list[str]:
    """Packages of others where the table does not allow them.

    Args:
        house: The tree.
        allowed: Packages by module or by a folder that ends in a dot; the longest prefix counts.
            Modules without an entry may import anything.
    """
    found = []
    for module in house.paths:
        keys = [k for k in allowed if module == k or (k.endswith(".") and module.startswith(k))]
        if not keys:
            continue
        for taken in house.imports(module):
            package = taken.module.split(".")[0]
            if package in sys.stdlib_module_names or package == "llmmix":
                continue
            if package not in allowed[max(keys, key=len)]:
                found.append(f"{house.where(module, taken.line)} imports {package}")
    unused = [k for k in allowed if not any(m == k or m.startswith(k) for m in house.paths)]
    return found + [f"{key} is allowed packages and is not there" for key in unused]


def scripts_reach_inside(house: House) -> list[str]:
    """Recipes and evaluations that import each other, or a private name; the library doing so."""
    found = []
    for module, taken in arrows(house):
        if script(taken.module):
            found.append(f"{house.where(module, taken.line)} imports the script {taken.module}")
    for module in house.paths:
        for taken in house.imports(module):
            parts = [*taken.module.split("."), taken.name or ""]
            if parts[0] == "llmmix" and any(is_private(part) for part in parts):
                found.append(f"{house.where(module, taken.line)} imports {'.'.join(parts)}")
    return found


def private_upstream(house: House, owners: Iterable[type]) -> dict[str, list[str]]:
    """Uses of private names of other packages: name -> where.

    `self._x` is ours where a class of ours defines it and no class of others below it does. `x._y`
    of another object is ours where a class of the same file defines it and no owner does.
    """
    known = frozenset().union(*map(private_names, owners))
    heirs = _defined_by_heirs(house)
    uses: dict[str, list[str]] = {}
    for module, tree in house.trees.items():
        of_file = set().union(*map(defined_in, house.classes(module)))
        inside: dict[int, tuple[frozenset[str], set[str]]] = {}
        for node in house.classes(module):
            theirs = frozenset().union(*map(private_names, house.upstream(module, node)))
            line = house.line_of(module, node)
            ours = set().union(*(heirs[home, base.name] for home, base in line))
            for name in defined_in(node) & theirs:
                uses.setdefault(name, []).append(house.where(module, node.lineno))
            inside |= {id(found): (theirs, ours) for found in ast.walk(node)}
        for found in ast.walk(tree):
            for name, of_self in _touched(found):
                theirs, ours = inside.get(id(found), (frozenset(), set()))
                if name not in (ours if of_self else of_file) or name in (
                    theirs if of_self else known
                ):
                    uses.setdefault(name, []).append(house.where(module, found.lineno))
        for taken in house.imports(module):
            parts = [*taken.module.split("."), taken.name or ""]
            if parts[0] != "llmmix" and any(is_private(part) for part in parts):
                name = ".".join(filter(None, parts))
                uses.setdefault(name, []).append(house.where(module, taken.line))
    return uses


def _defined_by_heirs(house: House) -> dict[tuple[str, str], set[str]]:
    """Private names that each class of ours, or one built on it, defines."""
    heirs: dict[tuple[str, str], set[str]] = {}
    for module in house.paths:
        for node in house.classes(module):
            for home, base in house.line_of(module, node):
                heirs.setdefault((home, base.name), set()).update(defined_in(node))
    return heirs


def _touched(node: ast.AST) -> Iterator[tuple[str, bool]]:
    """Private attributes that a node reads or sets, by name too, and whether of `self`."""
    if isinstance(node, ast.Attribute) and is_private(node.attr):
        yield node.attr, is_self(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
        name = node.args[1]
        if node.func.id in ("getattr", "setattr", "hasattr", "delattr"):
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield str(name.value), is_self(node.args[0])


def siblings_trainers(
    house: House, rooms: Collection[str], trainer: type, config: type
) -> list[str]:
    """Modules of methods, or below them, that import a trainer or config of another method.

    A method is what has a trainer. It is known by the stem of its classes: the module of
    `UnlearnTrainer` may import `UnlearnConfig`, and a room that is named after a method is its own.

    Args:
        house: The tree.
        rooms: What is asked; what is built on the methods may import what it likes.
        trainer: What trainers build on.
        config: What configs build on.
    """
    stems: dict[str, set[str]] = {}  # of the trainers and configs that a module defines
    methods = set()
    for module in house.paths:
        for node in house.classes(module):
            above = house.upstream(module, node)
            if any(issubclass(base, trainer | config) for base in above):
                stems.setdefault(module, set()).add(_stem(node.name))
            if any(issubclass(base, trainer) for base in above):
                methods.add(_stem(node.name))
    found = []
    for module, taken in arrows(house):
        name = taken.name or ""
        theirs = {_stem(name)} & methods & stems.get(taken.module, set())
        own = {
            *stems.get(module, set()),
            *(stem for stem in theirs if stem.lower() == room(module)),
        }
        above = module in house.faces or room(module) not in rooms
        if theirs - own and not above and not handed_on(house, module, name):
            found.append(f"{house.where(module, taken.line)} imports {name}")
    return found


def _stem(name: str) -> str:
    return name.removesuffix("Trainer").removesuffix("Config")


def handed_on(house: House, module: str, name: str) -> bool:
    """Whether a module without definitions of its own lists a name in `__all__`."""
    body = house.trees[module].body
    if any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body):
        return False
    return name in handed_on_by(house.trees[module])


def handed_on_by(tree: ast.Module) -> list[str]:
    """The names of a literal `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def faces_that_differ(house: House) -> list[str]:
    """Lazy tables that are not, name by name, what type checkers are told."""
    found = []
    for module in sorted(house.faces):
        tables = [
            ast.literal_eval(keyword.value)
            for node in ast.walk(house.trees[module])
            if isinstance(node, ast.Call)
            for keyword in node.keywords
            if keyword.arg == "submod_attrs"
        ]
        if not tables:
            continue
        told = {
            (node.module, alias.name)
            for node in ast.walk(house.trees[module])
            if isinstance(node, ast.ImportFrom) and node.module != "typing"
            for alias in node.names
        }
        lazy = {(f"{module}.{home}", name) for home, names in tables[0].items() for name in names}
        found += [f"{house.where(module)}: {home} {name}" for home, name in sorted(told ^ lazy)]
    return found


def oversized(house: House, lines: int, class_lines: int) -> list[str]:
    """Files and classes of the library that are too long to read at a sitting."""
    found = []
    for module, tree in house.trees.items():
        length = len(house.texts[module].splitlines())
        if length > lines:
            found.append(f"{house.where(module)} has {length} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > class_lines:
                    found.append(f"{house.where(module)}: {node.name} has {length} lines")
    return found


def unannotated(house: House) -> list[str]:
    """Public functions and methods with a parameter or a return of no stated type."""
    found = []
    for module, tree in house.trees.items():
        for scope in [tree, *(c for c in house.classes(module) if not is_private(c.name))]:
            for node in scope.body:
                if not isinstance(node, ast.FunctionDef) or is_private(node.name):
                    continue
                given = node.args
                named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
                named += [extra for extra in (given.vararg, given.kwarg) if extra is not None]
                bare = [a.arg for a in named if a.annotation is None and not is_self_name(a.arg)]
                if node.returns is None and node.name != "__init__":
                    bare.append("return")
                if bare:
                    where = house.where(module, node.lineno)
                    found.append(f"{where} {node.name}: {', '.join(bare)}")
    return found


def is_self_name(name: str) -> bool:
    return name in ("self", "cls", "ctx")  # ctx: of an autograd function


def half_files(house: House, allowed: Collection[str]) -> list[str]:
    """Files that are written in their place, where a kill leaves half of one."""
    found = []
    for module, tree in house.trees.items():
        safe: set[ast.AST] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.With) and "replacing(" in ast.unparse(node.items[0]):
                safe.update(ast.walk(node))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or node in safe or module in allowed:
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            opened = name == "open" and any(str(mode)[:1] in ("w", "x") for mode in modes)
            if opened or name in ("write_text", "write_bytes", "to_json", "to_csv", "dump"):
                found.append(f"{house.where(module, node.lineno)} writes by {name}")
    return found


def unnamed_encodings(house: House) -> list[str]:
    """Text that is read or written in the encoding of the locale."""
    return [
        f"{house.where(module, node.lineno)} names no encoding"
        for module, tree in house.trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _is_text(node)
        if not any(keyword.arg == "encoding" for keyword in node.keywords)
    ]


def _is_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text, or starts a process whose text is read."""
    if any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords):
        return ast.unparse(call.func).startswith("subprocess.")
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in ("read_text", "write_text"):
        return True
    mode = [a for a in (*call.args, *(k.value for k in call.keywords)) if _is_mode(a)]
    binary = any("b" in getattr(a, "value", "") for a in mode)
    by_default = ast.unparse(call.func).partition(".")[0] in (
        "os",
        "gzip",
        "bz2",
        "lzma",
        "tokenize",
    )
    return name in ("open", "NamedTemporaryFile") and not binary and not by_default


def _is_mode(node: ast.expr) -> bool:
    value = getattr(node, "value", None)
    return (
        isinstance(node, ast.Constant) and isinstance(value, str) and set(value) <= set("rwaxbt+")
    )


def asserts(house: House) -> list[str]:
    """`assert` statements, which `python -O` removes."""
    return [
        house.where(module, node.lineno)
        for module, tree in house.trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]


def stand_ins(house: House) -> list[str]:
    """Objects made to look like another class."""
    return [
        f"{house.where(module, taken.line)} imports {taken.name}"
        for module in house.paths
        for taken in house.imports(module)
        if taken.name in ("SimpleNamespace", "Mock", "MagicMock")
    ]


def relative_imports(house: House) -> list[str]:
    """Imports by dots."""
    return [
        house.where(module, taken.line)
        for module in house.paths
        for taken in house.imports(module)
        if taken.module.startswith(".")
    ]


def namesakes(house: House) -> list[str]:
    """Modules that share their name with a function or class in them: a package can hold one."""
    return [
        f"{house.where(module, node.lineno)} defines {node.name}"
        for module, tree in house.trees.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.name == module.rpartition(".")[2]
    ]


def undescribed(house: House) -> list[str]:
    """Modules without a docstring."""
    return [
        house.where(module) for module, tree in house.trees.items() if not ast.get_docstring(tree)
    ]
