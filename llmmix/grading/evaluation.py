"""pass@N of a model on problems: sample, judge, and estimate with intervals over the problems.

`llmmix.sampling` draws, `llmmix.grading.verify` judges and `llmmix.grading.summary` estimates. A
`SampleLog` may keep what was drawn, so that nothing is drawn twice.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from llmmix import sampling
from llmmix.grading.answers import BUILT_IN, Verdict
from llmmix.grading.estimators import pass_at_n
from llmmix.grading.ground_truth import reference_answers
from llmmix.grading.problems import encode_prompts, problem_ids
from llmmix.grading.sample_log import SampleLog
from llmmix.grading.summary import summarize
from llmmix.grading.verify import Verifier, judge
from llmmix.models import context_length
from llmmix.rows.prompts import check_turn_end, options_of, stop_tokens
from llmmix.sampling.requests import Completion, too_long


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    num_samples: int,
    n: Sequence[int],
    verifier: Verifier | str | Callable[[str, str], Any] = "math",
    maj: bool = False,
    log: SampleLog | None = None,
    process: tuple[int, int] = (0, 1),
    description: str = "Sampling",
    **options: Any,
) -> dict[str, Any]:
    """Sample completions of every problem, judge them, and estimate pass@N.

    Args:
        model: A causal language model of transformers, or a `vllm.LLM`.
        tokenizer: The model's tokenizer.
        dataset: Rows with `prompt` and `answer`, and perhaps `tools` and `chat_template_kwargs`,
            with which the chat template is rendered.
        num_samples: Samples of each problem.
        n: The N to report.
        verifier: A `Verifier`, or its first argument: a name, "module:function", or a function
            (completion, answer) -> bool.
        maj: Whether to estimate maj@N too.
        log: Where samples are kept; those it holds are not drawn again.
        process: Number of this process, and how many there are. Each of k processes takes every
            k-th problem; its result covers those, and what the log held at the start. With several
            processes, the caller calls `judge_again` once beforehand.
        description: Title of the progress bar.
        **options: Options of `llmmix.sampling.sample`.

    Returns:
        What `summarize` returns, and on one process the `tokens_per_second` of this call.

    Raises:
        ValueError: A row has no reference answer or no prompt, an N is above `num_samples`, no
            prompt leaves room for a completion, or the log holds samples of other problems.
    """
    # Which samples the log holds, and which are wanted
    answers = reference_answers(dataset)
    n = sorted(set(n))
    pass_at_n(num_samples, 0, n)  # refuse N before sampling
    verifier = verifier if isinstance(verifier, Verifier) else Verifier(verifier)
    if log is not None and process[1] == 1:
        judge_again(log, dataset, verifier)
    records = {} if log is None else {(r["problem"], r["sample"]): r for r in log.read()}
    ids = problem_ids(dataset)
    prompts = encode_prompts(tokenizer, dataset)
    left_out = _without_room(prompts, model, options.get("max_new_tokens", 256))
    if isinstance(model, torch.nn.Module) and not isinstance(dataset[0]["prompt"], str):
        check_turn_end(tokenizer, stop_tokens(model, tokenizer), options_of(dataset.take(1))[0])
    mine = [row for row in range(process[0], len(prompts), process[1]) if row not in set(left_out)]
    wanted = sum((row, s) not in records for row in mine for s in range(num_samples))

    # Sample, and judge while the next are sampled
    draws = sampling.sample(
        model,
        tokenizer,
        [prompts[row] for row in mine],
        num_samples,
        numbers=mine,
        done=records.keys(),
        **options,
    )
    started, tokens = time.perf_counter(), 0
    judged: Iterable[tuple[Completion, Verdict]] = judge(draws, dict(enumerate(answers)), verifier)
    if process[0] == 0 and wanted:
        judged = track(judged, description=description, total=wanted)
    with nullcontext(_keep_nothing) if log is None else log.writer() as write:
        for record in _records(judged, ids, answers, verifier):
            records[record["problem"], record["sample"]] = record
            tokens += record["tokens"]
            write(record)
    seconds = time.perf_counter() - started

    # Estimate
    result = summarize(list(records.values()), len(prompts), num_samples, n, left_out, maj=maj)
    if process[1] == 1:
        result["tokens_per_second"] = tokens / seconds if tokens else None
    return result


def _without_room(prompts: list[list[int]], model: Any, max_new_tokens: int) -> list[int]:
    """Which prompts leave no room for a completion."""
    left_out = too_long(prompts, model, max_new_tokens)
    if prompts and len(left_out) == len(prompts):
        raise ValueError(
            f"None of the {len(prompts)} prompts leaves room for max_new_tokens={max_new_tokens} "
            f"in a context of {context_length(model)} tokens; the shortest has "
            f"{min(map(len, prompts))}. Lower `max_new_tokens`."
        )
    return left_out


def _records(
    judged: Iterable[tuple[Completion, Verdict]],
    ids: Sequence[str],
    answers: Sequence[str],
    verifier: Verifier,
) -> Iterator[dict[str, Any]]:
    """The line of a `SampleLog` for each completion and its verdict."""
    for completion, verdict in judged:
        row = completion.prompt
        record = {
            "problem": row,
            "sample": completion.sample,
            "prompt_id": ids[row],
            "completion": completion.text,
            "tokens": completion.tokens,
            "finished": completion.finished,
        }
        _judge_record(record, verdict, answers[row], verifier)
        yield record


def _keep_nothing(record: dict[str, Any]) -> None:
    """Drop a record, where there is no log."""


def judge_again(log: SampleLog, dataset: Dataset, verifier: Verifier) -> None:
    """Judge the samples of a log again where the verdict may have changed.

    It may have where the verifier, its rules or the reference answer is another, where the
    verification failed, and where the verifier is the user's own function, whose code may have
    changed.

    Args:
        log: The samples; the file is written anew if any are judged again.
        dataset: The rows that they were drawn for.
        verifier: The verifier to judge by.

    Raises:
        ValueError: The log holds samples of another prompt, or a row has no reference answer.
    """
    answers = reference_answers(dataset)
    ids = problem_ids(dataset)
    with log.locked():
        records = list(log.read())
        known = [record for record in records if record["problem"] < len(ids)]
        stale = []
        for record in known:
            row = record["problem"]
            if record["prompt_id"] != ids[row]:
                raise ValueError(
                    f"{log.path} holds samples of another prompt in row {row}. Name another "
                    "`output_dir`, or remove that folder."
                )
            judged_by = record["verifier"], record.get("rules"), record["answer"]
            same = judged_by == (verifier.name, verifier.rules, answers[row])
            if not same or record["verdict"] == "failed" or verifier.name not in BUILT_IN:
                stale.append(record)
        pending = [verifier.submit(r["completion"], answers[r["problem"]]) for r in stale]
        for record, verdict in zip(stale, pending, strict=True):
            _judge_record(record, verdict.result(), answers[record["problem"]], verifier)
        if stale:
            log.replace(records)


def _judge_record(
    record: dict[str, Any], verdict: Verdict, answer: str, verifier: Verifier
) -> None:
    """Write a verdict, and what it rests on, into a record."""
    record |= {"answer": answer, "verifier": verifier.name, "rules": verifier.rules}
    record["verdict"] = verdict
    record["error"] = verifier.why(record["completion"], answer)
