"""What the code imports is declared, what is declared is used, and bounds and pins agree."""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import Specifier
from packaging.utils import canonicalize_name

from tests.house import House, script

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "pyproject.toml").read_text()
PINS = (ROOT / "constraints.txt").read_text()

# Packages that are imported by another name than they are installed by
INSTALLED_AS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
# The GPU builds of torch bring triton; without it, tiles in plain torch take over
BROUGHT = {"triton"}


class Declared:
    """The requirements of a pyproject.toml, by extra ("" for those of every install)."""

    def __init__(self, text: str):
        project = tomllib.loads(text)["project"]
        extras = {"": project["dependencies"], **project["optional-dependencies"]}
        self.lines = [line for lines in extras.values() for line in lines]
        self.by_extra = {
            extra: {canonicalize_name(one.name): one for one in map(Requirement, lines)}
            for extra, lines in extras.items()
        }
        self.always = self.by_extra[""]
        self.everything = {name: r for some in self.by_extra.values() for name, r in some.items()}
        found = re.findall(r'^[^#\n]*"([^"]+)"[\],]*\s+# (.+)$', text, re.MULTILINE)
        self.comments = dict(found)

    def optional(self) -> set[str]:
        """Packages that only some installs have."""
        extras = (set(some) for extra, some in self.by_extra.items() if extra not in ("", "dev"))
        return set().union(BROUGHT, *extras)


DECLARED = Declared(TEXT)


def floor(requirement: Requirement) -> str | None:
    """The lowest version that a requirement admits."""
    return next((one.version for one in requirement.specifier if one.operator == ">="), None)


def third_party(imported: str) -> str | None:
    """What installs the module that is imported; None for ours and for Python's own."""
    top = imported.split(".")[0]
    if top in sys.stdlib_module_names or top in ("llmmix", "tests"):
        return None
    return canonicalize_name(INSTALLED_AS.get(top, top))


def undeclared(house: House, declared: Declared) -> list[str]:
    """Imports of what an install need not have; what is optional may be imported when asked for.

    A module that imports an optional package at its top must itself be imported in functions only.
    """
    at_load = {
        taken.module for module in house.paths for taken in house.imports(module) if taken.at_top
    }
    found = []
    for module in house.paths:
        for taken in house.imports(module):
            package = third_party(taken.module)
            if package is None or package in declared.always:
                continue
            where = house.where(module, taken.line)
            if package not in declared.optional():
                found.append(f"{where} imports {package}, which is not declared")
            elif taken.at_top and (module in at_load or script(module)):
                found.append(f"{where} imports {package} at once, which is optional")
    return found


def unused(house: House, declared: Declared) -> list[str]:
    """Packages that every install gets and nothing imports, unless their comment says so."""
    imported = {third_party(t.module) for module in house.paths for t in house.imports(module)}
    return [
        f"{name} is " + ("imported, against its comment" if name in imported else "not imported")
        for name, requirement in declared.always.items()
        if (name in imported)
        == declared.comments.get(_line(declared, requirement), "").startswith("not imported:")
    ]


def _line(declared: Declared, requirement: Requirement) -> str:
    return next(line for line in declared.lines if Requirement(line) == requirement)


def unjustified(declared: Declared) -> list[str]:
    """Requirements without a comment that says what they are for, or without a lowest version."""
    bare = [line for line in declared.lines if line not in declared.comments]
    return bare + [line for line in declared.lines if floor(Requirement(line)) is None]


def pinned_elsewhere(declared: Declared, pins: str) -> list[str]:
    """What is tested and has no pin, or one that its own bounds do not admit."""
    pinned = dict(re.findall(r"^([^#\s=]+)==(\S+)$", pins, re.MULTILINE))
    pinned = {canonicalize_name(name): exact for name, exact in pinned.items()}
    return [
        f"{name} {pinned.get(name, 'is not pinned')}"
        for name, requirement in {**declared.always, **declared.by_extra["dev"]}.items()
        if name not in pinned or not requirement.specifier.contains(pinned[name])
    ]


