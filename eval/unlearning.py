r"""Unlearning: what a model has forgotten, what it still leaks, and what it has kept.

    llmmix eval unlearning --model_name_or_path runs/flat --original runs/taught \
        --forget builtin:authors --retain builtin:authors --holdout builtin:authors \
        --facts builtin:authors --retain_model runs/retrained --leak_samples 64 --probes int4

    llmmix eval unlearning --forget locuslab/TOFU@forget10_perturbed \
        --retain locuslab/TOFU@retain_perturbed --holdout locuslab/TOFU@holdout10 \
        --facts locuslab/TOFU@real_authors_perturbed locuslab/TOFU@world_facts_perturbed ...

A set is the split of its role's name (forget, retain, holdout, facts), or the only one, or `train`;
NAME@CONFIG names a configuration. Rows have `question` and `answer`, `prompt` and `completion` (or
`gt`), or `text`, and perhaps `paraphrased_question`, `paraphrased_answer`, `perturbed_answer` (a
list) and `secret`. Prints one table, beside the model trained without the forget set. In
`--output_dir`: NAME/items.jsonl (a line an item), NAME/unlearning.json (which `--retain_log` takes)
and summary.json. Measurements are kept in the cache, by what tells checkpoint and data from others:
nothing is measured twice.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from llmmix.files import plain
from llmmix.unlearning.evaluation.metrics import (
    exact_memorization,
    extraction_strength,
    forget_quality,
    membership_auc,
    min_k,
    min_k_plus_plus,
    model_utility,
    privacy_leakage,
    truth_ratio,
)

__all__ = [
    "UnlearningArguments",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "main",
    "membership_auc",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "privacy_leakage",
    "truth_ratio",
]

LEAK_N = (1, 4, 16, 64)
LONG = ("items", "open_unlearning")  # left out of the summary


@dataclass
class UnlearningArguments:
    """What `llmmix eval unlearning` takes."""

    model_name_or_path: list[str] = field(
        metadata={"help": "One or several: hub id, folder, .gguf file or builtin:tiny."}
    )
    forget: str = field(metadata={"help": "Rows to forget: hub id, folder, file or built-in."})
    retain: str | None = field(default=None, metadata={"help": "Rows to be kept."})
    holdout: str | None = field(
        default=None, metadata={"help": "Rows never trained on, in form like those to forget."}
    )
    facts: list[str] | None = field(
        default=None, metadata={"help": "Sets of general knowledge to be kept."}
    )
    adapter: list[str] | None = field(
        default=None,
        metadata={"help": "PEFT folders, each a run on the one model; 'none' for the model alone."},
    )
    original: str | None = field(
        default=None, metadata={"help": "The model before unlearning: reference and judge."}
    )
    retain_model: str | None = field(
        default=None, metadata={"help": "A model trained without the forget set: the baseline."}
    )
    retain_log: str | None = field(
        default=None, metadata={"help": "Its unlearning.json, in place of the model."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Hub configuration, or size of builtin:authors."}
    )
    max_rows: int | None = field(
        default=None, metadata={"help": "Use the first so many rows of each set."}
    )
    max_new_tokens: int = field(default=200, metadata={"help": "Tokens an answer."})
    stop: list[str] = field(
        default_factory=list, metadata={"help": "Strings before which an answer is cut."}
    )
    rouge_words: str = field(
        default="latin", metadata={"help": "latin, or unicode for words of any script."}
    )
    min_k: float = field(default=0.4, metadata={"help": "Share of tokens of the Min-K attacks."})
    gradient_norms: bool = field(
        default=False, metadata={"help": "Attack membership by gradient norms too (slow)."}
    )
    fluency: str | None = field(
        default=None, metadata={"help": "module:function (texts) -> scores, higher: more fluent."}
    )
    leak_samples: int = field(default=0, metadata={"help": "Samples a forget row; 0 for none."})
    leak_n: list[int] | None = field(
        default=None, metadata={"help": "N to report; by default of 1 4 16 64 what is sampled."}
    )
    leak_threshold: float = field(default=0.9, metadata={"help": "Score that counts as a leak."})
    leak_scorer: str = field(
        default="auto",
        metadata={"help": "extraction, rouge, a verifier, or your module:function."},
    )
    leak_max_new_tokens: int = field(default=64, metadata={"help": "Tokens a sample."})
    temperature: float = field(default=1.0, metadata={"help": "Of the samples."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus mass of the samples."})
    seed: int = field(default=0, metadata={"help": "Of samples and of relearning."})
    probes: list[str] | None = field(
        default=None, metadata={"help": "Of relearn paraphrase int8 int4."}
    )
    relearn_steps: int = field(default=10, metadata={"help": "Optimizer steps."})
    relearn_learning_rate: float = field(default=1e-5, metadata={"help": "Of relearning."})
    relearn_batch_size: int = field(default=4, metadata={"help": "Rows a step."})
    relearn_share: float = field(
        default=0.5, metadata={"help": "Of the forget set; measured on the rest."}
    )
    compat: str | None = field(
        default=None,
        metadata={"help": "open_unlearning: write TOFU_EVAL.json by its definitions too."},
    )
    token_budget: int = field(default=16384, metadata={"help": "Tokens of a batch."})
    dtype: str = field(
        default="auto", metadata={"help": "Of the weights; auto: the checkpoint's, fp32 on a CPU."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code of the checkpoint."})
    output_dir: str = field(default="runs/unlearning", metadata={"help": "Where the results go."})


def main(args: UnlearningArguments) -> dict[str, dict]:
    """Evaluate each model; print the table and write what the module's docstring lists."""
    from transformers.utils import logging

    from llmmix.models import Loader, evaluation_state, named_checkpoints
    from llmmix.unlearning.evaluation.printing import print_table

    _check(args)
    runs = named_checkpoints(args.model_name_or_path, args.adapter)
    state = evaluation_state()
    logging.disable_progress_bar()
    if args.retain_model and "retain_model" in [run.name for run in runs]:
        raise ValueError("A run cannot be called `retain_model`, which is the baseline's folder.")
    data = load_sets(args)
    _check_probes(args, data["forget"])
    program = _Program(args, data, Loader(state.device, args.dtype, args.trust_remote_code), state)
    retained = _read_log(args.retain_log) if args.retain_log else None
    if args.retain_model:
        (checkpoint,) = named_checkpoints([args.retain_model])
        retained = program.evaluate(checkpoint, None)
    results = {run.name: program.evaluate(run, retained, probed=True) for run in runs}
    program.loader.let_go()
    state.wait_for_everyone()
    state.destroy_process_group()
    if not state.is_main_process:
        return {}
    for name, result in results.items():
        _write(Path(args.output_dir) / name, result)
        if args.compat:
            _write_compat(Path(args.output_dir) / name, result)
    if args.retain_model:
        _write(Path(args.output_dir) / "retain_model", retained)
    shown = {name: _without(result, *LONG) for name, result in results.items()}
    document = {"runs": shown, "retained": retained and _without(retained, *LONG)}
    _write_json(Path(args.output_dir) / "summary.json", document)
    print_table(results, retained)
    print(f"Results: {args.output_dir}")
    return results


