"""What can be set, from where, and how a bad value is refused: swiprd.config."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import swiprctl
import swiprd.config
from swiprd.config import (
    SETTINGS,
    Config,
    ConfigError,
    Setting,
    load_config,
    usual_cache,
    usual_file,
)
from tests.daemon import SWIPRD
from tests.tasks import unprivileged

NOTHING = os.devnull
"""A configuration file that sets nothing."""
BY_NAME = {setting.name: setting for setting in SETTINGS}
NAMES = list(BY_NAME)

EXPECTED = {
    "model": "an absolute path",
    "precision": "one of auto, fp32, bf16",
    "cache_dir": "an absolute path",
    "socket": "an absolute path",
    "workers": "a whole number from 1 to 64",
    "threads": "a whole number from 0 to 256",
    "idle_timeout": "0 or a number from 0.1 to 31536000",
    "compute_timeout": "a number from 0.1 to 3600",
    "load_timeout": "a number from 1 to 3600",
    "drain_timeout": "a number from 0 to 3600",
    "line_timeout": "a number from 0.1 to 3600",
    "reply_timeout": "a number from 0.1 to 3600",
    "max_connections": "a whole number from 1 to 65536",
    "max_per_user": "a whole number from 1 to 65536",
    "max_in_flight": "a whole number from 1 to 1024",
    "max_line_bytes": "a whole number from 1024 to 1048576",
    "max_depth": "a whole number from 2 to 64",
    "max_queue": "a whole number from 1 to 100000",
    "max_file_mib": "a whole number from 1 to 1024",
    "max_megapixels": "a number from 0.001 to 1000",
    "max_worker_mib": "a whole number from 0 to 1048576",
    "recycle_mib": "a whole number from 0 to 1048576",
    "admin_users": "names of users with commas between them",
    "log_level": "one of debug, info, warning, error",
}

# Three values a setting, each unlike its default.
PATHS = ("/in/file", "/in/variable", "/in/flag")
WHOLE = (2, 3, 4)
BROKEN = (2.5, 3.5, 4.5)
LADDER: dict[str, tuple[Any, Any, Any]] = {
    "model": PATHS,
    "precision": ("fp32", "bf16", "fp32"),
    "cache_dir": PATHS,
    "socket": PATHS,
    "workers": WHOLE,
    "threads": WHOLE,
    "idle_timeout": BROKEN,
    "compute_timeout": BROKEN,
    "load_timeout": BROKEN,
    "drain_timeout": BROKEN,
    "line_timeout": BROKEN,
    "reply_timeout": BROKEN,
    "max_connections": WHOLE,
    "max_per_user": WHOLE,
    "max_in_flight": WHOLE,
    "max_line_bytes": (2000, 3000, 4000),
    "max_depth": WHOLE,
    "max_queue": WHOLE,
    "max_file_mib": WHOLE,
    "max_megapixels": BROKEN,
    "max_worker_mib": WHOLE,
    "recycle_mib": WHOLE,
    "admin_users": ("ada", "ada,grace", "www-data"),
    "log_level": ("debug", "warning", "error"),
}

LIMITS: dict[str, tuple[Any, Any, Any, Any]] = {  # the last two are just outside
    "workers": (1, 64, 0, 65),
    "threads": (0, 256, -1, 257),
    "idle_timeout": (0.1, 31_536_000.0, 0.09, 31_536_001.0),
    "compute_timeout": (0.1, 3600.0, 0.09, 3600.1),
    "load_timeout": (1.0, 3600.0, 0.99, 3600.1),
    "drain_timeout": (0.0, 3600.0, -0.01, 3600.1),
    "line_timeout": (0.1, 3600.0, 0.09, 3600.1),
    "reply_timeout": (0.1, 3600.0, 0.09, 3600.1),
    "max_connections": (1, 65_536, 0, 65_537),
    "max_per_user": (1, 65_536, 0, 65_537),
    "max_in_flight": (1, 1024, 0, 1025),
    "max_line_bytes": (1024, 1_048_576, 1023, 1_048_577),
    "max_depth": (2, 64, 1, 65),
    "max_queue": (1, 100_000, 0, 100_001),
    "max_file_mib": (1, 1024, 0, 1025),
    "max_megapixels": (0.001, 1000.0, 0.0009, 1000.1),
    "max_worker_mib": (0, 1_048_576, -1, 1_048_577),
    "recycle_mib": (0, 1_048_576, -1, 1_048_577),
}

# Written as text: all that a variable or a flag can say, and a string in the file.
BAD_PATHS = ["", " ", "relative", "./here", "~/there", " /late"]
BAD_NUMBERS = ["", " ", "many", "nan", "inf", "-inf", "-1", "1e400", "0x10", "5s", "1,5", "None"]
BAD_INTEGERS = [*BAD_NUMBERS, "2.0", "1e1"]
BAD_LEVELS = ["", "INFO", "information", "info ", "20"]
BAD_TEXTS = {
    "model": BAD_PATHS,
    "precision": ["", "FP32", "fp16", "32"],
    "cache_dir": BAD_PATHS,
    "socket": [*BAD_PATHS, "/" + "x" * 107, "/" + "é" * 54],
    "workers": BAD_INTEGERS,
    "threads": BAD_INTEGERS,
    "idle_timeout": BAD_NUMBERS,
    "compute_timeout": BAD_NUMBERS,
    "load_timeout": BAD_NUMBERS,
    "drain_timeout": BAD_NUMBERS,
    "line_timeout": BAD_NUMBERS,
    "reply_timeout": BAD_NUMBERS,
    "max_connections": BAD_INTEGERS,
    "max_per_user": BAD_INTEGERS,
    "max_in_flight": BAD_INTEGERS,
    "max_line_bytes": BAD_INTEGERS,
    "max_depth": BAD_INTEGERS,
    "max_queue": BAD_INTEGERS,
    "max_file_mib": BAD_INTEGERS,
    "max_megapixels": BAD_NUMBERS,
    "max_worker_mib": BAD_INTEGERS,
    "recycle_mib": BAD_INTEGERS,
    "admin_users": [" ", ",", "a b", "a,", "a, b", "a\tb"],
    "log_level": BAD_LEVELS,
}
TEXT_CASES = [(name, text) for name, texts in BAD_TEXTS.items() for text in texts]

# Written in TOML: what only the file can say.
BAD_TYPES: list[Any] = [True, False, [], ["/x"], {}, math.nan, math.inf, -math.inf]
BAD_VALUES: dict[str, list[Any]] = {
    name: [*BAD_TYPES, *([2.0, 2.5] if type(setting.default) is int else [])]
    for name, setting in BY_NAME.items()
}
for name in ("model", "precision", "cache_dir", "socket", "admin_users", "log_level"):
    BAD_VALUES[name] += [1, 1.5, "/with\0nul"]
VALUE_CASES = [(name, value) for name, values in BAD_VALUES.items() for value in values]


def toml(value: Any) -> str:
    """Write ``value`` in TOML, which differs from JSON in its odd numbers alone."""
    return repr(value) if isinstance(value, float) else json.dumps(value)


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "swiprd.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def load(
    *,
    file: str | None = NOTHING,
    environment: dict[str, str] | None = None,
    flags: dict[str, str | None] | None = None,
) -> Config:
    return load_config(file=file, environment=environment or {}, flags=flags or {})


def refusal(**origins: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**origins)
    message = str(caught.value)
    assert "\n" not in message
    return message


def expected_of(name: str, value: Any) -> str:
    if name == "socket" and isinstance(value, str) and len(value.encode()) > 107:
        return "an absolute path of at most 107 bytes"
    return EXPECTED[name]


def test_the_tables_of_this_file_name_every_setting() -> None:
    """No setting is without a ladder, an expectation and bad values here."""
    assert NAMES == list(EXPECTED) == list(LADDER) == list(BAD_TEXTS) == list(BAD_VALUES)
    texts = {"model", "precision", "cache_dir", "socket", "admin_users", "log_level"}
    assert {*texts, *LIMITS} == set(NAMES)


# --- where values come from ----------------------------------------------------------------------


def test_with_nothing_set_every_setting_has_its_default() -> None:
    """An empty file, environment and command line give the defaults, which pass their checks."""
    config = load()
    assert dataclasses.asdict(config) == {s.name: s.default for s in SETTINGS}
    for setting in SETTINGS:
        if setting.default is not None:
            assert setting.check(setting.default) == setting.default


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_flags_beat_variables_beat_the_file_beats_the_default(
    setting: Setting, folder: Path
) -> None:
    """Each origin overrules the ones before it, and no other setting moves."""
    in_file, in_variable, in_flag = LADDER[setting.name]
    file = write(folder, f"{setting.name} = {toml(in_file)}")
    environment = {setting.variable: str(in_variable)}
    flags: dict[str, str | None] = {setting.name: str(in_flag)}
    default = load()

    def got(**origins: Any) -> Any:
        config = load(**origins)
        value = getattr(config, setting.name)
        assert dataclasses.replace(config, **{setting.name: setting.default}) == default
        return value

    assert setting.default not in (in_file, in_variable, in_flag)
    assert got(file=file) == in_file
    assert got(file=file, environment=environment) == in_variable
    assert got(file=file, environment=environment, flags=flags) == in_flag
    assert got(environment=environment) == in_variable
    assert got(flags=flags) == in_flag
    assert got(file=file, flags=flags) == in_flag


def test_a_flag_that_was_not_given_overrules_nothing() -> None:
    """None is what the command line says of a flag that does not stand there."""
    environment = {"SWIPRD_WORKERS": "3"}
    assert load(environment=environment, flags={"workers": None}).workers == 3


def test_other_variables_and_flags_are_passed_over() -> None:
    """The environment holds much that is not ours."""
    environment = {"PATH": "/bin", "SWIPR_WORKERS": "9", "WORKERS": "9", "swiprd_workers": "9"}
    assert load(environment=environment, flags={"verbose": "9"}) == load()


@pytest.mark.parametrize(
    ("environment", "user", "folder"),
    [
        ({"CACHE_DIRECTORY": "/var/cache/x:/y", "HOME": "/home/a"}, 1000, "/var/cache/x"),
        ({"CACHE_DIRECTORY": "/var/cache/x"}, 0, "/var/cache/x"),
        ({"HOME": "/root", "XDG_CACHE_HOME": "/elsewhere"}, 0, "/var/cache/swipr"),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "/elsewhere"}, 1000, "/elsewhere/swipr"),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "relative"}, 1000, "/home/a/.cache/swipr"),
        ({"HOME": "/home/a"}, 1000, "/home/a/.cache/swipr"),
        ({"HOME": "relative"}, 1000, None),
        ({}, 1000, None),
    ],
)
def test_compiled_forms_have_a_usual_place(
    environment: dict[str, str], user: int, folder: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that systemd made for the service, root's, or the user's own."""
    monkeypatch.setattr("os.geteuid", lambda: user)
    assert usual_cache(environment) == folder


