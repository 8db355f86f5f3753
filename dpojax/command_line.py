"""What every command line shares: flags, errors and exit codes, signals, output in any encoding,
and the way out.
"""

import argparse
import collections
import contextlib
import errno
import io
import os
import pathlib
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dpojax.errors import (
    ConfigError,
    DpojaxError,
    FitError,
    Interrupted,
    did_you_mean,
    nearest_setting,
)
from dpojax.runtime.compiled import open_cache
from dpojax.runtime.log import finite_json, say
from dpojax.runtime.processes import hide_absent_tpus, launcher
from dpojax.runtime.signals import StopSignal, end_workers
from dpojax.untrusted.plain_data import number_fault

# How JAX, XLA, CUDA, NumPy and the kernel say that memory is full.
_FULL = re.compile(
    r"resource_?exhausted|out[ _-]?of[ _-]?(?:host |device )?memory|\boom\b|"
    r"(?:failed|unable|cannot|could not) to allocate|cannot allocate memory|can't allocate|"
    r"bad_alloc|insufficient memory|not enough memory|"
    r"(?:exceed|ran out)\w*\b.{0,80}\b(?:memory|hbm|vmem)|"
    r"(?:memory|hbm|vmem|allocation)\b.{0,80}\bexceed|"
    r"array is too big|maximum allowed (?:dimension|size)",
    re.IGNORECASE,
)

# --- errors ---------------------------------------------------------------------------------------


def memory_error(error: BaseException) -> FitError | None:
    """`error` as a FitError where it says that some memory is full; else None."""
    if isinstance(error, DpojaxError):
        return None
    is_full = isinstance(error, MemoryError)
    if isinstance(error, OSError):
        is_full |= error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError | ValueError | OSError):
        is_full |= _FULL.search(str(error)) is not None
    if not is_full:
        return None
    first = next(iter(str(error).splitlines()), "") or "no more memory"
    return FitError(
        f"the memory is full: {first:.400}; lower data.micro_batch_tokens (--batch_size or"
        " --micro_batch_tokens of a tool) or model.logps_chunk_tokens, set model.remat=full, or"
        " spread the parameters (mesh.fsdp, mesh.tensor)"
    )


def _thread_failed(failure: Any, shown=threading.excepthook) -> None:
    """Answers a library's thread that could not write a file: one line, and the run goes on."""
    if not isinstance(failure.exc_value, OSError):
        shown(failure)
        return
    name = getattr(failure.exc_value, "filename", None) or "a file"
    print(
        f"warning: {name} cannot be written ({failure.exc_value.strerror}); the run goes on",
        flush=True,
    )


def _hide_stopped_reads(hooked: Any, shown=sys.unraisablehook) -> None:
    """Hides the noise of Orbax: its first failed read closes the event loop, and its other reads
    then end with "Event loop is closed", after the error that the user reads.
    """
    is_noise = (
        isinstance(hooked.exc_value, RuntimeError)
        and str(hooked.exc_value) == "Event loop is closed"
    )
    if not is_noise:
        shown(hooked)


def _file_error(error: OSError) -> str:
    """What a person reads of a file or folder that cannot be read or written."""
    reason = error.strerror
    if isinstance(error, FileExistsError | NotADirectoryError):
        reason = "a file lies where a folder belongs"
    return (
        f"{error.filename or 'a file'}: {reason}; the disk or folder must be writable, and its"
        " files plain files"
    )


def run_command(function: Callable[[StopSignal], int | None]) -> int:
    """function(the question when to stop) as a command line: returns its exit code.

    What a user can mend becomes one line on standard error and its exit code; so do full memory
    (FitError's) and files and folders that cannot be read or written (ConfigError's). Anything else
    is a fault of dpojax, and passes.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal or file that is not UTF-8 shows an escape; it would end the run otherwise.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    threading.excepthook = _thread_failed
    sys.unraisablehook = _hide_stopped_reads
    hide_absent_tpus()
    stop = StopSignal()
    with stop.installed():
        try:
            return function(stop) or 0
        except Interrupted as stopped:
            return stopped.exit_code
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # who reads the output has left, e.g. `| head`
            sys.stdout = None
            return 1
        except DpojaxError as error:
            return _print_error(error, error.exit_code)
        except Exception as error:
            full = memory_error(error)
            if full is not None:
                return _print_error(full, full.exit_code)
            if isinstance(error, OSError) and error.strerror:
                return _print_error(_file_error(error), ConfigError.exit_code)
            raise


def _print_error(error: object, code: int) -> int:
    """Prints an error as one line on standard error; returns `code`."""
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    if os.environ.get("DPOJAX_TRACEBACK"):
        traceback.print_exc()
    return code


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code.

    After an error it ends at once: threads that still run would print below the last line.
    """
    if code and not launcher(os.environ):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        end_workers()
        os._exit(code)
    sys.exit(code)


# --- flags ----------------------------------------------------------------------------------------


def _read_number(text: str, kind: type) -> Any:
    try:
        value = kind(text)
    except (ValueError, OverflowError):
        value = None
    fault = number_fault(value, kind)
    if fault is not None:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: {fault}")
    return value


def _read_int(text: str) -> int:
    return _read_number(text, int)


