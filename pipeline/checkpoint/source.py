"""Input tensors: where the values of one come from."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.pipeline.stores.files import StoredFile


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One input tensor: where its bytes lie."""

    model: str
    """The model reference, for messages."""
    name: str
    dtype: str
    """As in a safetensors header."""
    shape: tuple[int, ...]
    file: StoredFile
    start: int
    """Offset of the first byte in the file."""
    stop: int
    """Offset after the last byte: the tensor is [start, stop) of the file."""

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.stop - self.start

    def __repr__(self) -> str:
        return f"StoredTensor({self.name} of {self.model}, {self.dtype} {list(self.shape)})"
