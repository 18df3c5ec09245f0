"""The claims on one page: HTML that holds everything, figures included, and asks nobody for anything

html(stages, results, size) from what the rows left behind. Without scripts; light and dark as the reader's system
is; readable on a phone, where figures and tables scroll inside themselves.
"""

import base64
import collections
import functools
import io
import re
import struct
from html import escape

SIGNS = {"shown": ("✓", "yes"), "not shown": ("✗", "no"), "undecided": ("?", "open"), "a trial": ("…", "none"),
         "not run": ("–", "none")}
# Each kind of text, and what it is read on: "yes" stands on "on-yes".
LIGHT = {"text": "#1d1d1f", "soft": "#55555c", "link": "#0b5cad", "ground": "#ffffff", "panel": "#f3f3f5",
         "line": "#d5d5da", "yes": "#14532d", "on-yes": "#dcf5e4", "no": "#7f1d1d", "on-no": "#fde3e3",
         "open": "#713f12", "on-open": "#fdf0cd", "none": "#3f3f46", "on-none": "#ececf0"}
DARK = {"text": "#e6e6e8", "soft": "#a9a9b1", "link": "#8ab8f5", "ground": "#16171a", "panel": "#222428",
        "line": "#3b3d43", "yes": "#bff0cf", "on-yes": "#123d24", "no": "#fecaca", "on-no": "#5c1a1a",
        "open": "#fbe3a4", "on-open": "#4a3409", "none": "#d4d4d8", "on-none": "#303238"}
STYLE = """
:root { color-scheme: light dark; %s }
@media (prefers-color-scheme: dark) { :root { %s } }
html { -webkit-text-size-adjust: 100%%; scroll-padding-top: 1rem }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 46rem; color: var(--text); background: var(--ground);
       font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
       overflow-wrap: break-word }
h1, h2, h3 { line-height: 1.2; text-wrap: balance }
h1 { font-size: 2rem; margin: 0 0 .75rem } h2 { font-size: 1.4rem; margin: 4rem 0 0 }
h3 { font-size: 1.2rem; margin: 0 0 .75rem } nav h2 { font-size: 1rem; margin: 1.5rem 0 .25rem }
a { color: var(--link); text-underline-offset: .15em } p { margin: .75rem 0 }
nav ul { list-style: none; margin: 0; padding: 0 }
nav li { display: flex; flex-wrap: wrap; gap: .25rem 1rem; align-items: baseline; padding: .4rem 0;
         border-bottom: 1px solid var(--line) }
nav li :first-child { flex: 1 1 11rem }
section { padding: 2.25rem 0; border-bottom: 1px solid var(--line) }
blockquote { margin: 0; padding-left: 1rem; border-left: 3px solid var(--line); color: var(--soft) }
.badge { display: inline-block; flex: none; padding: .1rem .6rem; border-radius: 1rem; font-size: .85rem;
         font-weight: 600; white-space: nowrap; color: var(--none); background: var(--on-none) }
.badge.yes { color: var(--yes); background: var(--on-yes) } .badge.no { color: var(--no); background: var(--on-no) }
.badge.open { color: var(--open); background: var(--on-open) }
.warning { padding: .75rem 1rem; border-radius: .5rem; color: var(--no); background: var(--on-no) }
.soft, dt { color: var(--soft); font-size: .9rem } dt { margin-top: .75rem } dd { margin: 0 }
figure { margin: 1.25rem 0 }
figure, .table { overflow-x: auto } figure img { display: block; width: 100%%; min-width: 35rem; height: auto }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem 1rem .3rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal }
@media (min-width: 66rem) { .table { margin-right: -9rem } }
details { margin-top: 1.25rem; padding: .6rem 1rem; border-radius: .5rem; background: var(--panel) }
summary { cursor: pointer; font-weight: 600 } dl { margin: .25rem 0 .5rem }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
"""
# What this page may load: its own pictures and its own style, and nothing from anywhere.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html(stages, results, pictures, size):
    """The page. stages: {title: rows}; results: {row: what experiment.run wrote}, of the rows that were run;
    pictures: {row: PNGs, for light and dark}."""
    parts = ["<h1>The lecture as numbers</h1>", _summary(sum(map(len, stages.values())), results.values(), size)]
    if size == "quick":
        parts.append('<p class="warning" role="note"><strong>A quick run.</strong> It shows that the experiments run, '
                     'and proves nothing: models are hardly trained, and the outcomes below mean nothing.</p>')
    parts.append(_contents(stages, results))
    for title, rows in stages.items():
        if rows := [row for row in rows if row in results]:
            parts += [f"<h2>{escape(title)}</h2>", *(_section(row, results[row], pictures[row]) for row in rows)]
    style = STYLE % tuple(" ".join(f"--{name}: {colour};" for name, colour in scheme.items())
                          for scheme in (LIGHT, DARK))
    head = ('<meta charset="utf-8">', f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">', "<title>The lecture as numbers</title>",
            f"<style>{style}</style>")
    return "\n".join(['<!DOCTYPE html>\n<html lang="en">\n<head>', *head, "</head>\n<body>\n<main>", *parts,
                      "</main>\n</body>\n</html>\n"])


