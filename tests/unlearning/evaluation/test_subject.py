"""What is measured is kept whole, or measured again."""

import pytest

from llmmix.unlearning.evaluation.subject import keep_in_cache
from tests.dying import dies_at

VALUE = [{"nll": 1.5, "said": "é"}, None]


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Measures a value, and counts how often that was necessary."""
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path))
    times = []

    def go(value=VALUE):
        keep = keep_in_cache({"model": "m"})
        return keep("scores", "data", {}, lambda: times.append(1) or value)

    return go, times


@pytest.mark.parametrize("value", [VALUE, None], ids=["list", "null"])
def test_half_a_measurement_is_measured_again(value, measure, tmp_path):
    go, times = measure
    assert go(value) == value and go(value) == value and len(times) == 1
    (file,) = (tmp_path / "unlearning").iterdir()
    whole = file.read_bytes()
    for n, length in enumerate((0, 1, len(whole) - 1), start=2):
        file.write_bytes(whole[:length])
        assert go(value) == value and len(times) == n
        assert file.read_bytes() == whole


def test_a_kill_while_a_measurement_is_kept_leaves_none(measure, tmp_path):
    go, times = measure
    assert dies_at(9, go)
    assert go() == VALUE and len(times) == 1
    assert go() == VALUE and len(times) == 1
