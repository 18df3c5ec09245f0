"""The claims on one page: HTML that contains everything, figures included, and loads nothing.

html(words, stages, results, pictures, size) from what the experiments wrote. Without scripts; light or dark as
the reader's system is; titles, claims and glossary of the lecture in English or Korean, as the
reader chooses. On a wide
screen the contents stay at the left, on a phone a bar with links stays at the top; figures and tables
scroll sideways inside themselves, and say so. Tests: tests/test_lecture.py.
"""

import base64
import collections
import functools
import io
import re
import struct
from html import escape

from common import korean
from common.glossary import FORMULAS, TERMS, WORDS
from common.intervals import TRIAL, as_number
from common.text import first_sentence
from common.words import Words

OBJECTIVES = "The four objectives"
LANGUAGES = """<p class="language" role="radiogroup" aria-label="Language">
<input type="radio" name="language" id="english" checked> <label for="english">English</label>
<input type="radio" name="language" id="korean"> <label for="korean" lang="ko">한국어</label></p>"""
SIGNS = {"shown": ("✓", "yes"), "not shown": ("✗", "no"), "undecided": ("?", "open"), TRIAL: ("…", "none"),
         "not run": ("–", "none")}
# Each kind of text, and its background: "yes" stands on "on-yes".
LIGHT = {"text": "#1d1d1f", "soft": "#55555c", "link": "#0b5cad", "ground": "#ffffff", "panel": "#f3f3f5",
         "line": "#d5d5da", "yes": "#14532d", "on-yes": "#dcf5e4", "no": "#7f1d1d", "on-no": "#fde3e3",
         "open": "#713f12", "on-open": "#fdf0cd", "none": "#3f3f46", "on-none": "#ececf0"}
DARK = {"text": "#e6e6e8", "soft": "#a9a9b1", "link": "#8ab8f5", "ground": "#16171a", "panel": "#222428",
        "line": "#3b3d43", "yes": "#bff0cf", "on-yes": "#123d24", "no": "#fecaca", "on-no": "#5c1a1a",
        "open": "#fbe3a4", "on-open": "#4a3409", "none": "#d4d4d8", "on-none": "#303238"}
