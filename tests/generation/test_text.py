"""Stop strings on the byte stream and streaming of whole code points."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast.generation.stop import StopMatcher
from gptfast.generation.stream import TextStream


def feed(stops, pieces):
    matcher = StopMatcher(stops)
    released = [matcher.feed(piece) for piece in pieces]
    return released, matcher


def test_a_match_across_pieces_is_found_and_never_released():
    released, matcher = feed([b"END"], [b"abE", b"N", b"Dxyz", b"more"])
    assert released == [b"ab", b"", b"", b""] and matcher.matched == b"END" and matcher.flush() == b""


def test_what_could_become_a_match_is_held_back_and_let_go():
    released, matcher = feed([b"END"], [b"xEN", b"Ex", b"E"])
    assert released == [b"x", b"ENEx", b""] and matcher.matched is None and matcher.flush() == b"E"


def test_the_match_that_ends_first_wins_then_the_longest():
    assert feed([b"abcd", b"bc"], [b"xabcd"])[0] == [b"xa"]
    assert feed([b"bc", b"abc"], [b"xabc"])[0] == [b"x"]
    released, matcher = feed([b"aab"], [b"aaab"])
    assert released == [b"a"] and matcher.matched == b"aab"


def expected(stops, text):
    """(released text, matched) by looking at every prefix."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4), st.lists(st.text("abc", max_size=5), max_size=8)
)
def test_however_the_text_is_cut(stops, pieces):
    stops, pieces = [s.encode() for s in stops], [p.encode() for p in pieces]
    released, matcher = feed(stops, pieces)
    assert (b"".join(released) + matcher.flush(), matcher.matched) == expected(stops, b"".join(pieces))


def test_an_emoji_over_four_tokens_comes_out_whole():
    tokens = {i: bytes([byte]) for i, byte in enumerate("a😀b".encode())}
    stream = TextStream(tokens.__getitem__)
    assert [stream.push(i) for i in range(6)] == ["a", "", "", "", "😀", "b"] and stream.finish() == ""


def test_what_is_no_utf8_becomes_replacement_characters():
    data = b"\xf0\x9f\x98 \xffok \xe2\x82"
    stream = TextStream({i: bytes([b]) for i, b in enumerate(data)}.__getitem__)
    text = "".join(stream.push(i) for i in range(len(data))) + stream.finish()
    assert text == data.decode(errors="replace") and text.endswith("�")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=30), st.integers(0, 2**20))
def test_pieces_join_to_the_whole(data, cuts):
    pieces, start = [], 0
    for end in range(1, len(data) + 1):
        if cuts >> end & 1 or end == len(data):
            pieces.append(data[start:end])
            start = end
    stream = TextStream(dict(enumerate(pieces)).__getitem__)
    assert "".join(stream.push(i) for i in range(len(pieces))) + stream.finish() == data.decode(errors="replace")


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_stop_string_inside_code_points_and_tokens(cut):
    data = "né€!€?".encode()
    stream = TextStream({0: data[:cut], 1: data[cut:]}.__getitem__, ["€!"])
    text = stream.push(0) + stream.push(1) + ("" if stream.stopped else stream.finish())
    assert text == "né" and stream.stopped
