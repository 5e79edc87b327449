"""How often a model solves problems: sample, judge, and estimate with intervals over the problems.

The steps are `llmmix.sampling`, `llmmix.verify` and `llmmix.estimators`; here they meet, with a
`SampleLog` between them.
"""

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from llmmix.grading.estimators import bootstrap_interval, maj_at_n, paired_difference, pass_at_n
from llmmix.grading.sample_log import SampleLog, prompt_id
from llmmix.grading.verify import BUILT_IN, VERDICTS, Verifier, judge, stated_answer

SECONDS_UNWRITTEN = 1.0  # what a killed run may lose, besides what waits for its verdict


def evaluate(
    model,
    tokenizer,
    dataset,
    *,
    num_samples: int,
    n: Sequence[int],
    verifier="math",
    maj: bool = False,
    log: SampleLog | None = None,
    process: tuple[int, int] = (0, 1),
    description: str = "Sampling",
    **sampling,
) -> dict:
    """Sample, judge and estimate.

    Args:
        model: A causal language model, or a `vllm.LLM`.
        tokenizer: Its tokenizer.
        dataset: Rows with `prompt` and `answer`.
        num_samples: Samples a problem.
        n: The N to report.
        verifier: A `Verifier`, or what it takes: a name, "module:function", or a function
            (completion, answer) -> bool.
        maj: Whether to estimate maj@N too.
        log: Where samples are kept; those it holds are not drawn again.
        process: This process's number and how many there are: each takes every so-manieth problem.
            The result is of its own problems and of what the log held at the start; `judge_again`
            is then the caller's, once, before.
        description: Title of the progress bar.
        **sampling: Options of `llmmix.sampling.sample`.

    Returns:
        What `summarize` returns, and on one process the `tokens_per_second` of this call.

    Raises:
        ValueError: A row without a reference answer, N above `num_samples`, or a log of other
            problems.
    """
    from rich.progress import track

    from llmmix.models import encode
    from llmmix.sampling import sample
    from llmmix.sampling.requests import too_long

    answers = reference_answers(dataset)
    n = sorted(set(n))
    pass_at_n(num_samples, 0, n)  # refuse N before sampling
    verifier = verifier if isinstance(verifier, Verifier) else Verifier(verifier)
    prompts = list(dataset["prompt"])
    ids = [prompt_id(prompt) for prompt in prompts]
    if log is not None and process[1] == 1:
        judge_again(log, dataset, verifier)
    records = {} if log is None else {(r["problem"], r["sample"]): r for r in log.read()}
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    left_out = too_long(encoded, model, sampling.get("max_new_tokens", 256))
    mine = [row for row in range(process[0], len(prompts), process[1]) if row not in set(left_out)]
    draws = sample(
        model,
        tokenizer,
        [prompts[row] for row in mine],
        num_samples,
        numbers=mine,
        done=records.keys(),
        **sampling,
    )
    started, tokens = time.perf_counter(), 0
    wanted = sum((row, s) not in records for row in mine for s in range(num_samples))
    judged = judge(draws, dict(enumerate(answers)), verifier)
    if process[0] == 0 and wanted:
        judged = track(judged, description=description, total=wanted)
    unwritten, written = [], started
    try:
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
            records[row, completion.sample] = record
            tokens += completion.tokens
            unwritten.append(record)
            if log is not None and time.perf_counter() - written > SECONDS_UNWRITTEN:
                log.append(unwritten)
                unwritten, written = [], time.perf_counter()
    finally:
        if log is not None:
            log.append(unwritten)
    seconds = time.perf_counter() - started
    result = summarize(list(records.values()), len(prompts), num_samples, n, left_out, maj=maj)
    if process[1] == 1:
        result["tokens_per_second"] = tokens / seconds if tokens else None
    return result


def reference_answers(dataset) -> list[str]:
    """The `answer` of each row as text; whole numbers without a point.

    Raises:
        ValueError: A row without an answer, or with one that is neither text nor a number.
    """
    given = list(dataset["answer"])
    missing = [
        row
        for row, answer in enumerate(given)
        if answer is None or answer != answer or not str(answer).strip()
    ]
    if missing:
        raise ValueError(
            f"Row {missing[0]} has no `answer` ({len(missing)} such rows). Give one, or drop them."
        )
    for row, answer in enumerate(given):
        if not isinstance(answer, str | int | float):
            raise ValueError(
                f"Row {row} has an `answer` of type {type(answer).__name__}: {answer!r}. Give text "
                "or a number."
            )
    whole = (int(a) if isinstance(a, float) and a.is_integer() else a for a in given)
    return [str(answer) for answer in whole]


