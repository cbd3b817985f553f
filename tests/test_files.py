"""How an image's file is opened and its bytes are read: swiprd.files."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiprctl import SwiprError
from swiprd.files import open_image, read_image
from tests.filter import filtered
from tests.tasks import PATIENCE, unprivileged

LIMIT = 1000
CONTENT = bytes(range(256)) * 3


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    """Return the code and the message with which ``call`` is refused."""
    with pytest.raises(SwiprError) as caught:
        call()
    message = caught.value.message
    assert "\n" not in message
    assert not message.endswith((".", " "))
    return caught.value.code, message


def read(path: str | os.PathLike[str], *, max_bytes: int = LIMIT) -> bytes:
    """Open and read ``path``, as front and worker do."""
    fd = open_image(os.fspath(path))
    try:
        return read_image(fd, max_bytes=max_bytes)
    finally:
        os.close(fd)


@pytest.fixture
def picture(folder: Path) -> Path:
    """A file of some bytes; nothing here looks at what they mean."""
    path = folder / "picture"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def descriptor(picture: Path) -> Iterator[int]:
    """A descriptor that is open for reading and writing."""
    fd = os.open(picture, os.O_RDWR)
    yield fd
    os.close(fd)


# --- opening -------------------------------------------------------------------------------------


def test_a_file_is_opened_and_read_whole(picture: Path) -> None:
    """What comes back are the bytes of the file and nothing else."""
    assert read(picture) == CONTENT


def test_what_is_opened_can_be_read_only_and_does_not_pass_to_children(picture: Path) -> None:
    """The daemon cannot write to a client's picture, and no worker inherits it by accident."""
    fd = open_image(str(picture))
    try:
        assert not os.get_inheritable(fd)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", ["none", "none/picture", "picture/below", "dangling", ""])
def test_a_file_that_is_not_there_is_not_found(name: str, picture: Path) -> None:
    """Neither in a folder that exists nor below one that does not, or that is a file."""
    (picture.parent / "dangling").symlink_to("none")
    path = f"{picture.parent}/{name}" if name else ""
    assert refusal(lambda: open_image(path)) == ("not_found", f"{path}: no such file")


@pytest.mark.parametrize("path", ["/in\0valid", "\0", "/in\ud800valid"])
def test_a_name_that_no_file_can_have_is_not_found(path: str) -> None:
    """A NUL ends a name, and a lone surrogate stands for no byte: there is no such file."""
    assert refusal(lambda: open_image(path))[0] == "not_found"


@pytest.mark.parametrize(
    "name",
    [b"caf\xe9", "café".encode(), b"\xff\xfe\x80", b" ", b"a\nb", b"-rf *", b"\\", b"x" * 255],
)
def test_any_name_that_a_file_can_have_is_opened(name: bytes, folder: Path) -> None:
    """Bytes that are not UTF-8 come as surrogates and go back to the bytes that they were."""
    path = os.path.join(os.fsencode(folder), name)
    with open(path, "wb") as file:
        file.write(CONTENT)
    assert read(os.fsdecode(path)) == CONTENT


def test_a_path_that_is_too_long_cannot_be_opened(folder: Path) -> None:
    """Neither a name of 256 bytes nor a path of 4096; a path just short enough is opened."""
    for path in (f"{folder}/{'x' * 256}", f"{folder}/" + "./" * 2048):
        code, message = refusal(lambda path=path: open_image(path))  # type: ignore[misc]
        assert (code, message) == ("not_a_file", f"{path}: cannot be opened: File name too long")
    (folder / "xy").write_bytes(CONTENT)
    short = 4095 - len(f"{folder}/xy")
    assert read(f"{folder}/" + "/" * short + "xy") == CONTENT


