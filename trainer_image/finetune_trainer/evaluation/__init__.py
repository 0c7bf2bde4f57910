"""Benchmarks by running what the model writes: problems, generation between steps, the sandbox, pass@k.

`sandbox` and `jail` import nothing but the standard library: a jail is started for every program.
"""
