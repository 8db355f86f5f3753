"""The rooms of the house: imports go one way, without circles; each says what it answers."""

import ast
import collections
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "dpojax"
# A module imports from its own room and from those before it. Rooms in one row are beside each
# other: none of them imports another.
ORDER = (
    ("errors",),
    ("untrusted",),
    ("objectives",),
    ("config",),
    ("runtime",),
    ("data",),
    ("models",),
    ("training",),
    ("weights",),
    ("generation",),
    ("evaluation",),
    ("algorithms",),
    ("cost", "whole_run", "own_loop"),
    ("command_line",),
)
COMMANDS = ("main", "audit", "generate", "score", "compare", "convert", "sweep", "plan")
# The names that `import dpojax` gives, thin and without a room.
NAMES = ("__init__", "losses", "exact", "configs")
# Rooms of one file.
FILES = {"errors", "whole_run", "own_loop", "command_line"}
LEVELS = {room: level for level, row in enumerate(ORDER) for room in row}


def modules():
    """Dotted name -> path of every module of the package."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 2:
            parts.pop()
        names[".".join(parts)] = path
    return names


def imports():
    """Module -> the modules of the package that it imports, wherever in it."""
    names = modules()
    graph = collections.defaultdict(set)
    for name, path in names.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            if node.module.split(".")[0] != "dpojax":
                continue
            for alias in node.names:
                target = f"{node.module}.{alias.name}"
                graph[name].add(target if target in names else node.module)
    return graph


def room_of(module):
    return module.split(".")[1]


def test_what_stands_at_the_top_is_what_one_can_run():
    top = {path.stem for path in PACKAGE.glob("*.py")}
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert top == {*COMMANDS, *NAMES, *FILES}
    assert rooms == set(LEVELS) - FILES


def test_imports_go_one_way():
    upward = []
    for module, targets in imports().items():
        room = room_of(module)
        if room in NAMES:
            continue
        for target in targets - {"dpojax"}:
            other = room_of(target)
            if other == room or other in NAMES:
                continue
            if room in COMMANDS:
                # main's joining of processes is what sweep and plan share with it
                if other in COMMANDS and other != "main":
                    upward.append((module, target))
                continue
            if other in COMMANDS or LEVELS[other] >= LEVELS[room]:
                upward.append((module, target))
    assert not upward


def test_imports_make_no_circle():
    graph = imports()
    done = set()

    def visit(module, path):
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module in done:
            return
        for target in sorted(graph[module]):
            if target not in (module, "dpojax"):
                visit(target, [*path, module])
        done.add(module)

    for module in sorted(graph):
        visit(module, [])


@pytest.mark.parametrize("room", sorted(set(LEVELS) - FILES))
def test_a_room_says_what_it_answers(room):
    text = (PACKAGE / room / "__init__.py").read_text()
    assert ast.get_docstring(ast.parse(text)), f"dpojax/{room}/__init__.py has no docstring"
