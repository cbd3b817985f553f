"""The codec: bytes in, objects out, and nothing but SwiprError for what is wrong."""

from __future__ import annotations

import json
import math
import os
import pickle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swiprctl import protocol
from swiprctl.protocol import (
    CODES,
    MAX_DEPTH,
    MAX_ID_BYTES,
    MAX_ID_INTEGER,
    MAX_LINE,
    OPS,
    Line,
    LineReader,
    Request,
    Result,
    SwiprError,
    Thumbnail,
)

# Time limits for each example would only measure how busy the machine is.
unhurried = settings(deadline=None)

MODEL = "sha256:" + "0" * 64

json_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
json_values = st.recursive(
    json_leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)
json_objects = st.dictionaries(st.text(max_size=5), json_values, max_size=5)
request_ids = (
    st.none() | st.integers(-MAX_ID_INTEGER, MAX_ID_INTEGER) | st.text(max_size=MAX_ID_BYTES // 4)
)
results = st.builds(
    lambda pairs, ms, thumbnail: Result(
        scores=tuple(score for score, _ in pairs),
        labels=tuple(label for _, label in pairs),
        model=MODEL,
        engine="compiled",
        precision="bf16",
        ms=ms,
        decode_ms=ms / 2,
        thumbnail=thumbnail,
    ),
    st.lists(st.tuples(st.floats(0, 1), st.text(max_size=8)), min_size=1, max_size=5),
    st.floats(0, 1e6),
    st.none() | st.just(Thumbnail("/9j/", 160, 1)),
)


def result_of(score: float) -> Result:
    return Result(
        scores=(score,),
        labels=("cat",),
        model=MODEL,
        engine="eager",
        precision="fp32",
        ms=1.0,
        decode_ms=0.5,
    )


line_contents = st.binary(max_size=40).map(lambda data: data.replace(b"\n", b""))
cuts = st.lists(st.integers(0, 1000), max_size=12)


def pieces(data: bytes, places: list[int]) -> list[bytes]:
    """Cut ``data``, which is not empty, at ``places``, each counted round its length."""
    ends = sorted({place % len(data) for place in places} - {0})
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]


def drain(reader: LineReader) -> tuple[list[Line], str | None]:
    """Return the lines that are ready, and the code of the error after them, if there is one."""
    lines = []
    try:
        while (line := reader.next_line()) is not None:
            lines.append(line)
    except SwiprError as error:
        return lines, error.code
    return lines, None


def request(data: bytes | dict[str, Any], fd: int | None = None) -> Request:
    """Decode a request from its line, or from its fields."""
    if isinstance(data, dict):
        data = protocol.encode(data).removesuffix(b"\n")
    return protocol.decode_request(Line(data, fd), max_depth=MAX_DEPTH)


def refusal(data: bytes | dict[str, Any], fd: int | None = None) -> SwiprError:
    """Return the error that decoding a request raises."""
    with pytest.raises(SwiprError) as caught:
        request(data, fd)
    return caught.value


def reply(data: bytes | dict[str, Any]) -> dict[str, Any]:
    """Decode a reply from its line, or from its fields."""
    if isinstance(data, dict):
        data = json.dumps(data).encode()
    return protocol.decode_reply(data, max_depth=MAX_DEPTH)


# --- lines ---------------------------------------------------------------------------------------


@unhurried
@given(st.lists(line_contents), line_contents, cuts)
def test_lines_are_the_same_however_the_bytes_are_cut(
    contents: list[bytes], tail: bytes, places: list[int]
) -> None:
    """What is sent as lines comes out as those lines, whatever pieces it arrives in."""
    data = b"".join(content + b"\n" for content in contents) + tail
    reader = LineReader(max_line=MAX_LINE)
    lines = []
    for piece in pieces(data, places) if data else []:
        reader.feed(piece)
        lines += drain(reader)[0]
    assert [line.data for line in lines] == contents
    assert reader.unfinished == len(tail)


