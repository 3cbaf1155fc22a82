# make demo    a real model, trained, compressed, exported, run and proven: about a minute after the install
# make test    everything: ruff, mypy and all tests
# make check   ruff, mypy and the quick tests (under 4 minutes), for use while working
# make benchmarks-docs   docs/benchmarks.md from benchmarks/results/*.json

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
RUFF   := $(BIN)/ruff

.PHONY: demo test check lint tools benchmarks-docs clean
.DEFAULT_GOAL := check

demo: $(VENV)/.demo
	$(BIN)/edgekit run examples/digits/recipe.yaml --out runs/demo
	$(BIN)/edgekit run examples/digits/mixed.yaml --out runs/demo-mixed
	@echo "The pages: runs/demo/report.html and runs/demo-mixed/report.html"

test: $(VENV)/.test tools lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.test lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

lint: $(VENV)/.test
	$(RUFF) format --check .
	$(RUFF) check .
	$(BIN)/mypy
	for folder in examples/*/; do MYPYPATH=$$folder $(BIN)/mypy $$folder || exit 1; done

# Programs that some tests need, from Debian's packages where they are missing; a test whose program is missing fails and says so.
tools:
	@packages=""; \
	command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || packages="chromium"; \
	command -v arm-none-eabi-gcc >/dev/null || packages="$$packages gcc-arm-none-eabi libnewlib-arm-none-eabi"; \
	command -v qemu-system-arm >/dev/null || packages="$$packages qemu-system-arm"; \
	command -v qemu-aarch64-static >/dev/null || packages="$$packages qemu-user-static"; \
	command -v qemu-aarch64 >/dev/null || packages="$$packages qemu-user"; \
	command -v gcc >/dev/null || packages="$$packages gcc libc6-dev"; \
	command -v g++ >/dev/null || packages="$$packages g++"; \
	command -v aarch64-linux-gnu-g++ >/dev/null || packages="$$packages g++-aarch64-linux-gnu"; \
	[ -x /usr/sbin/sshd ] || packages="$$packages openssh-server"; \
	command -v ssh >/dev/null || packages="$$packages openssh-client"; \
	command -v systemd-analyze >/dev/null || packages="$$packages systemd"; \
	[ -n "$$packages" ] || exit 0; \
	as_root=""; [ "$$(id -u)" = 0 ] || as_root="sudo -n"; \
	echo "installing $$packages"; \
	{ $$as_root apt-get -qq update && $$as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$packages; } \
	  >/dev/null </dev/null || echo "could not install $$packages: the tests that need them will fail"

benchmarks-docs: $(VENV)/.demo
	$(BIN)/python benchmarks/make_docs.py

# One stamp for each extra: the environment is built again only when pyproject.toml changes. pip's own configuration is used as it is.
# pip is renewed first: the resolver of the pip that Python 3.11 brings (23.2) tries versions of these packages for over ten minutes.
$(VENV)/.demo: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25'
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25'
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $(VENV)/.demo $@

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
