"""Batches on the training device; the next one is prepared while a step runs."""

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from rplib.reference.training.batches import Batch, BatchPlan, TwoStreamBatches


class Feed:
    """Provides batches on `device`, prefetching one.

    A thread cuts the next batch: from RAM into page-locked memory, copied to the GPU on a separate stream, or directly on
    the device if the volumes are cached there. Random numbers are drawn before the thread starts, so results do not
    depend on timing.
    """

    def __init__(self, batches: TwoStreamBatches, device: torch.device, memory_format: torch.memory_format) -> None:
        self._batches, self._device, self._memory_format = batches, device, memory_format
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._state = batches.state()
        self._ahead: Future[Batch] | None = None

    def next(self) -> Batch:
        """The next batch; waits for the thread only if it is slower than the step."""
        ahead = self._ahead or self._start()
        batch = ahead.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)  # the device waits, not this process
            for tensor in (batch.images, batch.labels):
                tensor.record_stream(current)  # its memory must not be reused before the step ends
        self._state = self._batches.state()
        self._ahead = self._start()
        return batch

    def state(self) -> str:
        """State of `batches` after the last returned batch, ignoring the prefetched one."""
        return self._state

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _start(self) -> Future[Batch]:
        return self._pool.submit(self._ready, self._batches.draw())

    def _ready(self, plan: BatchPlan) -> Batch:
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            batch = self._batches.cut(plan, pinned=self._stream is not None)
            images = batch.images.to(self._device, non_blocking=True, memory_format=self._memory_format)
            return batch._replace(images=images, labels=batch.labels.to(self._device, non_blocking=True))
