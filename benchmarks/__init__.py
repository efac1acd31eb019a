"""Benchmarks of the project. Each prints machine, versions, shapes, medians, spread and memory, and shows where we lose, too."""