def test_a_link_is_followed_but_not_in_circles(picture: Path) -> None:
    """What a link leads to is scored; links that lead to one another are no file."""
    folder = picture.parent
    (folder / "link").symlink_to("picture")
    (folder / "link to it").symlink_to("link")
    assert read(folder / "link to it") == CONTENT
    (folder / "there").symlink_to("back")
    (folder / "back").symlink_to("there")
    (folder / "itself").symlink_to("itself")
    for name in ("there", "itself", "itself/below"):
        code, message = refusal(lambda name=name: open_image(f"{folder}/{name}"))  # type: ignore[misc]
        assert code == "not_a_file"
        assert "links lead in a circle, or to what a process holds" in message


def test_a_file_without_permission_is_denied(picture: Path) -> None:
    """The message says what helps: a descriptor, which needs no permission of the daemon's."""
    picture.parent.chmod(0o755)
    picture.chmod(0o200)
    with unprivileged():
        code, message = refusal(lambda: open_image(str(picture)))
    assert code == "permission_denied"
    assert message.startswith(f"{picture}: ")
    assert "send a descriptor" in message


def test_a_file_in_a_folder_without_permission_is_denied(picture: Path) -> None:
    """Nothing is said of whether the file is there."""
    picture.chmod(0o644)
    picture.parent.chmod(0)
    with unprivileged():
        codes = {refusal(lambda n=n: open_image(f"{picture.parent}/{n}"))[0] for n in "ab"}  # type: ignore[misc]
        codes.add(refusal(lambda: open_image(str(picture)))[0])
    picture.parent.chmod(0o755)
    assert codes == {"permission_denied"}


# --- what is no regular file ---------------------------------------------------------------------


def test_a_process_without_a_free_descriptor_is_busy(picture: Path) -> None:
    """That says nothing about the picture, and may be otherwise in a moment."""
    script = """
import resource, sys
from swiprctl.protocol import SwiprError
from swiprd.files import open_image

resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    open_image(sys.argv[1])
except SwiprError as error:
    print(error.code, error.retryable)
"""
    command = [sys.executable, "-P", "-c", script, str(picture)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert done.stdout == "busy True\n"


def test_a_directory_is_no_file(folder: Path) -> None:
    """The message says what it is, with a slash at its end or without."""
    for path in (str(folder), f"{folder}/"):
        wanted = ("not_a_file", f"{path}: expected a regular file, got a directory")
        assert refusal(lambda path=path: read(path)) == wanted  # type: ignore[misc]


def test_a_file_is_no_directory(picture: Path) -> None:
    """A slash after the name of a file asks for a directory that is not there."""
    assert refusal(lambda: read(f"{picture}/"))[0] == "not_found"


def test_a_pipe_that_nobody_writes_to_is_refused_at_once(folder: Path) -> None:
    """Opening it does not wait for a writer, and leaves none waiting."""
    path = folder / "pipe"
    os.mkfifo(path)
    results: list[tuple[str, str]] = []
    reader = threading.Thread(target=lambda: results.append(refusal(lambda: read(path))))
    reader.start()
    reader.join(5)
    waits = reader.is_alive()
    if waits:
        os.close(os.open(path, os.O_WRONLY))  # lets it go
    reader.join(PATIENCE)
    assert not waits
    assert results == [("not_a_file", f"{path}: expected a regular file, got a pipe")]


def test_a_file_that_another_process_holds_is_busy(picture: Path) -> None:
    """A write lease, as Samba takes: its holder is asked to give it back, and nobody waits."""
    with picture.open("r+b") as file:
        held = signal.signal(signal.SIGIO, signal.SIG_IGN)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        try:
            code, message = refusal(lambda: open_image(str(picture)))
        finally:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            signal.signal(signal.SIGIO, held)
    assert (code, message.startswith(f"{picture}: ")) == ("busy", True)
    assert read(picture) == CONTENT


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM], ids=["old", "container"])
def test_without_a_safe_way_to_open_paths_none_is_opened(error: int, picture: Path) -> None:
    """The message says what is missing, and what works all the same."""
    program = (
        "import sys; from swiprd.files import open_image; from swiprctl import SwiprError\n"
        "try: open_image(sys.argv[1])\n"
        "except SwiprError as error: print(error.code, error)"
    )
    command = filtered(437, error, sys.executable, "-P", "-c", program, str(picture))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert done.stdout.startswith("permission_denied this daemon cannot open paths safely")
    assert "send a descriptor" in done.stdout