def judge_again(log: SampleLog, dataset, verifier: Verifier) -> None:
    """Renew the verdicts of a log that may have changed.

    They may where the verifier or the reference answer is another one, where the verification had
    failed, and where the verifier is a function of the user's, which may have been mended.

    Raises:
        ValueError: The log holds samples of another prompt.
    """
    answers = reference_answers(dataset)
    ids = [prompt_id(prompt) for prompt in dataset["prompt"]]
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
            same = (record["verifier"], record["answer"]) == (verifier.name, answers[row])
            if not same or record["verdict"] == "failed" or verifier.name not in BUILT_IN:
                stale.append(record)
        pending = [verifier.submit(r["completion"], answers[r["problem"]]) for r in stale]
        for record, verdict in zip(stale, pending, strict=True):
            _judge_record(record, verdict.result(), answers[record["problem"]], verifier)
        if stale:
            log.replace(records)


def _judge_record(record: dict, verdict: str, answer: str, verifier: Verifier) -> None:
    record |= {"answer": answer, "verifier": verifier.name, "verdict": verdict}
    record["error"] = verifier.why(record["completion"], answer)


def summarize(
    records: Sequence[dict],
    problems: int,
    num_samples: int,
    n: Sequence[int],
    left_out: Sequence[int] = (),
    *,
    maj: bool = False,
) -> dict:
    """The estimates that samples and verdicts give.

    Samples whose verification failed are left out of a problem's n. A problem with fewer than N
    judged samples has no estimate of pass@N, and is left out of that one: `problems` says how many
    each estimate rests on.

    Args:
        records: Lines of a `SampleLog`.
        problems: Rows of the dataset.
        num_samples: Samples a problem; further ones in the records are not used.
        n: The N to report.
        left_out: Problems that could not be sampled.
        maj: Whether to estimate maj@N too.

    Returns:
        `pass_at_n`, `interval` (95%) and `problems` by N, `maj_at_n` and its interval if asked for,
        `verdicts`, `errors` (why verifications failed, the five commonest), `cut` (samples that
        reached the token limit), `mean_tokens`, and `n_judged` and `n_correct` of each problem.
    """
    used = [r for r in records if r["sample"] < num_samples and r["problem"] < problems]
    by_problem = [[] for _ in range(problems)]
    for record in used:
        by_problem[record["problem"]].append(record)
    verdicts = [Counter(r["verdict"] for r in rows) for rows in by_problem]
    judged = np.array([c.total() - c["failed"] for c in verdicts])
    correct = np.array([c["right"] for c in verdicts])
    result = {
        "estimator": "unbiased",
        "num_samples": num_samples,
        "rows": problems,
        "left_out": list(left_out),
        "verdicts": {v: sum(c[v] for c in verdicts) for v in VERDICTS},
        "cut": sum(not r["finished"] for r in used),
        "errors": dict(Counter(r["error"] for r in used if r.get("error")).most_common(5)),
        "mean_tokens": float(np.mean([r["tokens"] for r in used])) if used else None,
        "n_judged": judged.tolist(),
        "n_correct": correct.tolist(),
    }

    def estimated(name: str, interval: str, values_of) -> None:
        result[name], result[interval] = {}, {}
        for k in n:
            rows = np.flatnonzero(judged >= k)
            values = values_of(rows, k)
            low, high = bootstrap_interval(values)
            result[name][str(k)] = float(values.mean()) if len(rows) else None
            known = len(rows) > 1
            result[interval][str(k)] = [float(low), float(high)] if known else None

    estimated("pass_at_n", "interval", lambda rows, k: pass_at_n(judged[rows], correct[rows], k))
    result["problems"] = {str(k): int((judged >= k).sum()) for k in n}
    if maj:
        votes = [_votes(rows) for rows in by_problem]
        estimated(
            "maj_at_n",
            "maj_interval",
            lambda rows, k: np.array([maj_at_n(n=k, seed=row, **votes[row]) for row in rows]),
        )
    return result


def _votes(records: list[dict]) -> dict:
    wrong, right, silent = Counter(), 0, 0
    for record in records:
        if record["verdict"] == "failed":
            continue
        given = stated_answer(record["completion"], record["verifier"])
        if record["verdict"] == "right":
            right += 1
        elif record["verdict"] == "unparsable" or given is None:
            silent += 1
        else:
            wrong[given] += 1
    return {"votes": list(wrong.values()), "n_right": right, "n_silent": silent}


def compare(results: dict[str, dict]) -> dict[str, dict]:
    """pass@N of each run minus that of the first, over the problems that both have estimates of."""
    first, *others = results
    differences = {}
    for name in others:
        a, b = results[name], results[first]
        differences[name] = {}
        for k in a["pass_at_n"]:
            judged = [np.array(x["n_judged"]) for x in (a, b)]
            both = np.flatnonzero((judged[0] >= int(k)) & (judged[1] >= int(k)))
            if len(both) < 2:
                continue
            values, baseline = (
                pass_at_n(np.array(x["n_judged"])[both], np.array(x["n_correct"])[both], int(k))
                for x in (a, b)
            )
            mean, low, high = paired_difference(values, baseline)
            differences[name][k] = {
                "difference": float(mean),
                "interval": [float(low), float(high)],
                "problems": len(both),
            }
    return differences
