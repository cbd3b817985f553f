"""Where compiled forms are kept, and every one that must not be run: swiprd.compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import random
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from swiprd.compiled import PRECISIONS, CompiledError, Form, FormCache, Host, this_host

DIGEST = "sha256:" + hashlib.sha256(b"a bundle").hexdigest()
OTHER = "sha256:" + hashlib.sha256(b"another bundle").hexdigest()
HOST = Host("2.9.0", ("avx2", "fma3"), 2)
LIBRARY = random.Random(1).randbytes(5000)  # noqa: S311
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@dataclasses.dataclass
class Place:
    """A cache with one form in it, three folders deep in a folder of the test's own."""

    top: Path
    cache: FormCache
    form: Form

    @property
    def folder(self) -> Path:
        """Where the form is."""
        return Path(self.cache.folder)

    @property
    def library(self) -> Path:
        """The form's library."""
        return Path(self.form.path)

    @property
    def record(self) -> Path:
        """The form's record."""
        (path,) = self.folder.glob("*.json")
        return path

    def path(self, which: str) -> Path:
        """Return what a test names in a word."""
        return {
            "record": self.record,
            "library": self.library,
            "folder": self.folder,
            "parent": self.folder.parent,
            "grandparent": self.folder.parent.parent,
        }[which]

    def find(self) -> Form | None:
        """Look the form up."""
        return self.cache.find(DIGEST, "fp32")

    def rewrite(self, fields: Any) -> None:
        """Give the record another content."""
        self.record.write_text(json.dumps(fields))


ALL = ("record", "library", "folder", "parent", "grandparent")


@pytest.fixture
def place(folder: Path) -> Place:
    cache = FormCache(str(folder / "a" / "b" / "c"), HOST)
    cache.prepare()
    return Place(folder, cache, keep(cache, folder))


def keep(
    cache: FormCache,
    folder: Path,
    content: bytes = LIBRARY,
    digest: str = DIGEST,
    precision: str = "fp32",
) -> Form:
    """Keep ``content`` for a library and return the form."""
    source = folder / "model.so"
    source.write_bytes(content)
    try:
        return cache.keep(str(source), digest, precision)
    finally:
        source.unlink()


