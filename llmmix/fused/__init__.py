"""The arithmetic of the fused head: tiles of logits, Triton kernels, weights spread over ranks."""
