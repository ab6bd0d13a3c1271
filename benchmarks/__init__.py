"""Benchmarks: what is measured, on which machine, against whom, always in one interleaved run."""
