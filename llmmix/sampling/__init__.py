"""N completions a prompt, on transformers or vLLM."""

from llmmix.rows.prompts import encode
from llmmix.sampling.completions import sample
from llmmix.sampling.requests import Completion

__all__ = ["Completion", "encode", "sample"]
