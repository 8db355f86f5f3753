"""Compiled programs kept between runs: said once, bounded, healed, shared, and never counted as
compiled.
"""

import json
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from runs import ROOT, command, numbers, own_cache_environment, start

from dpojax.runtime.compiled import Program, news, totals


def cached_run(files, workdir, home):
    """A run as a user starts it, with the user's cache directory at `home`; its output."""
    env = own_cache_environment(home)
    done = subprocess.run(
        command(files, workdir), env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def programs(workdir):
    return json.loads((workdir / "summary.json").read_text())["programs"]


@pytest.mark.slow
def test_a_second_start_loads_every_program_and_equals_the_first_to_the_bit(plain, files, tmp_path):
    home = tmp_path / "home"
    first = cached_run(files, tmp_path / "first", home)
    second = cached_run(files, tmp_path / "second", home)
    for output in (first, second):
        assert output.count("compiled programs are kept in") == 1 and str(home) in output
    assert all(
        p["compiled"] == 1 and not p["loaded"] for p in programs(tmp_path / "first").values()
    )
    assert all(
        p["loaded"] == 1 and not p["compiled"] for p in programs(tmp_path / "second").values()
    )
    assert re.search(r"^loaded from the compilation cache .*dpo_step", second, re.MULTILINE)
    assert "compiled dpo_step" not in second and "time(s)" not in second
    # compiled elsewhere
    assert numbers(tmp_path / "first") == numbers(tmp_path / "second") == numbers(plain[0])
    noise = re.compile(
        r"^.*(warn|E0000|W0000|SIGILL|machine features|cpu_aot).*$", re.MULTILINE | re.IGNORECASE
    )

    def words(output):
        return {re.sub(r"\d+", "0", line[0]) for line in noise.finditer(output)}

    assert words(second) <= words(first)  # loading prints no alarm that compiling does not


# Three programs that take over 0.1 s to compile, as a run would compile them; prints what became of
# each.
THREE = """
import jax, jax.numpy as jnp
from dpojax.runtime import compiled
compiled.open_cache()
def body(x, n):
    for i in range(40 + n):
        x = jnp.sort(jnp.sin(x) @ jnp.cos(x).T, axis=i % 2) + i
    return x
made = [compiled.Program(str(n), lambda x, n=n: body(x, n)) for n in range(3)]
print([float(p(jnp.ones((8, 8))).sum()) for p in made], [p.compiled for p in made], [p.loaded for p in made])
"""


def test_damaged_and_cut_off_programs_are_compiled_and_written_anew(tmp_path):
    env = own_cache_environment(tmp_path)

    def three():
        argv = [sys.executable, "-c", THREE]
        done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
        return done.stdout

    first, second = three(), three()
    assert "[1, 1, 1] [0, 0, 0]" in first and second == first.replace(
        "[1, 1, 1] [0, 0, 0]", "[0, 0, 0] [1, 1, 1]"
    )
    (folder,) = (tmp_path / "dpojax").iterdir()
    flipped, short, cut_off, *_ = sorted(
        folder.glob("jit__lambda*-cache"), key=lambda p: p.stat().st_size
    )[-3:]
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 255
    flipped.write_bytes(content)
    short.write_bytes(short.read_bytes()[:1000])
    cut_off.with_name(cut_off.name.replace("-cache", "-atime")).unlink()
    assert three() == first  # all are compiled again, and nothing is said
    assert three() == second  # each was written anew


@pytest.mark.slow
def test_runs_at_once_share_the_folder(plain, files, tmp_path):
    env = own_cache_environment(tmp_path / "home")
    started = [start(files, tmp_path / str(i), env) for i in range(2)]
    outputs = [p.communicate(timeout=300)[0] for p in started]
    assert [p.returncode for p in started] == [0, 0], outputs
    assert numbers(tmp_path / "0") == numbers(tmp_path / "1") == numbers(plain[0])
    assert not any("Error" in output or "Warning" in output for output in outputs)


@pytest.mark.parametrize(
    "kind", ["a file", "others may write", "relative", "no home", "unwritable", "off"]
)
def test_a_folder_that_cannot_be_used_stops_nothing(tmp_path, kind):
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {
        "XDG_CACHE_HOME": str(tmp_path / "home")
    }
    place = tmp_path / "home/dpojax"
    if kind == "a file":
        place.parent.mkdir()
        place.write_text("")
    elif kind == "others may write":
        code = "from dpojax.runtime import compiled; print(compiled._machine())"
        name = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        (place / f"programs-{name}").mkdir(parents=True)
        (place / f"programs-{name}").chmod(0o777)
    elif kind == "relative":
        env |= {"XDG_CACHE_HOME": "here", "HOME": str(tmp_path)}
    elif kind == "no home":
        env = {k: v for k, v in env.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    elif kind == "off":
        env |= {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    elif kind == "unwritable":
        env |= {"XDG_CACHE_HOME": "/proc/nowhere"}
    code = (
        "from dpojax.runtime.compiled import open_cache; print(open_cache()); import jax;"
        " print(jax.jit(lambda x: x + 1)(1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.endswith("2\n"), done.stderr
    assert "Traceback" not in done.stderr and not (ROOT / "here").exists()
    expected = {
        "relative": f"are kept in {tmp_path}/.cache/dpojax/programs-",
        "no home": "\n2",
        "off": "\n2",
    }
    assert expected.get(kind, "are not kept") in done.stdout
    assert place.exists() == (kind in ("a file", "others may write"))


def test_a_line_gathers_what_was_compiled_and_loaded_since_the_last():
    made = {name: Program(name, lambda x: x + 1, enabled=False) for name in ("a", "b", "c")}
    assert news(made) == ""
    for program in made.values():
        program(jnp.zeros(3))
    made["b"].compiled, made["b"].loaded = 0, 1
    line = news(made)
    assert (
        re.fullmatch(r"(compiled|loaded from the compilation cache) a .*", line)
        and line.count(";") <= 1
    )
    assert all(re.search(rf"\b{name} \d+\.\ds", line) for name in made) and news(made) == ""
    made["c"].compiled, made["c"].loaded = 2, 0
    assert "compiled 2 time(s): c" in totals(
        made
    ) and "loaded from the compilation cache: b" in totals(made)


def test_programs_of_several_shapes_are_compiled_once_each():
    program = Program("total", lambda x: x.sum())
    for _ in range(3):
        assert [float(program(jnp.ones(n))) for n in (3, 5)] == [3, 5]
    assert program.compiled + program.loaded == 2
