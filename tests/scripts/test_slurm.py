"""What scripts/slurm.sh starts on its machines: every word as it was given, on the first machine's address."""

import os
import signal
import subprocess
import time

import pytest

from tests.helpers.run import ROOT

JOB = {
    "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_ID": "20007", "SLURM_CPUS_PER_TASK": "9", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "3",
}  # fmt: skip


def start(tmp_path, srun, *words):
    """Start the script where scontrol and srun are stand-ins."""
    programs = {"scontrol": f'[ "$1" = show ] && printf "a1\\na2\\n" || echo "$@" > {tmp_path}/asked', "srun": srun}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | JOB | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.Popen(["bash", ROOT / "scripts" / "slurm.sh", *words], env=environment)


def test_every_word_reaches_the_run_on_the_machines_of_the_job(tmp_path):
    words = ("--model", "a b", "--data", "*", "--x", "")
    assert start(tmp_path, f'printf "%s\\n" "$@" > {tmp_path}/told', *words).wait(60) == 0
    told = (tmp_path / "told").read_text().split("\n")[:-1]
    assert told[told.index("engine.finetune") + 1 :] == list(words) and told[told.index("engine.finetune") - 1] == "-m"
    wanted = {
        "--cpus-per-task=9", "--kill-on-bad-exit=0", "torchrun", "--nnodes=2", "--nproc-per-node=3", "--rdzv-id=20007",
        "--rdzv-endpoint=a1:10007", "--rdzv-backend=c10d",
    }  # fmt: skip
    assert wanted <= set(told)


@pytest.mark.parametrize("code", [0, 1, 143])
def test_the_signal_before_the_time_limit_lets_ranks_save_and_requeues_what_is_not_done(code, tmp_path):
    """A run that the signal finds at its end is done, and not repeated."""
    trap = f"trap 'touch {tmp_path}/saved; exit {code}' TERM\ntouch {tmp_path}/up\nwhile :; do sleep 0.01; done"
    job, end = start(tmp_path, trap), time.monotonic() + 60
    while not (tmp_path / "up").exists() and time.monotonic() < end:
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0 and (tmp_path / "saved").exists()
    assert (tmp_path / "asked").exists() == (code != 0)
    assert not code or (tmp_path / "asked").read_text() == "requeue 20007\n"


def test_only_the_script_is_signalled_and_the_job_may_be_requeued():
    lines = (ROOT / "scripts" / "slurm.sh").read_text().splitlines()
    told = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= told
