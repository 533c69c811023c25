# `make` lists the targets. Every target sets up its own environment first; a second run is instant.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU_VENV := .venv-gpu
DEMO_OUT ?= demo-out
FILES ?= 500000
CHECKPOINT ?= mini
# The pins were made with Python 3.11; a newer Python takes the tested ranges of setup.cfg.
PINS := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PINS)

.PHONY: help setup boolean-networks demo test test-slow test-all fuzz lint api-docs bench bench-data bench-loaders bench-storage bench-dedup bench-duet bench-generate bench-probe bench-train bench-contrastive bench-embed bench-export train-mini scaling-study compile-check compile-check-gpu compile-table compile-table-gpu calibrate smoke-gpu eval-mini wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## create .venv with pinned versions (nothing to do when up to date)

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "aria_jax needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "setting up $(VENV) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[demo,test,lint]'
	@touch $@

boolean-networks: setup ## trajectories of gene networks through the same commands (minutes, no GPU)
	$(BIN)/python -m examples.boolean_networks boolean-networks-out

demo: setup ## sample corpus, training, embeddings, probe, continuation, report (minutes, no GPU)
	$(BIN)/aria-jax demo $(DEMO_OUT)

# Most tests compile for longer than they compute, so they take machine code that is made quickly:
# LLVM's level 0, XLA's plain emitters (a third less than its fusion emitters), and one module of
# LLVM instead of 32 (a tenth less).
# Parity with the reference and resuming bit for bit are proven of the code that users run.
QUICK := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
FAST := not slow and not aot and not aot_gpu
# Two workers take half of the list each, so that what a file's tests share is made once, and the
# first to end takes of what the other has left.
test: setup ## the test suite
	XLA_FLAGS="$(QUICK) $$XLA_FLAGS" $(BIN)/python -m pytest -n 2 --dist worksteal -m "$(FAST) and not optimized"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "$(FAST) and optimized"

test-slow: setup ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow"

test-all: lint test test-slow compile-check ## everything: lint, all tests, slow and aot too (over an hour)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

api-docs: setup ## docs/api.md from the docstrings of the public names
	$(BIN)/python docs/generate_api.py

bench: bench-data bench-loaders bench-contrastive bench-generate bench-train ## all benchmarks that need no files of yours (long)

bench-data: setup ## reading, tokenising, augmenting beside mido, miditoolkit, symusic, MidiTok (MIDI=folder)
	$(BIN)/python -m benchmarks.bench_data $(MIDI)

fuzz: setup ## reading and tokenising half a million broken MIDI files (FILES=number)
	ARIA_JAX_FUZZ=$(FILES) $(BIN)/python -m pytest -n 0 -s tests/data_pipeline/test_fuzz.py

bench-loaders: setup ## tokens/s that each loader delivers, with and without augmentation
	$(BIN)/python -m benchmarks.bench_loaders

bench-storage: setup ## loaders on a corpus in a bucket beside the disk, and requests per million tokens
	$(BIN)/python -m benchmarks.bench_storage

bench-dedup: setup ## precision and recall of near-duplicate search on planted copies (MIDI=folder)
	$(BIN)/python -m benchmarks.bench_dedup $(MIDI)

bench-probe: setup ## the probe on 1,000 and 10,000 embeddings, beside scikit-learn's grid search
	$(BIN)/python -m benchmarks.bench_probe --sklearn

bench-generate: setup ## tokens/s of decoding against the memory bandwidth, and in PyTorch where installed
	$(BIN)/python -m benchmarks.bench_generate --precisions float32,bfloat16,int8

bench-duet: setup ## how long a player waits for the answer, with and without reading ahead (MIDI=folder CHECKPOINT=model)
	$(BIN)/python -m benchmarks.bench_duet $(MIDI) --checkpoint $(CHECKPOINT)

bench-contrastive: setup ## time and peak memory of the contrastive loss, 1k to 64k pairs, against the naive one
	$(BIN)/python -m benchmarks.bench_contrastive

bench-embed: setup ## files/s of embedding, one slice at a time against aria-jax embed (MIDI=folder)
	@test -n "$(MIDI)" || { echo "name a folder of MIDI files: make bench-embed MIDI=my_midis"; exit 2; }
	$(BIN)/python -m benchmarks.bench_embed $(MIDI)

bench-export: setup ## an export of a million files, stage by stage, and search among a million rows (MIDI=folder)
	$(BIN)/python -m benchmarks.bench_export $(MIDI)
	$(BIN)/python -m benchmarks.bench_export --search

