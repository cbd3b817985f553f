"""swiprctl compute for many images: which are taken, and how their scores are printed."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from swiprctl import SwiprError
from swiprctl.commands.find import find_images
from tests.daemon import CHELSEA, COFFEE, SWIPRCTL, Daemon, wait_until
from tests.peer import Behaviour, Peer, Talk, error, line
from tests.tasks import interruptible, unprivileged

NOT_IMAGE = Path(__file__).parent / "fastai" / "45_not_image.jpg"
HOSTILE = "two\nlines\r\\ \x1b[31m.png"
CAT, CUP = r"0\.0[0-9]{5},0\.9[0-9]{5}", r"0\.99[0-9]{4},0\.00[0-9]{4}"


def run(
    daemon: Daemon | Peer, *args: str | bytes | Path, given: bytes = b"", cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run ``swiprctl compute`` to its end."""
    command = [*SWIPRCTL, "compute", "--socket", daemon.path, *args]
    return subprocess.run(
        command, input=given, capture_output=True, check=False, timeout=60, cwd=cwd
    )


def printed(daemon: Daemon, *args: str | bytes | Path, given: bytes = b"") -> str:
    """Return what a run prints that must go well."""
    done = run(daemon, *args, given=given)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


@pytest.fixture
def album(folder: Path) -> Path:
    """A folder of pictures, with more below and things between that are none."""
    place = folder / "album"
    (place / "below" / "deeper").mkdir(parents=True)
    shutil.copy(CHELSEA, place / "b.PNG")
    shutil.copy(COFFEE, place / "a.png")
    shutil.copy(COFFEE, place / "below" / "deeper" / "z.png")
    (place / "notes.txt").write_text("no picture")
    (place / "below" / "round.png").symlink_to(place)
    (place / "c.jpg").symlink_to("c.jpg")
    (place / "c.png").mkdir()
    return place


# --- which images --------------------------------------------------------------------------------


def test_several_paths_print_a_line_each_in_their_order(daemon: Daemon) -> None:
    """The tuple, two spaces, and the path as it was given."""
    output = printed(daemon, CHELSEA, COFFEE, CHELSEA)
    assert re.fullmatch(f"{CAT}  {CHELSEA}\n{CUP}  {COFFEE}\n{CAT}  {CHELSEA}\n", output)


def test_options_stand_anywhere_among_paths(daemon: Daemon) -> None:
    """And after two dashes there are none."""
    output = printed(daemon, CHELSEA, "--labels", COFFEE, "--format", "tuple", "--", CHELSEA)
    names = [row.split("  ")[1] for row in output.splitlines()]
    assert names == [str(CHELSEA), str(COFFEE), str(CHELSEA)]
    done = run(daemon, CHELSEA, "--", COFFEE, "--labels")
    assert done.returncode == 1
    assert done.stderr == b"swiprctl: --labels: no such file (not_found)\n"


def test_one_path_prints_the_bare_tuple(daemon: Daemon) -> None:
    """As ever; from standard input too."""
    assert re.fullmatch(f"{CAT}\n", printed(daemon, CHELSEA))
    assert re.fullmatch(f"{CAT}\n", printed(daemon, "-", given=CHELSEA.read_bytes()))


def test_standard_input_is_an_image_among_others(daemon: Daemon) -> None:
    """Its name is a dash."""
    output = printed(daemon, COFFEE, "-", given=CHELSEA.read_bytes())
    assert re.fullmatch(f"{CUP}  {COFFEE}\n{CAT}  -\n", output)


def test_a_folder_is_gone_through_by_name(daemon: Daemon, album: Path) -> None:
    """Files that are named like pictures, and folders below; no link leads round in a circle."""
    done = run(daemon, "-r", album)
    rows = done.stdout.decode().splitlines()
    names = [row.split("  ")[1].removeprefix(f"{album}/") for row in rows]
    assert names == ["a.png", "b.PNG", "below/deeper/z.png"]
    assert done.returncode == 1
    said = "cannot be opened: Too many levels of symbolic links (not_a_file)"
    assert done.stderr.decode() == f"swiprctl: {album}/c.jpg: {said}\n"


