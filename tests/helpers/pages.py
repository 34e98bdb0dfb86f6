"""What every page must bear: texts that would be HTML, and scripts that find what nobody can read or name."""

XSS = (
    "<script>window.owned=1</script>",
    "<img src=x onerror=window.owned=1>",
    "<svg/onload=window.owned=1>",
    "</textarea></div></script><script>window.owned=1</script>",
    "<iframe srcdoc='<script>parent.owned=1</script>'></iframe>",
    "<a href='javascript:window.owned=1'>a</a>",
    "\"'><body onpageshow=window.owned=1><style>*{display:none}</style>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=window.owned=1&gt;'>",
    "&lt;b&gt; {{7*7}} ${7*7} [a](javascript:window.owned=1) \u202egnp.exe\u2028\u0000",
    "<!--<base href='http://elsewhere.example/'>--><meta http-equiv=refresh content='0;url=data:,'>",
)

# Return the controls without a name.
NAMELESS = """[...document.querySelectorAll('button, input, textarea, select')].filter(one =>
    !(one.labels?.length || one.textContent.trim() || one.getAttribute('aria-label'))).map(one => one.outerHTML)"""

# Return the texts that are too faint on what lies under them.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = color => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r / 255, g / 255, b / 255]
    .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    if (![...one.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !one.checkVisibility()) continue;
    if (["SCRIPT", "STYLE"].includes(one.tagName) || one.closest(":disabled, .unseen")) continue;
    let under = one;
    while (under && rgb(getComputedStyle(under).backgroundColor)[3] < 255) under = under.parentElement;
    const [a, b] = [getComputedStyle(one).color, getComputedStyle(under).backgroundColor].map(c => light(rgb(c)));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) found.push(`${one.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""
