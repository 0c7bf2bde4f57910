# `make help` lists the targets. What they install, build and cache is kept in ~/.cache/finetune-operator.
PYTHON ?= python3
.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## Cluster, operator and a fine-tuned model, from nothing (about 25 min; again: 10 s and the training)
	@exec $(PYTHON) -m demo

.PHONY: run
run: ## The demo's job on this machine, without a cluster; ARGS=--fresh begins anew
	@exec $(PYTHON) -m demo run $(ARGS)

.PHONY: test
test: ## All tests, with what they need; TESTS=... is for pytest
	@exec $(PYTHON) -m demo test $(TESTS)

.PHONY: lint
lint: ## Format, lint, types, import rules
	@exec $(PYTHON) -m demo lint

.PHONY: cluster
cluster: ## Start a Kubernetes cluster and print its kubeconfig's path
	@exec $(PYTHON) -m cluster up

.PHONY: images
images: cluster ## Build both images and bring them to the cluster; print their references
	@for target in operator trainer; do \
		reference=$$($(PYTHON) -m cluster image build --target $$target) || exit 1; \
		$(PYTHON) -m cluster image load $$reference || exit 1; \
		echo $$reference; \
	done

.PHONY: generate
generate: ## Write the CRD and the reference docs from the models in operator/finetune_api, the page of LLaMA-Factory's keys
	@python=$$($(PYTHON) -m demo.environment) && \
		PYTHONPATH=operator $$python -m finetune_api.crd && \
		PYTHONPATH=operator $$python -m finetune_api.reference && \
		PYTHONPATH=operator $$python -m finetune_cli.convert.page

.PHONY: down
down: ## Remove all that the others started; caches stay (PURGE=1: go as well)
	@exec $(PYTHON) -m demo down $(if $(PURGE),--purge)
