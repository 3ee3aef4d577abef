"""Studies of trained models: the report of a run, the probe, the comparison and the benchmark."""
