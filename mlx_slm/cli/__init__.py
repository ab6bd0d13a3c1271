"""The command line: reads options, calls one function, prints its result. No logic beyond that.

Heavy modules are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator

import click

from mlx_slm import __version__
from mlx_slm.cli import data, info, plan, train, use
from mlx_slm.errors import Interrupted, SlmError
from mlx_slm.machine import runtime, watch

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
OUT_OF_MEMORY = (
    "out of memory: lower training.micro_rows (in fine-tuning finetuning.micro_rows), data.context_length or the model,"
    " or end other programs; what was saved is whole, the same command goes on from there"
)
NO_BACKEND = (
    "MLX has nothing to compute with on this machine: pip install 'mlx-slm[cpu]', or 'mlx-slm[cuda]' for an NVIDIA GPU"
)
NO_MEMORY = ("Unable to allocate", "Insufficient Memory", "out of memory", "can't start new thread")
"""How MLX (on a CPU, on Metal, on CUDA) and Python say so."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mlx-slm")
def cli() -> None:
    """Small, specialised language models on MLX.

    Pretrain once on a large generic text set, specialise to a domain with little text, run the result locally.
    Start with `mlx-slm quickstart`.
    """


for module in (train, data, use, plan, info):
    for command in module.COMMANDS:
        cli.add_command(command)


def main() -> None:
    """Run a command; exit with 0 done, 1 failed, 2 wrong usage, 3 another rank is lost, 130 interrupted."""
    if os.environ.get(runtime.PARENT):
        runtime.end_with(int(os.environ[runtime.PARENT]))
    with last_words(bool(set(sys.argv[1:]) & COMPUTING)):
        code = run(sys.argv[1:])
    if code == INTERRUPTED or "serve" in sys.argv[1:]:
        # The device may compute and a server's threads may end: taking the interpreter apart around them can abort.
        for worker in multiprocessing.active_children():
            worker.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


COMPUTING = {"quickstart", "prepare", "pretrain", "specialize", "cluster", "evaluate", "generate", "serve", "study"}


@contextlib.contextmanager
def last_words(wanted: bool) -> Iterator[None]:
    """While a process outlives this one, it can say what happened where the system ends this one without a chance to:
    MLX aborts where a thread of its own gets no memory, and Linux kills."""
    if not wanted:
        yield
        return
    ended, alive = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        os.close(alive)
        os.setpgid(0, 0)  # Ctrl-C is for the other
        for sign in (signal.SIGTTOU, signal.SIGINT):
            signal.signal(sign, signal.SIG_IGN)
        if not os.read(ended, 1):
            os.write(2, f"mlx-slm: error: ended by the system or by kill -9; if not by you: {OUT_OF_MEMORY}\n".encode())
        os._exit(0)
    os.close(ended)

    def said() -> None:
        with contextlib.suppress(BrokenPipeError):  # it may have been killed as well
            os.write(alive, b".")

    watch.before_exit.append(said)
    try:
        yield
    finally:
        watch.before_exit.remove(said)
        said()
        os.close(alive)
        with contextlib.suppress(KeyboardInterrupt):  # a signal while this ends: it ends
            os.waitpid(watcher, 0)


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code; an error that the user can mend is one sentence on stderr."""
    for stream in (sys.stdout, sys.stderr):  # names of files need not be text in the terminal's encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        cli.main(arguments, prog_name="mlx-slm", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return USAGE
    except click.UsageError as error:
        error.show()
        return USAGE
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        if isinstance(error.__cause__, EOFError):
            raise error.__cause__ from None
        return _fail("interrupted; what was finished is kept, the same command again goes on from there", INTERRUPTED)
    except Interrupted as error:
        return _fail(str(error), INTERRUPTED)
    except SlmError as error:
        return _fail(f"error: {error}", FAILED)
    except ImportError as error:
        if "libmlx" not in str(error):
            raise
        return _fail(f"error: {NO_BACKEND}", FAILED)
    except BrokenPipeError:
        return FAILED
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            name = error.filename2 or error.filename  # of a copy the second is what is written
            where = f" writing {name}" if name else ""
            return _fail(
                f"error: no space left on the disk{where}: free some and run the same command again; nothing is lost, "
                "it goes on from the last whole checkpoint or shard",
                FAILED,
            )
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR):
            return _fail(
                f"error: {error.filename}: {error.strerror}: mend its rights or those of its folder, or name another",
                FAILED,
            )
        if error.filename is None:
            raise
        return _fail(f"error: {str(error.filename)[:200]}: {error.strerror}", FAILED)
    except (MemoryError, RuntimeError) as error:
        from mlx_slm.machine.ranks import is_lost

        if is_lost(error):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which a launcher ends the others: there is a word to say
            return _fail(f"error: {watch.who_is_lost()}: {watch.RESTART}", watch.LOST)
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in NO_MEMORY):
            raise
        return _fail(f"error: {OUT_OF_MEMORY}", FAILED)
    watch.say_end("")
    return DONE


def _fail(text: str, code: int) -> int:
    click.echo(f"mlx-slm: {text}", err=True)
    watch.say_end(text.removeprefix("error: "))
    return code
