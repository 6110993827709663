"""A process's memory as the processes forked from it share it best: without garbage and without holes, and left alone."""

import gc

_POOL_BYTES, _POOL_HEADER_BYTES = 16 << 10, 48  # CPython keeps small objects in pools, each for one size: Objects/obmalloc.c
_SIZES = range(48, 513, 16)
_BYTES_OVERHEAD = 33  # of a bytes object
_MOST_BYTES = 512 << 10  # for each size, also where another allocator never gives a whole pool

_fillers: list[bytes] = []  # for as long as the process lives


def freeze() -> None:
    """Prepare this process for its forks.

    What a child allocates would go into holes between objects that all share, and copy a page for each; so the holes are
    filled. The collector, which writes into what it looks at, does not look at what is here by now.
    """
    gc.collect()
    for size in _SIZES:
        _fill_holes(size)
    gc.freeze()


def _fill_holes(size: int) -> None:
    """Take what is free for objects of this size, up to the first pool that is all free: there, they follow each other."""
    whole_pool = (_POOL_BYTES - _POOL_HEADER_BYTES) // size - 2
    in_a_row, last = 0, 0
    for _ in range(_MOST_BYTES // size):
        _fillers.append(bytes(size - _BYTES_OVERHEAD))
        at = id(_fillers[-1])
        in_a_row, last = (in_a_row + 1 if at == last + size else 0), at
        if in_a_row == whole_pool:
            return
