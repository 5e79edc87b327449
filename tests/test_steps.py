import copy
import logging

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmmix import DCOConfig, DCOTrainer
from llmmix.steps import split_steps

STEPS = {
    "prompt": ["What is (2+3)*4? ", "What is 7-5? "],
    "steps": [["2+3=5", " ", "5*4=20", "\\boxed{20}"], ["7-5=\\boxed{2}"]],
}


def logp(model, ids, labels) -> float:
    with torch.no_grad():
        scores = model(torch.tensor([ids], device=model.device)).logits[0, :-1]
    scores = scores.double().log_softmax(-1)
    return sum(scores[i, label].item() for i, label in enumerate(labels[1:]) if label != -100)


@pytest.mark.parametrize("chat", [False, True])
def test_steps_multiply_to_the_whole_solution(checkpoint, chat):
    """Their tokens are those of the whole, each scored once, in the context that comes before."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = dict(STEPS)
    if chat:
        rows["prompt"] = [[{"role": "user", "content": text}] for text in rows["prompt"]]
    split = split_steps(Dataset.from_dict(rows), tokenizer)
    assert split.column_names == ["input_ids", "labels"] and len(split) == 4
    text = "2+3=5\n5*4=20\n\\boxed{20}"
    if chat:
        whole = tokenizer.apply_chat_template(
            rows["prompt"][0] + [{"role": "assistant", "content": text}], return_dict=True
        )["input_ids"]
        start = len(
            tokenizer.apply_chat_template(
                rows["prompt"][0], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )
    else:
        whole = tokenizer(rows["prompt"][0] + text + tokenizer.eos_token)["input_ids"]
        start = len(tokenizer(rows["prompt"][0])["input_ids"])
    assert split[2]["input_ids"] == whole
    scored = [i for row in split.select(range(3)) for i, y in enumerate(row["labels"]) if y != -100]
    assert scored == list(range(start, len(whole)))
    total = logp(model, whole, [-100] * start + whole[start:])
    parts = [logp(model, row["input_ids"], row["labels"]) for row in split.select(range(3))]
    assert sum(parts) == pytest.approx(total, rel=1e-6)
    said = [
        tokenizer.decode([y for y in row["labels"] if y != -100]).removesuffix("\n" if chat else "")
        for row in split
    ]
    end = tokenizer.eos_token
    assert said == [
        "2+3=5" + ("" if chat else "\n"),
        "5*4=20" + ("" if chat else "\n"),
        "\\boxed{20}" + end,
        "7-5=\\boxed{2}" + end,
    ]


def test_assistant_turns_are_steps():
    turns = [("user", "goal"), ("assistant", "intro"), ("user", "state"), ("assistant", "exact")]
    messages = [{"role": role, "content": content} for role, content in turns]
    silent = [{"role": "user", "content": "hello"}]
    split = split_steps(Dataset.from_dict({"messages": [messages, silent]}), tokenizer=None)
    assert split[:] == {
        "prompt": [messages[:1], messages[:3]],
        "completion": [[messages[1]], [messages[3]]],
    }


def test_rows_without_a_step_are_counted(tokenizer, caplog):
    rows = {"prompt": ["a", "b"], "steps": [["x"], [" "]]}
    with caplog.at_level(logging.WARNING):
        assert len(split_steps(Dataset.from_dict(rows), tokenizer)) == 1
    assert "Dropped 1 of 2 rows without a step" in caplog.text


def test_a_thousand_rows_of_which_the_last_is_blank(tokenizer):
    rows = {"prompt": ["a"] * 1001, "steps": [["x"]] * 1000 + [[""]]}
    assert len(split_steps(Dataset.from_dict(rows), tokenizer)) == 1000


def test_templates_that_trim_and_answers_that_stand_in_the_template_too(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    template = tokenizer.chat_template
    trimming = template.replace("message['content']", "message['content'] | trim")
    tokenizer.chat_template = trimming
    prompt = [[{"role": "user", "content": "state"}]]
    rows = Dataset.from_dict({"prompt": prompt, "steps": [["  im", "end\n "]]})
    said = [
        tokenizer.decode([y for y in row["labels"] if y != -100])
        for row in split_steps(rows, tokenizer)
    ]
    assert said == ["im\n", "end<|im_end|>\n"]
    tokenizer.chat_template = template.replace("message['content']", "message['content'] | upper")
    with pytest.raises(ValueError, match="template rewrites the assistant's text"):
        split_steps(rows, tokenizer)


def test_steps_beyond_the_length_are_dropped_whole(tokenizer, caplog):
    rows = Dataset.from_dict({"prompt": ["1+1"], "steps": [["2", "3" * 50]]})
    with caplog.at_level(logging.WARNING):
        assert len(split_steps(rows, tokenizer, max_length=20)) == 1
    assert "Dropped 1 of 2 steps" in caplog.text


def test_an_end_of_sequence_is_not_written_twice(tokenizer):
    rows = {"prompt": ["a"], "steps": [["b" + tokenizer.eos_token]]}
    (row,) = split_steps(Dataset.from_dict(rows), tokenizer)
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1


def test_other_columns_and_nothing_left_are_refused(tokenizer):
    with pytest.raises(ValueError, match="need `prompt` and `steps`, or `messages`"):
        split_steps(Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}), tokenizer)
    with pytest.raises(ValueError, match="None of the 1 rows holds a step"):
        split_steps(Dataset.from_dict({"prompt": ["a"], "steps": [[""]]}), tokenizer)


def test_dco_weighs_each_step_by_itself(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    split = split_steps(Dataset.from_dict(STEPS), tokenizer)
    args = DCOConfig(
        str(tmp_path), n_samples=8, bf16=False, disable_tqdm=True, per_device_eval_batch_size=4
    )
    trainer = DCOTrainer(checkpoint, args, train_dataset=split, processing_class=tokenizer)
    from llmmix.dco import dco_loss

    logps = torch.tensor([logp(trainer.model, r["input_ids"], r["labels"]) for r in split])
    loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert loss == pytest.approx(dco_loss(logps, 8).mean().item(), rel=1e-5)
