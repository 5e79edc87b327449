"""The settings of the unlearning losses: their defaults, and what is refused."""

import math

import pytest

from llmmix import UnlearnConfig, UnlearnTrainer
from llmmix.unlearning.config import check_needs
from llmmix.unlearning.loss_table import LOSSES
from tests.unlearning.runs import FORGET, RETAIN, SETTINGS

pytestmark = pytest.mark.usefixtures("quick_collections")


def test_rows_to_retain_are_given_where_they_are_used(checkpoint, tmp_path):
    def make(retain=None, **given):
        config = UnlearnConfig(str(tmp_path), **SETTINGS, **given)
        return UnlearnTrainer(checkpoint, config, train_dataset=FORGET, retain_dataset=retain)

    for loss in LOSSES:
        extra = {"epsilon": 1.0} if "epsilon" in LOSSES[loss].settings else {}
        if LOSSES[loss].retain_weight > 0:
            with pytest.raises(ValueError, match=f"loss='{loss}'.*rows to retain.*retain_dataset"):
                make(loss=loss, **extra)
        if not LOSSES[loss].retain_required:
            with pytest.raises(
                ValueError, match="does not use rows to retain with retain_weight 0"
            ):
                make(RETAIN, loss=loss, retain_weight=0.0)
    with pytest.raises(ValueError, match="`max_retain_loss` watches rows to retain"):
        make(loss="ceu", max_retain_loss=3.0)
    check_needs(UnlearnConfig("out", loss="npo"), True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "gradient"}, "`loss` must be one of grad_ascent, grad_diff.*'gradient'"),
        ({"reference": "other"}, "`reference` must be one of auto, adapter.*'other'"),
        ({"retain_loss": "l2"}, "`retain_loss` must be 'nll' or 'kl'"),
        ({"loss": "pdu"}, "set it"),
        ({"loss": "pdu", "epsilon": 1.0, "retain_loss": "kl"}, "leave `retain_loss` at 'nll'"),
        ({"beta": 0.0}, "`beta` must be positive, got 0.0"),
        ({"loss": "dpo", "beta": -1.0}, "`beta` must be positive"),
        ({"loss": "undial", "beta": -1.0}, "`beta` must not be negative"),
        ({"loss": "ceu", "beta": 1.0}, "`beta` is no setting of 'ceu'"),
        ({"loss": "satimp", "beta2": -1.0}, "`beta2` must not be negative"),
        ({"forget_weight": -1.0}, "`forget_weight` must not be negative"),
        ({"retain_weight": math.nan}, "`retain_weight` must be a finite number"),
        ({"ascent_cap": -1.0}, "`ascent_cap` must not be negative"),
        ({"skip_tokens": -1}, "`skip_tokens` must not be negative"),
        ({"loss": "pdu", "epsilon": 1.0, "dual_step": -1.0}, "`dual_step` must not be negative"),
        ({"min_forget_prob": 1.0}, "`min_forget_prob` must lie between 0 and 1"),
        ({"max_retain_loss": -1.0}, "`max_retain_loss` must lie between 0 and inf"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        UnlearnConfig("out", **given)


def test_names_are_taken_in_any_case_and_settings_are_the_authors():
    assert UnlearnConfig("out", loss="Grad-Diff").loss == "grad_diff"
    args = UnlearnConfig("out", loss="simnpo")
    assert (args.beta, args.forget_weight, args.retain_weight) == (4.5, 0.125, 1.0)
    args = UnlearnConfig("out", loss="simnpo", beta=2.0, forget_weight=0.0)
    assert (args.beta, args.forget_weight, args.retain_weight) == (2.0, 0.0, 1.0)
    assert UnlearnConfig("out", loss="kl").retain_loss == "kl"
