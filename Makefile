# make demo           set everything up, score two photographs through the real daemon, stop it again
# make test           set everything up, run all tests, linters and the type checker
# make bench          measure Swipr beside what one would use instead, for three quarters of an hour
# make soak           try what test tries of faults, for hours
# make swiprctl.pyz   the client as one file, for any machine with Python
# make install        as root: the software, its user, units, man pages, completion; the socket is enabled
# make uninstall      as root: take all that away again, but for settings and models
# make clean          remove what demo and test have made

PYTHON ?= python3
VENV ?= .venv
BENCH = bench/build/env
PIP = $(VENV)/bin/pip --disable-pip-version-check install --constraint constraints.txt

# Where install puts things. DESTDIR, for those who make packages, comes before all of it.
PREFIX ?= /opt/swipr
BINDIR ?= /usr/local/bin
MANDIR ?= /usr/local/share/man
COMPLETIONDIR ?= /usr/local/share/bash-completion/completions
ZSHCOMPLETIONDIR ?= /usr/local/share/zsh/site-functions
# Where XDG_DATA_DIRS is not set, as in many a login by ssh, Debian's fish looks in
# /usr/share/fish/vendor_completions.d and /etc/fish/completions only.
FISHCOMPLETIONDIR ?= /usr/local/share/fish/vendor_completions.d
UNITDIR ?= /usr/local/lib/systemd/system
USERUNITDIR ?= /usr/local/lib/systemd/user
SYSUSERSDIR ?= /usr/local/lib/sysusers.d
CONFDIR ?= /etc/swipr
export DESTDIR PREFIX BINDIR MANDIR COMPLETIONDIR ZSHCOMPLETIONDIR FISHCOMPLETIONDIR
export UNITDIR USERUNITDIR SYSUSERSDIR CONFDIR

demo: $(VENV)/installed
	tools/demo $(VENV)/bin

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest

soak: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest --soak --timeout 0 tests/faults

swiprctl.pyz: tools/make_pyz.py $(wildcard swiprctl/*.py swiprctl/commands/*)
	$(PYTHON) tools/make_pyz.py $@

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV). Torch is large: this takes minutes."
	$(PIP) --quiet --progress-bar on --editable .
	touch $@

# Beside torch, which it takes from the other environment, it has Swipr as make install puts it there.
bench: $(VENV)/installed
	test -e $(BENCH)/pyvenv.cfg || $(PYTHON) -m venv $(BENCH)
	cd $(BENCH)/lib/python3.*/site-packages && ls -d $(abspath $(VENV))/lib/python3.*/site-packages > shared.pth
	rm -rf build/lib  # what an older tree left there would be installed, too
	$(BENCH)/bin/pip --disable-pip-version-check install --constraint constraints.txt --quiet '.[bench]'
	$(BENCH)/bin/python tools/make_launcher.py
	$(BENCH)/bin/python -m bench

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --quiet --editable '.[test]'
	touch $@

install:
	tools/install $(PYTHON)

uninstall:
	tools/uninstall

clean:
	rm -rf $(VENV) swiprctl.pyz build bench/build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: bench demo test soak install uninstall clean
