"""What is shipped and what it needs: metadata, source distribution, and both packages without the `fed` extra."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hetlora

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SHIPPED_FOLDERS = [name for name in ("hetlora", "hetlora_kernels", "tests", "docs", "examples", "benchmarks", "csrc", ".ci") if (ROOT / name).is_dir()]
TOP_FILES = [
    *("pyproject.toml", "setup.py", "MANIFEST.in", "Makefile", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", "mkdocs.yml"),
    *(".clang-format", ".pre-commit-config.yaml", ".gitignore"),
]
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.o", "*.egg-info", "_build_info.json", ".DS_Store")
FED_DISTRIBUTIONS = {re.split(r"[<>=;]", line)[0].strip() for line in PROJECT["optional-dependencies"]["fed"]}


def run_python(*arguments: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run this interpreter; `path` goes first on its module path."""
    # -O0: whether the sources are all there shows without the optimiser's minute.
    environment = dict(os.environ, CXXFLAGS="-O0", PYTHONPATH=os.pathsep.join(str(p) for p in (path, ROOT) if p is not None))
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def build(kind: str, source: Path, target: Path) -> Path:
    """Call the build backend as pip does with --no-build-isolation; returns the archive made."""
    target.mkdir()
    result = run_python("-c", f"import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))", target, cwd=source)
    assert result.returncode == 0, result.stderr
    (archive,) = target.iterdir()
    return archive


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from a copy so that no build product lands in the tree and none of the tree's is used."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in SHIPPED_FOLDERS:
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=NOT_SHIPPED)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, folder / "tree")
    return build("sdist", folder / "tree", folder / "dist")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> zipfile.ZipFile:
    """The wheel, built from nothing but the source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent.parent)
    tree = sdist.parent.parent / sdist.name.removesuffix(".tar.gz")
    (tree / "hetlora_kernels" / "benchmarks" / "__init__.py").touch()  # setuptools copies what is newer over what is older
    return zipfile.ZipFile(build("wheel", tree, sdist.parent.parent / "wheel"))


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


@pytest.fixture
def without_fed(tmp_path: Path) -> Path:
    """A module path under which every import of a module of the `fed` extra fails, in any interpreter started with it."""
    names = hetlora._FED_MODULES
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nfor name in {names!r}:\n    sys.modules[name] = None\n", encoding="utf-8")
    return tmp_path


def test_sdist_holds_every_file_of_the_project(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    expected = set(TOP_FILES)
    for folder in SHIPPED_FOLDERS:
        for path in (sdist.parent.parent / "tree" / folder).rglob("*"):
            if path.is_file():
                expected.add(path.relative_to(sdist.parent.parent / "tree").as_posix())
    assert not expected - shipped


@pytest.mark.slow
def test_wheel_from_the_sdist_holds_both_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    modules = {p.relative_to(ROOT).as_posix() for package in ("hetlora", "hetlora_kernels") for p in (ROOT / package).rglob("*.py")}
    modules |= {f"hetlora_kernels/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "benchmarks").glob("*.py")}
    assert not (modules | {"hetlora_kernels/benchmarks/page.html.j2"}) - set(wheel.namelist())
    assert not [name for name in wheel.namelist() if "benchmarks/results" in name]
    assert wheel.read("hetlora_kernels/benchmarks/__init__.py") == (ROOT / "benchmarks" / "__init__.py").read_bytes(), "not what stands for it in a checkout"
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hetlora", "hetlora_kernels"}


@pytest.mark.slow
def test_a_library_does_not_say_where_it_was_built(wheel: zipfile.ZipFile) -> None:
    (library,) = [name for name in wheel.namelist() if name.endswith("_C_cpu.so")]
    named = set(re.findall(rb"[\w./-]*/aggregate\.cpp|[\w./-]*/stable/[\w/]+\.h", wheel.read(library)))
    assert b"csrc/cpu/aggregate.cpp" in named and not [name for name in named if name.startswith(b"/")]


@pytest.mark.slow
def test_an_installed_copy_measures_a_row(wheel: zipfile.ZipFile, without_fed: Path) -> None:
    """Out of the checkout and with torch alone; the rung is the compiled one of the wheel."""
    wheel.extractall(without_fed)
    command = ["-m", "hetlora_kernels.benchmarks", "--tiny", "--suite", "server", "--only", "gram", "--threads", "1", "--device", "cpu", "--json", "a.json"]
    result = run_python(*command, cwd=without_fed, path=without_fed)
    assert result.returncode == 0, result.stderr
    data = json.loads((without_fed / "a.json").read_text())
    assert {case["op"] for case in data["cases"]} == {"copy", "read", "product", "gram"} and data["backends"]["gram"] == "cpu"
    where = run_python("-c", "import hetlora_kernels.benchmarks as b; print(b.__file__)", cwd=without_fed, path=without_fed).stdout
    assert Path(where.strip()) == without_fed / "hetlora_kernels" / "benchmarks" / "__init__.py"


@pytest.mark.slow
def test_an_installed_copy_says_how_its_extras_are_installed(wheel: zipfile.ZipFile, without_fed: Path, tmp_path: Path) -> None:
    """There is no folder to install from: pip takes the name, which it has."""
    wheel.extractall(tmp_path / "site")
    result = run_python("-c", "import hetlora", cwd=tmp_path, path=f"{tmp_path / 'site'}{os.pathsep}{without_fed}")
    assert result.returncode == 1 and result.stderr.endswith("run: pip install 'hetlora[fed]'\n"), result.stderr


@pytest.mark.slow
def test_wheel_requires_torch_only(wheel: zipfile.ZipFile) -> None:
    required = [line for line in metadata(wheel).get_all("Requires-Dist", []) if "extra ==" not in line]
    assert required == ["torch>=2.8"]


@pytest.mark.slow
def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    fields = metadata(wheel)
    assert (fields["Name"], fields["Version"], fields["Requires-Python"]) == ("hetlora", hetlora.__version__, ">=3.10")
    assert fields["License-Expression"] == "Apache-2.0"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(fields.get_all("Provides-Extra")) == set(extras)
    (entry_points,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    assert "hetlora = hetlora.__main__:main" in wheel.read(entry_points).decode()


def test_every_extra_is_documented() -> None:
    """README names each, and a page or the Makefile has the command that takes it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = "".join(
        path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")) if path.name != "CHANGELOG.md"
    )
    for extra in PROJECT["optional-dependencies"]:
        assert f"`{extra}`" in readme or f".[{extra}]" in readme, extra
        assert f".[{extra}]" in text, extra


