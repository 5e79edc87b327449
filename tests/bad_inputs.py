"""What a user may get wrong on the command line: a list, by script, for tests/test_bad_input.py.

Each entry is a script, flags that come after good ones, and a part of the line that must be told.
`@name` is a file or folder that `write_bad_files` makes.
"""

import json
import shutil
from pathlib import Path

ROWS = [{"prompt": f"{n}+1? ", "completion": f"{n + 1}", "answer": f"{n + 1}"} for n in range(4)]
PAIRS = [{"prompt": f"{n}+1? ", "chosen": f"{n + 1}", "rejected": "0"} for n in range(4)]
FORGET = [{"question": f"Who is {n}?", "answer": f"Author {n}."} for n in range(4)]
GOOD = {"rows.jsonl": ROWS, "pairs.jsonl": PAIRS, "forget.jsonl": FORGET, "retain.jsonl": FORGET}

FILES = {
    "empty.jsonl": "",
    "broken.jsonl": json.dumps(ROWS[0]) + '\n{"prompt": "a", "completion"\n',
    "broken.json": '[{"prompt": "a"},\n {"prompt" ]',
    "null.jsonl": "null\n",
    "none.json": "[]",
    "latin.jsonl": '{"prompt": "Gr\u00f6\u00dfe", "completion": "b"}\n'.encode("latin-1"),
    "binary.csv": bytes(range(256)),
    "ragged.csv": "prompt,completion\na,b\nc,d,e,f\n",
    "fake.parquet": "no parquet",
    "cut.parquet": b"PAR1" + bytes(40),
    "fake.gguf": "no gguf",
    "cut.gguf": b"GGUF\3\0\0\0",
    "latin.txt": "Gr\u00f6\u00dfe".encode("latin-1"),
    "log.json": "{",
    "notes/readme.md": "no rows",
    "syntax.py": "def (",
}

YAML = {  # by its name, a YAML file, and what is told of it
    "a: [1, 2": "`--config`.*line 1.*expected",
    "a:\n\t- b": "`--config`.*line 2",
    "seed: 1\nseed: 2": "line 2: the key 'seed' is there twice",
    "lr_scheduler_kwargs: {a: 1, a: 2}": "the key 'a' is there twice",
    "~: 1": "a key must be a text",
    "learning_rate: null": "`learning_rate` in .* must have a value, got null",
    "max_steps: [1, 2]": r"`max_steps` in .* takes one value, got the list \[\"1\", \"2\"\]",
    "max_steps: {a: 1}": "`max_steps` in .* takes no mapping",
    "max_steps: 1.5": "`max_steps` in .* must be a whole number, got '1.5'",
    "max_steps: 1:30": "`max_steps` in .* must be a whole number, got '1:30'",
    "seed: 0x10": "`seed` in .* must be a whole number",
    "seed: 2024-01-01": "`seed` in .* must be a whole number, got '2024-01-01'",
    "bf16: maybe": "`bf16` in .* must be true or false, got 'maybe'",
    "learning_rate: .nan": "`learning_rate` must be a finite number",
    "learning_rte: 1": "unknown option 'learning_rte' in .*; did you mean 'learning_rate'",
    "lr_scheduler_kwargs: {a: no}": "`lr_scheduler_kwargs` in .* no may be a text",
    "lr_scheduler_kwargs: {a: 012}": "`lr_scheduler_kwargs` in .* 012 may be a text",
    "lr_scheduler_kwargs: [1]": "`lr_scheduler_kwargs` in .* takes one value",
    "lr_scheduler_kwargs: text": "`lr_scheduler_kwargs` in .* must be a mapping",
    "lora_target_modules: [null]": "`lora_target_modules` in .* must hold one value",
    "lora_target_modules: [[q_proj]]": "`lora_target_modules` in .* must hold one value",
    "env: 3": "`env` in .* must hold",
    "env: {A: null}": "`env` in .* must hold",
    "env: {'A=B': c}": "`env` in .* no variable can be 'A=B'",
    "seed: !!python/object:os.system x": "`--config`.*could not determine a constructor",
    "a: &x [*x]": "`--config`.*recursive",
    "- a": "`--config`.* must hold `key: value` lines",
    "seed: 1\n---\nseed: 2": "`--config`.*single document",
    "run_name: @x": "`--config`.*line 1",
    "run_name: \x01": "`--config`.* is no YAML",
}

