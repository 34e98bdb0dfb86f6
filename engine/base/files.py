"""Values as JSON can say them."""

import math


def strict(value):
    """`value` as what JSON can say: NaN and infinities are null, lone surrogates are "?", 0-d arrays are numbers."""
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    return strict(value.item() if hasattr(value, "item") else str(value))