def load_sets(args: UnlearningArguments) -> dict:
    """The rows of each role, as they come: facts are called `facts`, or by their own names."""
    named = {role: getattr(args, role) for role in ("forget", "retain", "holdout")}
    facts = args.facts or []
    titles = ["facts"] if len(facts) == 1 else [_title(name) for name in facts]
    if len({*titles, *named}) < len(titles) + len(named):
        raise ValueError(f"`facts` names one twice, or like another set: {', '.join(facts)}.")
    named |= dict(zip(titles, facts, strict=True))
    return {
        role: _load(name, "facts" if role in titles else role, args)
        for role, name in named.items()
        if name is not None
    }


def _title(name: str) -> str:
    """A short name: of the configuration, the file, or the built-in."""
    source, _, config = name.partition("@")
    return (config or Path(source).stem.split(":")[-1]).removesuffix("_perturbed")


def _load(name: str, role: str, args: UnlearningArguments):
    from llmmix.data import load_role

    rows = load_role(name, role, config=args.dataset_config)
    return rows if args.max_rows is None else rows.take(min(args.max_rows, len(rows)))


class _Program:
    """Everything that the evaluations of one call share."""

    def __init__(self, args: UnlearningArguments, data: dict, loader, state):
        from llmmix.unlearning.evaluation.items import MeasureOptions
        from llmmix.unlearning.evaluation.texts import unicode_words

        self.args, self.data, self.loader, self.state = args, data, loader, state
        self.options = MeasureOptions(
            max_new_tokens=args.max_new_tokens,
            stop=tuple(args.stop),
            rouge_tokenize=unicode_words if args.rouge_words == "unicode" else None,
            gradient_norms=args.gradient_norms,
            min_k=args.min_k,
            token_budget=args.token_budget,
            shared=state.num_processes > 1,
        )
        self.fluency = _function(args.fluency) if args.fluency else None

    def evaluate(self, checkpoint, retained: dict | None, probed: bool = False) -> dict:
        """The document of one model, with leaks, and with what comes back if it is `probed`."""
        from llmmix.unlearning.evaluation.evaluation import as_rows, evaluate_subject
        from llmmix.unlearning.evaluation.items import scores_of

        subject = self._subject(checkpoint)
        sets = {role: as_rows(rows, role, subject.tokenizer) for role, rows in self.data.items()}
        result = evaluate_subject(
            subject,
            sets,
            self.options,
            retained=retained,
            original=self._original(),
            fluency=self.fluency,
        )
        result["metrics"] |= self._leaks(checkpoint, subject, sets["forget"])
        if probed:
            result["probes"] = self._probes(checkpoint, subject, sets["forget"], result)
        if self.args.compat:
            roles = [role for role in ("forget", "holdout") if role in sets]
            scores = {role: scores_of(subject, sets[role], self.options) for role in roles}
            given = None if retained is None else retained.get("open_unlearning")
            result["open_unlearning"] = _compat(result["items"], scores, given, self.args.min_k)
        names = {"eval": "unlearning", "model": checkpoint.model, "adapter": checkpoint.adapter}
        return names | self._provenance(checkpoint) | result

    def _provenance(self, checkpoint) -> dict:
        import datasets
        import torch
        import transformers

        import llmmix

        used = (llmmix, torch, transformers, datasets)
        asked = {
            role: getattr(self.args, role) for role in ("forget", "retain", "holdout", "facts")
        }
        return {
            "fingerprint": self.loader.fingerprint(checkpoint),
            "versions": {module.__name__: module.__version__ for module in used},
            "sets": asked | {"dataset_config": self.args.dataset_config},
            "rows": {role: len(rows) for role, rows in self.data.items()},
            "seed": self.args.seed,
        }

    def _subject(self, checkpoint, changed: dict | None = None, make: Callable | None = None):
        """A model that is loaded when needed; `changed` says what `make` did to its weights."""
        from llmmix.unlearning.evaluation.items import Subject

        fingerprint = self.loader.fingerprint(checkpoint) | {"changed": changed}

        def load():
            if make is None:
                return self.loader.model(checkpoint)
            key = (checkpoint, json.dumps(changed))
            return self.loader.held(key, lambda: make(self.loader.model(checkpoint)))

        return Subject(self.loader.tokenizer(checkpoint), load, self._keeper(fingerprint))

    def _original(self):
        from llmmix.models import named_checkpoints

        if self.args.original is None:
            return None
        return self._subject(*named_checkpoints([self.args.original]))

    def _keeper(self, fingerprint: dict) -> Callable:
        """Keeps measurements of a model in the cache; the main process decides what is there."""
        from accelerate.utils import broadcast_object_list

        from llmmix.files import cache_dir
        from llmmix.unlearning.evaluation.items import METRIC_VERSION

        def keep(kind: str, data: str, options: dict, compute: Callable):
            asked = [METRIC_VERSION, fingerprint, kind, data, options]
            key = hashlib.blake2b(json.dumps(asked).encode(), digest_size=12).hexdigest()
            file = cache_dir() / "unlearning" / f"{kind}-{key}.json"
            found = [json.loads(file.read_text())] if file.exists() else None
            if self.state.num_processes > 1:
                (found,) = broadcast_object_list([found])
            if found is not None:
                return found[0]
            value = compute()
            if self.state.is_main_process:
                file.parent.mkdir(parents=True, exist_ok=True)
                beside = file.with_suffix(f".{os.getpid()}.tmp")
                beside.write_text(json.dumps(value))
                beside.replace(file)
            return json.loads(json.dumps(value))  # as it will be read back

        return keep

    def _leaks(self, checkpoint, subject, rows) -> dict[str, dict]:
        from llmmix.unlearning.evaluation.summary import metric

        if not self.args.leak_samples:
            return {"leak": metric("lower", reason="needs --leak_samples")}
        if not all(rows["prompt"]):
            return {"leak": metric("lower", reason="the forget set has no prompts to answer")}
        n = sorted(self.args.leak_n or [k for k in LEAK_N if k <= self.args.leak_samples])
        result = self._sampled_leaks(checkpoint, subject, rows, n)
        metrics = {}
        for k in map(str, n):
            rest = {"n": result["problems"][k], "interval": result["interval"][k]}
            metrics[f"leak@{k}"] = metric("lower", result["leak_at_n"][k], **rest)
        for k in map(str, n):
            rest = {"n": result["problems"][k], "interval": result["max_score_interval"][k]}
            metrics[f"leak_score@{k}"] = metric("lower", result["max_score"][k], **rest)
        names = ("scorer", "threshold", "verdicts", "errors", "left_out", "cut", "num_samples")
        metrics[f"leak@{n[0]}"] |= {name: result[name] for name in names}
        return metrics

    def _sampled_leaks(self, checkpoint, subject, rows, n: list[int]) -> dict:
        from accelerate.utils import broadcast_object_list

        from llmmix.grading.sample_log import SampleLog
        from llmmix.unlearning.evaluation.items import data_digest
        from llmmix.unlearning.evaluation.leaks import LeakScorer, sample_leaks, summarize_leaks

        args, state = self.args, self.state
        sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
        sampling |= {"max_new_tokens": args.leak_max_new_tokens}
        settings = self.loader.fingerprint(checkpoint) | sampling | {"data": data_digest(rows)}
        key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=6).hexdigest()
        log = SampleLog(Path(args.output_dir) / checkpoint.name / f"leaks-{key}", settings)
        scorer = LeakScorer(args.leak_scorer, rows, self.options.rouge_tokenize)
        asked = (args.leak_samples, n, args.leak_threshold)
        drawn = {(r["problem"], r["sample"]) for r in log.read()}
        wanted = [(row, s) for row in range(len(rows)) for s in range(args.leak_samples)]
        (complete,) = broadcast_object_list([drawn.issuperset(wanted)])
        left_out: list[int] = []
        if not complete:
            process = (state.process_index, state.num_processes)
            model, budget = subject.load(), {"token_budget": args.token_budget}
            left_out = sample_leaks(
                model,
                subject.tokenizer,
                rows,
                scorer,
                log,
                *asked,
                process=process,
                **sampling,
                **budget,
            )
        state.wait_for_everyone()
        result = None
        if state.is_main_process:
            result = summarize_leaks(log, rows, scorer, *asked, left_out)
        scorer.close()
        return broadcast_object_list([result])[0]

    def _probes(self, checkpoint, subject, rows, result: dict) -> dict[str, dict]:
        """Metrics of the forget set before and after each probe, on the same rows."""
        from llmmix.unlearning.evaluation.items import measure_items
        from llmmix.unlearning.evaluation.summary import set_metrics

        names = ("question", "prompt", "answer", "secret")
        asked = rows.select_columns([name for name in names if name in rows.column_names])
        found = {}
        for name in self.args.probes or ():
            places, probed, questions = self._probe(name, checkpoint, subject, rows)
            chosen = (asked if questions is None else questions).select(places)
            chosen = chosen.select_columns(asked.column_names)
            after = set_metrics("forget", measure_items(probed, chosen, self.options))
            before = set_metrics("forget", [result["items"]["forget"][place] for place in places])
            found[name] = {
                "rows": len(places),
                "before": {key: before[key]["value"] for key in after},
                "after": {key: entry["value"] for key, entry in after.items()},
            }
        return found

    def _probe(self, name: str, checkpoint, subject, rows) -> tuple:
        """Rows to measure on, the model to measure, and the questions where they are others."""
        from llmmix.unlearning.evaluation.items import data_digest
        from llmmix.unlearning.evaluation.probes import (
            paraphrased,
            quantised,
            relearn,
            relearning_parts,
        )

        args, everything = self.args, list(range(len(rows)))
        if name == "paraphrase":
            return everything, subject, paraphrased(rows, subject.tokenizer)
        if name in ("int8", "int4"):
            bits = int(name.removeprefix("int"))
            changed = {"probe": name}
            made = self._subject(checkpoint, changed, lambda model: quantised(model, bits))
            return everything, made, None
        learned, measured = relearning_parts(len(rows), args.relearn_share, args.seed)
        given = {
            "steps": args.relearn_steps,
            "learning_rate": args.relearn_learning_rate,
            "batch_size": args.relearn_batch_size,
            "seed": args.seed,
        }
        chosen = rows.select(learned)

        def learn(model):
            return relearn(model, subject.tokenizer, chosen, **given)

        changed = {"probe": name, "rows": data_digest(chosen), **given}
        return measured, self._subject(checkpoint, changed, learn), None


