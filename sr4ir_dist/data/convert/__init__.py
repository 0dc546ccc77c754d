"""Converters: from datasets as they are published to shards. One file a source."""

from sr4ir_dist.data.convert.cub200 import CUB200
from sr4ir_dist.data.convert.drawn import DRAWN
from sr4ir_dist.data.convert.image_folder import IMAGE_FOLDER
from sr4ir_dist.data.convert.source import Converter
from sr4ir_dist.data.convert.sr_folder import SR_FOLDER

CONVERTERS: dict[str, Converter] = {
    "cub200": CUB200,
    "image-folder": IMAGE_FOLDER,
    "sr-folder": SR_FOLDER,
    "drawn": DRAWN,
}
