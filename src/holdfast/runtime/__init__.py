"""Running: devices, seeds, jobs, executors, several processes, files."""
