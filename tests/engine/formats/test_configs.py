"""Settings of other programs: known shapes, and configs that are refused."""

import pytest

from engine.formats import configs


def test_meta_feed_forward_of_known_models():
    for dim, hidden in [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (4096, 14336), (8192, 28672),
                        (2048, 8192), (3072, 8192), (576, 1536), (64, 192), (2048, 5632), (96, 131)]:  # fmt: skip
        assert configs.meta_hidden_dim(dim, **configs.meta_feed_forward(dim, hidden)) == hidden
    assert configs.meta_feed_forward(4096, 11008) == {"multiple_of": 256}  # as Meta has it


@pytest.mark.parametrize(
    "bos, eos, found", [(1, (2,), (1, 2)), (1, [2, 3], (1, [2, 3])), (None, (), (None, None)), (0, [0], (0, 0))]
)
def test_ids_that_begin_and_end_a_text(bos, eos, found):
    assert tuple(configs.token_ids_to_hf(bos, eos).values()) == found
