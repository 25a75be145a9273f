# make serve   set up, then serve the embedded model on 127.0.0.1:$(PORT)
# make test    set up, then run the whole test suite
# make check   set up, then format check, lint and type check
# make bench   set up, then measure serving beside transformers

PYTHON ?= python3
PORT ?= 8000
VENV ?= .venv
TEST_WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: serve test check bench clean
.DELETE_ON_ERROR:

serve: $(VENV)/.serve-ready
	$(BIN)/rtpurbo serve --port $(PORT)

test: $(VENV)/.test-ready
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

check: $(VENV)/.test-ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.serve-ready
	$(BIN)/rtpurbo bench serving

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "rtpurbo needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.serve-ready: pyproject.toml constraints.txt $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch==2.13.0 -e .
	@touch $@

$(VENV)/.test-ready: $(VENV)/.serve-ready
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