def test_who_waits_for_a_reader_of_a_pipe_waits_on(folder: Path) -> None:
    """The daemon is none: a writer that it woke would die of SIGPIPE."""
    path = folder / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: os.close(os.open(path, os.O_WRONLY)))
    writer.start()
    try:
        for _ in range(20):
            assert refusal(lambda: open_image(str(path)))[0] == "not_a_file"
            writer.join(0.01)
            assert writer.is_alive()
    finally:
        os.close(os.open(path, os.O_RDONLY))
        writer.join(PATIENCE)


def test_what_is_in_a_pipe_stays_in_it(folder: Path) -> None:
    """A pipe that somebody writes to is refused too, and not a byte of it is taken."""
    path = folder / "pipe"
    os.mkfifo(path)
    with open(os.open(path, os.O_RDWR), "r+b", buffering=0) as pipe:
        pipe.write(CONTENT)
        assert refusal(lambda: read(path))[0] == "not_a_file"
        assert pipe.read(LIMIT) == CONTENT


def test_a_socket_is_no_file(folder: Path) -> None:
    """Its name and its descriptor are refused for what it is."""
    path = str(folder / "socket")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        wanted = "expected a regular file, got a socket"
        assert refusal(lambda: open_image(path)) == ("not_a_file", f"{path}: {wanted}")
        found = refusal(lambda: read_image(sock.fileno(), max_bytes=LIMIT))
        assert found == ("not_a_file", wanted)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/dev/full", "/dev/urandom"])
def test_a_device_is_no_file(path: str) -> None:
    """Some never end and some never begin; none is read."""
    wanted = ("not_a_file", f"{path}: expected a regular file, got a character device")
    assert refusal(lambda: read(path)) == wanted


def test_what_has_no_kind_is_no_file() -> None:
    """An epoll or event descriptor, which has no name in any folder, is refused as well."""
    fd = os.eventfd(1)
    try:
        wanted = ("not_a_file", "expected a regular file, got something else")
        assert stat.S_IFMT(os.fstat(fd).st_mode) == 0
        assert refusal(lambda: read_image(fd, max_bytes=LIMIT)) == wanted
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "path",
    [
        "/proc/version",
        "/proc/self/mem",
        "/proc/self/maps",
        "/sys/kernel/uevent_seqnum",
        *map(str, Path("/sys/fs/cgroup").glob("*/cgroup.procs")),
        *map(str, Path("/sys/fs/cgroup").glob("cgroup.procs")),
    ],
)
def test_a_file_that_the_kernel_makes_up_is_no_file(path: str) -> None:
    """To read one may do something, and what it gives may have no end; it is not even opened."""
    assert stat.S_ISREG(os.stat(path).st_mode)
    wanted = ("not_a_file", f"{path}: expected a file on a disk, got one that the kernel makes up")
    assert refusal(lambda: open_image(path)) == wanted


@pytest.mark.parametrize("path", ["/proc/version", "/proc/self/maps", "/proc/self/status"])
def test_a_descriptor_of_what_the_kernel_makes_up_is_no_image(path: str) -> None:
    """It says that it has no bytes, and is believed."""
    with open(path, "rb") as file:
        wanted = ("not_an_image", "the file is empty")
        assert refusal(lambda: read_image(file.fileno(), max_bytes=LIMIT)) == wanted


def test_a_file_that_gives_less_than_it_says_is_no_image() -> None:
    """Some of the kernel's say 4096 bytes whatever they hold."""
    with open("/sys/kernel/uevent_seqnum", "rb") as file:
        code, message = refusal(lambda: read_image(file.fileno(), max_bytes=2**20))
    assert code == "not_an_image"
    assert message.startswith("the file says that it has 4096 bytes, but gives ")


