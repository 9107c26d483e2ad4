"""The retention benchmark: many methods, one pipeline, six text tasks that overwrite one another.

    python -m benchmarks.retention --out retention

A pre-trained tiny Llama with grouped-query attention (examples/tiny-llama) learns six tasks one after
the other, in two orders and with three seeds, by every configuration of `configurations.yaml`. All runs
are ordinary streams in one store, run side by side on a local Ray: what they share is computed once, and
a run that was interrupted goes on. Out come a table, a figure and the raw rows.
"""
