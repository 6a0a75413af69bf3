"""Chat templates are programs that came with a model: they are tried in a child process before they are used."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache

from tunesmith.errors import DataError

TEMPLATE_SECONDS = 2
TEMPLATE_BYTES = 512 << 20

_TRIAL = """
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
    resource.setrlimit(resource.RLIMIT_AS, ({size}, {size}))
except (ImportError, ValueError, OSError):
    pass
from datetime import datetime
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
class Refused(Exception):
    pass
def refuse(message):
    raise Refused(message)
class Generation(Extension):
    tags = {{"generation"}}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)
    def _same(self, caller):
        return caller()
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
)
environment.globals.update(raise_exception=refuse, strftime_now=lambda f: datetime.now().strftime(f))
environment.filters["tojson"] = lambda value, **_: str(value)
ask, tell = {{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b"}}
call = {{"type": "function", "function": {{"name": "f", "arguments": {{"x": 1}}}}}}
tool = {{"type": "function", "function": {{"name": "f", "description": "d", "parameters": {{"properties": {{}}}}}}}}
shapes = [
    ([ask, tell], None),
    ([ask], None),
    ([{{"role": "system", "content": "s"}}, *[ask, tell] * 8], None),
    ([ask, {{"role": "assistant", "content": "", "tool_calls": [call]}}, {{"role": "tool", "content": "1"}}, tell],
     [tool]),
]
template = environment.from_string(sys.stdin.read())
failed = None
good = 0
for messages, tools in shapes:
    for generation in (False, True):
        try:
            text = template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=generation,
                bos_token="", eos_token="", pad_token="", unk_token="",
            )
        except Refused:
            good += 1
        except (MemoryError, OverflowError):
            raise
        except Exception as error:
            failed = error
        else:
            good += 1
            if len(text) > 1000000:
                raise MemoryError("too long a text")
if not good:
    raise failed
"""


@lru_cache(maxsize=32)
def check_template(template: str) -> None:
    """Render the template in a sandbox, in a child process with limits on time and memory, or raise `DataError`.

    Short talks, a long one and one with tools are rendered: the sandbox keeps the template from reaching anything,
    and the limits from never ending. What it refuses by itself (`raise_exception`) is its good right.
    """
    trial = _TRIAL.format(seconds=TEMPLATE_SECONDS, size=TEMPLATE_BYTES)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", trial],
            input=template.encode("utf-8", "surrogatepass"),
            capture_output=True,
            timeout=60 * TEMPLATE_SECONDS,  # processor time is limited above; a busy machine may give it late
        )
    except subprocess.TimeoutExpired:
        raise DataError("the chat template does not end; take another tokenizer, or mend chat_template") from None
    if done.returncode == 0:
        return
    if done.returncode < 0 or b"MemoryError" in done.stderr:
        raise DataError(
            f"the chat template takes more than {TEMPLATE_SECONDS} s or {TEMPLATE_BYTES >> 20} MB for a few short "
            "turns; it is broken or hostile, and was not used"
        )
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
    raise DataError(f"the chat template cannot be rendered: {last[0][:300]}; mend chat_template")