def test_what_a_process_holds_cannot_be_named(descriptor: int, picture: Path) -> None:
    """One of the daemon's own descriptors may be another client's picture."""
    (picture.parent / "link").symlink_to(f"/proc/self/fd/{descriptor}")
    assert Path(f"/proc/self/fd/{descriptor}").read_bytes() == CONTENT  # it could be opened
    for path in (
        f"/proc/self/fd/{descriptor}",
        f"/dev/fd/{descriptor}",
        f"/proc/{os.getpid()}/task/{os.getpid()}/fd/{descriptor}",
        f"/proc/self/root{picture}",
        f"{picture.parent}/link",
    ):
        code, message = refusal(lambda path=path: open_image(path))  # type: ignore[misc]
        assert code == "not_a_file"
        assert "links lead in a circle, or to what a process holds" in message


# --- reading -------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.binary(min_size=1, max_size=5000), st.integers(1, 5000))
def test_a_file_is_read_whole_or_refused_for_its_size(content: bytes, max_bytes: int) -> None:
    """At the limit it is read and one byte past it is not, wherever the limit lies."""
    fd = os.memfd_create("picture")
    try:
        os.write(fd, content)
        if len(content) <= max_bytes:
            assert read_image(fd, max_bytes=max_bytes) == content
        else:
            said = f"the file has {len(content)} bytes, expected at most {max_bytes}"
            wanted = ("too_large", said)
            assert refusal(lambda: read_image(fd, max_bytes=max_bytes)) == wanted
        assert read_image(fd, max_bytes=len(content)) == content
        assert refusal(lambda: read_image(fd, max_bytes=len(content) - 1))[0] == "too_large"
    finally:
        os.close(fd)


def test_a_file_past_the_limit_is_refused_without_reading_it(folder: Path) -> None:
    """A terabyte is refused as fast as a byte."""
    path = folder / "huge"
    path.touch()
    os.truncate(path, 2**40)
    began = time.monotonic()
    assert refusal(lambda: read(path))[0] == "too_large"
    assert time.monotonic() - began < 1


def test_a_large_file_is_read_whole(folder: Path) -> None:
    """The default limit of 32 MiB is reached, not just allowed."""
    content = random.Random(1).randbytes(2**25)  # noqa: S311 - no secret
    path = folder / "large"
    path.write_bytes(content)
    assert read(path, max_bytes=2**25) == content


def test_an_empty_file_is_no_image(folder: Path) -> None:
    """The message says that it is empty."""
    path = folder / "empty"
    path.touch()
    assert refusal(lambda: read(path)) == ("not_an_image", "the file is empty")


@pytest.mark.parametrize("offset", [0, 1, len(CONTENT), 10**6])
def test_the_offset_that_the_sender_shares_is_neither_used_nor_moved(
    offset: int, descriptor: int
) -> None:
    """Wherever the sender stands in the file, it is read from its start, as often as asked."""
    shared = os.dup(descriptor)
    try:
        os.lseek(shared, offset, os.SEEK_SET)
        assert read_image(descriptor, max_bytes=LIMIT) == CONTENT
        assert read_image(descriptor, max_bytes=LIMIT) == CONTENT
        assert os.lseek(shared, 0, os.SEEK_CUR) == offset
    finally:
        os.close(shared)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_WRONLY | os.O_APPEND, os.O_PATH])
def test_a_descriptor_that_cannot_be_read_is_denied(flags: int, picture: Path) -> None:
    """Opened for writing only, or only as a place: the sender has shown no right to read it."""
    fd = os.open(picture, flags)
    try:
        code, message = refusal(lambda: read_image(fd, max_bytes=LIMIT))
    finally:
        os.close(fd)
    assert code == "permission_denied"
    assert message == "the descriptor is not open for reading"


