from hypothesis import given
from hypothesis import strategies as st

from router.queueing.lazy_heap import LazyHeap


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3)), max_size=60))
def test_behaves_like_a_sorted_list(steps):
    """Each step adds the id under a key, or takes it out if it is in."""
    heap, model = LazyHeap(), {}
    for number, (id_, key) in enumerate(steps):
        if id_ in model:
            heap.remove(id_)
            del model[id_]
        else:
            heap.push(id_, (float(key),))
            model[id_] = (key, number)
        expected = sorted(model, key=model.__getitem__)
        assert len(heap) == len(expected)
        assert list(heap.in_order()) == expected
        if expected:
            assert heap.head()[1] == expected[0]


def test_the_removed_do_not_pile_up():
    """A thousand come and go behind one that stays at the head."""
    heap = LazyHeap()
    heap.push("first", (0.0,))
    for number in range(1000):
        heap.push(str(number), (1.0,))
        heap.remove(str(number))
    assert len(heap._entries) < 20
    assert heap.head()[1] == "first"


def test_removing_what_is_not_there_changes_nothing():
    heap = LazyHeap()
    heap.push("a", (1.0,))
    heap.remove("b")
    assert list(heap.in_order()) == ["a"]
