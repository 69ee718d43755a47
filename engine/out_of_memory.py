"""Going on when the GPU runs out of memory: the same work again, in smaller pieces.

Left out on purpose: sharded models (FSDP), whose other processes are waiting inside the pass that failed.
"""

from collections.abc import Callable

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


def retry_smaller(attempt: Callable, can_shrink: Callable[[], bool], shrink: Callable[[], None]):
    """attempt(), and again after shrink() each time that it runs out of memory while can_shrink() is true.

    Any other error is raised, and so is the one that comes when nothing can be made smaller.
    """
    while True:
        try:
            return attempt()
        except (RuntimeError, torch.OutOfMemoryError) as error:
            if not should_reduce_batch_size(error) or not can_shrink():
                raise
        # Out of the except block, which would keep the tensors alive.
        shrink()
        clear_device_cache(garbage_collection=True)