def test_a_descriptor_stays_open_and_as_it_was(descriptor: int) -> None:
    """Who opened it closes it, and its flags are the sender's too."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    read_image(descriptor, max_bytes=LIMIT)
    refusal(lambda: read_image(descriptor, max_bytes=1))
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) == flags


def test_a_file_without_a_name_is_read(descriptor: int, picture: Path) -> None:
    """A sender may unlink what it sent, and some send what never had a name."""
    picture.unlink()
    assert read_image(descriptor, max_bytes=LIMIT) == CONTENT


def test_a_file_is_what_it_is_when_it_is_read_not_when_it_was_opened(descriptor: int) -> None:
    """Shorter, longer, too long or empty: its size is looked at once the worker has it."""
    os.truncate(descriptor, 10)
    assert read_image(descriptor, max_bytes=LIMIT) == CONTENT[:10]
    os.truncate(descriptor, LIMIT)
    assert read_image(descriptor, max_bytes=LIMIT) == CONTENT[:10] + bytes(LIMIT - 10)
    os.truncate(descriptor, LIMIT + 1)
    assert refusal(lambda: read_image(descriptor, max_bytes=LIMIT))[0] == "too_large"
    os.truncate(descriptor, 0)
    assert refusal(lambda: read_image(descriptor, max_bytes=LIMIT))[0] == "not_an_image"


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) // 2, LIMIT, LIMIT + 1, 0])
def test_a_file_that_changes_while_it_is_read_is_read_again(
    size: int, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, shorter, longer, too long or empty: what comes back is the new one."""

    def change() -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"x" * size, 0)

    changes = [change]
    monkeypatch.setattr(os, "pread", reading_while(lambda: changes and changes.pop()()))
    if 0 < size <= LIMIT:
        assert read_image(descriptor, max_bytes=LIMIT) == b"x" * size
    else:
        code = refusal(lambda: read_image(descriptor, max_bytes=LIMIT))[0]
        assert code == ("too_large" if size else "not_an_image")


def test_a_file_that_does_not_stop_changing_is_refused(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed of bytes that were perhaps never together in the file."""
    monkeypatch.setattr(os, "pread", reading_while(lambda: os.pwrite(descriptor, b"x", 5)))
    wanted = "the file changes while it is read; try again when it is written"
    assert refusal(lambda: read_image(descriptor, max_bytes=LIMIT)) == ("not_an_image", wanted)


def reading_while(happens: Callable[[], object]) -> Callable[[int, int, int], bytes]:
    """Return a pread with which something ``happens`` to the file half-way."""
    pread = os.pread

    def read_half(fd: int, size: int, offset: int) -> bytes:
        half = pread(fd, max(1, size // 2), offset)
        time.sleep(0.02)  # more than a tick of the file system's clock
        happens()
        return half

    return read_half


def test_a_file_that_shrinks_and_grows_meanwhile_gives_bytes_or_an_error(folder: Path) -> None:
    """Never a fault, never more than the limit, and never a byte that was not in the file."""
    size = 2**22
    path = folder / "changing"
    path.write_bytes(b"x" * size)
    done = threading.Event()

    def change() -> None:
        with path.open("r+b", buffering=0) as file:
            while not done.is_set():
                file.truncate(0)
                file.truncate(size // 3)
                file.truncate(size * 2)
                file.truncate(size)

    changer = threading.Thread(target=change)
    changer.start()
    seen: set[str] = set()
    try:
        deadline = time.monotonic() + PATIENCE
        while len(seen) < 3 and time.monotonic() < deadline:
            try:
                content = read(path, max_bytes=size)
            except SwiprError as error:
                seen.add(error.code)
            else:
                seen.add(f"{len(content)} bytes")
                assert len(content) <= size
                assert not content.strip(b"x\0")
    finally:
        done.set()
        changer.join()
    codes = {word for word in seen if not word.endswith(" bytes")}
    assert codes <= {"too_large", "not_an_image"}
    assert len(seen) >= 3, f"the file did not change enough to prove anything: {seen}"
