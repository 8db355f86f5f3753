"""What the two sides of the sandbox share: its limits, its messages, and how one item is worked on.

sandbox.py is the parent's side, sandbox_child.py the child's.
"""

from collections.abc import Callable, Iterator
from typing import Any

MAX_ITEM_SECONDS = 2.0  # of processor time; a real dialogue takes less than a millisecond

# Of processor time, to unpack what the items share: the largest tokenizers take some seconds.
MAX_LOAD_SECONDS = 30.0

MAX_SILENT_SECONDS = 120.0  # of the clock: a child that waits for something uses no processor

MAX_BYTES = 4 * 2**30  # of the child's address space

MAX_TOGETHER = 64  # results that are sent at once

FLUSH_SECONDS = 0.1  # results wait for others at most so long

INSIDE = "DPOJAX_SANDBOX"  # set in the child's environment: what runs there needs no other child

HEADER = 8  # bytes that hold the length of a message

# The first byte of a message to the child.
TASK = b"T"
ITEM = b"I"


class SandboxError(Exception):
    """The child did not survive an item: its message is a predicate, "takes more than 2 s"."""


def framed(message: bytes) -> bytes:
    """A message after its length."""
    return len(message).to_bytes(HEADER, "little") + message


def take_messages(buffer: bytearray) -> Iterator[bytes]:
    """Takes the complete messages out of a buffer."""
    place = 0
    while len(buffer) - place >= HEADER:
        end = place + HEADER + int.from_bytes(buffer[place : place + HEADER], "little")
        if len(buffer) < end:
            break
        yield bytes(buffer[place + HEADER : end])
        place = end
    del buffer[:place]


def result_of(function: Callable[[Any, Any], Any], shared: Any, item: Any) -> Any:
    """function(shared, item), or what it raised."""
    try:
        return function(shared, item)
    except MemoryError:
        return SandboxError("takes too much memory")
    except RecursionError:
        return SandboxError("is nested too deep")
    except Exception as error:
        return error
    except BaseException as error:  # a panic of Rust's
        first = next(iter(str(error).splitlines()), "")
        return SandboxError(f"crashes: {first:.200}".removesuffix(": "))
