"""How the C library keeps freed memory: left alone, it returns that of a step or a batch and then asks for new pages.

New pages are handed out zeroed, one fault for each 4 KiB: that costs more than all the copying of a picture, and it
slows the training of small models. Only glibc is told; other libraries are left as they are.
"""

import ctypes
import platform
from typing import Final

KEPT_BYTES: Final = 64 * 2**20  # of free memory, which the process holds on to
HEAP_BYTES: Final = 32 * 2**20  # larger pieces come from the kernel and go back to it; the most that glibc allows
_TRIM_THRESHOLD: Final = -1  # the numbers of mallopt's parameters in <malloc.h>
_MMAP_THRESHOLD: Final = -3


def is_glibc() -> bool:
    """Tell whether this process uses glibc."""
    return platform.libc_ver()[0] == "glibc"


def keep_memory(kept: int = KEPT_BYTES) -> None:
    """Let this process use freed memory again instead of returning it.

    Args:
        kept: Bytes of free memory above which the rest is returned; less than 2 GiB.
    """
    if is_glibc():
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, HEAP_BYTES)
        library.mallopt(_TRIM_THRESHOLD, kept)


def return_memory() -> None:
    """Return what is free now, after a body that should not have been received."""
    if is_glibc():
        ctypes.CDLL(None).malloc_trim(0)
