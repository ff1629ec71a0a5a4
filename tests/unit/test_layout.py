"""Guards of the repository's layout; STYLE says why each of them."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SLICES = ("core", "proto", "discovery", "layerstore", "snapshotter", "afslet", "proxy", "client")
BIN = Path(sys.executable).parent


def sources() -> list[Path]:
    """Every Python file that is shipped and written by people."""
    return [path for part in SLICES for path in (ROOT / part).rglob("*.py") if "_pb2" not in path.name]


def test_no_slice_hides_the_others() -> None:
    """A regular package ``afs`` in one source root would hide all other roots."""
    assert [part for part in SLICES if (ROOT / part / "afs" / "__init__.py").exists()] == []
    assert [part for part in SLICES if not (ROOT / part / "afs" / part).is_dir()] == []


def test_folders_do_not_shadow_packages_of_others() -> None:
    assert not (ROOT / "packaging" / "__init__.py").exists()
    assert [part for part in SLICES if (ROOT / part / "__init__.py").exists()] == []


@pytest.mark.parametrize("part", SLICES)
def test_every_package_is_typed(part: str) -> None:
    assert (ROOT / part / "afs" / part / "py.typed").is_file()


def test_every_slice_is_built_and_checked() -> None:
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert sorted(wheel["only-include"]) == sorted(f"{part}/afs" for part in SLICES)
    assert sorted(wheel["sources"]) == sorted(SLICES)
    assert {f"{part}/afs" for part in SLICES} <= set(PYPROJECT["tool"]["mypy"]["files"])
    assert set(SLICES) <= set(PYPROJECT["tool"]["pyright"]["include"])


def test_imports_point_one_way() -> None:
    done = subprocess.run([BIN / "lint-imports"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_generated_stubs_are_up_to_date() -> None:
    argv = [sys.executable, str(ROOT / "proto" / "generate.py"), "--check"]
    done = subprocess.run(argv, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_stay_small() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert {path: size for path, size in sizes.items() if size > 400} == {}


@pytest.mark.parametrize("name", list(PYPROJECT["project"]["scripts"]))
def test_commands_exist(name: str) -> None:
    module, _, attribute = PYPROJECT["project"]["scripts"][name].partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert callable(command)
