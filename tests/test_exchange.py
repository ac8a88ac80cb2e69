"""Computations that need sums run side by side; those that wait for one group share a message."""

import pytest
import torch
import torch.distributed as dist

from sinkgd.exchange import Sum, computation, exchange, immediate, run, sums_in_turn


@computation
def doubled(x):
    found = yield immediate(x)
    return 2 * found


@computation
def pair(x):
    one, other = yield [doubled(x), doubled(x + 1)]
    nothing = yield []
    return one, other, nothing


def test_computations_wait_for_others_and_return_what_they_return():
    assert run(pair(3)) == (6, 8, [])
    assert exchange([doubled(i) for i in range(2000)]) == [2 * i for i in range(2000)]


def test_without_sums_each_runs_to_its_end_before_the_next_begins():
    seen = []

    @computation
    def noted(name):
        for step in range(2):
            yield immediate(None)
            seen.append((name, step))

    exchange([noted("a"), noted("b")])
    assert seen == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_an_error_reaches_the_caller():
    @computation
    def broken():
        yield immediate(None)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        exchange([doubled(1), broken()])


@pytest.fixture
def sent(monkeypatch):
    """The group and the numbers of each message; there are two equal ranks."""
    messages = []

    def all_reduce(message, group):
        messages.append((group, message.tolist()))
        message.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return messages


@computation
def summed(number, groups, times=1, dtype=torch.float64):
    vector = torch.tensor([number], dtype=dtype)
    for _ in range(times):
        yield from sums_in_turn(vector, groups)
    return vector.item()


def test_those_that_wait_for_one_group_share_a_message(sent):
    assert exchange([summed(i, ["a"], times=3) for i in (1, 2)]) == [8, 16]
    assert sent == [("a", [1, 2]), ("a", [2, 4]), ("a", [4, 8])]


def test_a_group_waits_for_those_that_ask_for_another_one_before(sent):
    """Had the first gone ahead alone, there would be a message more."""
    assert exchange([summed(1, ["b"], times=5), summed(1, ["a", "b"], times=5)]) == [32, 1024]
    assert [group for group, _ in sent] == ["a", "b"] * 5


def test_orders_that_contradict_each_other_cost_a_message_more(sent):
    exchange([summed(1, ["a", "b"], times=5), summed(1, ["b", "a"], times=5)])
    assert len(sent) == 11


def test_a_message_has_one_dtype(sent):
    given = [summed(1, ["a"]), summed(2, ["a"], dtype=torch.float32), summed(3, ["a"])]
    assert exchange(given) == [2, 4, 6]
    assert sent == [("a", [1, 3]), ("a", [2])]


def test_a_long_vector_is_added_up_where_it_lies(sent):
    """Alone it is the message, and nothing is copied."""
    vector = torch.ones(3)

    @computation
    def alone():
        yield Sum(vector, "a")

    run(alone())
    assert vector.tolist() == [2, 2, 2]
