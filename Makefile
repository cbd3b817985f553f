# make demo   set everything up, score two photographs through the real daemon, stop it again
# make test   set everything up, run all tests, linters and the type checker
# make clean  remove what the two have made

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/pip --disable-pip-version-check install --constraint constraints.txt

demo: $(VENV)/installed
	tools/demo $(VENV)/bin

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV). Torch is large: this takes minutes."
	$(PIP) --quiet --progress-bar on --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: demo test clean
