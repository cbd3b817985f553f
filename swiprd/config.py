"""What can be set, from where, and what is acceptable.

One table, ``SETTINGS``, says it all: the configuration file, the environment and the command line
are three ways to write the same names. Later ones win: defaults, file, ``SWIPRD_*``, flags. Nothing
here reads the environment or the command line by itself; ``__main__`` hands them in.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

DEFAULT_FILE: Final = "/etc/swipr/swiprd.toml"
ENVIRONMENT_PREFIX: Final = "SWIPRD_"
DEFAULT_BUNDLE: Final = str(Path(__file__).parent / "data" / "animal.safetensors")

THREAD_MIB: Final = 144
"""Address space that is reserved for each of ``threads``, of which torch starts two: 64 MiB by
malloc (HEAP_MAX_SIZE in glibc's malloc/arena.c), 8 for a stack."""

SYSTEM_CACHE: Final = "/var/cache/swipr"
PRECISIONS: Final = ("auto", "fp32", "bf16")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")


class ConfigError(ValueError):
    """A setting, or the file that holds it, is not acceptable; the message is one line."""


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting of the daemon, validated.

    Attributes:
        model: absolute path of the bundle to serve.
        precision: of the compiled form that is served where there are several; ``auto``: the
            fastest.
        cache_dir: absolute path of the folder of compiled forms; None: see ``usual_cache``.
        socket: absolute path to listen at when systemd hands over no socket; None: the usual place.
        workers: worker processes, each with a model of its own.
        threads: threads that one worker computes with; 0: the processors there are, shared out.
        idle_timeout: seconds without a request after which workers go; 0: never.
        compute_timeout: seconds for one image, from the moment a worker has it.
        load_timeout: seconds for a worker to load the model and check it.
        drain_timeout: seconds that requests under way are given when the daemon stops.
        line_timeout: seconds within which a client that connects must have sent a request, and one
            that has begun another must have finished it.
        reply_timeout: seconds within which a client must have taken a reply.
        max_connections: clients connected at a time; one more is refused as busy.
        max_per_user: the same for the clients of one user.
        max_in_flight: requests of one connection that are answered at a time; the next is read
            when one is done.
        max_line_bytes: longest request in bytes, its newline included.
        max_depth: deepest nesting of a request.
        max_queue: computes that may wait for a worker; one more is refused as busy.
        max_file_mib: largest image file, in MiB.
        max_megapixels: largest image, in millions of pixels, looked at before it is decoded.
        max_worker_mib: address space of a worker, in MiB, beside what is reserved for threads;
            0: without a limit.
        recycle_mib: memory in MiB that a worker may gain before it is replaced; 0: as it likes.
        admin_users: names of users who may reload, beside root and the daemon's own; commas
            between them.
        log_level: least severe level that is logged.
    """

    model: str
    precision: str
    cache_dir: str | None
    socket: str | None
    workers: int
    threads: int
    idle_timeout: float
    compute_timeout: float
    load_timeout: float
    drain_timeout: float
    line_timeout: float
    reply_timeout: float
    max_connections: int
    max_per_user: int
    max_in_flight: int
    max_line_bytes: int
    max_depth: int
    max_queue: int
    max_file_mib: int
    max_megapixels: float
    max_worker_mib: int
    recycle_mib: int
    admin_users: str
    log_level: str

    @property
    def max_bytes(self) -> int:
        """Largest image file in bytes."""
        return self.max_file_mib * 2**20

    @property
    def max_pixels(self) -> int:
        """Largest image in pixels."""
        return int(self.max_megapixels * 1e6)

    @property
    def max_worker_bytes(self) -> int:
        """Address space of a worker in bytes; 0: without a limit."""
        mib = self.max_worker_mib
        return mib and (mib + THREAD_MIB * self.threads_per_worker) * 2**20

    @property
    def threads_per_worker(self) -> int:
        """Threads for one worker, the 0 of ``threads`` worked out for this machine."""
        if self.threads:
            return self.threads
        return max(1, len(os.sched_getaffinity(0)) // self.workers)


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table: how a setting is written, checked and explained."""

    name: str
    default: Any
    metavar: str
    words: str
    check: Callable[[Any], Any]

    @property
    def help(self) -> str:
        """What ``--help`` says of it, its default included."""
        return self.words.format(self.default)

    @property
    def flag(self) -> str:
        """The command-line flag, as in ``--idle-timeout``."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable, as in ``SWIPRD_IDLE_TIMEOUT``."""
        return ENVIRONMENT_PREFIX + self.name.upper()


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError("an absolute path")
    return value


def _socket_path(value: Any) -> str:
    path = _path(value)
    if len(os.fsencode(path)) > 107:  # sun_path of unix(7), less its closing NUL
        raise ValueError("an absolute path of at most 107 bytes")
    return path


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if type(number) is not int or not low <= number <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return number

    return check


def _number(low: float, high: float, *, or_zero: bool = False) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        try:
            number = float(value) if isinstance(value, (str, int, float)) else None
        except (ValueError, OverflowError):
            number = None
        if isinstance(value, bool) or number is None:
            number = -1.0
        if not (low <= number <= high or (or_zero and number == 0)):
            raise ValueError(f"{'0 or ' if or_zero else ''}a number from {low:.9g} to {high:.9g}")
        return number

    return check


def _choice(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return str(value)

    return check


def _names(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"([\w.$-]+(,[\w.$-]+)*)?", value):
        raise ValueError("names of users with commas between them")
    return value


_DAY = 86400.0

SETTINGS: Final = (
    Setting("model", DEFAULT_BUNDLE, "BUNDLE", "model to serve [the one that comes along]", _path),
    Setting(
        "precision",
        "auto",
        "P",
        f"compiled form to serve: {'|'.join(PRECISIONS)} [{{}}]",
        _choice(PRECISIONS),
    ),
    Setting("cache_dir", None, "DIR", "where compiled forms are [the user's usual place]", _path),
    Setting("socket", None, "PATH", "where to listen when systemd does not", _socket_path),
    Setting("workers", 1, "N", "worker processes [{}]", _integer(1, 64)),
    Setting("threads", 0, "N", "threads per worker; 0: share processors [{}]", _integer(0, 256)),
    Setting(
        "idle_timeout",
        900.0,
        "S",
        "free the memory after S idle seconds; 0: never [{:g}]",
        _number(0.1, 365 * _DAY, or_zero=True),
    ),
    Setting("compute_timeout", 10.0, "S", "seconds for one image [{:g}]", _number(0.1, 3600)),
    Setting("load_timeout", 120.0, "S", "seconds to load the model [{:g}]", _number(1, 3600)),
    Setting("drain_timeout", 30.0, "S", "seconds to finish when stopped [{:g}]", _number(0, 3600)),
    Setting(
        "line_timeout",
        30.0,
        "S",
        "seconds for a client to finish a request [{:g}]",
        _number(0.1, 3600),
    ),
    Setting(
        "reply_timeout",
        30.0,
        "S",
        "seconds for a client to take a reply [{:g}]",
        _number(0.1, 3600),
    ),
    Setting("max_connections", 256, "N", "clients at a time [{}]", _integer(1, 65_536)),
    Setting("max_per_user", 64, "N", "clients of one user [{}]", _integer(1, 65_536)),
    Setting("max_in_flight", 64, "N", "requests of a connection at a time [{}]", _integer(1, 1024)),
    Setting("max_line_bytes", 65536, "N", "longest request, bytes [{}]", _integer(1024, 2**20)),
    Setting("max_depth", 16, "N", "deepest nesting of a request [{}]", _integer(2, 64)),
    Setting("max_queue", 128, "N", "images waiting before 'busy' [{}]", _integer(1, 100_000)),
    Setting("max_file_mib", 32, "N", "largest image file, MiB [{}]", _integer(1, 1024)),
    Setting("max_megapixels", 50.0, "N", "largest image, megapixels [{:g}]", _number(0.001, 1000)),
    Setting(
        "max_worker_mib",
        8192,
        "N",
        "address space of a worker, MiB; 0: any [{}]",
        _integer(0, 2**20),
    ),
    Setting("recycle_mib", 1024, "N", "MiB a worker may gain; 0: any [{}]", _integer(0, 2**20)),
    Setting("admin_users", "", "NAMES", "who else may reload, as in alice,bob [nobody]", _names),
    Setting(
        "log_level",
        "info",
        "LEVEL",
        f"what to log: {'|'.join(LOG_LEVELS)} [{{}}]",
        _choice(LOG_LEVELS),
    ),
)

assert [s.name for s in SETTINGS] == [f.name for f in fields(Config)]


def load_config(
    *, file: str | None, environment: Mapping[str, str], flags: Mapping[str, str | None]
) -> Config:
    """Return the configuration: defaults, then ``file``, then the environment, then flags.

    Args:
        file: path of the TOML file; None means ``DEFAULT_FILE``, which need not exist.
        environment: where ``SWIPRD_*`` is looked up.
        flags: setting name to what its flag was given, None or absent where it was not.

    Raises:
        ConfigError: names the setting and its origin, what was got and what is expected.
    """
    values = {setting.name: setting.default for setting in SETTINGS}
    by_name = {setting.name: setting for setting in SETTINGS}
    path = DEFAULT_FILE if file is None else file
    for key, value in _read_file(path, must_exist=file is not None).items():
        if key not in by_name:
            raise ConfigError(f"{path}: {_unknown(key, value, by_name)}")
        setting = by_name[key]
        values[key] = _checked(setting, value, f"{key} in {path}")
        if isinstance(value, str) and not isinstance(values[key], str):
            raise ConfigError(f"{key} in {path}: expected a number without quotes, got {value!r}")
    by_variable = {setting.variable: setting for setting in SETTINGS}
    for variable, written in environment.items():
        if variable.startswith(ENVIRONMENT_PREFIX):
            if variable not in by_variable:
                known = ", ".join(by_variable)
                raise ConfigError(f"no setting {variable!r}, expected one of {known}")
            setting = by_variable[variable]
            values[setting.name] = _checked(setting, written, variable)
    for setting in SETTINGS:
        given = flags.get(setting.name)
        if given is not None:
            values[setting.name] = _checked(setting, given, setting.flag)
    return Config(**values)


def usual_file(environment: Mapping[str, str]) -> str | None:
    """Return the file of a user who has one and is not root; None: ``DEFAULT_FILE`` it is."""
    home, config = environment.get("HOME", ""), environment.get("XDG_CONFIG_HOME", "")
    if not config.startswith("/"):
        config = os.path.join(home, ".config")
    own = os.path.join(config, "swipr", "swiprd.toml")
    return own if os.geteuid() != 0 and own.startswith("/") and os.path.exists(own) else None


def usual_cache(environment: Mapping[str, str]) -> str | None:
    """Return where compiled forms are when nothing is set; None: nowhere.

    It is the folder that systemd made for the service, else the system's or the user's own.
    """
    ours = environment.get("CACHE_DIRECTORY", "").partition(":")[0]
    if ours:
        return ours
    if os.geteuid() == 0:
        return SYSTEM_CACHE
    home, cache = environment.get("HOME", ""), environment.get("XDG_CACHE_HOME", "")
    if not cache.startswith("/") and home.startswith("/"):
        cache = os.path.join(home, ".cache")
    return os.path.join(cache, "swipr") if cache.startswith("/") else None


def _unknown(name: str, value: Any, known: Collection[str]) -> str:
    if isinstance(value, dict):
        return f"no table {name!r}: settings stand alone, as in workers = 1, without a [heading]"
    import difflib  # slow to import, and seldom needed

    near = difflib.get_close_matches(name, known, n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    return f"no setting {name!r}{meant}, expected one of {', '.join(known)}"


def _checked(setting: Setting, value: Any, origin: str) -> Any:
    try:
        return setting.check(value)
    except ValueError as expected:
        raise ConfigError(f"{origin}: expected {expected}, got {_shown(value)}") from None


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer too long for Python to print
        return "a number of thousands of digits"
    return text if len(text) <= 200 else text[:197] + "..."


def _open_at_once(path: str, flags: int) -> int:
    # A daemon that reloads must not wait for whoever might write into a pipe.
    return os.open(path, flags | os.O_NONBLOCK)


def _read_file(path: str, *, must_exist: bool) -> dict[str, Any]:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):  # as /dev/null is
                raise ConfigError(f"{path}: expected a regular file")
            text = file.read()
    except FileNotFoundError:
        if not must_exist:
            return {}
        raise ConfigError(f"{path}: no such file; name another with --config") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    # Only now: most daemons have no file, and the parser would cost every start.
    import tomllib

    try:
        return tomllib.loads(text.decode("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML: {error}{_line(text, str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not TOML: nested too deeply") from None


def _line(text: bytes, problem: str) -> str:
    """Return the line that a parser's ``problem`` speaks of, to stand behind it."""
    found = re.search(r"at line (\d+)", problem)
    if found is None:
        return ""
    line = text.split(b"\n")[int(found[1]) - 1].decode("utf-8", "replace").strip()
    hint = ""
    if problem.startswith("Cannot overwrite"):
        hint = "; the setting stands twice"
    elif problem.startswith("Invalid value"):
        hint = "; words stand in double quotes"
    return f": {_shown(line)}{hint}"
