"""A small model and small datasets that most tests share."""

import gc
import os
import shutil

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
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from llmmix import builtin, files
from llmmix.padding_free import LENGTHS
from tests.checkpoint import save_random_checkpoint
from tests.ranks import run_on_two_ranks

gc.freeze()  # what the imports left: each trainer collects garbage, and would go through it anew
torch.set_num_threads(1)  # small tensors, and no fight for cores with a torchrun beside
disable_progress_bars()
transformers_logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def claims_end_with_a_test():
    """As they end with a process: a run of each test would hold a file open."""
    yield
    for folder in list(files._claimed):
        files.release(folder)


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of builtin:tiny, without the minute of training its model."""
    return builtin.train_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """A folder with a random two-layer Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_checkpoint(folder, tokenizer)
    return str(folder)


@pytest.fixture(scope="session")
def tied_checkpoint(checkpoint, tmp_path_factory):
    """The checkpoint, with a head that gives two tokens each logit."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("tied") / "checkpoint")
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[1::2] = weight[0::2][: len(weight[1::2])]
    model.save_pretrained(folder)
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


@pytest.fixture
def batches_read(monkeypatch):
    """Rows and columns of what each forward of a model reads.

    What a model is compared with itself on is left out.
    """
    read, forward = [], torch.nn.Embedding.forward
    compared = len(LENGTHS), max(LENGTHS)

    def noted(self, ids):
        read.extend({tuple(ids.shape)} - {compared})
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", noted)
    return read


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
