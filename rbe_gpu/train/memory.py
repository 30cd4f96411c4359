"""PyTorch without enough memory: a MemoryError that names the options by which training takes less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: in the RuntimeErrors of PyTorch's allocator on a CPU: of Linux, of Windows, and of C++ code without one of its own
_ON_CPU = ("can't allocate memory", "not enough memory", "bad_alloc")


@contextmanager
def memory_errors(batch_size: int, max_tokens: int) -> Iterator[None]:
    """A context in which PyTorch's errors about memory, of a CPU or a GPU, are a MemoryError.

    batch_size, max_tokens : of a step of training
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if not isinstance(error, torch.cuda.OutOfMemoryError) and not any(w in message for w in _ON_CPU):
            raise
        raise MemoryError(
            f"training needs more memory than PyTorch gets ({message.partition(chr(10))[0]}); use less than "
            f"batch_size={batch_size}, or than max_tokens={max_tokens}"
        ) from None
