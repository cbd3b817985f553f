"""swiprctl report: what the command writes. What the page does with it: test_report_page.py."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import swiprctl
from swiprctl.commands.report import MARK, THUMBNAIL
from tests.daemon import CHELSEA, COFFEE, SWIPRCTL, Daemon, wait_until
from tests.peer import Peer, error, never_answers, replies
from tests.tasks import interruptible
from tests.test_many_images import a_reply, changes_after_one

NOT_IMAGE = Path(__file__).parent / "fastai" / "45_not_image.jpg"
TEMPLATE = Path(swiprctl.__file__).parent / "commands" / "report.html"


def run(
    daemon: Daemon | Peer, *args: str | bytes | Path, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``swiprctl report`` to its end."""
    command = [*SWIPRCTL, "--socket", daemon.path, "report", *args]
    return subprocess.run(command, capture_output=True, check=False, text=True, timeout=60, cwd=cwd)


def data_in(page: Path) -> dict[str, Any]:
    """Return what the page shows."""
    before, after = TEMPLATE.read_bytes().split(MARK)
    text = page.read_bytes()
    assert text.startswith(before)
    assert text.endswith(after)
    found: dict[str, Any] = json.loads(text[len(before) : -len(after)])
    return found


def test_the_page_has_all_pictures_and_what_is_amiss_with_others(
    daemon: Daemon, folder: Path
) -> None:
    """Names, scores, thumbnails, links from where the page stands; errors apart."""
    album = folder / "album"
    (album / "below").mkdir(parents=True)
    shutil.copy(CHELSEA, album / "cat #1.png")
    shutil.copy(COFFEE, album / "below" / "100%.png")
    shutil.copy(NOT_IMAGE, album / "none.jpg")
    (folder / "pages").mkdir()
    page = folder / "pages" / "report.html"
    done = run(daemon, "-r", "album", "-o", page, cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"swiprctl: album/none.jpg: .+ \(not_an_image\)\n", done.stderr)
    data = data_in(page)
    with daemon.client() as client:
        cup, cat = client.compute(COFFEE), client.compute(CHELSEA)
    assert (data["title"], data["version"]) == ("album", swiprctl.__version__)
    assert (data["model"], data["engine"], data["precision"]) == (cat.model, "eager", "fp32")
    assert data["labels"] == ["other", "animal"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", data["made"])
    first, second = data["pictures"]
    assert (first["name"], second["name"]) == ("album/below/100%.png", "album/cat #1.png")
    assert first["href"] == "../album/below/100%25.png"
    assert second["href"] == "../album/cat%20%231.png"
    assert (first["scores"], second["scores"]) == (list(cup.scores), list(cat.scores))
    small = Image.open(io.BytesIO(base64.b64decode(second["thumbnail"])))
    assert small.size == (second["width"], second["height"]) == (THUMBNAIL, 106)
    (failure,) = data["errors"]
    assert (failure["name"], failure["code"]) == ("album/none.jpg", "not_an_image")
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    "name",
    [
        b"</script><script>alert(1)</script>.png",
        b"<!--<script>.png",
        b"javascript:alert(1).png",
        b"two\nlines\xe2\x80\xa8.png",
        b"caf\xe9.png",
        b"&lt;.png",
    ],
)
def test_a_name_cannot_break_out(daemon: Daemon, folder: Path, name: bytes) -> None:
    """Whatever it holds, it is a string within the data; its link leads to the file."""
    place = folder / "x"
    place.mkdir()
    path = os.path.join(os.fsencode(place), name.replace(b"/", b":"))
    shutil.copy(CHELSEA, os.fsdecode(path))
    page = place / "report.html"
    done = run(daemon, os.path.basename(path), "-o", "report.html", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    (picture,) = data_in(page)["pictures"]
    assert os.fsencode(picture["name"]) == os.path.basename(path)
    assert not re.match(r"[a-z]+:", picture["href"])
    assert re.fullmatch(r"[A-Za-z0-9%._~-]+", picture["href"])
    text = page.read_bytes()
    assert text.count(b"<script") == TEMPLATE.read_bytes().count(b"<script")
    assert text.count(b"</script") == TEMPLATE.read_bytes().count(b"</script")
    assert "\u2028" not in text.decode()


def test_a_page_that_cannot_be_written_is_told_before_anything_is_asked(folder: Path) -> None:
    """In one line; nothing is scored in vain."""
    with Peer(folder, never_answers) as peer:
        done = run(peer, CHELSEA, "-o", folder / "none" / "report.html")
        assert peer.requests == []
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"swiprctl: cannot write the answer: {folder}/none/report.html: No such file or directory\n"
    )


def test_a_list_that_cannot_be_read_costs_no_picture(daemon: Daemon, folder: Path) -> None:
    """Those that were named are on the page, and the list among the errors."""
    page = folder / "report.html"
    done = run(daemon, CHELSEA, "--files-from", folder / "none", "-o", page)
    assert done.returncode == 1
    data = data_in(page)
    assert [picture["name"] for picture in data["pictures"]] == [str(CHELSEA)]
    assert [found["code"] for found in data["errors"]] == ["not_found"]


