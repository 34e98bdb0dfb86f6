"""Tiles of the interpreter other than the shipped ones, which are as large as fits: what is small needs less work."""

from kernels.ops.common import launch_table

TOY = {  # tiles that hold a toy whole: the shipped ones are nearly all padding then
    "swiglu": {"forward": {"COLS": 128}, "backward": {"COLS": 128}},
    "linear_cross_entropy": {"rows": {"VECTORS": 64}, "scale": {"BLOCK": 4096}},
    "adamw": {"update": {"BLOCK": 4096}, "update_8bit": {"BLOCK": 4096}},
    "grad_norm": {"partial": {"BLOCK": 4096}, "total": {"BLOCK": 4096}},
}


def set_tiles(patch, tiles):
    """Set constexprs, {op: {kernel: constexprs}}, in every interpreter entry for as long as a MonkeyPatch lasts."""
    for op, changes in tiles.items():
        for kernel, constexprs in changes.items():
            sizes = launch_table(op)[kernel]["interpreter"]
            for size, config in sizes.items():
                patch.setitem(sizes, size, config | constexprs)
