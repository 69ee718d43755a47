"""Scripts of this repo as processes of their own, without importing torch and transformers (9 seconds of CPU time) in
each: every process is a fork of one that has imported everything and started no thread.

    done = run("main.py", "--preset", "tiny", num_processes=2)
    assert done.returncode == 0, done.stderr

With several processes they get the environment that torchrun would give them, and as torchrun does, this ends the
others when one fails.

Left out on purpose: standard input, output while the processes run, GPUs.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["main", "distill", "self_play"])


def run(script: str | Path, *arguments: str, num_processes: int = 1, timeout: float = 240) -> SimpleNamespace:
    """`python script arguments` or, with several processes, torchrun -> returncode, stdout, stderr."""
    return Running(script, *arguments, num_processes=num_processes).finish(timeout)


class Running:
    """The processes of one script; processes[i] has rank i. The output of all goes to the same two files."""

    def __init__(self, script: str | Path, *arguments: str, num_processes: int = 1):
        self.folder = tempfile.TemporaryDirectory()
        self.output = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        environment = {"OMP_NUM_THREADS": "1"}
        if num_processes > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            environment |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
        self.processes = []
        for rank in range(num_processes):
            if num_processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            everything = (ROOT / script, arguments, self.output, dict(environment))
            self.processes.append(CONTEXT.Process(target=_run_script, args=everything))
            _start(self.processes[-1])

    def poll(self) -> int | None:
        """The first exit code that is not 0, else 0 when all have ended, else None. -N if signal N ended a process."""
        codes = [process.exitcode for process in self.processes]
        return next((code for code in codes if code), None if None in codes else 0)

    def finish(self, timeout: float = 240) -> SimpleNamespace:
        """Waits until all have ended; TimeoutError, with what they printed, if that takes longer."""
        end = time.monotonic() + timeout
        try:
            while (returncode := self.poll()) is None:
                self._wait(end)
            for process in self.processes:  # one failed: the others are asked to end
                if process.exitcode is None:
                    process.terminate()
            while any(process.exitcode is None for process in self.processes):
                self._wait(end)
            stdout, stderr = (file.read_text(errors="replace") for file in self.output)
            return SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)  # not of those that were ended
        finally:
            self.kill()
            self.folder.cleanup()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def _wait(self, end: float) -> None:
        running = [process.sentinel for process in self.processes if process.exitcode is None]
        if not wait(running, timeout=max(0.0, end - time.monotonic())):
            raise TimeoutError(self.output[1].read_text(errors="replace")[-3000:])


def _start(process) -> None:
    """The first start also starts the process that is forked, which finds modules by PYTHONPATH alone."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    try:
        process.start()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _run_script(script: Path, arguments: tuple[str, ...], output: list[Path], environment: dict[str, str]) -> None:
    os.environ |= environment
    os.chdir(ROOT)
    for descriptor, file in enumerate(output, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv, sys.path[0] = [str(script), *arguments], str(script.parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
