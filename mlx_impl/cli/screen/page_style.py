"""The style sheet of report.html: light or dark as the reader's system, for a phone's width and a desk's."""

from __future__ import annotations

from .markup import Html

STYLE = Html("""
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --muted: #57606a; --line: #d0d7de;
  --card: #f6f8fa; --blue: #0860c4; --orange: #b84400; --green: #1a7a36; --red: #c2212c; --purple: #7a45d1 }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --muted: #9da7b1;
  --line: #3d444d; --card: #161b22; --blue: #5ba4ff; --orange: #ff9a4d; --green: #4cc764; --red: #ff7b72;
  --purple: #bc95ff } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; margin: 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
h1, p, td, th, dd, pre { overflow-wrap: anywhere }
.muted { color: var(--muted); margin: .25rem 0 1rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .5rem; margin: 0 }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .5rem .75rem }
dt { color: var(--muted); font-size: .85rem }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums }
figure { margin: 0 0 1.5rem }
figcaption { font-size: .85rem; margin-bottom: .5rem }
.key { margin-left: 1rem; white-space: nowrap }
.key::before { content: ""; display: inline-block; width: .9em; height: .25em; margin-right: .4em;
  vertical-align: middle; background: currentColor }
.key.training { color: var(--blue) } .key.faint { opacity: .6 } .key.validation { color: var(--orange) }
.key.best { color: var(--red) } .key.rate { color: var(--purple) }
.plot { position: relative; margin: 0 .75rem 1.75rem 3.25rem; border-left: 1px solid var(--line);
  border-bottom: 1px solid var(--line) }
.plot svg { position: absolute; width: 100%; height: 100%; overflow: visible }
.plot path, .plot line { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round }
.plot .grid { stroke: var(--line); stroke-width: 1; opacity: .6 }
.curve { stroke-width: 2 } .curve.faint { stroke-width: 1; opacity: .35 }
.dots { stroke-linecap: round; stroke-width: 7 } .dots.best { stroke-width: 11 }
.training { stroke: var(--blue) } .validation { stroke: var(--orange) } .best { stroke: var(--red) }
.rate { stroke: var(--purple) }
.tick { position: absolute; color: var(--muted); font-size: .75rem; line-height: 1;
  font-variant-numeric: tabular-nums }
.tick.x { top: calc(100% + .4rem); transform: translateX(-50%) }
.tick.y { right: calc(100% + .4rem); transform: translateY(-50%) }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: start; vertical-align: top; padding: .35rem .5rem; border-bottom: 1px solid var(--line) }
th { color: var(--muted); font-weight: 500 }
.facts th { width: 12rem }
.answers { table-layout: fixed }
td span, .facts td { white-space: pre-wrap; unicode-bidi: isolate }
.badge { display: inline-block; margin-right: .4rem; padding: 0 .4rem; border: 1px solid; border-radius: 1rem;
  font-size: .75rem; font-weight: 600 }
.badge.right { color: var(--green) } .badge.wrong { color: var(--red) } .badge.cut { color: var(--orange) }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .75rem;
  white-space: pre-wrap }
summary { cursor: pointer; padding: .5rem 0; color: var(--blue) }
@media (max-width: 40rem) {
  .answers thead { display: none }
  .answers tr { display: block; border-bottom: 1px solid var(--line); padding: .5rem 0 }
  .answers td { display: block; border: 0; padding: .15rem 0 }
  .answers td::before { content: attr(data-title) ": "; color: var(--muted); font-size: .8rem }
  .facts th { width: 8rem }
  .key { display: block; margin: 0 }
}
""")
