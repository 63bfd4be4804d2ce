"""`Upload`: copies batches to the device, the next one while the step before it still runs."""

import torch

from workloads.types import ImageBatch


class Upload:
    """Copies batches to a device; to a GPU on a separate stream, from the loader's pinned memory.

    The host requests the next batch as soon as it has queued a step, so two batches are on the GPU at once: one in use and one
    being copied. The step's stream waits for the copy, the host does not. On a CPU nothing is copied.
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
            tensor.record_stream(current)  # otherwise the copying stream would reuse its memory too early
        return moved
