"""Batches to the device that computes: the next one is copied while the step before still runs."""

import torch

from workloads.types import ImageBatch


class Upload:
    """Copies batches to a device; to a GPU on a stream of its own, from the loader's pinned memory.

    The host asks for the next batch as soon as it has queued a step, so two batches are on the GPU at once: one in use and one
    on its way. The step's stream waits for the copy, the host does not. On a CPU it is nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: ImageBatch) -> ImageBatch:
        """The batch on the device, for the caller's current stream."""
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in moved.tensors():
            tensor.record_stream(current)  # or the copying stream would take its memory again too early
        return moved
