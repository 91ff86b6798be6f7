import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given
from hypothesis import strategies as st

from fedeq_edge.masking.masks import add_masks, pack, unpack

KEYS = [bytes([number]) * 32 for number in range(4)]


def test_a_mask_is_the_chacha20_stream_of_its_key_as_little_endian_words() -> None:
    words = np.zeros(10_000, np.uint64)
    add_masks(words, added=KEYS[:1], subtracted=[])
    stream = Cipher(ChaCha20(KEYS[0], bytes(16)), mode=None).encryptor().update(bytes(80_000))
    assert np.array_equal(words, np.frombuffer(stream, "<u8"))
    # RFC 8439, appendix A.1, test vector 1: key, nonce and counter of zeros
    zeros = np.zeros(1, np.uint64)
    add_masks(zeros, added=[bytes(32)], subtracted=[])
    assert zeros.astype("<u8").tobytes().hex() == "76b8e0ada0f13d90"


def test_masks_added_here_and_subtracted_there_cancel() -> None:
    words = np.arange(9000, dtype=np.uint64)
    add_masks(words, added=KEYS, subtracted=[])
    add_masks(words, added=[], subtracted=KEYS[::-1])
    assert np.array_equal(words, np.arange(9000))


@given(bits=st.integers(8, 64), values=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40))
def test_packing_keeps_the_lowest_bits_and_wastes_none(bits: int, values: list[int]) -> None:
    packed = pack(np.array(values, np.uint64), bits)
    assert len(packed) == -(-len(values) * bits // 8)
    assert unpack(packed, len(values), bits).tolist() == [value % 2**bits for value in values]


@pytest.mark.parametrize("bits", [33, 64])
def test_packing_is_one_string_of_bits_across_slabs(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits - 1, 8192 * 2 + 3, dtype=np.uint64, endpoint=True)
    packed = pack(values, bits)
    whole = int.from_bytes(packed, "little")
    assert [whole >> bits * place & (2**bits - 1) for place in (0, 8191, 8192, 16386)] == [
        int(values[place]) for place in (0, 8191, 8192, 16386)
    ]
    assert np.array_equal(unpack(packed, values.size, bits), values)
