# make setup   .venv with whimbrel in it (Python 3.11 or newer; an installed torch that fits is kept)
# make demo    the whole life of a small model, from real pages to a quantised child; then a talk with a real pretrained one
# make demo-short   every stage of that life, with few steps
# make test    linters, types, tests; of the slow tests those that tests/slow.txt names
# make lint    linters and types alone
# make gpu-pack     what a bare GPU machine lacks, as wheels in build/gpu-pack
# make gpu-measure  there: every row of benchmarks/gpu_measure.py, into OUT (gpu.jsonl unless named)
#
# Every target sets .venv up by itself and reuses it; PYTHON=/path/to/python3.12 names another Python.

SETUP := PYTHON="$(PYTHON)" sh scripts/setup.sh
WHIMBREL := .venv/bin/python -m whimbrel
# One thread a test process: two processes share two cores, and a thread that waits for a taken core costs more than it brings.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup demo demo-short test lint gpu-pack gpu-measure
help:
	@sed -n 's/^# make/make/p' Makefile

setup:
	@$(SETUP) data,gguf,logs

demo: setup
	@sh scripts/demo.sh

demo-short: setup
	@sh scripts/demo.sh short

lint:
	@$(SETUP) dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

test: lint
	$(ONE_THREAD) .venv/bin/python -m pytest -n 2 -m "not slow or proof" </dev/null

gpu-pack:
	@sh scripts/gpu_pack.sh $(or $(PYTHON),python3)

# No setup: that machine has its torch and reaches no registry.
gpu-measure:
	@PYTHON="$(or $(PYTHON),python3)" sh scripts/gpu_here.sh --out $(or $(OUT),gpu.jsonl)
