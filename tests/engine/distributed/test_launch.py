"""Every way to start ranks: Stanford's command, several machines, Slurm, a launcher's environment. Each is one run."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from engine import finetune as command
from engine.base.errors import run_main
from engine.base.files import read_json
from tests.helpers.forks import free_port, ranks, start_torchrun
from tests.helpers.run import BEFORE_CALL, PARTS_OF_A_RUN, ROOT, environment, events
from tests.helpers.small_model import small_model, write_model

COMMON = ("--device", "cpu", "--lr", "1e-3", "--max-length", 64)
STEPS = ("--global-batch-size", 8, "--max-steps", 6)
STARTED, TASKS = [], []  # processes of a test: started as a user does, and forked
BIN = Path(sys.executable).parent  # of torchrun


@pytest.fixture(scope="module")
def reference(rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    alone("--model", small_model(), *COMMON, *STEPS, "--data", rows, "--dtype", "fp32", "--out", out)
    return out


@pytest.fixture(autouse=True)
def nothing_is_left():
    """A torchrun that is told to end ends its ranks."""
    yield
    for process in STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    for task in TASKS:
        task.terminate()
    STARTED.clear(), TASKS.clear()


def alone(*args):
    assert run_main(command.main, [str(a) for a in args]) == 0


def is_free(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


def start(log, words, **variables):
    """A command as a user gives it, on a machine without GPUs."""
    env = environment() | {"PATH": f"{BIN}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""} | variables
    with open(log, "a") as file:
        STARTED.append(subprocess.Popen(
            list(map(str, words)), cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
        ))  # fmt: skip
    return STARTED[-1]


def ended(process):
    """Its exit code, in bounded time."""
    return process.wait(timeout=240)


def apart(out, other):
    """||weights - other's|| / ||other's||"""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, other))
    assert ours.keys() == theirs.keys()
    square = sum((ours[name].double() - t.double()).square().sum() for name, t in theirs.items())
    return (square / sum(t.double().square().sum() for t in theirs.values())).sqrt().item()


def same(out, reference, loss=1e-5, weights=2e-5):
    """The same rows and rates, and the same curve and weights but for the order of sums."""
    ours, theirs = events(out), events(reference)
    for name in ("step", "lr", "examples", "tokens", "loss_tokens"):
        assert [line[name] for line in ours] == [line[name] for line in theirs], name
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=loss)
    assert apart(out, reference) <= weights


# ---- Stanford's command ---------------------------------------------------------------------------------------------

STANFORD = """torchrun --nproc_per_node=2 --master_port={port} -m engine.finetune \\
    --model_name_or_path {model} \\
    --data_path {data} \\
    --bf16 True \\
    --output_dir {out} \\
    --num_train_epochs 1 \\
    --per_device_train_batch_size 2 \\
    --per_device_eval_batch_size 2 \\
    --gradient_accumulation_steps 2 \\
    --evaluation_strategy "no" \\
    --save_strategy "steps" \\
    --save_steps 2000 \\
    --save_total_limit 1 \\
    --learning_rate 2e-5 \\
    --weight_decay 0. \\
    --warmup_ratio 0.03 \\
    --lr_scheduler_type "cosine" \\
    --logging_steps 1 \\
    --fsdp "full_shard auto_wrap" \\
    --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' \\
    --tf32 True
"""


def test_stanfords_command(rows, tmp_path):
    """Its global batch is ranks x examples x accumulated, as the 2023 trainer's."""
    model, ours, out, log = (tmp_path / name for name in ("llama", "ours", "out", "log"))
    model.mkdir()
    write_model(model, tied=False)  # as LLaMA's is
    alone(
        "--model", model, "--data", rows, "--out", ours, "--device", "cpu", "--dtype", "bf16", "--epochs", 1,
        "--global-batch-size", 8, "--micro-batch-size", 2,
    )  # fmt: skip
    process = start(log, ("bash", "-c", STANFORD.format(port=free_port(), model=model, data=rows, out=out)))
    assert ended(process) == 0, log.read_text()
    assert log.read_text().count("--global-batch-size 8: 2 examples x 2 accumulated x 2 ranks") == 1
    assert read_json(out / "run.json")["environment"]["ranks"] == 2
    assert len(events(out)) == 5
    same(out, ours, loss=1e-4, weights=1e-4)


