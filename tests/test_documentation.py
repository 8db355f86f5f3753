"""What the documentation says of the code is true: tables, settings, commands, links, sizes."""

import importlib.util
import inspect
import pathlib
import re

import pytest

import dpojax
from dpojax.config.load import setting_kinds
from dpojax.models.families.table import FAMILIES
from dpojax.objectives.policy_presets import PRESETS
from dpojax.objectives.settings import ALIASES, MOVING_SETTINGS, SHORTHANDS, keywords
from dpojax.objectives.table import OBJECTIVES

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    path
    for folder in ("configs", "dpojax", "experiments", "notebooks", ".")
    for path in (ROOT / folder).glob("**/*.md" if folder != "." else "*.md")
)
MAX_README_BYTES = 10_240


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def table_after(text, heading):
    """The rows of the first table under a heading, each a list of its cells."""
    below = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in below.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def code_names(cell):
    return tuple(re.findall(r"`([^`]+)`", cell))


def settings_of(row):
    """(settings that an objective needs, those that have a default)."""
    defaults = keywords(row.function)
    needed = [name for name, value in defaults.items() if value is inspect.Parameter.empty]
    if row.reference == "moving":
        needed += MOVING_SETTINGS
    return tuple(needed), tuple(name for name in defaults if name not in needed)


def links(text):
    """The targets of Markdown links that point into the repository."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", outside)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text):
    """The names that GitHub gives to a page's headings."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", outside, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def page_id(path):
    return str(path.relative_to(ROOT))


def test_the_objectives_of_the_page_are_those_of_the_code():
    page = read("dpojax/objectives/README.md")
    rows = {code_names(row[0])[0]: row for row in table_after(page, "Every name")}
    assert list(rows) == list(OBJECTIVES)
    for name, objective in OBJECTIVES.items():
        assert (code_names(rows[name][2]), code_names(rows[name][3])) == settings_of(objective), (
            name
        )
    listed = {
        code_names(row[0])[0]: code_names(row[1])[0] for row in table_after(page, "Short names")
    }
    assert listed == {**ALIASES, **SHORTHANDS}


def test_the_presets_of_the_page_are_those_of_the_code():
    rows = table_after(read("dpojax/objectives/README.md"), "Policy gradients and reward models")
    assert [code_names(row[0])[0] for row in rows] == list(PRESETS)
    for row, preset in zip(rows, PRESETS.values(), strict=True):
        clip = f"{preset.clip_low:g}, {preset.clip_high:g}"
        expected = (
            *(preset.advantage, preset.scale, preset.ratio),
            *("none" if clip == "inf, inf" else clip, preset.aggregate, preset.kl),
            *(f"{preset.beta:g}", str(preset.epochs)),
        )
        assert tuple(row[1:]) == expected


def test_what_the_packages_page_looks_up_is_there():
    for _, files, names in table_after(read("dpojax/README.md"), "Where is ...?"):
        folders = (ROOT / "dpojax", ROOT)
        paths = [folder / name for name in code_names(files) for folder in folders]
        text = "\n".join(path.read_text() for path in paths if path.is_file())
        for name in code_names(names):
            assert re.search(rf"^(?:def |class )?{name}\b", text, flags=re.MULTILINE), name


def test_the_families_of_the_page_are_those_of_the_code():
    rows = table_after(read("dpojax/models/README.md"), "Families")
    assert [code_names(row[0])[0] for row in rows] == list(FAMILIES)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_setting_that_a_page_names_exists(path):
    kinds = setting_kinds()
    sections = {name.split(".")[0] for name in kinds if "." in name}
    mappings = [name for name, kind in kinds.items() if str(kind).startswith("dict")]
    text = read(path)
    named = re.findall(r"`(\w+\.\w+)(?:=[^`]*)?`", text)
    named += re.findall(r"--config\.(\w+(?:\.\w+)+)", text)
    for name in named:
        if name.split(".")[0] not in sections or name.endswith(".py"):
            continue
        assert name in kinds or any(name.startswith(f"{m}.") for m in mappings), name


def test_every_setting_is_in_a_section_of_the_page():
    names = {name.split(".")[0] for name in setting_kinds() if "." in name}
    rows = table_after(read("configs/README.md"), "Changing a setting")
    assert {code_names(row[0])[0] for row in rows[1:]} == names


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_link_leads_somewhere(path):
    for link in links(read(path)):
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_command_module_and_test_that_a_page_names_exists(path):
    text = read(path)
    for name in re.findall(r"python -m (dpojax\.\w+)", text):
        assert name == "dpojax.NAME" or importlib.util.find_spec(name), name
    for name in re.findall(r"\b(?:tests|experiments|configs)/[\w/]+\.py\b", text):
        assert (ROOT / name).is_file(), name
    if path.name == "CHANGELOG.md":  # it names modules by where they were
        return
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
        assert any((folder / name).is_file() for folder in (ROOT, ROOT / "dpojax")), name


def test_the_readme_is_short_and_shows_every_name_of_the_api():
    text = read("README.md")
    assert len(text.encode()) <= MAX_README_BYTES
    named = re.findall(r"`(\w+)`", text.split("\n## From Python\n")[1].split("\n## ")[0])
    functions = {name for name in dpojax.__all__ if name[0].islower()} - {"losses"}
    assert functions <= set(named)


# README.md's own loop needs a model: tests/test_api.py runs it.
@pytest.mark.parametrize("name", ["dpojax/objectives/README.md"])
def test_the_python_of_a_page_runs(name):
    examples = re.findall(r"```python\n(.*?)```", read(name), flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, name, "exec"), {})


def test_the_newest_section_of_the_changelog_is_this_version():
    newest = re.search(r"^## \[(\d[\w.]*)\]", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert newest is not None and newest[1] == dpojax.__version__
