"""A small model and small datasets that most tests share."""

import gc
import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One GPU: over several, a trainer would split a batch, and TRL a model that it loads
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when transformers imports it

from datasets import Dataset, disable_progress_bars
from filelock import FileLock
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from llmmix import builtin
from tests.ranks import run_on_two_ranks

gc.freeze()  # what the imports left: each trainer collects garbage, and would go through it anew
torch.set_num_threads(1)  # small tensors, and no fight for cores with a torchrun beside
disable_progress_bars()
transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of builtin:tiny, without the minute of training its model."""
    return builtin.train_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """A folder with a random two-layer Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.2,  # far from uniform, so that losses differ between rows
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(checkpoint):
    return LlamaForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def math_rows():
    """24 rows of uneven lengths, with a confidence column."""
    return _with_confidence(_rows("math", 24))


@pytest.fixture(scope="session")
def preference_rows():
    return _rows("preferences", 16)


@pytest.fixture(scope="session")
def uneven_rows():
    """37 rows of each, which fill no batch."""
    return {"math": _with_confidence(_rows("math", 37)), "preferences": _rows("preferences", 37)}


def _rows(name, count):
    rows = builtin.dataset(f"builtin:{name}", "1,3")["train"]
    return rows.select([*range(count // 2), *range(1000, 1000 + count - count // 2)])


def _with_confidence(rows):
    generator = torch.Generator().manual_seed(0)
    return rows.add_column("confidence", (-torch.rand(len(rows), generator=generator)).tolist())


@pytest.fixture
def text_rows():
    return Dataset.from_dict({"text": ["2+2=4", "3+4=7", "10-3=7", "6*7=42"]})


@pytest.fixture(scope="session")
def two_ranks(checkpoint, uneven_rows, tmp_path_factory, request):
    """The folder that one launch of tests/two_ranks.py wrote, for every test and every worker."""
    root = tmp_path_factory.getbasetemp()
    workers = getattr(request.config, "workerinput", None)
    folder = (root if workers is None else root.parent) / "two_ranks"
    with FileLock(f"{folder}.lock"):
        printed = folder / "printed.txt"
        if not printed.exists():
            folder.mkdir(exist_ok=True)
            for name, rows in uneven_rows.items():
                rows.to_json(folder / f"{name}.jsonl")
            printed.write_text(run_on_two_ranks("tests.two_ranks", checkpoint, folder).stdout)
    return folder
