"""Several things at once, each on its share of torch's threads."""

import threading

import pytest
import torch

from pbq.threads import AT_ONCE, at_once


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_each_is_made_once_and_in_order(threads):
    made = []

    def make(item):
        made.append(item)
        assert not torch.is_grad_enabled()
        return item * 2, torch.get_num_threads()

    found = at_once(make, [3, 1, 2])
    assert [double for double, _ in found] == [6, 2, 4] and sorted(made) == [1, 2, 3]
    share = threads // min(AT_ONCE, threads)
    assert {own for _, own in found} == {share}
    assert torch.get_num_threads() == threads and torch.is_grad_enabled()


def test_they_are_made_at_once():
    before = torch.get_num_threads()
    torch.set_num_threads(AT_ONCE)
    meeting = threading.Barrier(AT_ONCE, timeout=20)
    try:
        at_once(lambda item: meeting.wait(), list(range(AT_ONCE)))
    finally:
        torch.set_num_threads(before)


def test_one_item_keeps_all_threads(threads):
    assert at_once(lambda item: torch.get_num_threads(), ["alone"]) == [threads]


def test_the_first_error_is_raised_and_the_threads_are_given_back(threads):
    def make(item):
        if item:
            raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 1"):
        at_once(make, [0, 1, 2])
    assert torch.get_num_threads() == threads
