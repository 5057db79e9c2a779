# The project's verbs. `make` lists them.
.DEFAULT_GOAL := help
MODEL := models/smollm2-135m-dsa.gguf
PROMPT ?= What is the capital of France?

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile

build: ## release build, plugins staged beside the executable
	cargo build --release --locked -p sparsed -p sparsed-plugin-cpu
	sh packaging/stage-plugin.sh cpu target/release/libsparsed_plugin_cpu.so plugins/cpu/plugin.toml.in target/release/plugins

models: build ## the default model, from its Python package
	sh packaging/models/fetch-default.sh

chat: models ## one answer of the default model: make chat PROMPT="..." (in this process; the daemon is not there yet)
	@target/release/sparsectl run --model $(MODEL) "$(PROMPT)"

test: models ## all tests
	cargo test --release --workspace --locked

lint: ## format and clippy
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --locked -- -D warnings

bench fuzz sim e2e conform package: ## not there yet
	@echo "make $@: not there yet; README says what is" >&2; exit 2

.PHONY: help build models chat test lint bench fuzz sim e2e conform package
