"""Model folders made to do harm, opened by the real command under an audit hook: refused, and nothing happened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from tests.cli.conftest import recipe_for

PICKLE = b"\x80\x04cposix\nsystem\n\x94X\x0b\x00\x00\x00touch pwned\x94\x85\x94R\x94."
CODE = "open('pwned', 'w').close()\nclass Evil:\n    pass\n"


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(PICKLE)


def pickled_index(folder):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model.bin"}}))


def map_outside(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))


def map_absolute(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "/etc/passwd"}}))


def map_to_a_pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "part.safetensors"}}))


def weights_are_a_pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def code_by_auto_map(folder):
    (folder / "evil.py").write_text(CODE)
    edit(
        folder,
        "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    )


def code_claimed_in_the_config(folder):
    """The folder says of itself that it is to be trusted (CVE-2026-5241)."""
    code_by_auto_map(folder)
    edit(folder, "config.json", trust_remote_code=True)


def code_in_the_tokenizer(folder):
    (folder / "evil.py").write_text(CODE)
    edit(folder, "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})


def code_in_a_nested_config(folder):
    (folder / "evil.py").write_text(CODE)
    edit(
        folder,
        "config.json",
        text_config={"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}},
        model_type="x",
    )


def type_with_a_line_break(folder):
    """A name that becomes code where code is generated (CVE-2026-93348)."""
    edit(folder, "config.json", model_type="llama\nimport os; os.system('touch pwned')")


def template_that_escapes(folder):
    bad = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}"
    )
    (folder / "chat_template.jinja").write_text(bad)


def template_that_never_ends(folder):
    (folder / "chat_template.jinja").write_text(
        "{% for a in range(9**9) %}{% for b in range(9**9) %}x{% endfor %}{% endfor %}"
    )


def template_that_eats_memory(folder):
    (folder / "chat_template.jinja").write_text("{{ 'a' * 10**10 }}")


def header_of_a_terabyte(folder):
    (folder / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")


def offsets_beyond_the_file(folder):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def deep_config(folder):
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


CASES = [
    pickled_weights, pickled_index, map_outside, map_absolute, map_to_a_pipe, weights_are_a_pipe, code_by_auto_map,
    code_claimed_in_the_config, code_in_the_tokenizer, code_in_a_nested_config, type_with_a_line_break,
    template_that_escapes, template_that_never_ends, template_that_eats_memory, header_of_a_terabyte,
    offsets_beyond_the_file, deep_config,
]  # fmt: skip

WATCHER = """
import json, os, sys
root, seen, on = os.path.realpath(sys.argv[1]), [], [True]
def outside(path):
    real = os.path.realpath(os.fsdecode(path))
    return not real.startswith((root + os.sep, "/dev/", "/proc/"))
def watch(event, args):
    if not on[0]:
        return
    if event in ("socket.connect", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        seen.append([event, str(args)[:200]])
    elif event == "subprocess.Popen" and list(args[1])[1:3] != ["-I", "-c"]:
        seen.append([event, str(args)[:300]])
    elif event == "open" and isinstance(args[0], (str, bytes)):
        mode, flags = args[1] or "", args[2] or 0
        writes = any(c in mode for c in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and outside(args[0]):
            seen.append(["write", str(args[0])])
    elif event == "import" and args[0] == "evil":
        seen.append(["import", args[0]])
import matplotlib.font_manager, tunesmith.stages.running  # which look for the fonts of this machine once
from tunesmith.cli import main
sys.addaudithook(watch)
codes = {}
for name in json.load(open("cases.json")):
    seen.clear()
    code = main(["train", f"{name}.yaml", "--run", name])
    codes[name] = [code, list(seen)]
on[0] = False
with open("answer.json", "w") as file:
    json.dump(codes, file)
"""


@pytest.fixture(scope="module")
def answers(bases, tmp_path_factory):
    """One process opens them all, each under the hook."""
    work = tmp_path_factory.mktemp("hostile")
    from tests.cli.conftest import answered, write_rows

    write_rows(work / "pairs.jsonl", answered(24))
    write_rows(work / "chats.jsonl", [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(24)
    ])  # fmt: skip
    names = ["harmless", *(case.__name__ for case in CASES)]
    for name, case in zip(names, [lambda folder: None, *CASES], strict=True):
        shutil.copytree(bases / "llama", work / "models" / name)
        case(work / "models" / name)
        data = "chats.jsonl" if name.startswith("template") else "pairs.jsonl"
        recipe = recipe_for("sft", data={"train": data}) | {"base": f"models/{name}"}
        recipe["data"].pop("eval")
        (work / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    (work / "cases.json").write_text(json.dumps(names))
    environment = {
        **os.environ,
        "TUNESMITH_CACHE": str(work / "cache"),
        "MPLCONFIGDIR": str(work / "mpl"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-B", "-c", WATCHER, str(work)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(work.rglob("pwned"))
    return json.loads((work / "answer.json").read_text()), done.stderr


def test_control_a_harmless_folder_trains(answers):
    assert answers[0]["harmless"] == [0, []]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_refused_and_nothing_happened(case, answers):
    code, events = answers[0][case.__name__]
    assert code == 2 and events == []


def test_no_traceback_among_the_messages(answers):
    assert "Traceback" not in answers[1] and "bug in tunesmith" not in answers[1]


@pytest.mark.parametrize("trust", [None, "models/other", "nobody/evil", "llama"])
@pytest.mark.parametrize("case", [code_by_auto_map, code_claimed_in_the_config, code_in_the_tokenizer])
def test_code_of_a_folder_runs_only_when_exactly_it_is_named(case, trust, work, run):
    folder = work / "evil-model"
    shutil.copytree((work / "llama").resolve(), folder)
    case(folder)
    recipe = recipe_for("sft") | {"base": "evil-model"} | ({} if trust is None else {"trust_remote_code": trust})
    (work / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = run("train", "r.yaml")
    assert done.code == 2 and not (work / "pwned").exists(), done.err