@unhurried
@given(st.lists(st.tuples(line_contents, cuts, st.none() | st.integers(0, 20))))
def test_a_descriptor_stays_with_the_line_it_came_with(
    messages: list[tuple[bytes, list[int], int | None]],
) -> None:
    """A descriptor belongs to the line in whose bytes it arrived, with whichever piece it came."""
    reader = LineReader(max_line=MAX_LINE)
    for number, (content, places, when) in enumerate(messages):
        parts = pieces(content + b"\n", places)
        for index, piece in enumerate(parts):
            comes_now = when is not None and when % len(parts) == index
            assert not reader.feed(piece, [number] if comes_now else [])
    lines, _ = drain(reader)
    assert [(line.data, line.fd, line.fd_fault) for line in lines] == [
        (content, None if when is None else number, None)
        for number, (content, _, when) in enumerate(messages)
    ]


@unhurried
@given(
    st.lists(
        st.tuples(
            st.text("a\n", min_size=1, max_size=12), st.integers(0, 3), st.booleans(), st.booleans()
        )
    ),
    st.integers(1, 10),
)
def test_no_descriptor_is_lost_or_handed_out_twice(
    feeds: list[tuple[str, int, bool, bool]], max_line: int
) -> None:
    """Each descriptor comes out once: refused, with a line, or released at the end."""
    reader = LineReader(max_line=max_line)
    given_in: list[int] = []
    out: list[int] = []
    for text, count, lost, look in feeds:
        fds = list(range(len(given_in), len(given_in) + count))
        given_in += fds
        out += reader.feed(text.encode(), fds, fds_lost=lost)
        for line in drain(reader)[0] if look else []:
            assert line.fd is None or line.fd_fault is None
            out += [] if line.fd is None else [line.fd]
    assert sorted(out + reader.release()) == given_in
    assert reader.release() == []


@unhurried
@given(st.text("a\n", min_size=1, max_size=60), cuts, st.integers(1, 10))
@example("a\naaa\na\n", [], 3)
def test_nothing_after_an_overlong_line_comes_out(
    text: str, places: list[int], max_line: int
) -> None:
    """Lines come out up to the first that is too long, never a tail of it or what follows."""
    *contents, tail = text.encode().split(b"\n")
    fitting = []
    for content in contents:
        if len(content) + 1 > max_line:
            break
        fitting.append(content)
    overlong = len(fitting) < len(contents) or len(tail) + 1 > max_line
    reader = LineReader(max_line=max_line)
    for piece in pieces(text.encode(), places):
        reader.feed(piece)
    lines, code = drain(reader)
    assert [line.data for line in lines] == fitting
    assert code == ("too_long" if overlong else None)


@pytest.mark.parametrize("chunk", [1000, MAX_LINE + 1])
def test_the_longest_line_counts_its_newline(chunk: int) -> None:
    """A line of 65536 bytes passes, its newline included, and one of 65537 is too long."""
    assert MAX_LINE == 65536
    for size, sizes, code in ((65536, [65535], None), (65537, [], "too_long")):
        reader = LineReader(max_line=MAX_LINE)
        data = b"x" * (size - 1) + b"\n"
        for start in range(0, size, chunk):
            reader.feed(data[start : start + chunk])
        lines, found = drain(reader)
        assert [len(line.data) for line in lines] == sizes
        assert found == code


def test_an_overlong_line_is_seen_before_its_end() -> None:
    """A line that cannot end in time is too long without waiting for its newline."""
    reader = LineReader(max_line=MAX_LINE)
    reader.feed(b"x" * 65535)
    assert reader.next_line() is None
    reader.feed(b"x")
    with pytest.raises(SwiprError, match="longer than 65536 bytes"):
        reader.next_line()


def test_an_overlong_line_ends_the_stream_for_good() -> None:
    """The lines before an overlong one are handed out; then every call raises, whatever comes."""
    reader = LineReader(max_line=8)
    reader.feed(b"one\ntwo\nmuch too long\nthree\n")
    assert drain(reader)[0][-1].data == b"two"
    for _ in range(3):
        with pytest.raises(SwiprError) as caught:
            reader.next_line()
        assert caught.value.code == "too_long"
        reader.feed(b"four\n")


def test_memory_is_bounded_after_an_overlong_line() -> None:
    """Bytes that come after an overlong line are not kept."""
    reader = LineReader(max_line=100)
    for _ in range(20):
        reader.feed(b"x" * 1000)
    assert reader.unfinished <= 1100


