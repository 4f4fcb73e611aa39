# make demo    all steps from synthetic scans to the report, in minutes; downloads only pip packages
# make test    the fast tests, including parity with the original's recorded numbers (minutes)
# make test-slow  the other tests: benchmarks, several processes, a browser, whole runs
# make lint    ruff and mypy
# make browser  a headless browser, for the tests of report.html (with apt, as root)
# make paper   the paper's tables, from DATASET (unpacked) and CHECKPOINTS (a folder); PAPER_FLAGS adds flags
# make bench   time of every stage beside its plain form, and of the small steps; run it on an idle machine
# All but browser first set up .venv; a second call installs nothing.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
APT_PACKAGES := libusb-1.0-0 libgl1 libegl1 libx11-6 libudev1 libidn2-0 libgomp1

.PHONY: demo paper test test-slow browser lint bench setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, found $$($(PYTHON) --version): run make PYTHON=/path/to/python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt -r requirements-dev.txt
	@$(MAKE) --no-print-directory system-libraries
	@touch $@

# open3d's wheel needs system libraries. Its import fails if they are missing.
.PHONY: system-libraries
system-libraries:
	@if $(BIN)/python -c 'import open3d' 2>/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(APT_PACKAGES) >/dev/null && \
		$(BIN)/python -c 'import open3d'; \
	else \
		$(BIN)/python -c 'import open3d' 2>&1 | tail -n 1; \
		echo "open3d needs system libraries. Install them and run make again:"; \
		echo "    sudo apt-get update && sudo apt-get install -y $(APT_PACKAGES)"; \
		exit 1; \
	fi

# Two workers of one thread each. PYTEST_WORKERS=0 runs everything in one process on all threads.
PYTEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(PYTEST_WORKERS) --dist loadgroup --no-loadscope-reorder --durations 10

test: setup
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: setup
	$(PYTEST) -m slow $(PYTEST_ARGS)

# The browser tests of report.html skip without chromium.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; }

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/stages.py $(BENCH_FLAGS)
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=min,median,rounds

# Backbones that need no download: EfficientNet-Lite0 (weights in a pip package) and FPFH (needs none).
DEMO_FLAGS := --dataset_path $(DEMO)/parts --classes gasket bracket cookie --seeds 0 \
	--rgb_backbone_name efficientnet_lite0 --xyz_backbone_name FPFH
FULL := DINO+Point_MAE+Fusion

demo: setup
	test -d $(DEMO)/parts || { $(BIN)/python utils/synthetic.py --size 320 $(DEMO)/making && mv $(DEMO)/making $(DEMO)/parts; }
	$(BIN)/python utils/preprocessing.py $(DEMO)/parts
	$(BIN)/python main.py $(DEMO_FLAGS) --method_name DINO+Point_MAE --memory_bank multiple \
		--save_feature --save_feature_path $(DEMO)/patch_lib --output_dir $(DEMO)/double
	$(BIN)/python fusion_pretrain.py --data_path $(DEMO)/patch_lib --output_dir $(DEMO)/uff \
		--batch_size 4 --accum_iter 1 --epochs 3 --lr 0.003 --val_fraction 0.1
	$(BIN)/python main.py $(DEMO_FLAGS) --method_name DINO Point_MAE Fusion DINO+Point_MAE DINO+Point_MAE+add $(FULL) \
		--use_uff --fusion_module_path $(DEMO)/uff/checkpoint-2.pth --save_preds $(FULL) --output_dir $(DEMO)/compared
	@echo
	@echo "the samples:          $(DEMO)/parts/preview.png"
	@echo "the report:           $(DEMO)/compared/$(FULL)/report.html"
	@echo "images of results:    $(DEMO)/compared/$(FULL)/pred_maps/<class>/<defect>/<stem>.png"
	@echo "tables, all metrics:  $(DEMO)/compared/*.md, $(DEMO)/compared/<method>/results.json"

CHECKPOINTS ?= checkpoints

paper: setup
	$(BIN)/python -m runner.reproduce --dataset_path "$(DATASET)" --checkpoint_dir "$(CHECKPOINTS)" $(PAPER_FLAGS)

clean:
	rm -rf $(VENV) $(DEMO)
