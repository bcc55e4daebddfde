"""Started once per device by torchrun: the same masks as one process makes."""

import subprocess
import sys

from pipeline import calibrate


def test_torchrun_with_two_processes(words, tmp_path):
    options = ("--criterion", "wanda", "--sparsity", "0.3", "--batch-tokens", "200", "--accelerator", "cpu")
    options = (*options, "--deterministic")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "pipeline.calibrate", *words(tmp_path / "run", *options, "--devices", "2", "--strategy", "ddp")]
    done = subprocess.run([*launcher, *program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert calibrate.main(words(tmp_path / "alone", *options)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "run"]
    for name in ("masks/up.safetensors", "masks/down.safetensors", "statistics.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
