"""What a worker gives up by itself, tried by real processes: swiprd.sandbox."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from swiprctl import protocol
from swiprd.config import DEFAULT_BUNDLE
from swiprd.process import WORKER_COMMAND
from tests.daemon import CHELSEA, read_lines, wait_until
from tests.filter import filtered

ROOT = str(Path(__file__).parent.parent)
SETTINGS = {
    "model": DEFAULT_BUNDLE,
    "precision": "auto",
    "cache_dir": None,
    "threads": 2,
    "max_bytes": 10**7,
    "max_pixels": 10**7,
    "log_level": "info",
    "log_target": "terminal",
    "max_memory": 0,
}
PATIENCE = 60.0
"""Seconds for what must happen."""
ALMOST_NOTHING = 5.0
"""Seconds for what happens at once or never."""


@functools.cache
def landlock() -> int:
    """Return the ABI of this kernel's Landlock; 0 or less: it has none."""
    return int(ctypes.CDLL(None).syscall(444, None, 0, 1))


def needs_landlock(abi: int) -> None:
    """Skip the test where the kernel's Landlock is older, or there is none."""
    if landlock() < abi:
        pytest.skip(f"needs Landlock of ABI {abi}; this kernel has {max(landlock(), 0)}")


def needs_root() -> None:
    """Skip the test where it would show nothing."""
    if os.geteuid() != 0:
        pytest.skip("only root has capabilities to lose")


FRONT = """
import os, signal, socket, subprocess, sys

control = socket.socket(fileno=int(sys.argv[1]))
ours, theirs = socket.socketpair()
fds = [theirs.fileno(), ours.fileno(), os.open(os.devnull, os.O_RDONLY)]
worker = subprocess.Popen([*sys.argv[2:], str(fds[0])], stdout=2, pass_fds=fds)
socket.send_fds(control, [str(worker.pid).encode()], [ours.fileno()])
signal.pause()
"""
"""A front that leaves a worker more descriptors than it should, and its own socket to the test."""