def test_a_second_descriptor_spoils_its_line_only() -> None:
    """Two descriptors for one line are both refused with a fault; the next line is in order."""
    reader = LineReader(max_line=MAX_LINE)
    assert list(reader.feed(b"a", [3])) == []
    assert sorted(reader.feed(b"b", [4])) == [3, 4]
    assert list(reader.feed(b"c", [5])) == [5]
    reader.feed(b"\n")
    reader.feed(b"d\n", [6])
    (spoilt, sound), _ = drain(reader)
    assert spoilt.data == b"abc"
    assert spoilt.fd is None
    assert spoilt.fd_fault is not None
    assert spoilt.fd_fault.code == "bad_request"
    assert "more than one descriptor" in spoilt.fd_fault.message
    assert (sound.data, sound.fd, sound.fd_fault) == (b"d", 6, None)


@pytest.mark.parametrize("fds", [[3, 4], [3, 4, 5, 6]])
def test_several_descriptors_at_once_are_all_refused(fds: list[int]) -> None:
    """Of several descriptors that came together none is taken for the right one."""
    reader = LineReader(max_line=MAX_LINE)
    assert list(reader.feed(b"a\n", fds)) == fds
    (line,), _ = drain(reader)
    assert line.fd is None
    assert line.fd_fault is not None


@pytest.mark.parametrize(("fds", "code"), [([], "busy"), ([3], "bad_request")])
def test_a_lost_descriptor_spoils_its_line(fds: list[int], code: str) -> None:
    """When the kernel dropped the one descriptor, we are at fault; with another, its sender is."""
    reader = LineReader(max_line=MAX_LINE)
    assert list(reader.feed(b"a\n", fds, fds_lost=True)) == fds
    (line,), _ = drain(reader)
    assert line.fd is None
    assert line.fd_fault is not None
    assert line.fd_fault.code == code


def test_release_gives_back_all_that_is_held() -> None:
    """Descriptors of lines nobody took and of the unfinished line are released, and forgotten."""
    reader = LineReader(max_line=MAX_LINE)
    reader.feed(b"a\n", [3])
    reader.feed(b"b\n")
    reader.feed(b"c", [4])
    assert sorted(reader.release()) == [3, 4]
    assert reader.release() == []
    assert reader.unfinished == 0
    assert reader.next_line() is None


# --- JSON ----------------------------------------------------------------------------------------


@unhurried
@given(json_objects)
def test_what_is_encoded_is_one_line_and_decodes_back(message: dict[str, Any]) -> None:
    """Any object becomes one line of ASCII and comes back equal."""
    data = protocol.encode(message)
    assert data.isascii()
    assert data.index(b"\n") == len(data) - 1
    assert protocol.decode(data, max_depth=64) == message


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_cannot_be_sent(score: float) -> None:
    """A result that holds NaN or an infinity is not encoded."""
    with pytest.raises(ValueError, match="JSON"):
        protocol.encode_result(1, result_of(score))


def nested(depth: int, opening: str, closing: str) -> bytes:
    """Return an object in which brackets are nested ``depth`` deep, its own included."""
    inner = opening * (depth - 1) + "0" + closing * (depth - 1)
    return f'{{"path":"/a","x":{inner}}}'.encode()


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ("[0,", ",0]")])
@pytest.mark.parametrize("depth", [17, 18, 100, 500])
def test_the_depth_of_a_line_is_limited(opening: str, closing: str, depth: int) -> None:
    """Sixteen levels of arrays and objects pass, and any more are refused."""
    assert request(nested(16, opening, closing)).path == "/a"
    error = refusal(nested(depth, opening, closing))
    assert (error.code, error.message) == ("bad_request", "nested deeper than 16 levels")


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 60000,
        b'{"a":' * 10000,
        b'{"path":"/a","x":' + b"[" * 30000 + b"]" * 30000 + b"}",
        b'{"path":"/a","x":' + b'{"a":' * 8000 + b"0" + b"}" * 8001,
    ],
    ids=["open-arrays", "open-objects", "arrays", "objects"],
)
def test_thousands_of_nested_brackets_are_survived(data: bytes) -> None:
    """However deep a line is nested, it is refused like any other bad request."""
    assert refusal(data).code == "bad_request"


