"""The training loop and what it is made of: step, batches, methods, several processes, validation, profiling."""
