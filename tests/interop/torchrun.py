"""Jobs as a user starts them."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]


def output_of_job(*arguments: str, folder: Path, timeout_seconds: float) -> str:
    """What a job prints that torchrun starts in some folder, with nothing of this environment but tricomm: rank after
    rank, as ranks that share a pipe write into each other's lines.
    """
    with TemporaryDirectory() as logs:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--log-dir", logs, "--redirects", "1"]
        done = subprocess.run(
            [sys.executable, *launcher, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        )
        assert done.returncode == 0, done.stderr
        return "".join(path.read_text() for path in sorted(Path(logs).rglob("stdout.log")))