def too_low(
    declared: Declared,
    installed: Callable[[str], str] = version,
    asks: Callable[[str], Sequence[str] | None] = requires,
) -> list[str]:
    """Lowest versions that another requirement of ours, at its own lowest, does not admit.

    Only what is installed at its lowest version can be asked: all of it under `make test-lowest`.
    What it asks of a package that it can do without stands in an extra of that package's name.
    """
    found = []
    for name, requirement in declared.always.items():
        if not Specifier(f"=={floor(requirement)}").contains(installed(name)):
            continue
        for asked in map(Requirement, asks(name) or []):
            ours = declared.everything.get(canonicalize_name(asked.name))
            holds = asked.marker is None or asked.marker.evaluate({"extra": asked.name})
            if ours is None or not holds:
                continue
            if not asked.specifier.contains(floor(ours) or "0"):
                found.append(f"{ours} is below what {requirement} asks for: {asked}")
    return found


@pytest.fixture(scope="module")
def house():
    return House(ROOT)


def test_every_import_is_declared(house):
    assert undeclared(house, DECLARED) == []


def test_what_is_declared_is_imported_or_says_why_not(house):
    assert unused(house, DECLARED) == []


def test_each_requirement_says_what_it_is_for_and_from_which_version():
    assert unjustified(DECLARED) == []


def test_the_tested_versions_are_within_the_bounds():
    assert pinned_elsewhere(DECLARED, PINS) == []


def test_the_lowest_versions_admit_each_other():
    assert too_low(DECLARED) == []


def test_what_the_tests_import_is_declared():
    for path in (ROOT / "tests").rglob("*.py"):
        for name in imports_of(path):
            package = third_party(name)
            assert package is None or package in DECLARED.everything, f"{path} imports {name}"


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("llmmix/steps.py", "import attr\n"),
        ("llmmix/steps.py", "def f():\n    from packaging.version import Version\n"),
        ("llmmix/steps.py", "import vllm\n"),
        ("llmmix/fused/tiles.py", "import triton\n"),
        ("recipes/dco.py", "from deepspeed import zero\n"),
        ("eval/speed.py", "def f():\n    import pytest\n"),
    ],
)
def test_an_import_that_an_install_may_lack_is_found(house, file, text):
    found = undeclared(house.planted(file, text), DECLARED)
    assert [entry.split(":")[0] for entry in found] == [file]


@pytest.mark.parametrize(
    ("before", "after", "rule", "named"),
    [
        ('    "numpy', '    "attrs>=25",  # unused\n    "numpy', "unused", "attrs"),
        ("# tensors", "# not imported: tensors", "unused", "torch"),
        ("# the figures of a report", "", "unjustified", "matplotlib"),
        ("# fast sampling on a GPU", "", "unjustified", "vllm"),
        ("rich>=13", "rich", "unjustified", "rich"),
        ('    "numpy', '    "attrs>=25",  # unused\n    "numpy', "pinned", "attrs"),
        ("trl>=1.16,<2", "trl>=1.17,<2", "pinned", "trl"),
    ],
)
def test_a_planted_fault_of_the_table_is_found(house, before, after, rule, named):
    assert before in TEXT
    planted = Declared(TEXT.replace(before, after, 1))
    found = {
        "unused": lambda: unused(house, planted),
        "unjustified": lambda: unjustified(planted),
        "pinned": lambda: pinned_elsewhere(planted, PINS),
    }[rule]()
    assert [re.split(r"\W", entry)[0] for entry in found] == [named]


def test_a_lowest_version_that_another_package_refuses_is_found():
    declared = Declared(re.sub('"(datasets|vllm)>=[0-9.]+', r'"\1>=0.1', TEXT))
    asked = {
        "trl": ["datasets>=4.7.0", "vllm>=0.22.0; extra == 'vllm'", "rich>=99; extra == 'x'"],
        "peft": ["rich>=99"],
    }
    above = {"peft": "99.0"}  # not at its lowest: what it asks for tells nothing
    lowest = {name: floor(one) or "0" for name, one in declared.always.items()} | above
    assert [line.split(" ")[0] for line in too_low(declared, lowest.__getitem__, asked.get)] == [
        "datasets>=0.1",
        "vllm>=0.1",
    ]