def refusal(place: Place) -> str:
    """Return why the form must not be run: one line that can be printed."""
    with pytest.raises(CompiledError) as caught:
        place.find()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """Let the kernel refuse to write on, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- kept and found ------------------------------------------------------------------------------


def test_what_is_kept_is_found_again(place: Place) -> None:
    """Byte for byte, by another process too, at a path without links."""
    assert place.find() == place.form
    assert FormCache(str(place.folder), HOST).find(DIGEST, "fp32") == place.form
    assert place.library.read_bytes() == LIBRARY
    assert place.form.precision == "fp32"
    assert os.path.realpath(place.form.path) == place.form.path


def test_one_form_is_two_files(place: Place) -> None:
    """A record and the library that it names; nothing is left of the writing."""
    assert {path.name for path in place.folder.iterdir()} == {
        place.record.name,
        place.library.name,
    }


@pytest.mark.parametrize("there", [True, False])
def test_nothing_there_gives_nothing(folder: Path, there: bool) -> None:
    """An empty folder and one that is not there are no failure."""
    cache = FormCache(str(folder if there else folder / "none"), HOST)
    assert cache.find(DIGEST, "fp32") is None
    assert cache.made_for_others(DIGEST) == 0


@pytest.mark.parametrize(
    ("host", "digest", "precision"),
    [
        (HOST, OTHER, "fp32"),
        (HOST, DIGEST, "bf16"),
        (dataclasses.replace(HOST, torch="2.9.1"), DIGEST, "fp32"),
        (dataclasses.replace(HOST, processor=("avx2",)), DIGEST, "fp32"),
        (dataclasses.replace(HOST, processor=("avx2", "avx512_f", "fma3")), DIGEST, "fp32"),
    ],
    ids=["bundle", "precision", "torch", "fewer features", "more features"],
)
def test_a_form_is_for_one_bundle_precision_torch_and_processor(
    place: Place, host: Host, digest: str, precision: str
) -> None:
    """Where one of them differs there is no form; one kept for that goes beside the first."""
    other = FormCache(str(place.folder), host)
    assert other.find(digest, precision) is None
    form = keep(other, place.top, b"other", digest, precision)
    assert other.find(digest, precision) == form
    assert Path(form.path).read_bytes() == b"other"
    assert place.find() == place.form


def test_bundles_whose_digests_begin_alike_are_told_apart(place: Place) -> None:
    """Names hold a part of the digest; the record holds all of it."""
    alike = DIGEST[:-1] + ("0" if DIGEST[-1] != "0" else "1")
    with pytest.raises(CompiledError, match="is for another bundle or host: its 'bundle' differs"):
        place.cache.find(alike, "fp32")


@pytest.mark.parametrize(
    ("field", "other"), [("torch", "0.0"), ("processor", ("avx2",)), ("threads", 1)]
)
def test_forms_made_for_other_hosts_are_counted(place: Place, field: str, other: Any) -> None:
    """Those of this bundle, in any precision; not those for this host."""
    assert place.cache.made_for_others(DIGEST) == 0
    keep(place.cache, place.top, precision="bf16")
    assert place.cache.made_for_others(DIGEST) == 0
    others = FormCache(str(place.folder), dataclasses.replace(HOST, **{field: other}))
    assert others.made_for_others(DIGEST) == 2
    for count, precision in enumerate(PRECISIONS, 1):
        keep(others, place.top, precision=precision)
        assert place.cache.made_for_others(DIGEST) == count
    assert others.made_for_others(DIGEST) == 2
    assert place.cache.made_for_others(OTHER) == 0


def test_a_library_that_is_replaced_goes_away(place: Place) -> None:
    """The folder does not grow; forms under other keys stay."""
    beside = keep(place.cache, place.top, precision="bf16")
    new = keep(place.cache, place.top, b"new")
    assert place.find() == new
    assert Path(new.path).read_bytes() == b"new"
    assert {path.name for path in place.folder.glob("*.so")} == {
        Path(new.path).name,
        Path(beside.path).name,
    }
    assert place.cache.find(DIGEST, "bf16") == beside


def test_the_same_library_can_be_kept_again(place: Place) -> None:
    """It replaces itself."""
    assert keep(place.cache, place.top) == place.form
    assert place.find() == place.form
    assert len(list(place.folder.iterdir())) == 2


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_files_are_for_all_to_read_and_us_to_write(folder: Path, mask: int) -> None:
    """Whatever the umask: the daemon may run as another user."""
    with umask(mask):
        form = keep(FormCache(str(folder), HOST), folder)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {0o644}
    assert FormCache(str(folder), HOST).find(DIGEST, "fp32") == form


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022])
def test_folders_are_made_so_that_forms_may_be_run(folder: Path, mask: int) -> None:
    """None of those that are made is one for others to write to, whatever the umask."""
    cache = FormCache(str(folder / "a" / "b" / "c"), HOST)
    with umask(mask):
        cache.prepare()
    cache.prepare()
    form = keep(cache, folder)
    assert cache.find(DIGEST, "fp32") == form


def test_a_folder_can_be_a_link(place: Place) -> None:
    """As where /var/cache lies on another disk; the path that is found goes straight there."""
    link = place.top / "link"
    link.symlink_to(place.folder)
    cache = FormCache(str(link), HOST)
    cache.prepare()
    assert cache.find(DIGEST, "fp32") == place.form


# --- the disk refuses ----------------------------------------------------------------------------


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_without_the_folder_nothing_is_kept(folder: Path) -> None:
    """Keeping does not make it, and leaves nothing."""
    with pytest.raises(FileNotFoundError):
        keep(FormCache(str(folder / "none"), HOST), folder)
    assert names(folder) == set()


@pytest.mark.parametrize("kind", [".so", ".json"])
def test_where_a_name_is_taken_by_a_folder_nothing_is_left(folder: Path, kind: str) -> None:
    """The library and its record are there both or not at all."""
    cache = FormCache(str(folder), HOST)
    keep(cache, folder)
    for path in list(folder.iterdir()):
        path.unlink()
        if path.suffix == kind:
            path.mkdir()
    before = names(folder)
    with pytest.raises(OSError, match="directory"):
        keep(cache, folder)
    assert names(folder) == before


@pytest.mark.parametrize(
    ("size", "limit"), [(5000, 0), (5000, 4999), (10, 100)], ids=["first byte", "last", "record"]
)
def test_a_full_disk_leaves_what_was_there(folder: Path, size: int, limit: int) -> None:
    """A form that was there before is found as before, and no part of the new one is left."""
    cache = FormCache(str(folder), HOST)
    form = keep(cache, folder)
    before = names(folder)
    source = folder / "model.so"
    source.write_bytes(bytes(size))
    with no_file_longer_than(limit), pytest.raises(OSError, match="File too large"):
        cache.keep(str(source), DIGEST, "fp32")
    source.unlink()
    assert cache.find(DIGEST, "fp32") == form
    assert names(folder) == before


def test_a_library_that_is_not_there_is_not_kept(place: Place) -> None:
    """The form that was there before is there still."""
    before = names(place.folder)
    with pytest.raises(FileNotFoundError):
        place.cache.keep(str(place.top / "none.so"), DIGEST, "fp32")
    assert names(place.folder) == before
    assert place.find() == place.form


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2500, 4999])
def test_a_library_that_is_cut_off_is_refused(place: Place, size: int) -> None:
    """Wherever it ends."""
    os.truncate(place.library, size)
    assert refusal(place) == f"{place.library} is not what was compiled: cut off, or changed"


@pytest.mark.parametrize("bit", [0, 7, 20_000, 39_999])
def test_a_library_with_one_bit_changed_is_refused(place: Place, bit: int) -> None:
    """Wherever it is."""
    place.library.write_bytes(flipped(LIBRARY, bit))
    assert refusal(place) == f"{place.library} is not what was compiled: cut off, or changed"


def test_a_library_that_goes_on_is_refused(place: Place) -> None:
    """One byte more is another library."""
    place.library.write_bytes(LIBRARY + b"\0")
    assert "is not what was compiled" in refusal(place)


def test_a_library_that_is_missing_is_told(place: Place) -> None:
    """A record alone is no form."""
    place.library.unlink()
    assert refusal(place) == f"{place.library} cannot be read: No such file or directory"


def test_a_record_that_is_cut_off_is_refused(place: Place) -> None:
    """At each of its bytes."""
    whole = place.record.read_bytes()
    for size in range(len(whole)):
        place.record.write_bytes(whole[:size])
        assert refusal(place) == f"{place.record} is not JSON: cut off, or changed", size
    place.record.write_bytes(whole)
    assert place.find() == place.form


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"1",
        b'"sha256"',
        b"{}",
        b"[" * 60_000,
        b"9" * 5000,
        b"\xff\xfe{}",
        b" " * 70_000 + b"{}",
        bytes(100),
    ],
    ids=lambda content: str(content[:10]),
)
def test_a_record_that_is_something_else_is_refused(place: Place, content: bytes) -> None:
    """JSON or not, it is told."""
    place.record.write_bytes(content)
    assert str(place.record) in refusal(place)


FIELDS = ("format", "bundle", "precision", "torch", "processor", "threads", "sha256")


def test_a_record_holds_these_fields(place: Place) -> None:
    """The tests below change each of them."""
    assert tuple(json.loads(place.record.read_text())) == FIELDS


@pytest.mark.parametrize("field", FIELDS)
def test_a_record_without_one_field_is_refused(place: Place, field: str) -> None:
    """None of them is taken for granted."""
    record = json.loads(place.record.read_text())
    del record[field]
    place.rewrite(record)
    assert str(place.record) in refusal(place)


VALUES: tuple[Any, ...] = (None, True, 0, 3, 1.5, "", "x", [], ["avx2"], ["x"], {}, [[]], 10**400)


def test_a_record_with_one_field_changed_is_refused(place: Place) -> None:
    """To another value, and to another type."""
    record = json.loads(place.record.read_text())
    accepted = []
    for field, value in itertools.product(FIELDS, VALUES):
        place.rewrite(record | {field: value})
        with contextlib.suppress(CompiledError):
            place.find()
            accepted.append((field, value))
    assert accepted == []


@pytest.mark.parametrize(
    "digest",
    ["..", "/", "../" * 21 + "x", "a\0b", "a\nb", "a\x1b[2Jb", "\ud800", "0" * 63, "x" * 60_000],
    ids=["up", "root", "far up", "nul", "newline", "escape", "surrogate", "short", "long"],
)
def test_a_record_whose_digest_is_none_is_refused(place: Place, digest: str) -> None:
    """The library's name is made from it, so it leads nowhere else; and the message is one line."""
    place.rewrite(json.loads(place.record.read_text()) | {"sha256": digest})
    refusal(place)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return ``data`` with one kind of damage, somewhere."""
    begin = chance.randrange(len(data))
    end = min(len(data), begin + chance.randrange(1, 50))
    match chance.randrange(6):
        case 0:
            return flipped(data, chance.randrange(8 * len(data)))
        case 1:
            return data[:begin]
        case 2:
            return data[:begin] + data[end:]
        case 3:
            return data[:begin] + chance.randbytes(chance.randrange(50)) + data[begin:]
        case 4:
            return data[:begin] + bytes(end - begin) + data[end:]
        case _:
            return data[:begin] + data[end:] + data[begin:end]


def test_damage_is_told_and_never_raises_anything_else(place: Place) -> None:
    """200 kinds: whatever is found still is the library that was compiled, for this host."""
    chance = random.Random(7)  # noqa: S311
    files = {path: path.read_bytes() for path in (place.record, place.library)}
    meaning = json.loads(files[place.record])
    refused = []
    for number in range(200):
        target = (place.record, place.library)[number % 2]
        target.write_bytes(damaged(files[target], chance))
        try:
            found = place.find()
        except CompiledError as error:
            refused.append(str(error))
        else:
            assert found in (None, place.form), number
            if found is not None:
                assert place.library.read_bytes() == LIBRARY
                record = json.loads(place.record.read_text())
                assert {key: record[key] for key in FIELDS} == meaning
        target.write_bytes(files[target])
    assert len(refused) >= 150
    assert [message for message in refused if not message.isprintable()] == []
    assert place.find() == place.form


# --- what others could have written --------------------------------------------------------------


@pytest.mark.parametrize("which", ["record", "library"])
def test_a_link_in_place_of_a_file_is_refused(place: Place, which: str) -> None:
    """Even to the right file: where it leads could change after the look."""
    path = place.path(which)
    path.rename(place.top / "real")
    path.symlink_to(place.top / "real")
    assert refusal(place).startswith(f"{path} cannot be read: ")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("which", ["record", "library"])
def test_a_fifo_in_place_of_a_file_is_refused_at_once(place: Place, which: str) -> None:
    """Nobody waits for a writer that never comes."""
    path = place.path(which)
    path.unlink()
    os.mkfifo(path, 0o644)
    assert refusal(place) == f"{path} is no regular file"


@pytest.mark.parametrize("which", ["record", "library"])
def test_a_folder_in_place_of_a_file_is_refused(place: Place, which: str) -> None:
    """It can be opened, and is no form."""
    path = place.path(which)
    path.unlink()
    path.mkdir(0o755)
    assert refusal(place) == f"{path} is no regular file"


@pytest.mark.parametrize("bit", [0o020, 0o002], ids=["group", "others"])
@pytest.mark.parametrize("which", ALL)
def test_what_others_can_write_is_refused(place: Place, which: str, bit: int) -> None:
    """Who can write one of the files, or rename a folder on the way, could run code as us."""
    path = place.path(which)
    mode = stat.S_IMODE(path.stat().st_mode) | bit
    path.chmod(mode)
    message = f"{path} can be written by others (mode {mode:04o}); take that right away"
    assert refusal(place) == message
    path.chmod(mode & ~bit)
    assert place.find() == place.form


@as_root
@pytest.mark.parametrize("which", ALL)
def test_what_belongs_to_another_user_is_refused(place: Place, which: str) -> None:
    """Its owner could write to it at any time."""
    path = place.path(which)
    os.chown(path, NOBODY, NOBODY)
    assert refusal(place) == f"{path} belongs to the user {NOBODY}, expected root"
    os.chown(path, 0, 0)
    assert place.find() == place.form


@as_root
@pytest.mark.parametrize("which", ["record", "library", "folder"])
def test_who_asks_for_another_user_sees_what_that_user_would(place: Place, which: str) -> None:
    """Root looks into the folder of the service, and another user's is refused there too."""
    os.chown(place.path(which), NOBODY, NOBODY)
    theirs = FormCache(place.cache.folder, HOST, user=NOBODY)
    assert theirs.find(DIGEST, "fp32") == place.form
    os.chown(place.path(which), NOBODY - 1, NOBODY)
    with pytest.raises(CompiledError, match=f"expected root or {NOBODY}"):
        theirs.find(DIGEST, "fp32")