def test_an_unknown_variable_under_our_prefix_is_refused() -> None:
    """A mistyped one would otherwise change nothing and say nothing."""
    message = refusal(environment={"SWIPRD_IDEL_TIMEOUT": "5"})
    assert message.startswith("no setting 'SWIPRD_IDEL_TIMEOUT', expected one of SWIPRD_MODEL, ")


def test_all_settings_may_stand_in_one_file(folder: Path) -> None:
    """A file that sets everything is taken as it stands."""
    values = {name: ladder[0] for name, ladder in LADDER.items()}
    file = write(folder, "".join(f"{name} = {toml(value)}\n" for name, value in values.items()))
    assert dataclasses.asdict(load(file=file)) == values


@pytest.mark.parametrize(
    "name", [name for name, setting in BY_NAME.items() if type(setting.default) is float]
)
def test_a_number_may_be_written_whole_or_broken(name: str, folder: Path) -> None:
    """TOML's integers and floats both do for seconds and megapixels, and give a float."""
    for written in ("5", "5.0", "5e0", "0x5"):
        value = getattr(load(file=write(folder, f"{name} = {written}")), name)
        assert type(value) is float
        assert value == 5


# --- what is acceptable --------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_inclusive(name: str, folder: Path) -> None:
    """The lowest and the highest value are taken from everywhere, and nothing beyond them."""
    low, high, too_low, too_high = LIMITS[name]
    for value in (low, high):
        file = write(folder, f"{name} = {toml(value)}")
        assert getattr(load(file=file), name) == value
        assert getattr(load(environment={BY_NAME[name].variable: str(value)}), name) == value
        assert getattr(load(flags={name: str(value)}), name) == value
    for value in (too_low, too_high):
        file = write(folder, f"{name} = {toml(value)}")
        assert refusal(file=file).startswith(f"{name} in {file}: expected {EXPECTED[name]}, got ")
        assert EXPECTED[name] in refusal(environment={BY_NAME[name].variable: str(value)})
        assert EXPECTED[name] in refusal(flags={name: str(value)})