@pytest.mark.parametrize(
    "message",
    [
        {"path": "/" + "[{" * 100},
        {"path": "/a", "[" * 50: "{" * 50},
        {"path": "/a", "x": [[]] * 50},
    ],
    ids=["path", "key", "wide"],
)
def test_only_nesting_counts_as_depth(message: dict[str, Any]) -> None:
    """Brackets in strings, and many brackets side by side, do not make a line deep."""
    assert request(message).path == message["path"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b" ", "not JSON"),
        (b"{", "not JSON"),
        (b'{"path":"/a"} {}', "not JSON"),
        (b"{'path':'/a'}", "not JSON"),
        (b'{"path":"/a\x01"}', "not JSON"),
        (b'\xef\xbb\xbf{"path":"/a"}', "not JSON"),
        (b'{"path":"/caf\xe9"}', "not UTF-8"),
        (b'{"path":"/\xed\xa0\x80"}', "not UTF-8"),
        ('{"path":"/a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"path":"/a","path":"/b"}', "duplicate key"),
        (b'{"path":"/a","\\u0070ath":"/b"}', "duplicate key"),
        (b'{"path":"/a","x":[{"y":1,"y":1}]}', "duplicate key"),
        (b'{"path":"/a","x":NaN}', "NaN"),
        (b'{"path":"/a","x":Infinity}', "Infinity"),
        (b'{"path":"/a","x":[-Infinity]}', "-Infinity"),
        (b'{"path":"/a","x":' + b"7" * 5000 + b"}", "acceptable"),
        (b"[]", "got an array"),
        (b'"/a"', "got a string"),
        (b"7", "got an integer"),
        (b"7.5", "got a number"),
        (b"true", "got a boolean"),
        (b"null", "got null"),
    ],
)
def test_what_is_not_one_plain_object_is_refused(data: bytes, words: str) -> None:
    """A line is one JSON object in UTF-8 with different keys and real numbers, or bad_request."""
    error = refusal(data)
    assert error.code == "bad_request"
    assert words in error.message
    assert error.id is None


# --- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "id",
    [
        "",
        "a",
        "a" * 128,
        "é" * 64,
        "\U0001f408" * 32,
        "\ud800",
        0,
        -1,
        2**63 - 1,
        1 - 2**63,
        None,
    ],
)
def test_a_proper_id_is_kept_as_it_is(id: str | int | None) -> None:
    """Strings up to 128 bytes and integers up to 64 bits come through an echo unchanged."""
    found = request({"id": id, "op": "ping"}).id
    assert found == id
    assert type(found) is type(id)
    with pytest.raises(SwiprError) as caught:
        reply(protocol.encode_error(SwiprError("busy", "later", found)))
    assert caught.value.id == id


@pytest.mark.parametrize(
    "id",
    [
        "a" * 129,
        "é" * 64 + "a",
        "\U0001f408" * 33,
        2**63,
        10**4000,
        True,
        False,
        1.0,
        [],
        ["a"],
        {},
    ],
)
def test_an_improper_id_is_refused_and_not_echoed(id: Any) -> None:
    """Longer strings, larger integers and all other kinds of id are bad_request without an id."""
    error = refusal({"id": id, "op": "ping"})
    assert error.code == "bad_request"
    assert "'id'" in error.message
    assert error.id is None


def test_compute_is_what_is_asked_for_when_no_op_is_named() -> None:
    """A path alone is a whole request."""
    found = request(b'{"path":"/a"}')
    assert (found.id, found.op, found.path, found.fd) == (None, "compute", "/a", None)


@pytest.mark.parametrize("data", [b'{"path":"/a"}\r', b' \t{ "path" : "/a" } ', b'\r{"path":"/a"}'])
def test_white_space_around_a_request_is_allowed(data: bytes) -> None:
    """A program that ends its lines with CR LF, or indents them, is understood."""
    assert request(data).path == "/a"


@pytest.mark.parametrize("op", OPS)
def test_each_op_is_understood(op: str) -> None:
    """Every op of the protocol comes out as it was named."""
    assert request({"op": op, "path": "/a"}).op == op


@pytest.mark.parametrize("op", ["", "Compute", "shutdown", "ping ", "é", "x" * 10000])
def test_an_unknown_op_is_told_apart_and_echoes_the_id(op: str) -> None:
    """An op that the daemon does not have gets unknown_op, with the id, in a short message."""
    error = refusal({"id": "7", "op": op, "path": "/a"})
    assert (error.code, error.id) == ("unknown_op", "7")
    assert len(error.message) < 200


@pytest.mark.parametrize("side", [16, 256, None])
def test_a_request_may_ask_for_a_thumbnail(side: int | None) -> None:
    """Of a size within limits; without one, none is made."""
    assert request({"path": "/a", "thumbnail": side}).thumbnail == side


