"""A chain from the command line: trained, killed twice, resumed, listed, shown; verbs about preferences beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.chains import chain, make_files, words, write_rows

import tunesmith.errors
from tunesmith import api
from tunesmith.cli import main

SOURCES = Path(tunesmith.errors.__file__).parents[1]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(make_files(tmp_path))
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_chain_killed_twice_ends_with_the_same_bytes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCES), "TUNESMITH_CACHE": str(tmp_path)}
    script = Path(__file__).with_name("chain_trial.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["codes"] == [-signal.SIGKILL, -signal.SIGKILL, 0, 0] and found["begun"] == ["1-pretrain"]
    assert found["different"] == []
    assert "1-pretrain: cached" in found["said"] and found["said"].count("going on from step") == 2


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