def test_idle_timeout_may_be_zero_though_nothing_between_zero_and_its_limit() -> None:
    """0 is its word for never."""
    assert load(flags={"idle_timeout": "0"}).idle_timeout == 0
    assert "got '0.001'" in refusal(flags={"idle_timeout": "0.001"})


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_every_level_is_taken(level: str) -> None:
    """The four levels that the help names are the ones there are."""
    assert load(flags={"log_level": level}).log_level == level


@pytest.mark.parametrize("path", ["/" + "x" * 106, "/" + "é" * 53], ids=["ascii", "utf-8"])
def test_a_socket_path_of_107_bytes_is_taken(path: str) -> None:
    """That is what the kernel has room for; one byte more is among the bad values below."""
    assert len(os.fsencode(path)) == 107
    assert load(flags={"socket": path}).socket == path


@pytest.mark.parametrize(("name", "value"), [*TEXT_CASES, *VALUE_CASES])
def test_a_bad_value_in_the_file_is_refused_by_key_and_path(
    name: str, value: Any, folder: Path
) -> None:
    """The message names the key and the file, what is expected and what was got."""
    file = write(folder, f"{name} = {toml(value)}")
    wanted = f"{name} in {file}: expected {expected_of(name, value)}, got {value!r}"
    assert refusal(file=file) == wanted


