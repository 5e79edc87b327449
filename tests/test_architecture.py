"""The rules of the layout, over the syntax trees; and that a planted violation of each is found."""

import argparse
import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from trl import DPOTrainer, SFTTrainer

from tests import house as rules
from tests.house import House

ROOT = Path(__file__).parents[1]

# Low to high: a module imports its own layer and those below
LAYERS = [
    {"cli", "command_line", "files", "fused", "logprobs", "processes", "terminal", "training"},
    {"head", "head_check", "head_weights", "padding_free", "segment_attention"},
    {
        "builtin",
        "checkpoints",
        "data",
        "figures",
        "models",
        "positions",
        "precision",
        "rows",
        "steps",
    },
    {"arguments", "frozen", "padding_free_setting", "trainers"},
    {
        "dco",
        "filtering",
        "grading",
        "laws",
        "majority",
        "row_weights",
        "rpo",
        "sampling",
        "sftmix",
        "solve_rates",
        "token_losses",
    },
    {"mixing", "unlearning"},
    {"confidence", "curves", "facts", "flat", "report", "timing"},
    {"eval", "recipes"},
]
LAWS = {"numpy", "scipy", "sklearn", "pandas", "joblib", "threadpoolctl"}
FOREIGN = {
    "llmmix.logprobs": {"torch"},
    "llmmix.fused.": {"torch"},
    "llmmix.fused.kernels": {"torch", "triton"},
    "llmmix.fused.sharding": {"torch", "deepspeed"},
    "llmmix.head": {"torch", "transformers", "peft"},
    "llmmix.head_check": {"torch", "transformers"},
    "llmmix.head_weights": {"torch", "transformers", "peft"},
    "llmmix.padding_free": {"torch", "transformers", "peft"},
    "llmmix.segment_attention": {"torch", "transformers"},
    "llmmix.laws.": LAWS,
    "llmmix.laws.figures": {*LAWS, "matplotlib"},
    "llmmix.majority": {"torch"},
    "llmmix.mixing.sampler": {"numpy", "torch"},
    "llmmix.mixing.draws": {"numpy", "torch"},
    "llmmix.mixing.controllers": {"numpy", "torch"},
}
LAWS_MAY_IMPORT = {"laws", "figures", "files", "terminal"}

# Modules that write in place: the one that knows how, the command line (of the standard library
# alone), and the one that writes to /proc
WRITERS = {"llmmix.files", "llmmix.cli", "llmmix.timing.clock"}

# Private names of other packages that the library touches, and whose they are
PRIVATE = {
    "_actions": argparse.ArgumentParser,
    "_attn_implementation": PreTrainedConfig,
    "_commit_hash": PreTrainedConfig,
    "_format_action_invocation": argparse.HelpFormatter,
    "_get_grad_norm": Trainer,
    "_get_help_string": argparse.HelpFormatter,
    "_get_train_sampler": Trainer,
    "_is_stateful": PreTrainedModel,
    "_metrics": SFTTrainer,
    "_name": SFTTrainer,
    "_original_forward": Accelerator,
    "_paper": SFTTrainer,
    "_precompute_model_hash": DPOTrainer,
    "_precompute_ref_logps": DPOTrainer,
    "_prepare_dataset": SFTTrainer,
    "_prepare_inputs": Trainer,
    "_send_telemetry": SFTTrainer,
    "_set_signature_columns_if_needed": Trainer,
    "_signature_columns": Trainer,
    "_tag_names": SFTTrainer,
    "_total_train_tokens": SFTTrainer,
}


@pytest.fixture(scope="module")
def house():
    return House(ROOT)


def unlisted(house: House) -> list[str]:
    uses = rules.private_upstream(house, PRIVATE.values())
    return [f"{name}: {', '.join(places)}" for name, places in uses.items() if name not in PRIVATE]


def laws_reach_out(house: House) -> list[str]:
    return [
        f"{house.where(module, taken.line)} imports {taken.module}"
        for module, taken in rules.arrows(house)
        if rules.room(module) == "laws" and rules.room(taken.module) not in LAWS_MAY_IMPORT
    ]


