"""Kill a process at a chosen moment: before or after its Nth call that changes file names, or its Nth fsync.

    ended = run_killed(main, ["train", ...], at=7, when="after")

runs `main(["train", ...])` in a new process, which sends itself SIGKILL after its seventh call of a function
in CALLS. Without `at`, or if there are fewer calls, it runs to its end and `ended.was_killed` is false. So a
loop over `kills(...)` ends by itself:

    for ended in kills(main, ["fuse", ...], before_each=clean):
        ...  # check what must hold after this kill

The processes are forked by a server that has imported this project but has not used MLX, so they start fast.
With a GPU they are spawned instead, which takes a second or two longer. The function and its arguments must
be picklable.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

CALLS = ("replace", "rename", "fsync", "unlink", "remove", "rmdir", "mkdir", "link", "symlink")  # of `os`
PRELOAD = [
    "mlx_impl.cli.training.finetune",
    "mlx_impl.cli.fuse",
    "mlx_impl.files.fusing",
    "mlx_impl.__main__",
    "tests.kills",
]
MAX_SECONDS = 120

# A GPU's driver does not survive a fork.
SERVER: Any = multiprocessing.get_context("spawn" if mx.is_available(mx.gpu) else "forkserver")
SERVER.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True)
class Ended:
    code: int  # exit code; -9 if killed
    calls: list[str]  # each with its first argument; the last one may not have been made
    output: str  # standard output and standard error

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL


def run_killed(
    act: Callable[..., Any],
    *arguments: Any,
    at: int | None = None,
    when: str = "before",
    calls: Sequence[str] = CALLS,
    seconds: float | None = None,
) -> Ended:
    """Run `act(*arguments)` in a new process; kill it before or after call `at`, or after some seconds."""
    with tempfile.TemporaryDirectory() as folder:
        seen, output = Path(folder, "calls"), Path(folder, "output")
        seen.touch()
        output.touch()
        process = SERVER.Process(target=in_child, args=(act, arguments, at, when, calls, seen, output))
        process.start()
        process.join(MAX_SECONDS if seconds is None else seconds)
        if process.exitcode is None and seconds is not None:
            process.kill()
            process.join()
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"still running after {MAX_SECONDS} seconds: {output.read_text('utf-8')}")
        lines = seen.read_text("utf-8", "replace").splitlines()
        return Ended(process.exitcode, lines, output.read_text("utf-8", "replace"))


def kills(
    act: Callable[..., Any],
    *arguments: Any,
    before_each: Callable[[], object],
    calls: Sequence[str] = CALLS,
    every: int = 1,
) -> Iterator[Ended]:
    """Kill before the first call, after it, before the second, ..., until a run reaches its end.

    Only one moment in `every` is tried.
    """
    moments = ((at, when) for at in itertools.count(1) for when in ("before", "after"))
    for at, when in itertools.islice(moments, 0, None, every):
        before_each()
        ended = run_killed(act, *arguments, at=at, when=when, calls=calls)
        if not ended.was_killed:
            assert ended.code == 0, ended.output
            return
        yield ended


def in_child(
    act: Callable[..., Any],
    arguments: Sequence[Any],
    at: int | None,
    when: str,
    calls: Sequence[str],
    seen: Path,
    output: Path,
) -> None:
    """Run `act` with patched calls: each is counted and logged before it is made."""
    written = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(written, stream)
    log, count = os.open(seen, os.O_WRONLY | os.O_APPEND), itertools.count(1)
    write_log = os.write  # the original, in case os.write is patched too

    def patched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            number = next(count)
            write_log(log, f"{name} {args[0]!s}\n".encode())
            if (number, when) == (at, "before"):
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **kwargs)
            finally:  # a call that fails counts too
                if (number, when) == (at, "after"):
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in calls:
        setattr(os, name, patched(name))
    code = act(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
