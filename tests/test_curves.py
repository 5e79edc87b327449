from types import SimpleNamespace

import pytest

from llmmix import curves
from llmmix.curves import draw_training, last_values


@pytest.fixture
def drawn(monkeypatch):
    """The panels of the last figure: title -> its axis."""
    found = {}

    def keep(figure):
        found["axes"] = {axis.get_title(): axis for axis in figure.axes}
        found["names"] = [text.get_text() for one in figure.legends for text in one.get_texts()]
        return b""

    monkeypatch.setattr(curves, "png", keep)
    return lambda *args: (draw_training(*args), SimpleNamespace(**found))[1]


def history(scale=1.0, evaluated=("eval_loss",)):
    logged = [{"loss": scale / n, "grad_norm": 0.5, "step": n, "epoch": n} for n in (1, 2, 3)]
    logged += [dict.fromkeys(evaluated, 2 * scale / n) | {"step": n} for n in (1, 3)]
    return [*logged, {"train_loss": 0.5, "eval_runtime": 9.0, "step": 3}]


def points(axis):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]


def test_training_and_evaluation_share_a_panel(drawn):
    found = drawn({"run": history(evaluated=("eval_loss", "eval_code_loss"))}, {})
    assert list(found.axes) == ["loss", "grad_norm"]
    evaluated = ([1, 3], [2.0, 2 / 3])
    assert points(found.axes["loss"]) == [([1, 2, 3], [1, 1 / 2, 1 / 3]), evaluated, evaluated]
    assert found.names == ["training", "evaluation", "evaluation, code"]


def test_losses_of_methods_have_panels_of_their_own(drawn):
    runs = {"a": history(), "b": history(100.0), "c": history(2.0)}
    found = drawn(runs, {"a": "SFT", "b": "DCO", "c": "SFT"})
    assert list(found.axes) == ["loss, SFT", "loss, DCO", "grad_norm, SFT", "grad_norm, DCO"]
    assert [len(points(found.axes[f"loss, {method}"])) for method in ("SFT", "DCO")] == [5, 2]
    assert set(found.names) == {"a", "b", "c", "evaluation"}
    together = drawn(runs, {})
    assert list(together.axes) == ["loss", "grad_norm"]


def test_more_runs_than_colours_are_all_drawn_and_differ(drawn):
    found = drawn({f"run {i}": history(evaluated=()) for i in range(20)}, {})
    lines = found.axes["loss"].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20
    assert found.names == [f"run {i}" for i in range(20)]


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("last", [0.98, 0.15, 0.09, 1e-5])
def test_the_axis_of_a_loss_has_numbers(drawn, scale, last):
    logged = [{"loss": scale * value, "step": i} for i, value in enumerate((1.0, last))]
    axis = drawn({"run": logged}, {}).axes["loss"]
    low, high = axis.get_ylim()
    places, labels = axis.get_yticks(), [text.get_text() for text in axis.get_yticklabels()]
    seen = [t for place, t in zip(places, labels, strict=True) if low <= place <= high and t]
    assert len(seen) >= 3 and len(set(seen)) == len(seen)


def test_last_values():
    assert last_values(history()) == {
        "loss": 1 / 3,
        "grad_norm": 0.5,
        "eval_loss": 2 / 3,
        "train_loss": 0.5,
        "eval_runtime": 9.0,
    }