STYLE = """
:root { color-scheme: light dark; %s }
@media (prefers-color-scheme: dark) { :root { %s } }
html { -webkit-text-size-adjust: 100%%; scroll-padding-top: 3.5rem }
body { margin: 0 auto; padding: 0 1.25rem 5rem; max-width: 76rem;
       color: var(--text); background: var(--ground);
       font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
       overflow-wrap: break-word }
h1, h2, h3 { line-height: 1.2; text-wrap: balance }
h1 { font-size: 2rem; margin: 2rem 0 .75rem } h2 { font-size: 1.4rem; margin: 4rem 0 0 }
h3 { font-size: 1.2rem; margin: 0 0 .75rem } section > h2 { margin-top: 0 }
nav h2 { font-size: .9rem; margin: 1.25rem 0 .25rem }
a { color: var(--link); text-underline-offset: .15em } p { margin: .75rem 0 }
p, dl, blockquote { max-width: 46rem }
nav ul { list-style: none; margin: 0; padding: 0 }
nav li { display: flex; gap: .25rem 1rem; align-items: baseline; padding: .4rem 0;
         border-bottom: 1px solid var(--line); font-size: .9rem }
nav li :first-child { flex: 1 1 9rem; min-width: 0 }
.bar { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .25rem .9rem;
       margin: 0 -1.25rem; padding: .6rem 1.25rem; max-width: none; font-size: .9rem;
       background: var(--panel); border-bottom: 1px solid var(--line) }
section { padding: 2.25rem 0; border-bottom: 1px solid var(--line) }
blockquote { margin: 0; padding-left: 1rem; border-left: 3px solid var(--line); color: var(--soft) }
.badge { display: inline-block; flex: none; padding: .1rem .6rem; border-radius: 1rem; font-size: .85rem;
         font-weight: 600; white-space: nowrap; color: var(--none); background: var(--on-none) }
.badge.yes { color: var(--yes); background: var(--on-yes) }
.badge.no { color: var(--no); background: var(--on-no) }
.badge.open { color: var(--open); background: var(--on-open) }
.note { padding: .75rem 1rem; border-radius: .5rem; color: var(--none); background: var(--on-none) }
.soft, dt { color: var(--soft); font-size: .9rem } dt { margin-top: .75rem } dd { margin: 0 }
.ko { word-break: keep-all }
.ko, body:has(#korean:checked) .en { display: none } body:has(#korean:checked) .ko { display: revert }
.language { font-size: .9rem } .language label { margin-right: .9rem; cursor: pointer }
.formula { font-family: Cambria, "STIX Two Text", "Noto Serif", serif }
figure { margin: 1.25rem 0 0 }
figure, .table { overflow-x: auto; scrollbar-width: thin; scrollbar-color: var(--soft) var(--panel) }
figure img { display: block; width: 100%%; min-width: 35rem; max-width: 62rem; height: auto }
.table { background:
           linear-gradient(to left, var(--ground) 40%%, transparent) 100%% 0 / 4rem 100%% no-repeat local,
           linear-gradient(to left, var(--line), transparent) 100%% 0 / 1.5rem 100%% no-repeat scroll }
.hint { margin: .25rem 0 0; color: var(--soft); font-size: .8rem }
.hint::before { content: "\\2194  " }
@media (min-width: 40rem) { .hint.narrow { display: none } }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; margin-top: 1rem }
th, td { padding: .3rem 1rem .3rem 0; text-align: left; white-space: nowrap; vertical-align: top;
         border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal }
td:first-child { white-space: normal; min-width: 8rem; max-width: 22rem }
details { margin-top: 1.25rem; padding: .6rem 1rem; border-radius: .5rem; background: var(--panel) }
details .table { background: none }
summary { cursor: pointer; font-weight: 600 } dl { margin: .25rem 0 .5rem }
.turn { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: 1.5rem 0 0; font-size: .9rem }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
@media (min-width: 66rem) {
  .bar { display: none } html { scroll-padding-top: 1rem }
  .page { display: grid; grid-template-columns: 18rem minmax(0, 1fr); column-gap: 3rem;
          grid-template-rows: auto 1fr }
  header, main { grid-column: 2 }
  nav { grid-column: 1; grid-row: 1 / span 2; position: sticky; top: 0; align-self: start;
        max-height: 100vh; overflow-y: auto; padding: 0 .5rem 1rem 0;
        box-sizing: border-box; scrollbar-width: thin }
}
"""
# The page may load its own pictures and its own style, and nothing else.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MEANINGS = {"shown": "the intervals of the comparisons of the rule lie beyond their margins",
            "not shown": "the interval of some comparison lies on the wrong side of its margin: the rule "
                         "fails here, which says little about large models",
            "undecided": "neither, or the model did not learn the task that the rule is about"}


