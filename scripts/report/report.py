"""The result of scripts.gpu_report, and the share of the time that each part may take."""

import time
import traceback
from collections.abc import Callable

from scripts.base.record_file import RecordFile


class Report(RecordFile):
    """Figures by part. The deadline is that of the part under way; `end` is that of the whole report."""

    def __init__(self, path, minutes: float, smoke: bool, **facts):
        head = {"what": "scripts.gpu_report", "smoke": smoke, "minutes": minutes}
        super().__init__(path, minutes, {**head, "parts": {}, "left_out": [], **facts})
        self.smoke, self.end = smoke, self.deadline

    def add(self, part: str, **figures) -> None:
        """Add figures to a part and save."""
        self.result["parts"].setdefault(part, {}).update(figures)
        self.save()

    def measure_part(self, name: str, measure: Callable[["Report"], None], share: float) -> None:
        """Run a part within its share of the time that is left. Record an exception as the part's failure."""
        self.deadline = self.end
        if not self.may_begin(name):
            return
        began = time.monotonic()
        self.deadline = began + share * (self.end - began)
        try:
            measure(self)
        except Exception as error:  # what this machine cannot do is recorded as such; the rest goes on
            traceback.print_exc()
            self.add(name, failed=traceback.format_exception_only(error)[-1].strip()[:500])
        self.result.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
        self.save()
