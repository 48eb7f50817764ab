# The commands of this repository; `.ci/run` and README.md use the same ones.
#
#   make setup   create .venv and install kvplug, vLLM and the tools (GPU or CPU build, found by itself)
#   make demo    the demonstration            make test    all tests
#   make bench   dense against kvplug         make check   ruff and mypy
#   make quality docs/quality.md anew, reduced; make quality-full: all of it, beside kvpress (make peers)
#   make clean   remove what builds and runs leave behind; the environment stays

SHELL := /bin/bash
PY := .venv/bin/python
STAMP := .venv/.kvplug-setup

# Models of tests, demo and bench are bundled: nothing is fetched. On CPU vLLM sets one core aside unless told not to,
# which on a machine of two cores is half of it.
export HF_HUB_OFFLINE ?= 1
export VLLM_CPU_NUM_OF_RESERVED_CPU ?= 0

.PHONY: setup demo test check bench peers quality quality-full clean

setup: $(STAMP)

$(STAMP): pyproject.toml tools/setup_env.sh
	tools/setup_env.sh
	@touch $@

demo: setup
	.venv/bin/kvplug demo

bench: setup
	.venv/bin/kvplug bench

PEERS := .venv-peers/.kvplug-peers

peers: $(PEERS)

$(PEERS): tools/setup_peers.sh | setup
	tools/setup_peers.sh
	@touch $@

# Both bundled models over every recall task: docs/quality.md and its plots. A run that stopped goes on where it was.
LAB := .venv/bin/kvplug eval bundled --contexts 8192,32768 --write docs/quality.md

quality: setup
	$(LAB) --examples 3 --policies channels,random-pages --budgets 1472 --answers out/quality.jsonl

# About 26,000 answers; at the 2.2 s of the reduced run's 288, sixteen hours on two cores. It resumes.
quality-full: peers
	$(LAB) --examples 20 --policies channels,simhash,quest,hax,infllm,actqkv,emllm,hcam,random-pages --budgets 512,1472 \
		--peers snapkv,tova,expected_attention,knorm --answers out/quality-full.jsonl

# ARGS passes options on: make test ARGS='-k layout -x'. One test process a core; a file's tests share one.
# Both have threads on both cores: those that wait must not spin, which costs a third of the time.
test: setup
	OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kvplug/ kernels patches serve tests tools loadtests -name __pycache__ -type d -prune -exec rm -rf {} +
