"""Tests of the development cluster itself."""
