"""What can be measured: a module for each kind of suite; `benchmarks.harness.SUITES` names them."""
