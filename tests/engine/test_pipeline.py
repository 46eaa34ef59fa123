"""Stages in threads: order kept, bounded numbers, errors that arrive, and no thread left."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mit_semseg.engine.pipeline import Budget, OrderedCalls


def test_results_come_in_the_order_of_the_calls():
    at_work, most = [0], [0]
    lock = threading.Lock()

    def late(number):
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        time.sleep(0.05 if number % 3 == 0 else 0.0)
        with lock:
            at_work[0] -= 1
        return number

    found = []
    with OrderedCalls[int](threads=3, most=4) as stage:
        for number in range(20):
            found += stage.add(late, number)
            assert number + 1 - len(found) < 4, "so many are held"
        found += stage.rest()
    assert found == list(range(20)) and 1 < most[0] <= 3


def test_an_error_takes_the_place_of_its_result():
    threads = threading.active_count()
    found = []
    with OrderedCalls[int](threads=2, most=9) as stage, pytest.raises(ValueError, match="'three'"):
        for number in ("1", "2", "three", "4"):
            found += stage.add(int, number)
        found += stage.rest()
    assert found == [1, 2] and threading.active_count() == threads


def test_memory_is_granted_in_order_and_bounded():
    budget, granted, held, peak = Budget(10), [], [0], [0]
    lock = threading.Lock()
    amounts = [4, 4, 4, 100, 1, 9, 0, 10, 3]

    def use(number):
        amount = budget.acquire(number, amounts[number])
        with lock:
            granted.append(number)
            held[0] += amount
            peak[0] = max(peak[0], held[0])
            assert held[0] <= 10
        time.sleep(0.01)
        with lock:
            held[0] -= amount
        budget.release(amount)

    with ThreadPoolExecutor(len(amounts)) as threads:
        # The last ones ask first.
        for future in [threads.submit(use, number) for number in reversed(range(len(amounts)))]:
            future.result(10)
    assert granted == sorted(granted) and peak[0] == 10 and budget.used == 0


def test_closing_the_budget_releases_waiting_threads():
    budget = Budget(10)
    budget.acquire(0, 10)
    waiting = threading.Thread(target=budget.acquire, args=(1, 1))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    budget.close()
    waiting.join(5)
    assert not waiting.is_alive()
