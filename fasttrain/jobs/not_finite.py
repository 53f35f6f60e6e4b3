"""The error of a run of which too many steps were skipped, as their loss or gradients were not finite."""

from __future__ import annotations

import pathlib

from fasttrain.engine.skips import Skips
from fasttrain.input import Order, Store
from fasttrain.run.checkpoint import last_good
from fasttrain.system.durable import write_json
from fasttrain.system.errors import RunError

NAMED = 8  # samples in an error line


def not_finite(run: pathlib.Path, store: Store, order: Order, skips: Skips, step: int) -> RunError:
    """The error of too many skipped steps. The last one's samples are written to RUN/not-finite.json."""
    epoch, place = divmod(skips.last, order.steps_per_epoch)
    samples = order.step(epoch, place).tolist()
    record = run / "not-finite.json"
    names = [store.name(sample) for sample in samples]
    write_json(record, {"step": skips.last + 1, "epoch": epoch, "samples": samples, "names": names})
    good = last_good(run / "checkpoints", step)
    named = ", ".join(map(str, samples[:NAMED])) + (f", … (all in {record})" if len(samples) > NAMED else "")
    return RunError(
        f"the loss or its gradients were not finite in {skips.total} of {step} steps, {skips.in_a_row} in a row, the "
        f"last at step {skips.last + 1} with samples {named}; the last good checkpoint: {good}; lower --lr, or try "
        "--precision fp32"
    )
