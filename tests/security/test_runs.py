"""A run made of hostile text and secrets: nothing of it acts in a page or on a terminal, no secret is written, no
socket is opened."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from tests.cli.conftest import recipe_for, write_rows

import tunesmith

PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"><svg onload=alert(1)>",
    "'><iframe src=javascript:alert(1)></iframe>",
    "</style><body onload=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "{{7*7}}${7*7}<%= 7*7 %>",
    "]]><x:script xmlns:x='http://www.w3.org/1999/xhtml'>alert(1)</x:script>",
    "| a | b |\n---\n# heading [x](javascript:alert(1)) ![y](http://evil/z.png)",
)  # fmt: skip
CONTROLS = "bell\a esc\x1b[31mred\x1b]0;title\a cr\rback bidi\u202egnp.exe nul-less \x9b1m"


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def hostile_rows(count: int, start: int):
    for i in range(start, start + count):
        word = PAYLOADS[i % len(PAYLOADS)]
        yield {"text": f"{i} {word} {CONTROLS if i % 3 == 0 else ''} row", "label": ("<b>no</b>", "y\x1b[2Jes")[i % 2]}


def put_hostile(work):
    write_rows(work / "rows<i>.jsonl", list(hostile_rows(24, 0)))
    write_rows(work / "eval&.jsonl", list(hostile_rows(8, 100)))
    recipe = recipe_for("classify", evaluate={"sentences": [*PAYLOADS, CONTROLS]})
    recipe["data"] = {"train": "rows<i>.jsonl", "eval": "eval&.jsonl"}
    (work / "hostile.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def hostile(bases, tmp_path_factory):
    """The folder of a finished run made of such text."""
    work = tmp_path_factory.mktemp("hostile")
    (work / "bert").symlink_to(bases / "bert")
    put_hostile(work)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setenv("TUNESMITH_CACHE", str(work / "cache"))
        tunesmith.train("hostile.yaml", run="hostile")
    return work / "runs" / "hostile"


def test_text_from_data_never_becomes_an_element_of_the_page(hostile):
    page = (hostile / "report.html").read_text()
    parser = Elements()
    parser.feed(page)
    assert any("alert(1)" in sample for sample in re.findall(r">([^<]*alert[^<]*)<", page)), "the text itself is shown"
    allowed = {"script", "iframe", "object", "embed", "link", "base", "form", "i", "b", "x:script"}
    for tag, attributes in parser.found:
        assert tag not in allowed, (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("href", "src", "action", "xlink:href"):
            value = attributes.get(name) or ""
            assert not value.startswith(("javascript:", "http:", "//")) or tag == "svg", (tag, attributes)
    csp = next(
        a["content"] for t, a in parser.found if t == "meta" and "Content-Security" in (a.get("http-equiv") or "")
    )
    assert "default-src 'none'" in csp and "script" not in csp.replace("script-src 'none'", "")


def test_text_from_data_is_no_markup_in_the_card(hostile):
    card = (hostile / "model_card.md").read_text()
    assert not re.search(r"(?<!\\)<\w", card) and not re.search(r"(?<!\\)\]\(", card)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", card)


def test_nothing_of_the_data_steers_the_terminal(work, run):
    put_hostile(work)
    commands = (
        ["train", "hostile.yaml", "--run", "hostile"], ["check", "rows<i>.jsonl"], ["check", "hostile.yaml"],
        ["predict", "hostile", CONTROLS], ["eval", "hostile", "--data", "eval&.jsonl", "--json"],
        ["runs", "show", "hostile"],
    )  # fmt: skip
    shown = [run(*command) for command in commands]
    for done in shown:
        assert done.code == 0, done.err
        for text in (done.out, done.err):
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text), ascii(text)
    log = (work / "runs/hostile/metrics.jsonl").read_bytes()
    assert all(json.loads(line) for line in log.splitlines()) and b"\x1b" not in log


@pytest.mark.parametrize(
    "name",
    ["../out", "a/../../out", "..", "-rf", "a b", "a\nb", "a\x1b[2Jb", "$(touch pwned)", "`id`", "x" * 300, "con\x00"],
)
def test_a_run_is_named_inside_the_folder_or_refused(name, work, run):
    """A path is taken as a path, so that it is the user's own choice; a name never becomes one."""
    inside = work / "deep"
    inside.mkdir()
    for entry in work.iterdir():
        if entry.name not in ("deep", "cache"):
            (inside / entry.name).symlink_to(entry)
    os.chdir(inside)
    (inside / "r.yaml").write_text(yaml.safe_dump(recipe_for("pretrain") | {"run": name}))
    outside = sorted(path.name for path in work.iterdir())
    done = run("train", "r.yaml")
    os.chdir(work)
    assert done.code == 2 and "Traceback" not in done.err
    assert sorted(path.name for path in work.iterdir()) == outside
    assert not list(work.rglob("pwned"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", done.err)


SECRETS = {
    "HF_TOKEN": "hf_CANARYaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "HUGGING_FACE_HUB_TOKEN": "hf_CANARYbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
    "WANDB_API_KEY": "CANARYc" + "0" * 33,
    "OPENAI_API_KEY": "sk-CANARYd",
    "AWS_SECRET_ACCESS_KEY": "CANARYe",
    "DATABASE_URL": "postgres://user:CANARYf@host/db",
}


def test_no_secret_of_the_environment_is_written_or_said(work):
    (work / "r.yaml").write_text(yaml.safe_dump(recipe_for("sft", evaluate={"samples": 2})))
    environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1"}
    for args in (
        ["train", "r.yaml", "--run", "s"],
        ["export", "s", "--to", "out"],
        ["train", "r.yaml", "base=nobody/x"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "tunesmith", *args], cwd=work, env=environment, capture_output=True, text=True
        )
        assert done.returncode == (2 if "base=nobody/x" in args else 0), done.stderr
        assert "CANARY" not in done.stdout + done.stderr
    written = [path for path in work.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(written) > 20
    leaks = [str(path) for path in written if b"CANARY" in path.read_bytes()]
    assert not leaks


def test_a_secret_in_a_data_url_is_not_kept(work, run):
    (work / "r.yaml").write_text(
        yaml.safe_dump(recipe_for("sft", data={"train": "https://me:CANARYg@host/rows.jsonl"}))
    )
    done = run("train", "r.yaml", "--run", "s")
    assert done.code == 2 and "CANARY" not in done.err
    assert not (work / "runs").exists() or not [p for p in (work / "runs").rglob("*") if p.is_file()]


WATCHED = """
import sys
seen = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "os.system", "os.exec", "os.posix_spawn"):
        seen.append((event, str(args)[:200]))
    if event == "subprocess.Popen" and not str(args[0]).startswith(sys.executable):
        seen.append((event, str(args)[:200]))
sys.addaudithook(watch)
from tunesmith.cli import main
code = main(sys.argv[1:])
print("EVENTS", seen, file=sys.stderr)
sys.exit(code or bool(seen))
"""


def test_a_local_run_opens_no_socket_and_starts_no_program(work):
    (work / "r.yaml").write_text(yaml.safe_dump(recipe_for("sft", evaluate={"samples": 2})))
    for args in (["train", "r.yaml", "--run", "s", "--json"], ["eval", "s", "--data", "pairs.jsonl"],
                 ["export", "s", "--to", "out", "--format", "merged"]):  # fmt: skip
        done = subprocess.run([sys.executable, "-c", WATCHED, *args], cwd=work, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


def test_control_the_watch_sees_a_socket(work):
    (work / "r.yaml").write_text(yaml.safe_dump(recipe_for("sft") | {"base": "nobody/nothing"}))
    done = subprocess.run([sys.executable, "-c", WATCHED, "train", "r.yaml"], cwd=work, capture_output=True, text=True)
    assert "socket." in done.stderr.split("EVENTS")[1]
