"""One process is the plain case; several, started by torchrun, agree on means and objects."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from boxteacher import distributed

ROOT = Path(__file__).parents[1]


def torchrun(script: str, processes: int, folder: Path) -> subprocess.CompletedProcess:
    """Runs `script` under torchrun on a free port; the timeout only guards against hanging."""
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", str(folder / "script.py"), str(folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


# --- one process --------------------------------------------------------------


def test_one_process_is_rank_0_of_1(no_torchrun):
    assert distributed.init_distributed("cpu") == torch.device("cpu")
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.is_main()
    distributed.barrier()
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    distributed.shutdown()
    distributed.shutdown()


def test_reduce_mean_of_one_process_is_the_tensor_without_gradient():
    tensor = torch.tensor([1.5, 2.0], dtype=torch.float64, requires_grad=True)
    mean = distributed.reduce_mean(tensor)
    assert torch.equal(mean, tensor)
    assert mean.dtype == torch.float64
    assert not mean.requires_grad
    assert distributed.reduce_mean(torch.tensor(3)).item() == 3.0
    assert distributed.reduce_mean(torch.tensor(3)).is_floating_point()


def test_auto_takes_what_there_is(no_torchrun):
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert distributed.init_distributed("auto").type == wanted


def test_no_gpu_is_said_in_one_line(no_torchrun, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(distributed.DeviceError, match="use --device cpu"):
        distributed.init_distributed("cuda")


def test_too_few_gpus_are_said_in_one_line(no_torchrun, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(distributed.DeviceError, match="use torchrun --nproc_per_node=2"):
        distributed.init_distributed("cuda")


# --- several ------------------------------------------------------------------

AGREE = """
import json, sys
import torch
from boxteacher import distributed as d

device = d.init_distributed(sys.argv[2] if len(sys.argv) > 2 else "cpu")
own = torch.tensor([1.0, 10.0], device=device, requires_grad=True) * (d.rank() + 1)
count = torch.tensor(d.rank(), device=device)
mean = d.reduce_mean(own)
mine = {
    "rank": d.rank(),
    "world_size": d.world_size(),
    "is_main": d.is_main(),
    "device": device.type,
    "mean": mean.tolist(),
    "mean_has_gradient": mean.requires_grad,
    "mean_of_counts": d.reduce_mean(count).item(),
    "own_is_unchanged": own.tolist() == [d.rank() + 1.0, 10.0 * (d.rank() + 1)],
}
d.barrier()
everyone = d.gather_objects(mine)
assert (everyone is not None) == d.is_main()
if d.is_main():
    with open(sys.argv[1] + "/everyone.json", "w") as file:
        json.dump(everyone, file)
d.shutdown()
assert d.world_size() == 1
"""


def test_two_processes_agree(tmp_path):
    done = torchrun(AGREE, 2, tmp_path)
    assert done.returncode == 0, done.stderr
    everyone = json.loads((tmp_path / "everyone.json").read_text())
    for rank, process in enumerate(everyone):
        assert process == {
            "rank": rank,
            "world_size": 2,
            "is_main": rank == 0,
            "device": "cpu",
            "mean": [1.5, 15.0],
            "mean_has_gradient": False,
            "mean_of_counts": 0.5,
            "own_is_unchanged": True,
        }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_torchrun_on_a_gpu(tmp_path):
    script = AGREE.replace('"cpu"', '"cuda"')
    done = torchrun(script, 1, tmp_path)
    assert done.returncode == 0, done.stderr
    (process,) = json.loads((tmp_path / "everyone.json").read_text())
    assert process["device"] == "cuda"
    assert process["mean"] == [1.0, 10.0]


DIES = """
import os, signal, sys
import torch
from boxteacher import distributed as d

d.init_distributed("cpu")
d.barrier()
if d.rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
d.reduce_mean(torch.ones(()))
open(sys.argv[1] + "/went_on", "w").close()
"""


def test_a_dead_rank_ends_the_run(tmp_path):
    done = torchrun(DIES, 2, tmp_path)
    assert done.returncode != 0
    assert not (tmp_path / "went_on").exists()