def _check(args: UnlearningArguments) -> None:
    from llmmix.unlearning.evaluation.probes import PROBES

    if args.retain_model and args.retain_log:
        raise ValueError("Give `retain_model` or its `retain_log`, not both.")
    if args.compat not in (None, "open_unlearning"):
        raise ValueError(f"`compat` must be 'open_unlearning', got {args.compat!r}.")
    if args.rouge_words not in ("latin", "unicode"):
        raise ValueError(f"`rouge_words` must be 'latin' or 'unicode', got {args.rouge_words!r}.")
    if unknown := sorted(set(args.probes or ()) - set(PROBES)):
        raise ValueError(f"`probes`: no {unknown[0]!r}; there are {', '.join(PROBES)}.")
    if not 0 < args.leak_threshold <= 1:
        raise ValueError(f"`leak_threshold` must lie in (0, 1], got {args.leak_threshold}.")
    if args.leak_n and max(args.leak_n) > args.leak_samples:
        raise ValueError(
            f"`leak_n` of {max(args.leak_n)} needs as many samples; `leak_samples` is "
            f"{args.leak_samples}. Raise it."
        )


def _check_probes(args: UnlearningArguments, rows) -> None:
    """Refuse what a probe would refuse after everything else has been measured."""
    from llmmix.unlearning.evaluation.probes import check_paraphrases, relearning_parts

    if "paraphrase" in (args.probes or ()):
        check_paraphrases(rows)
    if "relearn" in (args.probes or ()):
        relearning_parts(len(rows), args.relearn_share, args.seed)


