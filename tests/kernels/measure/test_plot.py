"""What pictures of a benchmark show: every bar, mark, tick and label."""

import pytest

from kernels.measure import plot

pytest.importorskip("matplotlib")


def record(op, shape, who, kind, ms, fraction, bound="copy", **more):
    return {"op": op, "shape": shape, "who": who, "pass": kind, "ms": ms, "fraction": fraction, "bound": bound,
            "gb_per_s": 1234.5 * fraction, "tflops": 700.4 * fraction, "flops": 0, "bytes": 1e6} | more  # fmt: skip


RECORDS = [
    record("rope", "T=8", "torch eager", "fwd", 0.5, 0.25),
    record("rope", "T=8", "ours", "fwd", 0.25, 0.5),
    record("rope", "T=8", "liger-kernel", "fwd", 0.125, 1.25),
    record("rope", "T=8", "ours", "bwd", 12345.6, 0.75),
    {"op": "rope", "shape": "T=8", "who": "broken", "wrong": "output 0 is off"},
    record("rope", "T=16", "ours", "fwd", 0.0625, 0.625),
    *(record("attention", f"s={s}", who, kind, s + t, 0.25 + t / 8, "gemm", flops=4e6 * s, bytes=1e6)
      for s in (1, 2, 3, 4, 5) for who, t in (("torch eager", 1), ("ours", 0)) for kind in ("fwd", "fwd+bwd")),
    record("norm_linear", "T=2", "ours", "fwd", 2.0, 0.5, "gemm", flops=2e6, tflops=250.0),
    record("norm_linear", "T=2", "ours", "fwd+bwd", 4.0, 0.5, "copy", flops=8e6, tflops=320.0),
]  # fmt: skip
RESULT = {
    "machine": {"device": "H200", "torch": "2.9", "date": "2026-12-01"}, "records": RECORDS,
    "ceilings": {"gemm_tflops": 800.0, "copy_gb_per_s": 4000.0},
}  # fmt: skip


def told(figure):
    """Return a figure as text: what it shows, axes by axes, with colours, places and limits."""
    from matplotlib.colors import to_hex

    def numbers(values):
        return " ".join(f"{value:.4g}" for value in values)

    lines = [f"title {figure._suptitle.get_text()!r}"] if figure._suptitle else []
    lines += [f"size {numbers(figure.get_size_inches())}"]
    for ax in figure.axes:
        if not ax.axison:
            lines.append("nothing")
            continue
        titles = [ax.get_title(loc=loc) for loc in ("left", "center", "right")]
        lines.append(f"axes {titles}, x {numbers(ax.get_xlim())} {ax.get_xscale()} {ax.get_xlabel()!r}")
        lines.append(f"  y {numbers(ax.get_ylim())} {ax.get_yscale()} {ax.get_ylabel()!r}")
        for bar in ax.patches:
            lines.append(
                f"  bar {numbers((*bar.get_xy(), bar.get_width(), bar.get_height()))} {to_hex(bar.get_facecolor())}"
            )
        for line in ax.lines:
            label = "" if line.get_label().startswith("_") else line.get_label()
            lines.append(f"  line {numbers(line.get_xdata())} | {numbers(line.get_ydata())} {line.get_linestyle()} "
                         f"{line.get_marker()} {to_hex(line.get_color())} {label}")  # fmt: skip
        for text in ax.texts:
            lines.append(f"  text {text.get_text()!r} at {numbers(getattr(text, 'xy', text.get_position()))}")
        if ax.get_xscale() == "linear":
            for axis in (ax.xaxis, ax.yaxis):
                ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)
                shown = [(f"{place:.4g}", tick.get_text()) for place, tick in ticks]
                lines.append(f"  ticks {shown} {axis.get_tick_params().get('labelbottom', '')}")
    for legend in figure.legends:
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            colour = handle.get_facecolor() if hasattr(handle, "get_facecolor") else handle.get_color()
            lines.append(f"legend {to_hex(colour)} {text.get_text()}")
    return "\n".join(lines) + "\n"


def test_what_pictures_show(tmp_path, monkeypatch, snapshot):
    """A panel for each shape, a bar for each contender and pass; the roofline, of what multiplies matrices alone."""
    shown = {}

    def save(plt, figure, path):
        shown[path.name] = told(figure)
        plt.close(figure)
        return path

    monkeypatch.setattr(plot, "_save", save)
    names = ["rope.png", "attention.png", "norm_linear.png", "roofline.png"]
    assert plot.draw(RESULT, tmp_path / "deep" / "plots") == [tmp_path / "deep" / "plots" / name for name in names]
    assert list(shown) == names and (tmp_path / "deep" / "plots").is_dir()
    for name, text in shown.items():
        assert text == snapshot(name=name)


def test_without_matrix_products_there_is_no_roofline(tmp_path):
    assert plot.draw(RESULT | {"records": RECORDS[:1]}, str(tmp_path)) == [tmp_path / "rope.png"]
    assert (tmp_path / "rope.png").read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 1


def test_many_contenders_take_the_colours_in_turn():
    names = ["a", "ours", *"bcdefghij"]
    colours = plot._colours(names)
    assert colours["ours"] == plot.OURS and list(colours) == ["ours", "a", *"bcdefghij"]
    assert [colours[name] for name in "abcdefgh"] == list(plot.OTHERS) and colours["i"] == plot.OTHERS[0]
