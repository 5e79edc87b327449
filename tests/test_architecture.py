"""The rules of the layout, asserted over the syntax trees."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedConfig, Trainer
from trl import DPOTrainer, SFTTrainer

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "llmmix").rglob("*.py"))
SCRIPTS = [*sorted((ROOT / "recipes").glob("*.py")), *sorted((ROOT / "eval").glob("*.py"))]
METHODS = ["dco", "sftmix", "rpo", "unlearning/flat", "unlearning/trainer"]

# Everything private of TRL's or transformers' trainers that the library touches, and where
TRAINERS = "dco.py sftmix.py rpo.py unlearning/flat.py unlearning/trainer.py"
PRIVATE = {
    "_get_train_sampler": (
        Trainer,
        "sftmix.py unlearning/flat.py unlearning/trainer.py mixing/attach.py",
    ),
    "_prepare_dataset": (SFTTrainer, "mixing/domains.py"),
    "_send_telemetry": (SFTTrainer, TRAINERS),
    "_tag_names": (SFTTrainer, TRAINERS),
    "_paper": (SFTTrainer, TRAINERS),
    "_name": (SFTTrainer, TRAINERS),
    "_attn_implementation": (PreTrainedConfig, "sampling/engine.py"),
}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_the_arithmetic_of_the_head_imports_torch_alone():
    elsewhere = {"fused/kernels": {"triton"}, "fused/sharding": {"deepspeed"}}
    for name in ("logprobs", "fused/tiles", "fused/kernels", "fused/sharding"):
        names = imports(ROOT / f"llmmix/{name}.py")
        foreign = roots(names) - sys.stdlib_module_names - {"torch", "llmmix"}
        assert foreign == elsewhere.get(name, set())
        ours = {n.split(".")[1] for n in names if n.startswith("llmmix.")}
        assert ours <= {"fused"}


def test_the_sampler_knows_no_trainer():
    for name in ("controllers", "draws", "sampler"):
        foreign = roots(imports(ROOT / f"llmmix/mixing/{name}.py")) - sys.stdlib_module_names
        assert foreign <= {"numpy", "torch", "llmmix"}, name


def test_laws_are_arithmetic():
    allowed = {
        "numpy",
        "scipy",
        "sklearn",
        "joblib",
        "threadpoolctl",
        "pandas",
        "llmmix",
        "rich",
        "matplotlib",
    }
    for path in sorted((ROOT / "llmmix/laws").glob("*.py")):
        names = imports(path)
        assert roots(names) - sys.stdlib_module_names <= allowed, path.name
        ours = {n for n in names if n.startswith("llmmix.") and "llmmix.laws" not in n}
        assert {n.split(".")[1] for n in ours} <= {"figures", "files"}, path.name


def test_head_knows_no_method_and_no_trl():
    names = imports(ROOT / "llmmix/head.py")
    assert "trl" not in roots(names)
    ours = {name.rpartition(".")[0] for name in names if name.startswith("llmmix")}
    assert ours <= {"llmmix.logprobs", "llmmix.fused.tiles", "llmmix.fused.sharding"}


@pytest.mark.parametrize("method", METHODS)
def test_methods_share_functions_never_configs_or_trainers(method):
    siblings = {f"llmmix.{m}.".replace("/", ".") for m in METHODS if m != method}
    for name in imports(ROOT / f"llmmix/{method}.py"):
        if any(name.startswith(sibling) for sibling in siblings):
            assert name.rpartition(".")[2].islower(), name


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_library_does_not_import_what_is_built_on_it(path):
    for name in imports(path):
        assert not name.startswith(("llmmix.recipes", "llmmix.eval", "tests")), name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_scripts_use_public_names_and_not_each_other(path):
    for name in imports(path):
        assert not name.startswith(("llmmix.recipes", "llmmix.eval")), name
        if name.startswith("llmmix"):
            assert not any(part.startswith("_") for part in name.split(".")), name


def test_cli_imports_the_standard_library_alone():
    assert roots(imports(ROOT / "llmmix/cli.py", top_level_only=True)) <= sys.stdlib_module_names


def test_import_of_the_package_is_instant():
    code = (
        "import sys, llmmix, llmmix.cli; print([m for m in ('torch', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve():
    import llmmix

    for name in llmmix.__all__:
        assert getattr(llmmix, name).__name__ == name
    with pytest.raises(AttributeError, match="Nope"):
        _ = llmmix.Nope


@pytest.mark.parametrize("name", PRIVATE)
def test_private_upstream_names_are_still_there(name):
    owner, _ = PRIVATE[name]
    assert hasattr(owner, name), f"{owner.__name__} lost {name}, which {PRIVATE[name][1]} needs"


def test_trls_trainers_keep_metrics_by_mode():
    for owner in (SFTTrainer, DPOTrainer):
        source = inspect.getsource(owner.__init__)
        assert 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in source


def defined(path: Path) -> set[str]:
    """Functions, classes and attributes that a file sets."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    stored = (n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return names | {n.attr for n in stored}


def test_no_other_private_upstream_name_is_used():
    """A private attribute is one that the same file defines, or stands in PRIVATE.

    Mixture laws fill in what their base class, in a file beside theirs, leaves open.
    """
    known = {*PRIVATE, "_metrics", "_asdict"}
    used = set()
    for path in LIBRARY:
        files = path.parent.glob("*.py") if path.parent.name == "laws" else [path]
        own = {name for file in files for name in defined(file)}
        nodes = ast.walk(ast.parse(path.read_text()))
        private = {n.attr for n in nodes if isinstance(n, ast.Attribute) and n.attr[0] == "_"}
        used |= {f"{path.name}: {name}" for name in private - own - known}
    assert not {use for use in used if ": __" not in use}, "list them in PRIVATE, with a reason"


@pytest.mark.parametrize("path", [*LIBRARY, *SCRIPTS], ids=lambda p: p.stem)
def test_no_asserts_outside_tests(path):
    assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_scripts_are_named_and_described(path):
    assert ast.get_docstring(ast.parse(path.read_text())), path
