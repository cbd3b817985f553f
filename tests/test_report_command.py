"""swiprctl report: what the command writes. What the page does with it: test_report_page.py."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import swiprctl
from swiprctl.commands.report import MARK, THUMBNAIL
from tests.daemon import CHELSEA, COFFEE, SWIPRCTL, Daemon
from tests.peer import Peer, error, never_answers, replies
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
    done = run(daemon, "album", "-o", page, cwd=folder)
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


def test_a_page_is_replaced_when_the_new_one_is_whole(daemon: Daemon, folder: Path) -> None:
    """One that comes to nothing leaves the old one, and nothing beside it."""
    page = folder / "report.html"
    page.write_text("old")
    done = run(daemon, CHELSEA, "--files-from", folder / "none", "-o", page)
    assert done.returncode == 1  # of the two, one was scored
    assert data_in(page)["errors"][0]["code"] == "not_found"
    page.write_text("old")
    page.chmod(0o600)
    (folder / "gone").mkdir()
    done = run(daemon, CHELSEA, "-o", folder / "gone")
    assert done.returncode == 1
    assert "Is a directory" in done.stderr
    assert page.read_text() == "old"
    assert not list(folder.glob("*.part"))


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
    assert f"{COFFEE}: the daemon's labels have changed" in data["errors"][0]["message"]


def test_a_page_of_errors_alone_is_a_page(daemon: Daemon, folder: Path) -> None:
    """It says what went wrong with each."""
    done = run(daemon, NOT_IMAGE, "/none.png", "-o", folder / "report.html")
    assert done.returncode == 1
    data = data_in(folder / "report.html")
    assert (data["pictures"], data["labels"], data["model"]) == ([], [], "-")
    assert [found["code"] for found in data["errors"]] == ["not_an_image", "not_found"]
