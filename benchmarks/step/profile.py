"""Time of one training step by operator, as a table."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROWS = 60


class StepProfile:
    """Records what runs between ``start`` and ``stop``.

    Args:
        path: File that the table goes to.
        device: "cpu" or "cuda".
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.is_gpu = path, device == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_gpu else [])]
        self._profile = profile(activities=activities, acc_events=True)

    def start(self) -> None:
        """Start recording, right before a step."""
        self._profile.__enter__()
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Stop recording, after the device is done, and write the file."""
        seconds = time.perf_counter() - self._started
        self._profile.__exit__(None, None, None)
        events = self._profile.key_averages()
        if self.is_gpu:
            # only kernels, since an operator's device time is that of its kernels again
            kernels = [event for event in events if event.device_type == DeviceType.CUDA]
            busy = sum(e.self_device_time_total for e in kernels if not e.is_user_annotation) / 1e6
        else:
            busy = sum(event.self_cpu_time_total for event in events) / 1e6
        table = events.table(
            sort_by=f"self_{'cuda' if self.is_gpu else 'cpu'}_time_total",
            row_limit=ROWS,
            max_name_column_width=90,
        )
        kind = "kernels on the GPU" if self.is_gpu else "operators on the CPU"
        head = f"{seconds:.4f} s by the clock, {busy:.4f} s in {kind}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(f"{head}torch {torch.__version__}\n{table}\n", encoding="utf-8")
