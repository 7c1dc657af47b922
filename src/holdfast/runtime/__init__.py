"""Where and how things run: device, seeds, jobs, executors, several processes, files."""
