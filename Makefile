# Everything a contributor runs. `make demo` and `make test` also install what they need (root on Debian 12).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SYSTEM_PACKAGES := runc nftables e2fsprogs golang-github-containers-common erofs-utils libfuse3-dev fuse3 kmod ca-certificates pkg-config gcc libc6-dev python3-dev python3-venv busybox-static
TEST_PACKAGES := curl containerd stargz-snapshotter docker-registry umoci debootstrap iproute2 crun qemu-system-x86 systemd
SOURCES := core discovery layerstore snapshotter afslet proxy client tests benchmarks examples

.PHONY: help
help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: system venv  ## Install, start a cluster, run one command in an image, show what came back, stop
	examples/demo.sh

.PHONY: test
test: system test-system venv  ## The test suite, but for the slow tests
	$(BIN)/pytest -m "not slow" $(PYTEST_ARGS)

.PHONY: slow
slow: system test-system venv  ## The slow tests
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

.PHONY: check
check: system venv  ## Linters, type checkers, import rules, generated stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell $(SOURCES) docs *.md
	$(BIN)/python proto/generate.py --check
	$(BIN)/python docs/settings.py --check

.PHONY: format
format: venv  ## Sort imports and format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

.PHONY: stubs
stubs: venv  ## Generate the gRPC stubs from proto/
	$(BIN)/python proto/generate.py

FUZZ_SECONDS ?= 60
FUZZ_EFFORT ?= 10
.PHONY: fuzz
fuzz: system venv  ## Fuzz the layer format: FUZZ_SECONDS per target, FUZZ_EFFORT times the usual property tests
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r tests/fuzz/requirements.lock
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS)
	AFS_FUZZ_EFFORT=$(FUZZ_EFFORT) $(BIN)/pytest tests/fuzz -o timeout=3600

KERNEL ?= bookworm/linux-image-cloud-amd64
RUN ?= uname -a
.PHONY: vm
vm: system test-system venv  ## Run the command RUN under the KERNEL of a Debian release, in an emulated machine
	@$(BIN)/python -m tests.testbed.vm --kernel $(KERNEL) -- $(RUN)

.PHONY: bench
bench: system test-system venv  ## Measure against runc and containerd; writes benchmarks/results
	$(BIN)/python -m benchmarks.run

.PHONY: lock
lock: venv  ## Resolve the dependencies anew into requirements.lock
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile --upgrade --generate-hashes --no-emit-index-url --no-annotate --no-header \
	  --python-version 3.11 --group dev pyproject.toml -o requirements.lock

.PHONY: system test-system
system:  ## Install the system packages that AFS runs on
	@./packaging/apt-install $(SYSTEM_PACKAGES)
test-system:
	@./packaging/apt-install $(TEST_PACKAGES)

.PHONY: venv
venv: system $(VENV)/.installed  ## A virtual environment with AFS in it, editable
$(VENV)/.installed: requirements.lock pyproject.toml | system
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: clean
clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .cache
