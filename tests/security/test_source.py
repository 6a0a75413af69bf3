"""Nothing in the source can turn data into code, a shell command or an open door: read from the syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "tunesmith"
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive", "jinja2.Environment", "Environment", "input_eval",
}  # fmt: skip
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "telnetlib"}
ATTRIBUTES = {"extractall", "MethodType"}
ALLOWED = {("cli.py", "shell="): "which shell's completion script to print; nothing is run"}
TEXT = ("innerHTML", "dangerouslySetInnerHTML", "0.0.0.0", "allow_pickle=True", "weights_only=False")


def dangers(name: str, text: str) -> list[str]:
    """Every place of the source `text` that this gate refuses."""
    found = []
    for node in ast.walk(ast.parse(text)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS:
                found.append((line, called))
            if isinstance(node.func, ast.Attribute) and node.func.attr in ATTRIBUTES:
                found.append((line, node.func.attr))
            for word in node.keywords:
                value = word.value
                if word.arg == "shell" and not (isinstance(value, ast.Constant) and value.value is False):
                    found.append((line, "shell="))
                if word.arg == "trust_remote_code" and isinstance(value, ast.Constant) and value.value:
                    found.append((line, "trust_remote_code=True"))
        elif isinstance(node, ast.Import):
            found += [(line, a.name) for a in node.names if a.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in MODULES:
            found.append((line, str(node.module)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [(line, word) for word in TEXT if word in node.value]
    return [f"{name}:{line} {what}" for line, what in found if (name, what) not in ALLOWED]


def test_no_danger_in_the_source():
    found = [
        danger
        for path in sorted(SOURCE.rglob("*.py"))
        for danger in dangers(path.relative_to(SOURCE).as_posix(), path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "yaml.load(text)",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=flag)",
        "os.system(command)",
        "archive.extractall(folder)",
        "jinja2.Environment()",
        "AutoModel.from_pretrained(base, trust_remote_code=True)",
        "page = 'element.innerHTML = text'",
        "serve('0.0.0.0')",
    ],
)
def test_control_each_danger_is_seen(line):
    assert dangers("planted.py", line)
