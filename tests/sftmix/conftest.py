"""Settings and rows of stage 1."""

import pytest

from llmmix import SFTMixConfig


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    return SFTMixConfig(
        str(tmp_path / "run"),
        bf16=False,
        use_cpu=True,
        max_steps=4,
        disable_tqdm=True,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=5,
        learning_rate=1e-2,
    )


@pytest.fixture
def rows(math_rows):
    return math_rows.remove_columns("confidence")
