# SPDX-License-Identifier: Apache-2.0
"""Print the figures of the code's shape, each beside the one to reach: ``house.py [--list] [CHECKOUT]``.

What each figure counts is the docstring of its function. All are read off the syntax tree but the climbs, for
which one disk is made. Exits with 1 if a figure that is held to its target misses it. ``--list`` names what
was counted. Standard library only, so that any checkout of this project can be measured with this one file.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType

PACKAGE = "imagecache_lib"

#: Modules and packages at the top of the package, lowest layer first. An import goes to a lower layer or
#: stays in its own package; in the lowest and the highest layer neighbours may use each other.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "errors model config events dates",
        "system",
        "store",
        "nova formats",
        "sources backends",
        "ingest",
        "spawn upkeep",
        "diagnostics observers opts",
        "admin",
        "disks",
        "manager",
        "precache cli testing __init__",
    )
)
#: As they were meant when half of the packages were still modules at the top (commit bdf7ced).
LAYERS_BEFORE: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        """errors model config events dates opts certificates checksums durable evidence host layout metrics
        notifications nova pins placing sparse store trash""",
        "qcow2 sources",
        "spawn backends",
        "upkeep",
        "manager",
        "precache cli testing __init__",
    )
)

#: What a spawn goes through from the call to the disk: not the values, nor what wraps the kernel, a file
#: format or the cache directory. Such wraps lay in these packages before too, under the names below.
FLOW = frozenset({"manager", "admin", "disks", "spawn", "ingest", "backends", "sources"})
WRAPS_BEFORE = frozenset(
    {"locks", "stage", "publish", "space", "pace", "inspection", "signature", "qemu_img", "disk_info"}
)

#: People's interfaces and test doubles are given callables by their nature.
NOT_COUNTED = frozenset({"cli", "testing"})


@dataclasses.dataclass(frozen=True)
class Module:
    """One module. Names are relative to the package: ``store.layout``."""

    name: str
    tree: ast.Module
    lines: int

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


class Checkout:
    """The modules of a checkout, and who imports whom.

    Every import counts: at the top, in a function, or for type checkers only. All say that one text cannot be
    understood without the other.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.modules: dict[str, Module] = {}
        for path in sorted((root / PACKAGE).rglob("*.py")):
            parts = path.relative_to(root / PACKAGE).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
            text = path.read_text()
            self.modules[name] = Module(name, ast.parse(text), len(text.splitlines()))
        self.imports = {name: self._imports(module) for name, module in self.modules.items()}
        self.layers = LAYERS_BEFORE if "store" in self.modules_at_top() else LAYERS

    def modules_at_top(self) -> list[str]:
        found = (self.root / PACKAGE).glob("*.py")
        return sorted(path.stem for path in found if path.stem != "__init__")

    def layer_of(self, name: str) -> int:
        """Return the number of a module's layer, lowest first.

        :raises SystemExit: its package has no layer.
        """
        top = name.partition(".")[0]
        for number, layer in enumerate(self.layers):
            if top in layer:
                return number
        raise SystemExit(f"{PACKAGE}/{top} has no layer: give it one in {__file__}")

    def reached_from(self, name: str) -> set[str]:
        """Return what a module imports, and what that imports, and so on."""
        found: set[str] = set()
        left = [name]
        while left:
            new = self.imports[left.pop()] - found
            found |= new
            left += new
        return found

    def functions(self, leave_out: Iterable[str] = ()) -> Iterator[tuple[Module, _Function]]:
        for module in self.modules.values():
            if module.top not in leave_out:
                for node in ast.walk(module.tree):
                    if isinstance(node, _Function):
                        yield module, node

    def _imports(self, module: Module) -> set[str]:
        found = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                found |= {self._module(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
                found |= {self._module(f"{node.module}.{alias.name}") for alias in node.names}
        return found - {None, module.name}  # type: ignore[return-value]

    def _module(self, dotted: str) -> str | None:
        """Return the module that an import means: ``a.b`` for ``a.b.Class``. None for another package's."""
        first, _, name = dotted.partition(".")
        if first != PACKAGE:
            return None
        while name and name not in self.modules:
            name = name.rpartition(".")[0]
        return name or "__init__"


_Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules_at_top(checkout: Checkout) -> list[str]:
    """Modules at the package's top beside its packages, ``__init__`` not counted."""
    return checkout.modules_at_top()


def import_circles(checkout: Checkout) -> list[str]:
    """Sets of modules that import each other, directly or not."""
    reached = {name: checkout.reached_from(name) for name in checkout.modules}
    circles = {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in reached
        if name in reached[name]
    }
    return sorted(" <-> ".join(sorted(circle)) for circle in circles)


def upward_arrows(checkout: Checkout) -> list[str]:
    """Imports of a module that stands in a higher layer."""
    return sorted(
        f"{name} -> {other}"
        for name, imports in checkout.imports.items()
        for other in imports
        if checkout.layer_of(other) > checkout.layer_of(name)
    )


def sideways_arrows(checkout: Checkout) -> list[str]:
    """Imports of another package of the same layer, but for the lowest and the highest. Not in the table."""
    middle = range(1, len(checkout.layers) - 1)
    return sorted(
        f"{name} -> {other}"
        for name, imports in checkout.imports.items()
        for other in imports
        if checkout.modules[other].top != checkout.modules[name].top
        and checkout.layer_of(other) == checkout.layer_of(name)
        and checkout.layer_of(name) in middle
    )


def lines_of_manager(checkout: Checkout) -> Sequence[int]:
    """Lines of ``manager.py``."""
    return range(checkout.modules["manager"].lines)


def injected_callables(checkout: Checkout) -> list[str]:
    """Parameters whose type is a callable, or a name that a module of the package gives to one.

    A Protocol whose only method is ``__call__`` is such a name; without the one
    that there was before, its figure is 65. Fields of dataclasses are not parameters: they
    hold what a program is given once. The command line and the test doubles are left out.
    """
    names = {"Callable"} | set(_callable_names(checkout))
    word = re.compile(rf"\b({'|'.join(sorted(names))})\b")
    found = []
    for module, function in checkout.functions(leave_out=NOT_COUNTED):
        arguments = function.args
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        given += [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
        found += [
            f"{module.name}.{function.name}({argument.arg})"
            for argument in given
            if argument.annotation is not None and word.search(ast.unparse(argument.annotation))
        ]
    return found


def _callable_names(checkout: Checkout) -> Iterator[str]:
    for module in checkout.modules.values():
        for node in module.tree.body:
            match node:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=value)
                    | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                ) if re.match(r"(typing\.)?Callable\[", ast.unparse(value)):
                    yield name
                case ast.ClassDef(name=name, body=body, bases=bases) if any(
                    "Protocol" in ast.unparse(base) for base in bases
                ):
                    methods = [part.name for part in body if isinstance(part, _Function)]
                    if methods == ["__call__"]:
                        yield name
        # "type X = ..." of Python 3.12, by its class's name: 3.11 parses none.
        for node in module.tree.body:
            if type(node).__name__ == "TypeAlias" and "Callable[" in ast.unparse(node):
                yield ast.unparse(node).split()[1]


def text_verdicts(checkout: Checkout) -> list[str]:
    """Functions whose success is ``None`` and whose failure is text.

    They return ``str | None``, and somewhere a clause: an f-string, a text of more than a word, or what
    another such function returned. A value that may be absent is none of these.
    """
    candidates = [
        (module, function)
        for module, function in checkout.functions()
        if function.returns is not None
        and ast.unparse(function.returns) in ("str | None", "None | str", "Optional[str]")
    ]
    verdicts: dict[str, _Function] = {}
    while True:
        names = {function.name for function in verdicts.values()}
        new = {
            f"{module.name}.{function.name}:{function.lineno}": function
            for module, function in candidates
            if _returns_clause(function, names)
        }
        if new.keys() == verdicts.keys():
            return sorted(name.partition(":")[0] for name in new)
        verdicts = new


def _returns_clause(function: _Function, verdicts: set[str]) -> bool:
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                assigned.setdefault(name, []).append(value)
            case ast.NamedExpr(target=ast.Name(id=name), value=value):
                assigned.setdefault(name, []).append(value)
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]
    for value in list(returned):
        if isinstance(value, ast.Name):
            returned += assigned.get(value.id, ())
    return any(_is_clause(value, verdicts) for value in returned)


