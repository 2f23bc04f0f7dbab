# Everything starts from a clone with Python 3.11 or newer and make. Another interpreter: make demo PYTHON=python3.13
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# An old pip takes 40 seconds to resolve what a new one resolves in ten. Bytecode is written when a module is first imported: few of 20,000 are
INSTALL = $(PIP) install --no-compile --upgrade pip || true; PYTHONWARNINGS=ignore $(PIP) install --no-compile
# Three notebooks, and three files of tests, run side by side, as some wait for others: each gets half of the cores
HALF = $$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 ))
HOOKS = $(BIN)/nbdev-install-hooks --diff False && git config --file .gitconfig merge.jupyternotebook.driver '$(BIN)/nbdev-merge %O %A %B %P'

# Hundreds of processes import the package: its bytecode is kept, also where the environment says otherwise
unexport PYTHONDONTWRITEBYTECODE
# Tests compile some hundred kernels, which all read PyTorch's headers
test sanitize: export DEEPSEEK_NB_PRECOMPILE := 1
# Processes share the processors: a thread that waits for another of its own gives way
test sanitize: export OMP_WAIT_POLICY := passive

.PHONY: demo serve platform test sanitize fuzz docs bench gpu evidence-smoke canaries export new-chapter hooks clean

demo: .venv/.installed  ## a question answered by a real model, then a chat where there is a terminal
	$(BIN)/deepseek-nb chat --demo

serve: .venv/.serve  ## the demo's model behind OpenAI's and DeepSeek's API, at http://127.0.0.1:8000/v1
	$(BIN)/deepseek-nb serve $(MODEL)

platform: .venv/.platform  ## label, train, judge, release and watch, at http://127.0.0.1:8000; its data lie in the folder platform
	$(BIN)/deepseek-nb platform $(FOLDER)

test: .venv/.dev  ## every notebook, then tests/; the ten slowest of each are listed
	@$(BIN)/deepseek-nb build >/dev/null 2>&1 &  # kernels that several notebooks need, compiled at the same time, don't keep a worker waiting
	OMP_NUM_THREADS=$(HALF) $(if $(EVERY),,DEEPSEEK_NB_UNDRAWN=1) $(BIN)/nbdev-test --n-workers 3
	OMP_NUM_THREADS=$(HALF) $(BIN)/python -m pytest tests -n 3 --dist loadfile --no-loadscope-reorder --durations 10

sanitize: .venv/.dev  ## the kernels alone, under AddressSanitizer and UBSan (make test does this too)
	EVERY=1 $(BIN)/python -m pytest tests -k sanitizers

fuzz: .venv/.dev  ## drawn models, whole and broken, in the runner under AddressSanitizer and UBSan: ten minutes of a processor (make test: half a minute)
	FUZZ_SECONDS=$${FUZZ_SECONDS:-600} $(BIN)/python -m pytest tests/test_fuzz.py -s

docs: .venv/.dev  ## the site, into _docs
	$(BIN)/python -m deepseek_nb.tools.site

bench: .venv/.dev  ## ours and a peer, alternating: make bench NAME=moe-decode; without a name, the list
	$(BIN)/deepseek-nb bench $(NAME)

gpu: .venv/.dev  ## all CUDA kernels compiled, checked and measured on this machine's GPU; FLAGS=--dry emulates the checks
	$(BIN)/python -m deepseek_nb.bench.gpu $(FLAGS)

evidence-smoke: .venv/.dev  ## every experiment of the book, tiny, from one end to the other (make test does this too, but for one that it draws of two)
	for o in nbs/configs/evidence/*.toml; do $(BIN)/deepseek-nb evidence $$(basename $$o .toml) --config $$o --smoke || exit 1; done

canaries: .venv/.dev  ## a small part of each measurement again: which numbers and speeds have changed? Monthly, and before a release
	$(BIN)/python tests/canaries.py

export: .venv/.dev  ## notebooks cleaned, package and README.md written from them
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export
	$(BIN)/python -m deepseek_nb.tools.book

new-chapter: .venv/.dev  ## a notebook in the form of the house: make new-chapter NAME=145_arch.balance TITLE='Balance'
	@$(BIN)/python -m deepseek_nb.tools.site --new "$$NAME" "$$TITLE"

hooks: .venv/.dev  ## git merges notebooks by cells, Jupyter saves them clean
	$(HOOKS)

clean:  ## all that make made
	rm -rf .venv _proc _docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find deepseek_nb tests -name __pycache__ -prune -exec rm -rf {} +

.venv/.made:
	@command -v $(PYTHON) >/dev/null || { echo "deepseek_nb needs Python 3.11 or newer, and there is no '$(PYTHON)': install it, or name one as in 'make PYTHON=python3.12'"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "deepseek_nb needs Python 3.11 or newer, and $(PYTHON) is %d.%d: name a newer one, as in make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: pyproject.toml | .venv/.made
	@echo 'Installing into .venv: a few minutes the first time, most of it PyTorch'
	$(INSTALL) -e .
	@touch $@

.venv/.serve: pyproject.toml | .venv/.made
	@echo 'Installing into .venv, with the server: a few minutes the first time, most of it PyTorch'
	$(INSTALL) -e '.[serve]'
	@touch .venv/.installed $@

.venv/.platform: pyproject.toml | .venv/.made
	@echo 'Installing into .venv, with the platform: a few minutes the first time, most of it PyTorch'
	$(INSTALL) -e '.[platform]'
	@touch .venv/.installed .venv/.serve $@

.venv/.dev: pyproject.toml | .venv/.made
	@echo 'Installing into .venv, with the tools: a few minutes the first time, most of it PyTorch'
	$(INSTALL) -e '.[dev]'
	@touch .venv/.installed $@
	@if [ -d .git ]; then $(HOOKS) || echo 'git hooks are not installed; nothing else needs them'; fi
