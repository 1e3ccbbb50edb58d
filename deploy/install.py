"""Makes `.venv` and installs the pinned packages: `make install`.

Standard library only, and syntax that an old Python can parse far enough to
say that it is too old. No resolver runs: a lock names every package, and uv
installs it in seconds where pip took minutes.

The stamp in `.venv` says what is installed. It is removed first and written
last, so that a `.venv` without one was left by an interrupted run; such a one
is made anew (uv keeps its downloads, so little is fetched twice). When the
stamp says what is wanted, nothing is done.
"""

import ast
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

UV_VERSION = "0.13.9"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "headway-installed.json"


class InstallError(Exception):
    """Why it cannot be installed, and what to do, in one line."""


def main():
    device = chosen_device()
    wanted = {
        "root": str(ROOT),  # a moved or copied .venv has scripts that point elsewhere
        "device": device,
        "uv": UV_VERSION,
        "lock": sha256(lock_path(device)),
        "project": sha256(ROOT / "pyproject.toml"),
    }
    if read_stamp() == wanted:
        return
    check_python()
    with (ROOT / "pyproject.toml").open("rb") as turnstile:
        fcntl.flock(turnstile, fcntl.LOCK_EX)  # two of us at once would break both
        if read_stamp() != wanted:
            install(wanted)


def install(wanted):
    """Bring `.venv` to `wanted`; the caller has checked that it is not there yet."""
    started_s = time.monotonic()
    found = read_stamp()
    if found is None or any(found[key] != wanted[key] for key in ("root", "device", "uv")):
        make_venv()
        found = {}
    STAMP.unlink(missing_ok=True)
    if found.get("lock") != wanted["lock"]:
        install_lock(lock_path(wanted["device"]), wanted["device"])
    say("installing headway itself")
    # "compat" puts the checkout on sys.path by a .pth file, which type checkers understand.
    compat = ("--config-setting", "editable_mode=compat")
    uv("-e", str(ROOT), "--quiet", "--no-build-isolation", *compat)
    partial = STAMP.with_suffix(".partial")
    partial.write_text(json.dumps(wanted, indent=1) + "\n")
    partial.replace(STAMP)
    say(f"installed in {time.monotonic() - started_s:.0f} s")


def make_venv():
    say(f"making .venv with Python {platform.python_version()}")
    run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)],
        f"cannot make {VENV}",
        show=False,
    )
    run(
        [str(PYTHON), "-m", "pip", "install", "--quiet", "uv==" + UV_VERSION],
        f"cannot install uv {UV_VERSION} from the package index; is the network up?",
        show=False,
    )


def install_lock(lock, device):
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", lock.read_text(), re.MULTILINE))
    say(f"installing {len(pins)} pinned packages for the {device.upper()}")
    if device == "cpu":
        install_cpu_torch(pins["torch"])
    uv("-r", str(lock))


def install_cpu_torch(version):
    """Install the CPU build of torch, which is not on PyPI: from disk, or PyTorch's own index."""
    folder = find_torch_wheel(version, pip_settings("find-links"))
    if folder is not None:
        uv("torch==" + version, "--no-index", "--find-links", str(folder))
    else:
        uv("torch==" + version, "--default-index", TORCH_CPU_INDEX)


def find_torch_wheel(version, find_links):
    """Return the first folder of `find_links` with a torch wheel that fits here, or None."""
    tag = "cp{}{}".format(*sys.version_info)
    name = re.compile(rf"torch-{re.escape(version)}-{tag}-{tag}-.*{platform.machine()}\.whl")
    for link in find_links:
        folder = Path(link[len("file://") :] if link.startswith("file://") else link)
        if folder.is_dir():
            for path in folder.iterdir():
                if name.fullmatch(path.name.replace("%2B", "+")):
                    return folder
    return None


@functools.lru_cache(maxsize=None)
def pip_settings(key):
    """Return the values of pip's setting `key`, from its files and the environment."""
    listed = subprocess.run(
        [str(PYTHON), "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    values = []
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        if name.split(".")[-1] == key:
            values += str(ast.literal_eval(value)).split()
    return values


def uv(*arguments):
    """Run `uv pip install --no-deps` with `arguments`, its progress shown."""
    env = dict(os.environ)
    env.pop("VIRTUAL_ENV", None)
    env.setdefault("UV_HTTP_TIMEOUT", "120")
    # uv does not read pip's settings; a site's own mirror matters.
    index = pip_settings("index-url")
    if index and not ({"UV_DEFAULT_INDEX", "UV_INDEX_URL"} & set(env)):
        env["UV_DEFAULT_INDEX"] = index[-1]
    run(
        [
            *(str(VENV / "bin" / "uv"), "pip", "install", "--python", str(PYTHON)),
            # Compiling takes half a minute once and saves each engine eight
            # seconds of imports at every start, where Python may not do it itself.
            *("--no-deps", "--compile-bytecode", *arguments),
        ],
        f"cannot install {arguments[0]}; uv says why above. Run it again to go on",
        env=env,
    )


def chosen_device():
    """Return "cpu" or "gpu": what HEADWAY_DEVICE says, else whether there is an NVIDIA driver."""
    chosen = os.environ.get("HEADWAY_DEVICE", "").lower()
    if chosen in ("cpu", "gpu"):
        return chosen
    if chosen:
        raise InstallError(f"HEADWAY_DEVICE is {chosen!r}; it can be cpu or gpu")
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
        return "gpu"
    except OSError:
        return "gpu" if shutil.which("nvidia-smi") else "cpu"


def check_python():
    """Raise `InstallError` unless vLLM has packages for this Python and machine."""
    if not (3, 11) <= sys.version_info[:2] < (3, 15):
        other = next(filter(shutil.which, [f"python3.{m}" for m in (12, 13, 11, 14)]), None)
        raise InstallError(
            "Python 3.11 to 3.14 is needed, this is {}. Run `make install PYTHON={}`{}".format(
                platform.python_version(),
                other or "python3.12",
                "" if other else " once you have it",
            )
        )
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise InstallError(
            "Linux on x86_64 or aarch64 is needed, as vLLM's packages are; "
            f"this is {platform.system()} on {platform.machine()}"
        )
    if find_spec("ensurepip") is None:
        raise InstallError(
            "this Python cannot make virtual environments; on Debian and Ubuntu: "
            f"apt install python3.{sys.version_info[1]}-venv"
        )


def read_stamp():
    """Return what is installed, or None where the last run did not finish or none ran."""
    if not PYTHON.exists():  # also where the Python it was made from has gone
        return None
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and {"root", "device", "uv"} <= set(stamp) else None


def lock_path(device):
    return ROOT / "deploy" / "locks" / f"{device}.txt"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(command, problem, show=True, env=None):
    """Run `command`; raise `InstallError` with `problem` if it fails.

    Its output is shown while it runs, or only where it fails.
    """
    if show and sys.stderr.isatty():  # uv draws progress bars there
        returncode = subprocess.run(command, env=env, stdin=subprocess.DEVNULL).returncode
        output = ""
    elif show:
        running = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for line in running.stderr or ():
            if not line.startswith((" + ", " - ", " ~ ")):  # one for each of 200 packages
                sys.stderr.write(line)
                sys.stderr.flush()
        returncode = running.wait()
        output = ""
    else:
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        returncode, output = done.returncode, done.stdout
    if returncode != 0:
        sys.stderr.write(output)
        raise InstallError(problem)


def say(line):
    print("headway: " + line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except InstallError as error:
        say(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        with contextlib.suppress(BrokenPipeError):
            say("interrupted; run it again to go on")
        sys.exit(130)
