"""The arrays of a lowered program."""

from __future__ import annotations

import math
import re


def largest_array(text: str) -> int:
    """Elements of the largest array in a StableHLO module, arguments and results among them."""
    shapes = re.findall(r"tensor<((?:\d+x)+)", text)
    return max(math.prod(map(int, shape.split("x")[:-1])) for shape in shapes)
