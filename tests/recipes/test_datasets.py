"""The YAML of TRL's scripts, as their documentation writes it, runs every recipe on one dataset."""

import json

import pytest
import yaml

from llmmix import cli

COMMON = {"max_steps": 1, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
COMMON |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "logging_steps": 1}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(tmp_path, checkpoint):
    def run(name, **given):
        config = {"model_name_or_path": checkpoint, "output_dir": str(tmp_path / "out")}
        (tmp_path / "trl.yaml").write_text(yaml.safe_dump(config | COMMON | given))
        return cli.main(["run", name, "--config", str(tmp_path / "trl.yaml")])

    return run


@pytest.mark.parametrize(
    ("name", "columns", "own"),
    [
        ("dco", {"prompt": "p", "completion": "c"}, {}),
        ("sftmix", {"prompt": "p", "completion": "c", "confidence": -1.0}, {}),
        ("rpo", {"prompt": "p", "chosen": "c", "rejected": "r"}, {}),
        ("unlearn", {"question": "p", "answer": "c"}, {"loss": "simnpo", "retain_weight": 0}),
        ("flat", {"question": "p", "answer": "c"}, {}),
    ],
)
def test_a_list_of_datasets_and_a_hold_out(name, columns, own, run, tmp_path, capsys):
    def rows(letter, count):
        return [
            {k: v if isinstance(v, float) else f"{v}{letter}{n}" for k, v in columns.items()}
            for n in range(count)
        ]

    first = {"path": "json", "data_files": write(tmp_path / "rows[1].jsonl", rows("a", 6))}
    extra = [row | {"source": "b"} for row in rows("b", 4)]
    second = {"path": "json", "data_files": [write(tmp_path / "b.jsonl", extra)]}
    second |= {"split": "train[:3]", "columns": list(columns)}
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "test_split_size": 0.25}
    assert run(name, datasets=[first, second], streaming=False, **evaluated, **own) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert any(key.startswith("eval_") for entry in state["log_history"] for key in entry)
    # 3 of 6 + 3 rows are held out; the others are 3 batches
    assert state["log_history"][-1]["epoch"] == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("dco", {"datasets": [{"path": "json"}]}, "json is a format; name its files"),
        ("dco", {"datasets": [{"path": "a", "splits": "x"}]}, r"`datasets[0]`: no 'splits'"),
        ("rpo", {"datasets": [{"data_files": "a"}]}, "must have a `path`"),
        ("dco", {"datasets": [{"path": "json", "data_files": "no.jsonl"}]}, "no file no.jsonl"),
        ("dco", {"streaming": True, "max_steps": -1}, "where to end by `max_steps`"),
        ("dco", {"streaming": True, "test_split_size": 0.5}, "`test_split_size` cannot hold rows"),
        ("dco", {"streaming": True, "stepwise": True}, "stepwise needs all rows"),
        ("sftmix", {"dataset_streaming": True}, "`dataset_streaming`: SFTMix needs all rows"),
        ("flat", {"streaming": True}, "`streaming`: unlearning needs all rows"),
        ("dco", {"test_split_size": 1.5}, "must be a share between 0 and 1, or a whole number"),
        ("dco", {"test_split_size": 4000}, "holds out 4000 of 4000 rows"),
        ("mixture", {"datasets": [{"path": "a"}]}, "name each dataset as a domain"),
        ("aioli", {"test_split_size": 0.1}, "name each dataset as a domain"),
    ],
)
def test_rows_that_cannot_serve_are_refused_before_the_model_is_looked_for(
    name, given, told, run, capsys
):
    given = {"model_name_or_path": "./none", "dataset_name": "builtin:math"} | given
    if name in ("mixture", "aioli"):
        del given["dataset_name"]
    assert run(name, **given) == 2
    assert told in capsys.readouterr().err


def test_streamed_rows_train(run, tmp_path):
    rows = [{"prompt": f"{n}+{n}=", "completion": str(n + n)} for n in range(8)]
    entry = {"path": "json", "data_files": write(tmp_path / "a.jsonl", rows)}
    assert run("dco", datasets=[entry], streaming=True) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
