"""Models by name: what is here, what is the Hub's, and folders that would not load whole."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from trl import ModelConfig

from llmmix import DCOConfig
from llmmix.checkpoints.folders import check_checkpoint, local_path
from llmmix.models import Checkpoint, Loader, prepare_model_args, resolve_checkpoint

ODD = ["m[1]", "a b", "ünï@c", "x=y", "m#1,2"]


@pytest.fixture
def home(checkpoint, tmp_path, monkeypatch):
    """A home folder, which is the current one too, with the checkpoint in `m`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "m")
    return tmp_path


def test_a_folder_is_found_whatever_its_name(home):
    for name in ODD:
        (home / name).symlink_to(home / "m")
        for given in (name, f"./{name}", f"{name}/", f"~/{name}", str(home / name), home / name):
            found = resolve_checkpoint(given)
            assert AutoModelForCausalLM.from_pretrained(found).config.hidden_size == 32, given
    args = DCOConfig("out", chat_template_path="~/m")
    assert prepare_model_args(ModelConfig(model_name_or_path="~/m"), args) == str(home / "m")
    assert args.chat_template_path == str(home / "m")


@pytest.mark.parametrize(
    "name",
    [
        *("./no", "/no", "~/no", "m/no", "no/", "../no", "a/b/c", "a b", "ünï", "m[1]", "a@b", ""),
        *("no.gguf", "org/no.gguf", "no.safetensors", "no.jinja"),
    ],
)
def test_what_is_no_hub_id_is_looked_for_here_alone(name, home):
    with pytest.raises(FileNotFoundError, match="`original`: no file or folder"):
        resolve_checkpoint(name, "original")


def test_hub_ids_stay(home):
    for name in ("gpt2", "org/model", "Qwen/Qwen2.5-0.5B", "a_b/c.d-e"):
        assert local_path(name) is None and resolve_checkpoint(name) == name


def test_a_file_that_is_no_checkpoint_is_refused(home):
    with pytest.raises(ValueError, match="`original`: m/model.safetensors is a file"):
        resolve_checkpoint("m/model.safetensors", "original")
    with pytest.raises(ValueError, match="`original`: no built-in 'builtin:huge'"):
        resolve_checkpoint("builtin:huge", "original")


def without(*names):
    return lambda folder: [path.unlink() for name in names for path in folder.glob(name)]


def only_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_a_layer(folder):
    file = folder / "model.safetensors"
    kept = {key: value for key, value in load_file(file).items() if "layers.1.mlp" not in key}
    save_file(kept, file, metadata={"format": "pt"})


def other_shape(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, file, metadata={"format": "pt"})


def without_a_shard(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    sorted(folder.glob("model-0*.safetensors"))[1].unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


FAULTS = [
    (without("config.json"), "no config.json"),
    (without("*.safetensors"), "no weights"),
    (without("tokenizer*"), "no tokenizer"),
    (only_bin, "no safetensors but pytorch_model.bin, which may run code"),
    (cut, "model.safetensors of .* is not whole"),
    (without_a_layer, r"lacks model.layers.1.mlp.down_proj.weight and 2 more tensors"),
    (other_shape, "has another shape of model.norm.weight"),
    (without_a_shard, "model.safetensors.index.json of .* names .*, which is missing"),
    (broken_config, "config.json of .* is not whole"),
]


@pytest.mark.parametrize(("spoil", "said"), FAULTS)
def test_a_folder_that_would_not_load_whole_is_refused_before_it_loads(spoil, said, home):
    check_checkpoint("m", "checkpoints")
    spoil(home / "m")
    with pytest.raises(ValueError, match=f"`checkpoints`: .*{said}"):
        check_checkpoint("m", "checkpoints")


def test_shards_and_tied_heads_and_what_a_tokenizer_is_not_needed_for_pass(home, model):
    shutil.rmtree(home / "m")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained("m", max_shard_size="60KB")
    assert len(list((home / "m").glob("model-0*.safetensors"))) > 1
    check_checkpoint("m", tokenizer=False)


def test_weights_that_would_be_new_are_refused_when_they_load(home):
    without_a_layer(home / "m")
    with pytest.raises(ValueError, match="`model_name_or_path`: m lacks model.layers.1.mlp"):
        Loader(torch.device("cpu")).model(Checkpoint("x", "m"))