def test_folders_may_be_nested_as_deep_as_they_can_be(daemon: Daemon, folder: Path) -> None:
    """Where their path is too long to be opened, that is told."""
    place = str(folder)
    with contextlib.chdir(folder):
        for _ in range(2100):
            os.mkdir("a")
            os.chdir("a")
    try:
        shutil.copy(CHELSEA, folder / "z.png")
        done = run(daemon, "-r", folder)
    finally:
        subprocess.run(["/bin/rm", "-r", f"{place}/a"], check=True)
    assert re.fullmatch(f"{CAT}  {folder}/z.png\n", done.stdout.decode())
    assert done.returncode == 1
    assert re.fullmatch(
        rf"swiprctl: {folder}(/a)+: cannot be gone through: File name too long \(not_a_file\)\n",
        done.stderr.decode(),
    )


def test_a_folder_needs_to_be_asked_for(daemon: Daemon, album: Path) -> None:
    """It is told, and the rest goes on."""
    done = run(daemon, album, CHELSEA)
    assert done.returncode == 1
    assert re.fullmatch(f"{CAT}  {CHELSEA}\n", done.stdout.decode())
    assert f"{album}: is a folder; -r takes the images in it (not_a_file)" in done.stderr.decode()


def test_where_there_is_no_image_that_is_told(daemon: Daemon, folder: Path) -> None:
    """It is no failure, and no success that nobody would look into."""
    (folder / "none").mkdir()
    for args in (["-r", folder / "none"], ["--files-from", os.devnull]):
        done = run(daemon, *args)
        assert (done.returncode, done.stdout) == (0, b"")
        assert done.stderr == b"swiprctl: no images were found\n"


def test_a_list_of_the_other_kind_is_told_and_not_taken_for_one_name(
    daemon: Daemon, folder: Path
) -> None:
    """What find -print0 writes, without -0."""
    (folder / "list").write_bytes(b"/a.png\0/b.png\0")
    done = run(daemon, "--files-from", folder / "list")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == (
        f"swiprctl: {folder / 'list'}: its paths end with NUL, not a newline; add -0 (not_a_file)\n"
    )


def test_a_folder_that_may_not_be_read_costs_itself(album: Path) -> None:
    """It is told, and the rest goes on."""
    album.parent.chmod(0o755)
    (album / "below").chmod(0)
    args = argparse.Namespace(paths=[str(album), "x"], files_from=None, null=False)
    refused: list[tuple[str, SwiprError]] = []
    with unprivileged():
        found = list(find_images(args, lambda *told: refused.append(told), recursive=True))
    assert found == [f"{album}/a.png", f"{album}/b.PNG", f"{album}/c.jpg", "x"]
    ((name, error),) = refused
    assert (name, error.code) == (f"{album}/below", "permission_denied")
    assert str(error) == f"{album}/below: cannot be gone through: Permission denied"


@pytest.mark.parametrize(("flags", "end"), [([], b"\n"), (["-0"], b"\0")], ids=["lines", "nul"])
@pytest.mark.parametrize("source", ["file", "stdin"])
def test_names_come_from_a_list(
    daemon: Daemon, folder: Path, flags: list[str], end: bytes, source: str
) -> None:
    """After those on the command line; empty ones do not count, nor a missing last end."""
    listed = end.join([os.fsencode(COFFEE), b"", os.fsencode(CHELSEA)])
    (folder / "list").write_bytes(listed)
    name = str(folder / "list") if source == "file" else "-"
    output = printed(daemon, CHELSEA, "--files-from", name, *flags, given=listed)
    assert re.fullmatch(f"{CAT}  {CHELSEA}\n{CUP}  {COFFEE}\n{CAT}  {CHELSEA}\n", output)


