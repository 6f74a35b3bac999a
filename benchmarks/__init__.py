"""Benchmarks: named workloads, providers side by side in one process, results as JSON, tables made from them.

`python -m benchmarks --help` says how to run them. Reading order: `workloads`, `cases`, `providers`, `verify`,
`measure`, `peak`, `ceilings`, `results`, `runner`, `table`, `plot`, `compare`, `cli`.
"""
