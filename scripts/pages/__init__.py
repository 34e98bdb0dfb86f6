"""Pages and tables that are generated from benchmarks/*.json."""
