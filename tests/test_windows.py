"""What only POSIX systems have is asked for first: every module is imported, and an image generated, without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from foveate.kernels import native

ROOT = Path(__file__).parents[1]

SCRIPT = """
import asyncio, importlib, multiprocessing, os, pkgutil, signal, subprocess, sys, tempfile
from pathlib import Path
import cyclopts, huggingface_hub, numpy, PIL.Image, rich, safetensors.torch, tokenizers, torch._dynamo, tqdm, yaml

# Libraries are imported: they have ways of their own for other systems. From here on the names are gone.
for module, names in (
    (os, ("getuid", "geteuid", "getgid", "getppid", "fork", "sysconf", "uname", "getloadavg", "mkfifo", "chown",
          "killpg", "sched_getaffinity", "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "setsid", "nice")),
    (signal, ("SIGHUP", "SIGPIPE", "SIGKILL", "SIGUSR1", "SIGALRM", "alarm", "setitimer", "pthread_sigmask")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in ("resource", "fcntl", "pwd", "grp", "termios", "pty", "tty", "syslog"):
    sys.modules[name] = None

import foveate
names = [
    module.name
    for module in pkgutil.walk_packages(foveate.__path__, "foveate.")
    if not module.name.startswith(("foveate.kernels.gpu.", "recipes", "foveate.__main__"))
]
for name in (*names, "foveate.kernels.gpu.launch"):
    importlib.import_module(name)

from foveate.cli.main import main
from foveate.cli.signals import signals_raised
from foveate.families.available import available_bytes
from foveate.kernels import native

with signals_raised() as came:
    assert came == []
available_bytes(torch.device("cpu"))
assert native._own_folders()
native._cache_folder()
sys.argv = ["foveate", "generate", "hamburger", "--model", "emoji-tiny", "--seed", "7", "-o", sys.argv[1]]
sys.exit(main())
"""


@pytest.mark.soak
def test_everything_runs_without_what_windows_lacks(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "JAXTYPING_DISABLE": "1",
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "image.png")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "image.png").stat().st_size > 1000


def test_a_folder_of_nobody_in_particular_is_ours_where_users_have_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There `Path.stat` says 0 for every owner."""
    monkeypatch.delattr(os, "getuid", raising=False)
    assert native._user() == 0
    assert native._own_folders()[-1].name == "foveate-0"