def _read_float(text: str) -> float:
    return _read_number(text, float)


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose numbers fit 32 bits, and whose errors are ConfigErrors that name the
    nearest flag or choice.

    Args:
      sections: which flags of the form --SECTION.KEY=VALUE there are, besides those that are added.
    """

    def __init__(self, *args: Any, sections: Sequence[str] = (), **settings: Any):
        super().__init__(*args, **settings)
        self.sections = sections
        self.register("type", int, _read_int)
        self.register("type", float, _read_float)

    def parse_command_line(
        self, argv: Sequence[str]
    ) -> tuple[argparse.Namespace, dict[str, dict[str, str]]]:
        """The flags, and the texts of --SECTION.KEY=VALUE by section and key.

        Raises: ConfigError for what is not understood.
        """
        flags: list[str] = []
        texts: dict[str, dict[str, str]] = {section: {} for section in self.sections}
        queue = collections.deque(argv)
        while queue:
            argument = queue.popleft()
            name, equals, text = argument.partition("=")
            section, dot, key = name.removeprefix("--").partition(".")
            if not (name.startswith("--") and dot and section in texts):
                flags.append(argument)
                continue
            if not equals:
                if not queue:
                    self.error(f"{name} needs a value: {name}=VALUE")
                text = queue.popleft()
            texts[section][key] = text
        return self.parse_args(flags), texts

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The flags alone. Raises: ConfigError for what is not understood."""
        values, unknown = self.parse_known_args(args, namespace)
        self._refuse_dashes(values)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("--"):
                self.error(
                    f"argument {unknown[0]!r:.80} is not understood; flags look like --NAME=VALUE"
                )
            self.error(f"flag {name:.80} is unknown{self.nearest(name.removeprefix('--'))}")
        return values

    def _refuse_dashes(self, values: argparse.Namespace) -> None:
        """Refuses `--flag=--`, which argparse before Python 3.13 takes for an empty list."""
        for action in self._actions:
            value = getattr(values, action.dest, None)
            is_repeated = isinstance(action.default, list)
            entries = value if is_repeated and isinstance(value, list) else [value]
            if any(isinstance(entry, list) for entry in entries):
                self.error(f"argument {action.option_strings[0]}: '--' is no value")

    def nearest(self, name: str) -> str:
        """`did_you_mean` of a flag without its dashes; a setting's name without its section is near
        that setting.
        """
        section, dot, key = name.partition(".")
        for known in self.sections:
            if dot and section != known and did_you_mean(section, [known]):
                return f"; did you mean --{known}.{key or 'KEY'}?"
        flags = [
            flag.removeprefix("--")
            for action in self._actions
            for flag in action.option_strings
            if flag.startswith("--")
        ]
        near = did_you_mean(name, flags)
        if self.sections:
            # Imported late, so that --help of the tools does not wait for the objectives.
            from dpojax.config.load import setting_kinds

            settings = [f"{self.sections[0]}.{key}" for key in setting_kinds()]
            if dot or not near:
                near = nearest_setting(name, settings) or near
        return near.replace("did you mean ", "did you mean --")

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError with the message alone: the usage is what --help prints."""
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            message += did_you_mean(choice[1], choice[2].replace("'", "").split(", "))
        raise ConfigError(f"{message}; {self.prog} --help lists the flags")


# --- output ---------------------------------------------------------------------------------------


class Output:
    """A JSONL file that is complete or does not exist; "-" is the standard output.

    It is a context: rows that an error cut off are removed at its end.

    Attributes:
      path: of the file; None for the standard output.
      in_place: whether `path` is a device or a pipe, which is written to and stays what it is.
    """

    def __init__(self, name: str):
        self.path: pathlib.Path | None = None
        self.in_place = False
        if name == "-":
            return
        self.path = pathlib.Path(name)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.in_place = self.path.exists() and not self.path.is_file()
            self.written = self.path
            if not self.in_place:
                self.written = self.path.with_name(self.path.name + ".tmp")
                if self.written.exists() and not self.written.is_file():
                    raise ConfigError(f"--out={name!r}: {self.written} is no plain file")
            self.file = self.written.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--out={name!r}: cannot be written: {error.strerror or error}"
            ) from error

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind, *exception) -> None:
        if self.path is None or self.file.closed:
            return
        if kind is None:
            self.close()
            return
        self.file.close()
        if not self.in_place:
            self.written.unlink(missing_ok=True)

    def write(self, row: dict[str, Any]) -> None:
        """Writes one line; numbers that JSON does not have become null."""
        file = None
        if self.path is not None:
            file = self.file
        print(finite_json(row), file=file)

    def close(self) -> None:
        """Puts the file in its place."""
        if self.path is not None:
            self.file.close()
            if not self.in_place:
                self.written.replace(self.path)


def note(message: str, out: Output) -> None:
    """Prints a line for the person at the terminal, on standard error where the rows themselves go
    to the standard output.
    """
    if out.path is None:
        print(message, file=sys.stderr, flush=True)
    else:
        say(message)


def run_tool(
    function: Callable[[argparse.Namespace], None], parser: Parser, argv: Sequence[str]
) -> int:
    """function(the flags) as a command line that keeps compiled programs; returns its exit code."""

    def tool(stop: StopSignal) -> None:
        del stop  # nothing is saved between rows: a signal ends the process
        args = parser.parse_args(argv)
        open_cache()
        function(args)

    return run_command(tool)
