"""Rows and an adapter that the tests of scores, gradients and texts share."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model


@pytest.fixture
def rows():
    texts = ["1+1=", "What is 23+48?", "a", "12-3=", "6*7="]
    chat = [[{"role": "user", "content": text}] for text in texts]
    answers = ["2", "23+48=\n71, which is what was asked", "b c", "9", "42"]
    return Dataset.from_dict({"prompt": chat, "answer": answers})


@pytest.fixture
def adapted(model):
    """A copy of the model with a LoRA adapter that changes what it says."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    config.init_lora_weights = False
    return get_peft_model(copy.deepcopy(model), config)
