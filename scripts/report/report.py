"""The result of scripts.gpu_report, which several runs make together, and the share of the time of each part."""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from scripts.base.record_file import RecordFile


class Report(RecordFile):
    """Figures by part. The deadline is that of the part under way; `end` is that of this run.

    What an earlier run wrote to the path is kept, and a part measures only what is missing. out: the folder of whatever
    else is written. Raises ValueError if the file is no report, or one of another device or size.
    """

    def __init__(
        self,
        path: str | Path,
        minutes: float,
        smoke: bool,
        *,
        device: str = "CPU",
        out: Path = Path("."),
        clock: Callable[[], float] = time.monotonic,
        **facts: str | None,
    ):
        kind = {"what": "scripts.gpu_report", "smoke": smoke, "device": device}
        old = json.loads(Path(path).read_text()) if Path(path).exists() else {"parts": {}, "runs": []}
        others = {name: old[name] for name in kind if name in old and old[name] != kind[name]}
        if others or "parts" not in old:
            raise ValueError(f"{path} is of {others or 'something else'}, wanted {kind}: give another --out or --json")
        run = {**facts, "minutes": minutes, "seconds": {}}
        super().__init__(path, minutes, {**kind, **old, **facts, "runs": [*old["runs"], run]}, clock)
        self.smoke, self.out, self.end, self.seconds = smoke, out, self.deadline, run["seconds"]

    def add(self, part: str, **figures) -> None:
        """Add figures to a part and save."""
        self.result["parts"].setdefault(part, {}).update(figures)
        self.save()

    def measure_part(self, name: str, measure: Callable[["Report"], None], share: float) -> None:
        """Run a part within its share of the time that is left. Record an exception as the part's failure."""
        self.deadline = self.end
        if not self.may_begin(name):
            return
        self.result["parts"].get(name, {}).pop("failed", None)  # of an earlier run
        began = self.clock()
        self.deadline = began + share * (self.end - began)
        try:
            measure(self)
        except Exception as error:  # what this machine cannot do is recorded as such; the rest goes on
            traceback.print_exc()
            self.add(name, failed=traceback.format_exception_only(error)[-1].strip()[:500])
        self.seconds[name] = round(self.clock() - began, 1)
        self.save()

    def drop_failures(self) -> None:
        """Forget every measurement that failed, so that this run tries it again."""
        parts = self.result["parts"]
        parts["tests"] = {
            name: figures for name, figures in parts.get("tests", {}).items()
            if isinstance(figures, dict) and not figures["failed"] and "ended" not in figures
        }  # fmt: skip
        kernels = parts.get("kernels", {"records": [], "ended": {}})
        failed = {r["op"] for r in kernels["records"] if "failed" in r or "wrong" in r} | kernels["ended"].keys()
        kernels["records"] = [r for r in kernels["records"] if r["op"] not in failed]
        kernels["ended"] = {}
        for name in ("step", "profile", "peers", "ranks"):
            if "records" in parts.get(name, {}):
                parts[name]["records"] = [r for r in parts[name]["records"] if "failed" not in r]
