"""Set up the environment that the Makefile's commands run in; standard library only, one step per call.

`environment` chooses an interpreter and gives it torch and what nascompile needs, `extension` installs
this checkout there in editable mode (which builds the C++ part), `dev` adds what tests and checks need.
Each step may be repeated.

An interpreter that already imports a suitable torch is used as it is: its torch is never replaced, only
what is missing is added. Otherwise a virtual environment `.venv` is made. The file build/setup/python
holds the choice.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
CPU_TORCH = "torch==2.13.0"  # the release the CPU kernels are measured with
GPU_TORCH = "torch"
OTHER_TORCH = "To install another: make TORCH='what pip install takes'"
# the pairing that torch's own GPU builds pin; a torch that is not listed takes the newest
TRITON_OF_TORCH = {(2, 11): "triton==3.6.0", (2, 13): "triton==3.7.1"}
DEV_EXTRAS = ("demo", "onnx", "dev")

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "build" / "setup"
VENV = ROOT / ".venv"

# what we ask an interpreter about itself; one line of JSON comes back
PROBE = """
import importlib.metadata, importlib.util, json, os, sys, sysconfig
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
torch = error = None
if importlib.util.find_spec("torch"):
    try:
        import torch as module
        torch = str(module.__version__)
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
print(json.dumps({
    "executable": sys.executable,
    "torch": torch,
    "torch_error": error,
    "triton": version("triton"),
    "virtual": sys.prefix != sys.base_prefix,
    "writable": os.access(sysconfig.get_path("purelib"), os.W_OK),
    "managed": os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")),
}))
"""


class Stop(Exception):
    """The set-up cannot go on; the message is one line for the person at the terminal."""


def say(words: str) -> None:
    print(f"set-up: {words}", flush=True)


def parse_release(version: str) -> tuple[int, int]:
    """The first two numbers of a version such as "2.13.0+cpu"; (0, 0) when it has none."""
    parts = version.split("+")[0].split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (IndexError, ValueError):
        return 0, 0


def has_suitable_torch(facts: dict) -> bool:
    return facts["torch"] is not None and parse_release(facts["torch"]) >= OLDEST_TORCH


def check_python() -> None:
    """Raise Stop when this interpreter is older than OLDEST_PYTHON, naming a newer one on the path."""
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return
    newer = [name for name in ("python3.13", "python3.12", "python3.11") if shutil.which(name)]
    advice = f"try: make PYTHON={newer[0]}" if newer else "install it, then: make PYTHON=/path/to/python3"
    have, need = ".".join(map(str, sys.version_info[:3])), ".".join(map(str, OLDEST_PYTHON))
    raise Stop(f"{sys.executable} is Python {have}, nascompile needs {need} or newer; {advice}")


def probe(python: str) -> dict:
    """What `python` says about its torch and about whether packages may be installed into it."""
    command = [python, "-W", "ignore", "-c", PROBE]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise Stop(f"{python} does not run (exit status {result.returncode}); remove {VENV} and try again")
    return json.loads(result.stdout.splitlines()[-1])


def make_venv(*, see_system_packages: bool) -> dict:
    """Create `.venv` if it is not there; return what its interpreter says about itself."""
    python = VENV / "bin" / "python"
    if not python.exists():
        try:
            import ensurepip  # noqa: F401 - a distribution without it cannot make a usable environment
            import venv  # noqa: F401
        except ImportError as missing:
            raise Stop(
                f"{sys.executable} has no {missing.name} module, which makes virtual environments; "
                "Debian and Ubuntu: apt install python3-venv"
            ) from None
        say(f"making the virtual environment {VENV}")
        command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
        command += ["--system-site-packages"] if see_system_packages else []
        run(command, f"{sys.executable} could not make {VENV}; its reason is above")
    return probe(str(python))


def choose_environment() -> dict:
    """The interpreter to use: this one if it has a suitable torch and can be added to, else `.venv`'s."""
    here = probe(sys.executable)
    if here["torch_error"]:
        say(f"the torch of {here['executable']} does not import ({here['torch_error']}); not using it")
    if not has_suitable_torch(here):
        return make_venv(see_system_packages=False)
    if here["virtual"] or (here["writable"] and not here["managed"]):
        say(f"using {here['executable']} and its torch {here['torch']}")
        return here
    say(f"using torch {here['torch']} of {here['executable']} from a virtual environment of our own")
    return make_venv(see_system_packages=True)


def pip(python: str, *arguments: str, what: str, quiet: bool = True) -> None:
    """Run `pip install` for `python`, which keeps its torch and triton; raise Stop if it fails."""
    asked = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False)
    if asked.returncode != 0:
        # environments made by uv come without pip
        run([python, "-m", "ensurepip", "--upgrade"], f"{python} has no pip and ensurepip cannot bring it")
    constraints = STATE / "constraints.txt"
    command = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--quiet"] if quiet else []
    command += ["--constraint", str(constraints)] if constraints.exists() else []
    run([*command, *arguments], f"pip could not install {what}; its reason is above")


def run(command: list[str], complaint: str) -> None:
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise Stop(complaint)


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi lists at least one GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    result = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return result.returncode == 0 and "GPU" in result.stdout