def test_a_page_takes_the_place_of_another(daemon: Daemon, folder: Path) -> None:
    """With the mode of that one, and where a link leads; nothing is left beside it."""
    page = folder / "report.html"
    page.write_text("old")
    page.chmod(0o600)
    link = folder / "link"
    link.symlink_to(page)
    assert run(daemon, CHELSEA, "-o", link).returncode == 0
    assert len(data_in(page)["pictures"]) == 1
    assert page.stat().st_mode & 0o777 == 0o600
    assert link.is_symlink()
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_page_is_not_replaced(folder: Path, make: Callable[[Path], None]) -> None:
    """As root, /dev/null would become a file; nothing is asked of the daemon."""
    place = folder / "place"
    make(place)
    with Peer(folder, never_answers) as peer:
        done = run(peer, CHELSEA, "-o", place)
        assert peer.requests == []
    assert done.returncode == 1
    assert f"{place}: expected a file to replace, got something else" in done.stderr
    assert not place.is_file()
    assert not list(folder.glob("*.part"))


def test_a_page_that_comes_to_nothing_leaves_the_old_one(folder: Path) -> None:
    """Interrupted before it was whole."""
    page = folder / "report.html"
    page.write_text("old")
    with Peer(folder, never_answers) as peer, interruptible():
        command = [*SWIPRCTL, "--socket", peer.path, "report", str(CHELSEA), "-o", str(page)]
        with subprocess.Popen(command) as process:
            wait_until(lambda: bool(peer.requests), "a request")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
    assert page.read_text() == "old"
    assert not list(folder.glob("*.part"))


def test_many_sources_make_no_long_title(daemon: Daemon, folder: Path) -> None:
    """The first few are named."""
    done = run(daemon, *[CHELSEA] * 5, "-o", folder / "report.html")
    assert done.returncode == 0
    assert data_in(folder / "report.html")["title"] == f"{CHELSEA}, {CHELSEA}, {CHELSEA} and 2 more"


def test_a_model_that_changes_meanwhile_is_told_on_the_page(folder: Path) -> None:
    """Whose labels are the same: the scores of two models stand side by side."""
    with Peer(folder, changes_after_one(["no", "yes"])) as peer:
        done = run(peer, CHELSEA, COFFEE, "-o", folder / "report.html")
    assert done.returncode == 1
    data = data_in(folder / "report.html")
    assert len(data["pictures"]) == 2
    (told,) = data["errors"]
    assert (told["name"], told["code"]) == (str(COFFEE), "model_changed")
    assert "from here on another model answers, new; before, old" in told["message"]


def test_what_is_scored_when_the_daemon_gives_up_is_kept(folder: Path) -> None:
    """The page says that there is more, and so does the exit status."""
    with Peer(folder, replies(lambda number: some(number))) as peer:
        done = run(peer, CHELSEA, COFFEE, CHELSEA, "-o", folder / "report.html")
    assert done.returncode == 3
    assert done.stderr == "swiprctl: stopped after 1 images: told to (unavailable)\n"
    data = data_in(folder / "report.html")
    assert [picture["name"] for picture in data["pictures"]] == [str(CHELSEA)]
    assert [found["name"] for found in data["errors"]] == ["(all the rest)"]
    assert data["errors"][0]["message"] == "stopped after 1 images: told to"


def some(id: int) -> bytes:
    """Answer the first image, and no other."""
    return a_reply(id, ["a", "b"], "m") if id == 1 else error(id, "unavailable")


def test_pictures_with_other_labels_are_not_shown(folder: Path) -> None:
    """A model that changes meanwhile could not be compared with itself."""
    with Peer(folder, changes_after_one(["maybe", "perhaps"])) as peer:
        done = run(peer, CHELSEA, COFFEE, "-o", folder / "report.html")
    assert done.returncode == 1
    data = data_in(folder / "report.html")
    assert (data["labels"], len(data["pictures"])) == (["no", "yes"], 1)
    assert data["pictures"][0]["thumbnail"] is None
    assert f"{COFFEE}: the daemon's labels have changed" in data["errors"][1]["message"]


def test_a_page_of_nothing_does_not_take_the_place_of_another(daemon: Daemon, folder: Path) -> None:
    """A folder that is empty today, or not the one that was meant."""
    (folder / "none").mkdir()
    (folder / "page").write_text("the old one")
    done = run(daemon, folder / "none", "-o", folder / "page")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "swiprctl: no images were found\n"
    assert (folder / "page").read_text() == "the old one"
    assert sorted(path.name for path in folder.iterdir()) == ["none", "page"]


def test_a_page_of_errors_alone_is_a_page(daemon: Daemon, folder: Path) -> None:
    """It says what went wrong with each."""
    done = run(daemon, NOT_IMAGE, "/none.png", "-o", folder / "report.html")
    assert done.returncode == 1
    data = data_in(folder / "report.html")
    assert (data["pictures"], data["labels"], data["model"]) == ([], [], "-")
    assert [found["code"] for found in data["errors"]] == ["not_an_image", "not_found"]
