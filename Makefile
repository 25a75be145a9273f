# make serve   set up, then serve the embedded model on 127.0.0.1:$(PORT)
# make test    set up, then run the whole test suite
# make check   set up, then format check, lint and type check
# make docs    write again what is generated: the Grafana boards and docs/metrics.md
# make bench   set up, then measure serving beside transformers
# make up      server, Prometheus and Grafana in containers; CPU=1 where there is no GPU
# make down    stop them; their data stays

PYTHON ?= python3
PORT ?= 8000
VENV ?= .venv
TEST_WORKERS ?= 3
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch==2.13.0
SECRETS := docker/secrets
SERVER := $(if $(CPU),server-cpu,server)

.PHONY: serve test tools check style types docs bench up down clean
.DELETE_ON_ERROR:

serve: $(VENV)/.serve-ready
	$(BIN)/rtpurbo serve --port $(PORT)

# One process more than CI has cores, since some tests wait. Tests start many processes, so bytecode
# is written also where the environment says not to.
test: $(VENV)/.test-ready tools
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest \
	  -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

tools: $(VENV)/.created
	-sh tests/get_debian_tools.sh $(VENV)/debian-tools

check: style types

style: $(VENV)/.test-ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.test-ready
	$(BIN)/mypy

docs: $(VENV)/.test-ready
	$(BIN)/python -m docker.grafana.boards
	$(BIN)/python -m tests.observability.metrics_page

bench: $(VENV)/.serve-ready
	$(BIN)/rtpurbo bench serving

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "rtpurbo needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.serve-ready: pyproject.toml constraints.txt $(VENV)/.created
	$(INSTALL) -e .
	@touch $@

# Bytecode is made of what is imported, as it is: to make it of everything takes a minute.
$(VENV)/.test-ready: pyproject.toml constraints.txt $(VENV)/.created
	$(INSTALL) --no-compile -e '.[test]'
	@touch $@ $(VENV)/.serve-ready

up: $(SECRETS)/api_key $(SECRETS)/grafana_admin_password
	@docker compose version >/dev/null 2>&1 || { echo "make up needs Docker with its compose plugin" >&2; exit 1; }
	docker compose up --detach --build --wait $(SERVER) prometheus grafana
	@echo "keys and passwords: $(SECRETS)/"

down:
	docker compose --profile cpu down

# The folder is closed to other users, its files are not: containers read them under ids of their own.
$(SECRETS)/%:
	@mkdir -p -m 0700 $(SECRETS) && chmod 0700 $(SECRETS)
	@$(PYTHON) -c 'import secrets; print(secrets.token_urlsafe(32))' > $@.new && chmod 0444 $@.new && mv $@.new $@
	@echo "made $@ (random)"

clean:
	rm -rf $(VENV) build dist *.egg-info
