"""The DALI loader: the same batches in the same order, decoded by DALI, on the GPU where there is one.

DALI's own readers shuffle a buffer only and cannot be resumed at a step of another order, so they are not used: a
pipeline that does nothing but decode is fed with the streams of the samples whose turn it is.

On a CPU the pixels are those of the thread loader, bit for bit (the same library with the same settings). On a GPU they
come from nvJPEG, whose inverse DCT and upsampling round differently.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasttrain.formats import jpeg
from fasttrain.formats.markers import looks_whole
from fasttrain.input.loader import MAX_FAILED_FRACTION, Failed, Placed, Started, ThreadLoader
from fasttrain.input.order import Order
from fasttrain.input.stores import Store, Stream, StreamStore
from fasttrain.system.errors import UserError
from fasttrain.system.workers import Workers

if TYPE_CHECKING:
    from nvidia.dali import Pipeline


class DaliLoader(ThreadLoader):
    """Iterates a store of streams in an Order; Batch.pixels lies on `device`."""

    def __init__(
        self, store: Store, order: Order, workers: int, device: torch.device,
        max_failed_fraction: float = MAX_FAILED_FRACTION, labels: bool = False, needs_labels: bool = False,
    ) -> None:  # fmt: skip
        """workers: DALI's threads, and ours that read headers. Raises UserError without DALI, or for another store."""
        if not isinstance(store, StreamStore):
            raise UserError("--loader dali decodes shards; image folders are read by --loader folder")
        _import_dali()
        self._device, self._streams, self._threads = device, store, workers
        self._batch_size = order.batch_size // order.world_size
        self._pipeline: Pipeline | None = None
        self._feeder = Workers(1)  # runs the pipeline, batch after batch
        self._last_use: dict[int, torch.cuda.Event] = {}  # by a device buffer's address
        super().__init__(store, order, workers, max_failed_fraction, labels, needs_labels=needs_labels)

    def close(self) -> None:
        super().close()
        self._feeder.close()

    def _new_buffer(self, num_bytes: int) -> Tensor:
        buffer = torch.empty(num_bytes + num_bytes // 8, dtype=torch.uint8, device=self._device)
        self._note_use(buffer)
        return buffer

    def _give_back(self, item: Started) -> None:
        self._note_use(item.buffer)
        super()._give_back(item)

    def _note_use(self, buffer: Tensor) -> None:
        """Remember what this thread's stream still does with a device buffer: DALI writes from a stream of its own."""
        if buffer.device.type == "cuda":
            event = self._last_use[buffer.data_ptr()] = torch.cuda.Event()
            event.record(torch.cuda.current_stream(buffer.device))

    def _decode(self, buffer: Tensor, placed: list[Placed]) -> list[Future[list[Failed]]]:
        return [self._feeder.submit(self._decode_batch, buffer, placed)]

    def _decode_batch(self, buffer: Tensor, placed: list[Placed]) -> list[Failed]:
        """Decode by DALI; by our own decoder, which names what is wrong, where a stream is damaged.

        DALI stops a whole batch at a stream that ends too early, and takes one that ends in its middle for a picture.
        """
        if event := self._last_use.pop(buffer.data_ptr(), None):
            event.synchronize()
        streams = [self._streams.stream(sample.encoded) for sample in placed]
        if self._all_whole(placed, streams) and self._decode_with_dali(buffer, placed, streams):
            return []
        host = buffer if buffer.device.type == "cpu" else torch.empty(len(buffer), dtype=torch.uint8)
        failed = self._write(host, placed, list(range(len(placed))))
        if host is not buffer:
            buffer.copy_(host)
            torch.cuda.current_stream(buffer.device).synchronize()
        return failed

    def _all_whole(self, placed: list[Placed], streams: list[Stream]) -> bool:
        """Also what reads the streams' pages in, sample by sample, so that slow storage is seen to move."""
        for sample, stream in zip(placed, streams, strict=True):
            with self._watch.at(sample.number):
                data = stream.data.tobytes()
                if stream.is_jpeg and not (looks_whole(data) and jpeg.defines_tables(data)):
                    return False
        return True

    def _decode_with_dali(self, buffer: Tensor, placed: list[Placed], streams: list[Stream]) -> bool:
        """False when DALI refuses a stream, or decodes one to another size than its header states."""
        if self._pipeline is None:
            self._pipeline = decoding_pipeline(self._batch_size, self._threads, self._device)
        try:
            self._pipeline.feed_input("streams", [stream.data for stream in streams])
            (images,) = self._pipeline.run()
        except RuntimeError:
            self._pipeline = None  # what a failed pipeline does next is not documented
            return False
        if [tuple(shape) for shape in images.shape()] != [(s.encoded.height, s.encoded.width, 3) for s in placed]:
            return False
        images.copy_to_external(ctypes.c_void_p(buffer.data_ptr()))  # one after the other, as they are placed
        return True


def decoding_pipeline(batch_size: int, threads: int, device: torch.device) -> Pipeline:
    """A DALI pipeline from JPEG streams ("streams", up to batch_size) to RGB images, without prefetching of its own."""
    fn, types, pipeline_class = _import_dali()
    on_gpu = device.type == "cuda"
    pipeline = pipeline_class(
        batch_size=batch_size, num_threads=threads, device_id=device.index or 0 if on_gpu else None,
        prefetch_queue_depth=1,
    )  # fmt: skip
    with pipeline:
        streams = fn.external_source(name="streams", dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(
            fn.decoders.image(
                streams,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
            )
        )
    pipeline.build()
    return pipeline


def _import_dali() -> tuple[Any, Any, type[Pipeline]]:
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError as error:
        raise UserError(f"--loader dali needs NVIDIA DALI ({error}): pip install nvidia-dali-cuda130") from None
    return fn, types, Pipeline