@pytest.mark.parametrize(("name", "code"), [("none", "not_found"), (".", "not_a_file")])
def test_a_list_that_cannot_be_read_is_told(
    daemon: Daemon, folder: Path, name: str, code: str
) -> None:
    """Like any other file."""
    done = run(daemon, "--files-from", folder / name)
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.fullmatch(rf"swiprctl: {folder / name}: .+ \({code}\)\n", done.stderr.decode())


@pytest.mark.parametrize(
    ("redirection", "words"),
    [
        ("<&-", "standard input is closed (not_a_file)"),
        ("</dev/null", "-: the file is empty (not_an_image)"),
    ],
)
def test_a_standard_input_that_is_no_image_is_told(
    daemon: Daemon, redirection: str, words: str
) -> None:
    """Whatever else it is."""
    command = [*SWIPRCTL, "--socket", daemon.path, "compute", "-"]
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *command],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == f"swiprctl: {words}\n"


# --- how they are printed ------------------------------------------------------------------------


@pytest.fixture
def hostile(folder: Path) -> Path:
    """A picture whose name would break a line."""
    return Path(shutil.copy(CHELSEA, folder / HOSTILE))


def test_a_name_that_would_break_the_line_is_escaped(daemon: Daemon, hostile: Path) -> None:
    """As sha256sum does it: a backslash before the line says so."""
    output = printed(daemon, hostile, CHELSEA)
    first, second = output.splitlines()
    assert first.startswith("\\")
    assert first.endswith(rf"  {hostile.parent}/two\nlines\r\\ " + "\x1b[31m.png")
    assert not second.startswith("\\")
    sha256sum = shutil.which("sha256sum")
    assert sha256sum is not None, "coreutils are everywhere"
    done = subprocess.run([sha256sum, hostile], capture_output=True, check=True)
    summed = done.stdout.decode()
    assert summed.startswith("\\")
    assert summed.split("  ", 1)[1] == first.split("  ", 1)[1] + "\n"


def test_bytes_that_are_no_text_come_out_as_they_are(daemon: Daemon, folder: Path) -> None:
    """In a line; in JSON as the protocol writes them."""
    name = os.fsencode(folder) + b"/caf\xe9.png"
    shutil.copy(CHELSEA, os.fsdecode(name))
    done = run(daemon, name, CHELSEA)
    assert done.stdout.splitlines()[0].split(b"  ")[1] == name
    (found,) = json.loads(printed(daemon, name, "--format", "json"))
    assert os.fsencode(found["path"]) == name


def test_labels_stand_before_their_scores(daemon: Daemon) -> None:
    """All of them, or the one with the highest score alone."""
    assert re.fullmatch(r"other=0\.0\d+,animal=0\.9\d+\n", printed(daemon, CHELSEA, "--labels"))
    assert re.fullmatch(r"animal=0\.9\d+\n", printed(daemon, CHELSEA, "--top"))
    output = printed(daemon, CHELSEA, COFFEE, "--top")
    assert re.fullmatch(rf"animal=0\.9\d+  {CHELSEA}\nother=0\.9\d+  {COFFEE}\n", output)


def test_csv_is_what_spreadsheets_read(daemon: Daemon, hostile: Path) -> None:
    """A header, and a row for each image, whatever it is called."""
    output = printed(daemon, COFFEE, hostile, "--format", "csv")
    rows = list(csv.reader(io.StringIO(output, newline="")))
    assert rows[0] == ["path", "other", "animal"]
    assert [row[0] for row in rows[1:]] == [str(COFFEE), str(hostile)]
    assert all(float(row[1]) + float(row[2]) == pytest.approx(1, abs=1e-5) for row in rows[1:])
    rows = list(csv.reader(io.StringIO(printed(daemon, CHELSEA, "--format", "csv", "--top"))))
    assert rows[0] == ["path", "label", "score"]
    assert rows[1][:2] == [str(CHELSEA), "animal"]


