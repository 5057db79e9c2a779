# The project's verbs. `make` lists them.
.DEFAULT_GOAL := help
MODEL := models/smollm2-135m-dsa.gguf
PROMPT ?=
# Seconds that each fuzz target runs, and that one input may take at most.
FUZZ_SECONDS ?= 60
FUZZ_INPUT_SECONDS ?= 100
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
MINIMAL := target/release/libsparsed_plugin_minimal.so
# The folder of the plugin that is tried by make conform.
PLUGIN ?= target/release/plugins/minimal
FUZZ_TARGETS := $(basename $(notdir $(wildcard tests/fuzz/fuzz_targets/*.rs)))
export PROMPT

help: ## this list
	@sed -n 's/^\([a-z0-9]*\):.*## /\1\t/p' Makefile

needs:
	@sh packaging/needs.sh build

$(MINIMAL): $(wildcard abi/examples/*.[ch] abi/include/sparsed/*.h) Cargo.toml | needs
	mkdir -p $(@D)
	cc -std=c11 -O2 -Wall -Wextra -Wpedantic -Werror -shared -fPIC -fvisibility=hidden -pthread -Wl,-z,nodelete \
	  -DPLUGIN_VERSION='"$(VERSION)"' -Iabi/include abi/examples/minimal.c -o $@ -lm

build: needs $(MINIMAL) ## release build, plugins staged beside the executable
	cargo build --release --locked -p sparsed -p sparsed-plugin-cpu
	sh packaging/stage-plugin.sh cpu target/release/libsparsed_plugin_cpu.so plugins/cpu/plugin.toml.in target/release/plugins
	sh packaging/stage-plugin.sh minimal $(MINIMAL) abi/examples/plugin.toml.in target/release/plugins

models: build ## the default model, from its Python package
	sh packaging/models/fetch-default.sh

chat: models ## a chat with the default model through the daemon; one answer with PROMPT="..."
	@sh packaging/chat.sh $(MODEL) "$$PROMPT"

.venv/python/openai: tests/e2e/requirements.txt
	rm -rf .venv/python
	python3 -m pip install --quiet --disable-pip-version-check --target .venv/python -r tests/e2e/requirements.txt
	touch $@

# Apart from the others: it wants a newer openai than those.
.venv/clients/llm: tests/e2e/requirements-clients.txt
	rm -rf .venv/clients
	python3 -m pip install --quiet --disable-pip-version-check --target .venv/clients -r tests/e2e/requirements-clients.txt
	touch $@

.venv/node/node_modules: tests/e2e/package.json
	install -D -m 0644 tests/e2e/package.json .venv/node/package.json
	npm install --prefix .venv/node --no-package-lock --no-audit --no-fund --loglevel=error
	touch $@

CLIENTS := .venv/python/openai .venv/clients/llm .venv/node/node_modules

testneeds:
	@sh packaging/needs.sh test

testplugins: build
	cargo build --release --locked -p sparsed-faulty -p sparsed-plugin-cuda -p sparsed-fake-cuda
	sh packaging/stage-plugin.sh faulty target/release/libsparsed_faulty.so tests/faulty/plugin.toml.in target/release/test-plugins
	install -m 0755 target/release/libsparsed_plugin_cpu.so target/release/test-plugins/faulty

test: testneeds models testplugins $(CLIENTS) ## all tests
	@rm -f target/skipped-tests
	cargo test --release --workspace --locked
	@[ ! -s target/skipped-tests ] || { echo "skipped:"; sort -u target/skipped-tests; }

e2e: testneeds models testplugins $(CLIENTS) ## the end-to-end tests alone
	cargo test --release --locked -p sparsed-tests --test e2e

systemd: package ## the service under a systemd of its own, in a tree of Debian SUITE (root; says so where it cannot)
	bash tests/systemd/run.sh
	ROOT=read-only bash tests/systemd/run.sh

machine: package ## the service on a machine of its own in qemu: Linux SUITE, limits of memory, power cuts (root; half an hour)
	bash tests/machine/run.sh

container: package ## packaging/Containerfile built and run (root; says so where it cannot)
	bash tests/container/run.sh

lint: ## format and clippy
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --locked -- -D warnings

bench: models ## speed of the default model on this machine
	target/release/sparsectl bench --model $(MODEL) -p 512 -n 64 -d 0,2048

fuzz: ## each parser's fuzz target for FUZZ_SECONDS (needs cargo-fuzz)
	for target in $(FUZZ_TARGETS); do \
	  mkdir -p tests/fuzz/corpus/$$target && \
	  RUSTC_BOOTSTRAP=1 cargo fuzz run --fuzz-dir tests/fuzz $$target tests/fuzz/corpus/$$target tests/fuzz/seeds/$$target \
	    -- -max_total_time=$(FUZZ_SECONDS) -timeout=$(FUZZ_INPUT_SECONDS) -print_final_stats=1 || exit 1; \
	done

conform: build ## tries the plugin in PLUGIN (default: the C example) against the contract
	target/release/sparsectl conform $(PLUGIN)

ASAN := target/asan/$(shell uname -m)-unknown-linux-gnu/release
asan: build ## the Rust plugins, built with AddressSanitizer, against the contract, mutated programs and steps among it
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo build --release --locked -p sparsed-plugin-cpu \
	  -p sparsed-plugin-cuda -p sparsed-fake-cuda --target $(shell uname -m)-unknown-linux-gnu --target-dir target/asan
	sh packaging/stage-plugin.sh cpu $(ASAN)/libsparsed_plugin_cpu.so plugins/cpu/plugin.toml.in target/asan/plugins
	LD_PRELOAD=$$(cc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=1:thread_local_quarantine_size_kb=64 \
	  target/release/sparsectl conform target/asan/plugins/cpu --deadline 300
	sh packaging/stage-plugin.sh cuda $(ASAN)/libsparsed_plugin_cuda.so plugins/cuda/plugin.toml.in target/asan/plugins
	install -m 0755 $(ASAN)/libsparsed_fake_cuda.so target/asan/plugins/cuda/libcuda.so.1
	LD_PRELOAD=$$(cc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=1:thread_local_quarantine_size_kb=64 \
	  SPARSED_CUDA_LIB_DIR=$(CURDIR)/target/asan/plugins/cuda target/release/sparsectl conform target/asan/plugins/cuda \
	  --deadline 300

sim: ## the simulations of power cuts and of whole daemons, 200 times as long as in the tests; SEED=n for one run
	LONG=1 cargo test --release --locked -p sparsed-sim -- --nocapture

package: models ## the packages for this machine's kind, in target/debian and target/rpm
	bash packaging/package.sh

reproducible: models ## whether the packages are the same bytes when they are made twice; with LONG=1 from two builds
	bash packaging/reproducible.sh

aarch64: models ## builds and packs for aarch64 and tries it under qemu as three CPUs (Debian, Linux 6.7; half an hour)
	sh packaging/aarch64.sh

.PHONY: help needs testneeds testplugins build models chat test e2e systemd machine container lint bench fuzz asan sim conform package reproducible aarch64