eval-mini: setup ## a language model on held-out pieces beside an n-gram, and a page (DATA=shards CHECKPOINT=model)
	@test -n "$(DATA)" || { echo "name token shards with a validation split: make eval-mini DATA=my_data"; exit 2; }
	$(BIN)/python -m benchmarks.eval_continuation $(DATA) --checkpoint $(CHECKPOINT) --out eval-mini $(EARLIER:%=--earlier %)
	$(BIN)/aria-jax data sample eval-mini/prompts --per-composer 4
	$(BIN)/python -m benchmarks.continuation_page eval-mini/prompts --checkpoint $(CHECKPOINT) --out eval-mini/continuations.html

bench-train: setup ## training tokens/s against the same network in PyTorch (TORCH=pip options)
	@# The default wheel on Linux brings CUDA along; TORCH='--index-url ...' takes the CPU build.
	@$(PIP) $(TORCH) -e '.[bench]'
	$(BIN)/python -m benchmarks.bench_train

MINI_OUT ?= mini-out
train-mini: setup ## mini and mini-embedding from the start (8 to 10 hours of two cores; GIANTMIDI=archive EXCLUDE="evaluation sets")
	@test -n "$(GIANTMIDI)" || { echo 'name the archive: make train-mini GIANTMIDI=giantmidi.tar.xz EXCLUDE="asap pianist8"'; exit 2; }
	$(BIN)/aria-jax data build $(GIANTMIDI) $(MINI_OUT)/corpus --dedup near --val-fraction 0.02 $(EXCLUDE:%=--exclude %)
	$(BIN)/aria-jax train pretrain --preset mini --data $(MINI_OUT)/corpus --workdir $(MINI_OUT)/pretrain
	$(BIN)/aria-jax train continue --preset mini --data $(MINI_OUT)/corpus --workdir $(MINI_OUT)/continue --init-from $(MINI_OUT)/pretrain
	$(BIN)/aria-jax train contrastive --preset mini --data $(MINI_OUT)/corpus --workdir $(MINI_OUT)/contrastive --init-from $(MINI_OUT)/pretrain
	$(BIN)/aria-jax convert to-safetensors $(MINI_OUT)/continue $(MINI_OUT)/mini.safetensors --dtype bfloat16 --compact
	$(BIN)/aria-jax convert to-safetensors $(MINI_OUT)/contrastive $(MINI_OUT)/mini-embedding.safetensors --dtype bfloat16 --compact

scaling-study: setup ## loss against compute, three sizes by three budgets (hours; DATA=shards)
	@test -n "$(DATA)" || { echo "name the token shards: make scaling-study DATA=corpus"; exit 2; }
	$(BIN)/python -m benchmarks.scaling_study $(DATA) bench-out/scaling --budgets 5e13,1e14,1.5e14 --plot docs/scaling.png

compile-check: setup ## compile for TPU topologies that are not here (minutes; installs libtpu)
	@$(PIP) -e '.[aot]'
	$(BIN)/python -m pytest -m aot

# In an environment of its own: the plug-in and CUDA's libraries are 4 GB.
compile-check-gpu: $(GPU_VENV)/.ready ## compile for GPUs that are not here (minutes; 4 GB into .venv-gpu)
	$(GPU_VENV)/bin/python -m pytest -n 0 -m aot_gpu

$(GPU_VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	@test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	@$(GPU_VENV)/bin/python -m pip --disable-pip-version-check install --quiet $(PINS) -e '.[test,aot-gpu]'
	@touch $@

compile-table: setup ## the table of docs/tpu.md (an hour)
	@$(PIP) -e '.[aot]'
	$(BIN)/python -m benchmarks.compile_table v5p:4x4x4 v5p:4x8x8 v5e:8x8 v5e:16x16 v6e:8x8 v6e:16x16

compile-table-gpu: $(GPU_VENV)/.ready ## the table of docs/gpu.md (half an hour)
	for task in pretrain contrastive embed; do $(GPU_VENV)/bin/python -m benchmarks.compile_table \
	  h100:1 h100:8 '2x h100:8' h200:8 a100:8 b200:8 rtx4090:1 l4:1 -- --task $$task; done
	$(GPU_VENV)/bin/python -m benchmarks.compile_table h100:1 -- --task decode global_batch=128

calibrate: setup $(GPU_VENV)/.ready ## estimates for TPUs and GPUs against public measured runs (an hour)
	@$(PIP) -e '.[aot]'
	$(GPU_VENV)/bin/python -m benchmarks.calibrate gpu
	$(BIN)/python -m benchmarks.calibrate tpu

wheel: setup ## a wheel of this checkout in dist/, which launch.cluster's scripts install
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .

smoke-gpu: setup ## kernels, MFU, decoding, embedding on a GPU (5 minutes, smoke-gpu.json); says so without one
	$(BIN)/python -m benchmarks.smoke_gpu

clean: ## remove .venv, caches and the demo's output
	rm -rf $(VENV) $(GPU_VENV) $(DEMO_OUT) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