def _is_clause(value: ast.expr, verdicts: set[str]) -> bool:
    match value:
        case ast.JoinedStr():
            return True
        case ast.Constant(value=str(text)):
            return " " in text
        case ast.BoolOp(values=parts):
            return any(_is_clause(part, verdicts) for part in parts)
        case ast.IfExp(body=body, orelse=orelse):
            return _is_clause(body, verdicts) or _is_clause(orelse, verdicts)
        case ast.NamedExpr(value=inner):
            return _is_clause(inner, verdicts)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in verdicts
    return False


def importers_of_stage(checkout: Checkout) -> list[str]:
    """Modules that take the translation of ``OSError`` from the module ``stage``."""
    found = []
    for module in checkout.modules.values():
        names = {
            alias.asname or alias.name
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if alias.name == "stage" or (node.module or "").endswith(".stage")
        }
        used = any(
            isinstance(node, ast.Attribute)
            and node.attr == "translated"
            and isinstance(node.value, ast.Name)
            and node.value.id in names
            for node in ast.walk(module.tree)
        )
        if used or "translated" in names:
            found.append(module.name)
    return found


def climbs(checkout: Checkout) -> list[str]:
    """Times that a reader who follows ``create_disk`` comes back up.

    One disk is made of an image that is not cached yet, by a manager that has started. The functions of the
    flow are listed in the order in which they are first entered. A climb is a step in this list from a module
    to one that imports it, directly or not: back to one that stands above.
    """
    command = [sys.executable, __file__, "--trace", str(checkout.root)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    functions = [
        (module, name)
        for module, name in json.loads(run.stdout)
        if module.partition(".")[0] in FLOW and module.rpartition(".")[2] not in WRAPS_BEFORE
    ]
    above = {name: checkout.reached_from(name) for name in {module for module, _ in functions}}
    return [
        f"{left}.{left_name} -> {module}.{name}"
        for (left, left_name), (module, name) in itertools.pairwise(functions)
        if left in above[module] and left != module
    ]


def trace(root: pathlib.Path) -> list[tuple[str, str]]:
    """Make one disk with the package at ``root``; return the functions as they were first entered."""
    sys.path.insert(0, str(root))
    import imagecache_lib as ic
    from imagecache_lib.testing.sources import FakeSource

    home = str(root / PACKAGE) + os.sep
    seen = set()
    found = []

    def enter(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event == "call" and code not in seen and code.co_filename.startswith(home):
            seen.add(code)
            if code.co_name.endswith(("comp>", "genexpr>")):  # no functions to a reader, nor to Python 3.12
                return
            module = code.co_filename.removeprefix(home).removesuffix(".py").replace(os.sep, ".")
            found.append((module.removesuffix(".__init__"), code.co_name))

    with tempfile.TemporaryDirectory(prefix="imagecache-house-") as directory:
        instance = pathlib.Path(directory, "instances", "instance")
        instance.mkdir(parents=True)
        config = ic.CacheConfig(instances_path=str(instance.parent))
        source = FakeSource({"image": bytes(range(256)) * 256})
        manager = ic.ImageCacheManager(config, source, backend="qcow2", observers=())
        manager.unpin("another", owner="house")  # starts it
        sys.setprofile(enter)  # of this thread alone: where another one is by then differs from run to run
        try:
            manager.create_disk("image", str(instance / "disk"))
        finally:
            sys.setprofile(None)
    return found


@dataclasses.dataclass(frozen=True)
class Figure:
    """One row of the table.

    :param before: what it was at commit bdf7ced, counted by this file.
    :param target: the most that it shall be.
    :param held: CI fails when it is more. Set it once the target is reached.
    """

    what: str
    count: Callable[[Checkout], Sequence[object]]
    before: int
    target: int
    held: bool


FIGURES = (
    Figure("modules at the package's top beside its packages", modules_at_top, 21, 9, True),
    Figure("import circles", import_circles, 3, 0, True),
    Figure("arrows that run back up", upward_arrows, 6, 0, True),
    Figure("lines of manager.py", lines_of_manager, 571, 300, True),
    Figure("parameters that are injected callables", injected_callables, 66, 25, True),
    Figure("functions whose success is None and whose failure is text", text_verdicts, 13, 0, True),
    Figure("files that import stage for stage.translated", importers_of_stage, 15, 0, True),
    Figure("climbs back up on the way of create_disk", climbs, 16, 8, True),
)


def report(counted: Mapping[str, Sequence[object]]) -> Iterator[str]:
    """Yield the table's lines."""
    yield f"{'':<60}{'before':>7}{'now':>6}{'target':>8}"
    for figure in FIGURES:
        now = len(counted[figure.what])
        state = "" if now <= figure.target else " LOST" if figure.held else " open"
        yield f"{figure.what:<60}{figure.before:>7}{now:>6}{'<= ' + str(figure.target):>8}{state}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0] + ".")
    parser.add_argument("checkout", nargs="?", default=pathlib.Path(__file__).parents[1], type=pathlib.Path)
    parser.add_argument("--list", action="store_true", help="name what was counted")
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    root = options.checkout.resolve()
    if options.trace:
        print(json.dumps(trace(root)))
        return 0
    checkout = Checkout(root)
    counted = {figure.what: figure.count(checkout) for figure in FIGURES}
    if options.list:
        for what, found in counted.items():
            if not isinstance(found, range):
                print(f"{what}:", *found, sep="\n    ")
    print(*report(counted), sep="\n")
    return int(any(figure.held and len(counted[figure.what]) > figure.target for figure in FIGURES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
