"""Decoding images ahead of the training loop, so that the GPU never waits for them."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item, Part, Result = TypeVar("Item"), TypeVar("Part"), TypeVar("Result")


def default_workers() -> int:
    """Threads that decode: as many as there are processors for this process, at most 8."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, available)


def prefetch(
    items: Iterable[Item],
    parts: Callable[[Item], list[int]],
    decode: Callable[[int], Part],
    assemble: Callable[[Item, list[Part]], Result],
    workers: int,
) -> Iterator[Result]:
    """`assemble(item, [decode(part) for part in parts(item)])` of each item, in order, made ahead in threads.

    Threads, not processes: Pillow decodes and resizes without the GIL, and nothing is copied. `workers` of them
    decode and one assembles. Two items are under way, and more while these have too few parts to keep all threads
    busy. An error comes up where its item would have come. With `workers` 0 everything happens here.
    """
    if workers < 1:
        for item in items:
            yield assemble(item, [decode(part) for part in parts(item)])
        return
    decoders = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    assembler = ThreadPoolExecutor(1, thread_name_prefix="assemble")

    def finish(item: Item, pending: list) -> Result:
        return assemble(item, [future.result() for future in pending])

    items = iter(items)
    under_way: deque = deque()  # (number of parts, future of the result)
    try:
        while True:
            while len(under_way) < 2 or max(len(under_way), sum(n for n, _ in under_way)) < 2 * workers:
                item = next(items, None)
                if item is None:
                    break
                pending = [decoders.submit(decode, part) for part in parts(item)]
                under_way.append((len(pending), assembler.submit(finish, item, pending)))
            if not under_way:
                return
            yield under_way.popleft()[1].result()
    finally:  # also when the loop is left early: what has not begun never will
        assembler.shutdown(wait=False, cancel_futures=True)
        decoders.shutdown(wait=True, cancel_futures=True)
