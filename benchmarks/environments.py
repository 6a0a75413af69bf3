"""The peers' environments: each program in one of its own, installed from its requirements when first needed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True, slots=True)
class Program:
    """A program that takes part: its environment, what is installed into it, and the script that trains with it.

    `asked` ones are installed only where `--peers` names them. `without_dependencies` are installed last, alone: their
    own requirements ask for packages that the work does not use, or for another torch.
    """

    name: str
    folder: str
    requirements: str
    script: str = "train.py"
    asked: bool = False
    without_dependencies: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        return ROOT / self.folder / "bin" / "python"

    @property
    def installed(self) -> bool:
        """Whether the environment was made."""
        return (ROOT / self.folder / ".installed").exists()

    def install(self, device: str) -> None:
        """Make the environment as the requirements say now; nothing where it is so already. `OSError` if pip fails."""
        files = [PEERS / self.requirements]
        if device == "cuda" and self.name == "trl":
            files.append(PEERS / "requirements-cuda.txt")
        wanted = "".join(file.read_text(encoding="utf-8") for file in files) + " ".join(self.without_dependencies)
        stamp = ROOT / self.folder / ".installed"
        if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
            return
        print(f"installing {self.name} into {self.folder} (some minutes the first time)", file=sys.stderr, flush=True)
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(ROOT / self.folder)], check=True)
        self._pip(*(part for file in files for part in ("-r", str(file))))
        if self.without_dependencies:
            self._pip("--no-deps", *self.without_dependencies)
        stamp.write_text(wanted, encoding="utf-8")

    def _pip(self, *wanted: str) -> None:
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no reason given"]
            raise OSError(f"{self.name} could not be installed: {said[-1][:200]}")

    def lacks(self, modules: tuple[str, ...]) -> str:
        """The first of `modules` that cannot be imported in the environment; empty when all can."""
        if not modules:
            return ""
        find = "import sys; from importlib.util import find_spec; "
        find += "print(next((name for name in sys.argv[1:] if find_spec(name) is None), ''))"
        answer = subprocess.run([str(self.python), "-c", find, *modules], check=True, capture_output=True, text=True)
        return answer.stdout.strip()


_ALL = (
    Program("trl", ".venv-peers", "requirements.txt"),
    Program("trl-ppo", ".venv-peers-ppo", "requirements-ppo.txt", "train_ppo.py"),
    Program("litgpt", ".venv-peers-litgpt", "requirements-litgpt.txt", "train_litgpt.py", asked=True),
    Program(
        "llamafactory", ".venv-peers-llamafactory", "requirements-llamafactory.txt", "train_llamafactory.py",
        asked=True, without_dependencies=("llamafactory==0.9.5",),
    ),
    Program("unsloth", ".venv-peers-unsloth", "requirements-unsloth.txt", "train_unsloth.py", asked=True),
)  # fmt: skip
PROGRAMS = {program.name: program for program in _ALL}
