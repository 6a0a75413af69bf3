"""Forty broken files, each with its documented result, and thousands of damaged ones: never a traceback."""

from __future__ import annotations

import gzip
import json
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tunesmith.data.check import check_records
from tunesmith.data.records import read_records
from tunesmith.errors import DataError, TunesmithError

ROWS = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(50)]


def _lines(rows=ROWS, *, at: int = 17, line: bytes | str | None = None, end: bytes = b"\n") -> bytes:
    """Fifty good rows of JSONL, line `at` replaced by `line`."""
    out = [json.dumps(row).encode() for row in rows]
    if line is not None:
        out[at - 1] = line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line
    return end.join(out) + end


def _row(**changes) -> str:
    return json.dumps({**ROWS[16], **changes})


def _chat(*messages, **extra) -> str:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in messages], **extra})


CHATS = [json.loads(_chat(("user", f"{n}?"), ("assistant", f"{n}!"))) for n in range(50)]


@dataclass(frozen=True)
class Broken:
    """A file and what becomes of it: `says` for a refusal (with its place), or how many rows are `accepted`."""

    name: str
    content: bytes
    says: str = ""
    line: int | None = 17
    accepted: int | None = None
    stage: str = "sft"
    suffix: str = ".jsonl"


def _chats(line: str, says: str, name: str) -> Broken:
    return Broken(name, _lines(CHATS, line=line), says)


FILES = (
    # what datasets reports with the right row, and more
    Broken("an object cut off", _lines(line='{"prompt": "What is 1'), "not JSON: unterminated string"),
    Broken("the last line cut off", _lines()[:-30], "not JSON: unterminated string", 50),
    Broken("single quotes", _lines(line="{'prompt': 'a', 'completion': 'b'}"), "not JSON: expecting property name"),
    Broken("a trailing comma", _lines(line='{"prompt": "a", "completion": "b",}'), "not JSON"),
    Broken("a bare word", _lines(line="hello"), "not JSON: expecting value"),
    Broken("a raw NUL", _lines(line=b'{"prompt": "a\x00", "completion": "b"}'), "a NUL byte at byte offset"),
    Broken("a lone surrogate", _lines(line='{"prompt": "\\ud800", "completion": "b"}'), "half a surrogate pair"),
    Broken("a key twice", _lines(line='{"prompt": "a", "prompt": "b", "completion": "c"}'), "'prompt' stands twice"),
    # what it reports without the row, or with a wrong one
    Broken("a line that is an array", _lines(line="[1, 2]"), "the row is an array, not an object"),
    Broken("a line that is a number", _lines(line="17"), "the row is a number, not an object"),
    Broken("UTF-16 with a mark", _lines().decode().encode("utf-16"), "offset 0: .*it looks like UTF-16", 1),
    Broken("UTF-16-BE without a mark", _lines().decode().encode("utf-16-be"), "looks like UTF-16-BE", 1),
    Broken("Latin-1", _lines(line='{"prompt": "Käse?", "completion": "ja"}'.encode("latin-1")),
           r"byte 0xe4 at byte offset \d+ is not UTF-8; it looks like WINDOWS-1252"),
    Broken("an empty file", b"", r"the file is empty \(0 bytes\)", None),
    Broken("only line ends", b"\n\n\n\r\n", "there are no rows", None),
    Broken("gzip cut short", gzip.compress(_lines())[:-40], "the gzip data is damaged or cut short", None,
           suffix=".jsonl.gz"),
    Broken("nested too deeply", _lines(line='{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deeply"),
    # what it loads in silence, without harm: accepted
    Broken("a byte order mark", b"\xef\xbb\xbf" + _lines(), accepted=50),
    Broken("CRLF", _lines(end=b"\r\n"), accepted=50),
    Broken("an array of objects called JSONL", json.dumps(ROWS, indent=1).encode(), accepted=50),
    Broken("blank lines", _lines(line="   \t"), accepted=49),
    Broken("gzip that is not called gzip", gzip.compress(_lines()), accepted=50),
    Broken("a text of 10 MB", _lines(line=_row(prompt="a" * 10_000_000)), accepted=50),
    # what it loads in silence, with harm
    Broken("an escaped NUL", _lines(line='{"prompt": "a\\u0000", "completion": "b"}'), "'prompt' holds a NUL"),
    Broken("a missing key", _lines(line='{"prompt": "a"}'), "there is no 'completion'"),
    Broken("a misspelt key", _lines(line='{"prompt": "a", "completoin": "b"}'), "did you mean 'completoin'"),
    Broken("null", _lines(line=_row(completion=None)), "'completion' is null"),
    Broken("a number for a text", _lines(line=_row(completion=42)), r"'completion' is a number \(42\), not text"),
    Broken("a list for a text", _lines(line=_row(completion=["a"])), "'completion' is a list"),
    Broken("NaN", _lines(line='{"prompt": "a", "completion": NaN}'), "NaN is not a value JSON knows"),
    Broken("an empty answer", _lines(line=_row(completion="  ")), "'completion' is empty"),
    Broken("two objects on a line", _lines(line=_row() + " " + _row()), "each object on a line of its own"),
    # mixed formats and conversations
    Broken("a chat among prompts", _lines(line=_chat(("user", "a"), ("assistant", "b"))), "there is no 'prompt'"),
    _chats(_chat(("user", "a"), ("user", "b"), ("assistant", "c")), "two user messages in a row", "two user turns"),
    _chats(_chat(("user", "a"), ("asistant", "b")), "role 'asistant'; did you mean 'assistant'", "a wrong role"),
    _chats(_chat(("user", "a"), ("assistant", "")), "the content is empty", "an empty assistant turn"),
    _chats(json.dumps({"messages": [{"role": "user", "content": "a"},
                                    {"role": "assistant", "content": "b", "trained": False}]}),
           "every assistant message is marked as not trained", "nothing to train on"),
    _chats(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None,
                                     "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]}),
           "the arguments of 'f' are not JSON", "a broken tool call"),
    _chats(json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "path": "missing.png"}]},
                                    {"role": "assistant", "content": "b"}]}),
           "a part of type 'image'", "an image"),
    Broken("an id twice", _lines([{**row, "id": 1} for row in ROWS]), accepted=50),
    Broken("a row of one token", _lines(line=_row(prompt="a", completion="b")), accepted=50),
    Broken("a cell too many", b"prompt,completion\n" + b"a,b\n" * 15 + b"a,b,c\n" + b"a,b\n",
           "3 cells where the header has 2", suffix=".csv"),
    Broken("a quote never closed", b"prompt,completion\n" + b"a,b\n" * 15 + b'"a,b\n' + b"a,b\n" * 9,
           "a quote is opened and never closed", suffix=".csv"),
    Broken("a column named twice", b"prompt,completion,prompt\na,b,c\n", "names prompt twice", 1, suffix=".csv"),
    Broken("a JSON array never closed", b'[{"prompt": "a", "completion": "b"},\n', "never closed", 2, suffix=".json"),
    Broken("Parquet that is none", b"PAR1" + bytes(100), "the Parquet file cannot be read", None, suffix=".parquet"),
    Broken("a pickle", b"\x80\x04\x95" + bytes(100), "a Python pickle, which can run code", None),
    Broken("an infinite label", _lines([{"text": f"t{n}", "label": n % 2} for n in range(50)],
                                       line='{"text": "a", "label": 1e999}'), "not a label", stage="classify"),
    Broken("half a label", _lines([{"text": f"t{n}", "label": n % 2} for n in range(50)],
                                  line='{"text": "a", "label": 0.5}'), r"'label' is a float \(0.5\)", stage="classify"),
    Broken("ranks for other answers", _lines([{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}] * 50,
                                             line='{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2, 3]}'),
           "'ranks' has 3 entries for 2 answers", stage="reward"),
)  # fmt: skip


