import numpy as np
import pytest
import torch

from llmmix.sampling.requests import SamplingOptions
from llmmix.sampling.token_draws import BLOCK, draw, probabilities, uniforms


def test_streams_are_apart_and_uniform():
    streams = np.stack([uniforms(1, p, s, 100) for p in range(20) for s in range(20)])
    assert len(np.unique(streams)) == streams.size
    assert abs(streams.mean() - 0.5) < 0.005 and np.abs(np.corrcoef(streams)).mean() < 0.09
    np.testing.assert_array_equal(uniforms(1, 2, 3, 10), uniforms(1, 2, 3, 50)[:10])


@pytest.mark.parametrize("vocabulary", [7, 256, 1000])
def test_inverse_of_the_cumulative_distribution(vocabulary):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(40, vocabulary, generator=generator) ** 4
    p[:, ::3] = 0
    p = torch.nn.functional.pad(p, (0, -vocabulary % BLOCK))
    u = torch.rand(40, generator=generator, dtype=torch.float64)
    u[0], u[1] = 0, 1 - 2**-53
    exact = (p.double() / p.double().sum(1, keepdim=True)).cumsum(1)
    expected = (exact > u[:, None]).int().argmax(1)
    tokens = draw(p, u)
    assert torch.equal(tokens[2:], expected[2:])
    assert (p.gather(1, tokens[:, None]) > 0).all()  # never what has no probability


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_temperature_zero_takes_the_first_of_equals_whatever_is_drawn(top_p):
    logits = torch.zeros(4, 1000)
    logits[0, [3, 700]] = 1.0
    logits[1, [255, 256, 999]] = 80.0
    logits[2] = -float("inf")
    logits[2, 999] = -500.0
    u = torch.tensor([0, 0.3, 0.7, 1 - 2**-53], dtype=torch.float64)
    greedy = SamplingOptions(0, top_p, 1, 0, 1, 1)
    for order in (u, u.flip(0)):
        assert draw(probabilities(logits, greedy), order).tolist() == [3, 255, 999, 0]
        assert draw(probabilities(logits.bfloat16(), greedy), order).tolist() == [3, 255, 999, 0]
