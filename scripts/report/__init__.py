"""The report of scripts.gpu_report: its file, its processes, and its parts that measure kernels."""
