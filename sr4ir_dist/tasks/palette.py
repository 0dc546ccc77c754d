"""The colours in which the field shows classes."""

from __future__ import annotations


def voc_palette(classes: int = 256) -> list[tuple[int, int, int]]:
    """PASCAL VOC's colour of each class number, RGB in 0..255; 255 is the void's cream.

    Neighbouring numbers get colours far apart: the bits of the number, three at a time and from
    the lowest, fill each channel from its highest bit (VOC development kit, `VOClabelcolormap`).
    """
    colours = []
    for number in range(classes):
        channels = [0, 0, 0]
        for bit in range(24):
            channels[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
        colours.append((channels[0], channels[1], channels[2]))
    return colours
