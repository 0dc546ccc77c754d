"""Converters: from datasets as they are published to shards. One file a source."""

from sr4ir_dist.data.convert.cars import CARS
from sr4ir_dist.data.convert.coco import COCO_DET, COCO_SEG
from sr4ir_dist.data.convert.cub200 import CUB200
from sr4ir_dist.data.convert.drawn import DRAWN
from sr4ir_dist.data.convert.image_folder import IMAGE_FOLDER
from sr4ir_dist.data.convert.source import Converter
from sr4ir_dist.data.convert.sr_folder import SR_FOLDER
from sr4ir_dist.data.convert.voc import VOC_DET, VOC_SEG

CONVERTERS: dict[str, Converter] = {
    "voc_seg": VOC_SEG,
    "voc_det": VOC_DET,
    "coco_seg": COCO_SEG,
    "coco_det": COCO_DET,
    "cub200": CUB200,
    "cars": CARS,
    "image-folder": IMAGE_FOLDER,
    "sr-folder": SR_FOLDER,
    "drawn": DRAWN,
}
