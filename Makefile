# Each target is enough on its own: it makes .venv from the pinned requirements first. Needs only Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
LOWEST := .venv-lowest

# Threads that wait sleep instead of spinning: beside any other process, spinning costs small steps a factor of ten.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint docs package installs lowest bench curves load properties clean

demo: $(READY)  ## train and rank on a data set made here, with and without GCL weights
	$(PY) -m gcl_kernels.training.demo

test: lint package  ## lint, type check, packages and the tests: one process and one thread a core
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder -p no:benchmark

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

docs: $(READY)  ## the documentation site in site/; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

package: $(READY)  ## the source distribution and the wheel, made from it, in dist/; both checked
	rm -rf dist
	$(PY) -m build --no-isolation --outdir dist .
	$(PY) -m twine check --strict dist/*
	$(VENV)/bin/check-wheel-contents dist

installs: package  ## the wheel and the source distribution in fresh environments: Pythons 3.10 to 3.13, lowest and newest torch
	.ci/installs

lowest: $(LOWEST)/.ready  ## the core's and Triton's tests with the lowest versions that pyproject.toml allows (7 GB)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto --dist loadfile tests/test_*.py tests/triton

bench: $(READY)  ## ours beside its peers (5 minutes); threads wait as they do by default
	env -u OMP_WAIT_POLICY $(PY) -m bench --json bench/results/cpu.json
	$(PY) -m bench.report

curves: $(READY)  ## the scaling curves and the README's figure (a quarter of an hour)
	env -u OMP_WAIT_POLICY $(PY) -m bench --curves --json bench/results/cpu-curves.json
	$(PY) -m bench.report

load: $(READY)  ## the search page's server: 100,000 documents, up to 300 requests at a time, on two cores
	$(PY) -m bench.serving

properties: $(READY)  ## the property tests and the damaged files with fresh draws, many more of them (tens of minutes)
	HYPOTHESIS_PROFILE=properties $(PY) -m pytest tests -k "not training or fuzz"

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(LOWEST)/.ready: requirements-lowest.txt pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements-lowest.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) build dist site *.egg-info demo_output logs