def test_there_are_at_least_forty_broken_files_with_names_of_their_own():
    assert len({broken.name for broken in FILES}) == len(FILES) >= 40


def _write(folder: Path, broken: Broken) -> Path:
    path = folder / f"data{broken.suffix}"
    path.write_bytes(broken.content)
    return path


@pytest.mark.parametrize("broken", FILES, ids=lambda broken: broken.name)
def test_a_broken_file_has_its_documented_result(broken, tmp_path):
    path = _write(tmp_path, broken)
    if broken.accepted is not None:
        assert len(read_records(path, stage=broken.stage)) == broken.accepted
        return
    with pytest.raises(DataError) as refused:
        list(read_records(path, stage=broken.stage))
    message = str(refused.value)
    place = f"{path}:{broken.line}: " if broken.line else f"{path}: "
    assert re.search(broken.says, message) and place in message, message
    assert _is_advice(message) and _is_printable(message)
    assert all(len(line) <= 91 for line in message.splitlines() if line.startswith("      row: "))


def _is_advice(message: str) -> bool:
    """Says what to do: every line of a refusal is followed or ended by an instruction."""
    return "      fix: " in message or ";" in message.splitlines()[0] or "Convert" in message


def _is_printable(message: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in message)


SKIPPABLE = [b for b in FILES if b.says and b.line == 17 and b.suffix == ".jsonl"]


@pytest.mark.parametrize("broken", SKIPPABLE, ids=lambda b: b.name)
def test_skipping_keeps_the_other_rows_and_the_list(broken, tmp_path):
    told = []
    path = _write(tmp_path, broken)
    records = read_records(path, stage=broken.stage, on_bad_row="skip", report_bad=told.append)
    assert (len(records), records.num_bad) == (49, 1) and len(records) + records.num_bad == 50
    assert [row.origin for row in records.bad_rows] == [f"{path}:17"] == [row.origin for row in told]
    assert all(record.origin != f"{path}:17" for record in records)