NUMBERS = {  # of every trainer's config, by script in turn
    "per_device_train_batch_size": "0",
    "per_device_eval_batch_size": "-1",
    "gradient_accumulation_steps": "-3",
    "max_length": "-4",
    "num_train_epochs": "-1",
    "learning_rate": "inf",
    "warmup_steps": "-1",
    "seed": "-1",
    "data_seed": "99999999999",
    "weight_decay": "-0.1",
    "max_steps": "0",
    "save_total_limit": "0",
    "logging_steps": "-1",
    "max_grad_norm": "-1",
    "adam_beta1": "1",
    "dataloader_num_workers": "-1",
    "dataset_num_proc": "0",
    "neftune_noise_alpha": "1e308",
    "lora_r": "0",
    "lora_dropout": "1",
}
TRAINERS = "dco dco_cot token_losses sftmix confidence rpo flat unlearn".split()
MIXTURES = ("mixture", "aioli", "mixture_sweep")

SETTINGS = [  # script, flag, value; the flag must be told
    ("dco", "learning_rate", "nan"),
    ("dco", "learning_rate", "fast"),
    ("dco", "n_samples", "99999999999999999999"),
    ("dco", "n_samples", "0"),
    ("dco", "votes", "65"),
    ("dco", "likelihood_threshold", "2"),
    ("dco", "bf16", "maybe"),
    ("dco", "lr_scheduler_type", "cosin"),
    ("dco", "optim", "nonsense"),
    ("dco", "optim_args", "nonsense"),
    ("dco", "eval_strategy", "sometimes"),
    ("dco", "lr_scheduler_kwargs", "{"),
    ("dco", "lr_scheduler_kwargs", '{"a": NaN}'),
    ("dco", "model_init_kwargs", "[1]"),
    ("dco", "accelerator_config", "nowhere.json"),
    ("dco", "chat_template_path", "nowhere.jinja"),
    ("dco", "pad_to_multiple_of", "x"),
    ("dco", "report_to", "nonsense"),
    ("dco", "attn_implementation", "nonsense"),
    ("dco", "dtype", "float3"),
    ("dco", "dataset_train_split", "nowhere"),
    ("dco", "output_dir", ""),
    ("dco", "resume_from_checkpoint", "@nowhere"),
    ("dco_cot", "solve_threshold", "0"),
    ("dco_cot", "refresh_every", "0"),
    ("dco_cot", "token_budget", "0"),
    ("sftmix", "mixup_alpha", "0"),
    ("sftmix", "mixup_weight", "-1"),
    ("sftmix", "per_device_train_batch_size", "3"),
    ("token_losses", "loss_type", "wit"),
    ("token_losses", "gce_q", "0.5"),
    ("token_losses", "reference_model", "@nowhere"),
    ("token_losses", "label_smoothing_factor", "0.1"),
    ("confidence", "num_checkpoints", "0"),
    ("rpo", "beta", "0"),
    ("rpo", "rpo_eta", "-1"),
    ("rpo", "sft_reduction", "max"),
    ("rpo", "label_smoothing", "0.5"),
    ("flat", "divergence", "x"),
    ("flat", "retain_weight", "-1"),
    ("flat", "template_file", "@nowhere.txt"),
    ("flat", "template_file", "@latin.txt"),
    ("unlearn", "loss", "gradient"),
    ("unlearn", "reference", "x"),
    ("unlearn", "steering", "-1"),
    ("mixture", "weights", "1"),
    ("mixture", "weights", "1e308"),
    ("mixture", "measured_rows", "0"),
    ("mixture", "validation_rows", "-1"),
    ("mixture", "max_epochs", "0"),
    ("mixture", "draws", "x"),
    ("mixture", "domains", "rows"),
    ("aioli", "method", "x"),
    ("aioli", "method_options", "eta"),
    ("aioli", "rounds", "0"),
    ("aioli", "prior_weights", "-1"),
    ("mixture_sweep", "sample", "x"),
    ("mixture_sweep", "sample", "@nowhere.csv"),
    ("mixture_sweep", "concentration", "0"),
    ("quickstart", "max_steps", "-1"),
    ("quickstart", "batch_size", "0"),
    ("dco_study", "n_samples", "0"),
    ("mixing_study", "test_rows", "0"),
    ("unlearning_study", "losses", "x"),
    ("unlearning_study", "processes", "0"),
    ("token_losses_study", "losses", "x"),
    ("token_losses_study", "few_rows", "0"),
    ("pass_at_n", "num_samples", "0"),
    ("pass_at_n", "n", "0"),
    ("pass_at_n", "temperature", "-1"),
    ("pass_at_n", "top_p", "0"),
    ("pass_at_n", "max_problems", "0"),
    ("pass_at_n", "verifier_timeout", "0"),
    ("pass_at_n", "backend", "x"),
    ("pass_at_n", "dtype", "bf17"),
    ("pass_at_n", "dataset_split", "nowhere"),
    ("pass_at_n", "adapter", "@nowhere"),
    ("unlearning", "min_k", "2"),
    ("unlearning", "max_rows", "0"),
    ("unlearning", "relearn_share", "2"),
    ("unlearning", "probes", "x"),
    ("unlearning", "fluency", "nowhere:f"),
    ("unlearning", "retain_log", "@nowhere.json"),
    ("unlearning", "original", "@notes"),
    ("speed", "kinds", "x"),
    ("speed", "rounds", "0"),
    ("mixture_laws", "level", "2"),
    ("mixture_laws", "holdout", "1"),
    ("mixture_laws", "ratios", "@nowhere.csv"),
]