@pytest.mark.parametrize(("name", "text"), TEXT_CASES)
def test_a_bad_value_in_a_variable_is_refused_by_its_name(name: str, text: str) -> None:
    """The message names the variable, what is expected and what was got."""
    variable = "SWIPRD_" + name.upper()
    wanted = f"{variable}: expected {expected_of(name, text)}, got {text!r}"
    assert refusal(environment={variable: text}) == wanted


@pytest.mark.parametrize(("name", "text"), TEXT_CASES)
def test_a_bad_value_of_a_flag_is_refused_by_its_name(name: str, text: str) -> None:
    """The message names the flag, what is expected and what was got."""
    flag = "--" + name.replace("_", "-")
    wanted = f"{flag}: expected {expected_of(name, text)}, got {text!r}"
    assert refusal(flags={name: text}) == wanted


def test_a_bad_value_is_refused_even_where_a_later_origin_overrules_it(folder: Path) -> None:
    """A mistake in the file is told, not hidden by a flag that will be gone tomorrow."""
    file = write(folder, "workers = 0")
    assert refusal(file=file, flags={"workers": "1"}).startswith(f"workers in {file}: ")


@pytest.mark.parametrize("name", ["workers", "idle_timeout"])
@pytest.mark.parametrize("digits", ["9" * 5000, "0x" + "f" * 5000], ids=["decimal", "hexadecimal"])
def test_a_number_of_thousands_of_digits_is_refused_like_any_other(
    name: str, digits: str, folder: Path
) -> None:
    """Python refuses to convert it, which must not show as anything but a bad setting."""
    file = write(folder, f"{name} = {digits}")
    assert file in refusal(file=file)
    assert EXPECTED[name] in refusal(flags={name: digits})


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("worker", "'worker' (did you mean 'workers'?)"),
        ("Workers", "'Workers' (did you mean 'workers'?)"),
        ("idle-timeout", "'idle-timeout' (did you mean 'idle_timeout'?)"),
        ("config", "'config'"),
        ('"a\\nb"', "'a\\nb'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_known_ones(key: str, shown: str, folder: Path) -> None:
    """A misspelt setting would otherwise be a setting that silently does nothing."""
    file = write(folder, f"threads = 1\n{key} = 1")
    wanted = f"{file}: no setting {shown}, expected one of {', '.join(NAMES)}"
    assert refusal(file=file) == wanted


def test_a_number_in_quotes_is_refused(folder: Path) -> None:
    """Variables and flags have no quotes to tell numbers by; the file has."""
    file = write(folder, 'threads = "2"')
    assert refusal(file=file) == f"threads in {file}: expected a number without quotes, got '2'"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("model = x\n", "'model = x'; words stand in double quotes"),
        ('model = "/a"\nmodel = "/b"\n', """'model = "/b"'; the setting stands twice"""),
        ("workers = 01\n", "'workers = 01'"),
    ],
)
def test_a_line_that_is_not_toml_is_shown(content: str, line: str, folder: Path) -> None:
    """The parser's own words name neither the setting nor what is wrong with it."""
    said = refusal(file=write(folder, content))
    assert said.endswith(f": {line}")