def test_wheels_off_linux_are_refused(tmp_path: Path) -> None:
    (tmp_path / "uname").write_text("#!/bin/sh\necho Darwin\n")
    (tmp_path / "uname").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    # An interpreter that is not there: nothing is made, wherever it stops.
    done = subprocess.run(["make", "wheels", "PYTHON=/none"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("make: 'make wheels' needs Linux, whose wheels auditwheel repairs; this is Darwin. Here: ")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], "expected a wheel"),
        (["none.whl", "torch==2.13.0"], "expected a wheel, got none.whl"),
        (["Makefile"], "expected torch==VERSION after the wheel"),
        (["Makefile", "--", "-x"], "expected torch==VERSION after the wheel"),
        (["Makefile", "setup.py", "torch==2.13.0"], "expected torch==VERSION after the wheel, got setup.py"),
        (["Makefile", "torch==2.13.0", "setup.py"], "expected torch==VERSION after the wheel, got setup.py"),
    ],
)
def test_what_is_tried_is_one_wheel(given: list[str], why: str) -> None:
    done = subprocess.run([".ci/try-wheel", *given], cwd=ROOT, env={**os.environ, "PYTHON": "/none"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f".ci/try-wheel: {why}; usage: .ci/try-wheel WHEEL torch==VERSION ... [-- arguments of pytest]\n")


CROSS = "g++-aarch64-linux-gnu qemu-user-static"


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        ("aarch64", "needs Linux on x86-64, this is Linux aarch64; on aarch64 run make test"),
        ("x86_64", f"not installed: {CROSS}; as root: apt-get install --no-install-recommends {CROSS}"),
    ],
)
def test_what_another_processor_needs_is_named(machine: str, why: str, tmp_path: Path) -> None:
    """Nothing is fetched or installed before."""
    for name, text in {"uname": f"#!/bin/sh\necho Linux {machine}\n", "apt-get": "#!/bin/sh\nexit 9\n", "dpkg-deb": "#!/bin/sh\nexit 9\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in ("bash", "sh", "dirname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run([".ci/try-aarch64"], cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f".ci/try-aarch64: {why}\n")


def test_build_needs_no_torch() -> None:
    system = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    assert all(line.startswith("setuptools") for line in system["requires"])


def test_named_modules_of_the_fed_extra_are_the_declared_ones() -> None:
    names = {"yaml": "pyyaml"}
    checked = {names.get(name, name) for name in hetlora._FED_MODULES}
    assert checked | {"tomli"} == FED_DISTRIBUTIONS


def test_kernels_import_without_the_fed_extra(without_fed: Path) -> None:
    result = run_python("-c", "import hetlora_kernels", cwd=without_fed, path=without_fed)
    assert result.returncode == 0, result.stderr


def test_fused_layers_without_peft_say_what_to_install(without_fed: Path) -> None:
    result = run_python("-c", "from hetlora_kernels.peft import attach, fuse", cwd=without_fed, path=without_fed)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.endswith("hetlora_kernels.peft.fuse needs the packages peft and transformers: pip install peft transformers")


def test_import_without_the_fed_extra_says_what_to_install(without_fed: Path) -> None:
    result = run_python("-c", "import hetlora", cwd=without_fed, path=without_fed)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and "pip install '.[fed]'" in last and "pydantic" in last


def test_import_names_only_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['peft'] = None\n", encoding="utf-8")
    result = run_python("-c", "import hetlora", cwd=tmp_path, path=tmp_path)
    assert "(not installed: peft)" in result.stderr


def test_command_without_the_fed_extra_prints_one_line_and_exits_2(without_fed: Path) -> None:
    script = without_fed / "hetlora"
    script.write_text("import sys\nfrom hetlora.__main__ import main\nsys.exit(main())\n", encoding="utf-8")
    for arguments in (["-m", "hetlora", "demo"], [script, "demo"]):
        # `script` lies in `path`, which is also first on the module path: a file without .py cannot shadow the package.
        result = run_python(*arguments, cwd=without_fed, path=without_fed)
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        assert "pip install '.[fed]'" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_info_needs_the_kernels_alone(without_fed: Path) -> None:
    result = run_python("-m", "hetlora", "info", cwd=without_fed, path=without_fed)
    assert result.returncode == 0, result.stderr
    assert "Backend of each operation" in result.stdout and "lora_forward" in result.stdout
    assert "pip install '.[fed]'" in result.stdout


def test_tune_needs_triton_alone(without_fed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = run_python("-m", "hetlora", "tune", cwd=without_fed, path=without_fed)
    assert (result.returncode, result.stdout) == (2, "") and "tune: expected a CUDA device to measure on" in result.stderr
    (without_fed / "sitecustomize.py").open("a", encoding="utf-8").write("sys.modules['triton'] = None\n")
    result = run_python("-m", "hetlora", "tune", cwd=without_fed, path=without_fed)
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.startswith("hetlora: error: tune: needs triton")


def test_bench_needs_the_kernels_alone(without_fed: Path) -> None:
    """`sys.modules[name] = None` hides a module from an import and not from a search for it, so the command's own search is hidden too."""
    (without_fed / "sitecustomize.py").open("a", encoding="utf-8").write(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name in {hetlora._FED_MODULES!r} else find(name, *rest)\n"
    )
    tiny = ("-m", "hetlora", "bench", "--tiny", "--only", "gram", "--suite", "server", "--device", "cpu", "--report", "out")
    result = run_python(*tiny, cwd=without_fed, path=without_fed)
    assert result.returncode == 0, result.stderr
    assert "gram, tiny, 5 clients, float32" in result.stdout and "no report: not installed: matplotlib, jinja2, pydantic, safetensors" in result.stdout
    result = run_python("-m", "hetlora", "bench", "report", "out/bench.json", cwd=without_fed, path=without_fed)
    assert result.returncode == 2 and result.stderr.startswith("hetlora bench: error: report: not installed: matplotlib") and result.stderr.count("\n") == 1


def test_public_names_load_at_first_use(tmp_path: Path) -> None:
    code = "import sys, hetlora; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules); assert hetlora.Config.__module__ == 'hetlora.config'"
    result = run_python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert set(hetlora.__all__) <= set(dir(hetlora))
    assert callable(hetlora.simulate) and issubclass(hetlora.ConfigError, ValueError)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hetlora.nothing


def test_the_constraints_are_of_versions_that_the_project_allows():
    """Everything that `make venv` installs directly is in constraints.txt, in a version of the range that pyproject.toml gives."""
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    needed = [Requirement(text) for extra in ("fed", "flower", "test") for text in PROJECT["optional-dependencies"][extra]]
    needed = [own for own in needed if own.name not in ("hetlora", "setuptools") and (own.marker is None or own.marker.evaluate({"python_version": "3.11"}))]
    assert len(needed) > 20
    for own in [*needed, Requirement(PROJECT["dependencies"][0])]:
        assert own.specifier.contains(pinned[canonicalize_name(own.name)]), own
