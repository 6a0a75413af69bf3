"""The parts of a page: escaped text, tables, figures and the frame around them. No scripts, nothing from outside."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tunesmith.errors import masked
from tunesmith.evaluate.compare import number

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
STYLE = """
:root{--ink:#1a1c20;--soft:#5b6470;--line:#dfe3e8;--page:#fff;--tint:#f5f7f9;--good:#12693f;--bad:#a8221b;--flat:#8a5a00}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a3acb8;--line:#343a42;--page:#15181c;--tint:#1e2228;
--good:#63cf98;--bad:#ff8f86;--flat:#f0bf62}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:62rem;margin:0 auto;padding:2rem 1.25rem 4rem}h1{font-size:1.6rem;margin:0}
h2{font-size:1.15rem;margin:2.4rem 0 .6rem}p{margin:.5rem 0}.soft{color:var(--soft)}.small{font-size:.875rem}
.verdict{margin:1.2rem 0;padding:1rem 1.2rem;border-left:.4rem solid;background:var(--tint);font-size:1.1rem}
.better{color:var(--good)}.worse{color:var(--bad)}.flat{color:var(--flat)}.verdict p{color:var(--ink)}
.verdict strong{display:block;font-size:1.35rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .7rem .4rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{font-weight:600;color:var(--soft);font-size:.875rem}td.n,th.n{text-align:right}td .soft{white-space:nowrap}
.narrow{width:auto;min-width:22rem}.narrow thead{display:none}.two+div{border-top:1px solid var(--line)}
figure{margin:1rem 0}figure img{width:100%;height:auto;background:#fff;border:1px solid var(--line);border-radius:6px}
figcaption{color:var(--soft);font-size:.875rem}.sample{border:1px solid var(--line);border-radius:6px;margin:1rem 0}
.sample>div{padding:.7rem 1rem}.sample .two{display:grid;grid-template-columns:1fr 1fr;padding:0;
border-top:1px solid var(--line)}.two>div{padding:.7rem 1rem}.two>div+div{border-left:1px solid var(--line)}
@media(max-width:42rem){.sample .two{grid-template-columns:1fr}
.two>div+div{border-left:0;border-top:1px solid var(--line)}}
.label{color:var(--soft);font-size:.8rem;font-weight:600}pre,.text{white-space:pre-wrap;overflow-wrap:anywhere;margin:0}
pre{background:var(--tint);padding:1rem;border-radius:6px;font-size:.85rem}code{overflow-wrap:anywhere}
ul{padding-left:1.2rem}li{margin:.25rem 0}details>summary{cursor:pointer;color:var(--soft)}
"""


class Markup(str):
    """Text that is HTML already; everything else is escaped on its way into the page."""

    __slots__ = ()


def clean(value: Any) -> str:
    """Plain text fit to show: keys and tokens struck out, control and direction characters made visible."""
    text = masked(str(value).encode("utf-8", "backslashreplace").decode())
    return _CONTROL.sub(lambda m: f"\\u{ord(m[0]):04x}", text.replace("\r\n", "\n"))


def esc(value: Any) -> Markup:
    """Escaped, unless it is markup already."""
    return value if isinstance(value, Markup) else Markup(html.escape(clean(value), quote=True))


def join(parts: Iterable[Any]) -> Markup:
    """All parts, one after another."""
    return Markup("\n".join(esc(part) for part in parts if part))


def tag(name: str, content: Any, css: str = "") -> Markup:
    """One element around escaped content."""
    attribute = f' class="{html.escape(css, quote=True)}"' if css else ""
    return Markup(f"<{name}{attribute}>{esc(content)}</{name}>")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, numeric: Sequence[int] = ()) -> Markup:
    """A table; the columns in `numeric` stand to the right."""
    right = set(numeric)
    css = "" if any(head) else ' class="narrow"'
    top = "".join(tag("th", cell, "n" if i in right else "") for i, cell in enumerate(head))
    body = "".join(
        "<tr>" + "".join(tag("td", cell, "n" if i in right else "") for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return Markup(f'<div class="scroll"><table{css}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')


def section(title: str, *parts: Any) -> Markup:
    """A heading with what belongs to it; empty when nothing does."""
    inner = join(parts)
    return Markup(f"<section>{tag('h2', title)}\n{inner}</section>") if inner else Markup("")


def figure(svg: bytes, alt: str) -> Markup:
    """A picture inside the page. An SVG shown as an image cannot run or fetch anything."""
    data = base64.b64encode(svg).decode()
    image = f'<img alt="{esc(alt)}" src="data:image/svg+xml;base64,{data}">'
    return Markup(f"<figure>{image}<figcaption>{esc(alt)}</figcaption></figure>")


def page(title: str, body: Markup) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )


def amount(value: Any) -> str:
    """A metric's value as text; a dash where there is none."""
    return number(float(value)) if is_number(value) else ("–" if value is None else str(value))


def is_number(value: Any) -> bool:
    """True for int and float, not for bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def interval(low: Any, high: Any, *, sign: bool = False) -> str:
    """`0.812 to 0.864`, or that there is none."""
    if not is_number(low) or not is_number(high):
        return "no interval"
    return f"{number(float(low), sign=sign)} to {number(float(high), sign=sign)}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(num_bytes: float) -> str:
    """`1.2 GB` in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
