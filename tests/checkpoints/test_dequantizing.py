"""GGUF files are read whole or refused: shards, missing tensors, foreign and broken files."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from llmmix import DCOConfig, DCOTrainer
from llmmix.checkpoints.adapters import named_checkpoints
from llmmix.models import Loader, resolve_checkpoint

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def name_in_gguf(name):
    name = name.removesuffix(".weight")
    if not name.startswith("model.layers."):
        return f"{NAMES[name]}.weight"
    number, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[part]}.weight"


def in_gguf_order(name, weight, config):
    """Rotary halves lie one after the other in transformers, and in turn in GGUF."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            halves = weight.reshape(count, 2, -1, weight.shape[-1])
            return halves.swapaxes(1, 2).reshape(weight.shape)
    return weight


@pytest.fixture
def write(model, tokenizer, tmp_path, monkeypatch):
    """A function that writes the model, or the tensors that `keep` says, as a GGUF file."""
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))

    def written(name, keep=lambda name: True, architecture="llama", split=None):
        config, path = model.config, tmp_path / name
        file = gguf.GGUFWriter(path, architecture)
        file.add_context_length(config.max_position_embeddings)
        file.add_embedding_length(config.hidden_size)
        file.add_block_count(config.num_hidden_layers)
        file.add_feed_forward_length(config.intermediate_size)
        file.add_head_count(config.num_attention_heads)
        file.add_head_count_kv(config.num_key_value_heads)
        file.add_layer_norm_rms_eps(config.rms_norm_eps)
        file.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        file.add_vocab_size(config.vocab_size)
        parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        file.add_tokenizer_model("gpt2")
        file.add_tokenizer_pre("default")
        file.add_token_list(tokens)
        file.add_token_types([3 if t in tokenizer.all_special_tokens else 1 for t in tokens])
        file.add_token_merges([" ".join(pair) for pair in parts["merges"]])
        file.add_eos_token_id(tokenizer.eos_token_id)
        file.add_pad_token_id(tokenizer.pad_token_id)
        file.add_chat_template(tokenizer.chat_template)
        for key, value in zip(("split.no", "split.count"), split or (), strict=False):
            file.add_uint16(key, value)
        for key, weight in model.state_dict().items():
            if keep(name_in_gguf(key)):
                ordered = in_gguf_order(key, weight.numpy(), config)
                file.add_tensor(name_in_gguf(key), np.ascontiguousarray(ordered))
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        return path

    return written


def test_a_whole_file_gives_the_model_and_its_tokenizer(write, model):
    folder = resolve_checkpoint(write("m [1].GGUF"), "original")
    loaded, ids = LlamaForCausalLM.from_pretrained(folder), torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "m-00001-of-00002.gguf"}, r"is shard 1 of 2. Join them .*--merge"),
        ({"name": "m.gguf", "split": (1, 3)}, r"is shard 2 of 3. Join them .*--merge"),
        (
            {"name": "m.gguf", "keep": lambda name: not name.startswith("blk.1")},
            "lacks model.layers.1.input_layernorm.weight and 8 more tensors",
        ),
        ({"name": "m.gguf", "architecture": "clip"}, "architecture clip is not supported"),
    ],
)
def test_half_a_model_is_refused_and_not_kept(write, tmp_path, given, said):
    path = write(**given)
    for _ in range(2):  # the second time too: nothing of it is in the cache
        with pytest.raises(ValueError, match=f"`original`: .*{said}"):
            resolve_checkpoint(path, "original")
    assert not list(tmp_path.glob("cache/gguf/*/*.safetensors"))


def test_a_single_shard_of_one_is_whole(write, model):
    assert resolve_checkpoint(write("m-00001-of-00001.gguf", split=(0, 1)))


@pytest.mark.parametrize("kept", [0, 10, 5000])
def test_a_file_that_is_no_whole_gguf_is_named(write, kept):
    path = write("m.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="`original`: .*m.gguf is not a whole GGUF file"):
        resolve_checkpoint(path, "original")


def test_an_adapter_of_a_gguf_file_names_the_file_and_loads_again(
    write, math_rows, tmp_path, monkeypatch
):
    from peft import LoraConfig

    monkeypatch.chdir(tmp_path)
    write("m.gguf")
    args = DCOConfig("out", max_steps=1, report_to=[], disable_tqdm=True)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    trainer = DCOTrainer("m.gguf", args=args, train_dataset=math_rows, peft_config=lora)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "m.gguf")
        card = (folder / "README.md").read_text()
        assert str(tmp_path / "m.gguf") in card and "cache" not in card
    (run,) = named_checkpoints([str(tmp_path / "out")])
    again = Loader(torch.device("cpu")).model(run)
    trained = dict(trainer.model.named_parameters())
    for name, weight in again.named_parameters():
        torch.testing.assert_close(weight, trained[name])
