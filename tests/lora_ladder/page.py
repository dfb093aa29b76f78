"""A climb as one HTML page to send to a trainer's author: `lora-ladder my_adapter:MyTrainer --html FILE`.

It has no script and loads nothing. Whatever comes from the trainer is escaped.
"""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

from tests.lora_ladder.output import printable

MARK = "<!-- lora-ladder -->"  # a page that begins so may be replaced
WORDS = ("passed", "failed", "error", "not claimed", "blocked", "skipped", "known failures")

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1d2129; --quiet: #5c6470; --line: #d9dde3;
  --field: #f4f5f7; --good: #1a7f37; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181d; --ink: #e6e8eb; --quiet: #9aa3af;
  --line: #343a43; --field: #1f242b; --good: #57c26f; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 54rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
pre { background: var(--field); padding: .75rem; border-radius: .4rem; overflow-x: auto;
  white-space: pre-wrap; font: 13px/1.45 ui-monospace, monospace; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); }
.quiet { color: var(--quiet); } .passed, .good { color: var(--good); }
.failed, .error, .bad { color: var(--bad); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--quiet); } dd { margin: 0; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""

# A browser takes the style of this hash, and nothing else from anywhere.
POLICY = (
    f"default-src 'none'; style-src 'sha256-{b64encode(sha256(STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'"
)


def escape(text: str) -> str:
    """As HTML, without what a terminal obeys."""
    return html.escape(printable(text))


def page(record: Mapping[str, Any]) -> str:
    """The page for a record of record.py."""
    title = f"{record['trainer']} on the LoRA ladder"
    first = record["first_divergence"]
    parts = [
        f"<h1>{escape(title)}</h1>",
        headline(record, first),
        interruption(record["interrupted"]),
        divergence(first) if first else "",
        "<h2>What was judged</h2>",
        judged(record),
        "<h2>Rung by rung</h2>",
        "<p class=quiet>A rung relies only on those below it, so the first that fails is the diagnosis.</p>",
        rungs(record["rungs"]),
        failures(record["claims"]),
    ]
    return (
        f"{MARK}\n<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def headline(record: Mapping[str, Any], first: Mapping[str, Any] | None) -> str:
    counts = ", ".join(f"{record['counts'][word]} {word}" for word in WORDS if record["counts"].get(word))
    if first is None:
        kind = "good" if record["verdict"] == "no divergence" else "bad"
        said = next((s for s in record["summary"] if s.startswith(record["verdict"])), record["verdict"])
        return f"<p><strong class={kind}>{escape(said)}</strong>; {escape(counts or 'no claim')}.</p>"
    where = f"The first divergence is at rung {first['rung']}, {first['title']}"
    return f"<p><strong class=bad>{escape(where)}</strong>: {escape(counts)}.</p>"


def interruption(claim: str | None) -> str:
    where = f"The climb was interrupted ({claim}): what follows was not judged."
    return f"<p><strong class=bad>{escape(where)}</strong></p>" if claim else ""


def divergence(first: Mapping[str, Any]) -> str:
    """The numbers, the derivation of the tolerance, and how to see them again."""
    verb = "raised an error" if first["outcome"] == "error" else "does not hold"
    return (
        f"<h2>The first divergence</h2>\n<p>The claim <em>{escape(first['claim'])}</em> {verb}.</p>\n"
        f"<pre>{escape(chr(10).join(first['report']))}</pre>\n"
        f"<p>To see it again, with lora-ladder installed, in the folder of the adapter:</p>\n"
        f"<pre>{escape(first['replay'])}</pre>"
    )


def judged(record: Mapping[str, Any]) -> str:
    rows = {
        "trainer": record["trainer"],
        "declared": "; ".join(record["departures"]) or "nothing: judged by PyTorch's and PEFT's semantics",
        "optimizer from": record["optimizer_from"],
        "schedule from": record["schedule_from"],
        "not claimed": ", ".join(record["not_claimed"]) or "nothing",
        "offered, not judged": "; ".join(f"{n}: {why}" for n, why in record["offered_not_judged"].items())
        or "nothing",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "time": f"{record['seconds']} s, draw {record['draw']}",
    }
    items = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items())
    return f"<dl>\n{items}\n</dl>"


def rungs(rows: Iterable[Mapping[str, Any]]) -> str:
    body = "\n".join(map(rung, rows))
    head = "<tr><th>rung</th><th></th><th>claims</th><th>most of a tolerance</th></tr>"
    return f"<div class=scroll><table>\n{head}\n{body}\n</table></div>"


def rung(row: Mapping[str, Any]) -> str:
    words = [word for word in WORDS if row["counts"].get(word)]
    claims = ", ".join(f'<span class="{word}">{row["counts"][word]} {word}</span>' for word in words)
    share = "" if row["share"] is None else f"{row['share']:.0%} ({escape(row['tensor'])})"
    return f"<tr><td>{row['rung']}</td><td>{escape(row['title'])}</td><td>{claims}</td><td>{share}</td></tr>"


def failures(claims: Iterable[Mapping[str, Any]]) -> str:
    """Every claim that does not hold, with its reason."""
    failed = [claim for claim in claims if claim["outcome"] in ("failed", "error")]
    items = "\n".join(
        f"<details><summary>rung {claim['rung']}, <span class={claim['outcome']}>{claim['outcome']}</span>: "
        f"{escape(claim['claim'])}</summary><pre>{escape(claim['reason'])}</pre></details>"
        for claim in failed
    )
    return f"<h2>All that does not hold</h2>\n{items}" if failed else ""
