"""Exit codes and signals, through a real process; and what the terminal shows."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

COMMAND = [sys.executable, "-m", "tunesmith"]


def wait_for_line(path, count, process):
    deadline = time.monotonic() + 120
    while not (path.is_file() and path.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def started(work, *args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, *args], cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_interrupts,
    )  # fmt: skip


def heed_interrupts():
    """A shell's background jobs, and all they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_resumed_run_ends_as_the_undisturbed_one(number, code, write, work, run):
    recipe = write("classify", train={"epochs": None, "steps": 120, "eval_every": 60})
    process = started(work, "train", recipe, "--run", "cut", "--json")
    lines = work / "runs/cut/metrics.jsonl"
    wait_for_line(lines, 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert out == "" and "Traceback" not in err
    assert "a checkpoint is saved" in err and "--resume" in err
    done = len(lines.read_bytes().splitlines())
    assert (work / f"runs/cut/checkpoints/step_{done:06d}/manifest.json").is_file()
    assert done < 120

    resumed = run("train", "--resume", "cut", "--json")
    assert resumed.code == 0, resumed.err
    assert f"going on from step {done}" in resumed.err
    whole = run("train", recipe, "--run", "whole", "--json")
    same_run(work / "runs/cut", work / "runs/whole")
    assert comparable(resumed.json) == comparable(whole.json)


TIMES = ("run", "seconds", "train_seconds", "tokens_per_second", "peak_memory_bytes", "export_bytes")


def comparable(result):
    return {key: value for key, value in result.items() if key not in TIMES}


def same_run(a, b):
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "before.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    ours, theirs = (sorted(p.glob("final/*/tensors.safetensors")) for p in (a, b))
    assert [p.read_bytes() for p in ours] == [p.read_bytes() for p in theirs]


def test_a_second_interrupt_ends_at_once_and_leaves_the_last_good_checkpoint(write, work):
    """Steps of a second or so: the first Ctrl-C waits for the step, the second does not."""
    recipe = write("pretrain", train={"epochs": None, "steps": 400, "batch_examples": 2000}, data={"max_length": 64})
    process = started(work, "train", recipe, "--run", "hasty", "--json")
    wait_for_line(work / "runs/hasty/metrics.jsonl", 1, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    assert list((work / "runs/hasty/checkpoints").glob("step_*/manifest.json"))


def test_the_result_is_one_json_document_of_a_real_process(write, work):
    process = started(work, "train", write("pretrain"), "--run", "real", "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["run"] == "real"
    assert "Traceback" not in err and "it/s" not in err


def test_the_terminal_has_a_live_line(write, work):
    recipe = write("pretrain", train={"epochs": None, "steps": 40})
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "train", recipe, "--run", "live"], cwd=work, stdout=subprocess.DEVNULL, stderr=follower,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(follower)
    seen = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        seen += part
    os.close(leader)
    assert process.wait(timeout=60) == 0
    text = seen.decode()
    live = re.findall(r"\rstep [\d,]+/40  loss \d+\.\d{4}  lr \S+  [\d,]+ tokens/s  \d+:\d\d left\x1b\[K", text)
    assert live and "step 40/40" in live[-1]


def test_nothing_but_the_verb_loads_torch(work):
    code = "import sys; import tunesmith, tunesmith.cli; print([m for m in ('torch', 'transformers', 'pydantic', 'numpy') if m in sys.modules])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    for args in (["--help"], ["--version"], ["train", "--help"], ["runs"]):
        traced = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "tunesmith", *args], cwd=work, capture_output=True, text=True
        )
        assert traced.returncode == 0, traced.stderr
        assert not re.search(r"\|\s+(torch|transformers|numpy)$", traced.stderr, re.M)


def test_help_names_every_verb(run):
    shown = run("--help")
    assert shown.code == 0
    for verb in ("train", "eval", "check", "chat", "predict", "export", "runs"):
        assert re.search(rf"^  {verb} ", shown.out, re.M)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_shells(shell, run):
    done = run("completion", shell)
    assert done.code == 0 and "_TUNESMITH_COMPLETE" in done.out
    assert run("completion", "tcsh").code == 2


def test_completion_completes(work):
    environment = {
        **os.environ,
        "_TUNESMITH_COMPLETE": "complete_bash",
        "COMP_WORDS": "tunesmith ru",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, cwd=work)
    assert "runs" in done.stdout.split()


def _too_much(*args, **named):
    torch.empty(1 << 50, dtype=torch.uint8)


def test_memory_that_runs_out_in_training_is_one_message_and_no_traceback(write, run, monkeypatch):
    monkeypatch.setattr("tunesmith.stages.running.fit", _too_much)
    done = run("train", write("sft"), "--run", "large")
    assert done.code == 2 and done.out == ""
    assert "Traceback" not in done.err and "a bug" not in done.err
    last = done.err.strip().splitlines()[-1]
    assert last.startswith(
        "tunesmith: out of memory (can't allocate memory: you tried to allocate 1125899906842624 bytes)"
    )
    assert "train.micro_batch_tokens (now 8,192)" in last
    assert "MiB" in last and "tunesmith plan" in last


@pytest.mark.parametrize("error", [MemoryError(), ImportError("libtorch.so: failed to map segment from shared object")])
def test_memory_that_runs_out_elsewhere_is_one_message_too(error, run, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr("tunesmith.api.runs_list", fail)
    done = run("runs")
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1
    assert done.err.startswith("tunesmith: out of memory") and "raise the limit" in done.err


def test_memory_that_runs_out_while_it_is_told_is_still_one_message(run, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr("tunesmith.api.runs_list", fail)
    monkeypatch.setattr("tunesmith.cli.memory_story", fail)
    done = run("runs")
    assert done.code == 2 and done.err.startswith("tunesmith: out of memory; raise the limit")
