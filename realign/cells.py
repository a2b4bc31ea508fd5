"""The four cells of a preference pair, in the order that they have everywhere."""

CELL_NAMES = ("chosen", "text_rejected", "image_rejected", "both_rejected")
