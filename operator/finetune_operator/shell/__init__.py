"""The world outside: kopf's watches, the Kubernetes API, HTTP. Decides nothing about jobs; that is `core`."""
