"""How the page looks: on paper, in light and dark, wide and narrow.

Colours of the matrix types are far apart for colour-blind eyes too, and each type has a mark of
its own besides. Ranges of values go from pale to strong, in the dark from dim to bright.
"""

from __future__ import annotations

__all__ = ["CSS"]

CSS = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1a2129;--dim:#59636f;--rule:#dde1e7;
--grid:#e7eaee;--accent:#0b5cad;--note:#8a4b00;--note-bg:#fff6e6;
--gate:#0b5cad;--up:#d35400;--down:#00805a;--light:#8250a8;--other:#9aa3ae;
--q0:#e3edf7;--q1:#c3d9ee;--q2:#98c0e1;--q3:#66a1d0;--q4:#3a7fbb;--q5:#1a5d9d;--q6:#0a3a6b;
--d0:#8f3b00;--d1:#cf7430;--d2:#f0c08f;--d3:#e4e6e9;--d4:#a9c9e6;--d5:#4a8cc4;--d6:#0a4a86}
@media screen and (prefers-color-scheme:dark){:root{--bg:#0f1419;--card:#171d24;--ink:#e6eaef;
--dim:#9aa5b1;--rule:#2a323c;--grid:#252d36;--accent:#79b8ff;--note:#ffc66d;--note-bg:#2a2216;
--gate:#6fb3f7;--up:#f7975a;--down:#3fcf9f;--light:#cfa6ee;--other:#6c7682;
--q0:#1b2a3a;--q1:#1f3d5a;--q2:#25547f;--q3:#3272a8;--q4:#4f94cd;--q5:#84bbe8;--q6:#c7e3fb;
--d0:#ffb37a;--d1:#d07a3c;--d2:#7d4f2c;--d3:#2e353d;--d4:#2c567d;--d5:#4f94cd;--d6:#b5dafb}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main,header,footer{max-width:1080px;margin:0 auto;padding:0 20px}
header{padding-top:36px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:1.2rem;margin:0 0 4px;letter-spacing:-.005em}
h3{font-size:1rem;margin:0 0 2px}
p{margin:0 0 10px}
.sub,.lead,figcaption p,footer,caption{color:var(--dim)}
.lead{max-width:70ch}
section{margin:44px 0 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin:22px 0 0;padding:0}
.tiles div,.card,.lost{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.tiles div{padding:12px 14px;display:flex;flex-direction:column}
.tiles dt{font-size:.8125rem;color:var(--dim);order:1}
.tiles dd{margin:0}
.tiles dd.big{order:2;font-size:1.45rem;font-weight:650;line-height:1.25;letter-spacing:-.01em}
.tiles dd.fine{order:3;font-size:.8125rem;color:var(--dim)}
.lost{margin:12px 0 0;padding:16px 18px;border-left:4px solid var(--accent)}
.lost p:last-child,.lost ul:last-child{margin-bottom:0}
.lost code{display:block;overflow-x:auto;white-space:nowrap;margin-top:4px;padding:5px 9px;
background:var(--bg);border:1px solid var(--rule);border-radius:6px}
.notes{margin:12px 0 0;padding:12px 18px 12px 34px;border-radius:10px;background:var(--note-bg);
border:1px solid var(--rule)}
.notes li::marker{color:var(--note)}
nav{margin:20px 0 0;font-size:.9375rem}
nav a{margin-right:16px;white-space:nowrap}
a{color:var(--accent)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:16px;
margin-top:14px}
.card{margin:0;padding:16px 18px;min-width:0}
.columns{columns:2 440px;column-gap:16px;margin-top:14px}
.columns .card{break-inside:avoid;margin-bottom:16px}
figcaption p,.card .sub{font-size:.875rem;margin-bottom:8px}
svg{display:block;width:100%;height:auto}
svg text{font-size:12px;fill:var(--ink);font-family:inherit}
.axis text{fill:var(--dim)}
svg text.label{fill:var(--dim);font-size:11.5px}
svg text.strong{font-weight:600}
.card path.grid,.card path.guide{fill:none;stroke:var(--grid)}
.card path.guide{stroke:var(--dim);stroke-dasharray:2 4}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.dashed{stroke-dasharray:6 4}
.dots{fill:none;stroke:var(--c);stroke-width:4.4;stroke-linecap:round}
.dots.square{stroke-linecap:square}
circle,g>rect,g>.dot,.key>.dot,.key>rect{fill:var(--c)}
.area,.area rect{fill:var(--c)}
.band{fill:none;stroke:var(--c)}
.gate{--c:var(--gate)}.up{--c:var(--up)}.down{--c:var(--down)}.light{--c:var(--light)}
.other{--c:var(--other)}.ink{--c:var(--ink)}.dim{--c:var(--dim)}
.q0{--c:var(--q0)}.q1{--c:var(--q1)}.q2{--c:var(--q2)}.q3{--c:var(--q3)}.q4{--c:var(--q4)}
.q5{--c:var(--q5)}.q6{--c:var(--q6)}
.d0{--c:var(--d0)}.d1{--c:var(--d1)}.d2{--c:var(--d2)}.d3{--c:var(--d3)}.d4{--c:var(--d4)}
.d5{--c:var(--d5)}.d6{--c:var(--d6)}
.legend{list-style:none;margin:0 0 8px;padding:0;display:flex;flex-wrap:wrap;gap:2px 14px;
font-size:.8125rem;color:var(--dim)}
.legend li{display:flex;align-items:center;gap:5px}
.legend svg.key{width:24px;flex:none}
.legend svg.key.area{width:11px}
details{margin-top:10px;font-size:.875rem}
summary{cursor:pointer;color:var(--accent)}
.wide{overflow-x:auto;margin-top:8px}
.wide:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--accent);
outline-offset:2px}
table{border-collapse:collapse;font-size:.875rem;min-width:min(100%,320px);overflow-wrap:normal}
caption{text-align:left;padding-bottom:4px}
th,td{text-align:right;white-space:nowrap;padding:4px 16px 4px 0;
border-bottom:1px solid var(--rule);
vertical-align:top;font-weight:400}
thead th{color:var(--dim);font-size:.8125rem;vertical-align:bottom}
th[scope=row],th.l,td.l{text-align:left;white-space:normal}
td.l{min-width:9rem;overflow-wrap:anywhere}
th:last-child,td:last-child{padding-right:0}
code{font:.875em ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace}
footer{margin-top:48px;padding-bottom:36px;font-size:.875rem}
@media (max-width:520px){main,header,footer{padding:0 14px}header{padding-top:22px}
h1{font-size:1.4rem}.card{padding:14px 12px}section{margin-top:34px}
.tiles{grid-template-columns:1fr 1fr;gap:8px}.tiles dd.big{font-size:1.2rem}
svg text{font-size:14.5px}svg text.label{font-size:14px}
table{font-size:.8125rem}th,td{padding-right:10px}}
@page{margin:14mm}
@media print{:root{--bg:#fff;--note-bg:#fff}html{font-size:11.5px}body{font-size:1rem}
nav,details:not([open]){display:none}main,header,footer{padding:0;max-width:none}
.card,.lost,.tiles div{break-inside:avoid}h2,h3,.lead{break-after:avoid}
.lead{break-inside:avoid;max-width:none}
section{margin-top:18px}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}.wide{overflow:visible}
th,td{padding:2px 9px 2px 0}table{min-width:0}.columns{columns:2}
.tiles{grid-template-columns:repeat(6,1fr)}.grid{grid-template-columns:1fr 1fr;gap:10px}}
"""