def test_json_has_all_that_the_daemon_says(daemon: Daemon, hostile: Path) -> None:
    """As one array, or as one object a line; every digit is there."""
    with daemon.client() as client:
        expected = client.compute(CHELSEA)
    array = json.loads(printed(daemon, hostile, CHELSEA, "--format", "json"))
    lines = printed(daemon, hostile, CHELSEA, "--format", "ndjson").splitlines()
    assert [found["path"] for found in array] == [str(hostile), str(CHELSEA)]
    for found in (*array, *map(json.loads, lines)):
        assert found["scores"] == list(expected.scores)
        assert (found["labels"], found["model"]) == (list(expected.labels), expected.model)
        assert (found["engine"], found["precision"]) == (expected.engine, expected.precision)
        assert found["ms"] > found["decode_ms"] > 0
    (top,) = json.loads(printed(daemon, CHELSEA, "--format", "json", "--top"))
    assert (top["label"], top["score"]) == ("animal", max(expected.scores))
    assert "scores" not in top


@pytest.mark.parametrize(
    ("form", "output"), [("tuple", ""), ("csv", ""), ("json", "[]\n"), ("ndjson", "")]
)
def test_where_nothing_is_scored_the_output_is_still_whole(
    daemon: Daemon, form: str, output: str
) -> None:
    """No error looks like an answer."""
    done = run(daemon, NOT_IMAGE, "/none.png", "--format", form)
    assert (done.returncode, done.stdout.decode()) == (1, output)
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("form", ["tuple", "csv", "json", "ndjson"])
def test_one_bad_file_costs_one_line_and_the_exit_status(daemon: Daemon, form: str) -> None:
    """Never the rest."""
    done = run(daemon, CHELSEA, NOT_IMAGE, "/none.png", COFFEE, "--format", form)
    assert done.returncode == 1
    assert str(COFFEE) in done.stdout.decode()
    assert str(NOT_IMAGE) not in done.stdout.decode()
    told = done.stderr.decode().splitlines()
    assert re.fullmatch(rf"swiprctl: {NOT_IMAGE}: .+ \(not_an_image\)", told[0])
    assert told[1:] == ["swiprctl: /none.png: no such file (not_found)"]
    if form == "json":
        assert len(json.loads(done.stdout)) == 2


# --- what a daemon may do meanwhile --------------------------------------------------------------


def a_reply(id: int, labels: list[str], model: str) -> bytes:
    """Return a whole reply of some model."""
    scores = [1 / len(labels)] * len(labels)
    rest = {"engine": "e", "precision": "p", "ms": 1, "decode_ms": 1}
    return line(id=id, scores=scores, labels=labels, model=model, **rest)


def changes_after_one(labels: list[str]) -> Behaviour:
    """Answer with another model after the first image."""

    def behave(talk: Talk) -> None:
        for count, request in enumerate(talk.requests()):
            kind = (["no", "yes"], "old") if count == 0 else (labels, "new")
            talk.sock.sendall(a_reply(request["id"], *kind))

    return behave


def test_a_model_that_changes_meanwhile_is_told(folder: Path) -> None:
    """From which image on, and in the exit status: the answers are not of one model."""
    with Peer(folder, changes_after_one(["no", "yes"])) as peer:
        done = run(peer, CHELSEA, COFFEE, CHELSEA)
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 3)
    told = "from here on another model answers, new; before, old (model_changed)"
    assert done.stderr.decode() == f"swiprctl: {COFFEE}: {told}\n"


def test_a_row_never_has_other_columns_than_the_header(folder: Path) -> None:
    """Labels that change while a table is printed make an error, not a row."""
    with Peer(folder, changes_after_one(["maybe", "perhaps"])) as peer:
        done = run(peer, CHELSEA, COFFEE, "--format", "csv")
    assert done.returncode == 1
    assert done.stdout.decode() == f"path,no,yes\n{CHELSEA},0.500000,0.500000\n"
    assert f"{COFFEE}: the daemon's labels have changed" in done.stderr.decode()