@pytest.mark.parametrize("side", [0, 15, 257, int("9" * 1000), 160.0, "160", True, [], {}])
def test_a_thumbnail_of_no_size_is_refused(side: Any) -> None:
    """A number out of its limits, and whatever is no whole number."""
    error = refusal({"id": 7, "path": "/a", "thumbnail": side})
    assert (error.code, error.id) == ("bad_request", 7)
    assert "'thumbnail'" in error.message
    assert request({"op": "ping", "thumbnail": side}).thumbnail is None


@pytest.mark.parametrize(
    "thumbnail",
    [
        7,
        [],
        {},
        {"data": "/9j/", "width": 1},
        {"data": "/9j/", "width": "1", "height": 1},
        {"data": "<svg/>", "width": 1, "height": 1},
        {"data": "", "width": 1, "height": 1},
        {"data": "/9j/\n", "width": 1, "height": 1},
    ],
    ids=str,
)
def test_a_thumbnail_that_is_not_whole_is_refused(thumbnail: object) -> None:
    """It may come from a worker that a picture has taken over, and goes into pages."""
    with pytest.raises(SwiprError) as caught:
        protocol.decode_result(reply({**RESULT, "thumbnail": thumbnail}))
    assert caught.value.code == "bad_reply"


@pytest.mark.parametrize("timeout_ms", [1, 86_400_000, None])
def test_a_request_may_say_how_long_it_will_wait(timeout_ms: int | None) -> None:
    """From a millisecond to a day, or nothing."""
    assert request({"path": "/a", "timeout_ms": timeout_ms}).timeout_ms == timeout_ms


@pytest.mark.parametrize("timeout_ms", [0, -1, 86_400_001, int("9" * 1000), 1.0, "9", True, [], {}])
def test_a_time_that_nobody_waits_is_refused(timeout_ms: Any) -> None:
    """It is bad_request, with the id, in a short message; other ops do not look at it."""
    error = refusal({"id": 7, "path": "/a", "timeout_ms": timeout_ms})
    assert (error.code, error.id) == ("bad_request", 7)
    assert "'timeout_ms'" in error.message
    assert len(error.message) < 200
    assert request({"op": "ping", "timeout_ms": timeout_ms}).timeout_ms is None


def test_an_error_may_say_when_to_try_again() -> None:
    """The time comes through; without one nothing is said."""
    busy = SwiprError("busy", "later", 7)
    busy.retry_after_ms = 250
    with pytest.raises(SwiprError) as caught:
        reply(protocol.encode_error(busy))
    assert caught.value.retry_after_ms == 250
    assert b"retry_after_ms" not in protocol.encode_error(SwiprError("busy", "later", 7))


@pytest.mark.parametrize("value", ["1", 1.5, True, []])
def test_a_time_to_try_again_that_is_none_is_a_bad_reply(value: Any) -> None:
    """As any other malformed part of an error."""
    found = {"code": "busy", "number": -1, "message": "", "retryable": True}
    data = json.dumps({"id": 7, "error": {**found, "retry_after_ms": value}}).encode()
    with pytest.raises(SwiprError) as caught:
        reply(data)
    assert caught.value.code == "bad_reply"


@pytest.mark.parametrize("op", [None, 1, True, ["ping"], {}])
def test_an_op_that_is_no_string_is_refused(op: Any) -> None:
    """An op of another kind is bad_request, with the id."""
    error = refusal({"id": 7, "op": op})
    assert (error.code, error.id) == ("bad_request", 7)
    assert "'op'" in error.message


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (None, "got nothing"),
        (7, "got an integer"),
        (["/a"], "got an array"),
        (True, "got a boolean"),
        ("", "absolute"),
        ("a/b", "absolute"),
        ("./a", "absolute"),
        ("~/a", "absolute"),
        ("/a\0b", "NUL"),
        ("/a\ud800", "lone surrogate"),
        ("/\udc41", "lone surrogate"),
    ],
)
def test_a_path_without_a_descriptor_must_be_one_to_open(path: Any, words: str) -> None:
    """Without a descriptor the path is absolute and can be a file's name, else bad_request."""
    error = refusal({"id": 7, "path": path})
    assert (error.code, error.id) == ("bad_request", 7)
    assert words in error.message


