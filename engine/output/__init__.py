"""The output folder of a run: its lock, metrics, report and training states."""