RULES = {
    "layers": lambda house: rules.upward_arrows(house, LAYERS),
    "circles": rules.circles,
    "packages of others": lambda house: rules.foreign_imports(house, FOREIGN),
    "laws": laws_reach_out,
    "scripts": rules.scripts_reach_inside,
    "private upstream names": unlisted,
    "siblings' trainers": lambda house: rules.siblings_trainers(
        house, set().union(*LAYERS[:-2]), Trainer, TrainingArguments
    ),
    "faces": rules.faces_that_differ,
    "size": lambda house: rules.oversized(house, lines=350, class_lines=200),
    "types": rules.unannotated,
    "half files": lambda house: rules.half_files(house, WRITERS),
    "encodings": rules.unnamed_encodings,
    "asserts": rules.asserts,
    "stand-ins": rules.stand_ins,
    "relative imports": rules.relative_imports,
    "namesakes": rules.namesakes,
    "docstrings": rules.undescribed,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_rules_are_kept(house, rule):
    assert RULES[rule](house) == []


def test_every_private_upstream_name_is_used_and_still_there(house):
    uses = rules.private_upstream(house, PRIVATE.values())
    assert [name for name in PRIVATE if name not in uses] == []
    for name, owner in PRIVATE.items():
        # Some are set from outside the class: then its module names them
        source = inspect.getsource(sys.modules[owner.__module__])
        assert name in rules.private_names(owner) or name in source, f"{owner.__name__} lost {name}"


# What must be found: by rule, a file and its text
PLANTED = [
    ("layers", "llmmix/data.py", "def f():\n    from llmmix.mixing import sampler\n"),
    ("layers", "llmmix/data.py", "if TYPE_CHECKING:\n    from llmmix import DCOTrainer\n"),
    ("layers", "llmmix/extra.py", '"""A room of its own."""\n'),
    ("circles", "llmmix/mixing/sampler.py", "import llmmix.mixing.attach\n"),
    ("circles", "llmmix/sampling/extra.py", "from llmmix.grading import exact\n"),
    ("packages of others", "llmmix/head.py", "import trl\n"),
    ("packages of others", "llmmix/laws/extra.py", "def f():\n    import torch\n"),
    ("laws", "llmmix/laws/extra.py", "from llmmix.data import load_splits\n"),
    ("scripts", "llmmix/report.py", "from llmmix.recipes import dco\n"),
    ("scripts", "eval/speed.py", "from llmmix.dco import _check_n\n"),
    (
        "private upstream names",
        "llmmix/dco.py",
        "class A(SFTTrainer):\n    def f(self):\n        self._signature_keys += [1]\n",
    ),
    (
        "private upstream names",
        "llmmix/dco.py",
        "class A(SFTTrainer):\n    def _save_checkpoint(self):\n        return 1\n",
    ),
    ("private upstream names", "llmmix/filtering.py", "def f(x):\n    x._train_dataset = 1\n"),
    ("private upstream names", "llmmix/report.py", "y = getattr(1, '_hidden', None)\n"),
    ("private upstream names", "llmmix/report.py", "from trl.trainer import _callbacks\n"),
    ("siblings' trainers", "llmmix/filtering.py", "from llmmix.dco import DCOTrainer\n"),
    ("siblings' trainers", "llmmix/rpo.py", "from llmmix import UnlearnConfig\n"),
    ("faces", "llmmix/mixing/__init__.py", "from llmmix.mixing.draws import choose\n"),
    ("size", "llmmix/steps.py", "x = 1\n" * 351),
    ("size", "llmmix/steps.py", "class A:\n" + "    x = 1\n" * 200),
    ("types", "llmmix/steps.py", "def f(x) -> int:\n    return x\n"),
    ("types", "llmmix/steps.py", "class A:\n    def f(self):\n        return 1\n"),
    ("half files", "llmmix/report.py", "def f(path):\n    path.write_text('x')\n"),
    ("half files", "recipes/dco.py", "def f(rows, out):\n    rows.to_json(out)\n"),
    ("half files", "llmmix/data.py", "def f(path):\n    open(path, 'w')\n"),
    ("encodings", "llmmix/data.py", "def f(path):\n    return path.read_text()\n"),
    ("encodings", "llmmix/data.py", "def f(path):\n    return open(path, newline='')\n"),
    ("encodings", "llmmix/data.py", "x = subprocess.run(['a'], text=True)\n"),
    ("asserts", "llmmix/steps.py", "assert True\n"),
    ("stand-ins", "llmmix/steps.py", "from types import SimpleNamespace\n"),
    ("relative imports", "llmmix/mixing/rows.py", "from .draws import choose\n"),
    ("namesakes", "llmmix/mixing/draws.py", "def draws() -> None:\n    pass\n"),
    ("docstrings", "recipes/extra.py", "x = 1\n"),
]


@pytest.mark.parametrize(("rule", "file", "text"), PLANTED)
def test_a_planted_violation_is_found(house, rule, file, text):
    planted = house.planted(file, text, instead=rule in ("size", "docstrings"))
    assert set(RULES[rule](planted)) - set(RULES[rule](house))


def test_the_command_line_imports_the_standard_library_alone(house):
    ours = {"llmmix.cli", "llmmix.training", "llmmix.training.completeness"}
    ours |= {"llmmix.training.ranges"} | {m for m in house.trees if "command_line" in m}
    for module in ours:
        top = {taken.module for taken in house.imports(module) if taken.at_top} - ours
        assert {name.split(".")[0] for name in top} <= sys.stdlib_module_names


def test_import_of_the_package_is_instant():
    code = (
        "import sys, llmmix, llmmix.cli, llmmix.grading.verify;"
        "print([m for m in ('torch', 'trl', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "package", ["llmmix", "llmmix.mixing", "llmmix.grading", "llmmix.unlearning"]
)
def test_public_names_resolve(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(getattr(module, name), "__name__", name) == name
        assert name in dir(module)
    with pytest.raises(AttributeError, match="Nope"):
        _ = module.Nope


def test_the_wheel_holds_every_package(house):
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(house.faces)


def test_tests_stand_where_the_code_does(house):
    """As tests/mixing/test_sampler.py for llmmix/mixing/; a test may be of a whole folder."""
    rooms = {rules.room(module) for module in house.paths}
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests").as_posix()
        inside = ROOT / (folder if folder in ("eval", "recipes") else f"llmmix/{folder}")
        assert folder in (".", "real") or (inside.is_dir() and folder.split("/")[0] in rooms), path


def test_trls_trainers_keep_metrics_by_mode():
    for owner in (SFTTrainer, DPOTrainer):
        source = inspect.getsource(owner.__init__)
        assert 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in source
