"""Benchmarks: named workloads, providers side by side in one process, results as JSON, tables made from them.

    python -m benchmarks run                            everything, into benchmarks/results/cpu.json
    python -m benchmarks run --quick                    a look, in about a minute
    python -m benchmarks run -w sagan-64 --pass both    a part, printed alone; --out FILE keeps it
    python -m benchmarks table --update README.md       the tables of a document; --check fails if they are old
    python -m benchmarks plot                           a picture of the ratios
    python -m benchmarks compare --base REV             this working tree against a revision
    python -m benchmarks list                           workloads, providers, and why any is absent
    python -m benchmarks ceilings                       what this CPU can do at most
    python -m benchmarks products                       the engine's inner product against torch's
    python -m benchmarks gpu                            on a GPU: its tests, compute-sanitizer, the benchmark

Reading order: `workloads`, `cases`, `providers` (`naive`, `flex`), `verify`, `measure`, `peak`, `ceilings`, `results`,
`runner`, `table`, `plot`, `compare`, `gpu_record`, `gpu`, `cli`; `machine` says what it was measured on.
"""