@functools.cache
def compact(png, colours=256, scale=1):
    """The same picture from a palette, and smaller if need be: a third of the bytes, of a figure of lines."""
    from PIL import Image
    picture, file = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    if scale != 1:
        picture = picture.resize([round(scale * side) for side in picture.size], Image.Resampling.BOX)
    picture.quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def _badge(outcome):
    sign, kind = SIGNS[outcome]
    return f'<span class="badge {kind}"><span aria-hidden="true">{sign}</span> {outcome}</span>'


def _summary(claims, results, size):
    count = collections.Counter(result["outcome"] for result in results)
    lines = [f"<p>From language model to assistant: what the lecture claims, each claim an experiment in minilm. "
             f"Of {claims} claims {len(results)} were tested here: {count['shown']} are shown, "
             f"{count['not shown']} are not shown, {count['undecided']} are undecided.</p>"]
    if results:
        dates, machines = (sorted({result[name] for result in results}) for name in ("date", "machine"))
        seeds = sorted({len(result["seeds"]) for result in results})
        minutes = sum(result["seconds"] for result in results) / 60
        lines.append(f'<p class="soft">{escape(" to ".join(dict.fromkeys((dates[0], dates[-1]))))}, {size} size, '
                     f"{'–'.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds a claim, "
                     f"{minutes:.0f} minutes in all on {escape('; '.join(machines))}.</p>")
    return "\n".join(lines)


def _contents(stages, results):
    lines = ['<nav aria-label="Outcomes">']
    for title, rows in stages.items():
        lines.append(f"<h2>{escape(title)}</h2>\n<ul>")
        for row in rows:
            if row in results:
                link = f'<a href="#{row}">{escape(results[row]["title"])}</a>'
                lines.append(f"<li>{link} {_badge(results[row]['outcome'])}</li>")
            else:
                lines.append(f'<li><span class="soft">{row}</span> {_badge("not run")}</li>')
        lines.append("</ul>")
    return "\n".join([*lines, "</nav>"])


def _section(row, result, pictures):
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    made = (f"scripts/lecture/{row}.py; {result['size']} size: {len(result['seeds'])} seeds; {settings}. "
            f"{result['seconds']:.0f} s, workers {result['workers']}; {result['date']}, {result['machine']}.")
    terms = {"Test": result["Test"], "Rule": result["Rule"], "Limits": result["Limits"],
             "Source": result["Source"], "Made by": made}
    told = "\n".join(f"<dt>{name}</dt><dd>{_linked(escape(text))}</dd>" for name, text in terms.items())
    return "\n".join([f'<section id="{row}">', f"<h3>{escape(result['title'])}</h3>",
                      f"<blockquote><strong>Claim.</strong> {escape(result['Claim'])}</blockquote>",
                      f"<p>{_badge(result['outcome'])} {escape(result['words'])}</p>",
                      _figure(result["words"], *pictures), _table(result["title"], result["table"]),
                      "<details><summary>How it was tested, and what it cannot show</summary>",
                      f"<dl>\n{told}\n</dl>", "</details>", "</section>"])


def _figure(alt, light, dark):
    width, height = struct.unpack(">II", light[16:24])      # of the PNG's header: nothing moves while it is read
    return (f'<figure tabindex="0"><picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
            f'<img src="{_data(light)}" width="{width}" height="{height}" alt="{escape(alt)}"></picture></figure>')


def _data(png):
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _table(name, table):
    head, *body = [[escape(str(cell)) for cell in line] for line in table]
    lines = ["".join(f'<th scope="col">{cell}</th>' for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in line) for line in body]
    return (f'<div class="table" role="region" tabindex="0" aria-label="{escape("Table: " + name)}"><table>\n'
            + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>")


def _linked(text):
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', text)
