"""The local shell: one job on this machine, without Kubernetes. Decisions are `core`'s; here they are observed and done."""
