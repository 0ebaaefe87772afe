"""Pages: the least recently used leave first, few are kept where few are asked for, and a key is its whole text."""

import pytest

from gptfast.generation.pages import PagePool, chain, keys_of


def test_the_least_recently_used_pages_leave_first():
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    assert pages == [0, 1, 2] and pool.take() is None
    for page in pages:
        pool.publish(page, bytes([page]))
    pool.release([0])
    pool.release([2, 1])  # of one text: 1, its end, leaves before 2
    assert pool.match([bytes([0])]) == [0]
    pool.release([0])
    assert [pool.take(), pool.take(), pool.take()] == [1, 2, 0] and pool.match([bytes([0])]) == []
    pool.check([[1, 2, 0]])
    with pytest.raises(AssertionError):
        pool.check([[1, 2]])


def test_few_pages_are_kept_where_few_are_asked_for():
    pool = PagePool(4, idle=1)
    pages = [pool.take(), pool.take()]
    for page in pages:
        pool.publish(page, bytes([page]))
    pool.release(pages)
    pool.check([])
    assert pool.match([bytes([0])]) == [0] and pool.match([bytes([1])]) == [] and pool.available == 3


def test_a_key_is_its_whole_text():
    ids = list(range(192))
    keys = keys_of(ids, [], 3)
    assert keys[1] == chain(chain(b"", ids[:64]), ids[64:128]) and len(set(keys)) == 3
    assert keys_of([1, *ids[1:]], [], 3)[2] != keys[2] and keys_of(ids[64:], [], 1)[0] != keys[1]