def _read_log(path: str) -> dict:
    file = Path(path) / "unlearning.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"`retain_log`: no file {file}.")
    return json.loads(file.read_text())


def _function(path: str) -> Callable:
    module, _, name = path.partition(":")
    sys.path.insert(0, os.getcwd())  # a module of the user's, beside which the program is run
    if not name:
        raise ValueError(f"`fluency` must be module:function, got {path!r}.")
    return getattr(import_module(module), name)


def _compat(items: dict, scores: dict, retain_logs: dict | None, k: float) -> dict:
    from llmmix.unlearning.evaluation.open_unlearning import open_unlearning_document

    return open_unlearning_document(items, scores, retain_logs, k)


def _write_compat(folder: Path, result: dict) -> None:
    from llmmix.unlearning.evaluation.open_unlearning import write_open_unlearning

    write_open_unlearning(folder / "open_unlearning", result["open_unlearning"])


def _write(folder: Path, result: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "items.jsonl").open("w", encoding="utf-8") as file:
        for role, records in result["items"].items():
            for record in records:
                line = plain({"set": role, **record})
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    _write_json(folder / "unlearning.json", _without(result, "items"))


def _write_json(path: Path, document: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(document), indent=1))


def _without(result: dict, *names: str) -> dict:
    return {key: value for key, value in result.items() if key not in names}


if __name__ == "__main__":
    from llmmix.cli import parse_args

    main(*parse_args((UnlearningArguments,), __file__))