@dataclasses.dataclass
class Worker:
    """A process that such a front has started; the test holds the front's end of its socket."""

    front: subprocess.Popen[bytes]
    pid: int
    pidfd: int
    socket: socket.socket
    err: IO[bytes]

    def load(self, **changes: Any) -> dict[str, Any]:
        """Send the settings and return the answer."""
        self.socket.sendall(protocol.encode(SETTINGS | changes))
        (line,) = read_lines(self.socket, 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def kill_front(self) -> None:
        """End the front without a chance to say good-bye."""
        self.front.kill()
        self.front.wait()

    def ends(self) -> bool:
        """Return whether it ends within a moment."""
        return bool(select.select([self.pidfd], [], [], ALMOST_NOTHING)[0])

    def descriptors(self) -> int:
        """Return how many descriptors it has."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def wait_tied(self) -> None:
        """Return once it has tied itself to the front: after that it closes descriptors."""
        wait_until(lambda: self.descriptors() == 4, "a worker with four descriptors")

    def log(self) -> str:
        """Return its standard error so far."""
        return os.pread(self.err.fileno(), 10**6, 0).decode()


@contextlib.contextmanager
def start(command: Sequence[str] = WORKER_COMMAND, **environment: str) -> Iterator[Worker]:
    with contextlib.ExitStack() as undo:
        ours, theirs = map(undo.enter_context, socket.socketpair())
        err = undo.enter_context(tempfile.TemporaryFile())
        front = subprocess.Popen(
            [sys.executable, "-c", FRONT, str(theirs.fileno()), *command],
            stdin=subprocess.PIPE,
            stderr=err,
            pass_fds=[theirs.fileno()],
            cwd="/",
            env=os.environ | environment,
        )
        assert front.stdin is not None
        undo.enter_context(front.stdin)
        undo.callback(front.wait)
        undo.callback(front.kill)
        theirs.close()
        data, (fd,), _, _ = socket.recv_fds(ours, 100, 1)
        link = undo.enter_context(socket.socket(fileno=fd))
        link.settimeout(PATIENCE)
        pidfd = os.pidfd_open(int(data))
        undo.callback(os.close, pidfd)
        undo.callback(end, pidfd)
        yield Worker(front, int(data), pidfd, link, err)


def end(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    select.select([pidfd], [], [])


def python(program: str, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``program``, which can import the daemon's packages."""
    environment = os.environ | {"PYTHONPATH": ROOT} | options.pop("environment", {})
    return subprocess.run(
        [sys.executable, "-P", "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=environment,
        **options,
    )


# --- the front's death ---------------------------------------------------------------------------

BUSY = """
import socket, sys
from swiprd import sandbox

link = socket.socket(fileno=int(sys.argv[1]))
assert sandbox.die_with_front(link)
sandbox.close_inherited(link.fileno())
while True:
    pass
"""
GATE = ("sh", "-c", 'read go; exec "$@"', "sh")
"""Starts what follows once a line comes from standard input."""


@pytest.mark.parametrize("stopped", [False, True], ids=["waiting", "stopped"])
def test_a_worker_dies_with_its_front(stopped: bool) -> None:
    """Also one that cannot notice it, and though its socket has not ended."""
    with start() as worker:
        worker.wait_tied()
        if stopped:
            signal.pidfd_send_signal(worker.pidfd, signal.SIGSTOP)
        worker.kill_front()
        assert worker.ends()
        assert worker.log() == ""


def test_what_is_busy_dies_with_its_front() -> None:
    """A computation that never looks at the socket is ended as well."""
    with start((sys.executable, "-c", BUSY), PYTHONPATH=ROOT) as worker:
        worker.wait_tied()
        worker.kill_front()
        assert worker.ends()


def test_a_worker_whose_front_died_before_it_could_start_ends_quietly() -> None:
    """No signal comes any more, and its socket does not end: somebody holds the other end."""
    with start((*GATE, *WORKER_COMMAND)) as worker:
        worker.kill_front()
        assert worker.front.stdin is not None
        worker.front.stdin.write(b"\n")
        worker.front.stdin.flush()
        assert worker.ends()
        assert worker.log() == ""


# --- what a worker has ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready() -> Iterator[Worker]:
    """A worker with its model loaded."""
    with start() as worker:
        assert "ready" in worker.load()
        yield worker
        assert worker.log() == ""


def test_no_thread_of_a_worker_can_gain_privileges(ready: Worker) -> None:
    """Nor those that torch has started."""
    tasks = list(Path(f"/proc/{ready.pid}/task").iterdir())
    assert len(tasks) > 1
    for task in tasks:
        assert "NoNewPrivs:\t1\n" in (task / "status").read_text()


def test_no_thread_of_a_worker_is_root(ready: Worker) -> None:
    """Of root's capabilities it keeps the one to read, where Landlock says what."""
    for status in Path(f"/proc/{ready.pid}/task").glob("*/status"):
        fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
        sets = {name: int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")}
        left = 1 << 2 if os.geteuid() == 0 else 0
        assert sets == {"CapInh": 0, "CapPrm": left, "CapEff": left, "CapAmb": 0}


def test_a_worker_of_root_reads_what_another_user_owns_and_changes_no_owner(folder: Path) -> None:
    """As a root that lost all capabilities could not; as root could, and must not."""
    needs_root()
    needs_landlock(1)
    model = folder / "model"
    model.write_text("weights")
    model.chmod(0o600)
    os.chown(model, 65534, 65534)
    program = (
        "import os, sys; from swiprd.sandbox import confine;"
        "confine(sys.argv[1:], max_memory=0); print(open(sys.argv[1]).read());"
        "os.chown(sys.argv[1], 0, 0)"
    )
    done = python(program, model)
    assert done.stdout == "weights\n"
    assert "PermissionError: [Errno 1] Operation not permitted" in done.stderr


def test_a_worker_leaves_no_core_file_and_opens_few_files(ready: Worker) -> None:
    """One byte is too little for a core file, and the one limit that also holds for pipes."""
    limits = Path(f"/proc/{ready.pid}/limits").read_text()
    lines = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()}
    assert lines["Max core file size"] == ["1", "1"]
    assert lines["Max open files"] == ["256", "256"]


def test_a_worker_keeps_no_descriptor_but_its_own(ready: Worker) -> None:
    """Standard input, output and error and the socket, whatever it was started with."""
    targets = [os.readlink(f"/proc/{ready.pid}/fd/{fd}") for fd in range(3)]
    assert ready.descriptors() == 4
    assert not any(target.startswith("socket:") for target in targets)


def test_a_worker_scores_a_picture_that_it_could_not_open(ready: Worker, folder: Path) -> None:
    """It is received: that it has no path any more means nothing."""
    picture = folder / "picture"
    picture.write_bytes(CHELSEA.read_bytes())
    with picture.open("rb") as file:
        picture.unlink()
        socket.send_fds(ready.socket, [protocol.encode({"id": 1})], [file.fileno()])
    (line,) = read_lines(ready.socket, 1)
    assert json.loads(line)["scores"][1] > 0.9


PEEPING_TORCH = """
import os
for path in {paths!r}:
    try:
        open(path).close()
    except OSError as error:
        print(os.path.basename(path), error.strerror)
    else:
        print(os.path.basename(path), "was read")
os._exit(0)
"""


def test_a_worker_is_confined_before_torch_is_imported(folder: Path) -> None:
    """A torch that looks around sees the bundle, the compiled forms and itself, and no more."""
    needs_landlock(1)
    cache, package = folder / "cache", folder / "packages" / "torch"
    cache.mkdir()
    package.mkdir(parents=True)
    paths = [folder / "secret", cache / "form", package / "_ops.py"]
    for path in paths:
        path.touch()
    seen = [DEFAULT_BUNDLE, *map(str, paths)]
    (package / "__init__.py").write_text(PEEPING_TORCH.format(paths=seen))
    with start(PYTHONPATH=str(package.parent), PYTHONUNBUFFERED="1") as worker:
        worker.socket.sendall(protocol.encode(SETTINGS | {"cache_dir": str(cache)}))
        assert worker.ends()
        assert worker.log().splitlines() == [
            "animal.safetensors was read",
            "secret Permission denied",
            "form was read",
            "_ops.py was read",
        ]


MAKE = """
import sys, torch
from torchvision import models
from swiprd.commands import run_command

torch.manual_seed(1)
torch.save(models.shufflenet_v2_x0_5(num_classes=3).state_dict(), "checkpoint.pth")
sys.exit(run_command(["import", "checkpoint.pth", "-o", "bundle"], {}))
"""


def test_torchvision_is_content_with_nothing_to_write_to(folder: Path) -> None:
    """Torch's compiler comes with it, which would make a folder wherever it is told to."""
    done = python(MAKE, cwd=folder)
    assert done.returncode == 0, done.stderr
    none = str(folder / "none")
    with start(TORCHINDUCTOR_CACHE_DIR=none, TMPDIR=none) as worker:
        assert "ready" in worker.load(model=str(folder / "bundle")), worker.log()
    assert not (folder / "none").exists()


# --- what can be done and what cannot ------------------------------------------------------------

TRY = """
import ctypes.util, errno, json, os, socket, sys, threading
from swiprd import sandbox

confined, port, name, pid = sys.argv[1:]
link = socket.socket(fileno=0)
received = []

def receive():
    _, fds, _, _ = socket.recv_fds(link, 1, 1)
    received.extend(fds)
    assert os.pread(fds[0], 6, 0) == b"secret"

def read(path):
    with open(path, "rb") as file:
        file.read(1)

def write(path, mode):
    with open(path, mode) as file:
        file.write("x")

def bind(family, address):
    with socket.socket(family) as sock:
        sock.bind(address)

def connect(family, address):
    with socket.socket(family) as sock:
        sock.connect(address)

def run(path):
    os.waitpid(os.posix_spawn(path, [path], {}), 0)

def import_anew(module):
    assert module not in sys.modules
    __import__(module)

def start_thread():
    thread = threading.Thread(target=read, args=["bundle"])
    thread.start()
    thread.join()

def open_many():
    fds = []
    try:
        while len(fds) < 300:
            fds.append(os.dup(2))
    finally:
        for fd in fds:
            os.close(fd)

ATTEMPTS = {
    "receive a picture": receive,
    "answer": lambda: link.send(b"answer"),
    "log": lambda: os.write(2, b"logged"),
    "read the bundle": lambda: read("bundle"),
    "list the forms": lambda: os.listdir("cache"),
    "read a form": lambda: read("cache/form"),
    "import a module": lambda: import_anew("colorsys"),
    "import a library": lambda: import_anew("_decimal"),
    "look for a library": lambda: ctypes.util.find_library("surely-not-there"),
    "read of the processor": lambda: read("/proc/cpuinfo"),
    "read of itself": lambda: read("/proc/self/maps"),
    "read random bytes": lambda: read("/dev/urandom"),
    "write to nowhere": lambda: write(os.devnull, "w"),
    "start a thread": start_thread,
    "signal itself": lambda: os.kill(os.getpid(), 0),
    "read a file of the system": lambda: read("/etc/passwd"),
    "read a file beside": lambda: read("secret"),
    "open a picture again": lambda: read(f"/proc/self/fd/{received[0]}"),
    "list a folder": lambda: os.listdir("."),
    "list the root": lambda: os.listdir("/"),
    "make a file": lambda: write("new", "x"),
    "make a form": lambda: write("cache/new", "x"),
    "make a folder": lambda: os.mkdir("cache/folder"),
    "make a link": lambda: os.symlink("/", "cache/link"),
    "make a pipe": lambda: os.mkfifo("cache/pipe"),
    "make a socket": lambda: bind(socket.AF_UNIX, "cache/socket"),
    "change the bundle": lambda: write("bundle", "r+"),
    "change a form": lambda: write("cache/form", "a"),
    "change its own code": lambda: os.close(os.open("/proc/self/mem", os.O_RDWR)),
    "cut the bundle off": lambda: os.truncate("bundle", 1),
    "rename a form": lambda: os.rename("cache/form", "cache/other"),
    "name the bundle twice": lambda: os.link("bundle", "cache/bundle"),
    "remove the bundle": lambda: os.unlink("bundle"),
    "remove a folder": lambda: os.rmdir("empty"),
    "run a program": lambda: run("/bin/true"),
    "listen": lambda: bind(socket.AF_INET, ("127.0.0.1", 0)),
    "connect": lambda: connect(socket.AF_INET, ("127.0.0.1", int(port))),
    "connect to an abstract socket": lambda: connect(socket.AF_UNIX, "\\0" + name),
    "signal another": lambda: os.kill(int(pid), 15),
    "open many files": open_many,
}
if confined == "confined":
    sandbox.confine(["bundle", "cache"], max_memory=0)
outcomes = {}
for attempt, do in ATTEMPTS.items():
    try:
        do()
        outcomes[attempt] = "done"
    except OSError as error:
        outcomes[attempt] = errno.errorcode[error.errno]
print(json.dumps(outcomes))
"""
"""Tries everything in a folder of its own, in the order in which one does not spoil the next."""
ALLOWED = [
    "receive a picture",
    "answer",
    "log",
    "read the bundle",
    "list the forms",
    "read a form",
    "import a module",
    "import a library",
    "look for a library",
    "read of the processor",
    "read of itself",
    "read random bytes",
    "write to nowhere",
    "start a thread",
    "signal itself",
]
FORBIDDEN = [
    ("read a file of the system", "EACCES", 1),
    ("read a file beside", "EACCES", 1),
    ("open a picture again", "EACCES", 1),
    ("list a folder", "EACCES", 1),
    ("list the root", "EACCES", 1),
    ("make a file", "EACCES", 1),
    ("make a form", "EACCES", 1),
    ("make a folder", "EACCES", 1),
    ("make a link", "EACCES", 1),
    ("make a pipe", "EACCES", 1),
    ("make a socket", "EACCES", 1),
    ("change the bundle", "EACCES", 1),
    ("change a form", "EACCES", 1),
    ("change its own code", "EACCES", 1),
    ("cut the bundle off", "EACCES", 3),
    ("rename a form", "EACCES", 1),
    ("name the bundle twice", "EACCES", 2),
    ("remove the bundle", "EACCES", 1),
    ("remove a folder", "EACCES", 1),
    ("run a program", "EACCES", 1),
    ("listen", "EACCES", 4),
    ("connect", "EACCES", 4),
    ("connect to an abstract socket", "EPERM", 6),
    ("signal another", "EPERM", 6),
    ("open many files", "EMFILE", 0),
]
"""What is tried, how it fails, and which ABI of Landlock that needs."""


def outcomes(folder: Path, confined: str) -> dict[str, str]:
    """Return how each attempt came out."""
    for name in ("cache", "empty"):
        (folder / name).mkdir(parents=True)
    for name in ("bundle", "cache/form", "secret"):
        (folder / name).write_text("secret")
    with contextlib.ExitStack() as undo:
        ours, theirs = map(undo.enter_context, socket.socketpair())
        listener = undo.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = undo.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0{folder}")
        abstract.listen()
        other = undo.enter_context(subprocess.Popen(["/bin/sleep", "1000"]))
        undo.callback(other.kill)
        picture = undo.enter_context((folder / "secret").open("rb"))
        socket.send_fds(ours, [b"x"], [picture.fileno()])
        port = listener.getsockname()[1]
        done = python(TRY, confined, port, folder, other.pid, stdin=theirs, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "logged"
        assert ours.recv(100) == b"answer"
        assert (other.poll() is None) == (confined == "confined" and landlock() >= 6)
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process can do that gives up nothing."""
    return outcomes(tmp_path_factory.mktemp("free") / "f", "free")


@pytest.fixture(scope="module")
def confined(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one can do that has confined itself."""
    return outcomes(tmp_path_factory.mktemp("confined") / "f", "confined")


def test_every_attempt_succeeds_unless_it_is_forbidden(free: dict[str, str]) -> None:
    """It is the sandbox and nothing else that the tests below see."""
    assert set(free.values()) == {"done"}, free
    assert sorted(free) == sorted([*ALLOWED, *(name for name, _, _ in FORBIDDEN)])


@pytest.mark.parametrize("attempt", ALLOWED)
def test_a_confined_process_can(attempt: str, confined: dict[str, str]) -> None:
    """What a worker does goes on working."""
    assert confined[attempt] == "done"


@pytest.mark.parametrize(("attempt", "error", "abi"), FORBIDDEN, ids=lambda value: str(value))
def test_a_confined_process_cannot(
    attempt: str, error: str, abi: int, confined: dict[str, str]
) -> None:
    """What no worker does is refused."""
    needs_landlock(abi)
    assert confined[attempt] == error


# --- folders that would open too much ------------------------------------------------------------

READ = """
import os, sys
from swiprd import sandbox

home, path = os.environ["HOME"], sys.argv[2]
readable = []
exec(sys.argv[1])
sandbox.confine(readable, max_memory=0)
try:
    with open(path):
        print("read")
except PermissionError:
    print("refused")
"""


@pytest.mark.parametrize(
    "change",
    [
        "sys.path.append('/')",
        "sys.path.append('')",
        "sys.path.append(home)",
        "sys.path.append(os.path.dirname(home))",
        "sys.path.append(home + '/modules/..')",
        "sys.prefix = home",
        "sys.base_prefix = '/'",
        "os.environ['LD_LIBRARY_PATH'] = home",
        "os.environ['LD_LIBRARY_PATH'] = ':'",
        "readable.append('/')",
        "readable.append('/..')",
        "readable.append(home + '/nothing')",
    ],
)
def test_no_setting_opens_a_whole_home(change: str, folder: Path) -> None:
    """Neither as the place of modules nor as anything else; the root least of all."""
    needs_landlock(1)
    (folder / "modules").mkdir()
    (folder / "secret").touch()
    home = {"HOME": str(folder)}
    done = python(READ, change, folder / "secret", environment=home, cwd="/")
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("sys.path.append(home + '/modules')", "modules/m"),
        ("sys.prefix = home", "lib/libm"),
        ("os.environ['LD_LIBRARY_PATH'] = '/none:' + home + '/lib'", "lib/libm"),
        ("readable.append(home + '/bundle')", "bundle"),
        ("readable.append(home + '/link')", "bundle"),
    ],
)
def test_what_lies_in_a_home_can_be_used(change: str, name: str, folder: Path) -> None:
    """Modules, libraries and the bundle, also through a link."""
    for path in ("modules/m", "lib/libm", "bundle"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).touch()
    (folder / "link").symlink_to("bundle")
    home = {"HOME": str(folder)}
    done = python(READ, change, folder / name, environment=home, cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")


def test_no_limit_is_set_beyond_what_is_allowed() -> None:
    """Whoever starts it may have allowed less."""
    program = (
        "import resource as r; from swiprd.sandbox import confine;"
        "r.setrlimit(r.RLIMIT_NOFILE, (100, 150)); r.setrlimit(r.RLIMIT_CORE, (0, 0));"
        "confine([], max_memory=0); print(r.getrlimit(r.RLIMIT_NOFILE), r.getrlimit(r.RLIMIT_CORE))"
    )
    done = python(program)
    assert (done.stdout, done.stderr) == ("(150, 150) (0, 0)\n", "")


# --- kernels that refuse -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM],
    ids=["old", "switched-off", "container"],
)
def test_where_there_is_no_landlock_the_log_says_so(error: int, folder: Path) -> None:
    """And the worker goes on: here to a bundle that is not there."""
    with start(filtered(444, error, *WORKER_COMMAND)) as worker:
        reply = worker.load(model=str(folder / "none"))
        assert reply["error"]["message"].startswith("cannot read the bundle")
        assert worker.log() == (
            "swiprd worker: there is no Landlock: files and network stay open to the worker"
            f" (landlock_create_ruleset: {os.strerror(error)}"
            + ("; let it pass the filter of system calls)\n" if error == errno.EPERM else ")\n")
        )


@pytest.mark.parametrize(
    ("call", "name"),
    [(445, "landlock_add_rule"), (446, "landlock_restrict_self"), (126, "capset")],
)
def test_a_worker_that_cannot_be_confined_does_not_serve(call: int, name: str) -> None:
    """It says which call was refused, and what to do, before torch is imported."""
    if name == "capset":  # 126 on x86-64, where root has something to drop
        needs_root()
        if os.uname().machine != "x86_64":
            pytest.skip("knows the number of the system call on x86-64 only")
    else:
        needs_landlock(1)
    with start(filtered(call, errno.EPERM, *WORKER_COMMAND)) as worker:
        reply = worker.load()
        assert reply["error"]["code"] == "unavailable"
        assert reply["error"]["message"] == (
            f"the worker cannot be confined: {name}: Operation not permitted; let it pass"
            " the filter of system calls"
        )
        assert worker.ends()
        assert worker.log() == ""
