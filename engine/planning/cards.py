"""The GPUs that are known here: memory, peak rates, links, prices, and the rates that a report measured.

Memory is torch's total_memory, as the out-of-memory messages of each GPU print it ("a total capacity of 79.11 GiB").
Peaks are dense bf16 with fp32 sums. Peaks, bandwidths, numbers of SMs and clocks come from NVIDIA's data sheets (A100,
H100, H200, L40S, HGX B200) and whitepapers (GA102, AD102, RTX Blackwell). GeForce cards sum in fp32 at half the rate of
their fp16 headline, 512 operations a cycle and SM.

A large GEMM reaches 271 of 312 TFLOP/s on an A100 and 750 of 989 on an H100, whose power limit sets the clock. B200 and
L40S (the 4090's chip at the full rate, on 350 W) are assumed to be bound by power too, at 0.75 and 0.7 of the peak.
GeForce cards at half rate are bound by their matrix units: cuBLAS reaches 0.88 to 0.96 of such a peak on an L20, and
0.85 is assumed. Copies are assumed to reach 0.9 of the bandwidth. A report that scripts.gpu_report left in benchmarks/
replaces both shares by the rates it measured.

NCCL is assumed to move 0.8 of a link's rate in one direction: it all-gathers at 370 of 450 GB/s over an H100's NVLink
and at 240 of 300 over an A100's (github.com/NVIDIA/nccl-tests issues 212, 149). The share is assumed for PCIe too,
where GeForce cards, which have no peer access, may reach less. More than 8 GPUs are assumed to stand in machines of 8,
which are joined by a 400 Gb/s port for each GPU. Ranks fill one machine after the other, so a replica of up to 8 shards
communicates over NVLink, and only the sums over replicas use the ports.

The host's memory is assumed to move 60 GB/s under a GeForce card (a desktop's two channels; DDR5-5600 has 89.6) and 200
GB/s under the others (a server's eight or more; DDR4-3200 has 204.8, DDR5-4800 307).
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.base.errors import reading
from engine.base.flags import suggest_nearest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIB = 1 << 30

COPY_SHARE = 0.9  # of the memory's bandwidth, that a copy reaches
LINK_SHARE = 0.8  # of a link's rate in one direction, that NCCL reaches
MACHINE_GPUS = 8  # GPUs of one machine, which NVLink joins
PORT_GB_PER_S = 50  # rate of the network port that a machine has for each of its GPUs


@dataclass(frozen=True)
class Card:
    """One GPU."""

    name: str
    device: str  # part of torch.cuda.get_device_name()
    memory_gib: float
    peak_tflops: float  # dense bf16
    bandwidth_gb_per_s: float
    gemm_share: float  # of the peak, in a large GEMM
    pcie_gb_per_s: float  # in one direction, pinned: 25 of gen4's 32, 50 of gen5's 64
    sms: int  # streaming multiprocessors, of four schedulers each
    clock_ghz: float  # boost clock, at which the peak rate holds
    price_per_hour: float | None  # dollars
    nvlink_gb_per_s: float = 0  # in one direction, to all other GPUs together; 0: they communicate over PCIe
    host_gb_per_s: float = 200  # of the host's memory, read and written

    @property
    def instructions_per_s(self) -> float:
        """Return the most instructions of threads that a second executes: each scheduler begins a warp's a cycle."""
        return 1e9 * self.clock_ghz * self.sms * 4 * 32

    def bus_bytes_per_s(self, shards: int, replicas: int = 1) -> float:
        """Return the rate at which each GPU sends during an all-gather or a reduce-scatter within a replica.

        It receives at that rate too: this is nccl-tests' bus bandwidth. A ring across machines leaves each machine by
        as many ports as it has GPUs in that machine.
        """
        return self.link_bytes_per_s(None if is_within_machines(shards, replicas) else math.gcd(shards, MACHINE_GPUS))

    def sum_bytes_per_s(self, shards: int, replicas: int) -> float:
        """Return the rate at which each GPU sends during an all-reduce over the replicas.

        The GPUs that hold one shard take part: every shards-th of all.
        """
        return self.link_bytes_per_s(None if shards * replicas <= MACHINE_GPUS else max(1, MACHINE_GPUS // shards))

    def link_bytes_per_s(self, ports: int | None) -> float:
        """Return the rate over a GPU's own link or over a number of its machine's ports, whichever is lower.

        None stands for communication within a machine, which uses no port.
        """
        link = self.nvlink_gb_per_s or self.pcie_gb_per_s
        return 1e9 * LINK_SHARE * min(link, math.inf if ports is None else ports * PORT_GB_PER_S)


# One GPU on demand, lowest listed price: RunPod in March 2026 (deploybase.ai/articles/runpod-gpu-pricing); the A100 of
# 40 GB, which RunPod does not list, at Lambda in May 2026. NVLink is half of the figure in the data sheets of November
# 2026, which add both directions.
PRICES_DATE = "March 2026"
CARDS = {
    card.name: card
    for card in (
        Card("A100-40", "A100-SXM4-40GB", 39.39, 312, 1555, 0.869, 25, 108, 1.41, 1.48, 300),
        Card("A100-80", "A100-SXM4-80GB", 79.15, 312, 2039, 0.869, 25, 108, 1.41, 1.39, 300),
        Card("H100", "H100 80GB HBM3", 79.11, 989, 3350, 0.758, 50, 132, 1.83, 2.69, 450),
        Card("H200", "NVIDIA H200", 139.80, 989, 4800, 0.758, 50, 132, 1.83, 3.59, 450),
        Card("B200", "NVIDIA B200", 178.35, 2250, 7700, 0.75, 50, 148, 1.86, 5.98, 900),
        Card("L40S", "L40S", 44.39, 362, 864, 0.7, 25, 142, 2.49, 0.79),
        Card("RTX-3060", "RTX 3060", 11.75, 25.5, 360, 0.85, 25, 28, 1.78, None, host_gb_per_s=60),
        Card("RTX-3090", "RTX 3090", 23.69, 71, 936, 0.85, 25, 82, 1.70, 0.22, host_gb_per_s=60),
        Card("RTX-4060", "RTX 4060", 7.75, 30, 272, 0.85, 12.5, 24, 2.46, None, host_gb_per_s=60),
        Card("RTX-4080", "RTX 4080", 15.60, 97.5, 717, 0.85, 25, 76, 2.51, None, host_gb_per_s=60),
        Card("RTX-4090", "RTX 4090", 23.64, 165, 1008, 0.85, 25, 128, 2.52, 0.34, host_gb_per_s=60),
        Card("RTX-5090", "RTX 5090", 31.36, 209, 1792, 0.85, 50, 170, 2.41, 0.69, host_gb_per_s=60),
    )
}


def is_within_machines(shards: int, replicas: int) -> bool:
    """Return whether every replica lies within one machine."""
    return shards * replicas <= MACHINE_GPUS or MACHINE_GPUS % shards == 0


def find_card(name: str) -> Card:
    """Return the GPU with this name; case, spaces, dashes and RTX do not matter. Raises ValueError if unknown."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]|rtx", "", text.lower())

    for card in CARDS.values():
        if plain(card.name) == plain(name):
            return card
    raise ValueError(
        f"--gpu is {name!r}, wanted one of {', '.join(CARDS)}{suggest_nearest(name.upper(), CARDS)}; "
        "of another card give --gpu-memory, --gpu-tflops and --gpu-bandwidth"
    )


def change_card(
    card: Card, memory_gib: float | None, tflops: float | None, bandwidth: float | None, price: float | None
) -> Card:
    """Return the GPU with the given memory (GiB), peak (TFLOP/s), bandwidth (GB/s) and price ($ an hour).

    None leaves a figure as it is. A GPU with another memory, peak or bandwidth has no report, and no price unless one
    is given. Its clock is taken to be as much higher as its peak.
    """
    figures = {"memory_gib": memory_gib, "peak_tflops": tflops, "bandwidth_gb_per_s": bandwidth}
    changes: dict[str, Any] = {name: value for name, value in figures.items() if value is not None}
    if changes:
        clock = card.clock_ghz * changes.get("peak_tflops", card.peak_tflops) / card.peak_tflops
        card = replace(card, **changes, clock_ghz=clock, name=f"like {card.name}", device="none", price_per_hour=None)
    return card if price is None else replace(card, price_per_hour=price)


def find_card_by_device_name(device_name: str) -> Card | None:
    """Return the GPU whose name torch reports so, or None. Kinds of other sizes and clocks are left out."""
    if any(kind in device_name for kind in ("NVL", " Ti", "SUPER", "Laptop")):
        return None
    return next((card for card in CARDS.values() if card.device in device_name), None)


def detect_card(device: torch.device) -> Card | None:
    """Return the GPU of a CUDA device with the memory it really has, or None for a CPU and for an unknown GPU."""
    card = find_card_by_device_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return card and replace(card, memory_gib=torch.cuda.get_device_properties(device).total_memory / GIB)


# ---- measured rates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """The rates that a GPU is expected to reach, and where they come from."""

    gemm_flops_per_s: float
    copy_bytes_per_s: float
    report: str | None = None  # the file that measured both; None is the data sheet
    steps: tuple[dict[str, Any], ...] = ()  # whole training steps that the report measured, as it holds them

    @property
    def source(self) -> str:
        """Return the label of figures computed from these rates. They are projected in any case."""
        return f"projected from rates in {self.report}" if self.report else "projected"


def find_rates(card: Card, folder: Path | None = None) -> Rates:
    """Return the rates that the newest report of this GPU measured, or those of its data sheet without a report."""
    for path, parts in find_reports(card, folder or BENCHMARKS):
        ceilings = parts.get("ceilings", {})
        if {"gemm_tflops", "copy_gb_per_s"} <= ceilings.keys():
            steps = parts.get("step", {}).get("records", [])
            return Rates(1e12 * ceilings["gemm_tflops"], 1e9 * ceilings["copy_gb_per_s"], path.name, tuple(steps))
    return Rates(1e12 * card.peak_tflops * card.gemm_share, 1e9 * card.bandwidth_gb_per_s * COPY_SHARE)


def find_reports(card: Card, folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return (path, parts) of each report of this GPU in the folder, the newest first."""
    found = []
    for path in sorted(folder.glob("*.json")):
        with reading(path):
            report = json.loads(path.read_bytes())
        if report.get("what") != "scripts.gpu_report" or report.get("smoke"):
            continue
        if card.device in report["parts"].get("machine", {}).get("device", ""):
            found.append((report.get("date", ""), path, report["parts"]))
    return [(path, parts) for _, path, parts in sorted(found, key=lambda r: r[0], reverse=True)]
