"""Random masks that depend on nothing but seed, tensor, model and element."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from raymerge.ops.sparsifier import Sparsifier

if TYPE_CHECKING:
    import torch

STREAM_ELEMENTS = 2**31
"""A stream of counters ends here; the next elements of a tensor get keys of their own."""

_FIRST, _SECOND, _THIRD = 0xED5AD4BB, 0xAC4C1B51, 0x31848BAB
_SHIFT, _SECOND_SHIFT = 11, 15


class RandomSparsifier(Sparsifier):
    """Keeps each element with the same probability, whatever its value.

    Source: Yu et al. 2024, "Language Models are Super Mario", section 3.2 (the drop of DARE).
    """

    def __init__(self, density: float, *, seed: int, name: str, position: int) -> None:
        """Draw the mask of one model on one tensor.

        Args:
            density: probability that an element is kept, in (0, 1).
            seed: the merge's seed.
            name: the output tensor's name.
            position: index of the model among those that are not the base.
        """
        self._density = density
        self._identity = (seed, name, position)

    def trim(self, start: int, delta: torch.Tensor, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Set what the mask drops to zero."""
        write_random_bits(*self._identity, start, spares)
        delta.mul_(_compare(spares, int(self._density * 2**32)))


def write_random_bits(
    seed: int, name: str, position: int, start: int, spares: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Write 32 random bits for each element of a block into the first bytes of `spares[0]`.

    The element's index is hashed with the two keys of its stream. All is integer arithmetic modulo 2^32, so every
    device draws the same bits.

    Args:
        seed: the merge's seed.
        name: the output tensor's name.
        position: index of the model among those that are not the base.
        start: index of the block's first element; a multiple of a power of two that is no smaller than the block.
        spares: two blocks of scratch of the block's size; overwritten.

    Source: triple32 (Wellons 2018, "Prospecting for Hash Functions") without its first and its last shift: the first
    would be the same for all elements of a block, the last would only change the low bits. The first key goes to the
    index, the second between the rounds.
    """
    stream, offset = divmod(start, STREAM_ELEMENTS)
    first_key, second_key = _stream_keys(seed, name, position, stream)
    num_elements = spares[0].numel()
    if spares[0].device.type == "cpu":
        _hash_on_cpu(_counters(num_elements, "cpu"), offset ^ first_key, second_key, spares)
    else:
        _hash(_counters(num_elements, spares[0].device), offset ^ first_key, second_key, spares)


def _hash(counters: torch.Tensor, first_key: int, second_key: int, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Hash with torch, which has no logical shift: the bits that an arithmetic one brings in are masked out."""
    import torch

    bits, shifted = (_words(spare) for spare in spares)
    torch.bitwise_xor(counters, _as_int32(first_key), out=bits).mul_(_as_int32(_FIRST))
    torch.bitwise_right_shift(bits, _SHIFT, out=shifted).bitwise_and_(2 ** (32 - _SHIFT) - 1)
    bits.bitwise_xor_(shifted).mul_(_as_int32(_SECOND)).add_(_as_int32(second_key))
    torch.bitwise_right_shift(bits, _SECOND_SHIFT, out=shifted).bitwise_and_(2 ** (32 - _SECOND_SHIFT) - 1)
    bits.bitwise_xor_(shifted).mul_(_as_int32(_THIRD))


def _hash_on_cpu(
    counters: torch.Tensor, first_key: int, second_key: int, spares: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Hash with numpy, whose unsigned integers take half the time of torch's signed ones."""
    import numpy as np

    bits, shifted = (_words(spare).numpy().view(np.uint32) for spare in spares)
    np.bitwise_xor(counters.numpy().view(np.uint32), np.uint32(first_key), out=bits)
    np.multiply(bits, np.uint32(_FIRST), out=bits)
    np.right_shift(bits, np.uint32(_SHIFT), out=shifted)
    np.bitwise_xor(bits, shifted, out=bits)
    np.multiply(bits, np.uint32(_SECOND), out=bits)
    np.add(bits, np.uint32(second_key), out=bits)
    np.right_shift(bits, np.uint32(_SECOND_SHIFT), out=shifted)
    np.bitwise_xor(bits, shifted, out=bits)
    np.multiply(bits, np.uint32(_THIRD), out=bits)


def _compare(spares: tuple[torch.Tensor, torch.Tensor], limit: int) -> torch.Tensor:
    """Return 1 where the unsigned bits in `spares[0]` are below the limit and 0 elsewhere, in one of the spares."""
    import torch

    bits, mask = spares
    words = _words(bits)
    if bits.device.type != "cpu":
        return torch.lt(words.bitwise_xor_(-(2**31)), limit - 2**31, out=mask)
    import numpy as np

    flags = mask.view(torch.uint8)[: mask.numel()]
    np.less(words.numpy().view(np.uint32), np.uint32(limit), out=flags.numpy().view(np.bool_))
    return bits.copy_(flags)


@lru_cache(maxsize=1024)
def _stream_keys(seed: int, name: str, position: int, stream: int) -> tuple[int, int]:
    """Return two 32-bit keys that share nothing with those of another seed, tensor, model or stream."""
    identity = f"{seed}\0{position}\0{stream}\0{name}".encode()
    digest = blake2b(identity, digest_size=8, person=b"raymerge mask").digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _counters(num_elements: int, device: Any) -> torch.Tensor:
    """Return 0, 1, 2, ...; shared, never written to."""
    return _counter_table(1 << (num_elements - 1).bit_length(), device)[:num_elements]


@lru_cache(maxsize=32)
def _counter_table(num_elements: int, device: Any) -> torch.Tensor:
    import torch

    return torch.arange(num_elements, dtype=torch.int32, device=device)


def _words(scratch: torch.Tensor) -> torch.Tensor:
    """Return as many int32 as there are elements, in the memory of a block of scratch."""
    import torch

    return scratch.view(torch.int32)[: scratch.numel()]


def _as_int32(value: int) -> int:
    """Return the int32 with the low 32 bits of `value`."""
    return (value + 2**31) % 2**32 - 2**31
