"""Prompts and answers as tokens: what is trained, sampled and scored is one text."""

import json
import logging

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmmix import DCOConfig, DCOTrainer
from llmmix.rows.prompts import (
    check_turn_end,
    encode,
    encode_answer,
    encode_completion,
    options_of,
    template_options,
    turn_end,
)
from llmmix.rows.turn_ends import scored_to_the_end

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "plain": TURNS + OPENED,
    "a default system message": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
        + TURNS
        + OPENED
    ),
    "tools and an option": (
        "{% if tools %}{{ tools[0].name }}\n{% endif %}"
        "{% if enable_thinking is defined and not enable_thinking %}/no_think {% endif %}"
        + TURNS
        + OPENED
    ),
    "thoughts that the prompt alone has": (
        TURNS + OPENED.replace("assistant\n", "assistant\n<think></think>")
    ),
    "thoughts that the answer alone has": (
        TURNS.replace("{{ m.c", "{{ '<think></think>' if m.role != 'user' }}{{ m.c") + OPENED
    ),
    "an end of text behind the turn": (
        TURNS + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}" + OPENED
    ),
    "trimmed contents": TURNS.replace("m.content", "m.content | trim") + OPENED,
}
USER = [{"role": "user", "content": "2+2?"}]
ASKED = {"tools": [{"name": "add"}], "chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture
def plain(checkpoint):
    """A tokenizer of our own to change."""
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def of_pieces():
    """A tokenizer that puts a blank before every text, and a token before that, as Llama 2's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", "\n", ":", "?"]
    words = "Question What is the capital of France Answer Paris Rome".split() * 50
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def trained(checkpoint, tokenizer, tmp_path, row):
    """Token ids and labels of a row as a trainer has them."""
    args = DCOConfig(str(tmp_path), report_to=[], bf16=False, max_length=None)
    rows = Dataset.from_list([row])
    trainer = DCOTrainer(checkpoint, args, train_dataset=rows, processing_class=tokenizer)
    return trainer.train_dataset[0]["input_ids"], trainer.train_dataset[0]["labels"]


def check_alike(checkpoint, tokenizer, tmp_path, row):
    """A row is trained on the tokens that are scored, and on no others."""
    options = template_options(row)
    whole, start = encode_completion(tokenizer, row["prompt"], row["completion"], options=options)
    ids, labels = trained(checkpoint, tokenizer, tmp_path, row)
    assert ids[: len(whole)] == whole
    assert [place for place, label in enumerate(labels) if label != -100] == list(
        range(start, len(whole))
    )
    return whole, start


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_trained_and_scored_alike_and_end_with_the_turn(
    template, checkpoint, plain, tmp_path
):
    plain.chat_template = TEMPLATES[template]
    said = [{"role": "assistant", "content": "2+2=4 "}]
    row = {"prompt": USER, "completion": said, **ASKED}
    whole, start = check_alike(checkpoint, plain, tmp_path, row)
    assert whole[-1] == plain.convert_tokens_to_ids("<|im_end|>")
    assert plain.decode(whole[start:]).removeprefix("<think></think>").startswith("2+2=4")
    assert encode_answer(plain, USER, "2+2=4 ", options=template_options(row)) == (whole, start)
    sampled = encode(plain, USER, options=template_options(row))
    text = plain.decode(sampled)
    assert ("/no_think" in text and "add" in text) == (template == "tools and an option")
    assert sampled[:start] == whole[:start]
    assert (sampled == whole[:start]) == (template != "thoughts that the prompt alone has")


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("2+2=", "4"),
        ("What is 2+2? ", "four"),  # blank and word are one token
        ("2+2=", "\n4"),
        ("2+2", "=4<|im_end|>"),
    ],
)
def test_text_is_trained_and_scored_alike(prompt, completion, checkpoint, plain, tmp_path):
    row = {"prompt": prompt, "completion": completion}
    whole, _ = check_alike(checkpoint, plain, tmp_path, row)
    assert plain.decode(whole) == (prompt + completion).removesuffix("<|im_end|>") + "<|im_end|>"
    assert whole.count(plain.eos_token_id) == 1


@pytest.mark.parametrize(
    ("prompt", "parted"), [("the capital of France is", " "), ("France\n", "")]
)
def test_an_answer_has_the_tokens_of_the_natural_text(of_pieces, prompt, parted):
    natural = of_pieces(prompt + parted + "Paris")["input_ids"]
    ids, start = encode_answer(of_pieces, prompt, "Paris")
    assert ids == [*natural, of_pieces.eos_token_id]
    assert ids[:start] == encode(of_pieces, prompt)


def test_text_is_parted_from_its_answer_and_closed_once(plain):
    eos = plain.eos_token_id
    for prompt, answer, said in (("2+2=", "4", " 4"), ("2+2= ", "4", "4"), ("2+2=", " 4", " 4")):
        ids, start = encode_answer(plain, prompt, answer)
        assert ids[:start] == plain(prompt)["input_ids"]
        assert ids[start:] == [*plain(said)["input_ids"], eos]
        assert plain.decode(ids[:-1]) == prompt + said
    ids, start = encode_answer(plain, "2+2=", "4", include_eos=False)
    assert plain.decode(ids) == "2+2= 4" and eos not in ids


def test_messages_are_scored_from_the_answer_to_its_end(plain):
    opened = plain.apply_chat_template(USER, add_generation_prompt=True, return_dict=True)
    for include_eos in (True, False):
        ids, start = encode_answer(plain, USER, "4", include_eos=include_eos)
        assert ids[:start] == opened["input_ids"]
        assert ids[start:] == plain("4")["input_ids"] + [plain.eos_token_id] * include_eos


@pytest.mark.parametrize("after", ["\n", "", "{{ eos_token }}", "\nEnd\n"])
def test_what_a_template_writes_after_the_end_is_left_out(plain, after):
    plain.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}"
        + after
        + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ids, start = encode_answer(plain, USER, "4")
    eos = plain.eos_token_id
    said = [token for token in ids[start:] if token != eos]
    assert plain.decode(said).strip().startswith("4") and ids[-1] == eos


@pytest.mark.parametrize("single", ["$A {eos}", "{bos} $A {eos}", "{bos} $A"])
def test_what_a_tokenizer_puts_around_texts_is_there_once(plain, single):
    """As Llama's does with `add_eos_token=True`: sampled prompts stay open."""
    bos, eos = "<|endoftext|>", plain.eos_token
    bare = plain("2+2=")["input_ids"]
    expected = encode_answer(plain, "2+2=", "4")
    plain.add_special_tokens({"bos_token": bos})
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single.format(bos=bos, eos=eos),
        special_tokens=[(bos, plain.bos_token_id), (eos, plain.eos_token_id)],
    )
    before = [plain.bos_token_id] * ("{bos}" in single)
    assert encode(plain, "2+2=") == before + bare
    assert encode(plain, bos + "2+2=") == [plain.bos_token_id, *bare]
    ids, start = encode_answer(plain, "2+2=", "4")
    assert (ids, start) == (before + expected.ids, len(before) + expected.prompt_length)
    assert encode(plain, "2+2=" + eos) == [*before, *bare, plain.eos_token_id]  # as it was written
    plain.chat_template = "{{ bos_token }}" + TEMPLATES["plain"]
    assert encode(plain, USER).count(plain.bos_token_id) == 1