@pytest.mark.parametrize("path", [None, "", "a/b", "/a", "caf\udce9"])
def test_a_path_beside_a_descriptor_is_only_a_name(path: str | None) -> None:
    """With a descriptor the path may be relative or left out."""
    found = request({"path": path}, fd=3)
    assert (found.path, found.fd) == (path, 3)


@pytest.mark.parametrize("path", [7, "/a\0b", "a\ud800"])
def test_a_name_beside_a_descriptor_must_still_be_a_name(path: Any) -> None:
    """A descriptor does not make up for a path that cannot be any file's."""
    assert refusal({"path": path}, fd=3).code == "bad_request"


@unhurried
@given(st.binary().map(lambda name: b"/" + name.replace(b"\0", b"")))
def test_any_file_name_survives_the_wire(name: bytes) -> None:
    """A name of any bytes, UTF-8 or not, reaches the other side as the same bytes."""
    path = request({"path": os.fsdecode(name)}).path
    assert path is not None
    assert os.fsencode(path) == name


@pytest.mark.parametrize("op", ["ping", "hello", "status"])
def test_a_descriptor_beside_another_op_is_refused(op: str) -> None:
    """Only compute takes a descriptor."""
    error = refusal({"id": 7, "op": op}, fd=3)
    assert (error.code, error.id) == ("bad_request", 7)
    assert op in error.message


@pytest.mark.parametrize("op", OPS)
def test_a_fault_of_the_descriptors_fails_the_request(op: str) -> None:
    """A line with a fault of its descriptors is refused with that very error, and with its id."""
    data = protocol.encode({"id": 7, "op": op, "path": "/a"})
    fault = SwiprError("busy", "no room")
    with pytest.raises(SwiprError) as caught:
        protocol.decode_request(Line(data, None, fault), max_depth=MAX_DEPTH)
    error = caught.value
    assert (error.code, error.message, error.id) == ("busy", "no room", 7)


@unhurried
@given(json_objects)
def test_unknown_fields_are_ignored(extra: dict[str, Any]) -> None:
    """Fields that the protocol does not know change nothing."""
    known = {"id": 7, "op": "compute", "path": "/a"}
    data = json.dumps({**extra, **known}).encode()
    found = protocol.decode_request(Line(data), max_depth=64)
    assert (found.id, found.op, found.path) == (7, "compute", "/a")


@pytest.mark.parametrize("op", ["ping", "hello", "status"])
@pytest.mark.parametrize("path", [7, {"a": 1}])
def test_an_op_without_a_path_ignores_one(op: str, path: Any) -> None:
    """To an op that takes no path it is an unknown field: nothing unchecked comes through."""
    assert request({"op": op, "path": path}).path is None


