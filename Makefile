# Each target is enough on its own: it makes .venv from the pinned requirements first. Needs only Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

# Threads that wait sleep instead of spinning: beside any other process, spinning costs small steps a factor of ten.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint bench curves properties clean

demo: $(READY)  ## train and rank on a data set made here, with and without GCL weights
	$(PY) -m gcl_kernels.training.demo

test: lint  ## lint, type check and the tests: one process and one thread a core
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile -p no:benchmark

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

bench: $(READY)  ## ours beside its peers (5 minutes); threads wait as they do by default
	env -u OMP_WAIT_POLICY $(PY) -m bench --json bench/results/cpu.json
	$(PY) -m bench.report

curves: $(READY)  ## the scaling curves and the README's figure (a quarter of an hour)
	env -u OMP_WAIT_POLICY $(PY) -m bench --curves --json bench/results/cpu-curves.json
	$(PY) -m bench.report

properties: $(READY)  ## the property tests with fresh draws, many more of them (tens of minutes)
	HYPOTHESIS_PROFILE=properties $(PY) -m pytest tests -k "not training"

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info demo_output logs