def test_where_torch_cannot_tell_the_processor_there_are_no_forms(place: Place) -> None:
    """It might be any; nothing is looked for, and nothing compiled."""
    unknown = FormCache(str(place.folder), dataclasses.replace(HOST, processor=()))
    assert unknown.find(DIGEST, "fp32") is None
    with pytest.raises(CompiledError, match="cannot tell what this processor can do"):
        unknown.prepare()


def test_two_do_not_keep_a_form_at_once(place: Place) -> None:
    """The second is told, and what was there is there still."""
    holder = os.open(place.folder, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(CompiledError, match="just now; try again"):
            keep(place.cache, place.top, b"another")
    finally:
        os.close(holder)
    assert place.find() == place.form
    assert keep(place.cache, place.top, b"another") != place.form


@pytest.mark.parametrize("which", ["folder", "parent", "grandparent"])
def test_a_sticky_folder_is_accepted(place: Place, which: str) -> None:
    """As /tmp is: others can add names, and not replace ours."""
    path = place.path(which)
    path.chmod(0o1777)
    place.cache.prepare()
    assert place.find() == place.form


@as_root
@pytest.mark.parametrize("which", ["folder", "parent", "grandparent"])
def test_a_sticky_folder_of_another_user_is_refused(place: Place, which: str) -> None:
    """Its owner can replace every name in it."""
    path = place.path(which)
    path.chmod(0o1777)
    os.chown(path, NOBODY, NOBODY)
    assert "belongs to the user" in refusal(place)


@pytest.mark.parametrize("which", ["record", "library"])
def test_a_sticky_file_is_no_better(place: Place, which: str) -> None:
    """The bit protects names in folders, not what is in a file."""
    path = place.path(which)
    path.chmod(0o1666)
    assert "can be written by others" in refusal(place)


@pytest.mark.parametrize("which", ["folder", "parent", "grandparent"])
def test_a_folder_that_others_can_write_to_is_not_prepared(place: Place, which: str) -> None:
    """It is told before a minute of compiling."""
    path = place.path(which)
    path.chmod(0o777)
    with pytest.raises(CompiledError, match="can be written by others") as caught:
        place.cache.prepare()
    assert str(caught.value).startswith(f"{path} ")


def test_a_folder_behind_a_link_is_looked_at_where_it_is(place: Place) -> None:
    """Those on the way to the link are not the ones that count."""
    link = place.top / "link"
    link.symlink_to(place.folder)
    place.folder.parent.chmod(0o777)
    with pytest.raises(CompiledError, match="can be written by others"):
        FormCache(str(link), HOST).find(DIGEST, "fp32")


# --- the host ------------------------------------------------------------------------------------


def test_this_host_is_told_the_same_each_time() -> None:
    """Its torch, and its processor's features in one order."""
    host = this_host(3)
    assert host == this_host(3)
    assert host.torch == torch.__version__
    assert host.threads == 3
    assert list(host.processor) == sorted(set(host.processor))


@pytest.mark.parametrize(
    ("features", "computes"),
    [
        ((), False),
        (("avx2", "fma3"), False),
        (("avx512_f", "avx512_fp16"), False),
        (("avx2", "avx512_bf16"), True),
        (("amx_bf16", "amx_tile"), True),
    ],
)
def test_the_features_say_whether_bf16_is_of_use(features: tuple[str, ...], computes: bool) -> None:
    """Those that multiply in it are named after it."""
    assert Host("2.9.0", features, 2).computes_bf16 is computes