def brings_cuda(python: str, requirement: str) -> bool:
    """Whether pip would install CUDA libraries (gigabytes) along with `requirement`."""
    command = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", requirement]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise Stop(f"pip finds no {requirement} for this Python; its reason is above. {OTHER_TORCH}")
    names = [item["metadata"]["name"].lower() for item in json.loads(result.stdout)["install"]]
    return any(name.startswith(("nvidia-", "cuda-")) for name in names)


def install_torch(python: str) -> None:
    """Install the torch that fits the machine, or what TORCH asks for (words for `pip install`)."""
    wanted = os.environ.get("TORCH", "")
    if wanted:
        say(f"installing {wanted}, as TORCH asks")
        pip(python, *shlex.split(wanted), what=wanted, quiet=False)
    elif has_nvidia_gpu():
        say(f"installing {GPU_TORCH} with CUDA (gigabytes): nvidia-smi lists a GPU")
        pip(python, GPU_TORCH, what=GPU_TORCH, quiet=False)
    elif brings_cuda(python, CPU_TORCH):
        say(f"installing {CPU_TORCH}, the CPU build: nvidia-smi lists no GPU")
        pip(python, "uv", what="uv")  # uv knows where the CPU builds are, pip does not
        command = [python, "-m", "uv", "pip", "install", "--python", python, "--torch-backend=cpu", CPU_TORCH]
        run(command, f"uv could not install {CPU_TORCH}; its reason is above. {OTHER_TORCH}")
    else:
        say(f"installing {CPU_TORCH} (about 200 MB)")
        pip(python, CPU_TORCH, what=CPU_TORCH, quiet=False)


def read_requirements(*extras: str) -> list[str]:
    """The requirements in pyproject.toml: of the build, of nascompile and of the named extras."""
    import tomllib  # newer than the Pythons that check_python speaks to

    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    optional = config["project"]["optional-dependencies"]
    found = [*config["build-system"]["requires"], *config["project"]["dependencies"]]
    return found + [requirement for extra in extras for requirement in optional[extra]]


def keep_versions(facts: dict) -> None:
    """Tell later pip calls to leave torch and triton at the versions that are installed."""
    lines = [f"{name}=={facts[name]}\n" for name in ("torch", "triton") if facts[name]]
    (STATE / "constraints.txt").write_text("".join(lines), encoding="utf-8")


def find_compiler() -> str | None:
    """The C++ compiler a build would use, or None."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)[0]] if named else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def set_up_environment() -> None:
    STATE.mkdir(parents=True, exist_ok=True)
    (STATE / "constraints.txt").unlink(missing_ok=True)
    facts = choose_environment()
    if not has_suitable_torch(facts):
        install_torch(facts["executable"])
        facts = probe(facts["executable"])
    elif os.environ.get("TORCH"):
        say(f"TORCH={os.environ['TORCH']} is not used: torch {facts['torch']} is already there")
    if not has_suitable_torch(facts):
        need = ".".join(map(str, OLDEST_TORCH))
        have = facts["torch"] or facts["torch_error"] or "missing"
        raise Stop(f"nascompile needs torch {need} or newer; after the installation it is: {have}")
    keep_versions(facts)
    say("installing what nascompile needs")
    pip(facts["executable"], *read_requirements("demo"), what="the requirements in pyproject.toml")
    (STATE / "python").write_text(facts["executable"] + "\n", encoding="utf-8")


def chosen_python() -> str:
    file = STATE / "python"
    if not file.exists():
        raise Stop("no environment is set up yet; run: make setup")
    return file.read_text(encoding="utf-8").strip()


def set_up_extension() -> None:
    python = chosen_python()
    if find_compiler() is None:
        say("no C++ compiler found: nascompile runs as pure Python, slower (Debian, Ubuntu: apt install g++)")
    else:
        say("installing nascompile from this checkout and building its C++ part")
    pip(python, "--no-deps", "--no-build-isolation", "--editable", ".", what="nascompile from this checkout")
    if find_compiler() is not None and not list((ROOT / "nascompile").glob("_C*.so")):
        say("its C++ part did not build: nascompile runs as pure Python, slower")
        say("NASCOMPILE_BUILD_EXT=1 make setup stops there and shows why")


def set_up_dev() -> None:
    python = chosen_python()
    facts = probe(python)
    say("installing what tests and checks need")
    pip(python, *read_requirements(*DEV_EXTRAS), what="the development requirements in pyproject.toml")
    on_linux_x86 = sys.platform == "linux" and os.uname().machine == "x86_64"
    if on_linux_x86 and facts["triton"] is None:
        triton = TRITON_OF_TORCH.get(parse_release(facts["torch"]), "triton>=3.6")
        say(f"installing {triton} (about 200 MB, 700 MB on disk), which compiles GPU kernels without a GPU")
        pip(python, triton, what=triton, quiet=False)


STEPS = {"environment": set_up_environment, "extension": set_up_extension, "dev": set_up_dev}


def main(arguments: list[str]) -> int:
    """Run the named step; 0 when done, 1 with one line on stderr when it cannot be, 2 for a wrong call."""
    if len(arguments) != 1 or arguments[0] not in STEPS:
        print(f"usage: {Path(__file__).name} {'|'.join(STEPS)}", file=sys.stderr)
        return 2
    try:
        check_python()
        STEPS[arguments[0]]()
    except Stop as reason:
        print(f"set-up: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
