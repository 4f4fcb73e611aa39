"""Number of operations of a prediction, and of waits of the host for a GPU."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from feature_extractors import extractor as extractor_module
from feature_extractors.detector import Batch, Detector
from feature_extractors.extractor import PatchExtractor
from feature_extractors.memory_bank import MemoryBank
from utils.records import Sample

# Operations that make the host wait, because it needs their result or its shape. Copies are not counted here.
WAITING = {"_local_scalar_dense", "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero"}
WAITING |= {"_unique", "_unique2", "unique_consecutive", "unique_dim", "unique_dim_consecutive"}
INDEXING = {"index", "index_put", "index_put_"}  # with a bool index, the host waits for the number of True values
# CUDA calls that return only when the GPU has finished its work.
WAITING_CALLS = {"cudaDeviceSynchronize", "cudaEventSynchronize", "cudaFree", "cudaMemcpy", "cudaStreamSynchronize"}
RANGE = "measured work"


class Operations(TorchDispatchMode):
    """Context that counts the operations of the calling thread by name. `device_type` None counts all devices."""

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self.device_type = device_type
        self.counts: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()  # the counted operations that make the host wait for a GPU

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            result = function.decompose(*args, **kwargs)  # a composite operation is counted by its parts
        if result is not NotImplemented:
            return result
        result = function(*args, **kwargs)
        name, given = function.overloadpacket.__name__, tree_leaves((args, kwargs))
        devices = {each.device.type for each in [*given, *tree_leaves(result)] if isinstance(each, Tensor)}
        if self.device_type is None or self.device_type in devices:
            self.counts[name] += 1
            by_mask = any(isinstance(each, Tensor) and each.dtype == torch.bool for each in tree_leaves(args[1:2]))
            if name in WAITING or (name in INDEXING and by_mask):
                self.waiting[name] += 1
        return result


class InCallingThread(Executor):
    """Stand-in for ThreadPoolExecutor that runs work in the calling thread, where Operations counts it."""

    def __init__(self, _workers: int) -> None: ...

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*args, **kwargs))
        return future


def calls_in_range(events: Iterable[Any]) -> Counter[str]:
    """Count the WAITING_CALLS among the profiler's events that begin within RANGE on the host.

    The profiler also synchronizes the device, but outside RANGE.
    """
    events = list(events)
    ranges = [each.time_range for each in events if each.name == RANGE and each.device_type == DeviceType.CPU]
    within = [each for each in events if ranges[0].start <= each.time_range.start <= ranges[0].end]
    names = [each.name.partition("_")[0] for each in within]  # without a version suffix, as in cudaMemcpy_v3020
    return Counter(name for name in names if name in WAITING_CALLS)


def waiting_calls(work: Callable[[], object]) -> Counter[str]:
    """Count the CUDA calls, in all threads, that make the host wait for the GPU during `work`."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler, record_function(RANGE):
        work()
    return calls_in_range(profiler.events())


def count_waits(detector: Detector, samples: Sequence[Sample]) -> dict[str, Any]:
    """Count the operations of a prediction, those that would wait for a GPU, and on a GPU the calls that waited."""
    device_type = detector.extractor.device.type
    detector.predict_batch(samples)  # warm-up: allocates memory and compiles kernels
    executor = patch.object(extractor_module, "ThreadPoolExecutor", InCallingThread)
    with executor, Operations(device_type) as operations:
        detector.predict_batch(samples)
    calls = waiting_calls(lambda: detector.predict_batch(samples)) if device_type == "cuda" else None
    return {
        "samples": len(samples),
        "operations": operations.counts.total(),
        "waiting_operations": dict(operations.waiting),
        "waiting_calls": None if calls is None else dict(calls),
    }


@torch.inference_mode()
def count_batched_scoring(detector: Detector, samples: Sequence[Sample]) -> dict[str, Any]:
    """Operations that score the samples together, as on a GPU, counted on any device.

    They run on tensors of the meta device, which have shapes but no values, so an operation that waits for a value
    would fail.
    """
    config = detector.config
    banks = {}
    for name, bank in detector.banks.items():
        spacing = None if bank.spacing is None else bank.spacing.to("meta")
        banks[name] = MemoryBank(bank.rows.to("meta"), bank.statistics, spacing=spacing)
    copy = Detector(config, PatchExtractor(config, None, None, device="meta"), banks, detector.decision_fusion)
    features = []
    for each in detector.extractor.extract(samples):
        patches = {name: getattr(each, name).to("meta") for name in config.method.banks}
        features.append(each._replace(**patches))
    with Operations("meta") as operations:
        copy._score(Batch(features, "cancelling", None, bounded=True), fused=True)
    return {"samples": len(samples), "operations": operations.counts.total(), "waiting": operations.waiting.total()}


def print_waits(rows: Iterable[dict[str, Any]], device: torch.device) -> None:
    """Print a table of the results of `count_waits`."""
    print(f"\n{'operations of a prediction':32}{'operations':>12}{'waiting':>10}{'waits of the host':>20}")
    for row in rows:
        name = f"batch of {row['samples']}"
        calls = "-" if row["waiting_calls"] is None else sum(row["waiting_calls"].values())
        print(f"{name:32}{row['operations']:12}{sum(row['waiting_operations'].values()):10}{calls:>20}")
        for kind in ("waiting_operations", "waiting_calls"):
            names = ", ".join(f"{each} {count}" for each, count in (row[kind] or {}).items())
            if names:
                print(f"    {kind.replace('_', ' ')}: {names}")
    if device.type == "cpu":
        print("These counts are of a CPU, which processes clouds and scores samples one by one.")


def print_batched_scoring(rows: Iterable[dict[str, Any]]) -> None:
    """Print the results of `count_batched_scoring`."""
    for row in rows:
        name = f"scoring of {row['samples']} together"
        print(f"{name:32}{row['operations']:12}{row['waiting']:10}")
