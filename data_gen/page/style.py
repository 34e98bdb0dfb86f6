"""The style and script of the report's page."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2026; --soft: #626b78; --line: #e2e5ea; --panel: #f6f7f9;
  --main: #2459c4; --other: #c2540a; --warn: #9a5b00; --mark: #fdeaa8; --bar: #7d9fe0;
  --inner: .8 .1; --outer: .9 .055 }
@media screen and (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e3e6ea; --soft: #97a1ad;
  --line: #2b3138; --panel: #1b1f25; --main: #7aa7ff; --other: #ff9d57; --warn: #f0b357; --mark: #5d4a12; --bar:
  #4c71b8;
  --inner: .46 .085; --outer: .33 .05 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere }
h2 { margin: 2.2rem 0 .3rem; padding-top: 1.2rem; border-top: 1px solid var(--line); font-size: 1.25rem; font-weight:
  650 }
h3 { margin: 0; font-size: .93rem; font-weight: 600 }
p { margin: .3rem 0 0; max-width: 46rem } header p, .note, figcaption p { color: var(--soft); font-size: .87rem }
.note { margin-bottom: 1.1rem } .open { color: var(--warn); font-weight: 600 }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: 1rem; font-size: .87rem } a { color:
  var(--main) }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--main); outline-offset: 3px; border-radius: 3px }
dl.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1.1rem 1.5rem;
  margin: 1.75rem 0 0 }
.figures > div { padding-top: .6rem; border-top: 2px solid var(--line) }
.figures dt, .figures small, th, .label, figcaption output { color: var(--soft); font-size: .8rem; font-weight: 400 }
.figures dd { margin: .1rem 0 0; font-size: 1.3rem; font-weight: 600; line-height: 1.3 }
.figures dd, output, text, td, .n { font-variant-numeric: tabular-nums } .figures small { display: block;
  line-height: 1.3 }
figure { display: flow-root; margin: 0 0 1rem; min-width: 0 }
.head { display: flex; flex-wrap: wrap; gap: .1rem 1rem; align-items: baseline }
figcaption output { margin-left: auto; min-height: 1.3em }
.plot { height: 9.5rem; margin: 2.3rem .5rem 2.6rem 2.9rem } .long .plot { height: 14rem }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible } .plot text { fill: var(--soft);
  font-size: 11.5px }
.grid { stroke: var(--line) } .axis { stroke: var(--soft) } .hit { fill: transparent } .bar { fill: var(--bar) }
.bin:hover .bar { fill: var(--main) } .bin:hover .hit { fill: var(--line); fill-opacity: .5 }
.limit { stroke: var(--other) } .plot .limit-name { fill: var(--other) } .quantile { stroke: var(--ink);
  stroke-dasharray: 3 3 }
.plot .quantile-name { fill: var(--ink) }
path.curve { fill: none; stroke: var(--main); stroke-width: 1.8; stroke-linejoin: round; vector-effect:
  non-scaling-stroke }
path.curve.second { stroke: var(--other); stroke-dasharray: 6 3 } circle { fill: var(--main) } circle.second { fill:
  var(--other) }
.key::before { content: ""; display: inline-block; width: 1.3rem; margin-right: .4rem; vertical-align: middle;
  border-top: 2px solid var(--main) } .key.second::before { border-top: 2px dashed var(--other) }
ul.lanes:not(.tall) .row svg { height: 1.7rem; overflow: visible } .lanes > li { padding: .35rem 0 }
.wide { overflow-x: auto } .wide table { min-width: 46rem } .wide td.n { white-space: nowrap }
h3, p, dd { overflow-wrap: anywhere } .figures > div { min-width: 0 }
.won { fill: var(--bar) } .drawn { fill: var(--line) } .lost { fill: var(--other); fill-opacity: .55 }
.whisker { stroke: var(--ink); stroke-width: 2 } .estimate { fill: var(--ink) }
.key.won::before, .key.drawn::before, .key.lost::before { border-top-width: .7rem; border-top-color: var(--bar) }
.key.drawn::before { border-top-color: var(--line) } .key.lost::before { border-top-color: var(--other) }
.small { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 0 2rem }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.6rem 3rem }
.halves > * { min-width: 0 } .apart { margin-top: 1.8rem }
.wheel { display: block; width: 100%; max-width: 44rem; margin: .5rem auto 0 } .wheel path { stroke: var(--page);
  stroke-width: 1.2 }
.wheel text { fill: var(--ink); pointer-events: none } .wheel g:hover > path { stroke: var(--ink) }
.wheel .total { font-size: 24px; font-weight: 650 } .wheel .under { font-size: 13px; fill: var(--soft) }
.inner { fill: oklch(var(--inner) var(--hue)) } .outer { fill: oklch(var(--outer) var(--hue)) }
ul.bars { list-style: none; margin: .5rem 0 0; padding: 0 } .bars > li { padding: .16rem 0 }
.row { display: grid; grid-template-columns: minmax(7rem, 15rem) minmax(3rem, 1fr) 7.5rem; gap: 0 .8rem;
  align-items: center;
  font-size: .87rem } .row .name { overflow-wrap: anywhere; line-height: 1.3 } .row .n { text-align: right;
  white-space: nowrap }
.row svg { display: block; width: 100%; height: .8rem } .row small { display: inline-block; min-width: 3.4rem;
  color: var(--soft) }
.narrow .row { grid-template-columns: 12.5rem minmax(2rem, 1fr) 6.7rem }
.tall .row { grid-template-columns: 1fr 3.5rem } .tall .name { grid-column: 1 / 3; padding-bottom: .15rem }
.tall svg { height: .5rem } .folds.tall svg { margin-left: 1.1rem; width: calc(100% - 1.1rem) }
.tall > li { padding: .3rem 0 }
.list { border-left: 2px solid var(--line); margin: .4rem 0 1rem 1.1rem; padding: .1rem 0 .1rem 1rem }
summary { cursor: pointer } details.more > summary { color: var(--soft); font-size: .87rem }
.bars summary { list-style: none; border-radius: 3px } .bars summary::-webkit-details-marker { display: none }
.bars summary:hover .name { color: var(--main) }
.folds .name { position: relative; padding-left: 1.1rem }
.folds summary .name::before { content: "\\25B8"; position: absolute; left: 0; color: var(--soft) }
.folds details[open] .name::before { content: "\\25BE" }
article { margin: 0 0 1rem; border: 1px solid var(--line); border-radius: 8px; overflow: hidden }
article > div, article > details { padding: .6rem 1rem } article > * + * { border-top: 1px solid var(--line) }
.list article { margin: .5rem 0; font-size: .93rem } .list article > div { padding: .45rem .8rem }
.prompt { background: var(--panel) } .prompt .text { font-weight: 500 }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext } .label { display: block }
.wheel + *, figure + details { margin-bottom: 1.8rem }
mark { background: var(--mark); color: inherit; border-radius: 2px }
.pair { display: grid; grid-template-columns: 5.2rem 1fr 1fr } .pair > div { min-width: 0; border: 0 }
.pair .score { background: var(--panel); font-size: 1.05rem; font-weight: 600; font-variant-numeric: tabular-nums }
.pair > div + div + div { border-left: 1px solid var(--line) }
table { width: 100%; border-collapse: collapse; font-size: .87rem; margin-top: .4rem } tr { border-bottom: 1px solid
  var(--line) }
th, td { padding: .35rem 1rem .35rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere } .two th {
  width: 45% }
thead th { vertical-align: bottom } td.n, th.n { text-align: right }
@media (min-width: 50rem) { .small figcaption { min-height: 4.1rem } }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem } h1 { font-size: 1.4rem }
  dl.figures { grid-template-columns: 1fr 1fr } figure { position: relative; padding-bottom: .4rem }
  figcaption output { position: absolute; left: 0; right: 0; bottom: 0; line-height: 1.25 }
  .long .plot { margin-bottom: 3.8rem } .wheel { margin-bottom: 1.4rem }
  .row, .narrow .row { grid-template-columns: 1fr 7rem } .tall .row { grid-template-columns: 1fr 3.5rem }
  ul:not(.tall) .n { grid-row: 1; grid-column: 2 } ul:not(.tall) .row svg { grid-row: 2; grid-column: 1 / 3;
  height: .5rem; margin: .15rem 0 .3rem }
  .pair { grid-template-columns: 1fr } .pair > div + div + div { border-left: 0; border-top: 1px solid var(--line) }
  .pair .score { padding: .2rem 1rem } .list { margin-left: 0; padding-left: .7rem }
  .wheel .label-of { display: none } .wheel .roomy { display: inline; font-size: 19px } .wheel .total { font-size:
  32px }
  .wheel .under { font-size: 21px } }
@media print { body { max-width: none; padding: 0; font-size: 12px } nav, output { display: none }
  article, figure, .row, tr, .figures > div { break-inside: avoid } h2, h3 { break-after: avoid }
  .wheel { max-width: 30rem } svg, .prompt, mark, .score { print-color-adjust: exact; -webkit-print-color-adjust:
  exact } }
""" + "".join(f".v{i} {{ --hue: {(i * 18 + 20) % 360} }}\n" for i in range(20))

SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const out = figure.querySelector("output");
  if (!out) continue;
  for (const svg of figure.querySelectorAll("svg[role=img]")) {
    svg.addEventListener("pointerover", event => {
      const title = event.target.closest("g.tip, path")?.querySelector("title");
      out.textContent = title ? title.textContent : "";
    });
    svg.addEventListener("pointerleave", () => { out.textContent = ""; });
  }
}
"""
