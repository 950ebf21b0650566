"""launch/Dockerfile, without Docker: what it copies, what it installs, what a job then runs."""

import configparser
import pathlib
import re
import shlex

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

LAUNCH = ROOT / "launch"


@pytest.fixture(scope="module")
def steps() -> dict[str, list[str]]:
    """{instruction: its arguments}; each instruction but one of a kind stands once."""
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line and line[0] != "#"]
    assert [line[0] for line in lines] == ["FROM", "WORKDIR", "COPY", "RUN", "ENV"]
    return {instruction: shlex.split(arguments) for instruction, arguments in lines}


def is_copied(path: str) -> bool:
    """`COPY . .` puts it into the image."""
    return (ROOT / path).is_file() and not ignored(path)


def ignored(path: str) -> bool:
    """By the file beside the Dockerfile, which Docker takes before a .dockerignore."""
    parts = pathlib.PurePosixPath(path).parts
    starts = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    return any(
        re.fullmatch(_pattern(line), start)
        for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
        for start in starts
    )


def _pattern(line: str) -> str:
    """The lines in use: names, and `**/` for any number of folders."""
    assert re.fullmatch(r"(\*\*/)?[\w.]+", line), f"{line}: a form that this test does not know"
    return line.replace(".", r"\.").replace("**/", "(.*/)?")


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_python_of_the_image_is_supported_and_pinned(steps):
    (image,) = steps["FROM"]
    version = re.fullmatch(r"python:(3\.\d+)-slim", image)[1]
    assert Version(version) in SpecifierSet(setup()["options"]["python_requires"])
    constraints = steps["RUN"][steps["RUN"].index("--constraint") + 1]
    assert constraints == f"constraints/python{version}.txt"
    assert is_copied(constraints)


def test_pip_installs_an_extra_that_there_is_with_pinned_versions(steps):
    words = steps["RUN"]
    assert words[:2] == ["pip", "install"] and "--editable" in words
    extras = re.fullmatch(r"\.\[([\w,]+)\]", words[-1])[1].split(",")
    options = setup()
    assert "tpu" in extras and set(extras) <= set(options["options.extras_require"])
    assert is_copied("setup.cfg") and is_copied("pyproject.toml")
    # What is installed by name has a version that the constraints allow.
    constraints = (ROOT / words[words.index("--constraint") + 1]).read_text()
    lines = [line.partition("#")[0].strip() for line in constraints.splitlines()]
    pinned = {canonicalize_name(r.name): r for r in (Requirement(line) for line in lines if line)}
    python = re.search(r"python(3\.\d+)", words[words.index("--constraint") + 1])[1]
    wanted = options["options"]["install_requires"]
    wanted += "".join(options["options.extras_require"][extra] for extra in extras)
    for line in filter(None, (line.partition("#")[0].strip() for line in wanted.splitlines())):
        requirement = Requirement(line)
        environment = {"python_version": python, "sys_platform": "linux"}
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        (pin,) = pinned[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "==" and pin.version in requirement.specifier, line


def test_the_image_holds_what_its_jobs_run(steps):
    """Working directory is the repository, so the relative paths of the commands are there."""
    assert steps["WORKDIR"] == ["/moe_embed_jax"] and steps["COPY"] == [".", "."]
    _, job = yaml.safe_load_all((LAUNCH / "gke_job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    commands = container["args"][0] + (ROOT / "docs" / "tpu_pods.md").read_text()
    named = set(re.findall(r"(?<![\w/])(?:launch|configs)/\w+\.py\b", commands))
    assert {"launch/train.py", "configs/quickstart.py"} <= named
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "moe_embed_jax").rglob("*.py")}
    assert len(modules) > 100
    assert [path for path in sorted(named | modules) if not is_copied(path)] == []
    assert steps["ENV"] == ["PYTHONUNBUFFERED=1"]


def test_what_a_checkout_gathers_stays_out_of_the_image():
    for path in (
        ".git/config",
        ".venv/bin/python",
        "runs/quickstart/checkpoints/1",
        "x/__pycache__/y",
    ):
        assert ignored(path), path
    for path in ("moe_embed_jax/recipe/runs.py", "configs/recipe.py", ".gitignore"):
        assert not ignored(path), path