def html(words: Words, stages: dict, results: dict, pictures: dict, size: str) -> str:
    """The page. stages: {title: names}; results: {name: what experiment.run wrote}, of the experiments that
    were run; pictures: {name: PNGs, for light and dark}."""
    header = [f'<h1 id="top">{_both(words.title, words.korean.title)}</h1>', LANGUAGES if words.korean.title else "",
              f"<p>{_both(words.introduction, words.korean.introduction)}</p>",
              _summary(sum(map(len, stages.values())), results.values(), size)]
    main = []
    if size == "quick":
        header.append('<p class="note" role="note"><strong>A trial.</strong> It shows that the experiments '
                      'run. It decides nothing: the models are hardly trained.</p>')
    order = [name for names in stages.values() for name in names if name in results]
    for i, (title, names) in enumerate(stages.items(), 1):
        if names := [name for name in names if name in results]:
            main += [f'<h2 id="stage-{i}">{_both(title, words.korean.stages.get(i))}</h2>',
                     *(_section(words, name, results[name], pictures[name], order) for name in names)]
    main += [_formulas(), _glossary()]
    style = STYLE % tuple(" ".join(f"--{name}: {colour};" for name, colour in scheme.items())
                          for scheme in (LIGHT, DARK))
    head = ('<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(words.title)}</title>", f"<style>{style}</style>")
    return "\n".join(['<!DOCTYPE html>\n<html lang="en">\n<head>', *head, "</head>\n<body>",
                      _bar(stages, results), '<div class="page">\n<header>', *header, "</header>",
                      _contents(words, stages, results), "<main>", *main, "</main>\n</div>\n</body>\n</html>\n"])


@functools.cache
def compact(png: bytes, colours: int = 256, scale: float = 1) -> bytes:
    """The same picture from a palette, and smaller if need be: a third of the bytes, of a figure of lines.

    Raises OSError for bytes that are no picture, or one too large to be a figure.
    """
    from PIL import Image
    try:
        picture, file = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    except (SyntaxError, Image.DecompressionBombError) as error:        # Pillow's of some damaged files
        raise OSError(str(error)) from error
    if scale != 1:
        picture = picture.resize([round(scale * side) for side in picture.size], Image.Resampling.BOX)
    picture.quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def _both(english, in_korean):
    """Text in both languages, of which the page shows the one that is chosen; in English alone without the other."""
    english, in_korean = (escape(text or "", quote=False) for text in (english, in_korean))
    return f'<span class="en">{english}</span><span class="ko" lang="ko">{in_korean}</span>' if in_korean else english


def _sentence(words):
    return f"{words[0].upper()}{words[1:]}."


def _title(name, result):
    return _both(result["title"], korean.titles().get(name))


def _badge(outcome):
    sign, kind = SIGNS[outcome]
    words = _both(outcome, korean.OUTCOMES[outcome])
    return f'<span class="badge {kind}"><span aria-hidden="true">{sign}</span> {words}</span>'


def _summary(claims, results, size):
    count = collections.Counter(result["outcome"] for result in results)
    outcomes = ", ".join(f"{count[outcome]} {outcome}" for outcome in SIGNS if count[outcome])
    lines = [f"<p>{len(results)} of {claims} experiments were run: {outcomes or 'none'}.</p>"]
    if count.keys() - {TRIAL}:
        meanings = (f"<dt>{_badge(outcome)}</dt><dd>{_both(text, korean.MEANINGS[outcome])}</dd>"
                    for outcome, text in MEANINGS.items())
        lines += ["<dl>", *meanings, "</dl>"]
    if results:
        dates, machines = (sorted({result[name] for result in results}) for name in ("date", "machine"))
        seeds = sorted({len(result["seeds"]) for result in results})
        minutes = sum(result["seconds"] for result in results) / 60
        date = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        lines.append(f'<p class="soft">{escape(date)}, size {size}, '
                     f"{' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds per experiment, "
                     f"{minutes:.0f} min in all on {escape('; '.join(machines))}.</p>")
    return "\n".join(lines)


def _bar(stages, results):
    """The links that stay at the top of a narrow screen."""
    links = [("#contents", "Contents")]
    links += [(f"#stage-{i}", f"Stage {i}" if i == 1 else str(i))
              for i, names in enumerate(stages.values(), 1) if results.keys() & {*names}]
    links += [("#formulas", "Formulas"), ("#glossary", "Glossary")]
    return '<p class="bar">' + " ".join(f'<a href="{to}">{text}</a>' for to, text in links) + "</p>"


def _contents(words, stages, results):
    lines = ['<nav id="contents" aria-label="Contents">']
    for i, (title, names) in enumerate(stages.items(), 1):
        lines.append(f"<h2>{_both(title, words.korean.stages.get(i))}</h2>\n<ul>")
        for name in names:
            if name in results:
                link = f'<a href="#{name}">{_title(name, results[name])}</a>'
                lines.append(f"<li>{link} {_badge(results[name]['outcome'])}</li>")
            else:
                lines.append(f'<li><span class="soft">{name}</span> {_badge("not run")}</li>')
        lines.append("</ul>")
    lines.append(f'<h2>{_both("To look up", "찾아보기")}</h2>\n<ul>'
                 f'<li><a href="#formulas">{_both(OBJECTIVES, korean.OBJECTIVES)}</a></li>'
                 f'<li><a href="#glossary">{_both("Glossary", korean.GLOSSARY)}</a></li></ul>')
    return "\n".join([*lines, "</nav>"])


def _section(words, name, result, pictures, order):
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    made = (f"scripts/lecture/{name}.py; {result['size']} size: {len(result['seeds'])} seeds; {settings}. "
            f"{result['seconds']:.0f} s, workers {result['workers']}; {result['date']}, {result['machine']}.")
    terms = {"Test": result["Test"], "Rule": result["Rule"], "Limits": result["Limits"],
             "Source": result["Source"], "Made by": made}
    details = "\n".join(f"<dt>{term}</dt><dd>{_linked(escape(text))}</dd>" for term, text in terms.items())
    return "\n".join([f'<section id="{name}">', f"<h3>{_title(name, result)}</h3>",
                      f"<blockquote><strong>{_both(_sentence(words.claim), words.korean.claim)}</strong> "
                      f"{_both(result['Claim'], korean.CLAIMS.get(name))}</blockquote>",
                      f"<p>{_badge(result['outcome'])} <strong>Rule tested here.</strong> "
                      f"{escape(first_sentence(result['Rule']))}</p>",
                      f"<p><strong>Measured.</strong> {escape(result['words'])}</p>",
                      _figure(result, *pictures), _rules(result),
                      "<details><summary>All numbers</summary>", _numbers(result), "</details>",
                      "<details><summary>How it was tested, and its limits</summary>",
                      f"<dl>\n{details}\n</dl>", "</details>", _turn(name, order), "</section>"])


def _numbers(result):
    """The tables of an experiment, and the legend of the first."""
    parts = [_table(result["title"], result["table"])]
    if result.get("legend"):
        parts.append(f"<p>{escape(result['legend'])}</p>")
    if result.get("details"):
        parts.append(_table(f"details of: {result['title']}", result["details"]))
    return "\n".join(parts)


def _turn(name, order):
    """Links to the neighbours and to the top."""
    i = order.index(name)
    links = [f'<a href="#{other}">← previous</a>' for other in order[:i][-1:]]
    links += [f'<a href="#{other}">next →</a>' for other in order[i + 1:i + 2]]
    return '<p class="turn">' + " ".join([*links, '<a href="#top">↑ top</a>']) + "</p>"


def _figure(result, light, dark):
    width, height = struct.unpack(">II", light[16:24])      # of the PNG's header, so that nothing moves
    trial = " of a trial, which decides nothing" * (result["outcome"] == TRIAL)
    alternative = escape(f"Figure{trial}: {result.get('Figure', result['title'] + '.')}")
    return ('<figure tabindex="0"><picture>'
            f'<source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
            f'<img src="{_data(light)}" width="{width}" height="{height}" alt="{alternative}">'
            '</picture></figure>\n<p class="hint narrow">the figure scrolls sideways</p>')


def _data(png):
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _rules(result):
    """The comparisons of the rule, its conditions, and the findings beside it."""
    table = [["the rule compares", "mean over seeds", "95% interval", "required", "outcome"]]
    kinds = {"conditions": "condition: ", "comparisons": "", "findings": "beside the rule: "}
    for kind, prefix in kinds.items():
        for comparison in result.get(kind, []):
            low, high = comparison["interval"]
            interval = "none" if low is None else f"{as_number(low)} to {as_number(high)}"
            outcome = TRIAL if result["outcome"] == TRIAL else comparison["outcome"]
            table.append([prefix + comparison["name"], as_number(comparison["mean"]), interval,
                          comparison["asked"], outcome])
    return _table("the rule of: " + result["title"], table) if len(table) > 1 else ""


def _table(name, table):
    head, *body = [[escape(str(cell)) for cell in line] for line in table]
    lines = ["".join(f'<th scope="col">{cell}</th>' for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in line) for line in body]
    narrow = " narrow" * (len(head) < 6)         # such a table is wider than a phone only
    hint = f'<p class="hint{narrow}">the table scrolls sideways where it is wider than the page</p>'
    return (f'<div class="table" role="region" tabindex="0" aria-label="{escape("Table: " + name)}"><table>\n'
            + "\n".join(f"<tr>{line}</tr>" for line in lines)
            + f"\n</table></div>{hint if len(head) > 3 else ''}")


def _formulas():
    lines = ['<section id="formulas">\n<h2>' + _both(OBJECTIVES, korean.OBJECTIVES) + "</h2>\n<dl>"]
    lines += [f'<dt>{escape(name)}</dt><dd class="formula">{formula}</dd>'
              for name, formula in FORMULAS.items()]
    return "\n".join([*lines, "</dl>\n</section>"])


def _glossary():
    english = [f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in (TERMS | WORDS).items()]
    in_korean = [f"<dt>{escape(term)} ({escape(', '.join(filter(None, names)))})</dt><dd>{escape(meaning)}</dd>"
                 for term, *names, meaning in korean.TERMS]
    return "\n".join([f'<section id="glossary">\n<h2>{_both("Glossary", korean.GLOSSARY)}</h2>',
                      '<dl class="en">', *english, '</dl>\n<dl class="ko" lang="ko">', *in_korean, "</dl>",
                      '<p class="turn"><a href="#top">↑ top</a></p>\n</section>'])


def _linked(text):
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', text)