# ---- several machines -----------------------------------------------------------------------------------------------

DIES = (
    PARTS_OF_A_RUN
    + """
def die():
    for process in {"rank": (os.getpid(),), "machine": (os.getppid(), os.getpid())}[os.environ["DIES"]]:
        os.kill(process, signal.SIGKILL)
"""
    + BEFORE_CALL
    + """
if os.environ["MACHINE"] == "1":
    time.sleep(2)  # so that rank 0 is the first to look into the store, where the last start's addresses may be
if os.environ["MACHINE"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    before(step.Steps, "compute_gradients", 3, die)
sys.exit(run_main(finetune.main, sys.argv[1:]))
"""
)


def two_machines(dies, *program):
    """Run two torchruns of a rank each: (exit codes, what all printed). The first keeps the store, and loses one."""
    words = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=x")
    where = f"--rdzv-endpoint=localhost:{free_port()}"
    started = [
        start_torchrun(*words, where, f"--rdzv-conf=is_host={i == 0}", *program, MACHINE=str(i), DIES=dies)
        for i in range(2)
    ]
    said = [text for process in started for text in process.communicate(timeout=240)]
    return [process.returncode for process in started], "".join(said)


def test_two_machines_lose_one_and_then_a_rank(rows, reference, tmp_path):
    """Without a machine the run ends, and the same command goes on. A rank that dies is started again, and with it the
    other machine's, whose torchrun counts no restart."""
    out, script = tmp_path / "out", tmp_path / "dies.py"
    files = ("--data", rows, "--out", out, "--save-every", 1)
    run = (script, "--model", small_model(), *COMMON, *STEPS, "--dtype", "fp32", *files)
    script.write_text(DIES)
    codes, said = two_machines("machine", *run)
    assert codes == [-signal.SIGKILL, 1] and "another rank ended" in said, said
    codes, more = two_machines("rank", "--max-restarts=1", *run)
    assert codes == [0, 0], more
    assert more.count("going on after step") == 2, more
    assert "connectFullMesh failed" not in said + more, "a rank looked for one that is gone"
    same(out, reference)


# ---- Slurm ----------------------------------------------------------------------------------------------------------

SRUN = f"""#!{sys.executable}
import json, os, signal, socket, sys
with socket.create_connection(("127.0.0.1", int(os.environ["MACHINES"]))) as machines:
    signal.signal(signal.SIGTERM, lambda *_: machines.sendall(b"SIGTERM\\n"))
    machines.sendall(json.dumps([sys.argv[sys.argv.index("torchrun") + 1:], dict(os.environ)]).encode() + b"\\n")
    sys.exit(int(machines.makefile().readline()))
"""
SCONTROL = """#!/bin/bash
case "$*" in
  "show hostnames machine[1-2]") printf 'localhost\\nlocalhost\\n' ;;
  "requeue $SLURM_JOB_ID") touch "${0%/*}/requeued" ;;
  *) exit 1 ;;
esac
"""


def run_tasks(machines, log):
    """Do what srun asks the machines for: a torchrun on each, which gets srun's signals. Answer with the exit code."""
    srun, _ = machines.accept()
    with srun, srun.makefile() as asked:
        words, env = json.loads(asked.readline())
        tasks = [start_torchrun(*words, log=log, **env) for _ in range(int(env["SLURM_JOB_NUM_NODES"]))]
        TASKS.extend(tasks)
        threading.Thread(target=lambda: [task.terminate() for _ in asked for task in tasks], daemon=True).start()
        for task in tasks:
            task.communicate()
        srun.sendall(b"%d\n" % max(abs(task.returncode) for task in tasks))


