"""The training loop and its parts: step, batches, methods, distributed training, validation, profiling."""
