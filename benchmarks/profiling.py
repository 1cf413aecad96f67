"""Where the time goes: kernels, time without a kernel, and how often the host waits for the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.rows import synchronize

TOP = 40
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")  # of the host


def profile(work: Callable[[], object], count: int, device: torch.device) -> dict[str, Any]:
    """The top kernels (on a CPU: operators) of `count` calls, the share of time without a kernel, the host's waits."""
    on_gpu = device.type == "cuda"
    synchronize(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(count):
            work()
        synchronize(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spans: dict[str, list[tuple[float, float]]] = {}
    waits: dict[str, int] = {}
    for event in recorded.events():
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False):
            spans.setdefault(event.name, []).append((event.time_range.start, event.time_range.end))
        if event.name in WAITS:
            waits[event.name] = waits.get(event.name, 0) + 1
    if on_gpu:
        waits["cudaDeviceSynchronize"] = max(0, waits.get("cudaDeviceSynchronize", 0) - 1)  # the one at the end
        totals = {name: sum(end - start for start, end in parts) for name, parts in spans.items()}
    else:
        totals = {entry.key: entry.self_cpu_time_total for entry in recorded.key_averages()}
    everything = sum(totals.values()) or 1.0
    top = sorted(totals, key=totals.get, reverse=True)[:TOP]
    kernels = [
        {"kernel": name[:160], "us": totals[name] / count, "share": totals[name] / everything}
        | {"calls": len(spans.get(name, ())) / count}
        for name in top
    ]
    row: dict[str, Any] = {"steps": count, "host_waits_per_step": {name: n / count for name, n in waits.items()}}
    if on_gpu:
        row["idle_share"] = idle_share([span for parts in spans.values() for span in parts])
    return row | {"kernels": kernels}


def idle_share(spans: list[tuple[float, float]]) -> float:
    """The share of the time, from the first start to the last end, that no span covers."""
    busy, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    first = min((start for start, _ in spans), default=0.0)
    return 1 - busy / (reached - first) if spans and reached > first else 0.0
