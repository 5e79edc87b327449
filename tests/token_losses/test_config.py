"""The settings of the token losses: their defaults, and what is refused."""

import dataclasses
import math

import pytest
from transformers import HfArgumentParser
from trl import SFTConfig

from llmmix import SFTMixConfig, TokenLossConfig, TokenLossTrainer
from llmmix.token_losses.loss_table import LOSSES

DEFAULTS = {
    "nll": {},
    "dft": {},
    "gce": {"gce_q": 0.7},
    "threshold": {"threshold_p": 0.1, "threshold_keep": "top", "gce_q": 0.0},
    "deft": {},
    "eaft": {"eaft_alpha": 1.0, "eaft_top_k": 20},
    "asft": {"asft_alpha": 0.05},
    "psft": {"psft_clip": [0.2, 0.28], "psft_snapshot_steps": 8},
    "focal": {"focal_gamma": 2.0},
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "gem": {"gem_beta": 0.7},
    "select": {"select_share": 0.6},
}
KNOBS = sorted({name for given in DEFAULTS.values() for name in given})


def test_each_loss_has_its_own_settings():
    """The defaults of its own, and none of another's; a copy of a config is the same config."""
    assert TokenLossConfig("out").loss_type == "nll"
    assert list(LOSSES) == list(DEFAULTS)
    for loss_type, own in DEFAULTS.items():
        config = TokenLossConfig("out", loss_type=loss_type, use_cpu=True)
        found = {name: getattr(config, name) for name in KNOBS}
        unset = dict.fromkeys(KNOBS) | {"label_smoothing_factor": 0.0}
        assert found == unset | own
        again = dataclasses.replace(config)
        assert {name: getattr(again, name) for name in KNOBS} == found
        for name in set(KNOBS) - set(own):
            value = {"threshold_keep": "top", "psft_clip": [0.2, 0.2]}.get(name, 0.5)
            value = 3 if name in ("eaft_top_k", "psft_snapshot_steps") else value
            with pytest.raises(ValueError, match=f"`{name}` is a setting of .*{loss_type!r}"):
                TokenLossConfig("out", loss_type=loss_type, use_cpu=True, **{name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_type": "wit"}, "`loss_type` must be one of nll, dft, gce.*'wit'"),
        ({"loss_type": "chunked_nll"}, "`loss_type` must be one of nll"),
        ({"loss_type": "gce", "gce_q": -1.5}, "`gce_q` must be -1 or more, got -1.5"),
        ({"loss_type": "gce", "gce_q": math.nan}, "`gce_q` must be a finite number"),
        ({"loss_type": "threshold", "threshold_p": 1.5}, r"`threshold_p` must lie in \[0, 1\]"),
        ({"loss_type": "threshold", "threshold_keep": "x"}, "`threshold_keep` must be 'top'"),
        ({"loss_type": "eaft", "eaft_top_k": 1}, "`eaft_top_k` must be 2 or more, or 0"),
        ({"loss_type": "eaft", "eaft_alpha": -1.0}, "`eaft_alpha` must be 0 or more"),
        ({"loss_type": "focal", "focal_gamma": -0.1}, "`focal_gamma` must be 0 or more"),
        ({"loss_type": "gem", "gem_beta": 0.0}, "`gem_beta` must be above 0"),
        ({"loss_type": "asft", "asft_alpha": -1.0}, "`asft_alpha` must be 0 or more"),
        ({"loss_type": "psft", "psft_clip": [0.2]}, "`psft_clip` must be two numbers"),
        ({"loss_type": "psft", "psft_clip": [-0.2, 0.2]}, "`psft_clip` must be 0 or more"),
        ({"loss_type": "psft", "psft_clip": [1.0, 0.2]}, "`psft_clip` must begin with a number be"),
        ({"loss_type": "psft", "psft_snapshot_steps": 0}, "`psft_snapshot_steps` must be 1"),
        ({"loss_type": "select", "select_share": 0.0}, r"`select_share` must lie in \(0, 1\]"),
        ({"loss_type": "select", "packing": True}, "takes a share of each row: set `padding_free"),
        (
            {"loss_type": "label_smoothing", "label_smoothing_factor": 1.0},
            r"`label_smoothing_factor` must lie in \[0, 1\)",
        ),
        ({"label_smoothing_factor": 0.1}, "set `loss_type` to 'label_smoothing'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TokenLossConfig("out", **given)


def test_sftmix_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="'asft'.*compares with another model, and SFTMix"):
        SFTMixConfig("out", loss_type="asft")
    with pytest.raises(ValueError, match="`dco_n_samples=4` weights cross-entropy"):
        SFTMixConfig("out", loss_type="dft", dco_n_samples=4)
    with pytest.raises(ValueError, match="`gce_q` is a setting of gce and threshold"):
        SFTMixConfig("out", gce_q=0.5)
    assert SFTMixConfig("out", loss_type="focal").focal_gamma == 2.0


def test_trainers_refuse_another_loss_function_and_two_ways_of_packing(checkpoint, math_rows):
    def make(**given):
        options = {"compute_loss_func": given.pop("func", None)}
        args = TokenLossConfig("out", use_cpu=True, bf16=False, **given)
        return TokenLossTrainer(checkpoint, args, train_dataset=math_rows, **options)

    with pytest.raises(ValueError, match="`compute_loss_func` is another loss"):
        make(func=lambda *_: None)
    with pytest.raises(ValueError, match="`padding_free=True`.*`packing=True`"):
        make(packing=True, padding_free=True)


def test_trls_config_says_the_same_here(checkpoint, math_rows):
    args = SFTConfig("out", loss_type="dft", use_cpu=True, bf16=False)
    assert TokenLossTrainer(checkpoint, args, train_dataset=math_rows).args.loss_type == "dft"


def test_a_weight_without_bound_is_told(checkpoint, math_rows, caplog):
    args = TokenLossConfig("out", loss_type="gce", gce_q=-0.5, use_cpu=True, bf16=False)
    TokenLossTrainer(checkpoint, args, train_dataset=math_rows)
    assert "`gce_q=-0.5` is below 0" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"padding_free": "false"}, "`padding_free` must be true or false, got 'false'"),
        ({"loss_type": None}, "`loss_type` must be text, got None"),
        ({"loss_type": "gce", "gce_q": "0.5"}, "`gce_q` must be a number, got '0.5'"),
        ({"loss_type": "gce", "gce_q": True}, "`gce_q` must be a number, got True"),
        ({"loss_type": "eaft", "eaft_top_k": 2.5}, "`eaft_top_k` must be a whole number, got 2.5"),
        ({"loss_type": "select", "select_share": "all"}, "`select_share` must be a number"),
        ({"loss_type": "asft", "reference_model": ["a"]}, "must be text, got list"),
        ({"loss_type": "psft", "psft_clip": 0.2}, "`psft_clip` must be two numbers.*got 0.2"),
        ({"loss_type": "psft", "psft_clip": "0.2 0.28"}, "`psft_clip` must be two numbers"),
        ({"loss_type": "psft", "psft_clip": ["a", "b"]}, "`psft_clip` must be two numbers"),
    ],
    ids=str,
)
def test_a_setting_of_another_type_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        TokenLossConfig("out", use_cpu=True, **given)


def test_a_parser_of_flags_makes_the_same_config():
    """It changes the types that the fields are said to have."""
    (config,) = HfArgumentParser(TokenLossConfig).parse_args_into_dataclasses(
        ["--output_dir", "out", "--loss_type", "psft", "--psft_clip", "0.1", "1"]
    )
    assert (config.loss_type, config.psft_clip, config.gce_q) == ("psft", [0.1, 1.0], None)
