"""The frame of the pages that this package writes: one head, one style, nothing from elsewhere."""

from __future__ import annotations

from markupsafe import Markup

_STYLE = Markup("""
:root{color-scheme:light dark;--ink:#1d2430;--soft:#59616e;--paper:#fff;--line:#d9dde3;
--shade:#f4f6f8;--good:#12702a;--bad:#b3261e;--best:#e6f4ea;--link:#0b57d0;
--s0:#0b62c4;--s1:#c2410c;--s2:#15803d;--s3:#9333ea;--s4:#b45309;--s5:#0e7490;--s6:#be185d;
--s7:#4d5560}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#a3abb8;--paper:#14181d;
--line:#333b45;--shade:#1d232a;--good:#6fd08c;--bad:#ff8a80;--best:#1c3a26;--link:#8ab4f8;
--s0:#6cb0ff;--s1:#ff9d6b;--s2:#6fd08c;--s3:#c99bff;--s4:#f0b35e;--s5:#5fd0e0;--s6:#ff8fc0;
--s7:#b3bbc7}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1160px;padding:1rem;
color:var(--ink);background:var(--paper);overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.25rem;margin:2.2rem 0 .6rem;
padding-top:.8rem;border-top:1px solid var(--line)}h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0 .8rem;max-width:75ch}p.soft,figcaption,small{color:var(--soft)}
img{max-width:100%;height:auto}a{color:var(--link)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
td,th{padding:.35rem .7rem;text-align:left;border-bottom:1px solid var(--line);
vertical-align:top;font-weight:400;overflow-wrap:normal}td{overflow-wrap:anywhere;min-width:5rem}
thead th{font-weight:600;color:var(--soft)}
table.figures td,table.figures thead th{text-align:right;white-space:nowrap}
table.figures thead th:first-child,table.figures tbody th,
table.ranked td:nth-child(-n+2),table.ranked thead th:nth-child(-n+2){text-align:left}
table.figures tbody th{min-width:9rem}
tr.best td,td.best{background:var(--best);font-weight:600}tr.paper>*{color:var(--soft)}
pre{background:var(--shade);padding:.7rem .9rem;border-radius:6px;overflow-x:auto;font-size:13px;
line-height:1.45;white-space:pre-wrap}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--link)}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
""")


def document(title: str, body: Markup, style: str = "") -> str:
    """A whole HTML page that fetches nothing: no script runs, and images are data URIs.

    Args:
        title: the window's title, as text.
        body: what is inside `<main>`.
        style: more CSS.
    """
    page = Markup(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<link rel="icon" href="data:,"><title>{}</title><style>{}{}</style></head>\n'
        "<body><main>{}</main></body></html>\n"
    )
    return str(page.format(title, _STYLE, Markup(style), body))