DATA = {  # a file, and what is told of it
    "nowhere.jsonl": "no file",
    "empty.jsonl": "holds no rows",
    "none.json": "holds no rows",
    "broken.jsonl": "line 2 is no JSON",
    "broken.json": "line 2 is no JSON",
    "null.jsonl": "line 1 is null, no row",
    "latin.jsonl": "is not UTF-8 text",
    "binary.csv": "is not UTF-8 text",
    "ragged.csv": "line 3",
    "fake.parquet": "cannot be read as Parquet",
    "cut.parquet": "cannot be read as Parquet",
    "notes": "has no files of rows",
}
MODELS = {
    "nowhere": "no file or folder /nowhere",
    "rows.jsonl": "is a file",
    "fake.gguf": "is not a whole GGUF file",
    "cut.gguf": "is not a whole GGUF file",
    "notes": "has no config.json",
    "no weights": "has no weights",
    "no tokenizer": "has no tokenizer",
    "cut": "model.safetensors of /cut is not whole",
    "bad config": "config.json of /bad config is not whole",
    "bad tokenizer": "the tokenizer of .* does not load",
}

COMMANDS = [
    (["nonsense"], "invalid choice: 'nonsense'"),
    (["run"], "lacks a name"),
    (["run", "dcoo"], "did you mean 'dco'"),
    (["run", "nowhere.py"], "no file nowhere.py"),
    (["run", "@syntax.py"], "syntax.py, line 1: invalid syntax"),
    (["run", "--num_processes", "0", "dco"], "`num_processes` must be a whole number of 1 or more"),
    (["run", "--num_processes", "-1", "dco"], "`num_processes` must be"),
    (["run", "dco", "--num_processes", "0"], "`num_processes` must be"),
    (["run", "dco", "--num_processes", "two"], "`num_processes` must be .*got 'two'"),
    (["run", "dco", "--accelerate_config", "x"], "`--accelerate_config` 'x' is neither"),
    (["run", "--n_samples", "3", "dco"], "unrecognized|invalid|no '3'"),
    (["run", "dco", "--n_sample", "3"], "did you mean 'n_samples'"),
    (["run", "token_losses", "--use_dft_loss", "true"], "here it is .* --loss_type dft"),
    (["run", "dco", "--n_samples"], "`n_samples`: expected one argument"),
    (["run", "dco", "stray"], "unexpected 'stray'"),
    (["run", "dco", "--config"], "`config`: expected one argument"),
    (["run", "dco", "--config", "nowhere.yaml"], "`--config` names no file"),
    (["run", "dco", "--config", "@latin.txt"], "is not UTF-8"),
    (["run", "dco", "--output_dir", "@rows.jsonl"], "`output_dir`: .* is a file"),
    (["run", "dco", "--output_dir", "@rows.jsonl/x"], "`output_dir`: .* cannot be made"),
    (["run", "dco", "--output_dir", "/proc/nowhere"], "`--output_dir` .* cannot be made"),
    (["eval", "unlearning"], "missing: `model_name_or_path`, `forget`"),
    (["eval", "mixture_laws"], "`ratios` and `metrics`"),
    (["cp", "dcoo"], "did you mean 'dco'"),
    (["cp", "dco", "@nowhere/mine"], "no folder"),
    (["cp", "dco", "/proc/mine"], "cannot be written"),
]


def write_bad_files(folder: Path, checkpoint: str) -> None:
    """The files and models that the lists name, in a folder."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, rows in GOOD.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("no weights", "no tokenizer", "cut", "bad config", "bad tokenizer"):
        shutil.copytree(checkpoint, folder / name)
    (folder / "no weights" / "model.safetensors").unlink()
    for file in (folder / "no tokenizer").glob("tokenizer*"):
        file.unlink()
    weights = (folder / "cut" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(weights[:-100])
    (folder / "bad config" / "config.json").write_bytes(b"{")
    (folder / "bad tokenizer" / "tokenizer.json").write_bytes(b"{")
