"""What every command line shares: exit codes, signals, output in any encoding, and one run in a
workdir.
"""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import tiny

from dpojax.command_line import Output, memory_error, run_command
from dpojax.errors import CheckpointError, ConfigError, DataError, FitError, NumericsError
from dpojax.runtime import processes
from dpojax.runtime.log import MetricsLog
from dpojax.runtime.processes import hide_absent_tpus
from dpojax.runtime.signals import StopSignal
from dpojax.runtime.workdir import FILE, locked_workdir
from dpojax.untrusted.plain_data import check_output
from dpojax.weights import export

ROOT = pathlib.Path(__file__).parents[1]
HEAD = "import hashlib, os, sys, time\nfrom dpojax.command_line import leave, run_command\n"
# C that comes back to Python after an hour
NATIVE = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


def script(body, *, env=None, **options):
    """A process that runs `body` as the function of a command line."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    source = f"{HEAD}def body(stop):\n{lines}leave(run_command(body))\n"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | (env or {})
    pipes: dict[str, Any] = (
        dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) | options
    )
    return subprocess.Popen([sys.executable, "-c", source], env=environ, **pipes)


def signalled(body, *numbers):
    """(exit code, output, s until it ended) of a process that gets the signals once it says that it
    is ready.
    """
    process = script(f"print('ready')\n{body}")
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    start = time.monotonic()
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)
    output = process.communicate(timeout=60)[0]
    return process.returncode, output, time.monotonic() - start


# --- signals --------------------------------------------------------------------------------------

BUSY = "while True: pass"
IN_LOOP = "with stop:\n    stop(1)\n    "
SWALLOWED = (
    "class Lost:\n    def __del__(self):\n        time.sleep(30)\nx = Lost()\ndel x\nprint('went"
    " on')"
)


@pytest.mark.parametrize(
    ("body", "numbers", "code"),
    [
        (BUSY, [signal.SIGTERM], 143),
        (BUSY, [signal.SIGINT], 130),
        (NATIVE, [signal.SIGTERM], 143),
        (IN_LOOP + NATIVE, [signal.SIGINT, signal.SIGINT], 130),
        (IN_LOOP + NATIVE, [signal.SIGTERM, signal.SIGINT], 130),
        (IN_LOOP + BUSY, [signal.SIGINT, signal.SIGINT], 130),
        (SWALLOWED, [signal.SIGTERM], 143),
        pytest.param(
            "import dpojax.runtime.signals as c\nc.IN_LOOP_SECONDS = 1\n" + IN_LOOP + NATIVE,
            [signal.SIGTERM],
            143,
        ),
        pytest.param(
            "import dpojax.runtime.signals as c\nc.IN_LOOP_SECONDS = 1\n" + IN_LOOP + BUSY,
            [signal.SIGTERM],
            143,
        ),
    ],
)
def test_a_signal_ends_the_process_wherever_it_is(body, numbers, code):
    found, output, _ = signalled(body, *numbers)
    assert found == code and "Traceback" not in output and "went on" not in output, output


def test_a_step_that_ends_in_time_is_saved_first():
    body = IN_LOOP + "while not stop(2): time.sleep(0.05)\n    time.sleep(1)\n    print('saved')"
    code, output, _ = signalled(body, signal.SIGTERM)
    assert code == 143 and output.endswith("saved\n"), output


def test_signals_are_as_before_afterwards():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert run_command(lambda stop: None) == 0
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    time.sleep(0.05)
    assert "signals" not in [t.name for t in threading.enumerate()]
    with StopSignal() as stop:
        assert stop(1) == 0


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, NumericsError, FitError])
def test_an_error_is_one_line_and_its_exit_code(kind, capfd):
    def fail(stop):
        raise kind("the field is 3; make it 2")

    assert run_command(fail) == kind.exit_code
    assert capfd.readouterr().err == "error: the field is 3; make it 2\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes."),
        RuntimeError("INTERNAL: Failed to allocate 16.00GiB for new constant"),
        RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
        RuntimeError(
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 40G of"
            " 15.48G hbm."
        ),
        RuntimeError("Allocation (size=68719476736) would exceed memory (size=17179869184)"),
        RuntimeError("UNKNOWN: Unable to allocate 3.2 GiB"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
        MemoryError("Unable to allocate 1.00 TiB for an array with shape (1099511627776,)"),
        ValueError(
            "array is too big; `arr.size * arr.dtype.itemsize` is larger than the maximum possible"
            " size."
        ),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_full_memory_is_exit_6_in_any_wording(error, capfd):
    def fail(stop):
        raise error

    assert run_command(fail) == 6
    assert "the memory is full" in capfd.readouterr().err


def test_other_errors_are_no_full_memory():
    for error in (
        RuntimeError("INVALID_ARGUMENT: room for boom"),
        KeyError("out of memory"),
        ConfigError("out of memory"),
    ):
        assert memory_error(error) is None
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_command(lambda stop: (_ for _ in ()).throw(RuntimeError("a fault of ours")))


def test_files_that_cannot_be_written_are_exit_2_and_a_sentence(tmp_path, capfd):
    for place in (tmp_path / "gone/x", tmp_path):
        assert run_command(lambda stop, place=place: place.write_text("")) == 2
        assert capfd.readouterr().err.startswith(f"error: {tmp_path}")


def test_the_error_is_the_last_line_though_threads_go_on():
    body = (
        "import atexit, threading\n"
        "atexit.register(print, 'after the end')\n"
        "threading.Thread(target=lambda: time.sleep(1) or print('a thread')).start()\n"
        "from dpojax.errors import DataError\n"
        "raise DataError('x.jsonl:3: damaged')"
    )
    process = script(body)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 3 and output.splitlines()[-1] == "error: x.jsonl:3: damaged"


@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_output_in_any_encoding(env):
    process = script(
        "print('KL 1.2 \\xb1 0.3 \\u65e5')\nfrom dpojax.errors import ConfigError\nraise"
        " ConfigError('\\xb1')",
        env=env,
    )
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 2 and "KL 1.2 \\xb1 0.3" in output and "Traceback" not in output


def test_libtpu_is_left_alone_where_there_is_no_tpu(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.setattr(processes, "tpu_host", lambda: False)
    monkeypatch.setattr(processes, "_accelerator_files", lambda: False)
    for environ, platforms in (
        ({}, "cpu"),
        ({"JAX_PLATFORMS": "tpu"}, "tpu"),
        ({"TPU_WORKER_ID": "0"}, None),
    ):
        hide_absent_tpus(environ)
        assert environ.get("JAX_PLATFORMS") == platforms
    for name in ("tpu_host", "_accelerator_files"):
        environ = {}
        with monkeypatch.context() as patch:
            patch.setattr(processes, name, lambda: True)
            hide_absent_tpus(environ)
        assert environ == {}


# --- workdirs -------------------------------------------------------------------------------------

HOLDS = (
    "import pathlib\nfrom dpojax.runtime.workdir import locked_workdir\nwith"
    " locked_workdir(pathlib.Path(sys.argv[1])):\n    print('held')\n    time.sleep(60)"
)


def test_one_run_holds_a_workdir_and_a_kill_frees_it(tmp_path):
    source = f"import sys, time\n{HOLDS}"
    command = [sys.executable, "-c", source, str(tmp_path)]
    holder = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(ConfigError, match=rf"another run is using it \(process {holder.pid} on "),
        locked_workdir(tmp_path),
    ):
        pass
    holder.kill()
    holder.wait()
    assert (tmp_path / FILE).is_file()  # a kill leaves the file, and not the lock
    with locked_workdir(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["process"] == os.getpid()
    assert not (tmp_path / FILE).exists()


def test_a_run_that_is_refused_leaves_no_folder_and_one_that_ran_leaves_its_own(tmp_path):
    place = tmp_path / "runs" / "first"
    with pytest.raises(ConfigError, match="refused"), locked_workdir(place):
        raise ConfigError("refused")
    assert not list(tmp_path.iterdir())
    with locked_workdir(place):
        (place / "run.json").write_text("{}")
    assert [path.name for path in place.iterdir()] == ["run.json"]


def test_a_lock_is_no_way_to_other_files(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / FILE).symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"\.lock"), locked_workdir(tmp_path):
        pass
    assert (tmp_path / "other").read_text() == "mine"


def test_pipes_and_folders_are_neither_written_to_nor_replaced(tmp_path, capsys):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="a pipe or a device"):
        check_output(tmp_path / "metrics.jsonl")
    log = MetricsLog(tmp_path, enabled=True)
    for step in range(3):
        log.write(step, {"loss": 1.0})
    log.close()
    assert (
        capsys.readouterr().out.count("cannot be written") == 1
        and (tmp_path / "metrics.jsonl").is_fifo()
    )


def test_an_output_that_is_a_device_or_a_pipe_stays_one(tmp_path):
    (tmp_path / "null").symlink_to(os.devnull)
    out = Output(str(tmp_path / "null"))
    out.write({"a": 1})
    out.close()
    assert (tmp_path / "null").is_char_device() and [p.name for p in tmp_path.iterdir()] == ["null"]
    os.mkfifo(tmp_path / "rows.jsonl.tmp")
    with pytest.raises(ConfigError, match="no plain file"):
        Output(str(tmp_path / "rows.jsonl"))
    folder = tmp_path / "export"
    folder.mkdir()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ConfigError, match="a pipe or a device"):
        export.export_params(
            {},
            tiny.CONFIG,
            folder,
            fields={},
            dtype="float32",
            companions=None,
            progress=lambda n: None,
        )
    assert (folder / "config.json").is_fifo()