def test_a_table_is_an_unknown_key(folder: Path) -> None:
    """The file is flat: settings below a heading are not looked for."""
    file = write(folder, "[swiprd]\nworkers = 2")
    assert refusal(file=file) == (
        f"{file}: no table 'swiprd': settings stand alone, as in workers = 1, without a [heading]"
    )


@pytest.mark.parametrize(
    "content",
    [
        b"workers",
        b"workers = ",
        b"workers = 1 threads = 2",
        b"workers = 1\nworkers = 2",
        b"{}",
        b"\0",
        b'model = "/caf\xe9"',
        b"\xff\xfew\0",
        b"workers = " + b"[" * 10_000,
    ],
)
def test_a_file_that_is_not_toml_in_utf8_is_refused_by_its_path(
    content: bytes, folder: Path
) -> None:
    """Whatever stands in the file, the answer is one line that names it."""
    file = write(folder, content)
    assert refusal(file=file).startswith(f"{file}: not TOML: ")


def test_a_file_that_was_named_must_exist(folder: Path) -> None:
    """Who gives --config means that file and no other."""
    file = str(folder / "none.toml")
    assert refusal(file=file) == f"{file}: no such file; name another with --config"


@pytest.mark.parametrize(
    ("environment", "uid", "found"),
    [
        ({"HOME": "{}"}, 1000, "{}/.config/swipr/swiprd.toml"),
        (
            {"HOME": "/nowhere", "XDG_CONFIG_HOME": "{}/.config"},
            1000,
            "{}/.config/swipr/swiprd.toml",
        ),
        ({"HOME": "{}", "XDG_CONFIG_HOME": "relative"}, 1000, "{}/.config/swipr/swiprd.toml"),
        ({"HOME": "{}"}, 0, None),
        ({"HOME": "/nowhere"}, 1000, None),
        ({}, 1000, None),
    ],
)
def test_a_user_has_a_file_of_their_own(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    uid: int,
    found: str | None,
) -> None:
    """Where it is there it counts instead of the system's; root's is the system's."""
    (folder / ".config" / "swipr").mkdir(parents=True)
    (folder / ".config" / "swipr" / "swiprd.toml").touch()
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    filled = {name: value.format(folder) for name, value in environment.items()}
    assert usual_file(filled) == (None if found is None else found.format(folder))


def test_the_usual_file_need_not_exist_but_is_read_where_it_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most machines have none, and the defaults are for them."""
    monkeypatch.setattr(swiprd.config, "DEFAULT_FILE", str(folder / "swiprd.toml"))
    assert load(file=None) == load()
    write(folder, "workers = 2")
    assert load(file=None).workers == 2
    write(folder, "workers = none")
    assert refusal(file=None).startswith(f"{folder}/swiprd.toml: not TOML: ")


def test_a_directory_is_no_file(folder: Path) -> None:
    """The message says what it is."""
    assert refusal(file=str(folder)) == f"{folder}: cannot be read: Is a directory"


def test_a_file_without_permission_is_refused_not_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that somebody wrote and we cannot read are not the same as none."""
    file = write(folder, "workers = 2")
    Path(file).chmod(0o000)
    monkeypatch.setattr(swiprd.config, "DEFAULT_FILE", file)
    with unprivileged():
        assert refusal(file=file) == f"{file}: cannot be read: Permission denied"
        assert refusal(file=None) == f"{file}: cannot be read: Permission denied"


# --- what is made of it --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_config_never_changes(name: str) -> None:
    """Nobody who holds it can set anything in it."""
    config = load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, LADDER[name][0])
    assert config == load()


