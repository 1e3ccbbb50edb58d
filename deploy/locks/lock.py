"""Writes `deploy/locks/*.txt` from `pyproject.toml`: `make lock`, in `.venv`.

One lock serves every Python and machine that vLLM has packages for. Versions
that still fit are kept; `make lock ARGS=--upgrade` takes the newest.
"""

import subprocess
import sys
import tempfile
import tomllib
from itertools import product
from pathlib import Path

from packaging.markers import Marker, default_environment

LOCKS = Path(__file__).resolve().parent
ROOT = LOCKS.parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MACHINES = ("x86_64", "aarch64")


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        stand_ins = Path(name)
        make_torch_stand_ins(stand_ins)
        torch = (
            *("--override", str(LOCKS / "cpu-overrides.txt")),
            *("--find-links", str(stand_ins)),
        )
        compile_locks("cpu", *torch, *arguments)
    compile_locks("gpu", *arguments)


def compile_locks(device: str, *arguments: str) -> None:
    """Write the lock of a checkout, and of it what deploy/docker puts into an image."""
    compile_lock(device, "--extra", device, "--extra", "dev", *arguments)
    checkout = ("--constraint", str(LOCKS / f"{device}.txt"))
    compile_lock(f"{device}-image", "--extra", device, *checkout, *arguments)


def make_torch_stand_ins(folder: Path) -> None:
    """Put empty wheels of torch's CPU build into `folder`.

    That build is not on PyPI, and a find-links folder rarely has it for every
    Python, without which there is no lock for every Python. What it requires
    stands in pyproject.toml, so nothing is read but the names.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = project["tool"]["uv"]["dependency-metadata"][0]["version"]
    for python, machine in product(PYTHONS, MACHINES):
        tag = "cp" + python.replace(".", "")
        (folder / f"torch-{version}-{tag}-{tag}-manylinux_2_28_{machine}.whl").touch()


def compile_lock(name: str, *arguments: str) -> None:
    lock = LOCKS / f"{name}.txt"
    uv = Path(sys.executable).with_name("uv")
    subprocess.run(
        [
            *(uv, "pip", "compile", "--quiet", "pyproject.toml", "--output-file", lock),
            *("--universal", "--python-version", PYTHONS[0]),
            *("--no-header", "--no-emit-find-links", "--no-emit-index-url", *arguments),
        ],
        cwd=ROOT,
        check=True,
    )
    lines = lock.read_text().splitlines()
    lock.write_text("".join(simplified(line) + "\n" for line in lines))
    print(f"{lock.relative_to(ROOT)}: {sum('==' in line for line in lines)} packages")


def simplified(line: str) -> str:
    """Return `line` with the shortest marker that says the same where vLLM runs.

    uv writes out the environments of pyproject.toml on every line.
    """
    pin, separator, text = line.partition(" ; ")
    if not separator:
        return line
    marker = Marker(text)
    truth = [marker.evaluate(environment) for environment in environments()]
    for candidate in candidates():
        if truth == [not candidate or Marker(candidate).evaluate(e) for e in environments()]:
            return f"{pin} ; {candidate}" if candidate else pin
    return line


def candidates() -> list[str]:
    pythons = [
        f"python_version {sign} '{python}'" for python in PYTHONS[1:] for sign in ("<", ">=")
    ]
    machines = [f"platform_machine == '{machine}'" for machine in MACHINES]
    both = [f"{python} and {machine}" for python, machine in product(pythons, machines)]
    return ["", *pythons, *machines, *both]


def environments() -> list[dict[str, str]]:
    here = {name: str(value) for name, value in default_environment().items()}
    here |= {"sys_platform": "linux", "platform_system": "Linux"}
    return [
        {
            **here,
            "python_version": python,
            "python_full_version": f"{python}.0",
            "platform_machine": machine,
        }
        for python, machine in product(PYTHONS, MACHINES)
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
