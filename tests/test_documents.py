"""What README and the other documents tell people to type, typed."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import checkpoints
from tests.daemon import CHELSEA, COFFEE, Daemon, wait_until
from tests.documents import DOCUMENTS, ROOT, Example, examples

ELSEWHERE = {
    "make demo": "test_the_demo_scores_two_photographs",
    "make test": "test_linters_and_types_are_content",
    "make swiprctl.pyz": "test_it_is_a_program_of_its_own",
    "./swiprctl.pyz --version": "test_it_is_a_program_of_its_own",
    "systemctl --user enable --now swipr.socket": ("test_the_same_units_serve_a_users_own_manager"),
    "sudo make install": "test_install_says_what_to_do_next",
    "sudo swiprd compile swipr.safetensors": "test_a_daemon_serves_the_compiled_form",
}
"""Commands that other tests run, with their names: they take minutes, or a machine."""
INSTALLED_BY_CI = "sudo apt-get install "
OWN_DAEMON = re.compile(r"swiprd (--model \S+ )?--socket ")
"""A daemon in one terminal, which the next commands ask from another."""


def test_every_document_is_looked_at() -> None:
    """Those that have commands, and those that have none."""
    assert {"README.md", "docs/installing.md", "docs/swiprd.8", "PROTOCOL.md"} <= set(DOCUMENTS)
    assert sum(len(examples(document)) for document in DOCUMENTS) > 40


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    """To a file, and to a heading in it."""
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, heading = target.partition("#")
        place = (ROOT / document).parent / path if path else ROOT / document
        assert place.exists(), target
        headings = re.findall(r"(?m)^#+ (.+)$", place.read_text()) if heading else []
        slugs = {re.sub(r"[^\w -]", "", words).lower().replace(" ", "-") for words in headings}
        assert not heading or heading in slugs, target


def test_what_runs_elsewhere_does_so() -> None:
    """Each test that is named is there, and each command is still shown."""
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in ELSEWHERE.values():
        assert f"def {name}(" in sources
    shown = {example.command for document in DOCUMENTS for example in examples(document)}
    assert ELSEWHERE.keys() <= shown


def test_the_packages_that_are_named_are_those_that_ci_installs() -> None:
    """Who follows README has what the tests have."""
    installs = re.findall(r"\S+:([\w.+-]+)", (ROOT / ".ci" / "run").read_text())
    for document in DOCUMENTS:
        for example in examples(document):
            if example.command.startswith(INSTALLED_BY_CI):
                packages = example.command.removeprefix(INSTALLED_BY_CI).split()
                # Whoever has a clone has git, and CI has Python.
                assert set(packages) - {"git", "python3-venv"} <= set(installs), document


# --- what a user types ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that nobody has asked yet."""
    folder = tmp_path_factory.mktemp("d")
    daemon = Daemon(folder)
    try:
        daemon.wait_ready()
        yield daemon
    finally:
        assert daemon.stop() == 0, daemon.log()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that documents speak of, under their names there."""
    place = tmp_path_factory.mktemp("made")
    (place / "album" / "more").mkdir(parents=True)
    for name in ("chelsea.png", "picture.jpg", "album/chelsea.png"):
        shutil.copy(CHELSEA, place / name)
    for name in ("coffee.png", "album/more/coffee.png"):
        shutil.copy(COFFEE, place / name)
    (place / "swipr1_3.h5").write_bytes(checkpoints.unpacked())
    (place / "docs").symlink_to(ROOT / "docs")
    from torchvision.models import shufflenet_v2_x0_5  # seconds, for these tests alone

    torch.save(shufflenet_v2_x0_5(num_classes=2).state_dict(), place / "net.pth")
    return place


class Desk:
    """Where somebody sits who does what a document says. ``close`` must be called."""

    def __init__(self, place: Path, served: Daemon) -> None:
        self._place = place
        self._own: subprocess.Popen[bytes] | None = None
        self._own_socket = str(place / "own")
        self._served = served.path
        programs = place / "bin"
        programs.mkdir(exist_ok=True)
        for name in ("swiprd", "swiprctl"):
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m {name} "$@"\n')
            program.chmod(0o755)
        self._environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SWIPR_SOCKET": served.path,
            "SWIPRD_CACHE_DIR": str(place / "cache"),
            "LC_ALL": "C",  # for sort
        }

    def type(self, example: Example) -> None:
        """Type a command, and look at what it prints where the document shows that."""
        is_own = OWN_DAEMON.match(example.command)
        own_socket = self._own_socket if is_own or self._own is not None else self._served
        command = (
            example.command.replace("/srv/pictures", str(self._place))
            .replace("/run/swipr/swipr.sock", self._served)
            .replace("/tmp/swipr.sock", own_socket)  # noqa: S108 - the documents' word
        )
        if is_own:
            self._start(command)
            return
        done = subprocess.run(
            ["/bin/bash", "-c", command],
            cwd=self._place,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        if example.output:
            assert_shown(done.stdout.splitlines(), example.output)

    def _start(self, command: str) -> None:
        self.close()
        self._own = subprocess.Popen(
            [*shlex.split(command), "--threads", "1"],
            cwd=self._place,
            env=self._environment,
            executable=str(self._place / "bin" / "swiprd"),
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: os.path.exists(self._own_socket), "the daemon's socket")

    def close(self) -> None:
        """End the daemon in the other terminal."""
        if self._own is not None:
            self._own.terminate()
            assert self._own.wait(60) == 0
            self._own = None


def assert_shown(printed: list[str], documented: list[str]) -> None:
    """Fail where what is printed is not what is documented, but for what differs by machine.

    Scores may differ in the fourth digit, other numbers at will; an ellipsis stands for anything.
    """
    assert len(printed) == len(documented)
    for got, want in zip(printed, documented, strict=True):
        pattern = re.escape(want.replace("…", "\0"))
        pattern = pattern.replace(re.escape("\0"), ".*")
        pattern = re.sub(r"\d[\d,]*(\\\.\d+)*", r"[0-9][0-9.,]*", pattern)
        pattern = re.sub(r"(\\ )+", " +", pattern)
        assert re.fullmatch(pattern, got), f"{got!r} is not what is documented: {want!r}"
        scores = [re.findall(r"\b[01]\.\d{6}\b", line) for line in (got, want)]
        for one, other in zip(*scores, strict=True):
            assert float(one) == pytest.approx(float(other), abs=1e-3)


def test_what_differs_is_seen() -> None:
    """The comparison above is no formality."""
    assert_shown(["0.061350,0.938650  a"], ["0.061346,0.938654  a"])
    for printed in ("0.071346,0.928654  a", "0.061346,0.938654  b", "0.061346  a", ""):
        with pytest.raises(AssertionError):
            assert_shown([printed], ["0.061346,0.938654  a"])


WITH_EXAMPLES = [document for document in DOCUMENTS if examples(document)]


@pytest.mark.parametrize("document", WITH_EXAMPLES)
def test_commands_do_what_the_document_says(
    document: str, made: Path, served: Daemon, tmp_path: Path
) -> None:
    """One after another, as a user would; those of root are typed in tests/test_service.py."""
    place = tmp_path / "desk"
    shutil.copytree(made, place, symlinks=True)
    with contextlib.closing(Desk(place, served)) as desk:
        for example in examples(document):
            if not example.as_root and example.command not in ELSEWHERE:
                desk.type(example)


def test_the_demo_scores_two_photographs() -> None:
    """As `make demo` does once everything is installed; nothing is left running."""
    done = subprocess.run(
        [ROOT / "tools" / "demo", Path(sys.executable).parent],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    for name, scores in (("chelsea", "0.061346,0.938654"), ("coffee", "0.992399,0.007600")):
        at = printed.index(f"$ swiprctl compute {name}.png")
        assert_shown([printed[at + 1]], [scores])


def test_the_python_example_runs(made: Path, served: Daemon) -> None:
    """README's, as it stands."""
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```$", (ROOT / "README.md").read_text())
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=made,
        env={**os.environ, "SWIPR_SOCKET": served.path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed = done.stdout.splitlines()
    assert len(printed) == 4
    assert printed[1].startswith("chelsea.png {'other': 0.06")
    assert printed[3] == "none.png not_found"