def test_a_first_token_is_never_scored(plain):
    ids, start = encode_answer(plain, "", "some text")
    assert start == 1 and len(ids) > 2


def test_a_tokenizer_without_an_end_is_taken_as_it_is(plain):
    plain.eos_token = None
    ids, start = encode_answer(plain, "2+2= ", "4")
    assert ids[start:] == plain("4")["input_ids"]


def test_an_open_last_message_is_continued(plain):
    prompt = [*USER, {"role": "assistant", "content": "2+2"}]
    anew, open_ = encode(plain, prompt), {"continue_final_message": True}
    assert plain.decode(anew).endswith("2+2<|im_end|>\n<|im_start|>assistant\n")  # as TRL trains
    continued = encode(plain, prompt, options=open_)
    assert plain.decode(continued).endswith("<|im_start|>assistant\n2+2")
    ids, start = encode_completion(plain, prompt, "=4", options=open_)
    assert ids[:start] == continued and plain.decode(ids[start:]) == "=4<|im_end|>"


def test_options_of_a_row_are_read_from_json_too():
    as_json = {name: json.dumps(value) for name, value in ASKED.items()}
    expected = {"tools": [{"name": "add"}], "enable_thinking": False}
    assert template_options(ASKED) == template_options(as_json) == expected
    assert template_options({"tools": None, "chat_template_kwargs": None}) == {}
    assert options_of(Dataset.from_list([as_json, as_json])) == [expected] * 2
    for wrong, said in (({"tools": "add("}, "`tools` is no JSON"), ({"tools": "{}"}, "be a list")):
        with pytest.raises(ValueError, match=said):
            template_options(wrong)


def test_messages_that_cannot_be_rendered_are_refused_in_words(plain):
    plain.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + TEMPLATES["plain"]
    )
    with pytest.raises(ValueError, match="refuses messages of the roles system, user: no system"):
        encode(plain, [{"role": "system", "content": "a"}, *USER])
    with pytest.raises(ValueError, match="prompt is text and the completion messages"):
        encode_completion(plain, "a", [{"role": "assistant", "content": "b"}])
    plain.chat_template = None
    with pytest.raises(ValueError, match="messages, and the tokenizer has no chat template"):
        encode(plain, USER)


def test_a_turn_ends_with_its_first_special_token(plain):
    end, text, blank = (plain.convert_tokens_to_ids(t) for t in ("<|im_end|>", "a", "Ċ"))
    other = plain.convert_tokens_to_ids("<|endoftext|>")
    for ids, expected in (
        ([text, end, blank], 2),
        ([text, end, blank, other], 2),
        ([text, blank, other, end], 3),
        ([text, end, blank, text, blank], 5),
        ([end, blank, text, end], 4),
    ):
        assert turn_end(plain, ids) == expected
    labels = [-100, end, blank, -100]
    assert scored_to_the_end(plain, [text, end, blank, end], labels) == [-100, end, -100, -100]
    assert scored_to_the_end(plain, [text, end, blank], [-100] * 3) == [-100] * 3


def test_a_turn_at_whose_end_sampling_runs_on_is_told(plain, caplog):
    with caplog.at_level(logging.WARNING):
        check_turn_end(plain, {plain.eos_token_id})
        assert not caplog.text
        check_turn_end(plain, {plain.convert_tokens_to_ids("<|endoftext|>")})
    assert "'<|im_end|>', which is no stop token: sampling runs on behind it" in caplog.text