def test_threads_that_were_set_are_the_threads_of_each_worker() -> None:
    """They are not divided among the workers."""
    assert load(flags={"threads": "5", "workers": "4"}).threads_per_worker == 5


@pytest.fixture
def one_processor() -> Iterator[None]:
    """Confine the test to one of the processors it may use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


def test_without_a_number_the_processors_are_shared_out() -> None:
    """Each worker gets its share of the processors there are, and never less than one."""
    there_are = len(os.sched_getaffinity(0))
    assert load().threads_per_worker == there_are
    assert load(flags={"workers": "2"}).threads_per_worker == max(1, there_are // 2)
    assert load(flags={"workers": "64"}).threads_per_worker == max(1, there_are // 64)


@pytest.mark.usefixtures("one_processor")
def test_only_processors_that_may_be_used_count() -> None:
    """A daemon that was confined to one processor computes with one thread."""
    assert load().threads_per_worker == 1
    assert load(flags={"workers": "3"}).threads_per_worker == 1


# --- the command ---------------------------------------------------------------------------------


def swiprd_command(
    *words: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SWIPRD, *words],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_help_fits_80_columns_with_one_line_for_each_setting(columns: str) -> None:
    """It names every setting, on stdout, whatever the size of the terminal that asks."""
    done = swiprd_command("--help", environment={"COLUMNS": columns})
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(SETTINGS) + 15
    assert max(map(len, lines)) <= 80
    for setting in SETTINGS:
        assert f"  {setting.flag} {setting.metavar} " in done.stdout


def test_the_version_is_told() -> None:
    """The daemon and the client of one tree have one version."""
    done = swiprd_command("--version")
    wanted = (0, f"swiprd {swiprctl.__version__}\n", "")
    assert (done.returncode, done.stdout, done.stderr) == wanted


@pytest.mark.parametrize(
    ("words", "environment", "origin"),
    [
        (["--workers", "0"], {}, "--workers"),
        (["--workers=none"], {}, "--workers"),
        (["--model", ""], {}, "--model"),
        (["--socket", ""], {}, "--socket"),
        (["--socket", "/" + "x" * 107], {}, "--socket"),
        ([], {"SWIPRD_LOG_LEVEL": "loud"}, "SWIPRD_LOG_LEVEL"),
        ([], {"SWIPRD_SOCKET": ""}, "SWIPRD_SOCKET"),
        (["--config", "FILE"], {}, "workers in FILE"),
        (["--config", "FOLDER/none.toml"], {}, "FOLDER/none.toml"),
    ],
)
def test_a_bad_setting_ends_the_daemon_with_status_2_and_one_line(
    words: list[str], environment: dict[str, str], origin: str, folder: Path
) -> None:
    """The line names the origin; there is no usage, no traceback, and no socket."""
    file = write(folder, "workers = 0")
    taken = folder / "taken"
    taken.touch()

    def place(word: str) -> str:
        return word.replace("FILE", file).replace("FOLDER", str(folder))

    # Where a value is let through, this ends the daemon all the same, with another status.
    environment = {"SWIPRD_SOCKET": str(taken), **environment}
    done = swiprd_command(*map(place, words), environment=environment)
    assert done.stderr.startswith(f"swiprd: {place(origin)}: ")
    assert len(done.stderr.splitlines()) == 1
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    "words",
    [
        ["--work", "2"],
        ["--idle", "2"],
        ["--vers"],
        ["--conf", "/dev/null"],
        ["start"],
        ["--workers"],
    ],
)
def test_flags_are_not_abbreviated_and_nothing_else_is_taken(
    words: list[str], folder: Path
) -> None:
    """A script that abbreviates would break with the next flag that begins alike."""
    taken = folder / "taken"
    taken.touch()
    done = swiprd_command("--socket", str(taken), *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "swiprd: error: " in done.stderr


def test_a_relative_path_in_a_flag_is_meant_from_where_the_daemon_starts(folder: Path) -> None:
    """What a shell completes is taken; the file and the environment have no such place."""
    taken = folder / "taken"
    taken.touch()
    relative = os.path.relpath(taken)
    assert not relative.startswith("/")
    done = swiprd_command("--socket", relative)
    assert done.returncode == 1
    assert f"cannot listen at {taken}: " in done.stderr
