"""A process killed at a chosen moment: before or after its Nth act on the names of files, or its Nth fsync.

    ended = run_killed(main, ["train", ...], at=7, when="after")

runs `main(["train", ...])` in a process of its own, which sends itself SIGKILL after the seventh of its calls
of CALLS. Without `at`, or where there are fewer calls, it runs to its end, and `ended.was_killed` is false.
So a loop over `kills(...)` ends by itself:

    for ended in kills(main, ["fuse", ...], before_each=clean):
        ...  # what must hold after this kill

The processes are forked by a server that has imported this project, and has not used MLX: a kill costs what
the act itself costs. Where there is a GPU they begin from nothing, and take a second or two longer. The act
and its arguments must be picklable: a function of a module.
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
LONGEST = 120  # seconds

# A GPU's driver does not live through a fork.
SERVER: Any = multiprocessing.get_context("spawn" if mx.is_available(mx.gpu) else "forkserver")
SERVER.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True)
class Ended:
    code: int  # of the process; -9 where it was killed
    calls: list[str]  # each with its first argument, the last one too
    output: str  # what it printed, errors too

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
    """`act(*arguments)` in its own process, killed before or after the call number `at`, or by the clock."""
    with tempfile.TemporaryDirectory() as folder:
        seen, output = Path(folder, "calls"), Path(folder, "output")
        seen.touch()
        output.touch()
        process = SERVER.Process(target=in_child, args=(act, arguments, at, when, calls, seen, output))
        process.start()
        process.join(LONGEST if seconds is None else seconds)
        if process.exitcode is None and seconds is not None:
            process.kill()
            process.join()
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"not at its end after {LONGEST} seconds: {output.read_text('utf-8')}")
        lines = seen.read_text("utf-8", "replace").splitlines()
        return Ended(process.exitcode, lines, output.read_text("utf-8", "replace"))


def kills(
    act: Callable[..., Any],
    *arguments: Any,
    before_each: Callable[[], object],
    calls: Sequence[str] = CALLS,
    every: int = 1,
) -> Iterator[Ended]:
    """Killed before the first call, after it, before the second, ...; ends when a run reaches its end.

    Of these moments every so many is taken.
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
    """With the calls counted, each noted before it is made."""
    written = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(written, stream)
    log, count = os.open(seen, os.O_WRONLY | os.O_APPEND), itertools.count(1)
    note = os.write  # which may be among the calls

    def patched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            number = next(count)
            note(log, f"{name} {args[0]!s}\n".encode())
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
