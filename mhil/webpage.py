"""Parts of a page that needs nothing but itself: no script, font or network.

Every function returns HTML and escapes the words that it is given. What is too
wide for a window scrolls in a box of its own. Colours follow the reader's
theme; cells are shaded by a tint that the theme's ink stays legible on, 4.5
to 1 or better, at every value.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

MOST_WRITTEN = 20  # rows of a `heat` whose cells show their numbers
MOST_OPEN = 12  # rows of a table that is shown unasked
MOST_CELLS = 100  # rows and columns of it; of more, some are left out

STYLE = """\
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1f24;--soft:#57606a;
--rule:#d0d7de;--panel:#f3f5f8;--shade:86 180 233;--s0:#0072B2;--s1:#D55E00;
--s2:#009E73;--s3:#CC79A7;--s4:#56B4E9;--s5:#E69F00;--s6:#000}
@media(prefers-color-scheme:dark){:root{--ground:#14171a;--ink:#e8eaed;
--soft:#a8b0b9;--rule:#3a4149;--panel:#1e2226;--shade:0 106 166;--s0:#56B4E9;
--s4:#0072B2;--s6:#fff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1rem;background:var(--ground);
color:var(--ink);font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem;border-top:1px solid var(--rule);
padding-top:1rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p,figcaption,summary,.legend{max-width:44rem}
a{color:inherit}
code{font:.9em ui-monospace,monospace}
nav ul,.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1rem;
margin:.5rem 0;padding:0}
.facts{display:grid;gap:.5rem;margin:1rem 0;
grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr))}
.facts div{background:var(--panel);border-radius:.4rem;padding:.5rem .75rem}
.facts dt,figcaption,.missing{color:var(--soft);font-size:.875rem}
.facts dd{margin:0;font-size:1.15rem;font-variant-numeric:tabular-nums}
.beside{display:grid;gap:0 2rem;align-items:start;
grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
figure{margin:1rem 0;min-width:0}
.scroll{overflow-x:auto;margin:.25rem 0}
.chart{display:block;width:100%;min-width:20rem;max-width:34rem;height:auto}
.chart text{fill:var(--ink);font-size:13px;stroke:var(--ground);
stroke-width:3px;paint-order:stroke}
.chart .tick{fill:var(--soft)}
.chart .grid,.chart .border{stroke:var(--rule);fill:none}
.chart .border{stroke:var(--soft);stroke-dasharray:1 3}
.line{stroke:var(--c);stroke-width:2;fill:none}
.mark{fill:var(--c)}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}
.s4{--c:var(--s4)}.s5{--c:var(--s5)}.s6{--c:var(--s6)}
.s1 .line,.s5 .line{stroke-dasharray:7 3}
.s2 .line,.s6 .line{stroke-dasharray:2 3}
.s3 .line{stroke-dasharray:8 3 2 3}
.line.whisker{stroke-width:1.5;stroke-dasharray:none}
.legend{font-size:.875rem}
.legend li{display:flex;align-items:center;gap:.4rem}
.legend svg{flex:none}
table{border-collapse:collapse;font-size:.875rem;
font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--rule);
text-align:right;vertical-align:baseline;white-space:nowrap}
th{font-weight:600;vertical-align:bottom;white-space:normal;
overflow-wrap:normal}
th:first-child{text-align:left;position:sticky;left:0;
background:var(--ground)}
tbody th{font-weight:400;vertical-align:baseline}
.words td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.heat td,.heat th{border:0;padding:.3rem .35rem;text-align:center;
white-space:nowrap}
.heat td{min-width:2.6rem;border:1px solid var(--ground)}
.heat td[style]{background:rgb(var(--shade)/calc(var(--v)*1%))}
.dense td{min-width:9px;width:9px;height:9px;padding:0;border:0;font-size:0}
.dense th{padding:0 .3rem;line-height:9px;font-size:.6rem}
.dense thead th{padding:.1rem 0;max-width:9px;overflow:visible}
.dense .quiet{font-size:0}
summary{cursor:pointer;padding:.25rem 0}
"""
# Whatever a page holds, a browser that obeys this fetches and runs nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, lead: Sequence[str], sections: Mapping[str, str]) -> str:
  """A whole page, with links to its sections.

  Args:
    title: the page's heading.
    lead: HTML under it.
    sections: HTML by heading.
  """
  parts = {f"part-{i}": name for i, name in enumerate(sections)}
  links = [
    f'<li><a href="#{id}">{html.escape(name)}</a></li>'
    for id, name in parts.items()
  ]
  body = [
    f'<section id="{id}"><h2>{html.escape(name)}</h2>\n{sections[name]}'
    "</section>"
    for id, name in parts.items()
  ]
  lines = [
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>',
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>',
    '<meta name="viewport" content="width=device-width,initial-scale=1"/>',
    '<link rel="icon" href="data:,"/>',
    f"<title>{html.escape(title)}</title>\n<style>\n{STYLE}</style></head>",
    f"<body><header><h1>{html.escape(title)}</h1>",
    *lead,
    f'<nav aria-label="Sections"><ul>{"".join(links)}</ul></nav></header>'
    if links
    else "</header>",
    f"<main>{chr(10).join(body)}</main></body></html>",
  ]
  return "\n".join(lines) + "\n"


def paragraph(text: str, kind: str = "") -> str:
  """Words, in which `code` is marked as in Markdown."""
  told = f' class="{kind}"' if kind else ""
  return f"<p{told}>{_marked(text)}</p>"


def missing(reason: str) -> str:
  """Says why something is not shown."""
  return paragraph(reason, "missing")


def facts(told: Mapping[str, str]) -> str:
  """Numbers that matter, each in a field of its own."""
  fields = [
    f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>"
    for k, v in told.items()
  ]
  return f'<dl class="facts">{"".join(fields)}</dl>'


def figure(drawing: str, caption: str) -> str:
  """A chart with words under it."""
  box = _scroll(drawing, caption)
  return f"<figure>{box}<figcaption>{_marked(caption)}</figcaption></figure>"


def beside(*figures: str) -> str:
  """Figures next to each other where there is room."""
  return f'<div class="beside">{"".join(figures)}</div>'


def folded(summary: str, content: str) -> str:
  """What opens at a click."""
  head = f"<summary>{html.escape(summary)}</summary>"
  return f"<details>{head}{content}</details>"


def tabled(drawn: str, table: str, rows: int) -> str:
  """A figure with its table beside it, or folded under it if that is long."""
  if rows <= MOST_OPEN:
    return beside(drawn, table)
  return drawn + folded(f"Table of {rows:,} rows", table)


def table(
  head: Sequence[str],
  rows: Iterable[Sequence[str]],
  caption: str,
  kind: str = "",
) -> str:
  """A table whose first cells name their rows.

  Args:
    head: names of the columns.
    rows: cells, as words.
    caption: says what it holds.
    kind: `words` sets the cells to the left, where they are no numbers.
  """
  columns = "".join(f'<th scope="col">{_marked(name)}</th>' for name in head)
  body = "\n".join(
    f'<tr><th scope="row">{_marked(name)}</th>'
    + "".join(f"<td>{_marked(cell)}</td>" for cell in cells)
    + "</tr>"
    for name, *cells in rows
  )
  return _table(kind, caption, columns, body)


def heat(
  shares: Float[np.ndarray, "r c"],
  *,
  corner: str,
  rows: Sequence[str],
  columns: Sequence[str],
  caption: str,
) -> str:
  """A table of shares in %, each cell shaded by its own.

  Past `MOST_WRITTEN` rows the numbers are read by screen readers only; past
  `MOST_CELLS`, rows and columns are left out evenly, which the caption says.

  Args:
    shares: in [0, 1]; NaN leaves a cell empty.
    corner: what rows and columns are.
    rows, columns: their names.
    caption: says what it holds.
  """
  kept = [_kept(n) for n in shares.shape]
  dense = len(shares) > MOST_WRITTEN
  step = 10 if dense else 1
  if max(map(len, (rows, columns))) > MOST_CELLS:
    caption += f" One of every {kept[0].step} is shown."
  head = f'<th scope="col">{html.escape(corner)}</th>' + "".join(
    _name("col", columns[j], k % step == 0) for k, j in enumerate(kept[1])
  )
  body = "\n".join(
    f"<tr>{_name('row', rows[i], k % step == 0)}"
    + "".join(_cell(shares[i, j], len(shares)) for j in kept[1])
    + "</tr>"
    for k, i in enumerate(kept[0])
  )
  return _table("heat dense" if dense else "heat", caption, head, body)


def markdown(text: str) -> str:
  """HTML of the few forms that our own pages use: paragraphs and tables."""
  blocks, tables = [], 0
  for block in text.strip().split("\n\n"):
    if all(line.startswith("- ") for line in block.splitlines()):
      blocks += [paragraph(line[2:]) for line in block.splitlines()]
      continue
    if not re.match(r"\|.*\n\| ---", block):
      blocks.append(paragraph(block.replace("\n", " ")))
      continue
    head, _, *rows = [
      [cell.strip() for cell in line.strip("|").split("|")]
      for line in block.splitlines()
    ]
    tables += 1
    blocks.append(table(head, rows, f"Table {tables}"))
  return "\n".join(blocks)


def _kept(n: int) -> range:
  return range(0, n, -(-n // MOST_CELLS) or 1)


def _name(scope: str, name: str, loud: bool) -> str:
  quiet = "" if loud else ' class="quiet"'
  return f'<th scope="{scope}"{quiet}>{html.escape(name)}</th>'


def _cell(share: float, tasks: int) -> str:
  if np.isnan(share):
    return "<td></td>"
  told = f"{100 * share:.{1 if tasks <= 10 else 0}f}" if share else "0"
  return f'<td style="--v:{100 * share:.0f}">{told}</td>'


def _table(kind: str, caption: str, head: str, body: str) -> str:
  told = f' class="{kind}"' if kind else ""
  content = (
    f"<table{told}><thead><tr>{head}</tr></thead>\n"
    f"<tbody>{body}</tbody></table>"
  )
  # Not `caption`, which is no wider than its table: a column of single words.
  words = f"<figcaption>{_marked(caption)}</figcaption>"
  return f"<figure>{words}{_scroll(content, caption)}</figure>"


def _scroll(content: str, name: str) -> str:
  # Reached by the keyboard too, or nobody without a mouse could scroll it.
  label = html.escape(name.replace("`", ""))
  box = f'class="scroll" tabindex="0" role="group" aria-label="{label}"'
  return f"<div {box}>{content}</div>"


def _marked(text: str) -> str:
  return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
