"""Data and a checkpoint that are always at hand: made here, deterministic, no network.

`builtin:math`         arithmetic problems with worked solutions and a boxed answer
`builtin:preferences`  pairs made from them: the right solution against a plausible wrong one
`builtin:authors`      questions about authors who do not exist, to be unlearned
`builtin:domains`      text of several domains that is on any machine
`builtin:tiny`         a Llama of about 1M parameters and a byte-level BPE tokenizer with a chat
                       template, trained once on arithmetic facts (about a minute) and cached

They are for trying things out and for tests. A result on them says nothing of a real model.
"""

from llmmix.builtin.datasets import dataset
from llmmix.builtin.tiny import pretraining_text, tiny_checkpoint, train_tokenizer

__all__ = ["dataset", "pretraining_text", "tiny_checkpoint", "train_tokenizer"]
