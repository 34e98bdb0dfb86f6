"""The style sheet and the script of report.html."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2026; --soft: #626b78; --line: #e2e5ea; --panel: #f6f7f9;
  --train: #2459c4; --eval: #c2540a; --warn: #9a5b00 }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e3e6ea; --soft: #97a1ad; --line: #2b3138;
  --panel: #1b1f25; --train: #7aa7ff; --eval: #ff9d57; --warn: #f0b357 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere }
h2 { margin: 2.5rem 0 1rem; font-size: 1.15rem; font-weight: 650 }
h3 { margin: 0; font-size: .93rem; font-weight: 600 }
header p, .note { margin: .3rem 0 0; color: var(--soft); font-size: .87rem }
.open { color: var(--warn); font-weight: 600 }
dl.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1.1rem 1.5rem;
  margin: 1.75rem 0 2.75rem }
.figures > div { padding-top: .6rem; border-top: 2px solid var(--line) }
.figures dt, .figures small, th, figcaption small { color: var(--soft); font-size: .8rem; font-weight: 400 }
.figures dd { margin: .1rem 0 0; font-size: 1.3rem; font-weight: 600; line-height: 1.3 }
.figures dd, figcaption output, text, td { font-variant-numeric: tabular-nums }
.figures small { display: block; line-height: 1.3 }
figure { display: flow-root; margin: 0 0 .8rem; min-width: 0 }
figcaption { display: flex; flex-wrap: wrap; gap: .1rem 1rem; align-items: baseline; min-height: 1.5rem }
figcaption output { margin-left: auto; color: var(--soft); font-size: .8rem; white-space: pre-wrap }
.plot { height: 11rem; margin: .6rem .5rem 2.4rem 3.4rem } .wide .plot { height: 21rem }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; touch-action: pan-y }
.small { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 0 2rem }
text { fill: var(--soft); font-size: 11.5px } .grid { stroke: var(--line) }
.axis, .cursor { stroke: var(--soft) } .cursor { stroke-dasharray: 3 3 } .hit { fill: transparent }
path { fill: none; stroke: var(--train); stroke-width: 1.8; stroke-linejoin: round; vector-effect: non-scaling-stroke }
path.raw { stroke-width: 1; opacity: .38 } circle { fill: var(--train) }
path.eval { stroke: var(--eval); stroke-width: 1.3 } circle.eval { fill: var(--eval); stroke: var(--page) }
.key::before { content: ""; display: inline-block; width: 1.1rem; margin-right: .4rem; vertical-align: middle;
  border-top: 2px solid var(--train) }
.key.raw::before { border-top-width: 1px; opacity: .5 }
.key.eval::before { width: .5rem; height: .5rem; border: 0; border-radius: 50%; background: var(--eval) }
article { margin: 0 0 1.25rem; border: 1px solid var(--line); border-radius: 8px; overflow: hidden }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0 0; max-height: 24rem; overflow: auto }
.prompt { padding: .8rem 1rem; background: var(--panel) } .prompt .text { font-weight: 500 }
.pair { display: grid; grid-template-columns: 1fr 1fr } .pair > div { padding: .8rem 1rem; min-width: 0 }
.pair > div + div { border-left: 1px solid var(--line) } .pair .before { color: var(--soft) }
details { padding: .6rem 1rem; border-top: 1px solid var(--line) } details > div { margin-top: .8rem }
summary { cursor: pointer; color: var(--soft); font-size: .87rem } .label { color: var(--soft); font-size: .8rem }
.label { margin: .8rem 0 0 } pre { margin: .2rem 0 0; padding: .6rem .8rem; background: var(--panel); font-size: .87rem;
  border-radius: 8px; white-space: pre-wrap; overflow-wrap: anywhere; user-select: all }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 0 3rem }
table { width: 100%; border-collapse: collapse; font-size: .87rem } tr { border-bottom: 1px solid var(--line) }
th, td { padding: .35rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere } th { width: 45%;
  padding-right: 1rem }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem } h1 { font-size: 1.4rem } .wide .plot { height: 15rem }
  dl.figures { grid-template-columns: 1fr 1fr } .pair { grid-template-columns: 1fr }
  .pair > div + div { border-left: 0; border-top: 1px solid var(--line) } figcaption output { margin-left: 0 } }
"""

SCRIPT = """
for (const figure of document.querySelectorAll("figure[data-rows]")) {
  const rows = JSON.parse(figure.dataset.rows), [low, high] = JSON.parse(figure.dataset.range);
  const svg = figure.querySelector("svg"), out = figure.querySelector("output"), cursor = svg.querySelector(".cursor");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const step = low + (event.clientX - box.left) / box.width * (high - low);
    const row = rows.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
    const x = 100 * (row[0] - low) / (high - low) + "%";
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.removeAttribute("display");
    out.textContent = row[1];
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("display", "none"); out.textContent = ""; });
}
"""
