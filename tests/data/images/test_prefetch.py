"""Results in order, errors in their place, never far ahead."""

import itertools
import threading
import time

import pytest

from data.images.prefetch import default_workers, prefetch


def parts(item):
    return [10 * item + i for i in range(item % 4)]


def collect(items, decode=lambda part: -part, workers=3):
    return list(prefetch(items, parts, decode, lambda item, decoded: (item, decoded), workers))


EXPECTED = [(item, [-part for part in parts(item)]) for item in range(30)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order(workers):
    def slow_at_first(part):
        time.sleep(0.02 if part % 7 == 0 else 0)
        return -part

    assert collect(range(30), slow_at_first, workers) == EXPECTED
    assert collect([], workers=workers) == []


def test_decoding_runs_in_several_threads_at_once():
    meeting = threading.Barrier(3, timeout=10)
    collect([3], lambda part: meeting.wait())  # would break if fewer than three met
    names = []
    collect([3, 3], lambda part: names.append(threading.current_thread().name))
    assert all(name.startswith("decode") for name in names)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_in_its_turn_and_in_the_callers_thread(workers):
    def decode(part):
        if part == 51:
            raise ValueError("rows.jsonl:6: image x: broken")
        return -part

    results = prefetch(range(30), lambda item: [10 * item, 10 * item + 1], decode, lambda item, _: item, workers)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="rows.jsonl:6: image x: broken"):
        next(results)


def test_an_error_in_the_plan_comes_up_too():
    def items():
        yield 1
        raise ValueError("no such epoch")

    with pytest.raises(ValueError, match="no such epoch"):
        collect(items())


@pytest.mark.parametrize("count, ahead", [(0, 8), (1, 8), (3, 3), (10, 2)])
def test_how_far_ahead(count, ahead):
    """Two items, or enough of them that every thread has two parts; items without parts count, too."""
    begun = []

    def items():
        for item in itertools.count():
            begun.append(item)
            yield item

    results = prefetch(items(), lambda item: range(count), lambda part: part, lambda item, _: item, workers=4)
    assert next(results) == 0 and len(begun) == ahead
    assert next(results) == 1 and len(begun) == ahead + 1
    results.close()


def test_leaving_early_ends_the_threads_and_what_waits():
    before, decoded = threading.active_count(), []

    def decode(part):
        time.sleep(0.001)
        decoded.append(part)

    for _ in prefetch(itertools.count(), lambda item: [item] * 100, decode, lambda item, _: item, 2):
        break
    done = len(decoded)
    time.sleep(0.05)
    assert len(decoded) == done < 150  # 300 were under way
    assert threading.active_count() == before


def test_default_number():
    assert 1 <= default_workers() <= 8