@pytest.fixture
def slurm(tmp_path):
    """Starts scripts/slurm.sh on two machines of one GPU each; slurm.requeued is there when it asked for that."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    job_id = next(i for i in range(os.getpid(), os.getpid() + 20000) if is_free(10000 + i % 20000))
    machines = socket.create_server(("127.0.0.1", 0))
    variables = {
        "SLURM_JOB_ID": str(job_id), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "machine[1-2]",
        "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1", "PATH": f"{folder}:{BIN}:{os.environ['PATH']}",
        "MACHINES": str(machines.getsockname()[1]),
    }  # fmt: skip

    def job(log, *args, srun=SRUN):
        for name, text in (("srun", srun), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        if srun == SRUN:
            threading.Thread(target=run_tasks, args=(machines, log), daemon=True).start()
        return start(log, ("bash", ROOT / "scripts" / "slurm.sh", *args), **variables)

    job.requeued = folder / "requeued"
    yield job
    machines.close()


def before_the_limit():
    """The signal that the script wants of Slurm, to itself and not to what srun started (B:)."""
    name = re.search(r"^#SBATCH --signal=B:(\w+)@\d+$", (ROOT / "scripts" / "slurm.sh").read_text(), re.MULTILINE)[1]
    return signal.Signals[f"SIG{name}"]


def wait_for(process, log, text):
    """Until a run has said so."""
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)


def test_slurm_stops_a_job_at_its_time_limit_and_requeues_it(rows, tmp_path, slurm):
    """Slurm signals the script alone, which asks for that; the job then saves, asks for its return, and goes on."""
    out, reference, log = tmp_path / "my out", tmp_path / "alone", tmp_path / "log"
    run = ("--model", small_model(), *COMMON, "--data", rows, "--dtype", "fp32", "--global-batch-size", 8)  # 15 steps
    job = slurm(log, *run, "--out", out)
    wait_for(job, log, "step 1/15")
    job.send_signal(before_the_limit())
    assert ended(job) == 0, log.read_text()
    assert slurm.requeued.exists() and "stopped by SIGTERM after step" in log.read_text(), log.read_text()
    assert read_json(out / "run.json")["environment"]["ranks"] == 2
    codes, said = ranks(2, *run, "--out", out)
    assert codes == [0, 0] and "going on after step" in said, said
    alone(*run, "--out", reference)
    same(out, reference)


def test_a_job_that_fails_or_ends_is_not_requeued(tmp_path, slurm):
    log = tmp_path / "log"
    for code in (0, 3):
        assert ended(slurm(log, srun=f"#!/bin/bash\nexit {code}\n")) == code and not slurm.requeued.exists()
    job = slurm(log, srun="#!/bin/bash\ntrap 'exit 0' TERM\necho up\nwhile :; do sleep 0.05; done\n")
    wait_for(job, log, "up")
    job.send_signal(before_the_limit())
    assert ended(job) == 0 and not slurm.requeued.exists()


# ---- a launcher's environment, and options --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, replicas",
    [
        (("--optimizer-states", "8bit", "--loss-norm", "micro-mean", "--micro-batch-size", 2), 1),
        (("--dtype", "bf16", "--master-weights", "split", "--deterministic"), 2),
        (("--dtype", "bf16", "--master-weights", "stochastic", "--sample-every", 3, "--sample-tokens", 2), 1),
    ],
    ids=("8bit states, micro-mean", "split master, replicas", "stochastic rounding"),
)
def test_ranks_compute_what_one_process_does(rows, tmp_path, options, replicas):
    """No farther from it than twice what other sums in one process are: templates of their own, or other cuts."""
    run = ("--model", small_model(), *COMMON, *STEPS, "--data", rows, *options)
    one, other, two = (tmp_path / name for name in ("one", "other", "two"))
    alone(*run, "--out", one)
    alone(*run, "--no-share-prefix", "--out", other)
    codes, said = ranks(2, *run, "--replicas", replicas, "--out", two)
    assert codes == [0, 0], said
    pairs = zip(events(other), events(one), strict=True)
    loss = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)
    same(two, one, loss=max(1e-5, 2 * loss), weights=2 * apart(other, one))
