# Each target makes .venv and installs what it needs. PYTHON=/path/to/python3.12 chooses the interpreter.
PY := .venv/bin/python
METADATA := settings.ini setup.py pyproject.toml constraints.txt llamagym/__init__.py scripts/make_venv.sh
NOTEBOOK := nbs/tutorials/01_blackjack.ipynb

.PHONY: help quickstart pretrained test test-slow notebooks outputs lab docs readme lint format clean

help:
	@echo "make quickstart  train an agent on Blackjack: runs the tutorial notebook, results in runs/quickstart"
	@echo "make test        run the tests"
	@echo "make pretrained  fetch a pretrained model of 135M parameters (93 MB), for tutorial 05 and the tests with one"
	@echo "make lab         open the tutorial in JupyterLab"
	@echo "make docs        build the HTML site into _site"
	@echo "make test-slow   run the tests that take minutes"
	@echo "make readme      write README.md from nbs/index.ipynb"
	@echo "make notebooks   run all notebooks; fails where a text output is not the committed one"
	@echo "make outputs     run all notebooks and store their outputs"
	@echo "make lint        check the form of the notebooks and of the Python"
	@echo "make format      format notebooks and Python, and export"
	@echo "make clean       remove what the tools made, but not .venv or runs"

# What was installed is remembered in a stamp, so that the next call goes straight to work.
.venv/.installed-quickstart: $(METADATA)
	@sh scripts/make_venv.sh warmstart,notebook
	@touch $@

.venv/.installed-dev: $(METADATA)
	@sh scripts/make_venv.sh gpu,warmstart,gguf,notebook,docs,dev
	@touch $@ .venv/.installed-quickstart

quickstart: .venv/.installed-quickstart
	@.venv/bin/llamagym quickstart

pretrained: .venv/.installed-dev
	$(PY) -c "from llamagym.models.smollm2 import fetch_smollm2; print(fetch_smollm2())"

test: .venv/.installed-dev
	$(PY) -m pytest tests -n auto --dist loadfile $(ARGS)

test-slow: .venv/.installed-dev
	$(PY) -m pytest tests -m slow $(ARGS)

notebooks: .venv/.installed-dev
	$(PY) scripts/notebooks.py $(ARGS)

outputs: .venv/.installed-dev
	$(PY) scripts/notebooks.py --save $(ARGS)

lab: .venv/.installed-dev
	$(PY) -m jupyter lab $(NOTEBOOK)

docs: .venv/.installed-dev
	$(PY) scripts/build_docs.py _site

readme: .venv/.installed-dev
	$(PY) scripts/readme.py

format: .venv/.installed-dev
	$(PY) -m ruff format
	$(PY) -m ruff check --fix
	.venv/bin/nbdev-export

lint: .venv/.installed-dev
	$(PY) -m ruff format --check
	$(PY) -m ruff check

clean:
	rm -rf _proc _docs _sphinx _site build dist .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
