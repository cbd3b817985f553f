"""The quick answers of swiprctl: the same as the whole client's, or left to it."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swiprctl import Client, Result, SwiprError, protocol, quick
from swiprctl.__main__ import main
from swiprctl.defaults import DEFAULT_TIMEOUT
from tests.daemon import CHELSEA, Daemon
from tests.peer import (
    Behaviour,
    Peer,
    Talk,
    closes_without_answer,
    drips,
    error,
    full_backlog,
    line,
    never_answers,
    replies,
)

ROOT = Path(__file__).parent.parent
NOT_IMAGE = ROOT / "tests" / "fastai" / "45_not_image.jpg"
USUAL = protocol.encode_result(
    1,
    Result(
        scores=(0.25, 0.75),
        labels=("NO", "YES"),
        model="sha256:" + 64 * "0",
        engine="compiled",
        precision="bf16",
        ms=31.5,
        decode_ms=9.25,
    ),
)

words_of_a_result = st.text(max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def results(draw: st.DrawFn) -> Result:
    """Any result that the daemon could send."""
    labels = draw(st.lists(words_of_a_result, min_size=1, max_size=4))
    return Result(
        scores=tuple(draw(finite) for _ in labels),
        labels=tuple(labels),
        model=draw(words_of_a_result),
        engine=draw(words_of_a_result),
        precision=draw(words_of_a_result),
        ms=draw(finite),
        decode_ms=draw(finite),
    )


def in_full(reply: bytes) -> list[float] | None:
    """Return the scores that the protocol finds in ``reply``; None: it finds none."""
    try:
        message = protocol.decode_reply(reply.rstrip(b"\n"), max_depth=protocol.MAX_DEPTH)
        return list(protocol.decode_result(message).scores)
    except SwiprError:
        return None


# --- the usual reply -----------------------------------------------------------------------------


def test_the_usual_reply_is_read() -> None:
    """Without the protocol."""
    assert quick.usual_scores(USUAL) == [0.25, 0.75]


@given(results())
def test_what_is_read_is_what_the_protocol_reads(result: Result) -> None:
    """Whatever stands in the reply."""
    reply = protocol.encode_result(1, result)
    assert quick.usual_scores(reply) in (None, in_full(reply))


@given(
    results().map(lambda result: protocol.encode_result(1, result)) | st.just(USUAL),
    st.data(),
)
def test_no_changed_reply_is_read_otherwise(reply: bytes, data: st.DataObject) -> None:
    """A reply with some bytes changed has the protocol's scores, or none."""
    start = data.draw(st.integers(0, len(reply) - 1))
    end = data.draw(st.integers(start, min(start + 3, len(reply))))
    put = data.draw(st.binary(max_size=3) | st.sampled_from(tuple(PIECES)))
    changed = reply[:start] + put + reply[end:]
    found = quick.usual_scores(changed)
    assert found is None or found == in_full(changed)


PIECES = (b'"', b",", b"]", b"[", b"}", b"\\", b"\n", b"0", b"1", b".", b"e", b"NaN", b'","', b" ")


def test_no_single_byte_is_read_otherwise() -> None:
    """Each of the usual reply's bytes left out, doubled, or made another one."""
    read = 0
    for place, put in itertools.product(range(len(USUAL)), (*PIECES, b"", b"nan", b"\x7f", b"\0")):
        for end in (place, place + 1):
            changed = USUAL[:place] + put + USUAL[end:]
            found = quick.usual_scores(changed)
            if found is not None:
                read += 1
                assert found == in_full(changed), changed
    assert read > 100, "hardly any of them was read at all"


# --- the same as the whole client ----------------------------------------------------------------


