"""Arguments of csrc/cpu's functions, as ctypes passes them. Standard library only: tests load it without torch."""

import ctypes


class AdamWArguments(ctypes.Structure):
    """The arguments of cria_adamw, as csrc/cpu/adamw.h lays them out. Addresses of what is not there are None."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("param", "grad", "m", "v", "m_absmax", "v_absmax", "low", "master", "maps")
        ),
        *((name, ctypes.c_int64) for name in ("n", "offset")),
        *((name, ctypes.c_float) for name in ("scale", "rest1", "beta2", "rest2", "eps", "decay", "rate")),
        *((name, ctypes.c_uint32) for name in ("step", "seed")),
        *((name, ctypes.c_int32) for name in ("grad_type", "states", "master_type", "threads")),
    ]