def test_a_daemon_that_can_do_no_more_is_told_once(folder: Path) -> None:
    """With how far it came; what was printed stays."""

    def one_and_no_more(talk: Talk) -> None:
        for count, request in enumerate(talk.requests()):
            reply = a_reply(request["id"], ["a", "b"], "m")
            talk.sock.sendall(error(request["id"], "unavailable") if count else reply)

    with Peer(folder, one_and_no_more) as peer:
        done = run(peer, CHELSEA, COFFEE, CHELSEA)
    assert (done.returncode, len(done.stdout.splitlines())) == (3, 1)
    assert done.stderr == b"swiprctl: stopped after 1 images: told to (unavailable)\n"


# --- streams and signals -------------------------------------------------------------------------


def test_a_reader_that_leaves_ends_it_quietly(daemon: Daemon, folder: Path) -> None:
    """As head does; what is left is not computed."""
    (folder / "list").write_text(f"{CHELSEA}\n" * 10_000)
    with subprocess.Popen(
        [*SWIPRCTL, "--socket", daemon.path, "compute", "--files-from", folder / "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 128 + signal.SIGPIPE


class Terminal:
    """swiprctl before a terminal of its own; ``shown`` is what stands there so far."""

    def __init__(self, daemon: Daemon | Peer, *args: str | Path, own_output: bool = False) -> None:
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        self._fd = ours
        self.shown = b""
        self.process = subprocess.Popen(
            [*SWIPRCTL, "--socket", daemon.path, "compute", *args],
            stdout=theirs if own_output else subprocess.DEVNULL,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(theirs)

    def has_ended(self) -> bool:
        """Take what has been shown, or wait a little for it; return whether the process is gone."""
        status = self.process.poll()
        if select.select([self._fd], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # nobody has it open any more
                self.shown += os.read(self._fd, 65536)
        return status is not None

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


def takes_its_time(talk: Talk) -> None:
    """Answer ten images a second."""
    for request in talk.requests():
        time.sleep(0.1)
        talk.sock.sendall(a_reply(request["id"], ["a", "b"], "m"))


def shows(terminal: Terminal, pattern: bytes) -> bool:
    """Return whether ``pattern`` has been shown by now."""
    terminal.has_ended()
    return re.search(pattern, terminal.shown) is not None


@pytest.fixture
def slow(folder: Path) -> Iterator[Peer]:
    """A daemon that takes its time."""
    with Peer(folder, takes_its_time) as peer:
        yield peer


BAR = rb"\r\x1b\[K\[#*\.*\] \d+ of 40, \d+\.\d/s, 0:\d\d left"


def test_long_work_shows_how_far_it_is(slow: Peer) -> None:
    """Count, rate and time left, on a terminal; after the end nothing of it is left."""
    with contextlib.closing(Terminal(slow, *[CHELSEA] * 40)) as terminal:
        wait_until(lambda: shows(terminal, BAR), "the bar")
        wait_until(terminal.has_ended, "its end")
        assert terminal.process.returncode == 0
    assert terminal.shown.endswith(b"\r\x1b[K")


def test_the_bar_does_not_mix_with_lines(slow: Peer) -> None:
    """Before a line is printed to the same terminal, or told, the bar is taken away."""
    args = [CHELSEA] * 20 + [Path("/none.png")] + [CHELSEA] * 19
    with contextlib.closing(Terminal(slow, *args, own_output=True)) as terminal:
        wait_until(terminal.has_ended, "its end")
    for part in re.findall(rb"left(.*)", terminal.shown):
        assert re.match(rb"\r\x1b\[K", part) or part == b"\r", part
    text = re.sub(rb"\r\x1b\[K(\[[^\r]*)?", b"", terminal.shown).replace(b"\r\n", b"\n").decode()
    assert len(text.splitlines()) == 40
    assert all(re.match(r"0\.5|swiprctl: /none", row) for row in text.splitlines())


def test_a_name_cannot_steer_the_terminal(daemon: Daemon, hostile: Path) -> None:
    """There it is shown escaped; in a pipe its bytes are as they are, as tests above show."""
    with contextlib.closing(Terminal(daemon, hostile, CHELSEA, own_output=True)) as terminal:
        wait_until(terminal.has_ended, "its end")
    first, second = terminal.shown.decode().splitlines()
    assert first.endswith(rf"  {hostile.parent}/two\nlines\r\\ \x1b[31m.png")
    assert first.startswith("\\")
    assert re.fullmatch(f"{CAT}  {CHELSEA}", second)


def test_a_list_on_standard_input_is_read_once(slow: Peer, folder: Path) -> None:
    """Before a terminal too, where files are counted first, and whatever else is called -."""
    (folder / "-").touch()
    code = f"{shlex.join(SWIPRCTL)} --socket {slow.path} compute --files-from -"
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", code],
            input=f"{CHELSEA}\n{COFFEE}\n".encode(),
            stdout=subprocess.PIPE,
            stderr=theirs,
            check=False,
            cwd=folder,
            env={**os.environ, "TERM": "xterm", "PYTHONPATH": os.getcwd()},
            timeout=60,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)


def test_a_list_that_cannot_be_read_costs_no_picture(daemon: Daemon, folder: Path) -> None:
    """Nor does a closed standard input; what else was named is scored."""
    done = run(daemon, CHELSEA, "--files-from", folder / "none", COFFEE)
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 2)
    code = f"{shlex.join(SWIPRCTL)} --socket {daemon.path} compute {CHELSEA} - {COFFEE} <&-"
    closed = subprocess.run(["/bin/sh", "-c", code], capture_output=True, check=False, timeout=60)
    assert (closed.returncode, len(closed.stdout.splitlines())) == (1, 2)


def test_short_work_shows_no_bar(daemon: Daemon) -> None:
    """Nor does a pipe get one, as the other tests show."""
    with contextlib.closing(Terminal(daemon, CHELSEA, COFFEE)) as terminal:
        wait_until(terminal.has_ended, "its end")
        assert terminal.process.returncode == 0
    assert terminal.shown == b""


def test_control_c_leaves_a_clean_line(slow: Peer) -> None:
    """And exit status 130."""
    with interruptible(), contextlib.closing(Terminal(slow, *[CHELSEA] * 40)) as terminal:
        wait_until(lambda: shows(terminal, BAR), "the bar")
        terminal.process.send_signal(signal.SIGINT)
        wait_until(terminal.has_ended, "its end")
    assert terminal.process.returncode == 130
    assert terminal.shown.endswith(b"\r\x1b[K")
    assert b"Traceback" not in terminal.shown


def test_memory_is_flat_however_many_there_are(folder: Path) -> None:
    """Ten thousand files take what a hundred take."""

    def at_once(talk: Talk) -> None:
        for request in talk.requests():
            talk.received.clear()
            talk.sock.sendall(a_reply(request["id"], ["a", "b"], "m"))

    def most_memory(count: int) -> int:
        names = folder / "names"
        names.write_text(f"{NOT_IMAGE}\n" * count)
        # A process that waits for it tells its peak, in KiB.
        code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True,"
        code += " stdout=subprocess.DEVNULL)\n"
        code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        with Peer(folder, at_once) as peer:
            command = [*SWIPRCTL, "--socket", peer.path, "compute", "--files-from", str(names)]
            done = subprocess.run(
                [SWIPRCTL[0], "-c", code, *command], capture_output=True, check=True
            )
        Path(peer.path).unlink()
        return int(done.stdout)

    few, many = most_memory(100), most_memory(10_000)
    assert many - few < 1024, (few, many)


def test_the_client_costs_little_beside_the_work(daemon: Daemon, folder: Path) -> None:
    """At most a twentieth of the whole time is its own processor's, its start included."""
    (folder / "names").write_text(f"{CHELSEA}\n{COFFEE}\n" * 100)
    command = [*SWIPRCTL, "--socket", daemon.path, "compute", "--files-from", str(folder / "names")]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    took = time.monotonic() - began
    cost = usage.ru_utime + usage.ru_stime
    print(f"200 pictures in {took:.1f} s, {cost / took:.1%} of it the client's own")
    assert status == 0
    assert cost <= took / 20
