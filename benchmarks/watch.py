"""The card's clock and power while something runs on it."""

import statistics
import threading
from collections import Counter
from typing import Any

import torch

# Bits of NVML's clock event reasons that hold a busy card back.
REASONS = {0x4: "power limit", 0x8: "hardware", 0x20: "temperature", 0x40: "temperature", 0x80: "hardware power brake"}


class Watch:
    """Samples clock, power and what holds the clock back, on a thread, while the block runs. Without NVML: nothing."""

    def __init__(self, seconds: float = 0.02):
        self.seconds, self.samples = seconds, []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        except Exception:  # no such package, no such library, or no card: the figures stand without it
            return
        while not self._stop.wait(self.seconds):
            clock = pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM)
            watts = pynvml.nvmlDeviceGetPowerUsage(card) / 1e3
            self.samples.append((clock, watts, pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)))

    def facts(self) -> dict[str, Any]:
        """Median clock and power, and what held the clock back in most samples; empty where nothing was sampled."""
        if not self.samples:
            return {}
        clocks, watts, bits = zip(*self.samples)
        found = Counter(name for sample in bits for name in {REASONS[bit] for bit in REASONS if sample & bit})
        held_back = [name for name, number in found.items() if 2 * number > len(bits)]
        return {
            "sm_mhz": statistics.median(clocks),
            "watts": round(statistics.median(watts)),
            "held_back_by": ", ".join(held_back) or "nothing",
        }
