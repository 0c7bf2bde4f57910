"""The demo: from a fresh checkout to a fine-tuned model on a real Kubernetes. Start it with `make demo`."""
