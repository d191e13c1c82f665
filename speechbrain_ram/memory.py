"""Memory that was freed stays with the process.

By default the C library gives large blocks back to the kernel at once and
asks for them again at the next training step. The kernel clears each page
before it hands it out, which on a CPU took a tenth of a step and more.
"""

from __future__ import annotations

import ctypes
import platform

# From malloc.h of glibc; -1 as the trim threshold means never.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process reuse what it frees instead of giving it back.

    For a process of its own that repeats the same work, as training does; it
    then looks as large as it ever was. Only glibc (most of Linux) can be told.

    Returns
    -------
    bool
        Whether it was told.

    Example
    -------
    >>> keep_freed_memory() in (True, False)
    True
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
