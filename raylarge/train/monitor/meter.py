"""How fast a training is, and how much of its cards it uses.

    samples, seconds waited -> Meter -> samples/s, TFLOP/s, MFU, share of waiting, memory

MFU = FLOPs per sample x samples/s / (workers x a card's dense peak). The FLOPs are those of
matrix products, convolutions and attention, counted in a forward and a backward pass of a fake
copy that computes nothing; where activations are computed again, that counts (PaLM's HFU).
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Peak(NamedTuple):
    """Dense peaks of a card in TFLOP/s.

    Attributes:
        half: bf16, summed in fp32 (fp16 where a card has no bf16).
        tf32: what fp32 becomes where torch may use TF32.
        single: fp32.
    """

    half: float
    tf32: float
    single: float


PEAKS = {
    "GB200": Peak(2500, 1250, 80),
    "B200": Peak(2250, 1125, 75),
    "H200 NVL": Peak(835, 417, 60),
    "H200": Peak(989, 494, 67),
    "GH200": Peak(989, 494, 67),
    "H100 PCIe": Peak(756, 378, 51),
    "H100 NVL": Peak(835, 417, 60),
    "H100": Peak(989, 494, 67),
    "A100": Peak(312, 156, 19.5),
    "A10G": Peak(70, 35, 35),
    "A10": Peak(125, 62.5, 31.2),
    "A30": Peak(165, 82, 10.3),
    "A40": Peak(150, 75, 37.4),
    "RTX A6000": Peak(155, 77, 38.7),
    "RTX 6000 Ada": Peak(364, 182, 91),
    "L40S": Peak(362, 183, 91.6),
    "L40": Peak(181, 90.5, 90.5),
    "L4": Peak(121, 60, 30.3),
    "V100": Peak(125, 15.7, 15.7),
    "T4": Peak(65, 8.1, 8.1),
    "RTX 5090": Peak(210, 105, 105),
    "RTX 4090": Peak(165, 82.6, 82.6),
    "RTX 3090": Peak(71, 35.6, 35.6),
    "MI300X": Peak(1307, 654, 163),
    "MI250X": Peak(192, 48, 24),  # one of its two chips, as torch counts them
}
"""By words in the name that torch gives a card; the longest that fit count.

Source: the makers' data sheets, without sparsity.
"""


class Meter:
    """Counts samples and waiting on one worker; each `read` is about the time since the last."""

    def __init__(
        self,
        device: torch.device,
        workers: int,
        precision: str,
        flops: float | int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin now.

        Args:
            device: of this worker.
            workers: all of them.
            precision: the recipe's.
            flops: of training on one sample, where it is known (`paper.memory.training_flops`).
            clock: seconds.
        """
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak, self._flops = peak(name, precision), flops
        self._device, self._workers, self._clock = device, workers, clock
        self._most = 0.0
        self._whole = [clock(), 0.0, 0.0]  # began, samples, seconds waited
        self._since = list(self._whole)

    def stepped(self, samples: int) -> None:
        """A step over so many samples, of all workers, is done."""
        for count in (self._since, self._whole):
            count[1] += samples

    def waited(self, seconds: float) -> None:
        """So long no batch was there."""
        for count in (self._since, self._whole):
            count[2] += seconds

    def read(self) -> dict[str, float]:
        """Since the last reading: samples_per_s, waiting (share), memory_gb, tflops, mfu.

        TFLOP/s are one worker's. What is not known is left out: on a CPU there is no MFU.
        """
        now = memory_gb(self._device)
        self._most = max(self._most, now)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        found = self._figures(self._since) | {"memory_gb": now}
        self._since = [self._clock(), 0.0, 0.0]
        return found

    def whole(self) -> dict[str, float]:
        """The same since the meter was made, and the most memory."""
        self._most = max(self._most, memory_gb(self._device))
        return self._figures(self._whole) | {"memory_gb": self._most}

    def _figures(self, count: list[float]) -> dict[str, float]:
        began, samples, waited = count
        seconds = max(self._clock() - began, 1e-9)
        found = {"samples_per_s": samples / seconds, "waiting": waited / seconds}
        if self._flops is not None:
            rate = self._flops * samples / seconds / self._workers
            found["tflops"] = rate / 1e12
            if self._peak is not None:
                found["mfu"] = found["tflops"] / self._peak
        return found


def peak(card: str, precision: str) -> float | None:
    """Dense peak of a card in TFLOP/s; None for a card that `PEAKS` does not have.

    Args:
        card: as torch names it, such as `NVIDIA H100 80GB HBM3`.
        precision: `bf16`; or `fp32`, which means TF32 where torch may use it.
    """
    fitting = (part for part in PEAKS if re.search(rf"\b{part}\b", card, re.IGNORECASE))
    known = max(fitting, key=len, default=None)
    if known is None:
        return None
    if precision == "bf16":
        return float(PEAKS[known].half)
    cudnn: Any = torch.backends.cudnn
    used = (cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    return float(PEAKS[known].tf32 if "tf32" in used else PEAKS[known].single)


def memory_gb(device: torch.device) -> float:
    """Memory in 10^9 bytes: most of a card's that was allocated since the reading before, or
    what this process holds of the machine's (its most, where that is all the system tells).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9