def test_the_first_twenty_bad_rows_are_listed_at_once(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [row if n % 2 else {"prompt": "a"} for n, row in enumerate(ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"at least 20 bad rows found") as refused:
        list(read_records(path, stage="sft", format="prompt_completion"))
    places = re.findall(rf"{path}:(\d+): there is no 'completion'", str(refused.value))
    assert places == [str(n) for n in range(1, 40, 2)] and "on_bad_row: skip" in str(refused.value)
    records = read_records(path, stage="sft", format="prompt_completion", on_bad_row="skip")
    assert (len(records), records.num_bad) == (25, 25)


def test_a_file_whose_every_row_is_bad_is_refused_also_when_skipping(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": 1}\n' * 100)
    with pytest.raises(DataError):
        list(read_records(path, stage="sft", on_bad_row="skip"))


def test_rows_to_skip_may_stand_first(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"broken\n" * 100 + _lines())
    records = read_records(path, stage="sft", on_bad_row="skip")
    assert (len(records), records.num_bad) == (50, 100)


HOSTILE = "\x1b[31m\u202etxt\ud83d"


@pytest.mark.parametrize("stage", ["sft", "pretrain", "classify", "dpo", "grpo"])
@pytest.mark.parametrize(
    "names", [(HOSTILE,), (HOSTILE, "b" + HOSTILE, "c"), ("text", "label", HOSTILE), ("prompt", HOSTILE)]
)
def test_names_from_a_file_reach_the_terminal_escaped(names, stage, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(dict.fromkeys(names, f"{HOSTILE[:-1]} {n}")) + "\n" for n in range(9)))
    for given in (None, {"text": "nothing"}, {HOSTILE: "text"}):
        try:
            records = read_records(path, stage=stage, columns=given)
            said = records.describe() + "".join(map(str, check_records(records, records)))
        except DataError as error:
            said = str(error)
        assert said.encode() and _is_printable(said)


GOOD = {
    ".jsonl": _lines(ROWS[:6]),
    ".json": json.dumps(ROWS[:6], indent=1).encode(),
    ".csv": b'prompt;completion\n"a ""b"" c";"1,5\nund"\n' + "Käse?;Ja, klar.\n".encode() * 4,
    ".txt": "One document.\n<|endoftext|>Another — one.\n".encode() * 3,
    ".jsonl.gz": gzip.compress(_lines(ROWS[:6]), mtime=0),
    ".chat.jsonl": _lines(CHATS[:6]),
}
NASTY = (b"\x00", b"\xff", b'"', b"\n", b"\r", b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\xed\xa0\x80", b"1e999",
         b"NaN", b"\\ud800", b"\x1b[31m", b"\xe2\x80\xae", b"[" * 3000, b"9" * 5000)  # fmt: skip


def _damaged(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randint(1, 30)]
        elif kind == 2:
            data[at:at] = rng.choice(NASTY)
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 60)]
        elif at:
            del data[at:]
    return bytes(data) or b"x"


def _fuzz(count: int, seed: int, folder: Path) -> tuple[int, float]:
    """(files accepted, slowest in seconds); any exception but a TunesmithError ends the test."""
    rng = random.Random(seed)
    accepted, slowest = 0, 0.0
    for number in range(count):
        suffix = rng.choice(list(GOOD))
        path = folder / f"{number}{suffix}"
        path.write_bytes(_damaged(GOOD[suffix], rng))
        stage = rng.choice(("sft", "pretrain", "classify", "dpo", "grpo"))
        policy = rng.choice(("error", "skip"))
        start = time.process_time()
        try:
            records = read_records(path, stage=stage, on_bad_row=policy)
            first = list(records)
            assert list(records) == first and records.describe().encode()
            accepted += 1
            _round_trip(first, folder, stage)
        except TunesmithError as error:
            assert str(error).encode() and _is_printable(str(error)), str(error)
        slowest = max(slowest, time.process_time() - start)
        path.unlink()
    return accepted, slowest


def _round_trip(records, folder: Path, stage: str) -> None:
    """What was accepted, written as plain JSONL, reads as the same."""
    path = folder / "again.jsonl"
    if stage == "pretrain":
        path.write_text("\n".join(json.dumps({"text": record.text}) for record in records))
        assert [r.text for r in read_records(path, stage=stage)] == [r.text for r in records]
    if stage == "sft":
        rows = [[{"role": m.role, "content": m.content} for m in record.messages] for record in records]
        path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
        again = [[(m.role, m.content) for m in r.messages] for r in read_records(path, stage=stage)]
        assert again == [[(m.role, m.content) for m in r.messages] for r in records]


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    accepted, _ = _fuzz(400, 20, tmp_path)
    assert 20 < accepted < 380, "damage is sometimes harmless and sometimes not"


@pytest.mark.evidence
def test_five_thousand_damaged_files(tmp_path):
    accepted, slowest = _fuzz(5000, 21, tmp_path)
    assert accepted > 300 and slowest < 1.0
