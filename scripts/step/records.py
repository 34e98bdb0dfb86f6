"""A process that measures steps: its flags, its file of records, and measurements that are halved until they fit."""

import argparse
import gc
import time
import traceback
from collections.abc import Callable

import torch

from engine.base.files import make_json_safe
from engine.training.micro_batch_size import is_out_of_memory
from kernels.measure.clock import parse_finite
from kernels.measure.machine import GPU, free_memory
from scripts.base.record_file import RecordFile
from scripts.step.figures import format_record


class Records(RecordFile):
    """The records of one process. A failed measurement becomes a record with its error, and the rest goes on."""

    def __init__(self, path=None, minutes=None):
        super().__init__(path, minutes, {"records": []})
        self.save()

    def attempt(self, name: str, measure: Callable[[], dict]) -> None:
        """Add the record that measure() returns, or its failure. Begin nothing when the time is up.

        Raises the failure again after a CUDA error, when the process can use the GPU no more and its parent starts
        another.
        """
        if not self.may_begin(name):
            return
        began, broken = time.monotonic(), None
        try:
            record = measure()
        except Exception as error:  # one measurement's trouble is not another's
            traceback.print_exc()
            said = str(error).strip().splitlines() or [""]
            record = {"failed": f"{type(error).__name__}: {said[0][:300]}"}
            broken = error if "CUDA error" in str(error) and not is_out_of_memory(error) else None
        record = make_json_safe({"name": name, **record, "seconds": time.monotonic() - began})
        self.result["records"].append(record)
        self.save()
        print(format_record(record), flush=True)
        if broken:
            raise broken
        free_memory()


class TooLarge(Exception):
    """Even the smallest size ran out of memory."""


def halve_until_it_fits(size: int, least: int, measure: Callable[[int], dict]) -> dict:
    """Return measure(size), with the size halved after each time it runs out of memory.

    Adds the sizes that did not fit as "out_of_memory_at". Raises TooLarge when a size would fall under `least`.
    """
    failed, said = [], ""
    while size >= least:
        try:
            return measure(size) | ({"out_of_memory_at": failed} if failed else {})
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).split(". ")[0]
        failed.append(size)  # outside the handler, whose traceback keeps the failed attempt's tensors
        gc.collect()
        free_memory()
        size //= 2
    raise TooLarge(f"out of memory at {', '.join(map(str, failed))}: {said}")


def parse_arguments(prog: str, doc: str, names: list[str], argv: list[str] | None) -> argparse.Namespace:
    """Return the flags that every measuring process has: which measurements, where to write, how long, how large."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=doc.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {'; '.join(names)}"
    )
    parser.add_argument("--json", metavar="FILE", help="where the records go (nowhere)")
    parser.add_argument("--minutes", type=parse_finite, help="begin nothing after this long (no limit)")
    parser.add_argument("--smoke", action="store_true", help="at toy size, on a CPU too")
    args = parser.parse_args(argv)
    if not GPU and not args.smoke:
        parser.error("no GPU is visible to torch; --smoke tries everything at toy size on the CPU")
    if not GPU:
        torch.set_num_threads(1)  # toys gain nothing by more
    return args
