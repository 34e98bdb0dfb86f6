"""The zip in which torch.save keeps tensors, checked as torch does not: it reads no checksum and no record's size."""

import re
import zipfile
from pathlib import Path

import torch

from engine.base.errors import DataError, summarize_error

TENSOR = re.compile(r"[^/]+/data/[^/]+")  # the record of a storage; the others hold the pickle and a few words
BLOCK_BYTES = 1 << 20


class TensorZip:
    """A file of torch.save, whose records are checked: the small ones first, and once those of the tensors."""

    def __init__(self, path: Path):
        """Check the directory of the zip and every record that is no tensor. Raise DataError."""
        self.path, self.checked = path, False
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
                if len({info.filename for info in infos}) < len(infos):
                    raise ValueError("two records of one name")
                if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
                    raise ValueError("a record is compressed or encrypted")
                self.tensors = [info for info in infos if TENSOR.fullmatch(info.filename)]
                check_sums(archive, [info for info in infos if info not in self.tensors])
        except Exception as error:  # zipfile raises many kinds for a damaged directory
            raise self.explain(error) from error

    def explain(self, error: Exception) -> DataError:
        """Return the error of a file that is damaged."""
        return DataError(
            f"{self.path.name}: not a sound torch file: {summarize_error(error)}; copy or download it again. If it is "
            "of torch before 1.6, load it and torch.save it again"
        )

    def check_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raise DataError unless the tensors lie in these records, each of the size that the pickle tells.

        A tied head may be a second view of the embedding; so the tensors together are twice the records at most.
        """
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()
        }
        told = sorted(size for size in storages.values() if size)
        stored = sorted(info.file_size for info in self.tensors if info.file_size)
        if told != stored:
            raise self.explain(ValueError(f"{sum(told)} bytes of tensors are told, {sum(stored)} are stored"))
        for name, tensor in tensors.items():
            if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
                raise DataError(
                    f"{self.path.name}: {name!r} repeats a value to {tuple(tensor.shape)}; wanted all "
                    "its numbers stored"
                )
        claimed = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        if claimed > 2 * sum(stored):
            raise DataError(
                f"{self.path.name}: its tensors are {claimed} bytes, of which it stores {sum(stored)}; wanted "
                "all their numbers stored"
            )

    def check_sums_once(self) -> None:
        """Compare the bytes of every tensor with their checksums, the first time. Raise DataError."""
        if self.checked:
            return
        try:
            with zipfile.ZipFile(self.path) as archive:
                check_sums(archive, self.tensors)
        except Exception as error:
            raise self.explain(error) from error
        self.checked = True


def check_sums(archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo]) -> None:
    """Read records of a zip to their ends, where zipfile raises for another checksum or another size."""
    for info in infos:
        with archive.open(info) as record:
            while record.read(BLOCK_BYTES):
                pass
