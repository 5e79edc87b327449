"""One way to run a module on two processes: torchrun over gloo, on the CPU alone."""

import os
import subprocess
import sys


def run_on_two_ranks(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments...` on two ranks, and fail with what it said if it fails.

    GPUs are hidden from it: NCCL refuses two ranks on one GPU. What the ranks are compared with
    must run on the CPU too (`use_cpu=True` in a trainer's config).

    Start-up is most of the cost: let one launch serve several tests where that is easy.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", module, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done
