"""Adapters: their own tokenizer, their base, their vocabulary, and what cannot be one."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import ModelConfig

from llmmix import DCOConfig, DCOTrainer, cli
from llmmix.checkpoints.adapters import check_checkpoints, named_checkpoints
from llmmix.models import Checkpoint, Loader, prepare_model_args

CHAT = [{"role": "user", "content": "hi"}]
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)


@pytest.fixture
def adapter(model, checkpoint, tmp_path):
    """The folder of an adapter of the checkpoint, without a tokenizer."""
    get_peft_model(model, LORA).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def config_of(adapter, **changes):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def template(tokenizer):
    return tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)


def both_ways(checkpoint, adapter):
    """Named by `adapter`, and standing for a model itself."""
    return [
        *named_checkpoints([checkpoint], [str(adapter)]),
        *named_checkpoints([str(adapter)]),
    ]


def test_an_adapters_own_tokenizer_and_template_are_used(checkpoint, adapter, tokenizer):
    loader = Loader(torch.device("cpu"))
    for run in both_ways(checkpoint, adapter):
        assert template(loader.tokenizer(run)) == template(tokenizer)
    own = tokenizer.chat_template.replace("<|im_start|>", "[")
    (adapter / "chat_template.jinja").write_text(own, encoding="utf-8")
    for run in both_ways(checkpoint, adapter):  # the model's tokenizer, and this template
        assert template(loader.tokenizer(run)) == "[user\nhi<|im_end|>\n[assistant\n"
    longer = loader.tokenizer(Checkpoint("x", checkpoint))
    longer.add_tokens(["<think>"])
    longer.save_pretrained(adapter)
    for run in both_ways(checkpoint, adapter):
        assert len(loader.tokenizer(run)) == len(tokenizer) + 1


def test_tokens_added_in_training_are_there_when_the_adapter_is_loaded(
    model, checkpoint, tokenizer, tmp_path
):
    rows, ids = model.get_input_embeddings().weight.shape[0], torch.tensor([[1, 2, 3]])
    loader = Loader(torch.device("cpu"))
    model.resize_token_embeddings(rows + 5)
    adapted = get_peft_model(model, LORA)
    adapted.save_pretrained(tmp_path / "run", save_embedding_layers=True)
    with torch.no_grad():
        wanted = adapted(ids).logits
    for run in both_ways(checkpoint, tmp_path / "run"):
        torch.testing.assert_close(loader.model(run)(ids).logits, wanted)


def test_an_adapters_base_is_taken_in_the_revision_that_it_names(adapter):
    config_of(adapter, base_model_name_or_path="org/base", revision="v2")
    (found,) = named_checkpoints([str(adapter)])
    assert (found.model, found.adapter, found.revision) == ("org/base", str(adapter), "v2")


@pytest.mark.parametrize("home", [False, True])
def test_an_adapter_of_a_built_in_loads(home, adapter, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tiny-1").symlink_to(checkpoint)
    config_of(adapter, base_model_name_or_path="builtin:tiny")
    runs = named_checkpoints(["~/run" if home else str(adapter)])
    check_checkpoints(runs)
    loader = Loader(torch.device("cpu"))
    assert any("lora" in name for name, _ in loader.model(runs[0]).named_parameters())
    assert runs[0].name == "run" and loader.tokenizer(runs[0]) is not None


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("", "`original`: .* is an adapter that names no base. Name the base with"),
        ("/no/base", "`original`: .* is an adapter of /no/base, which is not there"),
        ("no.gguf", "`original`: .* is an adapter of no.gguf, which is not there"),
        ("itself", "`original`: .* is an adapter of .*, which is an adapter itself"),
    ],
)
def test_an_adapter_without_a_base_is_refused(base, said, adapter):
    config_of(adapter, base_model_name_or_path=str(adapter) if base == "itself" else base)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        check_checkpoints([], original=str(adapter))


def test_what_is_no_adapter_is_refused(checkpoint, adapter, tmp_path):
    def check(given, model=checkpoint):
        check_checkpoints(named_checkpoints([model], [str(given)]))

    with pytest.raises(FileNotFoundError, match="`adapter`: no file or folder /no/run"):
        check("/no/run")
    with pytest.raises(FileNotFoundError, match="`adapter`: no folder nope is here"):
        check("nope")
    with pytest.raises(ValueError, match="`adapter`: .* holds no adapter: it has no adapter_con"):
        check(checkpoint)
    with pytest.raises(ValueError, match="is an adapter itself: name its base"):
        check(adapter, model=str(adapter))
    empty = shutil.copytree(adapter, tmp_path / "empty")
    (empty / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="`adapter`: .* holds no adapter: it has no weights"):
        check(empty)
    (adapter / "adapter_model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="adapter_model.safetensors of .* is not whole"):
        check(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is not whole"):
        named_checkpoints([str(adapter)])


def test_an_adapter_of_another_model_is_refused_in_one_line(checkpoint, adapter):
    config_of(adapter, target_modules=["no_such_layer"])
    (run,) = named_checkpoints([checkpoint], [str(adapter)])
    with pytest.raises(ValueError, match="`adapter`: .* does not fit the model .*") as told:
        Loader(torch.device("cpu")).model(run)
    assert "\n" not in str(told.value)


def test_training_on_from_an_adapters_folder_says_how(adapter, math_rows, tmp_path, capsys):
    said = "holds an adapter alone, of .*. To train on from it, merge it first"
    with pytest.raises(ValueError, match=f"`model_name_or_path`: .* {said}"):
        prepare_model_args(ModelConfig(model_name_or_path=str(adapter)), DCOConfig("out"))
    with pytest.raises(ValueError, match=f"`model`: .* {said}"):
        DCOTrainer(adapter, args=DCOConfig(str(tmp_path)), train_dataset=math_rows)
    argv = ["run", "dco", "--model_name_or_path", str(adapter), "--dataset_name", "builtin:math"]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
