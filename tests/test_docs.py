"""What the pages name exists: files, headings, variants of configs, keys, programs."""

import importlib.util
import re
from pathlib import Path
from unittest.mock import create_autospec

import jax.numpy as jnp
import pytest

from alignprop_jax import sample, train
from alignprop_jax.config import check_key, load_config, validate

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
    *sorted(ROOT.glob("alignprop_jax/assets/*/README.md")),
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@every_page
def test_links_lead_somewhere(page):
    broken = [link for link in links(page) if not leads_somewhere(page, link)]
    assert not broken


@every_page
def test_commands_name_what_exists(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    for module in re.findall(r"python -m ((?:alignprop_jax|examples)(?:\.[a-z]\w*)+)", text):
        assert importlib.util.find_spec(module), module
    # VARIANT and KEY in capitals stand for any.
    for config in re.findall(r"configs/\w+\.py(?::[a-z]\w*)?", text):
        load_config(config)
    for key in re.findall(r"--config\.([a-z][\w.]*)", text):
        check_key(key)


def test_the_house_is_as_its_plan_says():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = re.findall(r"(?<![\w./])[\w/]+(?:\.py|/)(?![\w*])", text)
    absent = [
        name
        for name in names
        if not any((place / name).exists() for place in (ROOT, ROOT / "alignprop_jax"))
    ]
    assert not [name for name in absent if "NAME" not in name]
    modules = [path for path in ROOT.glob("alignprop_jax/*") if "__" not in path.name]
    assert not [path for path in modules if f"{path.name}{'/' * path.is_dir()}" not in names]


def test_the_readme_lists_every_page():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(README)}
    assert not set(PAGES) - linked - {README, ROOT / "alignprop_jax/assets/laion/README.md"}


def test_the_readme_takes_two_minutes():
    text = README.read_text()
    assert len(text.split()) <= 900
    prose = [line for line in without_code(text).splitlines() if not line.startswith("|")]
    assert not [line for line in prose if len(line) > 120]


def test_the_lines_of_python_in_the_readme_run(monkeypatch):
    """All but the hours: what is trained and sampled with is checked, and not done."""
    reward, lines = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(reward, names)
    red_and_blue = jnp.zeros((2, 4, 4, 3)).at[0, ..., 0].set(1.0).at[1, ..., 2].set(1.0)
    assert names["score"](red_and_blue, jnp.zeros((2, 7), int)).tolist() == [1.0, -1.0]

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "train", create_autospec(train.train))
    monkeypatch.setattr(sample, "sample", create_autospec(sample.sample))
    exec(lines, {})
    validate(train.train.call_args.args[0])
    assert sample.sample.called


def links(page):
    """The relative ones, of pictures too."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    return [link for link in found if not re.match(r"https?://", link)]


def leads_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(page):
    """Of its headings, as GitHub makes them; no page has a heading twice."""
    titles = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def without_code(text):
    """Without blocks that are fenced or indented."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
