"""A chain from the command line: trained, killed twice, resumed, listed, shown; verbs about preferences beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tests.chains import chain, make_files, words, write_rows

import tunesmith.errors
from tunesmith import api
from tunesmith.cli import main

SOURCES = Path(tunesmith.errors.__file__).parents[1]
STAGES = ("1-pretrain", "2-sft", "3-classify")


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(make_files(tmp_path))
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def command(*args: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCES)}
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-m", "tunesmith", *args], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def kill_in(stage: Path, *args: str) -> None:
    """Run the command and SIGKILL it as soon as the stage has made three steps."""
    process = command(*args)
    metrics, deadline = stage / "metrics.jsonl", time.monotonic() + 300
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()[1].decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def finals(run: Path) -> dict[str, bytes]:
    return {name: next((run / name / "final").glob("step_*/tensors.safetensors")).read_bytes() for name in STAGES}


def test_a_chain_killed_twice_ends_with_the_same_bytes(files):
    recipe = chain(train={"steps": 12, "save_every": 2, "batch_examples": 8, "learning_rate": 5e-3})
    (files / "chain.yaml").write_text(yaml.safe_dump(recipe))
    kill_in(files / "runs/cut/1-pretrain", "train", "chain.yaml", "--run", "cut")
    assert not (files / "runs/cut/2-sft").exists()
    kill_in(files / "runs/cut/2-sft", "train", "--resume", "cut")
    assert (files / "runs/cut/1-pretrain/result.json").is_file()
    last = command("train", "--resume", "cut", "--json")
    out, talk = last.communicate(timeout=300)
    assert last.returncode == 0, talk.decode()[-2000:]
    assert b"1-pretrain: cached" in talk and b"going on from step" in talk
    result = json.loads(out)
    api.train(recipe, run="whole")
    assert finals(files / "runs/cut") == finals(files / "runs/whole")
    ours, theirs = (json.loads((files / f"runs/{name}/lineage.json").read_text()) for name in ("cut", "whole"))
    assert [s["gives"] for s in ours["stages"]] == [s["gives"] for s in theirs["stages"]]
    assert result["stages"] == list(STAGES) and ours["problems"] == []
    metrics = [(files / f"runs/{name}/2-sft/metrics.jsonl").read_bytes() for name in ("cut", "whole")]
    assert metrics[0] == metrics[1]


def test_runs_list_and_show_know_chains(files, capsys):
    api.train(chain())
    capsys.readouterr()
    assert main(["runs", "list"]) == 0 and "chain" in capsys.readouterr().out
    assert main(["runs", "show", "chain"]) == 0
    shown = capsys.readouterr().out
    assert "└─ 1-pretrain" in shown and "      └─ 3-classify" in shown
    assert main(["runs", "show", "chain/2-sft", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stage"] == "sft"
    assert main(["train", "--resume", "chain"]) == 0
    assert "is finished" in capsys.readouterr().err


def test_a_chain_with_problems_exits_with_2_and_leaves_nothing(files, capsys):
    recipe = chain()
    recipe["stages"][2]["train"] = {"stepz": 3}
    (files / "bad.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "bad.yaml", "stages.1.tune.layers=3"]) == 2
    said = capsys.readouterr().err
    assert "train.stepz" in said and "tune.layers" in said and not (files / "runs").exists()


def test_sample_rank_and_winrate(files, capsys, monkeypatch):
    write_rows(files / "few.jsonl", [{"prompt": words(i, 4)} for i in range(3)])
    assert main(["sample", "tiny", "--prompts", "few.jsonl", "--num", "2", "--max-tokens", "4", "--to", "s.jsonl"]) == 0
    assert main(["sample", "tiny", "--prompts", "few.jsonl", "--num", "1", "--max-tokens", "4", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]) == 3
    read, write = os.pipe()
    os.write(write, b"AB\nq\n")
    os.close(write)
    with os.fdopen(read) as typed:
        monkeypatch.setattr(sys, "stdin", typed)
        assert main(["rank", "s.jsonl", "--pairs", "p.jsonl"]) == 0
    shown = capsys.readouterr()
    assert (
        "ranked: 1" in shown.out and "-- A --" in shown.err and len((files / "p.jsonl").read_text().splitlines()) == 1
    )
    (files / "judge.py").write_text("def longer(prompts, completions):\n    return [len(c) for c in completions]\n")
    arguments = ["winrate", "tiny", "tiny", "--prompts", "few.jsonl", "--judge", "judge.py:longer", "--max-tokens", "4"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "0.5000" in shown and "NO MEASURABLE DIFFERENCE" in shown and (files / "winrate_tiny_tiny.jsonl").is_file()
    assert main([*arguments, "--seed", "3"]) == 2
    assert "left as it is" in capsys.readouterr().err