awkward: st.SearchStrategy[Any] = st.sampled_from(
    [0, -1, 2**63, 1.5, True, None, "", "/a", "a", "\0", "\ud800", "ping", "x" * 200, [], {}]
)
requestish = st.dictionaries(
    st.sampled_from(["id", "op", "path", "x"]), awkward | json_values, max_size=4
).map(lambda fields: json.dumps(fields).encode())


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draw a line that was once a request, with a few bytes changed."""
    data = bytearray(draw(requestish))
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@settings(deadline=None, max_examples=500)
@given(st.binary() | requestish | damaged(), st.none() | st.just(3), st.booleans())
def test_any_line_is_a_request_or_refused(data: bytes, fd: int | None, faulty: bool) -> None:
    """Whatever a stranger sends is a request, bad_request or unknown_op, never another trouble."""
    fault = SwiprError("bad_request", "a fault") if faulty else None
    try:
        found = protocol.decode_request(Line(data, fd, fault), max_depth=MAX_DEPTH)
    except SwiprError as error:
        refused = error
    else:
        assert found.op in OPS
        assert found.fd == fd
        assert fault is None
        return
    assert refused.code in ("bad_request", "unknown_op")
    assert refused.message.isprintable()
    assert len(protocol.encode_error(refused)) <= MAX_LINE


# --- replies -------------------------------------------------------------------------------------


def facts(error: SwiprError) -> tuple[object, ...]:
    """Return all that an error says."""
    return error.code, error.message, str(error), error.number, error.retryable, error.id


@pytest.mark.parametrize("id", [None, 7, "é"])
@pytest.mark.parametrize("code", CODES)
def test_every_error_survives_the_wire(code: str, id: str | int | None) -> None:
    """Each code comes out of its reply as an equal error."""
    sent = SwiprError(code, "it was\nlike “this”", id)
    with pytest.raises(SwiprError) as caught:
        reply(protocol.encode_error(sent))
    assert facts(caught.value) == facts(sent)


def test_an_error_survives_pickling() -> None:
    """A pool of processes can hand an error on to whoever asked."""
    sent = SwiprError("busy", "later", 7)
    sent.number = -9
    assert facts(pickle.loads(pickle.dumps(sent))) == facts(sent)  # noqa: S301 - it is our own


@pytest.mark.parametrize(
    ("number", "codes"),
    [
        (-2, {"not_found"}),
        (
            -3,
            {
                "permission_denied",
                "not_a_file",
                "too_large",
                "too_many_pixels",
                "not_an_image",
                "timeout",
                "worker_died",
            },
        ),
        (-4, {"cannot_connect"}),
    ],
)
def test_the_numbers_are_those_of_the_script_service(number: int, codes: set[str]) -> None:
    """No path is -2, not analyzed -3, not connected -4; callers of the old service rely on it."""
    assert {code for code, kind in CODES.items() if kind.number == number} == codes
    assert {kind.number for kind in CODES.values()} == {-1, -2, -3, -4}


def test_only_passing_troubles_are_retryable() -> None:
    """The same request may be sent again when the daemon, not the request, was in the way."""
    assert {code for code, kind in CODES.items() if kind.retryable} == {
        "busy",
        "unavailable",
        "shutting_down",
        "cannot_connect",
    }


@pytest.mark.parametrize("retryable", [True, False])
def test_a_newer_daemons_code_is_taken_as_it_is(retryable: bool) -> None:
    """A code that this client does not know is still an error, with what was sent beside it."""
    failure = {"code": "on_fire", "number": -9, "message": "hot", "retryable": retryable, "new": 1}
    with pytest.raises(SwiprError) as caught:
        reply({"id": 7, "error": failure})
    assert facts(caught.value) == ("on_fire", "hot", "hot", -9, retryable, 7)


@unhurried
@given(request_ids, results)
def test_every_result_survives_the_wire(id: str | int | None, sent: Result) -> None:
    """Scores come out as exactly the numbers that went in, beside their labels."""
    message = reply(protocol.encode_result(id, sent))
    found = protocol.decode_result(message)
    assert message["id"] == id
    assert (found.scores, found.labels) == (sent.scores, sent.labels)
    assert (found.model, found.ms, found.decode_ms) == (sent.model, sent.ms, sent.decode_ms)
    assert (found.thumbnail is None) == (sent.thumbnail is None)
    if found.thumbnail is not None and sent.thumbnail is not None:
        assert found.thumbnail.data == sent.thumbnail.data
        assert (found.thumbnail.width, found.thumbnail.height) == (160, 1)
    assert (found.engine, found.precision) == (sent.engine, sent.precision)


@unhurried
@given(request_ids, results, st.sampled_from(sorted(CODES)), st.text())
def test_no_reply_carries_both_scores_and_an_error(
    id: str | int | None, result: Result, code: str, message: str
) -> None:
    """A result has scores and no error, an error has no scores, and both echo the id."""
    success = json.loads(protocol.encode_result(id, result))
    failure = json.loads(protocol.encode_error(SwiprError(code, message, id)))
    assert success.keys() - {"thumbnail"} == {"id", *RESULT}
    assert failure.keys() == {"id", "error"}
    assert success["id"] == failure["id"] == id


def test_an_error_beside_scores_is_an_error() -> None:
    """Scores that come with an error are never taken for an answer."""
    failure = {"code": "internal", "number": -1, "message": "oops", "retryable": False}
    with pytest.raises(SwiprError) as caught:
        reply({**RESULT, "error": failure})
    assert caught.value.code == "internal"


RESULT = {
    "id": 1,
    "scores": [0.75, 0.25],
    "labels": ["no", "yes"],
    "model": MODEL,
    "engine": "eager",
    "precision": "fp32",
    "ms": 12.5,
    "decode_ms": 2.5,
}
FAILURE = {"code": "busy", "number": -1, "message": "later", "retryable": True}


@pytest.mark.parametrize(
    "change",
    [
        {"scores": None},
        {"scores": []},
        {"scores": 0.75},
        {"scores": "0.75,0.25"},
        {"scores": {"no": 0.75, "yes": 0.25}},
        {"scores": ["0.75", "0.25"]},
        {"scores": [0.75, None]},
        {"scores": [0.75, True]},
        {"scores": [0.75, [0.25]]},
        {"scores": [0.75]},
        {"scores": [0.5, 0.25, 0.25]},
        {"labels": None},
        {"labels": []},
        {"labels": "no"},
        {"labels": ["no"]},
        {"labels": ["no", 1]},
        {"labels": ["no", "yes", "maybe"]},
        {"model": None},
        {"model": 7},
        {"engine": None},
        {"engine": 1},
        {"precision": None},
        {"precision": 32},
        {"ms": None},
        {"ms": "12"},
        {"ms": True},
        {"decode_ms": None},
        {"decode_ms": "2"},
    ],
    ids=str,
)
def test_a_result_that_is_not_whole_is_refused(change: dict[str, Any]) -> None:
    """Scores are handed out only from a reply in which everything is as it must be."""
    assert protocol.decode_result(reply(RESULT)).scores == (0.75, 0.25)
    for message in (
        {**RESULT, **change},
        {key: value for key, value in RESULT.items() if key not in change},
    ):
        with pytest.raises(SwiprError) as caught:
            protocol.decode_result(reply(message))
        assert caught.value.code == "bad_reply"


@pytest.mark.parametrize("number", ["1e999", "1" + "0" * 400], ids=["decimal", "integer"])
@pytest.mark.parametrize("old", ["0.25", "12.5"], ids=["score", "ms"])
def test_a_number_too_large_for_a_float_is_refused(old: str, number: str) -> None:
    """A number that overflows a float is no score and no duration."""
    data = json.dumps(RESULT).replace(old, number).encode()
    with pytest.raises(SwiprError) as caught:
        protocol.decode_result(reply(data))
    assert caught.value.code == "bad_reply"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"0.66,0.33",
        b"[0.66,0.33]",
        b"null",
        b'{"id":1,"scores":[NaN,0.5]}',
        b'{"id":1,"id":2}',
        b'{"id":1,"x":"\xff"}',
        b'{"id":1.0}',
        b'{"id":true}',
        b'{"id":[1]}',
        b"[" * 60000,
        nested(17, "[", "]"),
    ],
)
def test_a_line_that_is_no_reply_is_refused(data: bytes) -> None:
    """What is not even an object with an id as the protocol has it is bad_reply."""
    with pytest.raises(SwiprError) as caught:
        reply(data)
    assert caught.value.code == "bad_reply"
    assert "malformed" in caught.value.message


@pytest.mark.parametrize(
    "failure",
    [
        None,
        "busy",
        [],
        {},
        *({key: value for key, value in FAILURE.items() if key != left} for left in FAILURE),
        {**FAILURE, "code": None},
        {**FAILURE, "code": -1},
        {**FAILURE, "message": ["later"]},
        {**FAILURE, "number": "-1"},
        {**FAILURE, "number": -1.0},
        {**FAILURE, "number": True},
        {**FAILURE, "retryable": 1},
        {**FAILURE, "retryable": "yes"},
    ],
    ids=str,
)
def test_an_error_that_is_not_whole_is_refused(failure: Any) -> None:
    """An error must say its code, number, message and whether to try again, else bad_reply."""
    with pytest.raises(SwiprError) as caught:
        reply({**RESULT, "error": failure})
    assert caught.value.code == "bad_reply"


replyish = st.dictionaries(
    st.sampled_from([*RESULT, "error", *FAILURE]),
    st.sampled_from(list(RESULT.values())) | st.just(FAILURE) | json_values,
).map(lambda fields: json.dumps(fields).encode())


@settings(deadline=None, max_examples=300)
@given(st.binary() | replyish)
def test_any_reply_is_a_result_or_an_error(data: bytes) -> None:
    """Whatever the daemon sends is a whole result or a SwiprError, never another trouble."""
    try:
        result = protocol.decode_result(reply(data))
    except SwiprError as error:
        refused = error
    else:
        assert len(result.scores) == len(result.labels) > 0
        assert all(math.isfinite(score) for score in result.scores)
        return
    assert refused.code in ("bad_reply", FAILURE["code"])