def said(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run a command in this process; return its exit status, output and errors."""
    status = main(words)
    return status, *capfd.readouterr()


def both(capfd: pytest.CaptureFixture[str], *words: str) -> list[tuple[int, str, str]]:
    """What a command says, and what it says with an option that only the whole client knows."""
    return [
        said(capfd, *words),
        said(capfd, "--timeout", str(DEFAULT_TIMEOUT), *words),
    ]


@pytest.mark.parametrize(
    "words",
    [
        ("ping",),
        ("compute", str(CHELSEA)),
        ("compute", str(NOT_IMAGE)),
        ("compute", "/none"),
        ("compute", ""),
        ("compute", "/dev/null"),
    ],
    ids=lambda words: words[-1].rpartition("/")[2] or "empty",
)
def test_a_daemon_is_asked_the_same(
    daemon: Daemon,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Scores, and what is wrong with an image."""
    monkeypatch.setenv("SWIPR_SOCKET", daemon.path)
    quickly, fully = both(capfd, *words)
    assert quickly == fully


def breaks_off(talk: Talk) -> None:
    """Leave in the middle of a reply."""
    next(talk.requests())
    talk.sock.sendall(USUAL[:50])


MALFORMED = {
    "an error": replies(lambda number: error(number, "not_an_image", -3, "told to")),
    "an error of the whole connection": replies(lambda number: error(None, "busy", -4, "too many")),
    "another's": replies(lambda number: USUAL.replace(b'"id":1', b'"id":2')),
    "no id": replies(lambda number: line(scores=[1.0], labels=["A"])),
    "scores alone": replies(lambda number: line(id=number, scores=[0.25, 0.75])),
    "one label too few": replies(lambda number: USUAL.replace(b'"NO",', b"")),
    "no number": replies(lambda number: USUAL.replace(b"0.25", b"NaN")),
    "no JSON": replies(lambda number: b"0.25,0.75\n"),
    "an empty line": replies(lambda number: b"\n"),
    "no text": replies(lambda number: b"\xff\n"),
    "too long": replies(lambda number: b" " * 70000 + b"\n"),
    "nothing": closes_without_answer,
    "half a reply": breaks_off,
}


@pytest.mark.parametrize("words", [("ping",), ("compute", str(CHELSEA))], ids=["ping", "compute"])
@pytest.mark.parametrize("behave", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_usual_reply_is_told_the_same(
    folder: Path,
    behave: Behaviour,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By its exit status and in words."""
    with Peer(folder, behave) as peer:
        monkeypatch.setenv("SWIPR_SOCKET", peer.path)
        quickly, fully = both(capfd, *words)
    assert quickly == fully
    assert words == ("ping",) or quickly[0] != 0


def test_an_error_is_not_asked_for_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the daemon has said counts, though it is not the usual."""
    with Peer(folder, MALFORMED["an error"]) as peer:
        monkeypatch.setenv("SWIPR_SOCKET", peer.path)
        status, out, err = said(capfd, "compute", str(CHELSEA))
        assert (status, out) == (1, "")
        assert err == f"swiprctl: {CHELSEA}: told to (not_an_image)\n"
        assert len(peer.requests) == 1


def test_a_daemon_that_restarts_is_asked_once_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As by the whole client, to which it is left."""
    with Peer(folder, closes_without_answer, replies(lambda number: USUAL)) as peer:
        monkeypatch.setenv("SWIPR_SOCKET", peer.path)
        assert said(capfd, "compute", str(CHELSEA)) == (0, "0.250000,0.750000\n", "")
        first, second = (request.message for request in peer.requests)
        assert first["path"] == second["path"] == str(CHELSEA)
        assert first["timeout_ms"] - 5000 < second["timeout_ms"] <= first["timeout_ms"]
        assert peer.requests[0].images == [CHELSEA.read_bytes()] == peer.requests[1].images


@pytest.mark.parametrize("behave", [never_answers, drips], ids=["silent", "never done"])
def test_no_answer_is_waited_for_once(
    folder: Path,
    behave: Behaviour,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The time of one call, not of two."""
    monkeypatch.setattr(quick, "DEFAULT_TIMEOUT", 0.25)
    with Peer(folder, behave) as peer:
        monkeypatch.setenv("SWIPR_SOCKET", peer.path)
        status, out, err = said(capfd, "compute", str(CHELSEA))
        assert (status, out) == (3, "")
        assert f"no answer from {peer.path} within 0.25 s" in err
        assert len(peer.requests) == 1


def test_the_whole_client_has_what_is_left_of_the_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where a daemon goes late, and its successor says nothing."""

    def goes_late(talk: Talk) -> None:
        next(talk.requests())
        time.sleep(1)

    monkeypatch.setattr(quick, "DEFAULT_TIMEOUT", 1.5)
    monkeypatch.setattr("swiprctl.commands.run.DEFAULT_TIMEOUT", 1.5)
    with Peer(folder, goes_late, never_answers) as peer:
        monkeypatch.setenv("SWIPR_SOCKET", peer.path)
        began = time.monotonic()
        assert said(capfd, "ping")[:2] == (3, "")
        assert 1.4 < time.monotonic() - began < 2.4
        assert len(peer.requests) == 2


def test_a_daemon_without_room_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the whole client, which can."""
    with full_backlog(folder) as path:
        monkeypatch.setenv("SWIPR_SOCKET", path)
        monkeypatch.setattr("swiprctl.commands.run.DEFAULT_TIMEOUT", 0.25)
        assert said(capfd, "ping")[:2] == (3, "")


def test_a_name_that_is_not_plain_is_left_to_the_whole_client(
    daemon: Daemon, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Quotation marks, backslashes, other letters."""
    monkeypatch.setenv("SWIPR_SOCKET", daemon.path)
    expected = said(capfd, "compute", str(CHELSEA))
    assert expected[0] == 0
    for name in ('a"b', "a\\b", "käse", "a\nb"):
        (folder / name).symlink_to(CHELSEA)
        assert said(capfd, "compute", str(folder / name)) == expected


# --- what it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["ping"], ["compute", str(CHELSEA)]], ids=["ping", "compute"])
def test_the_library_is_not_imported(daemon: Daemon, words: list[str]) -> None:
    """Nor json and socket, nor what these import."""
    code = (
        "import sys\n"
        f"sys.path.append({str(ROOT)!r})\n"
        "from swiprctl.__main__ import main\n"
        f"assert main({words!r}) == 0\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        capture_output=True,
        check=True,
        text=True,
        env={"SWIPR_SOCKET": daemon.path},
    )
    loaded = set(done.stdout.split())
    assert "swiprctl.quick" in loaded
    assert not loaded & {"json", "socket", "re", "enum", "collections", "swiprctl.client", "struct"}
    ours = {name for name in loaded if name.startswith("swiprctl.")}
    assert ours == {f"swiprctl.{name}" for name in ("__main__", "quick", "defaults", "terminal")}


def test_the_request_is_the_whole_clients(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Field by field, for both questions."""
    with Peer(folder, replies(lambda number: USUAL)) as peer:
        monkeypatch.setenv("SWIPR_SOCKET", peer.path)
        for words in ("ping",), ("compute", str(CHELSEA)):
            both(capfd, *words)
        with Client() as client:
            client.compute(CHELSEA)
    ping, full_ping, compute, full_compute, of_the_library = peer.requests
    assert ping == full_ping
    assert compute == full_compute == of_the_library
